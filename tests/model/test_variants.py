"""Every LoRA variant on every set of targets: its start, its gradients, merging, saving."""

from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

from lora_gpt2 import GPT2Config, GPT2LMModel
from lora_gpt2.model.keys import is_lora
from lora_gpt2.model.lora import LayerNorm

PARTS = [list(c) for n in (1, 2, 3) for c in combinations(("q", "k", "v"), n)]
WHOLE = [["c_attn"], ["c_proj"], ["mlp_c_fc"], ["mlp_c_proj"], ["q", "v", "c_proj", "mlp_c_fc", "mlp_c_proj"]]
TARGETS = {"+".join(targets): targets for targets in PARTS + WHOLE}

VARIANTS = {
    "plain": {},
    "rslora": {"lora_rslora": True},
    "dora": {"lora_dora": True},
    "pissa": {"lora_init": "pissa"},
    "olora": {"lora_init": "olora"},
    "dora+pissa": {"lora_dora": True, "lora_init": "pissa"},
    "bias=lora_only": {"lora_bias": "lora_only"},
    "bias=all": {"lora_bias": "all"},
    "rank_pattern": {"lora_rank_pattern": {"h.1.*": 3}},
    "rank_pattern=0": {"lora_rank_pattern": {"h.0.*": 0}},
    "alpha_pattern": {"lora_alpha_pattern": {"h.0.*": 1}},
    "dropouts": {"lora_dropout": 0.2, "lora_r_dropout": 0.3},
    "no bias": {"bias": False, "lora_dora": True},
}
IDS = torch.randint(0, 23, (3, 9), generator=torch.Generator().manual_seed(1))


def build(targets: list[str], **variant) -> GPT2LMModel:
    torch.manual_seed(2)
    config = GPT2Config(23, 16, 16, 8, 2, 2, initializer_range=0.3, lora_attn_dim=2, lora_attn_alpha=4,
                        lora_targets=targets, **variant)  # fmt: skip
    model = GPT2LMModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def disturb(model: GPT2LMModel) -> None:
    """Gives every trained tensor another value, as training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.add_(0.1 * torch.randn_like(parameter))


def logits(model: GPT2LMModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def targets(request):
    return request.param


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_keeps_the_laws_of_lora(targets, variant):
    model = build(targets, **variant)
    base = GPT2LMModel(GPT2Config(23, 16, 16, 8, 2, 2, bias=variant.get("bias", True))).eval()
    base.load_weight({k: v for k, v in model.weights().items() if not is_lora(k)})
    start = logits(base)
    torch.testing.assert_close(logits(model), start, atol=2e-5, rtol=1e-5)  # the start equals the base

    disturb(model)  # from B = 0 no gradient reaches A
    model.train_only_lora()
    model.train()
    model(IDS, lm_labels=IDS)[1].backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == is_lora(name), name

    model.eval()
    unmerged, before = logits(model), {k: v.clone() for k, v in model.weights().items()}
    assert not torch.allclose(unmerged, start, atol=1e-3)
    model.merge()
    torch.testing.assert_close(logits(model), unmerged, atol=2e-5, rtol=1e-5)
    model.unmerge()
    assert all(torch.equal(before[name], value) for name, value in model.weights().items())

    again = build(targets, **variant)
    again.load_weight(before)
    assert torch.equal(logits(again), unmerged)


@pytest.mark.parametrize(
    ("variant", "scaling"),
    [({}, 2.0), ({"lora_rslora": True}, 4 / 2**0.5), ({"lora_alpha_pattern": {"*": 1}}, 0.5)],
)
def test_the_update_is_scaled_as_the_variant_defines(variant, scaling):
    model = build(["q"], **variant)
    disturb(model)
    layer = model.transformer.h[0].attn.c_attn
    expected = torch.zeros(24, 8)
    expected[:8] = scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.delta_weight(), expected.T)


def test_pissa_starts_with_the_leading_singular_directions():
    layer = build(["c_proj"], lora_init="pissa").transformer.h[1].attn.c_proj
    u, s, vh = torch.linalg.svd(layer.weight.T)
    torch.testing.assert_close(layer.scaling * layer.lora_B @ layer.lora_A, u[:, :2] * s[:2] @ vh[:2])


def test_olora_starts_with_orthonormal_columns():
    layer = build(["mlp_c_fc"], lora_init="olora").transformer.h[1].mlp.c_fc
    torch.testing.assert_close(layer.lora_B.T @ layer.lora_B, torch.eye(2), atol=1e-5, rtol=0)


def test_dora_keeps_the_lengths_that_its_magnitudes_say():
    model = build(["q", "v"], lora_dora=True)
    disturb(model)
    layer = model.transformer.h[0].attn.c_attn
    magnitude = layer.lora_magnitude.detach().clone()
    model.merge()
    lengths = layer.weight.T.norm(dim=1)
    torch.testing.assert_close(torch.cat((lengths[:8], lengths[16:])), magnitude.abs())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_loaded_later_is_what_the_update_starts_from(init):
    other = GPT2LMModel(GPT2Config(23, 16, 16, 8, 2, 2)).eval()
    model = build(["q", "v"], lora_init=init, lora_dora=True)
    model.load_weight(other.weights())
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-5)


def test_an_adapted_model_without_its_padding_or_positions_keeps_losses_and_logits():
    plain, padded = build(["q"]), build(["q"], vocab_multiple=64)
    disturb(plain)
    padded.load_weight(plain.weights())
    assert padded.transformer.wte.weight.shape == (64, 8)
    assert torch.equal(logits(padded), logits(plain))
    for smoothing in (0.0, 0.1):
        losses = [model(IDS, lm_labels=IDS, label_smooth=smoothing)[1] for model in (plain, padded)]
        torch.testing.assert_close(*losses)
    padded.crop_block_size(9)
    assert torch.equal(logits(padded), logits(plain))
    with pytest.raises(ValueError, match="10 tokens are more than n_ctx 9"):
        padded(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="block_size must be from 1 to 9"):
        padded.crop_block_size(10)


def test_the_norms_have_the_epsilon_that_is_asked_for():
    norm = GPT2LMModel(GPT2Config(23, 16, 16, 8, 2, 2, layer_norm_epsilon=0.5)).transformer.h[0].ln_1
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), torch.nn.functional.layer_norm(x, (8,), eps=0.5))


def test_without_biases_there_are_fewer_parameters():
    with_bias, without = build(["q"]), build(["q"], bias=False)
    assert not [name for name, _ in without.named_parameters() if name.endswith("bias")]
    biases = sum(p.numel() for name, p in with_bias.named_parameters() if name.endswith("bias"))
    assert with_bias.get_num_params() - without.get_num_params() == biases > 0
    assert with_bias.get_num_params(False) - with_bias.get_num_params() == 16 * 8


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("none", set()),
        ("lora_only", {"h.0.attn.c_attn", "h.1.attn.c_attn"}),
        ("all", {f"h.{i}.{kind}" for i in (0, 1) for kind in (
            "ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")} | {"ln_f"}),
    ],
)  # fmt: skip
def test_the_biases_that_train_are_those_that_were_asked_for(which, expected):
    model = build(["q"], lora_bias=which)
    model.train_only_lora()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    biases = {
        name.removeprefix("transformer.").removesuffix(".lora_bias") for name in trained if "bias" in name
    }
    assert biases == expected


def test_an_update_drawn_anew_starts_at_nothing():
    model = build(["q"], lora_bias="all")
    biases = [value for name, value in model.named_parameters() if name.endswith("lora_bias")]
    for bias in biases:
        torch.nn.init.ones_(bias)
    model.init_weights()
    assert len(biases) == 13
    assert not any(bias.any() for bias in biases)


def test_small_changes_of_doras_magnitudes_act_in_bfloat16():
    model = build(["c_attn"], lora_dora=True)
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(64, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        bias = layer.bias.clone()
        layer.bias.zero_()
        assert layer(x).dtype is torch.bfloat16
        before = layer(x).float()
        layer.lora_magnitude *= 1.003
        gain = (layer(x).float() * before).sum() / before.square().sum()
        layer.bias.copy_(bias)
    assert float(gain) == pytest.approx(1.003, abs=7e-4)


def test_a_fresh_dora_over_bfloat16_is_its_base_to_the_bit():
    """Lengths are of float32: rounded, they would differ from the magnitudes."""
    model = build(["c_attn"], lora_dora=True)
    model.train_only_lora(torch.bfloat16)
    layer = model.transformer.h[0].attn.c_attn
    layer.reset_lora()
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, layer.weight.T) + layer.bias)


def test_layer_norm_scales_by_its_weight():
    layer = LayerNorm(8, 1e-5, bias=True, train_bias=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 8)
    expected = F.layer_norm(x, (8,)) * layer.weight + layer.bias + layer.lora_bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("dora", [True, False])
def test_outputs_are_of_their_inputs_type_with_biases_of_another(dora):
    model = build(["c_attn"], lora_dora=dora, lora_bias="all")
    model.train_only_lora(torch.bfloat16)
    layer = model.transformer.h[0].attn.c_attn
    assert layer.lora_bias.dtype is torch.float32
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_merging_one_model_leaves_those_that_share_its_base():
    first, second = build(["q"]), build(["q"])
    disturb(first)
    second.share_base(first)
    before = logits(second)
    first.merge()
    assert torch.equal(logits(second), before)
    first.unmerge()
    assert first.transformer.h[0].attn.c_attn.weight is second.transformer.h[0].attn.c_attn.weight
    second.crop_block_size(9)
    assert first.config.n_ctx == 16


def test_a_merged_model_that_changed_its_type_unmerges_in_that_type():
    model = build(["q"], lora_bias="all")
    disturb(model)
    model.train_only_lora()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.merge()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model.double()
    model.unmerge()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert model(IDS)[0].dtype is torch.float64


def test_dora_over_a_row_of_zeros_is_a_number():
    model = build(["q"], lora_dora=True)
    base = model.weights()
    base["transformer.h.0.attn.c_attn.weight"][:, 0] = 0
    model.load_weight({name: value for name, value in base.items() if not is_lora(name)})
    assert logits(model).isfinite().all()
    model.merge()
    assert logits(model).isfinite().all()
