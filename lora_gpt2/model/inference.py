"""A GPT-2 laid out for decoding: merged, in the type of the products, weights as the hardware reads them.

On a CPU a product's weights lie in oneDNN's own blocks, once, instead of being copied there at each call.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_gpt2.model.config import Precision
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.lora import MergedLinear
from lora_gpt2.model.transformer import MLP, Block

_ROWS = 160
"""Rows of an input that blocks are chosen for; any other number is computed too."""


class PackedLinear(nn.Module):
    """x W^T + b, perhaps followed by GELU, in oneDNN's blocks. Cannot be trained, saved or moved."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        """`weight` (out, in)."""
        super().__init__()
        self.weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
        self.bias = None if bias is None else bias.detach()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        formula = "tanh" if self.activation == "gelu" else ""
        product: Any = torch.ops.mkldnn._linear_pointwise
        result: Tensor = product(x, self.weight, self.bias, self.activation, [], formula)
        return result


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
    """
    model.eval().to(getattr(torch, precision.value))
    if _packs(model):
        for block in model.transformer.h:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            attn.c_attn, attn.c_proj = _packed(attn.c_attn), _packed(attn.c_proj)
            assert isinstance(mlp, MLP)
            block.mlp = _PackedMLP(_packed(mlp.c_fc, "gelu"), _packed(mlp.c_proj))
        model.lm_head.decoder = PackedLinear(model.transformer.wte.weight, None)
    return model


def _packs(model: GPT2LMModel) -> bool:
    """Whether all is merged, and products run on a CPU, by a torch that packs weights."""
    weight = model.transformer.wte.weight
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch._C._has_mkldnn
    merged = all(layer.merged for layer in model.lora_layers())
    return there and merged and weight.is_cpu and weight.dtype in (torch.float32, torch.bfloat16)


def _packed(layer: nn.Module, activation: str = "none") -> PackedLinear:
    assert isinstance(layer, MergedLinear)
    return PackedLinear(layer.weight.T if layer.fan_in_fan_out else layer.weight, layer.bias, activation)
