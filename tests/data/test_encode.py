import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from lora_gpt2.data import encode as module
from lora_gpt2.data.corpora import demo
from lora_gpt2.data.encode import encode_corpus, encoded, is_encoded
from lora_gpt2.data.jsonl import Row, TextRow, read_rows, read_text_rows, write_rows, write_text_rows
from lora_gpt2.data.tokenizer import load_tokenizer, train_tokenizer
from lora_gpt2.errors import UserError
from lora_gpt2.files import sha256

LINES = {
    "train": "name : A | Type : pub||A is a pub . \nname : B||B is big . \nname : A | Type : pub||The A . \n",
    "valid": "name : C||C is a café . \n",
    "test": "name : D||D . \n",
}


@pytest.fixture
def raw(tmp_path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for split, text in LINES.items():
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


def test_a_row_is_the_context_and_the_spaced_completion_each_with_the_end_token(tmp_path, raw):
    encode_corpus("e2e", raw, "corpus:280", tmp_path / "out")
    tokenizer = load_tokenizer(str(tmp_path / "out/tokenizer"))
    end = tokenizer.end_token
    assert list(read_rows(tmp_path / "out/train.jsonl", tokenizer.vocab_size)) == [
        Row([*tokenizer.encode(context), end], [*tokenizer.encode(completion), end])
        for context, completion in [
            ("name : A | Type : pub", " A is a pub ."),
            ("name : B", " B is big ."),
            ("name : A | Type : pub", " The A ."),
        ]
    ]
    assert list(read_text_rows(tmp_path / "out/valid.text.jsonl")) == [TextRow("name : C", "C is a café .")]


def test_meta_says_what_was_encoded(tmp_path, raw):
    meta = encode_corpus("e2e", raw, "corpus:280", tmp_path / "out")
    assert meta == json.loads((tmp_path / "out/meta.json").read_text())
    tokenizer = load_tokenizer(str(tmp_path / "out/tokenizer"))
    assert (meta["format"], meta["corpus"]) == (2, "e2e")
    assert meta["tokenizer"] == {
        "source": "corpus:280",
        "vocab_size": tokenizer.vocab_size,
        "end_token": tokenizer.end_token,
        "sha256": tokenizer.sha256,
    }
    assert list(meta["splits"]) == ["train", "valid", "test"]
    files = sorted((tmp_path / "out").glob("*.jsonl"))
    assert dict(sorted(meta["files"].items())) == {file.name: sha256(file) for file in files}
    assert len(files) == 6
    rows = list(read_rows(tmp_path / "out/train.jsonl"))
    assert meta["splits"]["train"] == {
        "rows": 3,
        "contexts": 2,
        "context_tokens": round(sum(len(row.context) for row in rows) / 3, 2),
        "completion_tokens": round(sum(len(row.completion) for row in rows) / 3, 2),
        "longest": max(len(row.context) + len(row.completion) for row in rows),
        "input": "train.txt",
        "sha256": sha256(raw / "train.txt"),
    }


def test_the_output_names_no_place_on_this_machine(tmp_path, raw):
    encode_corpus("e2e", raw, "corpus:280", tmp_path / "out")
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.json*"))


def test_white_space_before_the_end_token_is_dropped(tmp_path):
    write_text_rows(tmp_path / "train.jsonl", [TextRow("a ", "b \t\n")])
    encode_corpus("jsonl", tmp_path / "train.jsonl", "corpus:257", tmp_path / "out")
    tokenizer = load_tokenizer(str(tmp_path / "out/tokenizer"))
    (row,) = read_rows(tmp_path / "out/train.jsonl")
    assert (tokenizer.decode(row.context[:-1]), tokenizer.decode(row.completion[:-1])) == ("a ", " b")


def test_a_single_file_takes_its_split_from_its_name_or_from_the_caller(tmp_path, raw):
    assert list(
        encode_corpus("e2e", raw / "test.txt", "corpus:280", tmp_path / "a", split="train")["splits"]
    ) == ["train"]
    (raw / "tokenizer").mkdir()
    train_tokenizer(["a"], 257).save(raw / "tokenizer")
    folder = str(raw / "tokenizer")
    assert list(encode_corpus("e2e", raw / "test.txt", folder, tmp_path / "b")["splits"]) == ["test"]
    (raw / "test.txt").rename(raw / "mine.txt")
    with pytest.raises(
        UserError,
        match=r"no train, valid .dev. or test split is found by name.* give one file with its split",
    ):
        encode_corpus("e2e", raw / "mine.txt", folder, tmp_path / "c")
    assert list(encode_corpus("e2e", raw / "mine.txt", folder, tmp_path / "c", split="valid")["splits"]) == [
        "valid"
    ]


def test_the_demo_s_two_domains_share_one_tokenizer(tmp_path):
    metas = [encode_corpus(domain, None, "corpus:600", tmp_path / domain) for domain in demo.DOMAINS]
    assert metas[0]["tokenizer"] == metas[1]["tokenizer"]
    assert metas[0]["tokenizer"]["vocab_size"] == 600
    assert [metas[0]["splits"][split]["contexts"] for split in ("train", "valid", "test")] == [730, 80, 80]
    assert list(read_text_rows(tmp_path / "demo/test.text.jsonl")) == demo.rows("demo", "test")


def test_the_cache_is_used_again_and_follows_input_and_tokenizer(tmp_path, raw, monkeypatch):
    cache = tmp_path / "cache"
    first = encoded("e2e", raw, "corpus:280", cache)
    assert encoded("e2e", raw, "corpus:270", cache) != first
    with monkeypatch.context() as patch:
        patch.setattr(module, "_encode", None)  # must not be called
        assert encoded("e2e", raw, "corpus:280", cache) == first
        assert encoded("e2e", raw, str(first / "tokenizer"), cache) == first
    with open(raw / "test.txt", "a") as file:
        file.write("name : E||E . \n")
    changed = encoded("e2e", raw, "corpus:280", cache)
    assert changed != first
    assert len(list(read_rows(changed / "test.jsonl"))) == 2
    assert len(list(read_rows(first / "test.jsonl"))) == 1


def test_what_was_left_without_its_meta_is_encoded_again(tmp_path, raw):
    first = encoded("e2e", raw, "corpus:280", tmp_path / "cache")
    (first / "meta.json").unlink()
    (first / "train.jsonl").write_text("half a li")
    assert encoded("e2e", raw, "corpus:280", tmp_path / "cache") == first
    assert len(list(read_rows(first / "train.jsonl"))) == 3


def test_a_failure_leaves_nothing_in_the_cache(tmp_path, raw):
    (raw / "test.txt").write_text("no bars\n")
    with pytest.raises(UserError, match=r"context\|\|completion was expected"):
        encoded("e2e", raw, "corpus:280", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_many_may_encode_at_once(tmp_path, raw):
    with ProcessPoolExecutor(4, get_context("spawn")) as pool:
        waiting = [pool.submit(encoded, "e2e", raw, "corpus:280", tmp_path / "cache") for _ in range(12)]
        (folder,) = {result.result() for result in waiting}
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert len(list(read_rows(folder / "train.jsonl"))) == 3


def test_an_encoded_folder_is_its_own_answer(tmp_path, raw):
    out = tmp_path / "out"
    encode_corpus("e2e", raw, "corpus:280", out)
    assert is_encoded(out)
    assert not is_encoded(raw)
    assert encoded("jsonl", out, "gpt2", tmp_path / "cache") == out
    assert encoded("e2e", out, "gpt2", tmp_path / "cache") == out
    with pytest.raises(UserError, match="these rows are of the corpus e2e, not webnlg"):
        encoded("webnlg", out, "gpt2", tmp_path / "cache")
    meta = json.loads((out / "meta.json").read_text())
    for wrong in ({"files": []}, {"tokenizer": None}, {"splits": {"train": {}}}, {"corpus": 1}):
        (out / "meta.json").write_text(json.dumps({**meta, **wrong}))
        with pytest.raises(UserError, match=r"meta.json: does not tell of encoded rows"):
            encoded("jsonl", out, "gpt2", tmp_path / "cache")
    (out / "meta.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="the format 2 was expected; encode the corpus again"):
        encoded("jsonl", out, "gpt2", tmp_path / "cache")


def test_ids_beside_their_tokenizer_are_not_taken_for_another_one_s(tmp_path, raw):
    out = tmp_path / "out"
    encode_corpus("e2e", raw, "corpus:280", out)
    (out / "meta.json").unlink()
    with pytest.raises(UserError, match=r"no meta.json .* whole; .* or set data.tokenizer=\S+/out/tokenizer"):
        encoded("jsonl", out, "gpt2", tmp_path / "cache")
    folder = encoded("jsonl", out, str(out / "tokenizer"), tmp_path / "cache")
    assert list(read_rows(folder / "train.jsonl")) == list(read_rows(out / "train.jsonl"))


def test_files_of_ids_keep_their_ids_and_gain_their_texts(tmp_path):
    tokenizer = train_tokenizer(["a pub"], 257)
    tokenizer.save(tmp_path / "tokenizer")
    end = tokenizer.end_token
    rows = [Row([*tokenizer.encode("a : b"), end], [*tokenizer.encode(" B ."), end])]
    (tmp_path / "ids").mkdir()
    write_rows(tmp_path / "ids/train.jsonl", rows)
    assert is_encoded(tmp_path / "ids")
    folder = encoded("jsonl", tmp_path / "ids", str(tmp_path / "tokenizer"), tmp_path / "cache")
    assert list(read_rows(folder / "train.jsonl")) == rows
    assert list(read_text_rows(folder / "train.text.jsonl")) == [TextRow("a : b", "B .")]
    write_rows(tmp_path / "ids/train.jsonl", [Row([257], [end])])
    with pytest.raises(UserError, match="holds the token id 257, the vocabulary has 257 entries"):
        encoded("jsonl", tmp_path / "ids", str(tmp_path / "tokenizer"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("corpus", "input", "tokenizer", "split", "message"),
    [
        ("e2e", None, "corpus:280", None, "corpus e2e: needs an input"),
        ("demo", ".", "corpus:280", None, "demo is built in and reads no files"),
        ("e3e", ".", "corpus:280", None, "corpus 'e3e': is not known; use e2e, webnlg"),
        ("e2e", ".", "corpus:280", "dev", "split 'dev': is none of train, valid, test"),
        ("e2e", ".", "corpus:280", "test", "is no file, and only a file can be the test split"),
        ("e2e", "train.txt", "corpus:many", None, "corpus:SIZE was expected"),
        ("e2e", "test.txt", "corpus:280", None, "there is no train split of text to train it on"),
        ("e2e", "missing", "corpus:280", None, "there is no such file or folder"),
    ],
)
def test_a_wrong_request_is_refused(tmp_path, raw, corpus, input, tokenizer, split, message):
    with pytest.raises(UserError, match=message):
        encode_corpus(corpus, None if input is None else raw / input, tokenizer, tmp_path / "out", split)
    assert not (tmp_path / "out/meta.json").exists()


def test_a_split_without_rows_is_refused(tmp_path, raw):
    (raw / "valid.txt").write_text("")
    with pytest.raises(UserError, match=r"valid\.txt: holds no example"):
        encode_corpus("e2e", raw, "corpus:280", tmp_path / "out")
    assert not (tmp_path / "out/meta.json").exists()


@pytest.mark.corpora
def test_real_e2e_has_the_reference_s_ids_and_counts_in_seconds(tmp_path):
    started = time.perf_counter()
    meta = encode_corpus("e2e", Path(os.environ["LORA_GPT2_CORPORA"]) / "e2e", "gpt2", tmp_path)
    assert time.perf_counter() - started < 15
    assert [meta["splits"][split]["rows"] for split in ("train", "valid", "test")] == [42061, 4672, 4693]
    assert next(read_rows(tmp_path / "test.jsonl")) == Row(
        [3672, 1058, 4518, 43537, 930, 5994, 1058, 6891, 6128, 930, 1989, 1058, 1748, 7372, 50256],
        [317, 6891, 6128, 287, 262, 1748, 7372, 1989, 1444, 4518, 43537, 764, 50256],
    )
    started = time.perf_counter()
    assert sum(1 for _ in read_rows(tmp_path / "train.jsonl", 50257)) == 42061
    assert time.perf_counter() - started < 1
