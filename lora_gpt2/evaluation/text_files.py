"""References and predictions in the E2E scorer's file formats.

References: the texts of a segment on consecutive lines, a blank line after each segment; or the corpus
itself, a CSV or TSV file with the columns ``mr,ref``, grouped by equal `mr` in order of first appearance.
Predictions: one a line, in the same order. An empty line is an empty prediction.
"""

import csv
import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from lora_gpt2.errors import UserError
from lora_gpt2.files import parse_json, read_text, write_text


def read_references(path: str | Path) -> list[list[str]]:
    """One list of references a segment.

    A plain file without any blank line holds one reference a segment, as the official scorer reads it.
    Raises UserError when the file is missing, empty, or a table without the two columns.
    """
    text = read_text(path, "give the file with the reference texts").lstrip("\ufeff")
    table = Path(path).suffix.lower() in (".csv", ".tsv")
    groups = _table_groups(path, text) if table else _line_groups(text)
    if not groups:
        raise UserError(path, "holds no reference", "give one or more lines a segment, then a blank line")
    return groups


def _line_groups(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if all(lines):
        return [[line] for line in lines]
    return [list(group) for filled, group in groupby(lines, key=bool) if filled]


def _table_groups(path: str | Path, text: str) -> list[list[str]]:
    delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = rows.fieldnames or []
    if not {"mr", "ref"} <= set(header):
        raise UserError(path, f"has the columns {', '.join(header)}", "name two of its columns mr and ref")
    groups: dict[str, list[str]] = {}
    for row in rows:
        if not row["ref"]:
            raise UserError(f"{path}:{rows.line_num}", "has no ref", "give every row an mr and a ref")
        groups.setdefault(row["mr"], []).append(row["ref"].strip())
    return list(groups.values())


def read_predictions(path: str | Path) -> list[str]:
    """One text a segment, from lines or, in a ``.jsonl`` file, from each line's "text".

    Raises UserError when the file is missing or a line of JSON has no text.
    """
    text = read_text(path, "give the file with the predicted texts").lstrip("\ufeff")
    lines = text.removesuffix("\n").split("\n") if text else []
    if Path(path).suffix.lower() != ".jsonl":
        return [line.strip() for line in lines]
    return [_json_text(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]


def _json_text(where: str, line: str) -> str:
    row = parse_json(line, where, "write one JSON object a line")
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(where, 'has no "text"', "decode the token ids to text first, with generate.py")
    return str(row["text"])


def read_pairs(references: str | Path, predictions: str | Path) -> tuple[list[list[str]], list[str]]:
    """Both files, as many predictions as segments. Raises UserError, with both counts, when they differ."""
    groups, texts = read_references(references), read_predictions(predictions)
    if len(groups) != len(texts):
        raise UserError(
            predictions,
            f"holds {len(texts)} predictions for the {len(groups)} segments of {references}",
            "give one prediction a segment, in the segments' order, and a blank line after each segment's "
            "references",
        )
    return groups, texts


def write_references(path: str | Path, groups: Sequence[Sequence[str]]) -> None:
    """Raises UserError for a segment without references and for an empty one: a blank line ends a segment."""
    lines = [[_one_line(text) for text in group] for group in groups]
    for number, group in enumerate(lines, start=1):
        if not group or not all(group):
            found = "an empty reference" if group else "no reference"
            raise UserError(path, f"segment {number} has {found}", "give each segment texts with words")
    write_text(path, "".join("\n".join(group) + "\n\n" for group in lines))


def write_predictions(path: str | Path, texts: Sequence[str]) -> None:
    write_text(path, "".join(f"{_one_line(text)}\n" for text in texts))


def _one_line(text: str) -> str:
    return text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ").strip()
