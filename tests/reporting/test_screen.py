"""What a run prints."""

import pytest

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
