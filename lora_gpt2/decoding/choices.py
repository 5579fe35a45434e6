"""Choices among the tokens of a vocabulary: the best ones, or by chance.  N beams, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_gpt2.decoding.config import DecodingSettings, Strategy


def top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `scores` (N, V), descending, and their tokens: (N, count)."""
    return scores.topk(count, dim=1)


def log_partition(scores: Tensor, largest: Tensor) -> Tensor:
    """log sum exp(scores - largest): (N, V), (N, 1) -> (N, 1), as log_softmax computes it."""
    return (scores - largest).exp().sum(dim=1, keepdim=True).log()


def chances(settings: DecodingSettings, numbers: Sequence[int]) -> Tensor:
    """The chances (Q, K, L) in [0, 1) of all samples of the queries: of seed and number alone."""
    if settings.strategy is not Strategy.sample:
        return torch.zeros(len(numbers), 0, 0)
    shape = settings.beam_size, settings.eval_len
    seeds = [settings.seed * 1_000_003 + number for number in numbers]
    return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def drawn(scores: Tensor, uniform: Tensor, settings: DecodingSettings) -> tuple[Tensor, Tensor]:
    """A token of each row of `scores` (N, V) by its chance (N,), and its log-probability, (N,) each.

    The log-probability is the model's, before `temperature`, `top_k` and `top_p`.
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
    target = uniform[:, None].double() * below[:, -1:]
    place = torch.searchsorted(below, target, right=True).clamp(max=below.size(1) - 1)
    token = place if tokens is None else tokens.gather(1, place)
    log_probs = scores.gather(1, token) - scores.logsumexp(dim=1, keepdim=True)
    return log_probs.squeeze(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf), token.squeeze(1)
