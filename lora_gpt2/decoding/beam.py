"""Beam search over any model that can take a step.  Q queries, K beams, V vocabulary.

Knows no tokenizer, file, model or device: only a function from the beams' last tokens to logits.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.rules import forbid, forbid_repeated_ngrams, penalise_repetition


class Hypothesis(NamedTuple):
    tokens: list[int]
    """The output, end token included."""
    score: float
    """Sum of log-probabilities / length ** length_penalty."""


class Step(Protocol):
    """One step of the model for all living beams.

    `queries` (Q') are the surviving rows of the previous call (of the first logits at the first one),
    `parents` (Q', K) the beam of the previous step that each beam goes on from, `tokens` (Q', K) what
    it was given. Returns logits (Q' * K, V).
    """

    def __call__(self, queries: Tensor, parents: Tensor, tokens: Tensor) -> Tensor: ...


@dataclass
class _Best:
    """The best finished hypothesis of each query so far."""

    scores: Tensor  # (Q,)
    outputs: list[list[int]]

    def offer(self, query_ids: Tensor, scores: Tensor, history: Tensor) -> None:
        """`scores` (Q', K) of finished beams, -inf elsewhere; their tokens `history` (Q', K, L)."""
        score, beam = scores.max(dim=1)
        for i in (score > self.scores[query_ids]).nonzero().flatten().tolist():
            query = int(query_ids[i])
            self.scores[query] = score[i]
            self.outputs[query] = history[i, beam[i]].tolist()


@torch.inference_mode()
def beam_search(
    logits: Tensor, step: Step, settings: DecodingSettings, end_tokens: list[int]
) -> list[Hypothesis]:
    """The best output of each query, from the `logits` (Q, V) behind its context.

    The published implementation's algorithm: of all K * V continuations the K best survive; one that
    ends leaves its beam dead and competes by score; at `eval_len` tokens the living ones compete too.
    A query stops as soon as no living beam can still win, which changes no result: log-probabilities
    are at most 0, so a beam's best possible score is known (`_bound`).
    """
    count, vocab = logits.shape
    beams = settings.beam_size
    if beams > vocab:
        raise ValueError(f"beam_size {beams} is larger than the vocabulary of {vocab}")
    device = logits.device
    ends = torch.tensor(end_tokens, device=device)
    best = _Best(torch.full((count,), -torch.inf, device=device), [[] for _ in range(count)])
    query_ids = torch.arange(count, device=device)
    history = torch.empty(count, 1, 0, dtype=torch.long, device=device)  # (Q, K, L)
    running = torch.zeros(count, 1, device=device)  # (Q, K) sums of log-probabilities

    for length in range(1, settings.eval_len + 1):
        log_probs = _log_probs(logits, history.flatten(0, 1), settings, end_tokens)
        candidates = running[..., None] + log_probs.view(*running.shape, vocab)  # (Q, K, V)
        running, chosen = candidates.flatten(1).topk(beams, dim=1)  # (Q, K)
        parents, tokens = chosen // vocab, chosen % vocab
        history = torch.cat((history.gather(1, _as_index(parents, history)), tokens[..., None]), dim=2)

        finished = torch.isin(tokens, ends)
        scores = running / length**settings.length_penalty
        competing = scores if length == settings.eval_len else scores.masked_fill(~finished, -torch.inf)
        best.offer(query_ids, competing, history)
        running = running.masked_fill(finished, -torch.inf)

        hope = _bound(running.amax(dim=1), length, settings)
        alive = (best.scores[query_ids] < hope).nonzero().flatten()
        if length == settings.eval_len or not len(alive):
            break
        query_ids, running, history = query_ids[alive], running[alive], history[alive]
        parents, tokens = parents[alive], tokens[alive]
        logits = step(alive, parents, tokens)
    return [Hypothesis(*pair) for pair in zip(best.outputs, best.scores.tolist(), strict=True)]


def _log_probs(logits: Tensor, history: Tensor, settings: DecodingSettings, end_tokens: list[int]) -> Tensor:
    """Log-softmax after the rules: (N, V), (N, L) -> (N, V) in float32."""
    logits = penalise_repetition(logits.float(), history, settings.repetition_penalty)
    if history.size(1) < settings.min_length:
        logits = forbid(logits, end_tokens)
    logits = forbid_repeated_ngrams(logits, history, settings.no_repeat_ngram_size)
    return logits.log_softmax(dim=-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # nan: all forbidden


def _bound(running: Tensor, length: int, settings: DecodingSettings) -> Tensor:
    """The best score that beams with these sums (Q,) of `length` tokens can still reach."""
    last = settings.eval_len if settings.length_penalty > 0 else min(length + 1, settings.eval_len)
    return running / last**settings.length_penalty


def _as_index(parents: Tensor, history: Tensor) -> Tensor:
    return parents[..., None].expand(-1, -1, history.size(2))
