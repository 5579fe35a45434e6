"""Sets of triples with their texts, and the XML in which WebNLG and DART publish them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from lora_gpt2.errors import UserError
from lora_gpt2.files import read_text


class Triple(NamedTuple):
    subject: str
    property: str
    object: str


class Text(NamedTuple):
    """One verbalisation. `comment` is "good" or not in WebNLG, the source in DART."""

    comment: str
    text: str


class Entry(NamedTuple):
    """Triples (WebNLG's *modified* ones) with every text that says them."""

    category: str
    triples: list[Triple]
    texts: list[Text]


def linearised(triples: Iterable[Triple]) -> str:
    """The context: ``subject : property : object`` joined by `` | ``."""
    return " | ".join(" : ".join(triple) for triple in triples)


def read_xml(path: Path) -> Iterator[Entry]:
    """The entries of one benchmark file, in its order.

    Raises UserError for malformed XML, for one that declares a document type (entities could then
    reach other files or grow without bound), and for an entry that is not as published.
    """
    do = "take the published file"
    text = read_text(path, do)
    declaration = text.find("<!DOCTYPE")
    if declaration >= 0:
        line = text.count("\n", 0, declaration) + 1
        what = "declares a document type, which is not read for safety"
        raise UserError(f"{path}:{line}", what, "remove the declaration and its entities")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}:{error.position[0]}", f"is not valid XML ({error})", do) from None
    entries = root.findall("./entries/entry")
    if not entries:
        raise UserError(path, "holds no benchmark/entries/entry", do)
    for number, entry in enumerate(entries, start=1):
        name = f"{path}: entry {number} (eid {entry.get('eid')})"
        triples = [_triple(name, node.text or "", do) for node in entry.iterfind("modifiedtripleset/mtriple")]
        texts = [Text(node.get("comment", ""), node.text or "") for node in entry.iterfind("lex")]
        if not triples or "category" not in entry.attrib:
            raise UserError(name, "has no category or no modified triples", do)
        yield Entry(entry.attrib["category"], triples, texts)


def _triple(where: str, text: str, do: str) -> Triple:
    parts = text.strip().split(" | ")
    if len(parts) != 3:
        raise UserError(where, f"subject | property | object was expected, not {text!r}", do)
    return Triple(*parts)
