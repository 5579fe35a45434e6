"""A GPT-2 laid out for decoding: merged, in the type of the products, weights as the hardware reads them.

On a CPU a product's weights lie in oneDNN's own blocks, once, instead of being copied there at each call.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_gpt2.errors import UserError
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.lora import MergedLinear
from lora_gpt2.model.products import blocks, product
from lora_gpt2.model.settings import Precision
from lora_gpt2.model.transformer import MLP, Block

_ROWS = 160
"""Rows of an input that blocks are chosen for; any other number is computed too."""

_TINY = 1e-30
"""Keeps rows of zeros from being divided by zero."""


class PackedLinear(nn.Module):
    """x W^T + b, perhaps followed by GELU, in oneDNN's blocks. Cannot be trained, saved or moved."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        """`weight` (out, in)."""
        super().__init__()
        self.weight = blocks(weight, _ROWS)
        self.bias = None if bias is None else bias.detach()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        formula = "tanh" if self.activation == "gelu" else ""
        return product(x, self.weight, self.bias, self.activation, formula)


@cache
def _sums_are_whole() -> bool:
    """Whether 8-bit products are added up whole. Processors without VNNI add pairs of them in 16 bits, which
    overflow unless weights have 7 bits.
    """
    weight, x = torch.full((16, 64), 127, dtype=torch.int8), torch.full((1, 64), 255, dtype=torch.uint8)
    packed: Any = torch.ops.onednn.qlinear_prepack(weight, [1, 64])
    product: Any = torch.ops.onednn.qlinear_pointwise
    weights = packed, torch.ones(16), torch.zeros(16, dtype=torch.long), None
    found: Tensor = product(x, 1.0, 0, *weights, 1.0, 0, torch.float32, "none", [], "")
    return bool((found == 255 * 127 * 64).all())


class Int8Linear(nn.Module):
    """As `PackedLinear`, of 8-bit integers: W rounded by output, x by row, so that no row changes another."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        """`weight` (out, in)."""
        super().__init__()
        weight = weight.detach().float().contiguous()
        size = weight.abs().amax(dim=1).clamp(min=_TINY)  # (out,)
        most = 127 if _sums_are_whole() else 63
        rounded = (weight * (most / size)[:, None]).round().to(torch.int8)
        self.weight: Any = torch.ops.onednn.qlinear_prepack(rounded, [_ROWS, rounded.size(1)])
        self.scales, self.zeros = size / most, torch.zeros(len(size), dtype=torch.long)
        self.bias = None if bias is None else bias.detach()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        size = x.abs().amax(dim=-1, keepdim=True).clamp(min=_TINY)  # (…, 1)
        rounded = (x * (127 / size)).round_().add_(128).to(torch.uint8)
        product: Any = torch.ops.onednn.qlinear_pointwise
        weights = self.weight, self.scales, self.zeros, None
        result: Tensor = product(rounded, 1 / 127, 128, *weights, 1.0, 0, torch.float32, "none", [], "")
        result = result.mul_(size) if self.bias is None else torch.addcmul(self.bias, result, size)
        return F.gelu(result, approximate="tanh") if self.activation == "gelu" else result


class _PackedMLP(nn.Module):
    def __init__(self, c_fc: nn.Module, c_proj: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.c_proj(self.c_fc(x))
        return result


@torch.no_grad()
def prepare_for_decoding(model: GPT2LMModel, precision: Precision) -> GPT2LMModel:
    """The same model, changed in place: from now on it can do nothing but decode.

    Where LoRA is not merged, as with several adapters over one base, its weights stay as they lie.
    Raises UserError where products of 8-bit integers are asked for and cannot be had.
    """
    if isinstance(model.lm_head.decoder, PackedLinear | Int8Linear):
        return model  # it is laid out already
    int8 = precision is Precision.int8
    model.eval().to(torch.float32 if int8 else getattr(torch, precision.value))
    layer = Int8Linear if int8 else PackedLinear
    if _packs(model):
        for block in model.transformer.h:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            attn.c_attn, attn.c_proj = _packed(attn.c_attn, layer), _packed(attn.c_proj, layer)
            assert isinstance(mlp, MLP)
            block.mlp = _PackedMLP(_packed(mlp.c_fc, layer, "gelu"), _packed(mlp.c_proj, layer))
        model.lm_head.decoder = layer(model.transformer.wte.weight, None)
    elif int8:
        what = "int8 needs a CPU, a torch with oneDNN, and one adapter at a time"
        raise UserError("decoding.precision", what, "choose float32 or bfloat16")
    return model


def _packs(model: GPT2LMModel) -> bool:
    """Whether all is merged, and products run on a CPU, by a torch that packs weights."""
    weight = model.transformer.wte.weight
    products = (torch.ops.mkldnn, "_linear_pointwise"), (torch.ops.onednn, "qlinear_pointwise")
    there = torch._C._has_mkldnn and all(hasattr(library, name) for library, name in products)
    if weight.dtype is torch.bfloat16:
        there = there and getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    merged = all(layer.merged for layer in model.lora_layers())
    return there and merged and weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16)


def _packed(
    layer: nn.Module, kind: type[PackedLinear | Int8Linear], activation: str = "none"
) -> PackedLinear | Int8Linear:
    assert isinstance(layer, MergedLinear)
    return kind(layer.weight.T if layer.fan_in_fan_out else layer.weight, layer.bias, activation)
