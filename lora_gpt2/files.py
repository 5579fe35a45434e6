"""Files appear whole or not at all: written beside their place, synced to disk, then renamed."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
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


@contextmanager
def reading(path: str | Path, do: str) -> Iterator[None]:
    """Raises UserError with the advice `do` when the file is missing, cannot be read or is not UTF-8."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(path, "there is no such file", do) from None
    except UnicodeDecodeError as error:
        raise UserError(path, f"is not UTF-8 text (byte {error.start})", do) from None
    except OSError as error:
        raise UserError(path, f"cannot be read ({error.strerror})", do) from None


def read_text(path: str | Path, do: str) -> str:
    """The file's text. Raises UserError as `reading` does."""
    with reading(path, do):
        return Path(path).read_text(encoding="utf-8")


def read_json(path: str | Path, do: str) -> Any:
    """The parsed JSON file. Raises UserError as `reading` and `parse_json` do."""
    return parse_json(read_text(path, do), path, do)


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, where: str | Path, do: str) -> Any:
    """The value of a JSON text that stands at `where`.

    Raises UserError with the advice `do` for what is not UTF-8 or not JSON, is nested too deep, or holds a
    number too long to be read or half of a character, which JSON can write as in "\\ud83d".
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if "\n" in text.strip() else where
        raise UserError(place, f"is not valid JSON ({error})", do) from None
    except UnicodeDecodeError as error:
        raise UserError(where, f"is not UTF-8 text (byte {error.start})", do) from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise UserError(where, f"holds half of a character (the lone surrogate {half})", do) from None
    except RecursionError:
        raise UserError(where, "is JSON nested too deep to be read", do) from None
    except ValueError:
        raise UserError(where, "is JSON with a number of too many digits to be read", do) from None


def brief(value: Any) -> str:
    """A JSON value in at most 40 characters, however large or deep it is."""
    text = "".join(islice(json.JSONEncoder(ensure_ascii=False).iterencode(value), 41))
    return text if len(text) <= 40 else text[:37] + "..."


def sha256(path: str | Path, start: int = 0) -> str:
    """Hexadecimal SHA-256 of a file's bytes from `start` on."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
