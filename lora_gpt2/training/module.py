"""The LightningModule: wires model, loss, metrics and optimizer, and computes nothing itself."""

import os
import shutil
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lora_gpt2.data.batches import Batch
from lora_gpt2.errors import UserError
from lora_gpt2.memory import keep_freed
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.keys import is_lora
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.loss import total_weight
from lora_gpt2.model.parts import loss_in_parts
from lora_gpt2.training.accuracy import StageMetrics
from lora_gpt2.training.config import OptimizerSettings
from lora_gpt2.training.optimization import build_optimizer


class LanguageModeling(LightningModule):
    """Trains the LoRA matrices of `model`, or all of it where it has none.

    Checkpoints hold what trains; a frozen base is found again by `base_sha256`, which a resumed run
    must share.
    """

    def __init__(
        self,
        model: GPT2LMModel,
        optimizer: OptimizerSettings,
        label_smoothing: float = 0.0,
        seed: int = 0,
        base_sha256: str = "",
        dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        """`dtype`: see `GPT2LMModel.train_only_lora`; `compiled`: see `GPT2LMModel.compile_blocks`."""
        super().__init__()
        self.model = model
        self.optimizer_settings, self.label_smoothing = optimizer, label_smoothing
        self.seed, self.base_sha256 = seed, base_sha256
        self.valid_metrics = StageMetrics()
        self.valid_loss: float | None = None
        self.compiled = compiled
        if model.lora_layers():
            model.train_only_lora(dtype)

    def on_fit_start(self) -> None:
        self.model.prepack()
        keep_freed()  # only now: what building the model took is given back
        if self.compiled:
            compilers = os.environ.get("CXX", "g++"), "g++", "clang++"
            if self.device.type == "cpu" and not any(map(shutil.which, compilers)):
                do = "install g++, name one in CXX, or set compile=false"
                raise UserError("compile", "needs a C++ compiler, and none was found", do)
            self.model.compile_blocks()

    def on_fit_end(self) -> None:
        self.model.unpack()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(self.dropout_seed(self.current_epoch, batch_idx, self.global_rank))

    def dropout_seed(self, *place: int) -> int:
        """By the place in the run: a resumed run goes on bit for bit, and ranks differ."""
        return reduce(lambda seed, number: (seed * 1_000_003 + number) % 2**63, (self.seed, *place))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = loss_in_parts(self.model, batch.tensors, self.label_smoothing)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict({"train/loss": loss, "lr": rate}, batch_size=len(batch.rows))
        return loss * shares(self.trainer, [batch])[0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.valid_metrics.update(self.model.completion_report(batch.input_ids, batch.labels, batch.mask))

    def on_validation_epoch_end(self) -> None:
        values = {f"valid/{name}": value for name, value in self.valid_metrics.compute().items()}
        self.valid_loss = float(values["valid/loss"])
        self.log_dict(values)  # already reduced over ranks
        self.valid_metrics.reset()

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What trains, by name."""
        return [(name, one) for name, one in self.named_parameters() if one.requires_grad]

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        trained = [(self.trained(), self.optimizer_settings)]
        mixed = "mixed" in self.trainer.precision  # Lightning clips no gradients of a fused optimizer then
        fused = not (mixed and self.trainer.gradient_clip_val)
        optimizer, schedule = build_optimizer(trained, total, fused)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["valid_loss"] = self.valid_loss
        checkpoint["base_sha256"] = self.base_sha256
        checkpoint["config"] = self.model.config.to_dict()
        checkpoint["lora_plus_ratio"] = self.optimizer_settings.lora_plus_ratio
        if self.model.lora_layers():
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if is_lora(k)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fills in the frozen base. Raises UserError for a checkpoint of another model or another base."""
        if "members" in checkpoint:
            what = f"the checkpoint is of several adapters: {'; '.join(checkpoint['members'])}"
            raise UserError("resume", what, "give the settings of that run")
        if not isinstance(checkpoint.get("config"), dict):
            do = "resume from a checkpoint of this version's train.py"
            raise UserError("resume", "the checkpoint does not say its model", do)
        theirs = GPT2Config.from_dict(checkpoint["config"])
        names = [name for name in checkpoint["config"] if "dropout" not in name]
        if differing := theirs.differences(self.model.config, names):
            what = f"the checkpoint is of another model: it has {', '.join(differing)}"
            raise UserError("resume", what, "give the model and LoRA settings of that run")
        ratio, own = checkpoint.get("lora_plus_ratio", 1), self.optimizer_settings.lora_plus_ratio
        if (ratio == 1) != (own == 1):  # B is a group of its own, or not
            what = f"the checkpoint has optimizer.lora_plus_ratio {ratio:g}, here it is {own:g}"
            raise UserError("resume", what, "give the optimizer settings of that run")
        if (base := checkpoint.get("base_sha256", "")) != self.base_sha256:
            hashes = f"{base[:12] or 'none'}, here {self.base_sha256[:12] or 'none'}"
            what = f"the checkpoint belongs to another base (hash {hashes})"
            raise UserError("resume", what, "give the base and the seed of that run")
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}


def shares(trainer: Trainer, batches: Sequence[Batch]) -> list[Any]:
    """What each batch's loss counts by, so that the ranks' mean gradient is that of all rows at once."""
    if trainer.world_size == 1:
        return [1.0] * len(batches)
    own = torch.stack([total_weight(batch.mask) for batch in batches])
    of_all = own.clone()
    torch.distributed.all_reduce(of_all)
    return list(own * trainer.world_size / of_all)
