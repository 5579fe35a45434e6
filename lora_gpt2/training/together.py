"""Several adapters over one base, trained at once: each as if it were alone."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lora_gpt2.data.batches import Batch
from lora_gpt2.errors import UserError
from lora_gpt2.model.keys import is_lora
from lora_gpt2.model.side_by_side import SideBySide
from lora_gpt2.training.module import LanguageModeling, shares
from lora_gpt2.training.optimization import build_optimizer


class AdaptersTogether(LightningModule):
    """Trains the adapters of `members`, which share a base, on a batch of each one's own order.

    ``valid/loss`` and ``train/loss`` are means over the members; each member's stands under its name, with
    a slash before it. The weights of each one's lowest validation loss are kept here.
    """

    def __init__(self, members: Mapping[str, LanguageModeling]) -> None:
        super().__init__()
        self.names = list(members)
        self.members = nn.ModuleList(members.values())
        self.together = SideBySide([member.model for member in self._each()])
        self.lowest: list[float] = [float("inf")] * len(members)
        self.best: list[dict[str, Tensor]] = [{} for _ in members]

    def _each(self) -> list[LanguageModeling]:
        return [cast(LanguageModeling, member) for member in self.members]

    def by_name(self) -> dict[str, LanguageModeling]:
        return dict(zip(self.names, self._each(), strict=True))

    def on_fit_start(self) -> None:
        first = self._each()[0]
        first.on_fit_start()
        self.together.share()

    def on_fit_end(self) -> None:
        first = self._each()[0]
        first.on_fit_end()
        self.together.share()

    def on_train_batch_start(self, batch: Sequence[Batch], batch_idx: int) -> None:
        place = self.current_epoch, batch_idx, self.global_rank
        self.together.seed([member.dropout_seed(*place) for member in self._each()])

    def training_step(self, batch: Sequence[Batch], batch_idx: int) -> Tensor:
        rows = [one.tensors for one in batch]
        smoothing = [member.label_smoothing for member in self._each()]
        total, losses = self.together.loss(rows, smoothing, shares(self.trainer, batch))
        values = dict(zip((f"train/loss/{name}" for name in self.names), losses, strict=True))
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict({"train/loss": losses.mean(), "lr": rate, **values}, batch_size=len(batch[0].rows))
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for member in self._each():
            member.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        found = [member.valid_metrics.compute() for member in self._each()]
        for k, (member, values) in enumerate(zip(self._each(), found, strict=True)):
            member.valid_metrics.reset()
            self.log_dict({f"valid/{key}/{self.names[k]}": value for key, value in values.items()})
            if float(values["loss"]) < self.lowest[k]:
                self.lowest[k] = float(values["loss"])
                self.best[k] = {name: value.detach().clone() for name, value in _adapter(member).items()}
        means = {key: torch.stack([values[key] for values in found]).mean() for key in found[0]}
        self.log_dict({f"valid/{key}": value for key, value in means.items()})

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        trained = [(member.trained(), member.optimizer_settings) for member in self._each()]
        optimizer, schedule = build_optimizer(trained, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Each member by its own norm."""
        for member in self._each() if gradient_clip_val else ():
            parameters = [parameter for _, parameter in member.trained()]
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(parameters, gradient_clip_val)  # type: ignore[arg-type]
            else:
                nn.utils.clip_grad_norm_(parameters, gradient_clip_val)  # type: ignore[arg-type]

    def keep_best(self) -> None:
        """Puts the weights of each member's lowest validation loss back, where one was taken."""
        for member, best in zip(self._each(), self.best, strict=True):
            member.model.load_state_dict(best, strict=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states: list[dict[str, Any]] = [{"state_dict": {}} for _ in self.names]
        for member, state in zip(self._each(), states, strict=True):
            member.on_save_checkpoint(state)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if is_lora(k)}
        checkpoint["members"] = dict(zip(self.names, states, strict=True))
        checkpoint["lowest"], checkpoint["best"] = self.lowest, self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint of other adapters or another base."""
        states = checkpoint.get("members", {})
        if list(states) != self.names:
            theirs = "; ".join(states) or "one adapter alone"
            raise UserError(
                "resume", f"the checkpoint is of other adapters: {theirs}", "give those of that run"
            )
        for name, member in self.by_name().items():
            member.on_load_checkpoint(dict(states.get(name, {})))
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}
        self.lowest, self.best = checkpoint["lowest"], checkpoint["best"]


def _adapter(member: LanguageModeling) -> dict[str, Tensor]:
    return {name: value for name, value in member.model.state_dict().items() if is_lora(name)}
