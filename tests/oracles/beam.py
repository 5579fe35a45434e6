"""Beam search by its definition: one query, Python lists, the whole sequence run again at every step."""

import math
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from lora_gpt2.decoding.config import DecodingSettings

Beam = tuple[list[int], float]


def literal_beam_search(
    logits_after: Callable[[list[int]], Tensor], settings: DecodingSettings, end_tokens: list[int]
) -> list[Beam]:
    """Outputs and scores, best first, at most `n_best` and at least one.

    `logits_after(history)` gives the (V,) logits behind the context and `history`.
    """
    groups: list[list[Beam]] = [[([], 0.0)] for _ in range(settings.beam_groups)]
    finished: list[Beam] = []
    for step in range(settings.eval_len):
        chosen: Counter[int] = Counter()
        for number, beams in enumerate(groups):
            survivors = []
            for history, total in _survivors(beams, chosen, logits_after, step, settings, end_tokens):
                ended = history[-1] in end_tokens
                if ended or step == settings.eval_len - 1:
                    score = float(torch.tensor(total) / len(history) ** settings.length_penalty)
                    finished.append((history, score))
                survivors.append((history, -math.inf if ended else total))
            groups[number] = survivors
            chosen.update(history[-1] for history, _ in survivors)
    finished.sort(key=lambda beam: -beam[1])
    return finished[: settings.n_best] or [([], -math.inf)]


def _survivors(
    beams: list[Beam],
    chosen: Counter[int],
    logits_after: Callable[[list[int]], Tensor],
    step: int,
    settings: DecodingSettings,
    end_tokens: list[int],
) -> list[Beam]:
    candidates = []
    for number, (history, running) in enumerate(beams):
        if running == -math.inf:
            continue
        log_probs = _log_probs(logits_after(history), history, step, settings, end_tokens)
        for token, log_prob in enumerate(log_probs):
            total = float(torch.tensor(running) + log_prob)
            if total > -math.inf:
                worth = total - settings.diversity_penalty * chosen[token]
                candidates.append((worth, -number, -token, total))
    candidates.sort(reverse=True)
    kept = candidates[: settings.beam_size // settings.beam_groups]
    return [([*beams[-number][0], -token], total) for _, number, token, total in kept]


def _log_probs(
    logits: Tensor, history: list[int], step: int, settings: DecodingSettings, end_tokens: list[int]
) -> Tensor:
    logits = logits.clone()
    for token in set(history):
        if settings.repetition_penalty != 1:
            value = logits[token]
            penalty = settings.repetition_penalty
            logits[token] = value / penalty if value >= 0 else value * penalty
    if step < settings.min_length:
        for token in end_tokens:
            logits[token] = -math.inf
    size = settings.no_repeat_ngram_size
    if size:
        for start in range(len(history) - size + 1):
            ngram = history[start : start + size]
            if ngram[:-1] == history[len(history) - size + 1 :]:
                logits[ngram[-1]] = -math.inf
    if bool((logits == -math.inf).all()):
        return logits
    return torch.log_softmax(logits, dim=0)
