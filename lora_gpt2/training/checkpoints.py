"""Checkpoints: whole or absent, and written when a run is told to stop."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lora_gpt2.files import replacing
from lora_gpt2.signals import Signals


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, synced to disk before they take their name."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        held = io.BytesIO()  # torch tells of a full disk in words of its own
        torch.save(checkpoint, held)
        with replacing(path) as temporary:
            temporary.write_bytes(held.getbuffer())


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` to go on from: every so many steps, and when a signal asks the run to stop.

    Each checkpoint says, as "begun", at which one of another place or name its run had begun.
    Where a step is validated it is written behind the validation: a resumed run would not validate again, and
    know of no better weights. A run that was told then ends; where that was behind the last step, it is for
    the caller to look at ``signals``.
    """

    def __init__(self, dirpath: str | Path = "checkpoints", every_n_train_steps: int = 500) -> None:
        self.folder, self.every = Path(dirpath), every_n_train_steps
        self._last = self.folder / "last.ckpt"
        self.signals = Signals()
        self._stops_by = 0
        """The signal that any process got, as all of them know behind a step."""
        self._begun: str | None = None
        self._step, self._due, self._saved = 0, False, False
        self._exit: SystemExit | None = None
        self._agreed: Callable[[int], int] = lambda told: told

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        resumed = Path(str(trainer.ckpt_path)).resolve()
        self._begun = checkpoint.get("begun") if resumed == self._last.resolve() else str(resumed)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["begun"] = self._begun

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if trainer.world_size > 1:
            group = torch.distributed.new_group(backend="gloo")

            def agreed(told: int) -> int:
                """What any process was told; over a CPU's group, for which a GPU need not be waited for."""
                of_all = torch.tensor(told)
                torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MAX, group)
                return int(of_all)

            self._agreed = agreed
        self.signals.listen()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._leave()
        if self._saved:  # its step was logged behind it, and a resumed run would not log it again
            self._saved = False
            for logger in trainer.loggers:
                logger.save()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # between two steps, where gradients are accumulated
        self._step = trainer.global_step
        self._stops_by = self._agreed(self.signals.told)
        self._due = bool(self._stops_by) or (self.every > 0 and self._step % self.every == 0)
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        if self._due and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave()

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self._last)
        self._due, self._saved = False, True
        if self._stops_by:
            where = f"behind step {self._step}, go on with resume={self.folder.parent}"
            self._exit = self.signals.end(self._stops_by, trainer.is_global_zero, where)

    def _leave(self) -> None:
        """Where a step is over, and logged."""
        if self._exit is not None:
            raise self._exit
