"""LoRA on a fused linear layer.  n: enabled projections, P: all of them, R: rank."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_gpt2.model.dropout import dropout


class MergedLinear(nn.Module):
    """x -> x W0 + b + (alpha / r) B A x for the enabled ones of P equal parts of the output.

    Hu et al. 2021, eq. 3, on a layer that computes several projections at once, as GPT-2's c_attn does
    for q, k and v. Each enabled projection has its own A and B; they are stored stacked, as the published
    implementation stores them: ``lora_A`` (n * r, in), ``lora_B`` (n * out / P, r). A is drawn
    kaiming-uniform with a = sqrt(5), B is zero, so a fresh layer equals its base.

    ``weight`` is (in, out) with `fan_in_fan_out`, else (out, in). Only `merge` and `unmerge` ever fold the
    update into ``weight``; train(), eval() and forward never do, hence `merge_weights` must be False.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = False,
        lora_r_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if out_features % len(enable_lora):
            raise ValueError(f"out_features {out_features} is not divisible by {len(enable_lora)}")
        if r < 0:
            raise ValueError(f"LoRA rank must be at least 0, not {r}")
        if merge_weights:
            raise ValueError("merge_weights=True is not supported: call merge() and unmerge()")
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.fan_in_fan_out = fan_in_fan_out
        self.enabled = [i for i, enabled in enumerate(enable_lora) if enabled and r > 0]
        self.part = out_features // len(enable_lora)
        self.scaling = lora_alpha / r if r else 0.0
        self.lora_dropout, self.lora_r_dropout = lora_dropout, lora_r_dropout
        shape = (in_features, out_features) if fan_in_fan_out else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_features))
        self._base_weight: Tensor | None = None
        if self.enabled:
            self.lora_A = nn.Parameter(torch.empty(len(self.enabled) * r, in_features))
            self.lora_B = nn.Parameter(torch.empty(len(self.enabled) * self.part, r))
            self.weight.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh values for the base (as nn.Linear draws them) and for the update."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self.reset_lora()

    def reset_lora(self) -> None:
        """Fresh A, zero B."""
        if self.enabled:
            for a in self.lora_A.data.chunk(len(self.enabled)):
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)

    @property
    def merged(self) -> bool:
        return self._base_weight is not None

    def delta_weight(self) -> Tensor:
        """(alpha / r) B A, zero where no projection is adapted, in the layout of ``weight``."""
        delta = self.weight.new_zeros(self.out_features, self.in_features)
        for i, a, b in self._factors():
            delta[self._rows(i)] = self.scaling * (b @ a)
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the update into ``weight``; the base is kept, so that unmerge restores it bit for bit."""
        if self.enabled and not self.merged:
            self._base_weight = self.weight.data
            self.weight.data = self.weight.data + self.delta_weight()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the update out of ``weight`` again."""
        if self._base_weight is not None:
            self.weight.data = self._base_weight
            self._base_weight = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        y = F.linear(x, weight, self.bias)
        if not self.enabled or self.merged:
            return y
        low = F.linear(dropout(x, self.lora_dropout, self.training), self.lora_A)  # (..., n * R)
        low = dropout(low, self.lora_r_dropout, self.training) * self.scaling
        for (i, _, b), low_i in zip(self._factors(), low.chunk(len(self.enabled), dim=-1), strict=True):
            y[..., self._rows(i)] += F.linear(low_i, b)  # (..., out / P)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, r={self.r}, enabled={self.enabled}"

    def _rows(self, projection: int) -> slice:
        return slice(projection * self.part, (projection + 1) * self.part)

    def _factors(self) -> list[tuple[int, Tensor, Tensor]]:
        """(projection, A (R, in), B (out / P, R)) of each enabled projection."""
        if not self.enabled:
            return []
        n = len(self.enabled)
        return list(zip(self.enabled, self.lora_A.chunk(n), self.lora_B.chunk(n), strict=True))
