import json

import pytest

from lora_gpt2.decoding.beam import Hypothesis
from lora_gpt2.decoding.predictions import Queries, merge_parts, part_file, write_predictions

CONTEXTS = [("", context) for context in ([1, 2], [3], [1, 2], [4, 5, 6, 7], [3])]


def test_each_different_context_is_asked_once():
    queries = Queries(CONTEXTS, longest=3)
    assert queries.contexts == [[1, 2], [3], [5, 6, 7]]  # the last tokens of one that is too long
    assert queries.of_row == {0: 0, 1: 1, 2: 0, 3: 2, 4: 1}
    assert (len(queries), queries.cut) == (3, 1)
    assert queries[[2, 0]] == [(2, [5, 6, 7], ""), (0, [1, 2], "")]


def test_contexts_that_are_equal_only_after_cutting_stay_apart():
    assert len(Queries([("", [9, 1, 2]), ("", [8, 1, 2])], longest=2)) == 2


def test_a_context_asked_of_two_adapters_is_two_queries():
    queries = Queries([("a", [1]), ("b", [1]), ("a", [1])], longest=4)
    assert queries.of_row == {0: 0, 1: 1, 2: 0}
    assert queries[[0, 1]] == [(0, [1], "a"), (1, [1], "b")]


def test_a_limit_keeps_the_first_contexts_and_all_their_rows():
    queries = Queries(CONTEXTS, longest=9)
    queries.limit(2)
    assert queries.of_row == {0: 0, 1: 1, 2: 0, 4: 1}
    assert queries.contexts == [[1, 2], [3]]


def write_part(folder, rank: int, *numbers: int) -> None:
    lines = [json.dumps([number, [number, 9], -0.5 * number]) + "\n" for number in numbers]
    part_file(folder, rank).write_text("".join(lines))


def test_the_parts_of_all_ranks_come_together_in_order(tmp_path):
    write_part(tmp_path, 0, 2, 0)
    write_part(tmp_path, 1, 4, 1, 3)
    write_part(tmp_path, 2)
    assert merge_parts(tmp_path, 3, 5) == [Hypothesis([i, 9], -0.5 * i) for i in range(5)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("first", "second"), [((0, 1), (1, 2)), ((0,), (2,))])
def test_a_query_that_is_missing_or_doubled_is_noticed(tmp_path, first, second):
    write_part(tmp_path, 0, *first)
    write_part(tmp_path, 1, *second)
    with pytest.raises(AssertionError, match="decoded"):
        merge_parts(tmp_path, 2, 3)


def test_every_row_has_its_line(tmp_path):
    outputs = [Hypothesis([5, 9], -0.25), Hypothesis([6], -0.5)]
    queries = Queries([("", [1]), ("a", [2]), ("", [1])], longest=2)
    write_predictions(tmp_path / "p.jsonl", queries, outputs[::-1], ["b", "café"], eval_len=3)
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text("utf-8").splitlines()] == [
        {"id": 0, "predict": [6, 0, 0], "score": -0.5, "text": "b"},
        {"id": 1, "predict": [5, 9, 0], "score": -0.25, "text": "café", "adapter": "a"},
        {"id": 2, "predict": [6, 0, 0], "score": -0.5, "text": "b"},
    ]
