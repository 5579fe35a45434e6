"""Beam search by its definition: one query, Python lists, the whole sequence run again at every step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_gpt2.decoding.config import DecodingSettings


def literal_beam_search(
    logits_after: Callable[[list[int]], Tensor], settings: DecodingSettings, end_tokens: list[int]
) -> tuple[list[int], float]:
    """`logits_after(history)` gives the (V,) logits behind the context and `history`."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    best: tuple[list[int], float] = ([], -math.inf)
    for step in range(settings.eval_len):
        candidates = []
        for number, (history, running) in enumerate(beams):
            if running == -math.inf:
                continue
            log_probs = _log_probs(logits_after(history), history, step, settings, end_tokens)
            for token, log_prob in enumerate(log_probs):
                total = float(torch.tensor(running) + log_prob)
                if total > -math.inf:
                    candidates.append((total, -number, -token))
        candidates.sort(reverse=True)
        survivors = []
        for total, number, token in candidates[: settings.beam_size]:
            history = [*beams[-number][0], -token]
            score = float(torch.tensor(total) / len(history) ** settings.length_penalty)
            ended = -token in end_tokens
            if (ended or step == settings.eval_len - 1) and score > best[1]:
                best = (history, score)
            survivors.append((history, -math.inf if ended else total))
        beams = survivors
    return best


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
