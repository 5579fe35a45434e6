"""Which split a file or folder belongs to, told from its name."""

import re
from collections.abc import Iterable
from pathlib import Path

from lora_gpt2.errors import UserError

SPLITS = ("train", "valid", "test")
WORDS = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "dev": "valid",
    "devel": "valid",
    "test": "test",
}


def split_of(path: Path) -> str | None:
    """train, valid or test from names such as dev, trainset or dart-v1.1.1-full-test; None if no split."""
    for word in re.findall("[a-z]+", path.stem.lower()):
        for ending in ("set", "data"):
            word = word.removesuffix(ending)
        if word in WORDS:
            return WORDS[word]
    return None


def by_split(paths: Iterable[Path]) -> dict[str, Path]:
    """The first path of each split, in the order train, valid, test; the others are passed over."""
    found: dict[str, Path] = {}
    for path in paths:
        split = split_of(path)
        if split is not None:
            found.setdefault(split, path)
    return {split: found[split] for split in SPLITS if split in found}


def listing(root: Path, suffixes: tuple[str, ...], folders: bool = False) -> list[Path]:
    """The entries of `root` with one of the suffixes, by suffix in this order and then by name.

    With `folders`, its folders come last. A file as `root` stands for itself. Raises UserError when
    there is no `root`.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(root, "there is no such file or folder", "set it to the place of the corpus")
    entries = sorted(root.iterdir())
    files = [path for suffix in suffixes for path in entries if path.suffix == suffix and path.is_file()]
    return files + [path for path in entries if folders and path.is_dir()]
