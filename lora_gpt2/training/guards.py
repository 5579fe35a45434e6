"""What a training checks of itself: faults that would otherwise give wrong weights without a word."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lora_gpt2.data.batches import Batch
from lora_gpt2.data.module import DataToText
from lora_gpt2.errors import UserError
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.lora import MergedLinear
from lora_gpt2.training.module import LanguageModeling
from lora_gpt2.training.together import AdaptersTogether
from lora_gpt2.weights.store import digest

_TOKENS = 8
"""So many stand for all where two models are compared."""

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""The share of the largest logit by which two ways to the same logits may differ, by the weights' type."""


class Guards(Callback):
    """Stops a training whose numbers cannot be right, and says why.

    * An adapter that was not trained yet changes nothing: its model's logits are the base's.
    * The loss is finite. Else the batch is named, and one process keeps its state in
      ``checkpoints/not-finite.ckpt``: on a CPU that before the step, on a GPU, which is not waited for, that
      behind it. So is the validation loss, and what was trained in the end.
    * After `steps` steps every B has moved.
    * All processes hold the same weights, at each validation and in the end.
    * The frozen base ends as it began.
    """

    def __init__(self, dirpath: str | Path = "checkpoints", steps: int = 20) -> None:
        self.folder, self.steps = Path(dirpath), steps
        self._frozen = ""
        self._seen: tuple[Tensor, Sequence[Batch], int] | None = None
        self._batch: Sequence[Batch] = ()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, model in _models(pl_module).items():
            if model.lora_layers() and not trainer.ckpt_path:
                _check_start(name, model)
        self._frozen = _frozen(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch | list[Batch], batch_idx: int
    ) -> None:
        self._check_loss(trainer)
        self._batch = batch if isinstance(batch, list) else [batch]

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._seen = loss.detach(), self._batch, trainer.global_step
        if loss.is_cpu:
            self._check_loss(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch | list[Batch],
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.steps:
            self._check_movement(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_ranks(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = float(trainer.callback_metrics.get("valid/loss", 0))
        if not math.isfinite(loss):
            what = f"the validation loss behind step {trainer.global_step} is {loss}"
            raise UserError(
                _rows_of(trainer, "valid"), what, "lower optimizer.lr, or look at the rows of the validation"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_loss(trainer)
        _check_ranks(trainer, pl_module)
        for name, one in pl_module.named_parameters():
            if one.requires_grad and not torch.isfinite(one).all():
                what = f"{name} is not finite behind the last step, {trainer.global_step}"
                raise UserError("callbacks.guards", what, "lower optimizer.lr")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and _frozen(pl_module) != self._frozen:
            what = "frozen weights of the base have changed while an adapter trained over it"
            raise UserError("callbacks.guards", what, "do not use what was trained; look at your callbacks")

    def _check_loss(self, trainer: Trainer) -> None:
        if self._seen is None:
            return
        (loss, batches, step), self._seen = self._seen, None
        if torch.isfinite(loss):
            return
        do = "look at these rows, or lower optimizer.lr"
        if trainer.world_size == 1:  # of several, the others do not know of it
            trainer.save_checkpoint(kept := self.folder / "not-finite.ckpt")
            do += f"; the state is in {kept}"
        lines = ", ".join(str(row + 1) for batch in batches for row in batch.rows.tolist())
        what = f"the loss of step {step + 1} is {float(loss)}; the batch has lines {lines}"
        raise UserError(_rows_of(trainer, "train"), what, do)

    def _check_movement(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if max(group["initial_lr"] for group in trainer.optimizers[0].param_groups) == 0:
            return
        for name, model in _models(pl_module).items():
            if still := list(_unmoved(model)):
                what = f"{name} after {self.steps} steps lora_B is as it was in {', '.join(still)}".lstrip()
                do = "raise optimizer.lr, or look for what cuts their gradients off"
                raise UserError("callbacks.guards", what, do)


def _rows_of(trainer: Trainer, split: str) -> str | Path:
    """Where the rows of a split stand."""
    data = getattr(trainer, "datamodule", None)
    return data.folder / f"{split}.jsonl" if isinstance(data, DataToText) else split


def _models(module: LightningModule) -> Mapping[str, GPT2LMModel]:
    if isinstance(module, AdaptersTogether):
        return {name: member.model for name, member in module.by_name().items()}
    return {"": module.model} if isinstance(module, LanguageModeling) else {}


def _frozen(module: LightningModule) -> str:
    """What the base is; several adapters at once share one."""
    models = list(_models(module).values())
    return _digest(models[0], trains=False) if models else ""


@torch.no_grad()
def _check_start(name: str, model: GPT2LMModel) -> None:
    """Raises UserError where an adapter changes its base before it is trained."""
    ids = torch.arange(_TOKENS, device=model.transformer.wte.weight.device)[None] % model.config.vocab_size
    was = model.training
    model.eval()
    adapted = model.lm_head(model.transformer.hidden_states(ids)).float()
    with _base_alone(model):
        base = model.lm_head(model.transformer.hidden_states(ids)).float()
    model.train(was)
    difference, largest = float((adapted - base).abs().max()), float(base.abs().max())
    if not difference <= ROUNDING[model.transformer.wte.weight.dtype] * largest:
        what = f"{name} before any step the adapter changes logits by {difference:.3g}".lstrip()
        raise UserError("callbacks.guards", what, "look at the base for values that are not finite")


@contextmanager
def _base_alone(model: GPT2LMModel) -> Iterator[None]:
    """The model without its update."""
    layers = model.lora_layers()
    names = "enabled", "lora_magnitude", "lora_bias"
    had = [{name: getattr(layer, name) for name in names if hasattr(layer, name)} for layer in layers]
    for layer in layers:
        layer.lora_bias = None
        if isinstance(layer, MergedLinear):
            layer.enabled, layer.lora_magnitude = [], None
    try:
        yield
    finally:
        for layer, values in zip(layers, had, strict=True):
            for name, value in values.items():
                setattr(layer, name, value)


def _unmoved(model: GPT2LMModel) -> Iterator[str]:
    """Layers, with the number of the projection, whose B is what it began as."""
    for name, layer in model.named_modules():
        if not isinstance(layer, MergedLinear) or not layer.enabled:
            continue
        start = getattr(layer, "lora_B0", torch.zeros_like(layer.lora_B))
        parts = (layer.lora_B - start).detach().chunk(len(layer.enabled))
        for projection, part in zip(layer.enabled, parts, strict=True):
            if not part.any():
                yield f"{name.removeprefix('transformer.')} ({projection})"


def _check_ranks(trainer: Trainer, module: LightningModule) -> None:
    """Raises UserError where processes hold other weights than the first."""
    if trainer.world_size == 1:
        return
    of_all: list[Any] = [None] * trainer.world_size
    own = [_digest(model, trains=True) for model in _models(module).values()]
    torch.distributed.all_gather_object(of_all, own)
    if differing := [rank for rank, digests in enumerate(of_all) if digests != of_all[0]]:
        what = f"processes {differing} hold other weights than process 0 at step {trainer.global_step}"
        raise UserError("callbacks.guards", what, "resume from an earlier checkpoint; look at the machines")


def _digest(model: GPT2LMModel, trains: bool) -> str:
    """Of the weights that train, or of those that do not, as they lie on this device."""
    chosen = {name: one for name, one in model.named_parameters() if one.requires_grad is trains}
    return digest({n: one.to_local() if isinstance(one, DTensor) else one for n, one in chosen.items()})
