"""Training runs as jobs: the state that each keeps in its folder, and what may be done there."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from lora_gpt2.errors import UserError, differences
from lora_gpt2.files import first_process, read_json, write_json
from lora_gpt2.settings import LAST_CHECKPOINT, TrainSettings
from lora_gpt2.signals import Stopped

STATUS_FILE = "status.json"

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
        stops = Stopped.__name__, KeyboardInterrupt.__name__
        stopped = self.state is State.failed and (self.error or "").startswith(stops)
        cut_off = stopped or (self.state is State.running and not self.alive)
        loss = "" if self.valid_loss is None else f"{self.valid_loss:.4f}"
        minutes = f"{self.seconds / 60:.1f}" if self.seconds else ""
        return ["cut off" if cut_off else self.state.value, loss, minutes, self.error or ""]

    def check_same(self, settings: dict[str, Any], folder: Path, place: str) -> None:
        """Raises UserError where `settings` are not those of this job, which lies in `folder`.

        `place`: the setting by which another folder is given.
        """
        if differing := differences(self.settings, settings, sorted(self.settings.keys() | settings.keys())):
            what = f"holds a job of other settings: {', '.join(differing)}"
            raise UserError(folder, what, f"give another {place}")

    def write(self, folder: Path) -> None:
        held = asdict(self)
        del held["seen"]
        write_json(folder / STATUS_FILE, held)

    @classmethod
    def read(cls, folder: Path) -> "Job | None":
        """None where the folder tells of no job. Raises UserError for a status.json that is none."""
        path = folder / STATUS_FILE
        if not path.is_file():
            return None
        do = f"remove it: a sweep's job goes on by itself then, a run with resume={folder}"
        held = read_json(path, do)
        try:
            held.pop("key", None)  # earlier versions' hash of the settings
            job = cls(**{**held, "state": State(held["state"])}, seen=path.stat().st_mtime)
            if not all(isinstance(getattr(job, name), kind) for name, kind in _KINDS.items()):
                raise TypeError
            return job
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(path, "does not tell of a job", do) from None


def run(
    settings: TrainSettings, folder: Path, work: Callable[[TrainSettings, Path], float | None], once: bool
) -> float | None:
    """Does `work`, with its state kept in `folder`; returns its validation loss.

    `once`: a finished job is not done again, and one that was cut off goes on from its last checkpoint.
    Raises UserError where the folder belongs to another job or the same one is running.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    decisive = settings.decisive()
    if _resumes(settings, folder):  # still the same job
        begun = Job.read(folder)
        decisive["resume"] = None if begun is None else begun.settings.get("resume")
    job = Job(decisive, State.running, started, process=os.getpid(), host=socket.gethostname())
    earlier = _earlier(job, folder) if once else None
    if earlier is not None and earlier.state is State.finished:
        print(f"{folder} is finished already: nothing to do")
        return earlier.valid_loss
    if once or _restarted():
        settings = _from_own_checkpoint(settings, folder)
    if once:
        _check_checkpoint(settings)
    with _noted(job, folder):
        job.valid_loss = work(settings, folder)
        for name, member in settings.members().items():
            if name and first_process():
                own = {**member.decisive(), "resume": job.settings["resume"]}
                replace(job, settings=own, state=State.finished).write(folder / name)
    return job.valid_loss


def check_unclaimed(folder: Path, settings: TrainSettings) -> None:
    """Raises UserError where a single run in `folder` would lose what is there, or cannot go on.

    Lost would be what a run of other settings has trained, and where one of the same was interrupted.
    """
    job = Job.read(folder) if _trained(folder) else None
    resumes = _resumes(settings, folder)
    if job is not None and not resumes:
        job.check_same(settings.decisive(), folder, "hydra.run.dir")
    begins = not (resumes or _restarted()) and first_process()  # the others come when it is running
    ended = job is not None and job.state is State.finished
    if begins and not ended and (folder / LAST_CHECKPOINT).is_file():
        what = "holds the checkpoint of a run" + (" that has not come to its end" if job else "")
        raise UserError(folder, what, f"go on with resume={folder}, or give another hydra.run.dir")
    _check_checkpoint(_from_own_checkpoint(settings, folder) if _restarted() else settings)


def _from_own_checkpoint(settings: TrainSettings, folder: Path) -> TrainSettings:
    """As the run in `folder` goes on, wherever it began, if it has a checkpoint.

    One that goes back to an earlier checkpoint of its own leaves the last behind, but none that came since.
    """
    last = folder / LAST_CHECKPOINT
    if not last.is_file():
        return settings
    if _resumes(settings, folder):
        from lora_gpt2 import runs  # so late that a wrong setting is reported before torch is loaded

        if runs.begun_at(last) != Path(str(settings.resume)).resolve():
            return settings
    return replace(settings, resume=str(folder))


def _check_checkpoint(settings: TrainSettings) -> None:
    """Raises UserError where the run cannot go on from the checkpoint that it asks for."""
    if settings.resume is not None:
        from lora_gpt2 import runs  # so late that a wrong setting is reported before torch is loaded

        runs.checkpoint_file(settings)


def _resumes(settings: TrainSettings, folder: Path) -> bool:
    """Whether the run that goes on, by its folder or by a checkpoint in it, is that of `folder`."""
    if settings.resume is None:
        return False
    path = Path(settings.resume).resolve()
    return folder.resolve() == (path if path.is_dir() else path.parent.parent)


def _restarted() -> bool:
    """Whether a scheduler has started this very command again, to go on."""
    counts = (os.environ.get(f"{name}_RESTART_COUNT", "0") for name in ("SLURM", "TORCHELASTIC"))
    return any(count != "0" for count in counts)


def _trained(folder: Path) -> dict[Path, int]:
    """What training has left in `folder`, with the time at which it did."""
    patterns = "checkpoints/*.ckpt", "*.safetensors", "*/*.safetensors"
    return {path: path.stat().st_mtime_ns for pattern in patterns for path in folder.glob(pattern)}


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
    before, trained = Job.read(folder), _trained(folder)

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
        if first_process():
            held = before if trained and _trained(folder) == trained else None
            _in_the_end(job, held, Job.read(folder)).write(folder)


def _in_the_end(job: Job, held: Job | None, now: Job | None) -> Job:
    """What the folder is to tell of `job`: it tells `now`, and what it holds is still that of `held`.

    A process that the job had begun may have finished it, even if this one was told to stop meanwhile. If it
    failed with nothing trained, what was finished is, and what was interrupted goes on with its own settings.
    """
    if now is not None and now.process != job.process and now.state is State.finished:
        return replace(now, settings=job.settings)
    if job.state is not State.failed or held is None:
        return job
    return held if held.state is State.finished else replace(job, settings=held.settings)


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
