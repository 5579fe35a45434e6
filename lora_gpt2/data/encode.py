"""From a raw corpus to a folder of BPE JSONL, with what is known of it in meta.json."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_gpt2.data.corpora import dart, demo, e2e, webnlg
from lora_gpt2.data.corpora.splits import SPLITS, by_split, listing
from lora_gpt2.data.jsonl import (
    ENCODE_AGAIN,
    Row,
    TextRow,
    objects,
    read_rows,
    read_text_rows,
    write_rows,
    write_text_rows,
)
from lora_gpt2.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lora_gpt2.errors import UserError
from lora_gpt2.files import read_json, sha256, write_json

FORMAT = 2
CORPUS_TOKENIZER = "corpus:"
META = "meta.json"
_NUMBERS = "rows", "contexts", "context_tokens", "completion_tokens", "longest"
"""What it holds of each split: see `_figures`."""


class Input(NamedTuple):
    """One split before it is encoded: its name to show, the hash of its bytes, a reader of its rows."""

    name: str
    sha256: str
    read: Callable[[], Iterator[TextRow]]
    ids: Path | None = None
    """The file, when it already holds token ids."""


def encode_corpus(
    corpus: str, input: Path | None, tokenizer: str, output: Path, split: str | None = None
) -> dict[str, Any]:
    """Encodes every split found at `input` into the folder `output`; returns what meta.json says.

    `corpus` is e2e, webnlg, dart, jsonl (rows of text or of ids), demo or demo_base (these two need no
    input). `tokenizer` is what `load_tokenizer` takes, or corpus:SIZE to train one on the train split.
    `input` may be one file, whose `split` is told from its name unless given. Raises UserError.
    """
    inputs = _inputs(corpus, input, split)
    return _encode(corpus, inputs, _tokenizer(tokenizer, corpus, inputs), output)


def encoded(corpus: str, root: Path | None, tokenizer: str, cache: Path) -> Path:
    """The folder of the encoded corpus, from `cache` when these very inputs were encoded before.

    A `root` that `encode_corpus` wrote is itself the answer. Any number of processes may ask at once: each
    encodes beside the place and renames, and the first one wins.
    """
    if root is not None and (root / META).is_file():
        found = read_meta(root)["corpus"]
        if corpus not in ("jsonl", found):
            what = f"these rows are of the corpus {found}, not {corpus}"
            raise UserError(root / META, what, "use data=jsonl or the folder of the other corpus")
        return root
    if root is not None and (root / "tokenizer").is_dir() and is_encoded(root):
        _check_own_tokenizer(root, tokenizer)
    inputs = _inputs(corpus, root, None)
    made = _tokenizer(tokenizer, corpus, inputs)
    key = hashlib.sha256(
        json.dumps([FORMAT, corpus, made.sha256, [(name, inputs[name].sha256) for name in inputs]]).encode()
    ).hexdigest()[:16]
    folder = cache / f"{corpus}-{key}"
    if (folder / META).is_file():
        return folder
    temporary = cache / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    try:
        _encode(corpus, inputs, made, temporary)
        _publish(temporary, folder)
    except PermissionError as error:
        what = f"cannot be written ({error.strerror})"
        raise UserError(cache, what, "set data.cache to another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_own_tokenizer(root: Path, tokenizer: str) -> None:
    """Raises UserError unless `tokenizer` is the one beside the ids in `root`."""
    if Path(tokenizer).expanduser().resolve() != (own := root / "tokenizer").resolve():
        what = f"holds encoded rows and their tokenizer, and no {META} that says whether they are whole"
        raise UserError(root, what, f"encode the corpus again, or set data.tokenizer={own}")


def is_encoded(root: Path) -> bool:
    """Whether the folder holds encoded rows: a meta.json, or *.jsonl files with token ids."""
    return (root / META).is_file() or any(_holds_ids(path) for path in _rows_files(root))


def _inputs(corpus: str, root: Path | None, split: str | None) -> dict[str, Input]:
    if corpus in demo.DOMAINS:
        if root is not None:
            raise UserError(root, f"{corpus} is built in and reads no files", "leave the input out")
        return {name: _demo(corpus, name) for name in SPLITS}
    if root is None:
        raise UserError(f"corpus {corpus}", "needs an input", "give the folder or the file of the raw corpus")
    if split is not None and split not in SPLITS:
        raise UserError(f"split {split!r}", "is none of train, valid, test", "give one of these")
    if split is not None and not root.is_file():
        raise UserError(root, f"is no file, and only a file can be the {split} split", "leave the split out")
    paths, read = _corpus(corpus, root)
    paths = {split: root} if split is not None else paths
    if not paths:
        what = "no train, valid (dev) or test split is found by name"
        raise UserError(root, what, f"check the folder of {corpus}, or give one file with its split")
    return {name: _input(corpus, path, read) for name, path in paths.items()}


def _corpus(corpus: str, root: Path) -> tuple[dict[str, Path], Callable[[Path], Iterator[TextRow]]]:
    match corpus:
        case "e2e":
            return e2e.find_splits(root), e2e.read
        case "webnlg":
            return webnlg.find_splits(root), webnlg.read
        case "dart":
            return dart.find_splits(root), dart.read
        case "jsonl":
            return by_split(_rows_files(root)), read_text_rows
    raise UserError(f"corpus {corpus!r}", "is not known", "use e2e, webnlg, dart, jsonl, demo or demo_base")


def _input(corpus: str, path: Path, read: Callable[[Path], Iterator[TextRow]]) -> Input:
    ids = path if corpus == "jsonl" and _holds_ids(path) else None
    return Input(path.name, _digest(path), lambda: read(path), ids)


def _demo(domain: str, split: str) -> Input:
    rows = demo.rows(domain, split)
    return Input("built in", hashlib.sha256(json.dumps(rows).encode()).hexdigest(), lambda: iter(rows))


def _rows_files(root: Path) -> list[Path]:
    return [path for path in listing(root, (".jsonl",)) if not path.name.endswith(".text.jsonl")]


def _holds_ids(path: Path) -> bool:
    """Whether the first row is of ids; a file that is no row at all is left to its reader to refuse."""
    try:
        _, row = next(objects(path, ENCODE_AGAIN))
    except UserError:
        return False
    return isinstance(row.get("context"), list)


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's XML files with their names."""
    if path.is_file():
        return sha256(path)
    files = sorted(path.rglob("*.xml"))
    listed = [(file.relative_to(path).as_posix(), sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _tokenizer(spec: str, corpus: str, inputs: dict[str, Input]) -> Tokenizer:
    if not spec.startswith(CORPUS_TOKENIZER):
        return load_tokenizer(spec)
    size = spec.removeprefix(CORPUS_TOKENIZER)
    if not size.isdecimal():
        what = "corpus:SIZE was expected, SIZE a number of entries"
        raise UserError(f"tokenizer {spec!r}", what, "write for instance corpus:2048")
    if corpus in demo.DOMAINS:  # the base domain's, in both, so that an adapter fits its base
        rows = demo.rows("demo_base", "train")
    elif "train" not in inputs or inputs["train"].ids:
        raise UserError(f"tokenizer {spec!r}", "there is no train split of text to train it on", "use gpt2")
    else:
        rows = list(inputs["train"].read())
    texts = (text for row in rows for text in (row.context, _said(row)))
    return train_tokenizer(texts, int(size))


def _encode(corpus: str, inputs: dict[str, Input], tokenizer: Tokenizer, output: Path) -> dict[str, Any]:
    (output / META).unlink(missing_ok=True)  # until it is written again, the folder is not complete
    tokenizer.save(output / "tokenizer")
    meta: dict[str, Any] = {
        "format": FORMAT,
        "corpus": corpus,
        "tokenizer": {
            "source": tokenizer.source,
            "vocab_size": tokenizer.vocab_size,
            "end_token": tokenizer.end_token,
            "sha256": tokenizer.sha256,
        },
        "splits": {},
        "files": {},
    }
    for split, source in inputs.items():
        if source.ids is not None:
            rows = list(read_rows(source.ids, tokenizer.vocab_size))
            texts = [
                TextRow(
                    tokenizer.clean(row.context),
                    tokenizer.clean(row.completion),
                    adapter=row.adapter,
                    require=tuple(tokenizer.clean(phrase) for phrase in row.require),
                )
                for row in rows
            ]
        else:
            texts = list(source.read())
            rows = encode_rows(texts, tokenizer)
        if not rows:
            raise UserError(source.name, "holds no example", "take a complete file")
        files = output / f"{split}.jsonl", output / f"{split}.text.jsonl"
        write_rows(files[0], rows)
        write_text_rows(files[1], texts)
        meta["files"].update({file.name: sha256(file) for file in files})
        meta["splits"][split] = {**_figures(rows), "input": source.name, "sha256": source.sha256}
    write_json(output / META, meta)
    return meta


def encode_rows(texts: Sequence[TextRow], tokenizer: Tokenizer) -> list[Row]:
    """BPE(context) + [end] and BPE(" " + completion without trailing white space) + [end] of each row."""
    distinct = list(dict.fromkeys(row.context for row in texts))
    end = [tokenizer.end_token]
    contexts = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    completions = tokenizer.encode_batch([_said(row) for row in texts])
    return [
        Row(
            contexts[row.context] + end,
            completion + end,
            row.adapter,
            tuple(tokenizer.encode(f" {phrase.strip()}") for phrase in row.require),
        )
        for row, completion in zip(texts, completions, strict=True)
    ]


def _said(row: TextRow) -> str:
    """The completion as it follows its context: a space before it, no white space after it."""
    return f" {row.completion.rstrip()}"


def _figures(rows: list[Row]) -> dict[str, Any]:
    """Numbers of rows and of distinct contexts; tokens, end tokens included: two means and a maximum."""
    return {
        "rows": len(rows),
        "contexts": len({tuple(row.context) for row in rows}),
        "context_tokens": round(sum(len(row.context) for row in rows) / len(rows), 2),
        "completion_tokens": round(sum(len(row.completion) for row in rows) / len(rows), 2),
        "longest": max(len(row.context) + len(row.completion) for row in rows),
    }


def _publish(temporary: Path, folder: Path) -> None:
    """Renames the finished folder to its place, unless another process was faster."""
    if folder.is_dir() and not (folder / META).is_file():
        shutil.rmtree(folder)  # left by hand or by a broken disk: not one of ours, which come whole
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / META).is_file():
            raise


def read_meta(folder: Path) -> dict[str, Any]:
    """What is known of the encoded rows in `folder`. Raises UserError where its meta.json does not tell."""
    path, do = folder / META, "encode the corpus again"
    meta = read_json(path, do)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(path, f"the format {FORMAT} was expected", do)
    told: dict[str, Any] = {"files": {}, **meta}  # an earlier version noted no sums
    try:
        texts = [told["corpus"], told["tokenizer"]["sha256"], *told["files"].values()]
        numbers = [split[name] for split in told["splits"].values() for name in _NUMBERS]
        if not all(isinstance(text, str) for text in texts) or not all(
            isinstance(number, int | float) for number in [*numbers, told["tokenizer"]["vocab_size"]]
        ):
            raise TypeError
    except (AttributeError, KeyError, TypeError):
        raise UserError(path, "does not tell of encoded rows", do) from None
    return told
