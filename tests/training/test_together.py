"""Adapters that train together end as each would alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_gpt2.errors import UserError
from lora_gpt2.gate import ConfigError
from lora_gpt2.model import parts
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.side_by_side import SideBySide
from lora_gpt2.weights.store import read_weights
from tests.conftest import settings_of, train
from tests.training.test_resume import Killed


def models(**shared) -> list[GPT2LMModel]:
    """Three that differ in rank, alpha and values."""
    built = []
    for rank, alpha in ((1, 8), (4, 16), (2, 32)):
        torch.manual_seed(0)
        config = GPT2Config(
            300, 64, 64, 32, 2, 4, initializer_range=0.2, lora_attn_dim=rank, lora_attn_alpha=alpha, **shared
        )
        model = GPT2LMModel(config).double().train()
        model.train_only_lora()
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.05)
        built.append(model)
    return built


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3 + seed, 9 + 4 * seed)
    ids, labels = (torch.randint(0, 300, shape, generator=generator) for _ in range(2))
    return ids, labels, torch.rand(shape, generator=generator) < 0.5


@pytest.mark.parametrize(
    "shared",
    [
        {},
        {"lora_init": "pissa", "lora_rslora": True},
        {"lora_targets": ["q", "k", "c_proj", "mlp_c_fc", "mlp_c_proj"]},
        {"lora_dropout": 0.4, "lora_r_dropout": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("part", [2**30, 40 * 32 * 8], ids=["whole", "in parts"])
def test_losses_and_gradients_are_those_of_each_model_alone(monkeypatch, shared, part):
    monkeypatch.setattr(parts, "_HIDDEN_BYTES", part)
    batches = [rows(seed) for seed in range(3)]
    expected = []
    for seed, (model, batch) in enumerate(zip(models(**shared), batches, strict=True)):
        torch.manual_seed(seed)
        loss = parts.loss_in_parts(model, batch, 0.1)
        loss.backward()
        expected.append((loss, [p.grad for p in model.parameters() if p.requires_grad]))
    together = SideBySide(models(**shared))
    together.seed(range(3))
    total, losses = together.loss(batches, [0.1] * 3)
    total.backward()
    torch.testing.assert_close(total.detach(), losses.sum())
    for model, loss, (alone, grads) in zip(together.models, losses, expected, strict=True):
        torch.testing.assert_close(loss, alone.detach(), rtol=1e-6, atol=1e-7)
        found = [p.grad for p in model.parameters() if p.requires_grad]
        torch.testing.assert_close(found, grads, rtol=1e-5, atol=1e-8)


def test_a_model_beside_others_can_still_run_alone():
    first, *_ = models()
    batch = rows(0)
    expected = first.completion_loss(*batch)
    together = SideBySide(models())
    together.loss([rows(seed) for seed in range(3)], [0.0] * 3)
    torch.testing.assert_close(together.models[0].completion_loss(*batch), expected)


SEVERAL = ["lora.rank=[1,4,2]", "lora.alpha=[8,16,32]", "optimizer.lr=[0.01,0.003,0.01]", "seed=[3,5,3]"]
NAMES = [
    "lora.rank-1_lora.alpha-8.0_optimizer.lr-0.01_seed-3",
    "lora.rank-4_lora.alpha-16.0_optimizer.lr-0.003_seed-5",
    "lora.rank-2_lora.alpha-32.0_optimizer.lr-0.01_seed-3",
]


@pytest.mark.parametrize(
    "more",
    [[], ["precision=bfloat16", "lora.dropout=0"], ["keep=last", "trainer.gradient_clip_val=0.01"]],
    ids=str,
)
def test_adapters_trained_together_are_those_trained_alone(tmp_path, tiny, base, more):
    arguments = [*tiny, "lora=qv", "lora.dropout=0.2", f"base={base}", *more]
    together = train(tmp_path / "together", *arguments, *SEVERAL)
    alone = [
        train(tmp_path / name, *arguments, *(part.replace("-", "=") for part in name.split("_")))
        for name in NAMES
    ]
    assert together == pytest.approx(min(alone), rel=1e-2 if "precision=bfloat16" in more else 1e-4)
    close = 0.1 if "precision=bfloat16" in more else 1e-3
    for name in NAMES:
        file = Path(name) / "adapter.safetensors"
        (one, found), (other, expected) = (
            read_weights(folder / file) for folder in (tmp_path / "together", tmp_path)
        )
        assert (one.config, one.base_sha256, one.seed) == (other.config, other.base_sha256, other.seed)
        assert one.notes["valid_loss"] == pytest.approx(other.notes["valid_loss"], rel=1e-2)
        assert found.keys() == expected.keys()
        distance = max(float((found[key] - value).norm() / value.norm()) for key, value in expected.items())
        assert distance < close, name


def test_a_resumed_run_of_several_equals_an_uninterrupted_one(tmp_path, tiny, base):
    arguments = [*tiny, "lora=qv", "lora.dropout=0.2", f"base={base}", "lora.rank=[1,2]", "seed=[1,2]"]
    arguments += ["callbacks.last.every_n_train_steps=1"]
    train(tmp_path / "whole", *arguments)
    kill = "+callbacks.kill={_target_: tests.training.test_resume.KillAfter, step: 8}"
    with pytest.raises(Killed):
        train(tmp_path / "broken", *arguments, kill)
    train(tmp_path / "resumed", *arguments, f"resume={tmp_path / 'broken'}")
    for name in ("lora.rank-1_seed-1", "lora.rank-2_seed-2"):
        expected, found = (
            load_file(tmp_path / folder / name / "adapter.safetensors") for folder in ("whole", "resumed")
        )
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_other_adapters_do_not_resume_the_run(tmp_path, tiny, base):
    arguments = [*tiny, "lora=qv", f"base={base}", "trainer.max_epochs=1"]
    train(tmp_path / "a", *arguments, "lora.rank=[1,2]")
    for others in (["lora.rank=[1,4]"], ["lora.rank=[1,2,4]"], ["lora.rank=1"]):
        with pytest.raises(UserError, match="resume"):
            train(tmp_path / "b", *arguments, *others, f"resume={tmp_path / 'a'}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=[1,2]", "seed=[1,2,3]"], "need one length, here: lora.rank 2, seed 3"),
        (["lora.rank=[1,0]"], "lora.rank must be above 0 for each of several adapters"),
        (["lora.rank=[]"], "lora.rank is an empty list"),
        (["lora.rank=[2,2]"], "two of several adapters at once are the same"),
        (["lora.rank=[1,two]"], "lora.rank must be a whole number, or a list"),
        (["lora.rank=four"], "lora.rank must be a whole number, or a list"),
        (["lora.rank=2.5"], "lora.rank must be a whole number, or a list"),
        (["optimizer.lr=[0.1,-1]", "lora.rank=[1,2]"], "optimizer.lr must be above 0"),
        (["lora.alpha=[x]"], "lora.alpha must be a number, or a list"),
        (["seed=[1,2]", "lora.rank=2"], "base must be given"),
        (["lora.rank=[1,2]", "lora.dora=true"], "lora.dora cannot be had with several adapters"),
        (["lora.rank=[1,2]", "lora.bias=all"], "lora.bias must be none with several adapters"),
        (["lora.rank=[1,2]", "model.dropout=0.1"], "model.dropout must be 0 with several adapters"),
        (["lora.rank=[1,2]", "gradient_checkpointing=true"], "gradient_checkpointing cannot be had with"),
        (["lora.rank=[1,2]", "data.pack=true"], "data.pack cannot be had with several adapters"),
        (["lora.rank=4", "precision=bfloat16", "lora.bias=all"], "lora.bias all trains what precision"),
        (
            ["trainer.precision=16-mixed", "trainer.gradient_clip_val=1"],
            "gradient_clip_val does not go with 16-mixed",
        ),
    ],
)
def test_what_several_adapters_cannot_have_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        settings_of("train", overrides)


def test_a_list_of_one_is_one():
    (name, member), *others = settings_of("train", ["lora.rank=[4]", "model.dropout=0.1"]).members().items()
    assert (name, member.lora.rank, others) == ("", 4, [])


@pytest.mark.parametrize("shared", [{"lora_dora": True}, {"lora_bias": "all"}, {"fix_dropout": 0.1}])
def test_models_that_cannot_stand_side_by_side_are_refused(shared):
    with pytest.raises(ValueError, match="side by side"):
        SideBySide(models(**shared))
