"""Adding adapters up and cutting their rank, against the products themselves."""

import pytest
import torch

from lora_gpt2 import GPT2Config, GPT2LMModel
from lora_gpt2.model.keys import is_lora
from lora_gpt2.weights import factors
from lora_gpt2.weights.factors import Factors

TARGETS = [["q", "v"], ["c_attn"], ["k", "c_proj", "mlp_c_fc", "mlp_c_proj"]]


def build(targets, seed: int, **lora) -> GPT2LMModel:
    """A model with an update that is not zero."""
    torch.manual_seed(seed)
    model = GPT2LMModel(
        GPT2Config(17, 16, 16, 12, 2, 2, lora_targets=targets, **{"lora_attn_dim": 3, **lora})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.normal_()
    return model


def update(model: GPT2LMModel) -> factors.Update:
    return factors.factors(model.config, {k: v for k, v in model.weights().items() if is_lora(k)})


def deltas(model: GPT2LMModel) -> dict[str, torch.Tensor]:
    """(out, in) for every linear layer."""
    return {
        name.removeprefix("transformer."): module.delta_weight().T.detach()
        for name, module in model.named_modules()
        if hasattr(module, "delta_weight")
    }


@pytest.mark.parametrize("first", TARGETS, ids="+".join)
@pytest.mark.parametrize("second", TARGETS, ids="+".join)
def test_a_combination_is_the_weighted_sum_of_the_updates(first, second):
    models = [
        build(first, 1, lora_rslora=True, lora_rank_pattern={"h.0.*": 2}),
        build(second, 2, lora_rank_pattern={"h.1.*": 0}, lora_alpha_pattern={"h.0.*": 5}),
    ]
    total = factors.combined([update(model) for model in models], [0.3, -2.0])
    config, tensors = factors.as_adapter(models[0].config, total)
    made = GPT2LMModel(config)
    made.load_weight({**{k: v for k, v in made.weights().items() if not is_lora(k)}, **tensors})
    one, two = map(deltas, models)
    for name, delta in deltas(made).items():
        torch.testing.assert_close(delta, 0.3 * one[name] - 2 * two[name], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_what_a_cut_loses_is_the_tail_energy(rank):
    whole = update(build(["q", "v", "mlp_c_proj"], 3))
    cut, kept = factors.truncated(whole, rank)
    lost = energy = 0.0
    for name, parts in whole.items():
        for part, short in zip(parts, cut[name], strict=True):
            if part is None:
                assert short is None
                continue
            exact = part.b.double() @ part.a.double()
            values = torch.linalg.svdvals(exact)
            error = (exact - short.b.double() @ short.a.double()).square().sum()
            torch.testing.assert_close(error, values[rank:].square().sum(), rtol=1e-4, atol=1e-4)
            assert len(short.a) == min(rank, 3)
            lost, energy = lost + error, energy + values.square().sum()
    assert kept == pytest.approx(1 - float(lost / energy), abs=1e-6)


def test_the_factors_alone_give_the_singular_value_decomposition():
    torch.manual_seed(4)
    pair = Factors(torch.randn(9, 4), torch.randn(4, 7))
    u, s, vh = pair.svd()
    exact = pair.b.double() @ pair.a.double()
    torch.testing.assert_close(u * s @ vh, exact)
    torch.testing.assert_close(s, torch.linalg.svdvals(exact)[:4])
    torch.testing.assert_close(u.T @ u, torch.eye(4).double(), atol=1e-10, rtol=0)


def test_no_rank_cuts_nothing():
    whole = update(build(["q"], 5))
    assert factors.truncated(whole, None) == (whole, 1.0)
