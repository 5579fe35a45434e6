"""LoRA on a linear layer.  n: enabled projections, P: all of them, R: rank."""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_gpt2.model.dropout import dropout
from lora_gpt2.model.products import Prepacked, linear


class Beside(Protocol):
    """Several models over one base whose tokens run through it together: see `side_by_side`."""

    running: bool

    def tokens_of_each(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The numbers of the models, and each one's part of x (..., N, in) along N."""


class MergedLinear(nn.Module):
    """x -> x W0 + b + s B A x for the enabled ones of P equal parts of the output, s = alpha / r.

    Hu et al. 2021, eq. 3, on a layer that may compute several projections at once, as GPT-2's c_attn does
    for q, k and v. Each enabled projection has its own A and B; they are stored stacked, as the published
    implementation stores them: ``lora_A`` (n * r, in), ``lora_B`` (n * out / P, r). A is drawn
    kaiming-uniform with a = sqrt(5), B is zero, so a fresh layer equals its base.

    * `init` "pissa" or "olora": A and B start as factors of W0, kept as ``lora_A0`` and ``lora_B0``; the
      update is s (B A - B0 A0), which is what training the remainder W0 - s B0 A0 beside B A computes
      (with `lora_dropout`, but for the dropout: here it acts on both).
    * `dora`: the rows V of W0 + update are scaled to trained lengths ``lora_magnitude`` (n * out / P,),
      W = m V / |V|, with |V| taken as a constant by the gradient (Liu et al. 2024, section 4.3).
    * `train_bias`: ``lora_bias`` (out,), zero at first, is added to the bias.

    ``weight`` is (in, out) with `fan_in_fan_out`, else (out, in). Only `merge` and `unmerge` ever fold the
    update into ``weight``; train(), eval() and forward never do, hence `merge_weights` must be False.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: Tensor
    lora_B0: Tensor

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
        *,
        bias: bool = True,
        rslora: bool = False,
        dora: bool = False,
        init: str = "kaiming",
        train_bias: bool = False,
    ) -> None:
        super().__init__()
        if out_features % len(enable_lora):
            raise ValueError(f"out_features {out_features} is not divisible by {len(enable_lora)}")
        if r < 0:
            raise ValueError(f"LoRA rank must be at least 0, not {r}")
        if merge_weights:
            raise ValueError("merge_weights=True is not supported: call merge() and unmerge()")
        self.in_features, self.out_features, self.r = in_features, out_features, r
        self.fan_in_fan_out, self.init = fan_in_fan_out, init
        self.enabled = [i for i, enabled in enumerate(enable_lora) if enabled and r > 0]
        self.part = out_features // len(enable_lora)
        self.scaling = lora_alpha / (math.sqrt(r) if rslora else r) if r else 0.0
        self.lora_dropout, self.lora_r_dropout = lora_dropout, lora_r_dropout
        shape = (in_features, out_features) if fan_in_fan_out else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._base: tuple[nn.Parameter, nn.Parameter | None] | None = None
        self.prepacked: Prepacked | None = None
        self.beside: Beside | None = None
        self.layers_beside: Sequence[MergedLinear] = ()
        self.lora_magnitude = self.lora_bias = None
        n = len(self.enabled)
        if n:
            if r > min(in_features, self.part) and init != "kaiming":
                raise ValueError(f"LoRA init {init} needs a rank of at most {min(in_features, self.part)}")
            self.lora_A = nn.Parameter(torch.empty(n * r, in_features))
            self.lora_B = nn.Parameter(torch.empty(n * self.part, r))
            self.weight.requires_grad_(False)
            if dora:
                self.lora_magnitude = nn.Parameter(torch.empty(n * self.part))
            if init != "kaiming":
                self.register_buffer("lora_A0", torch.empty(n * r, in_features))
                self.register_buffer("lora_B0", torch.empty(n * self.part, r))
        if train_bias:
            self.lora_bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh values for the base (as nn.Linear draws them) and for the update."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_lora()

    @torch.no_grad()
    def reset_lora(self) -> None:
        """Fresh A and B: the layer equals its base as it is now."""
        if self.lora_bias is not None:
            self.lora_bias.zero_()
        if not self.enabled:
            return
        for a in self.lora_A.chunk(len(self.enabled)):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_B.zero_()
        self.start_from_base()

    @torch.no_grad()
    def start_from_base(self) -> None:
        """Sets what depends on the base: DoRA's magnitudes, and PiSSA's and OLoRA's factors."""
        for j, i in enumerate(self.enabled):
            rows = slice(j * self.part, (j + 1) * self.part)
            ranks = slice(j * self.r, (j + 1) * self.r)
            base = self._out_in(self.weight)[self._rows(i)].float()
            if self.init != "kaiming":
                b, a = _leading_factors(base, self.r, self.init, self.scaling)
                self.lora_A0[ranks], self.lora_B0[rows] = a, b
            if self.lora_magnitude is not None:
                self.lora_magnitude[rows] = base.norm(dim=1)
        if self.enabled and self.init != "kaiming":
            self.lora_A.copy_(self.lora_A0)
            self.lora_B.copy_(self.lora_B0)

    @property
    def adapted(self) -> bool:
        return bool(self.enabled) or self.lora_bias is not None

    @property
    def merged(self) -> bool:
        return self._base is not None

    @property
    def prepacks(self) -> bool:
        """Whether `prepack` does anything: ``weight`` is frozen, products alone read it, and it pays."""
        read = self.lora_magnitude is not None or self.merged
        return self.prepacked is None and not read and Prepacked.fits(self.weight)

    def prepack(self) -> None:
        """Lays ``weight`` out for training on this machine, if it `prepacks`; it is empty until `unpack`."""
        if self.prepacks:
            self.prepacked = Prepacked(self._out_in(self.weight))
            absent = self.weight.new_full((), torch.nan).expand(self.weight.shape)
            self.weight = nn.Parameter(absent, requires_grad=False)

    def unpack(self) -> None:
        """Puts the values of ``weight`` back, bit for bit."""
        if self.prepacked is not None:
            dense = self._out_in(self.prepacked.dense()).contiguous()
            self.weight, self.prepacked = nn.Parameter(dense, requires_grad=False), None

    def delta_weight(self) -> Tensor:
        """What the update adds to ``weight``, in its layout; zero where no projection is adapted."""
        assert not self.merged, "the base is needed, and the update is merged into it"
        assert self.prepacked is None, "the base is prepacked: unpack() first"
        base = self._out_in(self.weight)
        delta = torch.zeros_like(base)
        for j, i in enumerate(self.enabled):
            low_rank = self._low_rank(j)
            if self.lora_magnitude is not None:
                whole = base[self._rows(i)] + low_rank
                magnitude = self.lora_magnitude.chunk(len(self.enabled))[j]
                low_rank = whole * (magnitude / _lengths(whole))[:, None] - base[self._rows(i)]
            delta[self._rows(i)] = low_rank
        return self._out_in(delta)

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the update into weight and bias; the base is kept: unmerge restores it bit for bit."""
        if self.merged or not self.adapted:
            return
        delta = self.delta_weight()
        self._base = self.weight, self.bias
        self.weight = _sum(self.weight, delta)  # a new one: other models may share the base
        if self.bias is not None and self.lora_bias is not None:
            self.bias = _sum(self.bias, self.lora_bias)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the update out again."""
        if self._base is not None:
            weight, bias = self._base
            self.weight, self._base = _like(weight, self.weight), None
            if self.bias is not None and bias is not None:
                self.bias = _like(bias, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if self.lora_magnitude is not None and not self.merged:
            return self._dora(x, self._out_in(self.weight))
        if self.prepacked is not None:
            y = self.prepacked.linear(x, self._whole_bias())
        else:
            y = linear(x, self._out_in(self.weight), self._whole_bias())
        if self.merged or not self.enabled:
            return y
        for i, update in zip(self.enabled, self._updates_beside(x), strict=True):
            y.narrow(-1, i * self.part, self.part).add_(update)
        return y

    def _updates_beside(self, x: Tensor) -> list[Tensor]:
        """`_updates`, of each model's own layer on its part where several stand side by side."""
        if self.beside is None or not self.beside.running:
            return self._updates(x)
        found = [self.layers_beside[k]._updates(part) for k, part in self.beside.tokens_of_each(x)]
        return [torch.cat(parts, dim=-2) for parts in zip(*found, strict=True)]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, r={self.r}, enabled={self.enabled}"

    def _dora(self, x: Tensor, weight: Tensor) -> Tensor:
        assert self.lora_magnitude is not None
        y = linear(x, weight)
        magnitudes = self.lora_magnitude.chunk(len(self.enabled))
        for i, update, magnitude in zip(self.enabled, self._updates(x), magnitudes, strict=True):
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                whole = weight[self._rows(i)] + self._low_rank(self.enabled.index(i))
                whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
            scale = magnitude / _lengths(whole)  # (out / P,), near 1: bfloat16 would lose what is trained
            scaled = (y[..., self._rows(i)] + update) * scale
            y[..., self._rows(i)] = scaled.to(y.dtype)
        bias = self._whole_bias()
        return y if bias is None else (y + bias).to(y.dtype)

    def _updates(self, x: Tensor) -> list[Tensor]:
        """What each enabled projection adds, (..., out / P)."""
        n = len(self.enabled)
        x = dropout(x, self.lora_dropout, self.training)
        updates: list[Tensor] = []
        for a, b in self._factors():
            low = F.linear(x, a.to(x.dtype))  # (..., n * R)
            low = dropout(low, self.lora_r_dropout, self.training) * self.scaling
            pairs = zip(low.chunk(n, dim=-1), b.chunk(n), strict=True)
            parts = [F.linear(low_i, b_i.to(low_i.dtype)) for low_i, b_i in pairs]
            updates = [u + part for u, part in zip(updates, parts, strict=True)] if updates else parts
        return updates

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) pairs, stacked, whose products add up to the update.

        Less its start, B A - B0 A0 = (B - B0) A + B0 (A - A0): no difference of large products.
        """
        if self.init == "kaiming":
            return [(self.lora_A, self.lora_B)]
        return [(self.lora_A, self.lora_B - self.lora_B0), (self.lora_A - self.lora_A0, self.lora_B0)]

    def _low_rank(self, j: int) -> Tensor:
        """s (B A - B0 A0) of the j-th enabled projection, (out / P, in)."""
        n = len(self.enabled)
        products = [b.chunk(n)[j] @ a.chunk(n)[j] for a, b in self._factors()]
        return self.scaling * (products[0] if len(products) == 1 else products[0] + products[1])

    def _whole_bias(self) -> Tensor | None:
        if self.bias is None or self.lora_bias is None or self.merged:
            return self.bias
        return (self.bias + self.lora_bias).to(self.bias.dtype)

    def _rows(self, projection: int) -> slice:
        return slice(projection * self.part, (projection + 1) * self.part)

    def _out_in(self, weight: Tensor) -> Tensor:
        """Between the layout of ``weight`` and (out, in)."""
        return weight.T if self.fan_in_fan_out else weight


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose bias may be absent, or have a trained ``lora_bias`` added."""

    def __init__(self, size: int, eps: float, bias: bool, train_bias: bool) -> None:
        super().__init__(size, eps=eps, bias=bias)
        self.lora_bias = nn.Parameter(torch.zeros(size)) if train_bias else None
        self._base_bias: nn.Parameter | None = None

    @property
    def adapted(self) -> bool:
        return self.lora_bias is not None

    @property
    def merged(self) -> bool:
        return self._base_bias is not None

    def reset_lora(self) -> None:
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def start_from_base(self) -> None:
        """Nothing of it depends on the base."""

    @torch.no_grad()
    def merge(self) -> None:
        if self.lora_bias is not None and not self.merged:
            self._base_bias = self.bias
            self.bias = _sum(self.bias, self.lora_bias)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self._base_bias is not None:
            self.bias, self._base_bias = _like(self._base_bias, self.bias), None

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor = self.bias
        if self.lora_bias is not None and not self.merged:
            bias = (bias + self.lora_bias).to(bias.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight, bias, self.eps)


def _lengths(rows: Tensor) -> Tensor:
    """The norm of each row, never zero."""
    return rows.norm(dim=1).clamp(min=torch.finfo(rows.dtype).tiny)


def _sum(parameter: nn.Parameter, update: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.data + update.data, parameter.requires_grad)


def _like(parameter: nn.Parameter, now: Tensor) -> nn.Parameter:
    """The parameter in the type and at the place that the model has now."""
    if parameter.dtype == now.dtype and parameter.device == now.device:
        return parameter
    return nn.Parameter(parameter.data.to(now), parameter.requires_grad)


def _leading_factors(base: Tensor, rank: int, init: str, scaling: float) -> tuple[Tensor, Tensor]:
    """B (out, R) and A (R, in): s B A is the base's best approximation (pissa), or B A its QR's start."""
    if init == "olora":
        q, r = torch.linalg.qr(base)
        return q[:, :rank], r[:rank]
    u, s, vh = torch.linalg.svd(base, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
