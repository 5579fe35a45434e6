"""Changes to the logits before a choice.  N beams, V vocabulary, L tokens generated so far."""

import torch
from torch import Tensor


def penalise_repetition(logits: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Tokens of `history` (N, L) have their logit (N, V) divided by `penalty` if >= 0, else multiplied.

    Keskar et al. 2019 (CTRL), with the sign rule that makes it a penalty for negative logits too.
    """
    if penalty == 1 or not history.size(1):
        return logits
    seen = logits.gather(1, history)
    return logits.scatter(1, history, torch.where(seen >= 0, seen / penalty, seen * penalty))


def forbid(logits: Tensor, tokens: list[int]) -> Tensor:
    """The columns `tokens` become -inf."""
    return logits.index_fill(1, torch.tensor(tokens, device=logits.device), -torch.inf)


def forbid_repeated_ngrams(logits: Tensor, history: Tensor, size: int) -> Tensor:
    """Tokens that would complete an n-gram of `size` that `history` (N, L) already holds become -inf."""
    if size == 0 or history.size(1) < size:
        return logits
    ngrams = history.unfold(1, size, 1)  # (N, L - size + 1, size)
    last = history[:, history.size(1) - size + 1 :]  # (N, size - 1)
    repeats = (ngrams[..., :-1] == last[:, None]).all(dim=-1)
    change = torch.where(repeats, -torch.inf, 0.0).to(logits.dtype)
    return logits.scatter_add(1, ngrams[..., -1], change)
