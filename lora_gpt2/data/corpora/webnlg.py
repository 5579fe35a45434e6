"""The WebNLG corpus of 2017: DBpedia triples with texts, as JSON or as folders of XML."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lora_gpt2.data.corpora.splits import by_split, listing
from lora_gpt2.data.corpora.triples import Entry, Text, Triple, linearised, read_xml
from lora_gpt2.data.jsonl import TextRow
from lora_gpt2.errors import UserError
from lora_gpt2.files import read_json

SEEN = {
    "Airport",
    "Astronaut",
    "Building",
    "City",
    "ComicsCharacter",
    "Food",
    "Monument",
    "SportsTeam",
    "University",
    "WrittenWork",
}
"""The categories of the training split; the test split has five others beside them."""
PUBLISHED = "take the published file"


def find_splits(root: Path) -> dict[str, Path]:
    """{train,dev,test}.json, else .xml, else the folders of that name with XML at any depth.

    Both forms give the same rows in the same order; JSON comes first because it is one file a split.
    """
    return by_split(listing(root, (".json", ".xml"), folders=True))


def read(path: Path) -> Iterator[TextRow]:
    """One row for each good lexicalisation; `part` tells seen categories from unseen ones.

    Raises UserError for a file that is not as published.
    """
    for entry in _entries(path):
        context, part = linearised(entry.triples), "seen" if entry.category in SEEN else "unseen"
        for text in entry.texts:
            if text.comment == "good":
                yield TextRow(context, text.text, part)


def _entries(path: Path) -> Iterator[Entry]:
    if path.suffix == ".json":
        yield from _read_json(path)
    elif path.is_dir():
        files = sorted(path.rglob("*.xml"), key=lambda file: file.relative_to(path).parts)
        if not files:
            raise UserError(path, "holds no XML file", "set it to a folder of the published corpus")
        for file in files:
            yield from read_xml(file)
    else:
        yield from read_xml(path)


def _read_json(path: Path) -> Iterator[Entry]:
    value = read_json(path, PUBLISHED)
    if not isinstance(value, dict) or not isinstance(value.get("entries"), list):
        raise UserError(path, 'the key "entries" with a list was expected', PUBLISHED)
    for number, wrapped in enumerate(value["entries"], start=1):
        yield _entry(f"{path}: entry {number}", wrapped)


def _entry(where: str, wrapped: Any) -> Entry:
    """An entry stands alone in an object whose key is its number."""
    try:
        (entry,) = wrapped.values()
        triples = [Triple(t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"]]
        texts = [Text(lex["comment"], lex["lex"]) for lex in entry["lexicalisations"]]
        found = Entry(entry["category"], triples, texts)
        strings = [found.category, *chain.from_iterable([*triples, *texts])]
    except KeyError as error:
        raise UserError(where, f"the key {error} is missing", PUBLISHED) from None
    except (AttributeError, TypeError, ValueError):
        raise UserError(where, "an object around one entry was expected", PUBLISHED) from None
    if not triples or not all(isinstance(string, str) for string in strings):
        raise UserError(where, "at least one triple, and text in every place, was expected", PUBLISHED)
    return found
