import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from lora_gpt2.evaluation.ngrams import bleu, ngram_statistics, nist, tokens_13a

texts = st.lists(st.sampled_from("abcde"), min_size=4, max_size=9).map(" ".join)
segments = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6)


def bleu_and_nist(predictions: list[str], references: list[list[str]]) -> tuple[float, float]:
    sums = ngram_statistics(predictions, references).sum(axis=0)
    return float(bleu(sums)), float(nist(sums))


def grams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def literal_nist(predictions: list[str], references: list[list[str]]) -> float:
    """Doddington 2002, section 2, written as slowly as it reads."""
    every_reference = [text.split() for group in references for text in group]
    score = 0.0
    for n in range(1, 6):
        gained = total = 0.0
        for prediction, group in zip(predictions, references, strict=True):
            total += len(grams(prediction.split(), n))
            for gram, count in Counter(grams(prediction.split(), n)).items():
                allowed = max(grams(text.split(), n).count(gram) for text in group)
                whole = sum(grams(text, n).count(gram) for text in every_reference)
                if n == 1:
                    ahead = sum(len(text) for text in every_reference)
                else:
                    ahead = sum(grams(text, n - 1).count(gram[:-1]) for text in every_reference)
                if whole:
                    gained += min(count, allowed) * math.log2(ahead / whole)
        if total:
            score += gained / total
    ours = sum(len(text.split()) for text in predictions)
    theirs = sum(sum(len(text.split()) for text in group) / len(group) for group in references)
    beta = math.log(0.5) / math.log(1.5) ** 2
    return score * math.exp(beta * math.log(min(1.0, ours / theirs)) ** 2)


def test_bleu_equals_sacrebleu_with_any_number_of_references(corpus):
    predictions, references = corpus
    streams = [[group[i] if i < len(group) else group[0] for group in references] for i in range(4)]
    expected = BLEU(tokenize="13a", lowercase=True).corpus_score(predictions, streams).score / 100
    assert bleu_and_nist(predictions, references)[0] == pytest.approx(expected, abs=1e-12)


def test_of_two_equally_close_reference_lengths_the_shorter_counts():
    output = "a b c d e f"
    shorter, longer = "a b c d e", "a b c d e f g"
    assert bleu_and_nist([output], [[longer, shorter]])[0] == pytest.approx(1.0)  # no brevity penalty
    assert bleu_and_nist([output], [[longer]])[0] == pytest.approx(math.exp(-1 / 6))


@given(st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=2, max_size=6))
def test_nist_equals_the_literal_definition(pairs):
    predictions = [f"{output} x" for output, _ in pairs]  # five tokens: every order has n-grams
    references = [group for _, group in pairs]
    assert bleu_and_nist(predictions, references)[1] == pytest.approx(literal_nist(predictions, references))


def test_nist_of_a_single_reference_is_the_figure_done_by_hand():
    """Small enough to do by hand."""
    references = [["a b a c"]]
    # Words: a has log2(4/2) = 1 bit, b and c 2 bits. Pairs: a b and a c have log2(2/1) = 1 bit, b a has 0.
    expected = (1 + 2 + 1 + 2) / 4 + (1 + 0 + 1) / 3
    assert bleu_and_nist(["a b a c"], references)[1] == pytest.approx(expected)


def test_a_single_n_gram_of_a_length_counts():
    references = [["a b c d e", "a b c d f"]]
    expected = literal_nist(["a b c d e"], references)
    assert bleu_and_nist(["a b c d e"], references)[1] == pytest.approx(expected)


def test_two_thirds_of_the_length_halve_nist():
    assert bleu_and_nist(["a b"], [["a b c"]])[1] == pytest.approx(math.log2(3) / 2)


@given(segments)
def test_a_perfect_prediction_has_bleu_1(pairs):
    references = [[output, *group] for output, group in pairs]
    assert bleu_and_nist([output for output, _ in pairs], references)[0] == pytest.approx(1.0)


@given(segments)
def test_the_order_of_the_references_changes_nothing(pairs):
    predictions, groups = [output for output, _ in pairs], [group for _, group in pairs]
    turned = [group[::-1] for group in groups]
    assert bleu_and_nist(predictions, groups) == pytest.approx(bleu_and_nist(predictions, turned))


def test_an_empty_output_counts_as_one_token():
    assert tokens_13a("") == [""]
    four, five = "a b c d", "e f g h i"
    score, _ = bleu_and_nist([five, five, ""], [[five], [five], [four]])
    # The official arithmetic: 11 tokens make 11 - 3 (n - 1) n-grams; the two full outputs match.
    precisions = [10 / 11, 8 / 8, 6 / 5, 4 / 2]
    assert score == pytest.approx(math.prod(precisions) ** 0.25 * math.exp(1 - 14 / 11))


@pytest.mark.parametrize("predictions", [["x y z w v"], [""], ["a"], ["x"]])
def test_no_match_gives_no_bleu_and_no_crash(predictions):
    of_bleu, of_nist = bleu_and_nist(predictions, [["a b c d e"]])
    assert of_bleu == 0.0
    assert of_nist >= 0.0


def test_the_scores_of_several_sums_are_those_of_each(corpus):
    each = ngram_statistics(*corpus)
    halves = np.stack([each[:15].sum(axis=0), each[15:].sum(axis=0), np.zeros(13)])
    halves[2, -4:] = 1  # one token in all, no match
    for score in (bleu, nist):
        assert score(halves).tolist() == [float(score(half)) for half in halves]


def test_case_does_not_count_and_inner_hyphens_do_not_split():
    assert tokens_13a("Family-Friendly, 3.5 CAFÉ.") == ["family-friendly", ",", "3.5", "café", "."]


def test_every_prediction_needs_its_references():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ngram_statistics(["a b", "c d"], [["a b"]])
