"""Several adapters over one base, trained at once: their rows run through its products together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.model.cache import FlatBatches
from lora_gpt2.model.language_model import GPT2LMModel, Targets
from lora_gpt2.model.lora import MergedLinear

Rows = tuple[Tensor, Tensor, Tensor]
"""Input ids, labels and mask, each (B, T)."""


class SideBySide:
    """N models that differ in rank, scaling, dropout and values of their updates alone.

    They share the base of the first. Each model can still be run alone; `losses` runs all at once, each on
    rows of its own, and each layer's updates on their model's tokens. Dropout draws from a stream for each
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
        self._sizes: tuple[list[int], ...] = ()
        self._states: list[Tensor] = []
        for layers in zip(*(_linear_layers(model) for model in models), strict=True):
            layers[0].beside, layers[0].layers_beside = self, layers

    @property
    def running(self) -> bool:
        """Whether a batch of `losses` is on its way through the blocks."""
        return bool(self._sizes)

    def share(self) -> None:
        """Gives all models the first one's base as it lies now."""
        for model in self.models[1:]:
            model.share_base(self.models[0])

    def seed(self, seeds: Sequence[int]) -> None:
        """Starts each model's stream of random numbers."""
        self._states = [self._generator(seed).get_state() for seed in seeds]

    def losses(self, rows: Sequence[Rows], label_smooth: Sequence[float]) -> list[Tensor]:
        """What `GPT2LMModel.completion_loss` of each model gives for its rows."""
        targets = [Targets.of(labels, mask) for _, labels, mask in rows]
        batches = FlatBatches([(len(ids), ids.size(1)) for ids, _, _ in rows])
        starts = [0, *accumulate(batches.sizes)]
        kept = [start + target.positions for start, target in zip(starts, targets, strict=False)]
        asked = [len(target.labels) for target in targets]
        ids = torch.cat([ids.flatten() for ids, _, _ in rows])[None]  # (1, N)
        places = torch.cat([torch.arange(t, device=ids.device).repeat(b) for b, t in batches.shapes])
        transformer, head = self.models[0].transformer, self.models[0].lm_head
        self._sizes = asked, batches.sizes
        try:
            hidden = transformer.hidden_states(
                ids, places, [batches] * len(transformer.h), kept=torch.cat(kept)
            )
        finally:
            self._sizes = ()
        parts = torch.split(hidden, asked)
        return [
            head.loss(part, target, smooth)
            for part, target, smooth in zip(parts, targets, label_smooth, strict=True)
        ]

    def parts(self, x: Tensor) -> Iterator[Tensor]:
        """Each model's part of x along N: (1, N, in) of all tokens, or (N, in) of those with a loss."""
        for k, part in enumerate(torch.split(x, self._sizes[x.dim() - 2], dim=-2)):
            with self._turn(k):
                yield part

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
