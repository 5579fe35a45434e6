"""All rows of a split in three arrays, kept in a file as they lie in memory: ten million start at once."""

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_gpt2.data.jsonl import Row, checked, read_rows
from lora_gpt2.files import replacing, sha256

_FORMAT = 1

_FLUSH = 2**20
"""So many tokens are held back before they are written."""


class RowTable(NamedTuple):
    """All in int32; a row's context and completion stand in one piece."""

    tokens: Tensor
    """(tokens of all rows,)"""
    lengths: Tensor
    """(rows,) tokens of each."""
    contexts: Tensor
    """(rows,) how many of them are context."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "RowTable":
        tokens, lengths, contexts = array("i"), array("i"), array("i")
        for row in rows:
            _add(row, tokens, lengths, contexts)
        return cls(*(torch.from_numpy(np.array(one, dtype=np.int32)) for one in (tokens, lengths, contexts)))


def _add(row: Row, tokens: "array[int]", lengths: "array[int]", contexts: "array[int]") -> None:
    tokens.extend(row.context)
    tokens.extend(row.completion)
    lengths.append(len(row.context) + len(row.completion))
    contexts.append(len(row.context))


def read_table(path: Path, vocab_size: int, cache: Path, expected: str | None = None) -> RowTable:
    """The rows of a BPE JSONL file, memory-mapped from `cache`, where they are put at the first time.

    `expected`: the file's SHA-256, where it is known. Raises UserError as `read_rows` and `checked` do.
    """
    key = hashlib.sha256(f"{_FORMAT} {vocab_size} {checked(path, expected)}".encode()).hexdigest()[:16]
    place = cache / f"{path.stem}-{key}.rows"
    if place.is_file() and (table := _opened(place)) is not None:
        return table
    _write(place, read_rows(path, vocab_size))
    table = _opened(place)
    assert table is not None, "what was written a moment ago is whole"
    return table


def _write(place: Path, rows: Iterable[Row]) -> None:
    """As a safetensors file: its sizes stand before its values, so these go to a file of their own first."""
    digest, held, count = hashlib.sha256(), array("i"), 0
    lengths, contexts = array("i"), array("i")
    with replacing(place) as temporary, TemporaryFile(dir=place.parent) as body:
        for row in rows:
            _add(row, held, lengths, contexts)
            if len(held) > _FLUSH:
                count += len(held)
                digest.update(held)
                body.write(held)
                del held[:]
        count += len(held)
        for part in (held, lengths, contexts):
            digest.update(part)
            body.write(part)
        header: dict[str, object] = {"__metadata__": {"sha256": digest.hexdigest()}}
        start = 0
        sizes = {"tokens": count, "lengths": len(lengths), "contexts": len(contexts)}
        for name, size in sizes.items():
            header[name] = {"dtype": "I32", "shape": [size], "data_offsets": [start, start + 4 * size]}
            start += 4 * size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        body.seek(0)
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(body, file, 2**20)


def _opened(place: Path) -> RowTable | None:
    """None for a file that is not whole: it is written anew."""
    try:
        with safe_open(place, framework="pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            table = RowTable(*(file.get_tensor(name) for name in RowTable._fields))
    except (SafetensorError, OSError):
        return None
    with open(place, "rb") as header:
        values = 8 + int.from_bytes(header.read(8), "little")
    return table if sha256(place, values) == expected else None
