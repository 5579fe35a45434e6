"""Scores while training, and what goes by them."""

import csv
import json

import pytest

from lora_gpt2.errors import UserError
from lora_gpt2.scoring import ValidationScores
from tests.conftest import generate, train


@pytest.fixture(autouse=True)
def _without_meteor(monkeypatch):
    monkeypatch.setattr("lora_gpt2.evaluation.meteor.find_jar", lambda name: None)


def course(folder, column: str) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_the_best_weights_are_those_of_the_highest_score(tmp_path, tiny, run):
    """Of NIST, as so short texts have no four words in a row for BLEU."""
    options = ["callbacks.scores.contexts=4", "callbacks.scores.decoding={beam_size: 2, eval_len: 16}"]
    adapt = [
        "lora=qv",
        f"base={run / 'base'}",
        "optimizer.lr=0.03",
        "callbacks.checkpoint.monitor=valid/nist",
    ]
    loss = train(tmp_path, *tiny, "callbacks=best_bleu", *adapt, *options)
    seen = course(tmp_path, "valid/nist")
    assert len(seen) == 3, "once an epoch"
    assert len(set(seen)) > 1
    assert {len(course(tmp_path, f"valid/{name}")) for name in ("bleu", "rouge_l", "cider")} == {3}
    corpus = next(one for one in tiny if one.startswith("data.root="))
    generate(tmp_path / "again", "data=jsonl", corpus, f"adapter={tmp_path}", "split=valid", "limit=4",
             "data.seq_len=64", "decoding.beam_size=2", "decoding.eval_len=16")  # fmt: skip
    scores = json.loads((tmp_path / "again" / "scores.json").read_text())
    assert scores["nist"] == pytest.approx(max(seen), rel=1e-6)
    assert loss == pytest.approx(course(tmp_path, "valid/loss")[seen.index(max(seen))])


def test_scoring_changes_nothing_of_the_training(tmp_path, tiny, run):
    common = [*tiny, "lora=qv", f"base={run / 'base'}", "lora.dropout=0.3"]
    plain = train(tmp_path / "plain", *common)
    assert (
        train(tmp_path / "scored", *common, "callbacks=scores", "callbacks.scores.decoding.eval_len=8")
        == plain
    )


def test_several_adapters_have_a_score_each_and_a_mean(tmp_path, tiny, run):
    scored = ["callbacks=scores", "callbacks.scores.contexts=3", "callbacks.scores.decoding.eval_len=8"]
    adapt = ["lora=qv", f"base={run / 'base'}", "lora.rank=[1,2]", "trainer.max_epochs=1"]
    train(tmp_path, *tiny, *adapt, *scored)
    (mean,), *each = (course(tmp_path, f"valid/nist{name}") for name in ("", "/lora.rank-1", "/lora.rank-2"))
    assert mean == pytest.approx((each[0][0] + each[1][0]) / 2)


@pytest.mark.parametrize("decoding", [{"beams": 3}, {"beam_size": 0}, {"beam_size": "many"}])
def test_settings_that_are_none_are_refused(decoding):
    with pytest.raises(UserError, match=r"callbacks\.scores\.decoding"):
        ValidationScores(decoding=decoding)
