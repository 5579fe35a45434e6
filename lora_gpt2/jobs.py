"""Training runs as jobs: the state that each keeps in its folder, and what a sweep has of them."""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]  # omegaconf's own

from lora_gpt2.errors import UserError
from lora_gpt2.files import first_process, read_json, read_text, write_json
from lora_gpt2.settings import TrainSettings

STATUS_FILE = "status.json"
SWEEP_FILE = "multirun.yaml"
"""What Hydra leaves in a sweep's folder."""

SEARCH_FILE = "search.journal"
"""What Optuna notes in a search's folder."""

_BEAT = 60.0
"""A running job touches its file every so many seconds."""

_STALE = 10 * _BEAT
"""A job that has not for so long is cut off, whatever runs under the number of its process."""


_KINDS: dict[str, Any] = {
    "settings": dict,
    "started": str,
    "seconds": int | float,
    "valid_loss": int | float | None,
    "error": str | None,
    "process": int,
    "host": str,
}
"""What a status.json holds of each."""


class State(str, Enum):
    running = "running"
    finished = "finished"
    failed = "failed"
    pruned = "pruned"
    """A search gave it up: others did better by then."""


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
    seen: float = 0.0
    """When its file was touched last, in seconds since the epoch; not written there."""

    @property
    def key(self) -> str:
        """The hash of its settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def alive(self) -> bool:
        """Whether its process runs, or may run on another machine."""
        if self.state is not State.running or time.time() - self.seen > _STALE:
            return False
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.process, 0)
        except (ProcessLookupError, OverflowError):  # there can be no such number
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

    def check_same(self, settings: dict[str, Any], folder: Path, place: str) -> None:
        """Raises UserError where `settings` are not those of this job, which lies in `folder`.

        `place`: the setting by which another folder is given.
        """
        if differing := self.differences(settings):
            what = f"holds a job of other settings: {', '.join(differing)}"
            raise UserError(folder, what, f"give another {place}")

    def differences(self, settings: dict[str, Any]) -> list[str]:
        """Each setting that is not this job's: its name, the job's value, and the one in `settings`."""
        return [
            f"{name} {self.settings.get(name)} (here {settings.get(name)})"
            for name in sorted(self.settings.keys() | settings.keys())
            if self.settings.get(name) != settings.get(name)
        ]

    def write(self, folder: Path) -> None:
        held = {"key": self.key, **asdict(self)}
        del held["seen"]
        write_json(folder / STATUS_FILE, held)

    @classmethod
    def read(cls, folder: Path) -> "Job | None":
        """None where the folder tells of no job. Raises UserError for a status.json that is none."""
        path = folder / STATUS_FILE
        if not path.is_file():
            return None
        held = read_json(path, "remove it: the job runs again")
        try:
            held.pop("key")
            job = cls(**{**held, "state": State(held["state"])}, seen=path.stat().st_mtime)
            if not all(isinstance(getattr(job, name), kind) for name, kind in _KINDS.items()):
                raise TypeError
            return job
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(path, "does not tell of a job", "remove it: the job runs again") from None


def run(
    settings: TrainSettings, folder: Path, work: Callable[[TrainSettings, Path], float | None], once: bool
) -> float | None:
    """Does `work`, with its state kept in `folder`; returns its validation loss.

    `once`: a finished job is not done again, and one that was cut off goes on from its last checkpoint.
    Raises UserError where the folder belongs to another job or the same one is running.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    decisive = settings.decisive()
    if settings.resume is not None and _run_of(settings.resume).resolve() == folder.resolve():
        decisive["resume"] = None  # it goes on: still the same job
    job = Job(decisive, State.running, started, process=os.getpid(), host=socket.gethostname())
    earlier = _earlier(job, folder) if once else None
    if earlier is not None and earlier.state is State.finished:
        print(f"{folder} is finished already: nothing to do")
        return earlier.valid_loss
    if settings.resume is not None:
        _check_goes_on(settings, settings.resume)
    begun = earlier is not None and (folder / "checkpoints" / "last.ckpt").is_file()
    if begun and settings.resume is None:
        settings = replace(settings, resume=str(folder))
    with _noted(job, folder):
        job.valid_loss = work(settings, folder)
        for name, member in settings.members().items():
            if name and first_process():
                replace(job, settings=member.decisive(), state=State.finished).write(folder / name)
    return job.valid_loss


def check_unclaimed(folder: Path, settings: TrainSettings) -> None:
    """Raises UserError where `folder` holds what a run of other settings has trained: it would be lost."""
    patterns = "checkpoints/*.ckpt", "*.safetensors", "*/*.safetensors"
    job = Job.read(folder) if any(any(folder.glob(pattern)) for pattern in patterns) else None
    if job is not None:
        job.check_same(settings.decisive(), folder, "hydra.run.dir")


def _run_of(resume: str) -> Path:
    """The folder of the run that is resumed by its folder or by a checkpoint in it."""
    path = Path(resume)
    return path if path.is_dir() else path.parent.parent


def _check_goes_on(settings: TrainSettings, resume: str) -> None:
    """Raises UserError for settings that are not those of the run that is resumed, and must be."""
    earlier = Job.read(_run_of(resume))
    differing = earlier.differences(settings.decisive()) if earlier is not None else []
    if fixed := [one for one in differing if one.startswith(_FIXED)]:
        what = f"goes on from a run of other settings: {', '.join(fixed)}"
        raise UserError(f"resume={resume}", what, "leave these as they were, or start anew with base=")


_FIXED = (
    *(f"data.{name} " for name in ("corpus", "objective", "seq_len", "batch_size", "bucket", "pack")),
    *("optimizer.", "model.", "lora.", "label_smoothing ", "seed ", "precision "),
)
"""How `Job.differences` begin that a checkpoint settles: its optimizer, place among the rows, and weights."""


def _earlier(job: Job, folder: Path) -> Job | None:
    """The same job as it was left in `folder`. Raises UserError where it may not be begun there."""
    earlier = Job.read(folder)
    if earlier is None:
        return None
    earlier.check_same(job.settings, folder, "hydra.sweep.dir")
    if earlier.alive and earlier.process != os.getpid() and first_process():
        what = f"is running already (process {earlier.process} on {earlier.host})"
        raise UserError(folder, what, f"wait for it, or remove its {STATUS_FILE}")
    return earlier


@contextmanager
def _noted(job: Job, folder: Path) -> Iterator[None]:
    """Keeps the job's state in `folder`, from its beginning to its end."""
    start, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with suppress(OSError):
                os.utime(folder / STATUS_FILE)

    if first_process():
        job.write(folder)
        threading.Thread(target=beat, daemon=True).start()
    try:
        yield
        job.state = State.finished
    except BaseException as error:
        pruned = type(error).__name__ == "TrialPruned"  # Optuna's, which need not be installed
        job.state, job.error = State.pruned if pruned else State.failed, f"{type(error).__name__}: {error}"
        if not pruned:
            raise
        print(f"given up: {error}")
    finally:
        ended.set()
        job.seconds = round(time.monotonic() - start, 1)
        if first_process() and not _finished_by_another(job, folder):
            job.write(folder)


def _finished_by_another(job: Job, folder: Path) -> bool:
    """Whether a process that `job` had begun came to the end, even if this one was told to stop meanwhile."""
    held = Job.read(folder)
    return held is not None and held.process != job.process and held.state is State.finished


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


def finished(found: Mapping[str, Job]) -> int:
    """How many have come to their end."""
    return sum(job.state is State.finished for job in found.values())


def sweep_of(folder: Path) -> DictConfig:
    """What Hydra noted of a sweep. Raises UserError where the folder is none."""
    path, do = folder / SWEEP_FILE, "give the folder of a sweep: outputs/sweeps/…"
    if (folder / SEARCH_FILE).is_file():
        raise UserError(folder, "is a search, no sweep", "give the same lora-gpt2 sweep search again")
    if not path.is_file():
        raise UserError(path, "there is no such file", do)
    try:
        found = OmegaConf.create(read_text(path, do))
        noted = cast(dict[str, Any], OmegaConf.to_container(found))["hydra"]
        texts = [*noted["overrides"]["hydra"], *noted["overrides"]["task"], noted["runtime"]["cwd"]]
        params = noted["sweeper"]["params"]
        if not all(isinstance(text, str) for text in texts) or not isinstance(params, dict | None):
            raise TypeError
    except (AssertionError, KeyError, RecursionError, TypeError, YAMLError):  # OmegaConf asserts
        raise UserError(path, "does not tell of a sweep", do) from None
    return cast(DictConfig, found)


def planned(folder: Path) -> dict[str, list[str]]:
    """The overrides of each job of a sweep or a search, in their order, by the names of their folders."""
    if not (folder / SWEEP_FILE).is_file():
        return {name: _overrides(folder / name) for name in jobs(folder)}
    return split(sweep_of(folder).hydra)


def split(noted: DictConfig) -> dict[str, list[str]]:
    """The overrides of each job by its number, from what Hydra has of a sweep."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    given = [f"{name}={values}" for name, values in (noted.sweeper.params or {}).items()]
    batches = BasicSweeper.split_arguments(parsed([*given, *noted.overrides.task]), None)
    each = [overrides for batch in batches for overrides in batch]
    return {str(number): overrides for number, overrides in enumerate(each)}


def parsed(overrides: Iterable[str]) -> list[Override]:
    """Raises HydraException for what is no override."""
    return OverridesParser.create().parse_overrides(list(overrides))


def _overrides(place: Path) -> list[str]:
    """What Hydra noted of one job."""
    path = place / ".hydra" / "overrides.yaml"
    return list(map(str, OmegaConf.load(path))) if path.is_file() else []
