import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_gpt2.data.jsonl import Row, TextRow, read_rows, read_text_rows, write_rows, write_text_rows
from lora_gpt2.errors import UserError

IDS = st.lists(st.integers(0, 50256), min_size=1, max_size=20)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PARTS = st.sampled_from(["", "seen", "unseen"])


@given(
    rows=st.lists(
        st.builds(Row, IDS, IDS, TEXT, st.lists(IDS, max_size=2).map(tuple)), min_size=1, max_size=5
    )
)
def test_rows_survive_writing_and_reading(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    assert write_rows(path, rows) == len(rows)
    assert list(read_rows(path, 50257)) == rows


@given(
    rows=st.lists(
        st.builds(TextRow, TEXT, TEXT, PARTS, TEXT, st.lists(TEXT, max_size=2).map(tuple)), min_size=1
    )
)
def test_text_rows_survive_line_ends_and_any_character(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "train.text.jsonl"
    assert write_text_rows(path, rows) == len(rows)
    assert list(read_text_rows(path)) == rows


def test_the_part_is_written_only_where_there_is_one(tmp_path):
    path = tmp_path / "test.text.jsonl"
    write_text_rows(path, [TextRow("a", "b"), TextRow("a", "b", "seen")])
    assert [sorted(json.loads(line)) for line in path.read_text().splitlines()] == [
        ["completion", "context"],
        ["completion", "context", "part"],
    ]


def test_a_failing_row_leaves_the_old_file_as_it_was(tmp_path):
    path = tmp_path / "train.jsonl"
    write_rows(path, [Row([1], [2])])

    def rows():
        yield Row([3], [4])
        raise RuntimeError("broken source")

    with pytest.raises(RuntimeError, match="broken source"):
        write_rows(path, rows())
    assert list(read_rows(path)) == [Row([1], [2])]
    assert [file.name for file in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"context": [1], "completion": [2]', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[1, 2]", r"a JSON object was expected, not \[1, 2\]"),
        (b'{"context": [1]}', "the key \"completion\" is missing .keys found: 'context'"),
        (b'{"context": [], "completion": [2]}', '"context" is empty; every row needs at least the end token'),
        (b'{"context": [1], "completion": []}', '"completion" is empty; every row needs at least the end'),
        (b'{"context": "1", "completion": [2]}', '"context" must be a list of token ids, not "1"'),
        (b'{"context": [true], "completion": [2]}', '"context" must hold token ids only, not true'),
        (b'{"context": [1], "completion": [2.0]}', '"completion" must hold token ids only, not 2.0'),
        (b'{"context": [1, "2"], "completion": [2]}', '"context" must hold token ids only, not "2"'),
        (b'{"context": [[1]], "completion": [2]}', r'"context" must hold token ids only, not \[1\]'),
        (b'{"context": [-1], "completion": [2]}', '"context" holds the token id -1'),
        (
            b'{"context": [1], "completion": [10]}',
            '"completion" holds the token id 10, the vocabulary has 10',
        ),
        (b'{"context": ["\xff"], "completion": [2]}', "is not UTF-8 text"),
        (b"[" * 100_000, "is JSON nested too deep to be read"),
        (b"9" * 5000, "is JSON with a number of too many digits to be read"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"context": [1], "completion": [9]}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(path, vocab_size=10))
    assert caught.value.where == f"{path}:2"
    assert caught.value.do


@pytest.mark.parametrize("read", [read_rows, read_text_rows])
def test_a_line_without_end_is_not_read_whole(tmp_path, read):
    path = tmp_path / "train.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"context": "')
        file.truncate(2**32)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"train.jsonl:1: is longer than 16,777,216 bytes"):
        list(read(path))
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_without_a_vocabulary_size_any_id_passes(tmp_path):
    path = tmp_path / "train.jsonl"
    write_rows(path, [Row([10**9], [0])])
    assert list(read_rows(path)) == [Row([10**9], [0])]


@pytest.mark.parametrize("read", [read_rows, read_text_rows])
def test_missing_and_empty_files_are_refused(tmp_path, read):
    with pytest.raises(UserError, match="there is no such file"):
        list(read(tmp_path / "train.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="is empty, at least one row was expected"):
        list(read(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a"}', 'the key "completion" is missing'),
        ('{"context": [1], "completion": "b"}', r'"context" must be text, not \[1\]'),
        (r'{"context": "a", "completion": "b\ud83d"}', "half of a character .the lone surrogate"),
        ('{"context": "a", "completion": "b", "part": 1}', '"part" must be text, not 1'),
    ],
)
def test_a_bad_text_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "train.text.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        list(read_text_rows(path))
    assert caught.value.where == f"{path}:1"
