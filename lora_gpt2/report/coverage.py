"""What an input asked for and its text misses, or says besides: slots of E2E, triples of WebNLG and DART.

By words, not by meaning: a value counts as said when all of its words are in the text, each perhaps with
another ending. Enough to find outputs to look at, not to rank systems by.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

FAMILY = "family friendly"
_FAMILY_WORDS = ("famil", "child", "kid")
_FEW = 12
"""Slots with at most so many values, one or two words each, are looked for where they were not asked."""

_NUMBERS = dict(zip(("one", "two", "three", "four", "five"), "12345", strict=True))

Slot = tuple[str, str]


@dataclass
class Coverage:
    """Of one text."""

    asked: list[Slot]
    missed: list[Slot] = field(default_factory=list)
    added: list[Slot] = field(default_factory=list)


def coverage(contexts: Sequence[str], texts: Sequence[str]) -> list[Coverage]:
    """Each text against its input."""
    asked = [slots(context) for context in contexts]
    known = _closed(asked)
    found = []
    for own, text in zip(asked, texts, strict=True):
        words = _words(text)
        missed = [slot for slot in own if not _said(slot, words)]
        all_asked = {word for _, value in own for word in _words(value)}
        added = [
            (name, value)
            for name, values in known.items()
            for value in sorted(values)
            if (name, value) not in own
            and not set(_words(value)) <= all_asked
            and _said((name, value), words)
        ]
        found.append(Coverage(own, missed, added))
    return found


def by_slot(found: Sequence[Coverage]) -> dict[str, tuple[int, int]]:
    """How often each slot was asked for, and how often its text misses it; the most missed first."""
    asked = Counter(name for one in found for name, _ in one.asked)
    missed = Counter(name for one in found for name, _ in one.missed)
    order = sorted(asked, key=lambda name: (-missed[name] / asked[name], name))
    return {name: (asked[name], missed[name]) for name in order}


def slots(context: str) -> list[Slot]:
    """(name, value) of ``name : value | …``; of ``subject : relation : object`` both ends of the relation."""
    found: list[Slot] = []
    for part in context.split("|"):
        fields = [one.strip() for one in part.split(" : ")]
        if len(fields) == 2:
            found.append((fields[0], fields[1]))
        elif len(fields) > 2:
            found += [("subject", fields[0]), (fields[1], " : ".join(fields[2:]))]
    return list(dict.fromkeys(found))


def _said(slot: Slot, words: Sequence[str]) -> bool:
    name, value = slot
    if name.lower() == FAMILY:
        return any(word.startswith(_FAMILY_WORDS) for word in words)
    return all(any(_alike(wanted, word) for word in words) for wanted in _words(value))


def _alike(wanted: str, word: str) -> bool:
    stem = wanted if len(wanted) < 5 else wanted[: max(4, len(wanted) - 2)]
    return word.startswith(stem)


def _words(text: str) -> list[str]:
    words = re.findall(r"\w+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text.replace("_", " ")).lower())
    return [_NUMBERS.get(word, word) for word in words]


def _closed(asked: Sequence[Sequence[Slot]]) -> dict[str, set[str]]:
    """Values that only one slot has, of slots with few short ones."""
    values: dict[str, set[str]] = {}
    owners: Counter[str] = Counter()
    for name, value in dict.fromkeys(slot for own in asked for slot in own):
        values.setdefault(name, set()).add(value)
        owners[value] += 1
    return {
        name: {value for value in held if owners[value] == 1}
        for name, held in values.items()
        if len(held) <= _FEW and name.lower() != FAMILY and all(len(_words(value)) <= 2 for value in held)
    }
