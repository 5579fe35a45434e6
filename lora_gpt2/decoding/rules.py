"""Changes to scores before a choice, in place.

N beams, V vocabulary. What counts as said is `history` (N, L) from `starts` to before `stops`, (N,) each.
"""

import torch
from torch import Tensor


def penalise_repetition(
    scores: Tensor, history: Tensor, starts: Tensor, stops: Tensor, penalty: float
) -> None:
    """Tokens of `history` have their score (N, V) divided by `penalty` if >= 0, else multiplied.

    Keskar et al. 2019 (CTRL), with the sign rule that makes it a penalty for negative scores too.
    """
    said = starts < stops
    if penalty == 1 or not said.any():
        return
    places = torch.arange(history.size(1), device=history.device)
    real = (starts[:, None] <= places) & (places < stops[:, None])
    some = history.gather(1, (stops - 1).clamp(min=0)[:, None])  # stands in for what is not real
    tokens = torch.where(real, history, some)
    before = scores.gather(1, tokens)
    after = torch.where(before >= 0, before / penalty, before * penalty)
    scores.scatter_(1, tokens, torch.where(said[:, None], after, before))


def forbid(scores: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """The columns `tokens` of those `rows` (N,) that are true become -inf."""
    if rows.any():
        scores[:, tokens] = scores[:, tokens].masked_fill(rows[:, None], -torch.inf)


def forbid_repeated_ngrams(scores: Tensor, history: Tensor, starts: Tensor, stops: Tensor, size: int) -> None:
    """Tokens that would complete an n-gram of `size` that `history` already holds become -inf."""
    if size == 0 or history.size(1) < size:
        return
    ngrams = history.unfold(1, size, 1)  # (N, L - size + 1, size)
    first = torch.arange(ngrams.size(1), device=history.device)
    whole = (starts[:, None] <= first) & (first + size <= stops[:, None])
    last = (stops - size + 1)[:, None] + torch.arange(size - 1, device=history.device)
    last = history.gather(1, last.clamp(min=0))  # (N, size - 1)
    row, place = (whole & (ngrams[..., :-1] == last[:, None]).all(dim=-1)).nonzero(as_tuple=True)
    scores[row, ngrams[row, place, -1]] = -torch.inf
