"""Updates as products of two factors: adding them up, and cutting their rank.

C = n_embd, R rank, P equal parts of a layer's output, each with factors of its own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_gpt2.model.config import PROJECTIONS, TARGETS, GPT2Config, LayerLora


class Factors(NamedTuple):
    """An update B A; the scaling is in B."""

    b: Tensor
    """(out / P, R)"""
    a: Tensor
    """(R, in)"""

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (out / P, R), S (R,), Vh (R, in) of the product, in float64, never forming it.

        With B = Qb Rb and A^T = Qa Ra the singular values are those of the R x R matrix Rb Ra^T.
        """
        qb, rb = torch.linalg.qr(self.b.double())
        qa, ra = torch.linalg.qr(self.a.double().T)
        u, s, vh = torch.linalg.svd(rb @ ra.T)
        return qb @ u[:, : len(s)], s, vh[: len(s)] @ qa.T

    def truncated(self, rank: int) -> "Factors":
        """The best approximation of `rank`, the singular values shared evenly between B and A."""
        u, s, vh = self.svd()
        root = s[:rank].sqrt()
        return Factors((u[:, :rank] * root).to(self.b.dtype), (root[:, None] * vh[:rank]).to(self.a.dtype))


Update = dict[str, list[Factors | None]]
"""Layer name to its parts: three for q, k, v apart, one for a layer as a whole; None: not adapted."""


def factors(config: GPT2Config, tensors: Mapping[str, Tensor]) -> Update:
    """The update in an adapter's `tensors`, DoRA's magnitudes and biases left aside."""
    update: Update = {}
    for name, lora in config.lora_layers.items():
        n, scaling = sum(lora.enable), config.scaling(lora)
        a, b = tensors[f"transformer.{name}.lora_A"], tensors[f"transformer.{name}.lora_B"]
        parts = iter(Factors(scaling * b_i, a_i) for b_i, a_i in zip(b.chunk(n), a.chunk(n), strict=True))
        update[name] = [next(parts) if on else None for on in lora.enable]
    return update


def combined(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """The sum of weight * update, exactly: the factors side by side."""
    counts: dict[str, int] = {}  # of parts, by kind of layer
    for update in updates:
        for name, parts in update.items():
            counts[_kind(name)] = max(counts.get(_kind(name), 1), len(parts))
    total: Update = {}
    for name in sorted({name for update in updates for name in update}):
        count = counts[_kind(name)]
        given = [
            (weight, _apart(update[name], count))
            for update, weight in zip(updates, weights, strict=True)
            if name in update
        ]
        total[name] = [_sum([(weight, parts[i]) for weight, parts in given]) for i in range(count)]
    return total


def truncated(update: Update, rank: int | None) -> tuple[Update, float]:
    """Each part cut to `rank` in the best way (Eckart-Young), and the share of the energy that is kept.

    Energy is the squared Frobenius norm of the whole update; None cuts nothing.
    """
    if rank is None:
        return update, 1.0
    energies = [part.svd()[1].square() for part in _parts(update)]
    whole = float(torch.cat(energies).sum())
    kept = float(torch.cat([energy[:rank] for energy in energies]).sum())
    cut: Update = {name: [part and part.truncated(rank) for part in parts] for name, parts in update.items()}
    return cut, kept / whole if whole else 1.0


def as_adapter(base: GPT2Config, update: Update) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The plain LoRA that holds `update`, alpha equal to the rank.

    A layer has one rank, and layers of one kind adapt the same parts: what is lacking is filled with zeros.
    """
    adapted: dict[str, list[bool]] = {}
    for name, parts in update.items():
        before = adapted.get(_kind(name), [False] * len(parts))
        adapted[_kind(name)] = [on or part is not None for on, part in zip(before, parts, strict=True)]
    tensors: dict[str, Tensor] = {}
    layers: dict[str, LayerLora] = {}
    for name, parts in update.items():
        example = next(part for part in parts if part is not None)
        rank = max(len(part.a) for part in parts if part is not None)
        empty = Factors(example.b[:, :0], example.a[:0])
        enable = adapted[_kind(name)]
        filled = [_filled(part or empty, rank) for part, on in zip(parts, enable, strict=True) if on]
        tensors[f"transformer.{name}.lora_A"] = torch.cat([part.a for part in filled])
        tensors[f"transformer.{name}.lora_B"] = torch.cat([part.b for part in filled])
        layers[name] = LayerLora(rank, rank, enable)
    return with_lora(base, layers), tensors


def with_lora(base: GPT2Config, layers: Mapping[str, LayerLora], **others: Any) -> GPT2Config:
    """`base` with LoRA of these ranks and alphas by layer name; `others` are further LoRA settings."""
    kinds = {_kind(name): lora.enable for name, lora in layers.items()}
    targets = [target for target, kind in TARGETS.items() if kind in kinds]
    if len(enable := kinds.get("attn.c_attn", [])) == len(PROJECTIONS):
        named = [part for part, on in zip(PROJECTIONS, enable, strict=True) if on]
        targets = named + [target for target in targets if target != "c_attn"]
    rank = Counter(lora.rank for lora in layers.values()).most_common(1)[0][0]
    alpha = Counter(lora.alpha for lora in layers.values()).most_common(1)[0][0]
    all_of_them = [f"h.{i}.{kind}" for i in range(base.n_layer) for kind in kinds]
    ranks = {name: layers[name].rank if name in layers else 0 for name in all_of_them}
    settings = {
        "lora_attn_dim": rank,
        "lora_attn_alpha": alpha,
        "lora_targets": targets,
        "lora_rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "lora_alpha_pattern": {name: lora.alpha for name, lora in layers.items() if lora.alpha != alpha},
    }
    return GPT2Config.from_dict({**base.without_lora().to_dict(), **settings, **others})


def _kind(layer: str) -> str:
    """attn.c_attn, of h.0.attn.c_attn."""
    return layer.split(".", 2)[2]


def _parts(update: Update) -> list[Factors]:
    return [part for parts in update.values() for part in parts if part is not None]


def _apart(parts: list[Factors | None], count: int) -> list[Factors | None]:
    """The parts of a layer, a fused one cut into `count`."""
    if len(parts) == count or parts[0] is None:
        return parts
    return [Factors(b, parts[0].a) for b in parts[0].b.chunk(count)]


def _sum(parts: Sequence[tuple[float, Factors | None]]) -> Factors | None:
    there = [(weight, part) for weight, part in parts if part is not None]
    if not there:
        return None
    return Factors(
        torch.cat([weight * part.b for weight, part in there], dim=1),
        torch.cat([part.a for _, part in there]),
    )


def _filled(part: Factors, rank: int) -> Factors:
    """The same product with zeros up to `rank`."""
    lacking = rank - len(part.a)
    b = torch.cat((part.b, part.b.new_zeros(len(part.b), lacking)), dim=1)
    return Factors(b, torch.cat((part.a, part.a.new_zeros(lacking, part.a.shape[1]))))
