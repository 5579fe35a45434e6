"""Files appear whole or not at all: written beside their place, synced to disk, then renamed."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from lora_gpt2.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it is synced and renamed to `path`.

    On any exception the temporary file is removed and `path` is left as it was.
    Raises UserError where no such file can be: a folder is there, its folder would be a file, or the disk is
    full or may not be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(path, "is a folder, a file is to be written there", "give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(path.parent, "is a file, a folder was expected", "give another name") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """So that a new name outlives a machine that stops; where folders can be synced."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def first_process() -> bool:
    """Whether this is the first of a run's processes: torchrun, Lightning and SLURM say it so."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


_UNWRITABLE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit on a file's size",
    errno.EROFS: "give another folder",
    errno.EACCES: "give another folder",
    errno.EPERM: "give another folder",
    errno.EIO: "look at the disk",
}
"""Faults of a disk, not of the program, and what to do."""


def _unwritable(path: Path, error: OSError) -> UserError:
    kept = "; what was there is kept" if path.exists() else ""
    what = f"cannot be written ({error.strerror}){kept}"
    return UserError(path, what, _UNWRITABLE.get(error.errno or 0, "give another folder"))


def disk_fault(error: Exception) -> UserError | None:
    """What is told of a disk that is full or may not be written, whoever met it; None: another fault."""
    if not isinstance(error, OSError) or error.errno not in _UNWRITABLE:
        return None
    return UserError(error.filename or "a file", str(error.strerror), _UNWRITABLE[error.errno])


_TEMPORARY = f".*.{'[0-9a-f]' * 32}.tmp"
"""What `replacing` writes before it has its name."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder to this run until it ends in whatever way; of several processes the first one keeps it.

    Raises UserError where another run has it.
    """
    if not first_process():
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(folder, "another run writes there", "wait for it, or give another folder") from None
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        for left in [*folder.glob(_TEMPORARY), *folder.glob(f"checkpoints/{_TEMPORARY}")]:
            left.unlink(missing_ok=True)  # by a run that was killed
        yield
    finally:
        lock.release()


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: str | Path, do: str) -> str:
    """The file's text. Raises UserError with the advice `do` when it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(path, "there is no such file", do) from None
    except UnicodeDecodeError as error:
        raise UserError(path, f"is not UTF-8 text (byte {error.start})", do) from None


def read_json(path: str | Path, do: str) -> Any:
    """The parsed JSON file. Raises UserError with the advice `do` when it is missing or malformed."""
    try:
        return json.loads(read_text(path, do))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}", f"is not valid JSON ({error.msg})", do) from None


def sha256(path: str | Path, start: int = 0) -> str:
    """Hexadecimal SHA-256 of a file's bytes from `start` on."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
