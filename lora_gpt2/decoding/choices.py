"""Choices among the tokens of a vocabulary: the best ones, or by chance.  N beams, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_gpt2.decoding.config import DecodingSettings, Strategy

_CACHED = 800_000
"""Scores that a processor's caches hold."""

_GROUP = 128
"""Neighbouring tokens whose maximum is taken first."""


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `scores` (N, V), descending, and their tokens: (N, count).

    Of a large vocabulary only the groups with the largest maxima are sorted: the best tokens are in them.
    """
    rows, size = scores.shape
    groups = size // _GROUP
    if groups < 4 * count:
        return scores.topk(count, dim=1)
    grouped = scores[:, : groups * _GROUP].reshape(rows, groups, _GROUP)
    best = grouped.amax(dim=2).topk(count, dim=1).indices  # (N, count)
    found = grouped.gather(1, best[..., None].expand(-1, -1, _GROUP)).flatten(1)
    tokens = (best[..., None] * _GROUP + torch.arange(_GROUP, device=scores.device)).flatten(1)
    rest = torch.arange(groups * _GROUP, size, device=scores.device).expand(rows, -1)
    values, places = torch.cat((found, scores[:, groups * _GROUP :]), dim=1).topk(count, dim=1)
    return values, torch.cat((tokens, rest), dim=1).gather(1, places)


def top_log_probs(
    scores: Tensor, count: int, also: Tensor | None = None, normalised: bool = False
) -> tuple[Tensor, Tensor]:
    """`top` of the log-softmax in float32, or of `normalised` scores as they are.

    `also` (N, R) are tokens to be given behind them whatever their rank; -1: none, at -inf.
    """
    cached = max(1, _CACHED // scores.size(1))
    size = cached if scores.device.type == "cpu" else len(scores)
    found = []
    for start in range(0, len(scores), size):
        rows = slice(start, start + size)
        part = scores[rows] if normalised else scores[rows].log_softmax(dim=1, dtype=torch.float32)
        values, tokens = top(part, count)
        if also is not None:
            asked = part.gather(1, also[rows].clamp(min=0)).masked_fill(also[rows] < 0, -torch.inf)
            values, tokens = torch.cat((values, asked), dim=1), torch.cat((tokens, also[rows]), dim=1)
        found.append((values, tokens))
    values, tokens = (torch.cat(part) for part in zip(*found, strict=True))
    return values, tokens


def chances(settings: DecodingSettings, numbers: Sequence[int]) -> Tensor:
    """The chances (Q, K, L) in [0, 1) of all samples of the queries: of seed and number alone."""
    if settings.strategy is not Strategy.sample:
        return torch.zeros(len(numbers), 0, 0)
    shape = settings.beam_size, settings.eval_len
    seeds = [settings.seed * 1_000_003 + number for number in numbers]
    return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def drawn(scores: Tensor, uniform: Tensor, settings: DecodingSettings) -> tuple[Tensor, Tensor]:
    """For each chance (N, D) a token of its row of `scores` (N, V), and its log-probability: (N, D) each.

    The log-probability, given first, is the model's, before `temperature`, `top_k` and `top_p`.
    """
    warped, tokens = scores / settings.temperature, None
    if settings.top_k or settings.top_p < 1:
        count = min(settings.top_k or scores.size(1), scores.size(1))
        warped, tokens = warped.topk(count, dim=1)
    probabilities = warped.softmax(dim=1, dtype=torch.float64)
    below = probabilities.cumsum(dim=1)
    if settings.top_p < 1:
        within = below - probabilities < settings.top_p  # the first always is
        below = (probabilities * within).cumsum(dim=1)
    places = torch.searchsorted(below, uniform.double() * below[:, -1:], right=True)
    places = places.clamp(max=below.size(1) - 1)
    chosen = places if tokens is None else tokens.gather(1, places)
    log_probs = scores.gather(1, chosen) - scores.logsumexp(dim=1, keepdim=True)
    return log_probs.nan_to_num(nan=-torch.inf, neginf=-torch.inf), chosen
