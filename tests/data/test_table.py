"""Rows in a memory-mapped file are the rows that were written."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_gpt2.data import table as module
from lora_gpt2.data.batches import EncodedRows
from lora_gpt2.data.jsonl import Row, write_rows
from lora_gpt2.data.table import RowTable, read_table
from lora_gpt2.errors import UserError

ids = st.lists(st.integers(0, 99), min_size=1, max_size=9)


@settings(max_examples=20)  # each writes files
@given(st.lists(st.builds(lambda a, b: Row(a, b), ids, ids), min_size=1, max_size=30), st.integers(1, 40))
def test_a_table_holds_each_row(tmp_path_factory, rows, flush):
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FLUSH", flush)
        written, again = (read_table(folder / "train.jsonl", 100, folder) for _ in range(2))
    for found in (written, again, RowTable.of(rows)):
        ends = found.lengths.cumsum(0).tolist()
        assert found.contexts.tolist() == [len(row.context) for row in rows]
        for row, start, end in zip(rows, [0, *ends], ends, strict=False):
            assert found.tokens[start:end].tolist() == row.context + row.completion


def test_a_table_is_read_once_and_follows_its_file(tmp_path, monkeypatch):
    path = tmp_path / "train.jsonl"
    write_rows(path, [Row([1, 2], [3])])
    assert read_table(path, 9, tmp_path).tokens.tolist() == [1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_rows", lambda *_: 1 / 0)
        assert read_table(path, 9, tmp_path).tokens.tolist() == [1, 2, 3]
    was = os.stat(path)
    write_rows(path, [Row([1, 4], [3])])
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert read_table(path, 9, tmp_path).tokens.tolist() == [1, 4, 3]
    with pytest.raises(UserError, match=r"train.jsonl:1: .*token id 4, the vocabulary has 4 entries"):
        read_table(path, 4, tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        read_table(tmp_path / "valid.jsonl", 9, tmp_path)


@pytest.mark.parametrize("fault", ["a byte", "cut", "empty", "none of ours"])
def test_a_damaged_table_is_written_anew(tmp_path, fault):
    path = tmp_path / "train.jsonl"
    write_rows(path, [Row([1, 2], [3])])
    read_table(path, 9, tmp_path)
    (place,) = tmp_path.glob("train-*.rows")
    held = bytearray(place.read_bytes())
    if fault == "a byte":
        held[-12] ^= 1
    place.write_bytes({"a byte": held, "cut": held[:-4], "empty": b"", "none of ours": b"x" * 99}[fault])
    table = read_table(path, 9, tmp_path)
    assert table.tokens.tolist() == [1, 2, 3]
    assert place.read_bytes() != held or fault != "a byte"


def test_batches_of_a_table_are_those_of_its_rows(tmp_path):
    rows = [Row([n, n + 1], [n] * (n % 5 + 1)) for n in range(20)]
    write_rows(tmp_path / "train.jsonl", rows)
    stored = EncodedRows(read_table(tmp_path / "train.jsonl", 99, tmp_path), 5)
    held = EncodedRows(rows, 5)
    assert (stored.cut, stored.lost) == (held.cut, held.lost)
    found, expected = stored[[3, 7, 19]], held[[3, 7, 19]]
    assert found.tokens == expected.tokens
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        assert torch.equal(one, other)
