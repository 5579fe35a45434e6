"""The DART corpus: triples of many sources with texts, as JSON or as XML."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_gpt2.data.corpora.splits import by_split, listing
from lora_gpt2.data.corpora.triples import Triple, linearised, read_xml
from lora_gpt2.data.jsonl import TextRow
from lora_gpt2.errors import UserError
from lora_gpt2.files import read_json

PUBLISHED = "take the published file"


def find_splits(root: Path) -> dict[str, Path]:
    """The first file of each split by its name (dart-v1.1.1-full-dev.json), JSON before XML."""
    return by_split(listing(root, (".json", ".xml")))


def read(path: Path) -> Iterator[TextRow]:
    """One row for each annotation, the relations in lower case.

    Raises UserError for a file that is not as published.
    """
    for triples, texts in _read_xml(path) if path.suffix == ".xml" else _read_json(path):
        context = linearised(triple._replace(property=triple.property.lower()) for triple in triples)
        for text in texts:
            yield TextRow(context, text)


def _read_xml(path: Path) -> Iterator[tuple[list[Triple], list[str]]]:
    for entry in read_xml(path):
        yield entry.triples, [text.text for text in entry.texts]


def _read_json(path: Path) -> Iterator[tuple[list[Triple], list[str]]]:
    value = read_json(path, PUBLISHED)
    if not isinstance(value, list):
        raise UserError(path, "a list of triplesets was expected", PUBLISHED)
    for number, entry in enumerate(value, start=1):
        yield _entry(f"{path}: entry {number}", entry)


def _entry(where: str, entry: Any) -> tuple[list[Triple], list[str]]:
    try:
        triples = [Triple(*triple) for triple in entry["tripleset"]]
        texts = [annotation["text"] for annotation in entry["annotations"]]
    except KeyError as error:
        raise UserError(where, f"the key {error} is missing", PUBLISHED) from None
    except TypeError:
        raise UserError(where, "triples of three texts and annotations were expected", PUBLISHED) from None
    strings = [*(string for triple in triples for string in triple), *texts]
    if not triples or not all(isinstance(string, str) for string in strings):
        raise UserError(where, "at least one triple, and text in every place, was expected", PUBLISHED)
    return triples, texts
