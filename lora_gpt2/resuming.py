"""Whether an interrupted training ends in the numbers of one that was not: tried out, on any settings."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import time

from lora_gpt2 import launch, runs
from lora_gpt2.errors import UserError
from lora_gpt2.files import locked
from lora_gpt2.settings import LAST_CHECKPOINT
from lora_gpt2.signals import raised

KILLS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL
"""How a run is interrupted, in turn: half of the times so that it has no time for anything."""

_COLUMN = "train/loss"


@dataclass
class Verified:
    """What was tried and what came of it."""

    seconds: float
    """Of the run that nobody interrupted."""
    lasts: float = 0.0
    """Of the last one that came to its end, as long as the next may take."""
    trains_after: float = 0.0
    """How many of these passed before its training began."""
    steps: int = 0
    """Optimizer steps of it."""
    kills: dict[str, int] = field(default_factory=dict)
    """How often each signal was sent."""
    resumed: int = 0
    """How often a run went on from a checkpoint; else it had none yet, and began anew."""
    finished: int = 0
    """Runs that came to their end in spite of it."""
    differences: list[str] = field(default_factory=list)
    """Where they are not what the first one is, to the bit."""
    missing: int = 0
    """Logged steps that are in no file: between a checkpoint and the next step a kill may lose one."""


def verify(overrides: Sequence[str], folder: Path, kills: int, seed: int = 0) -> Verified:
    """Trains once undisturbed, then again and again with `kills` interruptions in all, at random moments.

    `overrides` as for train.py; each run is a process group of its own, killed as a whole, as by a machine
    that restarts. Compares losses of all steps, and the bytes of the weights.
    Raises UserError for a folder that is not empty, and where the undisturbed run fails.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(folder, "is not empty", "give another folder")
    with locked(folder), raised():
        return _verified([*overrides, "trainer.log_every_n_steps=1"], folder, kills, Random(seed))


def _verified(command: Sequence[str], folder: Path, kills: int, random: Random) -> Verified:
    start, whole = time(), folder / "whole"
    with _training(command, whole) as process:
        if code := process.wait():
            raise _failed(whole, code)
    found = Verified(seconds=time() - start)
    _timed(found, whole, start)
    expected = runs.logged(whole, _COLUMN)
    found.steps = len(expected)
    if not expected or not _weights(whole):
        raise UserError(whole, "has no losses or no weights to compare", "leave logger=none out")
    while sum(found.kills.values()) < kills:
        place = folder / f"broken-{found.finished}"
        while _interrupted(command, place, found, random, kills):
            pass
        found.finished += 1
        _compare(whole, place, found)
    return found


@contextmanager
def _training(command: Sequence[str], place: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A run that does not live longer than this is looked at."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "said.txt", "ab") as said:
        process = subprocess.Popen(
            launch.command(command, place), stdout=said, stderr=said, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _interrupted(command: Sequence[str], place: Path, found: Verified, random: Random, kills: int) -> bool:
    """Begins or goes on; returns whether the run was cut short."""
    begun = (place / LAST_CHECKPOINT).is_file()
    found.resumed += begun
    resume = [f"resume={launch.quoted(place)}"] if begun else []
    start, enough = time(), sum(found.kills.values()) >= kills
    with _training([*command, *resume], place) as process:
        try:
            moment = random.uniform(0.9 * found.trains_after, found.lasts)  # seldom before there is anything
            code = process.wait(None if enough else moment)
        except subprocess.TimeoutExpired:
            how = KILLS[sum(found.kills.values()) % len(KILLS)]
            found.kills[how.name] = found.kills.get(how.name, 0) + 1
            if how is signal.SIGKILL:
                os.killpg(process.pid, how)
            else:
                process.send_signal(how)
            process.wait()
            return True
    if code:
        raise _failed(place, code)
    _timed(found, place, start)
    return False


def _timed(found: Verified, place: Path, start: float) -> None:
    """Notes how long it took, or half of the last time: one that goes on from a checkpoint is short."""
    found.lasts = max(time() - start, found.lasts / 2)
    found.trains_after = (place / runs.PROVENANCE_FILE).stat().st_mtime - start


def _failed(place: Path, code: int) -> UserError:
    said = place / "said.txt"
    last = (said.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
    return UserError(said, f"a run ended with exit code {code}: {last}", "read there what it said")


def _compare(whole: Path, place: Path, found: Verified) -> None:
    expected, got = runs.logged(whole, _COLUMN), runs.logged(place, _COLUMN)
    found.missing += len(expected.keys() - got.keys())
    found.differences += [
        f"{place.name}: step {step:g} has the loss {value!r}, not {expected.get(step)!r}"
        for step, value in got.items()
        if value != expected.get(step)
    ]
    for written in _weights(whole):
        name = written.relative_to(whole)
        if not (place / name).is_file() or (place / name).read_bytes() != written.read_bytes():
            found.differences.append(f"{place.name}: {name} has other bytes")


def _weights(folder: Path) -> list[Path]:
    """What training left: one file, or one of each of several adapters."""
    return sorted(folder.rglob("*.safetensors"))
