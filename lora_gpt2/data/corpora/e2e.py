"""The E2E NLG corpus: restaurants, as ``context||completion`` lines or as the published CSV."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from lora_gpt2.data.corpora.splits import by_split, listing
from lora_gpt2.data.jsonl import TextRow
from lora_gpt2.errors import UserError

RENAMED = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
"""Slots whose names the lines write differently from the CSV; their order is the same."""
HEADER = ["mr", "ref"]


def find_splits(root: Path) -> dict[str, Path]:
    """The files of each split: {train,valid,test}.txt, else trainset, devset and testset_w_refs.csv."""
    files = listing(root, (".txt", ".csv"))
    return by_split(path for path in files if path == root or path.name != "testset.csv")  # it has no texts


def read(path: Path) -> Iterator[TextRow]:
    """One row for each reference, in the file's order. Raises UserError at the first bad line.

    The lines are tokenised text (``£ 20 - 25``, ``city centre .``), the CSV is plain and is spaced here in
    the same way: all contexts come out equal, and 99.4 % of the completions. Take the lines where results
    are compared with published ones.
    """
    return _read_csv(path) if path.suffix == ".csv" else _read_lines(path)


def _read_lines(path: Path) -> Iterator[TextRow]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(_utf8(path, file), start=1):
            context, separator, completion = line.strip().partition("||")
            if not separator or not context or not completion.strip() or "||" in completion:
                do = "write one example a line, as in  name : Blue Spice | Type : pub||Blue Spice is a pub ."
                what = f"context||completion was expected, not {line[:60]!r}"
                raise UserError(f"{path}:{number}", what, do)
            yield TextRow(context, completion)


def _read_csv(path: Path) -> Iterator[TextRow]:
    do = "take the published file with the columns mr and ref"
    with open(path, encoding="utf-8-sig", newline="") as file:
        table = csv.reader(_utf8(path, file), strict=True)
        try:
            header = next(table, [])
            if [name.lower() for name in header] != HEADER:
                what = f"the columns mr,ref were expected, not {','.join(header)!r}"
                raise UserError(f"{path}:1", what, do)
            line = table.line_num + 1
            for cells in table:
                if len(cells) != len(HEADER) or not cells[1].strip():
                    what = f"a meaning representation and a reference were expected, not {cells!r:.80}"
                    raise UserError(f"{path}:{line}", what, do)
                yield TextRow(_context(cells[0], f"{path}:{line}"), _spaced(cells[1]))
                line = table.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{table.line_num}", f"is not valid CSV ({error})", do) from None


def _context(meaning: str, where: str) -> str:
    """``name[Blue Spice], priceRange[£20-25]`` to ``name : Blue Spice | price : £ 20 - 25``."""
    if not re.fullmatch(r"\w[\w ]*\[[^\]]*\](, \w[\w ]*\[[^\]]*\])*", meaning):
        do = "write slot[value] pairs joined by a comma and a space"
        raise UserError(where, f"slot[value], slot[value] was expected, not {meaning[:60]!r}", do)
    pairs = re.findall(r"(\w[\w ]*)\[([^\]]*)\]", meaning)
    return " | ".join(f"{RENAMED.get(slot, slot)} : {_spaced(value)}" for slot, value in pairs)


def _spaced(text: str) -> str:
    """``£20-25`` to ``£ 20 - 25``, ``It's here.`` to ``It 's here .``, white space to one space."""
    text = re.sub(r"-(?=£)", "- ", text)  # £20-£25 keeps its dash: £ 20- £ 25
    text = re.sub(r"(?!- £)[^\w\s']|(?<!\w)'(?=\w)|(?<=\w)'(?!\w)", r" \g<0> ", text)
    return " ".join(re.sub(r"(?i)(?<=\w)'(?=(s|t|re|ve|ll|d|m)\b)", " '", text).split())


def _utf8(path: Path, lines: Iterator[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise UserError(path, f"is not UTF-8 text ({error.reason})", "save it as UTF-8") from None
