"""Training runs as jobs: the state that each keeps in its folder, and going on where a sweep stopped."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_gpt2 import settings as gate
from lora_gpt2.errors import UserError
from lora_gpt2.files import read_json, write_json
from lora_gpt2.settings import TrainSettings

STATUS_FILE = "status.json"
_SWEEP_FILE = "multirun.yaml"
"""What Hydra leaves in a sweep's folder."""

_WITHOUT_EFFECT = ("logger.", "callbacks.", "data.cache", "point.", "resume", "dry_run")
"""Settings that do not decide what comes out."""


class State(str, Enum):
    running = "running"
    finished = "finished"
    failed = "failed"


@dataclass
class Job:
    """A training run, as its folder tells of it."""

    settings: dict[str, Any]
    """Every setting that decides the result, by its dotted name."""
    state: State
    started: str
    """Date and time, UTC."""
    seconds: float = 0.0
    valid_loss: float | None = None
    error: str | None = None
    process: int = 0
    host: str = ""

    @property
    def key(self) -> str:
        """The hash of its settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def alive(self) -> bool:
        """Whether its process runs, or may run on another machine."""
        if self.state is not State.running:
            return False
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def told(self) -> list[str]:
        """Its state, validation loss, minutes and fault, as a table shows them."""
        cut_off = self.state is State.running and not self.alive
        loss = "" if self.valid_loss is None else f"{self.valid_loss:.4f}"
        minutes = f"{self.seconds / 60:.1f}" if self.seconds else ""
        return ["cut off" if cut_off else self.state.value, loss, minutes, self.error or ""]

    def write(self, folder: Path) -> None:
        write_json(folder / STATUS_FILE, {"key": self.key, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Job | None":
        """None where the folder tells of no job. Raises UserError for a status.json that is none."""
        path = folder / STATUS_FILE
        if not path.is_file():
            return None
        held = read_json(path, "remove it: the job runs again")
        try:
            held.pop("key")
            return cls(**{**held, "state": State(held["state"])})
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(path, "does not tell of a job", "remove it: the job runs again") from None


def launch(cfg: DictConfig) -> float | None:
    """The experiment that Hydra composed, in the folder that Hydra chose."""
    resolved = gate.resolve(cfg, TrainSettings)
    from lora_gpt2 import experiment  # here, so that a wrong setting is reported before torch is loaded

    here = HydraConfig.get()
    with gate.user_errors():
        once = here.mode is RunMode.MULTIRUN
        return run(resolved, Path(here.runtime.output_dir), experiment.train, once)


def run(
    settings: TrainSettings, folder: Path, work: Callable[[TrainSettings, Path], float | None], once: bool
) -> float | None:
    """Does `work`, with its state kept in `folder`; returns its validation loss.

    `once`: a finished job is not done again, and one that was cut off goes on from its last checkpoint.
    Raises UserError where the folder belongs to another job or the same one is running.
    """
    if settings.dry_run:
        return work(settings, folder)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    job = Job(_settings(settings), State.running, started, process=os.getpid(), host=socket.gethostname())
    if once and (earlier := _finished(job, folder)) is not None:
        print(f"{folder} is finished already: nothing to do")
        return earlier.valid_loss
    if once and settings.resume is None and (folder / "checkpoints" / "last.ckpt").is_file():
        settings = replace(settings, resume=str(folder))
    with _noted(job, folder):
        job.valid_loss = work(settings, folder)
    for name, member in settings.members().items():
        if name and _first():
            replace(job, settings=_settings(member)).write(folder / name)
    return job.valid_loss


def _finished(job: Job, folder: Path) -> Job | None:
    """The same job, finished in `folder` before. Raises UserError where it may not be begun there."""
    earlier = Job.read(folder)
    if earlier is not None and earlier.key == job.key and earlier.state is State.finished:
        return earlier
    if earlier is None or not _first():
        return None
    if earlier.key != job.key:
        raise UserError(folder, "holds a job of other settings", "give another hydra.sweep.dir")
    if earlier.alive and earlier.process != os.getpid():
        what = f"is running already (process {earlier.process} on {earlier.host})"
        raise UserError(folder, what, f"wait for it, or remove its {STATUS_FILE}")
    return None


@contextmanager
def _noted(job: Job, folder: Path) -> Iterator[None]:
    """Keeps the job's state in `folder`, from its beginning to its end."""
    start = time.monotonic()
    if _first():
        job.write(folder)
    try:
        yield
        job.state = State.finished
    except BaseException as error:
        job.state, job.error = State.failed, f"{type(error).__name__}: {error}"
        raise
    finally:
        job.seconds = round(time.monotonic() - start, 1)
        if _first():
            job.write(folder)


def jobs(folder: Path) -> dict[str, Job]:
    """The jobs of a sweep or of a run, by the names of their folders; several adapters at once are one."""
    found = {path.parent.name: Job.read(path.parent) for path in folder.glob(f"*/{STATUS_FILE}")}
    if not found or (folder / STATUS_FILE).is_file():
        found = {folder.name: Job.read(folder)}
    named = {name: job for name, job in found.items() if job is not None}
    if not named:
        raise UserError(folder, "holds no jobs of train.py", "give the folder of a run or of a sweep")
    return dict(sorted(named.items(), key=lambda pair: (len(pair[0]), pair[0])))


def adapters(folder: Path) -> dict[Path, Job]:
    """Each finished adapter or model of a sweep or a run, by its folder."""

    def each(place: Path) -> Iterator[Path]:
        below = sorted(place.glob(f"*/{STATUS_FILE}"), key=lambda path: (len(path.parent.name), path))
        if not below:
            yield place
        for path in below:
            yield from each(path.parent)

    found = {place: Job.read(place) for place in each(folder)}
    return {place: job for place, job in found.items() if job is not None and job.state is State.finished}


def sweep_of(folder: Path) -> DictConfig:
    """What Hydra noted of a sweep. Raises UserError where the folder is none."""
    path = folder / _SWEEP_FILE
    if not path.is_file():
        raise UserError(path, "there is no such file", "give the folder of a sweep: outputs/sweeps/…")
    found = OmegaConf.load(path)
    assert isinstance(found, DictConfig)
    return found


def planned(folder: Path) -> list[list[str]]:
    """The overrides of each job of a sweep, in their order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    hydra = sweep_of(folder).hydra
    given = [f"{name}={values}" for name, values in (hydra.sweeper.params or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*given, *hydra.overrides.task])
    return [overrides for batch in BasicSweeper.split_arguments(parsed, None) for overrides in batch]


def _settings(settings: TrainSettings) -> dict[str, Any]:
    flat = dict(_flat(json.loads(json.dumps(asdict(settings)))))
    return {name: value for name, value in flat.items() if not name.startswith(_WITHOUT_EFFECT)}


def _flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _first() -> bool:
    """Whether this is the first of several processes: torchrun, Lightning and SLURM say it so."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
