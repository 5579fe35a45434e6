import pytest
import torch

from lora_gpt2.model.dropout import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_p_becomes_zero_and_the_others_grow(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1_000_003, dtype=dtype)
    y = dropout(x, p, training=True)
    kept = y != 0
    error = 5 * (p * (1 - p) / len(x)) ** 0.5  # five standard deviations
    assert abs(1 - kept.double().mean() - p) < error + 2**-17
    torch.testing.assert_close(y[kept], x[kept] / (1 - p))
    assert y.dtype is dtype


def test_neighbours_are_independent():
    """Four elements share a draw: pairs inside and across draws are dropped together p * p of the time."""
    torch.manual_seed(1)
    zero = (dropout(torch.ones(4_000_000), 0.25, training=True) == 0).double()
    for distance in (1, 2, 3, 4):
        together = (zero[:-distance] * zero[distance:]).mean()
        assert abs(together - 0.25**2) < 1e-3


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(2)
    x = torch.randn(7, 11, requires_grad=True)
    y = dropout(x, 0.3, training=True)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x, y)


def test_a_seed_gives_one_mask_and_evaluation_none():
    x = torch.randn(3, 5)
    masks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        masks.append(dropout(x, 0.5, training=True))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert not dropout(x, 0.999999, training=True).isnan().any()
