"""Callbacks that Lightning does not have: a report for screens and log files, and the plateau schedule."""

import shutil
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lora_gpt2.data.batches import Batch
from lora_gpt2.data.config import DataSettings
from lora_gpt2.errors import UserError
from lora_gpt2.files import first_process, replacing
from lora_gpt2.memory import peak
from lora_gpt2.training.config import OptimizerSettings, Schedule


class SameSettings(Callback):
    """Stops a run whose processes were given different settings: they would train on as one, unnoticed.

    Each checkpoint says them, for whoever goes on from it.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        of_all: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(of_all, self.settings)
        if any(settings != self.settings for settings in of_all):
            what = "the processes of this run were given different settings"
            raise UserError("trainer", what, "start all of them with the same command")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["settings"] = dict(self.settings)


class Progress(Callback):
    """One line every `every` seconds: step, loss, learning rate, tokens per second, time left (h:mm:ss).

    Reads the same on a terminal and in a log file. Tokens are those that the model runs over, padding
    left out, on this device. Loggers get the tokens per second, and the most memory taken so far in GB.
    """

    def __init__(self, every: float = 10.0) -> None:
        self.every = every
        self._start = self._printed = 0.0
        self._tokens = self._first_step = self._decoded = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = self._printed = time.monotonic()
        self._tokens, self._first_step = 0, trainer.global_step
        if trainer.ckpt_path is not None:
            _say(f"  goes on behind step {trainer.global_step:,} of {trainer.ckpt_path}")
        settings = getattr(getattr(trainer, "datamodule", None), "settings", None)
        if isinstance(settings, DataSettings):
            rows = settings.batch_size * trainer.accumulate_grad_batches
            devices = "1 device" if trainer.world_size == 1 else f"{trainer.world_size} devices"
            highest = max(group["initial_lr"] for group in trainer.optimizers[0].param_groups)
            steps = int(trainer.estimated_stepping_batches)
            _say(f"  {steps:,} steps of {rows} rows on {devices}, learning rate up to {highest:.1e}")
            schedule = trainer.lr_scheduler_configs[0].scheduler
            courses = schedule.lr_lambdas if isinstance(schedule, LambdaLR) else []
            if any(course(steps - 1) < course(steps) < 1 for course in courses):
                _say("  note: the rate still rises at the last step; lower optimizer.warmup_steps")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch | list[Batch],
        batch_idx: int,
    ) -> None:
        self._tokens += sum(one.tokens for one in (batch if isinstance(batch, list) else [batch]))
        speed = self._tokens / (time.monotonic() - self._start)
        pl_module.log_dict({"tokens_per_second": speed, "memory_gb": peak(pl_module.device) / 1e9})
        if self._due():
            step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
            values = trainer.callback_metrics
            _say(
                f"  step {step}/{total}  epoch {trainer.current_epoch + 1}"
                f"  loss {_value(values, 'train/loss')}  lr {values['lr']:.1e}"
                f"  {speed:,.0f} tokens/s  {self._left(step - self._first_step, total - step)} left"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = trainer.callback_metrics
        if "valid/loss" in values:
            _say(
                f"  step {trainer.global_step}  validation loss {_value(values, 'valid/loss')}"
                f"  perplexity {_value(values, 'valid/perplexity')}"
                f"  token accuracy {_value(values, 'valid/token_accuracy')}"
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._decoded = 0

    def on_decoded(self, total: int) -> None:
        """One of the `total` contexts of this device is done; the first sets the clock."""
        if self._decoded == 0:
            self._start = self._printed = time.monotonic()
        self._decoded += 1
        if self._decoded > 1 and self._due():
            speed = (self._decoded - 1) / (self._printed - self._start)
            left = self._left(self._decoded - 1, total - self._decoded)
            _say(f"  decoded {self._decoded}/{total}  {speed:.3g} contexts/s  {left} left")

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._printed < self.every:
            return False
        self._printed = now
        return True

    def _left(self, done: int, left: int) -> str:
        seconds = int((self._printed - self._start) / max(1, done) * left)
        return str(timedelta(seconds=seconds))


class StopEarly(EarlyStopping):
    """EarlyStopping that, resumed from where it had stopped, trains no further without more patience."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reason = self.stopping_reason
        more = reason is EarlyStoppingReason.PATIENCE_EXHAUSTED and self.wait_count < self.patience
        stopped = reason is not EarlyStoppingReason.NOT_STOPPED and not more
        trainer.should_stop = trainer.should_stop or stopped


class BestCheckpoints(ModelCheckpoint):
    """ModelCheckpoint that, resumed in another folder, takes the best weights so far along.

    They are looked for beside the checkpoint that is resumed, and nowhere else that it may name.
    """

    _resumed: Path | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = Path(str(trainer.ckpt_path)).parent

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath))
        there = self._resumed or here
        scores = {Path(path).name: score for path, score in state_dict["best_k_models"].items()}
        if not all((there / name).is_file() for name in scores):
            scores = {}
        if there.resolve() != here.resolve() and first_process():
            for name in scores:
                with replacing(here / name) as temporary:
                    shutil.copyfile(there / name, temporary)
        best, kth = (Path(state_dict[key]).name for key in ("best_model_path", "kth_best_model_path"))
        super().load_state_dict(
            {
                **state_dict,
                "dirpath": self.dirpath,
                "best_k_models": {str(here / name): score for name, score in scores.items()},
                "best_model_path": str(here / best) if best in scores else "",
                "best_model_score": state_dict["best_model_score"] if best in scores else None,
                "kth_best_model_path": str(here / kth) if kth in scores else "",
                "last_model_path": "",
            }
        )


class LowerRateOnPlateau(Callback):
    """For `schedule=plateau`: lowers the rate when the validation loss has stopped falling."""

    def __init__(self) -> None:
        self.best = float("inf")
        self.stalled = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settings = getattr(pl_module, "optimizer_settings", None)
        if not isinstance(settings, OptimizerSettings) or settings.schedule is not Schedule.plateau:
            return
        loss = float(trainer.callback_metrics["valid/loss"])
        self.stalled = 0 if loss < self.best else self.stalled + 1
        self.best = min(loss, self.best)
        if self.stalled > settings.plateau_patience:
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            scheduler.base_lrs = [rate * settings.plateau_factor for rate in scheduler.base_lrs]
            self.stalled = 0
            _say(f"  validation loss stalled: the rate falls to {scheduler.base_lrs[0]:.1e}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stalled": self.stalled}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.stalled = state_dict["best"], state_dict["stalled"]


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)


def _value(values: dict[str, Tensor], name: str) -> str:
    return f"{float(values[name]):.4f}" if name in values else "n/a"
