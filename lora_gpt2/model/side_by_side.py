"""Several adapters over one base, trained at once: their rows run through its products together."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.model.cache import FlatRows
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.lora import MergedLinear
from lora_gpt2.model.loss import total_weight
from lora_gpt2.model.parts import Line, Rows, lines, sum_in_turn


class SideBySide:
    """N models that differ in rank, scaling, dropout and values of their updates alone.

    They share the base of the first. Each model can still be run alone; `loss` runs all at once, each on
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
        self._running: list[int] = []
        self._sizes: tuple[list[int], ...] = ()
        self._states: list[Tensor] = []
        for layers in zip(*(_linear_layers(model) for model in models), strict=True):
            layers[0].beside, layers[0].layers_beside = self, layers

    @property
    def running(self) -> bool:
        """Whether batches of `loss` are on their way through the blocks."""
        return bool(self._running)

    def share(self) -> None:
        """Gives all models the first one's base as it lies now."""
        for model in self.models[1:]:
            model.share_base(self.models[0])

    def seed(self, seeds: Sequence[int]) -> None:
        """Starts each model's stream of random numbers."""
        self._states = [self._generator(seed).get_state() for seed in seeds]

    def loss(
        self, rows: Sequence[Rows], label_smooth: Sequence[float], weights: Sequence[Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum of what `loss_in_parts` of each model gives for its rows, and each one's value (N,).

        `weights`: what each one counts by in the sum; default: 1. `rows` are not packed. Where they go in
        parts, a part of each model is computed at a time.
        """
        each = [lines(model, one) for model, one in zip(self.models, rows, strict=True)]
        wholes = [total_weight(mask) for _, _, mask in rows]
        values = torch.zeros(len(rows), dtype=torch.float32, device=self._device)

        def turn_loss(turn: int) -> Tensor:
            """Of all models that have so many parts, at once."""
            running = {k: parts[turn] for k, parts in enumerate(each) if turn < len(parts)}
            total = values.new_zeros(())
            for k, found in self._losses(running, label_smooth).items():
                share = total_weight(running[k].targets.weights) / wholes[k]
                values[k] += found.detach() * share
                total = total + found * share * (1.0 if weights is None else weights[k])
            return total

        turns = [partial(turn_loss, turn) for turn in range(max(map(len, each)))]
        trained = (parameter for model in self.models for parameter in model.parameters())
        return sum_in_turn(turns, trained), values

    def _losses(self, running: Mapping[int, Line], label_smooth: Sequence[float]) -> dict[int, Tensor]:
        """The mean loss of some of the models, by their numbers."""
        sizes = [one.ids.size(1) for one in running.values()]
        starts = accumulate(sizes, initial=0)
        kept = [start + one.targets.positions for start, one in zip(starts, running.values(), strict=False)]
        asked = [len(one.targets.labels) for one in running.values()]
        ids, positions = (
            torch.cat(one, dim=1) for one in zip(*(one[:2] for one in running.values()), strict=True)
        )
        transformer, head = self.models[0].transformer, self.models[0].lm_head
        rows = FlatRows([n for one in running.values() for n in one.lengths], transformer.wte.weight)
        self._running = list(running)
        self._sizes = asked, sizes
        try:
            caches = [rows] * len(transformer.h)
            hidden = transformer.hidden_states(ids, positions, caches, kept=torch.cat(kept))
        finally:
            self._running = []
        states = zip(running.items(), torch.split(hidden, asked), strict=True)
        return {k: head.loss(state, one.targets, label_smooth[k]) for (k, one), state in states}

    def tokens_of_each(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The numbers of those running, and each one's part of x along N.

        x is (1, N, in) for all tokens, or (N, in) for those with a loss.
        """
        for k, part in zip(self._running, torch.split(x, self._sizes[x.dim() - 2], dim=-2), strict=True):
            with self._turn(k):
                yield k, part

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
