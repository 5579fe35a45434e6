"""The two line formats between the stages: rows of token ids for the model, rows of text for the reader."""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_gpt2.errors import UserError
from lora_gpt2.files import brief, parse_json, reading, replacing, sha256

ENCODE_AGAIN = "write the file again with lora-gpt2 encode"
DELETE_FOLDER = "delete its folder and run again; a data.root is written again with lora-gpt2 encode"
LONGEST_LINE = 2**24
"""The most bytes of a row: thousands of times what a model has positions for."""


class Row(NamedTuple):
    """Token ids of one example; both lists end with the tokenizer's end token."""

    context: list[int]
    completion: list[int]
    adapter: str = ""
    """Which adapter decodes it, where several are loaded."""
    require: tuple[list[int], ...] = ()
    """Phrases that its output must contain."""


class TextRow(NamedTuple):
    """One example as text."""

    context: str
    completion: str
    part: str = ""
    """seen or unseen, where a corpus tells these apart."""
    adapter: str = ""
    """As in `Row`."""
    require: tuple[str, ...] = ()
    """As in `Row`."""


def read_rows(path: str | Path, vocab_size: int | None = None) -> Iterator[Row]:
    """The rows of a BPE JSONL file, ``{"context": [ids], "completion": [ids]}`` a line.

    Raises UserError at the first line that is not such a row or longer than `LONGEST_LINE`, and for an id
    that is negative or, with `vocab_size`, not below it.
    """
    for where, value in objects(path, ENCODE_AGAIN):
        adapter = _text(where, value, "adapter", ENCODE_AGAIN) if "adapter" in value else ""
        context, completion = (_ids(where, value, key, vocab_size) for key in ("context", "completion"))
        require = tuple(
            _ids(where, {"require": phrase}, "require", vocab_size)
            for phrase in _list(where, value, "require", ENCODE_AGAIN)
        )
        yield Row(context, completion, adapter, require)


def write_rows(path: str | Path, rows: Iterable[Row]) -> int:
    """Writes BPE JSONL, whole or not at all; returns the number of rows."""

    def value(row: Row) -> dict[str, Any]:
        pair = {"context": row.context, "completion": row.completion}
        others = {"adapter": row.adapter, "require": row.require}
        return {**pair, **{key: value for key, value in others.items() if value}}

    return _write(path, map(value, rows))


def read_text_rows(path: str | Path) -> Iterator[TextRow]:
    """The rows of a text JSONL file: ``{"context": str, "completion": str}``, perhaps with a part,
    an adapter, and texts to require.

    Raises UserError at the first line that is not such a row.
    """
    do = 'each line needs the texts "context" and "completion"'
    for where, value in objects(path, do):
        others = {key: _text(where, value, key, do) for key in ("part", "adapter") if key in value}
        require = tuple(
            _text(where, {"require": phrase}, "require", do) for phrase in _list(where, value, "require", do)
        )
        context, completion = (_text(where, value, key, do) for key in ("context", "completion"))
        yield TextRow(context, completion, require=require, **others)


def write_text_rows(path: str | Path, rows: Iterable[TextRow]) -> int:
    """Writes text JSONL, whole or not at all; returns the number of rows."""

    def value(row: TextRow) -> dict[str, Any]:
        return {key: text for key, text in row._asdict().items() if text or key in ("context", "completion")}

    return _write(path, map(value, rows))


def checked(path: Path, expected: str | None) -> str:
    """SHA-256 of an encoded file. Raises UserError unless it is the `expected` one, where that is known."""
    with reading(path, "check the path, or " + ENCODE_AGAIN):
        found = sha256(path)
    if expected not in (None, found):
        raise UserError(path, "is damaged: it is not what was encoded", DELETE_FOLDER)
    return found


def objects(path: str | Path, do: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place, ``file:line``, and JSON object. Raises UserError for a line that is none."""
    number = 0
    with reading(path, "check the path, or " + ENCODE_AGAIN), open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), start=1):
            where = f"{path}:{number}"
            if len(line) > LONGEST_LINE:
                raise UserError(where, f"is longer than {LONGEST_LINE:,} bytes, no row is", do)
            value = parse_json(line, where, do)
            if not isinstance(value, dict):
                raise UserError(where, f"a JSON object was expected, not {brief(value)}", do)
            yield where, value
    if number == 0:
        raise UserError(path, "is empty, at least one row was expected", do)


def _field(where: str, value: dict[str, Any], key: str, do: str) -> Any:
    if key not in value:
        found = ", ".join(map(repr, value)) or "none"
        raise UserError(where, f'the key "{key}" is missing (keys found: {found})', do)
    return value[key]


def _text(where: str, value: dict[str, Any], key: str, do: str) -> str:
    text = _field(where, value, key, do)
    if not isinstance(text, str):
        raise UserError(where, f'"{key}" must be text, not {brief(text)}', do)
    return text


def _list(where: str, value: dict[str, Any], key: str, do: str) -> list[Any]:
    found = value.get(key, [])
    if not isinstance(found, list):
        raise UserError(where, f'"{key}" must be a list of phrases, not {brief(found)}', do)
    return found


def _ids(where: str, value: dict[str, Any], key: str, vocab_size: int | None) -> list[int]:
    ids = _field(where, value, key, ENCODE_AGAIN)
    if not isinstance(ids, list):
        raise UserError(where, f'"{key}" must be a list of token ids, not {brief(ids)}', ENCODE_AGAIN)
    if not ids:
        raise UserError(where, f'"{key}" is empty; every row needs at least the end token', ENCODE_AGAIN)
    if set(map(type, ids)) != {int}:  # exact: a bool is an int to isinstance
        wrong = next(item for item in ids if type(item) is not int)
        raise UserError(where, f'"{key}" must hold token ids only, not {brief(wrong)}', ENCODE_AGAIN)
    if min(ids) < 0:
        raise UserError(where, f'"{key}" holds the token id {min(ids)}, ids start at 0', ENCODE_AGAIN)
    if vocab_size is not None and max(ids) >= vocab_size:
        what = f'"{key}" holds the token id {max(ids)}, the vocabulary has {vocab_size} entries'
        raise UserError(where, what, "use the tokenizer and the model that the file was encoded for")
    return ids


def _write(path: str | Path, values: Iterable[dict[str, Any]]) -> int:
    count = 0
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
            count += 1
    return count
