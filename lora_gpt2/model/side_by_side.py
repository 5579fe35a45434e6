"""Several adapters over one base, trained at once: their rows run through its products together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.lora import MergedLinear

Rows = tuple[Tensor, Tensor, Tensor]
"""Input ids, labels and mask, each (B, T)."""


class SideBySide:
    """N models that differ in rank, scaling, dropout and values of their updates alone.

    They share the base of the first. Each model can still be run alone; `losses` runs all at once, each on
    rows of its own, and each layer's updates on their model's rows. Dropout draws from a stream for each
    model, so that none notices the others.
    """

    def __init__(self, models: Sequence[GPT2LMModel]) -> None:
        """Raises ValueError for what models beside others cannot have."""
        self.models = list(models)
        for model in models:
            config = model.config
            if config.lora_dora or config.lora_bias != "none" or config.fix_dropout:
                raise ValueError("models side by side have no DoRA, trained biases, or dropout of their own")
            if model.transformer.gradient_checkpointing:
                raise ValueError("models side by side cannot have gradient_checkpointing")
        self.share()
        self._shapes: list[tuple[int, ...]] = []
        self._states: list[Tensor] = []
        for layers in zip(*(_linear_layers(model) for model in models), strict=True):
            layers[0].beside, layers[0].layers_beside = self, layers

    @property
    def running(self) -> bool:
        """Whether a batch of `losses` is on its way through the blocks."""
        return bool(self._shapes)

    def share(self) -> None:
        """Gives all models the first one's base as it lies now."""
        for model in self.models[1:]:
            model.share_base(self.models[0])

    def seed(self, seeds: Sequence[int]) -> None:
        """Starts each model's stream of random numbers."""
        self._states = [self._generator(seed).get_state() for seed in seeds]

    def losses(self, rows: Sequence[Rows], label_smooth: Sequence[float]) -> list[Tensor]:
        """What `GPT2LMModel.completion_loss` of each model gives for its rows."""
        width = max(ids.size(1) for ids, _, _ in rows)
        padded = [[F.pad(part, (0, width - part.size(1))) for part in parts] for parts in rows]
        self._shapes = [tuple(ids.shape) for ids, _, _ in rows]
        try:
            transformer = self.models[0].transformer
            hidden = transformer.hidden_states(torch.cat([ids for ids, _, _ in padded]))  # (sum of B, T, C)
        finally:
            self._shapes = []
        counts = [len(ids) for ids, _, _ in rows]
        found = []
        for part, (_, labels, mask), smooth in zip(
            torch.split(hidden, counts), padded, label_smooth, strict=True
        ):
            weights = torch.ones(int(mask.sum()), device=mask.device)
            found.append(self.models[0].lm_head.loss(part[mask], labels[mask], weights, smooth))
        return found

    def shares(self) -> Iterator[tuple[int, tuple[slice, slice]]]:
        """Each model's number, and its rows and their own width within the batch that is running."""
        start = 0
        for k, (count, width) in enumerate(self._shapes):
            with self._turn(k):
                yield k, (slice(start, start + count), slice(width))
            start += count

    @contextmanager
    def _turn(self, k: int) -> Iterator[None]:
        """Random numbers inside come from the stream of the k-th model."""
        config = self.models[k].config
        if not self._states or not (config.lora_dropout or config.lora_r_dropout):
            yield
            return
        generators: Any = {"cuda": torch.cuda, "mps": torch.mps}.get(self._device.type, torch)
        generators.set_rng_state(self._states[k])
        try:
            yield
        finally:
            self._states[k] = generators.get_rng_state()

    @property
    def _device(self) -> torch.device:
        return self.models[0].transformer.wte.weight.device

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(seed)


def _linear_layers(model: GPT2LMModel) -> list[MergedLinear]:
    return [layer for layer in model.lora_layers() if isinstance(layer, MergedLinear)]
