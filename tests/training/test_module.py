import csv
import re
import shutil
from itertools import groupby
from pathlib import Path

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file

from lora_gpt2.errors import UserError
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.adapter import describe_adapter
from lora_gpt2.weights.store import base_hash, read_weights
from tests.conftest import needs_compiler, train

DIVERGING = ["optimizer.lr=3", "optimizer.warmup_steps=12", "optimizer.schedule=constant"]


def metrics(folder: Path, name: str) -> list[float]:
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def checkpoint(folder: Path, name: str) -> dict:
    (path,) = (folder / "checkpoints").glob(f"{name}*.ckpt")
    return torch.load(path, weights_only=True)


def test_with_lora_only_its_matrices_train_and_every_b_moves(tmp_path, tiny, base):
    train(tmp_path, *tiny, "lora=qv", f"base={base}", "trainer.max_epochs=1")
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert all("lora_" in name for name in tensors)
    moved = [name for name, value in tensors.items() if name.endswith("lora_B") and value.any()]
    assert len(moved) == 2  # one a layer
    state = checkpoint(tmp_path, "last")["state_dict"]
    assert {name.removeprefix("model.") for name in state} == tensors.keys()


def test_the_frozen_base_is_the_same_to_the_bit_after_training(tmp_path, tiny, base):
    train(tmp_path, *tiny, "lora=qv", f"base={base}", "trainer.max_epochs=1")
    description, tensors = read_weights(base / "model.safetensors")
    model = GPT2LMModel(description.gpt2_config)
    model.load_weight(tensors)
    assert describe_adapter(tmp_path)[1].base_sha256 == base_hash(model)


def test_without_lora_everything_trains(tmp_path, tiny, base):
    train(tmp_path, *tiny, f"base={base}", "trainer.max_epochs=1", "keep=last")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path))
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_full_and_in_mixed_precision(tmp_path, tiny, base, precision):
    large_eps = (
        "optimizer.eps=1",
        "optimizer.lr=0.1",
        "optimizer.weight_decay=0",
    )  # steps as long as gradients
    common = (
        *tiny,
        *large_eps,
        f"base={base}",
        f"trainer.precision={precision}",
        "trainer.max_epochs=1",
        "keep=last",
    )
    before = load_file(base / "model.safetensors")
    moved = []
    for most in ("null", "1e-5"):
        train(tmp_path / most, *common, f"trainer.gradient_clip_val={most}")
        after = load_file(tmp_path / most / "model.safetensors")
        moved.append(max(float((after[name] - before[name]).abs().max()) for name in before))
    assert moved[0] > 1e-3
    assert 0 < moved[1] < 1e-5


def test_the_seed_decides_every_number(tmp_path, tiny):
    arguments = [*tiny, "model.dropout=0.2", "trainer.max_epochs=1"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, *arguments, f"seed={seed}")
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["transformer.wte.weight"], c["transformer.wte.weight"])


def test_the_schedule_counts_optimizer_steps_when_gradients_accumulate(tmp_path, tiny):
    arguments = ["trainer.accumulate_grad_batches=3", "trainer.log_every_n_steps=1", "trainer.max_epochs=2"]
    train(tmp_path, *tiny, *arguments)
    assert checkpoint(tmp_path, "last")["global_step"] == 4
    rates = [rate for rate, _ in groupby(metrics(tmp_path, "lr"))]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.005])


def test_the_best_or_the_last_weights_are_kept(tmp_path, tiny):
    for keep in ("best", "last"):
        train(tmp_path / keep, *tiny, *DIVERGING, f"keep={keep}")
    losses = metrics(tmp_path / "best", "valid/loss")
    assert min(losses) < losses[-1], "the run was meant to get worse"
    for keep, file in (("best", "best"), ("last", "last")):
        state = checkpoint(tmp_path / keep, file)["state_dict"]
        kept = load_file(tmp_path / keep / "model.safetensors")
        assert torch.equal(kept["transformer.wte.weight"], state["model.transformer.wte.weight"])
    notes = read_weights(tmp_path / "best" / "model.safetensors")[0].notes
    assert notes["valid_loss"] == pytest.approx(min(losses))


def test_the_best_k_checkpoints_are_kept_beside_the_last(tmp_path, tiny):
    train(tmp_path, *tiny, "trainer.max_epochs=4", "callbacks.checkpoint.save_top_k=2")
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    losses = metrics(tmp_path, "valid/loss")
    best = sorted(range(4), key=losses.__getitem__)[:2]
    assert names == sorted([f"best-{6 * (epoch + 1)}.ckpt" for epoch in best] + ["last.ckpt"])


def test_a_run_resumed_elsewhere_keeps_the_best_of_before(tmp_path, tiny):
    train(tmp_path / "first", *tiny, *DIVERGING, "trainer.max_epochs=2")
    train(tmp_path / "second", *tiny, *DIVERGING, f"resume={tmp_path / 'first'}")
    train(tmp_path / "whole", *tiny, *DIVERGING)
    whole, resumed = (read_weights(tmp_path / name / "model.safetensors") for name in ("whole", "second"))
    assert whole[0].notes == resumed[0].notes
    assert all(torch.equal(whole[1][name], resumed[1][name]) for name in whole[1])


def test_early_stopping_ends_a_run_that_gets_worse(tmp_path, tiny):
    train(tmp_path, *tiny, "callbacks=early_stopping", "callbacks.early_stopping.patience=1",
          "trainer.max_epochs=30", "optimizer.lr=0.3", "optimizer.schedule=constant")  # fmt: skip
    assert len(metrics(tmp_path, "valid/loss")) < 30


def test_a_run_that_stopped_early_trains_no_further_when_resumed(tmp_path, tiny):
    stops = [*tiny, "callbacks=early_stopping", "callbacks.early_stopping.patience=1", "keep=last",
             "trainer.max_epochs=30", "optimizer.lr=0.3", "optimizer.schedule=constant"]  # fmt: skip
    train(tmp_path / "first", *stops)
    train(tmp_path / "again", *stops, f"resume={tmp_path / 'first'}")
    first, again = (read_weights(tmp_path / name / "model.safetensors")[1] for name in ("first", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_more_patience_goes_on_and_any_other_reason_does_not(tmp_path, tiny):
    stops = [*tiny, "callbacks=early_stopping", "keep=last", "trainer.max_epochs=8", "optimizer.lr=0.3",
             "optimizer.schedule=constant", "callbacks.early_stopping.patience=1"]  # fmt: skip
    train(tmp_path / "first", *stops)
    train(tmp_path / "patient", *stops, f"resume={tmp_path / 'first'}",
          "callbacks.early_stopping.patience=20")  # fmt: skip
    first, patient = (metrics(tmp_path / name, "valid/loss") for name in ("first", "patient"))
    assert len(first) < 8 == len(first) + len(patient)

    stops = [*stops, "+callbacks.early_stopping.stopping_threshold=100"]
    train(tmp_path / "good enough", *stops)
    train(tmp_path / "again", *stops, f"resume={tmp_path / 'good enough'}")
    assert len(metrics(tmp_path / "good enough", "valid/loss")) == 1
    assert not (tmp_path / "again" / "metrics.csv").exists()


def test_a_checkpoint_names_no_files_elsewhere(tmp_path, tiny):
    train(tmp_path / "first", *tiny, "trainer.max_epochs=1")
    (secret := tmp_path / "secret.txt").write_text("secret")
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    held = torch.load(last, weights_only=True)
    (state,) = (state for name, state in held["callbacks"].items() if name.startswith("BestCheckpoints"))
    state["best_k_models"] = dict.fromkeys([str(secret)], torch.tensor(0.0))
    state["best_model_path"] = state["kth_best_model_path"] = str(secret)
    state["dirpath"] = str(tmp_path / "second" / "checkpoints")
    torch.save(held, last)
    train(tmp_path / "second", *tiny, "trainer.max_epochs=2", f"resume={tmp_path / 'first'}")
    assert not list((tmp_path / "second").rglob(secret.name))
    assert secret.read_text() == "secret"


def test_a_plateau_lowers_the_rate(tmp_path, tiny, capsys):
    train(tmp_path, *tiny, "optimizer.schedule=plateau", "optimizer.plateau_patience=0", "optimizer.lr=0.3",
          "trainer.max_epochs=8", "trainer.log_every_n_steps=1")  # fmt: skip
    assert "validation loss stalled: the rate falls to 1.5e-01" in capsys.readouterr().out
    assert min(metrics(tmp_path, "lr")[2:]) <= 0.15


def test_smoothing_is_in_the_training_loss_and_not_in_the_validation_loss(tmp_path, tiny, base):
    for smoothing in (0.0, 0.5):
        arguments = [f"base={base}", "optimizer.lr=1e-12", "trainer.log_every_n_steps=1"]
        train(tmp_path / str(smoothing), *tiny, *arguments, f"label_smoothing={smoothing}")
    plain, smooth = (tmp_path / name for name in ("0.0", "0.5"))
    assert metrics(plain, "valid/loss") == pytest.approx(metrics(smooth, "valid/loss"))
    assert metrics(plain, "train/loss") != pytest.approx(metrics(smooth, "train/loss"), rel=1e-3)


def test_progress_says_loss_rate_speed_and_time_left(tmp_path, tiny, capsys):
    train(tmp_path, *tiny, "callbacks.progress.every=0")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  step 4/18"))
    assert all(word in line for word in ("epoch 1", "loss ", "lr 9.", "tokens/s", "left"))


@pytest.mark.parametrize(
    ("change", "message"),
    [("seed=7", "belongs to another base"), ("model.n_embd=32", "is of another model"),
     ("optimizer.lora_plus_ratio=4", "has optimizer.lora_plus_ratio 1, here it is 4"),
     ("lora.rank=2", r"lora_attn_dim 4 \(here 2\)"), ("lora.alpha=1", r"lora_attn_alpha 32.0 \(here 1.0\)")],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(tmp_path, tiny, change, message):
    """By its settings; those of earlier versions, which say none, by what they hold."""
    train(tmp_path / "one", *tiny, "lora=qv", "trainer.max_steps=1")
    again = [*tiny, "lora=qv", change, f"resume={tmp_path / 'one'}"]
    with pytest.raises(UserError, match=f"goes on from a run of other settings: .*{change.split('=')[0]} "):
        train(tmp_path / "two", *again)
    last = tmp_path / "one" / "checkpoints" / "last.ckpt"
    held = torch.load(last, weights_only=True)
    del held["settings"]
    torch.save(held, last)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "two", *again)


def test_a_truncated_checkpoint_is_refused(tmp_path, tiny):
    train(tmp_path / "one", *tiny, "trainer.max_steps=1")
    path = tmp_path / "one" / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"last.ckpt: (could not be read|is damaged)"):
        train(tmp_path / "two", *tiny, f"resume={tmp_path / 'one'}")


class BaseHashes(Callback):
    """Notes the hash of the base before and after training."""

    seen: list[str] = []  # noqa: RUF012  (a callback built by Hydra is out of the test's reach)

    def on_fit_start(self, trainer, pl_module):
        self.seen.append(base_hash(pl_module.model))

    on_fit_end = on_fit_start


@pytest.mark.parametrize(("lora", "frozen"), [("qv", True), ("none", False)])
def test_training_moves_the_base_only_where_there_is_no_lora(tmp_path, tiny, lora, frozen):
    BaseHashes.seen.clear()
    hashes = "+callbacks.hashes={_target_: tests.training.test_module.BaseHashes}"
    train(tmp_path, *tiny, f"lora={lora}", hashes, "trainer.max_steps=3", "keep=last")
    before, after = BaseHashes.seen
    assert (before == after) is frozen


def test_progress_counts_tokens_and_shows_the_loss(tmp_path, tiny, capsys):
    train(tmp_path, *tiny, "callbacks.progress.every=0", "trainer.max_steps=3")
    assert re.search(r"step 3/3 .* loss \d+\.\d{4}  lr \S+  [1-9][\d,]* tokens/s", capsys.readouterr().out)


def test_a_bfloat16_base_trains_the_same_adapter_to_its_rounding(tmp_path, tiny, base):
    arguments = [*tiny, "lora=qv", "lora.dropout=0", f"base={base}"]
    for precision in ("float32", "bfloat16"):
        train(tmp_path / precision, *arguments, f"precision={precision}")
    exact, rounded = (metrics(tmp_path / name, "valid/loss") for name in ("float32", "bfloat16"))
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=5e-3)
    hashes = [describe_adapter(tmp_path / name)[1].base_sha256 for name in ("float32", "bfloat16")]
    assert hashes[0] == hashes[1]
    assert all(
        value.dtype is torch.float32
        for value in load_file(tmp_path / "bfloat16" / "adapter.safetensors").values()
    )


@needs_compiler
def test_compiled_training_gives_the_same_losses(tmp_path, tiny, base):
    arguments = [*tiny, "lora=qv", f"base={base}", "trainer.max_epochs=1"]
    for compiled in ("false", "true"):
        train(tmp_path / compiled, *arguments, f"compile={compiled}")
    plain, compiled = (metrics(tmp_path / name, "valid/loss") for name in ("false", "true"))
    assert plain == pytest.approx(compiled, rel=1e-5)


def test_a_missing_compiler_is_named(tmp_path, tiny, base, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"compile: needs a C\+\+ compiler"):
        train(tmp_path, *tiny, "lora=qv", f"base={base}", "compile=true")
