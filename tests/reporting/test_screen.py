"""What a run prints."""

import pytest

from lora_gpt2.data.batches import EncodedRows
from lora_gpt2.data.jsonl import Row
from lora_gpt2.reporting import screen

HOW = 'METEOR needs Java; install the extra: pip install "lora-gpt2[meteor]"'


@pytest.fixture(autouse=True)
def _console(monkeypatch, capsys):
    """A console that writes where the test reads."""
    monkeypatch.setattr(screen._console, "file", None)


def test_a_missing_score_says_how_to_get_it_brackets_and_all(capsys):
    report = {
        "bleu": 0.5,
        "meteor": None,
        "signatures": {"bleu": "b", "meteor": "m"},
        "notes": {"meteor": HOW},
    }
    screen.scores(report)
    said = capsys.readouterr().out
    assert HOW in said
    assert "0.5000" in said
    assert "n/a" in said


def test_a_folder_with_brackets_keeps_its_name(tmp_path, capsys):
    folder = tmp_path / "run[bold]"
    folder.mkdir()
    (folder / "a[1].txt").touch()
    screen.artefacts(folder)
    screen.note(str(folder))
    assert capsys.readouterr().out.count("run[bold]") == 2


@pytest.mark.parametrize(("long", "warned"), [(0, None), (1, False), (2, True)])
def test_more_than_one_row_in_a_hundred_cut_is_a_warning(capsys, long, warned):
    rows = [Row([1], [2] * (9 if number < long else 2)) for number in range(100)]
    screen.rows_cut(5, train=EncodedRows(rows, 5))
    said = capsys.readouterr().out
    assert (f"train: {long} of 100 rows cut" in said) == (warned is not None)
    assert ("warning:" in said) == bool(warned)
