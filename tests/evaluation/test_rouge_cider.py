import importlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_gpt2.evaluation.rouge_cider import cider, longest_common_subsequence, rouge_l

token_lists = st.lists(st.sampled_from("abcd"), max_size=12)


def as_coco(predictions, references):
    return dict(enumerate(references)), {i: [text] for i, text in enumerate(predictions)}


@given(token_lists, token_lists)
def test_the_bit_parallel_subsequence_equals_the_table(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(first, second) == table[-1][-1]


@pytest.mark.parametrize("with_short", [False, True])
def test_rouge_l_equals_coco(corpus, with_short):
    rouge = importlib.import_module("pycocoevalcap.rouge.rouge").Rouge()
    predictions, references = corpus
    if with_short:
        predictions[0], predictions[1], references[1][0], references[2][0] = "", "", "", ""
    _, each = rouge.compute_score(*as_coco(predictions, references))
    assert rouge_l(predictions, references) == pytest.approx(list(each), abs=1e-12)


@pytest.mark.parametrize("with_short", [False, True])
def test_cider_equals_coco(corpus, with_short):
    coco = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    predictions, references = corpus
    if with_short:
        predictions[0], predictions[1], references[1][0], references[2][0] = "", "", "", ""
        predictions[3], predictions[4] = references[3][0].split()[0], " ".join(references[4][0].split()[:2])
    mean, each = coco.compute_score(*as_coco(predictions, references))
    assert cider(predictions, references) == pytest.approx(list(each), abs=1e-9)
    assert mean > 0.1


def test_best_precision_and_best_recall_may_come_from_two_references():
    # "a b" is within the long reference (precision 1) and covers all of the short one (recall 1).
    assert rouge_l(["a b"], [["a b c d", "b"]]) == pytest.approx([1.0])
    assert rouge_l(["a b"], [["a b c d"]]) == pytest.approx([2.44 * 0.5 / (0.5 + 1.44)])


def test_a_single_segment_has_cider_0_since_every_word_is_in_every_document():
    assert cider(["a b"], [["a b"]]) == [0.0]


def test_a_perfect_corpus_has_cider_10_and_rouge_1():
    texts = ["a b c d e", "f g h i j", "k l m n o"]
    assert cider(texts, [[text] for text in texts]) == pytest.approx([10.0] * 3)
    assert rouge_l(texts, [[text] for text in texts]) == pytest.approx([1.0] * 3)


def test_the_order_of_the_references_changes_nothing(corpus):
    predictions, references = corpus
    mixed = [random.Random(1).sample(group, len(group)) for group in references]
    assert rouge_l(predictions, mixed) == pytest.approx(rouge_l(predictions, references))
    assert cider(predictions, mixed) == pytest.approx(cider(predictions, references))


@pytest.mark.parametrize("score", [cider, rouge_l])
def test_every_prediction_needs_its_references(score):
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        score(["a b", "c d"], [["a b"]])
