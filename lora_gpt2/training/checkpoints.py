"""Checkpoints: whole or absent, and written when a run is told to stop."""

import contextlib
import io
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lora_gpt2.files import replacing

SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]
"""Ask a run to stop: a terminal, a system that shuts down, a scheduler that needs the machine."""


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, synced to disk before they take their name."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        held = io.BytesIO()  # torch tells of a full disk in words of its own
        torch.save(checkpoint, held)
        with replacing(path) as temporary:
            temporary.write_bytes(held.getbuffer())


class Stopped(SystemExit):
    """A signal ended the run. The exit code is 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name

    def __str__(self) -> str:
        return self.name


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` to go on from: every so many steps, and when a signal asks the run to stop.

    Where a step is validated it is written behind the validation: a resumed run would not validate again, and
    know of no better weights. A run that gets one of `SIGNALS` then ends; a second one ends it at once.
    SIGUSR1 and SIGUSR2 are handed on to whom they were for before: a scheduler's way to begin the job again.
    """

    def __init__(self, dirpath: str | Path = "checkpoints", every_n_train_steps: int = 500) -> None:
        self.folder, self.every = Path(dirpath), every_n_train_steps
        self._told = 0
        """The signal that this process got; it may come at any moment."""
        self._stops_by = 0
        """That which any process got, as all of them know behind a step."""
        self._before: dict[int, Any] = {}
        self._step, self._due, self._saved = 0, False, False
        self._exit: SystemExit | None = None
        self._agreed: Callable[[int], int] = lambda told: told

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
        with contextlib.suppress(ValueError):  # not in the main thread: the signals are another's
            self._before = {number: signal.signal(number, self._tell) for number in SIGNALS}

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
        self._stops_by = self._agreed(self._told)
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
        trainer.save_checkpoint(self.folder / "last.ckpt")
        self._due, self._saved = False, True
        if not self._stops_by:
            return
        stopped, before = Stopped(self._stops_by), self._before.get(self._stops_by)
        if trainer.is_global_zero:
            run = self.folder.parent
            print(f"{stopped}: stopped behind step {self._step}, go on with resume={run}", flush=True)
        self._restore()
        if stopped.name.startswith("SIGUSR") and callable(before):
            before(self._stops_by, None)
        # in peace on other processes: Lightning kills the first where another fails
        self._exit = stopped if trainer.is_global_zero else SystemExit(0)

    def _leave(self) -> None:
        """Where a step is over, and logged."""
        if self._exit is not None:
            raise self._exit

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = number
        for every in self._before:  # the next one ends it
            signal.signal(every, signal.SIG_DFL)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
