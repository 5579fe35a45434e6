import json

import pytest

from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.predictions import Parts, Queries, write_predictions
from lora_gpt2.decoding.state import Hypothesis
from lora_gpt2.errors import UserError

CONTEXTS = [("", context, ()) for context in ([1, 2], [3], [1, 2], [4, 5, 6, 7], [3])]


def test_each_different_context_is_asked_once():
    queries = Queries(CONTEXTS, longest=3)
    assert [queries.context(i) for i in range(3)] == [[1, 2], [3], [5, 6, 7]]  # the last tokens of a long one
    assert queries.of_row == {0: 0, 1: 1, 2: 0, 3: 2, 4: 1}
    assert (len(queries), queries.cut) == (3, 1)
    assert queries[[2, 0]] == [(2, [5, 6, 7], "", ()), (0, [1, 2], "", ())]


def test_contexts_that_are_equal_only_after_cutting_stay_apart():
    assert len(Queries([("", [9, 1, 2], ()), ("", [8, 1, 2], ())], longest=2)) == 2


def test_a_context_asked_of_two_adapters_or_with_other_phrases_is_two_queries():
    queries = Queries([("a", [1], ()), ("b", [1], ()), ("a", [1], ()), ("a", [1], [[5]])], longest=4)
    assert queries.of_row == {0: 0, 1: 1, 2: 0, 3: 2}
    assert queries[[0, 1, 2]] == [(0, [1], "a", ()), (1, [1], "b", ()), (2, [1], "a", [[5]])]


def test_a_limit_keeps_the_first_contexts_and_all_their_rows():
    queries = Queries(CONTEXTS, longest=9)
    queries.limit(2)
    assert queries.of_row == {0: 0, 1: 1, 2: 0, 4: 1}
    assert queries[[0, 1]] == [(0, [1, 2], "", ()), (1, [3], "", ())]


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_ranks_share_what_is_left_by_length(ranks):
    queries = Queries([("", [i] * (i % 7 + 1), ()) for i in range(50)], longest=9)
    finished = set(range(0, 50, 4))
    shares = [[n for chunk in queries.share(r, ranks, finished) for n in chunk] for r in range(ranks)]
    assert sorted(n for share in shares for n in share) == sorted(set(range(50)) - finished)
    tokens = [sum(len(queries.context(n)) for n in share) for share in shares]
    assert max(tokens) - min(tokens) <= 7
    lengths = [len(queries.context(n)) for n in shares[0]]
    assert lengths == sorted(lengths, reverse=True)


def output(number: int) -> list[Hypothesis]:
    return [Hypothesis([number, 9], -0.5 * number, [-0.1, -0.2])]


def parts_of(folder, ranks: int, count: int, fingerprint: str = "f") -> Parts:
    for rank in range(ranks):
        parts = Parts(folder, fingerprint)
        for number in range(rank, count, ranks):
            parts.write(rank, number, output(number))
    return Parts(folder, fingerprint)


def test_the_parts_of_all_ranks_come_together(tmp_path):
    parts = parts_of(tmp_path, 3, 5)
    assert parts.finished == set(range(5))
    assert [parts.outputs(number) for number in range(5)] == [output(number) for number in range(5)]
    parts.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("torn", range(1, 120, 7))
def test_a_file_cut_at_any_byte_loses_only_its_last_line(tmp_path, torn):
    parts_of(tmp_path, 1, 4)
    path = tmp_path / ".part-0.jsonl"
    path.write_bytes(path.read_bytes()[:-torn])
    left = Parts(tmp_path, "f")
    for number in set(range(4)) - left.finished:
        left.write(0, number, output(number))
    whole = Parts(tmp_path, "f")
    assert [whole.outputs(number) for number in range(4)] == [output(number) for number in range(4)]
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    assert all(map(json.loads, lines))


@pytest.mark.parametrize("damage", [b"garbage{", b"1, XX", b"[1, XX", b"[1, [[3]]]", b"[null, []]", b"\xff"])
def test_a_damaged_line_is_decoded_again(tmp_path, damage):
    parts_of(tmp_path, 1, 4)
    path = tmp_path / ".part-0.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], damage, *lines[3:], b""]))
    assert Parts(tmp_path, "f").finished == {0, 2, 3}


def test_another_digit_makes_a_damaged_line(tmp_path):
    parts_of(tmp_path, 1, 1)
    path = tmp_path / ".part-0.jsonl"
    header, line = path.read_bytes().splitlines()
    for at in (place for place, byte in enumerate(line) if chr(byte).isdigit()):
        other = line[:at] + (b"7" if line[at:][:1] != b"7" else b"8") + line[at + 1 :]
        path.write_bytes(b"\n".join([header, other, b""]))
        assert not Parts(tmp_path, "f").finished, other


@pytest.mark.parametrize("header", [b"hello", b"", b"\xff", b"[]"])
def test_a_file_of_another_kind_is_refused(tmp_path, header):
    (tmp_path / ".part-0.jsonl").write_bytes(header + b"\n")
    with pytest.raises(UserError, match="holds outputs of an interrupted decoding of something else"):
        Parts(tmp_path, "f")


def test_an_interrupted_run_in_another_folder_is_gone_on_from(tmp_path):
    (old := tmp_path / "old").mkdir()
    (new := tmp_path / "new").mkdir()
    parts_of(old, 2, 3)
    parts = Parts(new, "f", earlier=old)
    parts.write(0, 3, output(3))
    parts.read()
    assert [parts.outputs(number) for number in range(4)] == [output(number) for number in range(4)]
    parts.remove()
    assert len(list(old.iterdir())) == 2


def test_outputs_of_something_else_are_not_gone_on_from(tmp_path):
    parts_of(tmp_path, 1, 1)
    with pytest.raises(UserError, match="holds outputs of an interrupted decoding of something else"):
        Parts(tmp_path, "another")


def test_every_row_has_its_line(tmp_path):
    queries = Queries([("", [1], ()), ("a", [2], ()), ("", [1], ())], longest=2)
    parts = Parts(tmp_path, "f")
    parts.write(0, 0, [Hypothesis([6], -0.5, [-0.5]), Hypothesis([7], -0.75, [-0.75])])
    parts.write(0, 1, [Hypothesis([5, 9], -0.25, [-0.25, -0.25])])
    parts.read()

    def clean(tokens: list[int]) -> str:
        return "é".join(map(str, tokens))

    write_predictions(tmp_path / "p.jsonl", queries, parts, clean, DecodingSettings(eval_len=3))
    first = {"predict": [6, 0, 0], "score": -0.5, "text": "6"}
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text("utf-8").splitlines()] == [
        {"id": 0, **first},
        {"id": 1, "predict": [5, 9, 0], "score": -0.25, "text": "5é9", "adapter": "a"},
        {"id": 2, **first},
    ]
    write_predictions(tmp_path / "p.jsonl", queries, parts, clean, DecodingSettings(eval_len=3, n_best=2))
    line = json.loads((tmp_path / "p.jsonl").read_text("utf-8").splitlines()[0])
    assert line["n_best"] == [
        {"text": "6", "tokens": [6], "score": -0.5, "log_probs": [-0.5]},
        {"text": "7", "tokens": [7], "score": -0.75, "log_probs": [-0.75]},
    ]
