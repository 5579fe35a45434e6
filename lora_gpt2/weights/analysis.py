"""What an adapter changed: spectrum of each update, amplification of the base, subspaces shared by two.

C = n_embd, R rank of one projection.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_gpt2.model.config import PROJECTIONS
from lora_gpt2.weights.factors import Factors, Update


class Analysis(NamedTuple):
    """The update of one projection of one layer."""

    layer: str
    part: str
    """q, k or v where they have updates of their own, else empty."""
    spectrum: Tensor
    """(R,) singular values of the update B A, scaling included, largest first."""
    relative_norm: float | None
    """Frobenius norm of the update over that of the base weight."""
    amplification: float | None
    """|dW| / |U^T W V^T|, U and V the update's singular directions (Hu et al. 2021, section 7.3)."""

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.spectrum.square().sum().sqrt())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values' shares (Roy and Vetterli 2007); 0 for no update."""
        total = self.spectrum.sum()
        if total == 0:
            return 0.0
        return float(torch.special.entr(self.spectrum / total).sum().exp())

    def energy(self, rank: int) -> float:
        """Share of the squared norm in the first `rank` singular values; 1 for no update."""
        squares = self.spectrum.square()
        return float(squares[:rank].sum() / squares.sum()) if squares.sum() else 1.0


def analyse(update: Update, base: Mapping[str, Tensor] | None) -> list[Analysis]:
    """One `Analysis` for each adapted projection; `base` are the weights below, if at hand."""
    found = []
    for name, parts in update.items():
        weight = base[f"transformer.{name}.weight"].T if base is not None else None  # (out, in)
        weights = weight.chunk(len(parts)) if weight is not None else [None] * len(parts)
        for i, (part, own) in enumerate(zip(parts, weights, strict=True)):
            if part is not None:
                found.append(_analyse(name, PROJECTIONS[i] if len(parts) > 1 else "", part, own))
    return found


def _analyse(layer: str, part: str, factors: Factors, weight: Tensor | None) -> Analysis:
    u, s, vh = factors.svd()
    if weight is None:
        return Analysis(layer, part, s, None, None)
    norm = float(s.square().sum().sqrt())
    rank = int((s > s.amax() * 1e-6).sum()) if norm else 0  # directions of rounding errors are none
    below = float((u[:, :rank].T @ weight.double() @ vh[:rank].T).norm())
    return Analysis(layer, part, s, norm / float(weight.norm()), norm / below if below else None)


def similarity(first: Factors, second: Factors) -> Tensor:
    """phi(i, j) = |U1_i^T U2_j|^2 / min(i, j) for all i <= R1 and j <= R2: (R1, R2), between 0 and 1.

    R1 and R2 are the ranks of the As themselves. U_i are the first i right singular directions of A (Hu et
    al. 2021, equation 4): 1 where the smaller space lies in the larger one.
    """
    directions = []
    for one in (first, second):
        _, s, vh = torch.linalg.svd(one.a.double(), full_matrices=False)
        directions.append(vh[: int((s > s.amax() * 1e-6).sum())])  # rows of zeros span nothing
    overlaps = (directions[0] @ directions[1].T).square()  # (R1, R2)
    sums = overlaps.cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1) for size in sums.shape)
    return sums / torch.minimum(i[:, None], j[None]).double()


def similarities(first: Update, second: Update) -> dict[tuple[str, str], Tensor]:
    """`similarity` by (layer, part) of the projections that both adapt in the same way."""
    found = {}
    for name in first.keys() & second.keys():
        parts = first[name], second[name]
        if len(parts[0]) == len(parts[1]):
            for i, (one, other) in enumerate(zip(*parts, strict=True)):
                if one is not None and other is not None:
                    part = PROJECTIONS[i] if len(parts[0]) > 1 else ""
                    found[name, part] = similarity(one, other)
    return dict(sorted(found.items()))
