"""One page that stands alone: what it says is what the files hold."""

import html
import json
import re
import shutil

import pytest

from lora_gpt2 import jobs, runs
from lora_gpt2.errors import UserError
from lora_gpt2.evaluation.scorer import score_by_part, scores_as_dict
from lora_gpt2.files import write_json
from lora_gpt2.report import entries, page, pictures


@pytest.fixture
def _without_meteor(monkeypatch):
    monkeypatch.setattr("lora_gpt2.evaluation.meteor.find_jar", lambda name: None)


@pytest.mark.usefixtures("_without_meteor")
def test_the_page_of_a_sweep(tmp_path, swept):
    assert page.write(swept, tmp_path / "report.html") is False
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", text), "nothing from elsewhere"
    assert "http" not in text.replace("http-equiv", "")
    plain = html.unescape(text)
    for name in "01":
        scores = json.loads((swept / name / "scores.json").read_text())
        assert f"{scores['bleu']:.4f}" in plain
        assert f"{scores['nist']:.4f}" in plain
    assert "rank 1" in plain
    assert plain.count("<td>rank 2</td>") == 2, "jobs have the names that pictures have"
    assert re.search(r"Best by bleu over \d inputs of the valid split: <b>rank [12]</b>", plain)
    assert "<td>lora.rank</td>" in plain
    for title in (
        "Training loss",
        "bleu by parameters",
        "Singular values",
        "Best predictions",
        "To repeat it",
    ):
        assert title in plain
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "pictures do not share names"
    assert 'http-equiv="refresh"' not in text


@pytest.mark.usefixtures("_without_meteor")
def test_the_page_of_a_run_beside_a_baseline(tmp_path, swept):
    page.write(swept / "0", tmp_path / "same.html", baseline=swept / "0")
    assert "p 1.000" in (tmp_path / "same.html").read_text()
    with pytest.raises(UserError, match=r"holds no hypotheses\.txt"):
        page.write(swept / "0", tmp_path / "none.html", baseline=tmp_path)
    other = tmp_path / "other"
    shutil.copytree(swept / "1", other)
    for name in ("references.txt", "contexts.txt", "hypotheses.txt"):
        lines = (other / name).read_text()
        (other / name).write_text(lines + ("more\n\n" if name.startswith("ref") else "more\n"))
    with pytest.raises(UserError, match="was scored on other inputs"):
        page.write(swept / "0", tmp_path / "none.html", baseline=other)


@pytest.mark.usefixtures("_without_meteor")
def test_the_page_of_what_is_under_way(tmp_path, swept):
    """Only a status and some metrics are there; the page loads itself again."""
    job = jobs.Job.read(swept / "0")
    job.state, job.process = jobs.State.running, __import__("os").getpid()
    job.write(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,2.5\n2,2.25\n")
    assert page.write(tmp_path, tmp_path / "report.html", refresh=10) is True
    text = (tmp_path / "report.html").read_text()
    assert '<meta http-equiv="refresh" content="10">' in text
    assert "Training loss" in text
    assert "running" in text


def test_texts_are_escaped_and_words_told_apart():
    words = page._word_differences("a b <c> e", "a <c> d e")
    assert words == [("same", "a"), ("ours", "b"), ("same", "<c>"), ("theirs", "d"), ("same", "e")]
    told = {"input": "<i>", "value": 0.5, "words": words, "references": ["<r>"]}
    rendered = page._template().render(jobs={}, repeat={}, best_and_worst={"worst": [told]})
    assert "<ins>b</ins>" in rendered
    assert "&lt;c&gt;" in rendered
    assert "<i>" not in rendered


def test_pictures_are_bare_elements_that_say_the_same_twice():
    drawn = [pictures.curves({"a": ([1, 2], [3.0, 1.0])}, "step", "loss") for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith("<svg")
    cells = {(1, 16.0): 0.5, (2, 16.0): 0.6, (2, 32.0): 0.7}
    assert "0.7000" in pictures.heat_map(cells, "rank", "alpha", "bleu")
    points = {"small": (10.0, 0.5), "large": (20.0, 0.4), "best": (20.0, 0.9)}
    assert "Pareto" in pictures.front(points, "parameters", "bleu", falling=False)


@pytest.mark.usefixtures("_without_meteor")
def test_intervals_are_of_the_metrics_that_were_scored(tmp_path, swept):
    """WebNLG's rows may come as data=jsonl: BLEU is then in percent, and TER and chrF++ stand beside it."""
    folder = tmp_path / "0"
    shutil.copytree(swept / "0", folder)
    texts = entries.Texts.of(folder)
    parts = ["all"] * len(texts.predictions)
    by_part = score_by_part(texts.predictions, texts.references, parts)
    scores = {part: scores_as_dict(values, texts.references) for part, values in by_part.items()}
    write_json(folder / "scores.json", scores)
    (entry,) = entries.entries_of(folder, {folder: "0"})
    entries.compare([entry], None)
    assert {"bleu", "ter", "chrf"} <= entry.intervals.keys()
    for metric, (low, high) in entry.intervals.items():
        assert low <= entry.values[metric] <= high, metric


@pytest.mark.usefixtures("_without_meteor")
def test_seeds_are_put_together_and_other_inputs_told_apart(tmp_path, swept):
    for name, source, seed, limit in (("0", "0", 1, None), ("1", "1", 2, None), ("2", "0", 1, 3)):
        shutil.copytree(swept / source, tmp_path / name)
        status = json.loads((tmp_path / name / "status.json").read_text())
        status["settings"].update({"seed": seed, "lora.rank": 2, "limit": limit})
        write_json(tmp_path / name / "status.json", status)
    for name, end in (("references", "\n"), ("contexts", ""), ("hypotheses", "")):
        with open(tmp_path / "2" / f"{name}.txt", "a") as file:
            file.write(f"more\n{end}")
    page.write(tmp_path, tmp_path / "report.html")
    text = html.unescape((tmp_path / "report.html").read_text())
    assert "Over seeds" in text
    assert re.search(r"<td>2</td>\s*<td>\d\.\d{4} ± \d\.\d{4}</td>", text)
    assert re.search(r"Scored on other inputs, and so not compared: [^;<]*limit", text)


def test_curves_go_back_before_an_interruption(tmp_path):
    rows = {
        "metrics.1.csv": [(1, 4.0), (2, 3.0)],
        "metrics.2.csv": [(2, 3.5)],
        "metrics.csv": [(4, 1.0)],
    }
    for name, values in rows.items():
        lines = "".join(f"{step},{value}\n" for step, value in values)
        (tmp_path / name).write_text("step,train/loss\n" + lines)
    with open(tmp_path / "metrics.1.csv", "a") as file:
        file.write("3,2")  # of 2.25
    assert runs.logged(tmp_path, "train/loss") == {1: 4.0, 2: 3.5, 4: 1.0}
    assert runs.logged(tmp_path / "none", "train/loss") == {}


def test_settings_in_which_jobs_differ_come_first():
    of_each = [{"lora.targets": ["q", "k"], "optimizer.lr": rate} for rate in (2, 3)]
    assert page._differences(of_each)[0][0] == "optimizer.lr"
