"""Weights & Biases: one run for each training, grouped by sweep; on disk where W&B cannot be had."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lora_gpt2.errors import UserError
from lora_gpt2.files import read_json, write_json
from lora_gpt2.reporting import screen
from lora_gpt2.weights.store import ADAPTER_FILE

_NOTE = "wandb.json"
"""Where a run's folder keeps the id that W&B knows it by."""

_PATIENCE = 30
"""Seconds in which the service must answer at the start."""


class WandbRun(WandbLogger):
    """A run of its own for each training; one that is resumed goes on in the same run.

    A sweep sets group and name where they are null (WANDB_RUN_GROUP and WANDB_NAME). Where the service does
    not answer or takes no key, the run is logged offline: `wandb sync` uploads it.
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "lora-gpt2",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        tags: list[str] | None = None,
        offline: bool = False,
        upload_adapter: bool = False,
        resume: str | None = None,
    ) -> None:
        """`save_dir` is the run's folder, `resume` that of the run it goes on with, or a checkpoint in it.

        `upload_adapter`: the adapter becomes an artifact of the run at its end.
        """
        self.folder, self.upload_adapter = Path(save_dir), upload_adapter
        known = _known_id(Path(resume)) if resume is not None else None
        name = name or os.environ.get("WANDB_NAME")  # W&B itself reads them once in a process
        group = group or os.environ.get("WANDB_RUN_GROUP")
        options: dict[str, Any] = {"entity": entity, "group": group, "tags": tags}
        options["settings"] = wandb.Settings(init_timeout=_PATIENCE, silent=True)
        super().__init__(name=name, save_dir=save_dir, project=project, id=known, offline=offline, **options)
        self._start()

    @rank_zero_only
    def _start(self) -> None:
        try:
            run = self.experiment
        except Exception as error:  # W&B raises its own, and those of the libraries below it
            _give_up(error)
            self._offline = True
            self._wandb_init["mode"] = "offline"
            run = self.experiment
        write_json(self.folder / _NOTE, {"id": run.id, "project": run.project, "group": run.group})

    def log_predictions(
        self,
        name: str,
        step: int,
        contexts: Sequence[str],
        references: Sequence[Sequence[str]],
        texts: Sequence[str],
    ) -> None:
        """A table of inputs, references and predictions; `name` is that of one of several adapters."""
        rows = [
            [step, context, "\n".join(group), text]
            for context, group, text in zip(contexts, references, texts, strict=True)
        ]
        key = "/".join(filter(None, ["predictions", name]))
        self.log_table(key, columns=["step", "input", "references", "prediction"], data=rows)

    @rank_zero_only
    def close(self, failed: bool) -> None:
        """Ends the run, so that the next job of a sweep begins its own."""
        adapter = self.folder / ADAPTER_FILE
        if self.upload_adapter and not failed and adapter.is_file():
            artifact = wandb.Artifact(f"adapter-{self.experiment.id}", type="adapter")
            artifact.add_file(str(adapter))
            self.experiment.log_artifact(artifact)
        wandb.finish(exit_code=int(failed))


def send_report(page: Path, folders: Iterable[Path], table: Mapping[str, Sequence[Any]]) -> None:
    """One more run in the group of the runs in `folders`: a report's `page`, and its figures by column.

    Offline where the service does not answer. Raises UserError where none of them was logged.
    """
    notes = (read_json(folder / _NOTE, "remove it") for folder in folders if (folder / _NOTE).is_file())
    if (known := next(notes, None)) is None:
        raise UserError("--wandb", "none of these runs was logged there", "train them with logger=wandb")
    options: dict[str, Any] = {"project": known["project"], "group": known["group"], "name": "report"}
    options |= {"job_type": "report", "dir": str(page.parent)}
    settings = wandb.Settings(init_timeout=_PATIENCE, silent=True)
    try:
        run = wandb.init(**options, settings=settings)
    except Exception as error:
        _give_up(error)
        run = wandb.init(**options, settings=settings, mode="offline")
    rows = [list(row) for row in zip(*table.values(), strict=True)]
    points = wandb.Table(columns=list(table), data=rows)
    run.log({"report": wandb.Html(page.read_text(encoding="utf-8")), "points": points})
    run.finish()


def _give_up(error: Exception) -> None:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    screen.note(f"W&B is out of reach ({reason}): logged offline, wandb sync uploads it later")
    wandb.teardown()


def _known_id(place: Path) -> str | None:
    """The id of the run that a folder, or the folder of a checkpoint, belongs to."""
    folders = [place, *place.parents[:2]]
    path = next((folder / _NOTE for folder in folders if (folder / _NOTE).is_file()), None)
    if path is None:
        return None
    held = read_json(path, "remove it: the run is logged as a new one")
    if not isinstance(held, dict) or not isinstance(held.get("id"), str):
        raise UserError(path, "names no run of W&B", "remove it: the run is logged as a new one")
    return str(held["id"])
