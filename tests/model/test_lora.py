"""MergedLinear against loralib's, and its own laws."""

from itertools import product

import loralib
import pytest
import torch

from lora_gpt2 import MergedLinear

SUBSETS = [list(subset) for subset in product([True, False], repeat=3) if any(subset)]


def pair(enable, fan_in_fan_out):
    torch.manual_seed(0)
    theirs = loralib.MergedLinear(
        16, 48, r=4, lora_alpha=8, enable_lora=enable, fan_in_fan_out=fan_in_fan_out, merge_weights=False
    )
    torch.nn.init.normal_(theirs.lora_B)
    ours = MergedLinear(16, 48, 4, 8, 0.0, enable, fan_in_fan_out)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("enable", SUBSETS)
@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_forward_and_merged_forward_equal_loralib_for_every_target_subset(enable, fan_in_fan_out):
    ours, theirs = pair(enable, fan_in_fan_out)
    x = torch.randn(2, 5, 16)
    expected = theirs(x)
    assert torch.allclose(ours(x), expected, atol=1e-5)
    ours.merge()
    assert torch.allclose(ours(x), expected, atol=1e-5)


@pytest.mark.parametrize("enable", SUBSETS)
def test_unmerge_restores_the_base_bit_for_bit(enable):
    ours, _ = pair(enable, True)
    before = ours.weight.clone()
    ours.merge()
    ours.merge()
    assert not torch.equal(ours.weight, before)
    ours.unmerge()
    assert torch.equal(ours.weight, before)


def test_train_and_eval_never_merge():
    ours, _ = pair([True, False, True], True)
    before = ours.weight.clone()
    ours.eval()
    assert torch.equal(ours.weight, before)
    ours.merge()
    merged = ours.weight.clone()
    ours.train()
    assert torch.equal(ours.weight, merged)


def test_a_fresh_layer_equals_its_base():
    layer = MergedLinear(16, 48, 4, 8, 0.0, [True, False, True])
    base = MergedLinear(16, 48)
    base.weight, base.bias = layer.weight, layer.bias
    x = torch.randn(2, 16)
    assert torch.equal(layer(x), base(x))


def test_a_layer_without_rank_is_a_linear_layer():
    layer = MergedLinear(16, 48, enable_lora=[True, True, True])
    x = torch.randn(2, 16)
    assert (layer.enabled, layer.scaling) == ([], 0)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
    assert torch.equal(layer.delta_weight(), torch.zeros(48, 16))


@pytest.mark.parametrize("rank", [1, 4])
def test_alpha_is_1_where_none_is_given(rank):
    layer = MergedLinear(16, 48, rank, enable_lora=[True, False, False])
    assert (layer.enabled, layer.scaling) == ([0], 1 / rank)


def test_the_base_is_drawn_as_a_linear_layer_s():
    layer = MergedLinear(400, 300)
    for drawn in (layer.weight, layer.bias):
        assert -0.05 <= drawn.min() < -0.048
        assert 0.048 < drawn.max() <= 0.05


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_of_the_base_have_its_rank_at_most(init):
    layer = MergedLinear(16, 48, 8, 8, enable_lora=[True] * 6, init=init)
    assert layer.lora_A.shape == (6 * 8, 16)
    assert MergedLinear(16, 48, 17, 8, enable_lora=[True]).r == 17
    for enable, most in (([True] * 6, 8), ([True], 16)):
        with pytest.raises(ValueError, match=f"^LoRA init {init} needs a rank of at most {most}$"):
            MergedLinear(16, 48, most + 1, 8, enable_lora=enable, init=init)


def test_gradients_reach_every_adapter_tensor_and_not_the_base():
    ours, _ = pair([True, True, True], True)
    ours(torch.randn(2, 16)).square().sum().backward()
    assert ours.weight.grad is None
    assert ours.lora_A.grad.abs().sum() > 0
    assert ours.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize("where", ["lora_dropout", "lora_r_dropout"])
def test_dropout_before_and_between_the_factors_acts_only_in_training(where):
    layer = MergedLinear(16, 48, 4, 8, enable_lora=[True, False, False], **{where: 0.5})
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(64, 16)
    assert not torch.equal(layer.train()(x), layer.train()(x))
    assert torch.equal(layer.eval()(x), layer.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": -1}, "rank must be at least 0"),
        ({"enable_lora": [True] * 5}, "not divisible by 5"),
        ({"merge_weights": True}, "^merge_weights=True is not supported: call merge"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MergedLinear(16, 48, **arguments)
