"""What a search went through on its way to its outputs, as a tree of tokens."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import Query, decode_stream
from lora_gpt2.decoding.state import Beams, Hypothesis
from lora_gpt2.model.language_model import GPT2LMModel


@dataclass
class Node:
    """A token that a beam took."""

    parent: int | None
    """Its number in the tree; None for a first token."""
    token: int
    log_prob: float
    """Of this token after those before it."""
    output: int | None = None
    """The rank, 0 the best, of the output that ends here."""


class SearchTree:
    """Grows while one query is decoded: its nodes come after their parents."""

    def __init__(self, seconds: float = math.inf) -> None:
        """`seconds`: when to give up."""
        self.nodes: list[Node] = []
        self._until = time.monotonic() + seconds
        self._numbers: dict[tuple[int | None, int], int] = {}
        self._tips: list[int | None] = []  # the node where each beam is; None: no token yet, or dead

    def watch(self, beams: Beams, parents: Tensor) -> None:
        """Adds what each beam took; `decode_stream` calls it. Raises TimeoutError when the time is over."""
        if time.monotonic() > self._until:
            raise TimeoutError
        last = int(beams.lengths[0]) - 1
        tokens, log_probs = beams.tokens[0, :, last].tolist(), beams.log_probs[0, :, last].tolist()
        before = self._tips or [None] * len(tokens)
        self._tips = [
            None if log_prob == -torch.inf else self._at(before[parent], token, log_prob)
            for parent, token, log_prob in zip(parents[0].tolist(), tokens, log_probs, strict=True)
        ]

    def end(self, outputs: Sequence[Hypothesis]) -> None:
        """Notes where the outputs, best first, end."""
        for rank, output in enumerate(outputs):
            place = None
            for token, log_prob in zip(output.tokens, output.log_probs, strict=True):
                place = self._at(place, token, log_prob)
            if place is not None and self.nodes[place].output is None:  # samples may be alike
                self.nodes[place].output = rank

    def _at(self, parent: int | None, token: int, log_prob: float) -> int:
        number = self._numbers.setdefault((parent, token), len(self.nodes))
        if number == len(self.nodes):
            self.nodes.append(Node(parent, token, log_prob))
        return number


def decode_with_tree(
    model: GPT2LMModel,
    context: Sequence[int],
    settings: DecodingSettings,
    end_tokens: list[int],
    seconds: float = math.inf,
) -> tuple[list[Hypothesis], list[Node]]:
    """The best outputs of one context, best first, and all that its beams went through.

    Raises ValueError as `decode`, and TimeoutError when it takes longer than `seconds`.
    """
    tree = SearchTree(seconds)
    ((_, outputs),) = decode_stream(model, [Query(0, context)], settings, end_tokens, tree.watch)
    tree.end(outputs)
    return outputs, tree.nodes
