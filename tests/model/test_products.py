"""Products by oneDNN are those of torch, and a frozen matrix comes back bit for bit."""

import pytest
import torch
from torch.nn import functional as F

from lora_gpt2.model.products import Prepacked, linear


def given(layout: str, shape=(2, 3, 5), out=7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_()
    weight = torch.randn((out, shape[-1]) if layout == "out, in" else (shape[-1], out), generator=generator)
    return x, weight.requires_grad_(), torch.randn(out, generator=generator).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 5), (1, 5), (0, 5)])
@pytest.mark.parametrize("layout", ["out, in", "in, out"])
def test_product_and_gradients_are_torchs(layout, shape):
    found, expected = [], []
    for function, results in ((linear, found), (F.linear, expected)):
        x, weight, bias = given(layout, shape)
        y = function(x, weight if layout == "out, in" else weight.T, bias)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        results += [y, x.grad, weight.grad, bias.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_matrix_multiplies_and_comes_back(dtype):
    weight = torch.randn(48, 33).to(dtype)
    prepacked = Prepacked(weight)
    assert torch.equal(prepacked.dense(), weight)
    x = torch.randn(2, 9, 33).to(dtype).requires_grad_()
    bias = torch.randn(48).to(dtype).requires_grad_()
    y = prepacked.linear(x, bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, (grad @ weight), rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(bias.grad, grad.sum(dim=(0, 1)), rtol=2e-2, atol=2e-1)
