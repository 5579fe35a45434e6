import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_gpt2.errors import UserError
from lora_gpt2.evaluation.text_files import (
    read_pairs,
    read_predictions,
    read_references,
    write_predictions,
    write_references,
)

lines = st.text(st.characters(exclude_categories=("Cs", "Cc", "Z")), min_size=1, max_size=6)


def test_blank_lines_end_a_segment_and_more_of_them_change_nothing(tmp_path):
    path = tmp_path / "refs.txt"
    path.write_text("\na 1\na 2\n\n\nb 1\r\n \n\n", encoding="utf-8")
    assert read_references(path) == [["a 1", "a 2"], ["b 1"]]


def test_a_file_without_blank_lines_holds_one_reference_a_segment(tmp_path):
    path = tmp_path / "refs.txt"
    path.write_text("a\nb\nc", encoding="utf-8")
    assert read_references(path) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_a_table_is_grouped_by_mr_in_order_of_first_appearance(tmp_path, suffix, mark):
    path = tmp_path / f"refs.{suffix}"
    rows = ["mr,ref", "x,one", "y,two", 'x,"th, ree"']
    path.write_text("\ufeff" + "\r\n".join(row.replace(",", mark, 1) for row in rows), encoding="utf-8")
    assert read_references(path) == [["one", "th, ree"], ["two"]]


def test_an_empty_line_is_an_empty_prediction_and_only_the_last_line_break_is_none(tmp_path):
    path = tmp_path / "pred.txt"
    path.write_text("a\n\nb\n\n", encoding="utf-8")
    assert read_predictions(path) == ["a", "", "b", ""]


def test_a_jsonl_file_gives_the_text_of_each_line(tmp_path):
    path = tmp_path / "pred.jsonl"
    path.write_text('{"id": 0, "text": "a"}\n{"id": 1, "text": ""}\n', encoding="utf-8")
    assert read_predictions(path) == ["a", ""]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(groups=st.lists(st.lists(lines, min_size=1, max_size=3), min_size=1, max_size=4))
def test_what_is_written_is_read_back(tmp_path, groups):
    write_references(tmp_path / "refs.txt", groups)
    write_predictions(tmp_path / "pred.txt", [group[0] for group in groups])
    expected = groups, [group[0] for group in groups]
    assert read_pairs(tmp_path / "refs.txt", tmp_path / "pred.txt") == expected


def test_line_breaks_inside_a_text_are_written_as_spaces(tmp_path):
    write_references(tmp_path / "refs.txt", [["a\nb", "c\r\nd"], ["e\rf"]])
    write_predictions(tmp_path / "pred.txt", ["a\n\nb", ""])
    assert read_references(tmp_path / "refs.txt") == [["a b", "c d"], ["e f"]]
    assert read_predictions(tmp_path / "pred.txt") == ["a  b", ""]


def test_other_counts_name_both_files_and_both_counts(tmp_path):
    (tmp_path / "refs.txt").write_text("a\n\nb\n\nc\n", encoding="utf-8")
    (tmp_path / "pred.txt").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"pred\.txt: holds 2 predictions for the 3 segments of .*refs\.txt; give"
    ):
        read_pairs(tmp_path / "refs.txt", tmp_path / "pred.txt")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("refs.txt", "", "holds no reference; give one or more"),
        ("refs.txt", "\n\n", "holds no reference"),
        ("refs.csv", "", "has the columns ; name two"),
        ("refs.csv", "mr,text\nx,y\n", "has the columns mr, text; name two of its columns mr and ref"),
        ("refs.csv", "mr,ref\nx\n", "refs.csv:2: has no ref; give every row"),
    ],
)
def test_unusable_references_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_references(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "pred.jsonl:2: is not valid JSON"),
        ("[" * 100_000, "pred.jsonl:2: is JSON nested too deep"),
        ('{"predict": [1]}', 'pred.jsonl:2: has no "text"; decode'),
    ],
)
def test_unusable_predictions_are_refused(tmp_path, line, message):
    (tmp_path / "pred.jsonl").write_text(f'{{"text": "a"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_predictions(tmp_path / "pred.jsonl")
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt: there is no such file"):
        read_predictions(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(("group", "found"), [([], "no reference"), (["a", " \n"], "an empty reference")])
def test_references_that_the_format_cannot_hold_are_refused(tmp_path, group, found):
    with pytest.raises(UserError, match=f"segment 2 has {found}"):
        write_references(tmp_path / "refs.txt", [["a"], group])
    assert not (tmp_path / "refs.txt").exists()
