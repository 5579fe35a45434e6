import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_gpt2.evaluation.ter import edit_rate, ter

words = st.lists(st.sampled_from("abcdef"), max_size=9)
some_words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=9)


@settings(max_examples=300)
@given(words, some_words)
def test_the_rate_equals_pyter_to_the_last_bit(output, text):
    pyter = importlib.import_module("pyter")
    assert edit_rate(output, text) == pyter.ter(output, text)


@given(words, st.lists(some_words, min_size=1, max_size=4))
def test_a_segment_has_the_least_rate_over_all_its_references(output, group):
    pyter = importlib.import_module("pyter")
    (best,) = ter([" ".join(output)], [[" ".join(text) for text in group]])
    assert best == min(pyter.ter(output, text) for text in group)
    assert ter([" ".join(output)], [[" ".join(text) for text in group[::-1]]]) == [best]


def test_texts_longer_than_a_machine_word_are_measured_too(corpus):
    pyter = importlib.import_module("pyter")
    predictions, references = corpus
    output = " ".join(predictions[:4]).split()
    text = " ".join(group[0] for group in references[:8]).split()
    assert len(text) > 64
    assert edit_rate(output, text) == pyter.ter(output, text)


def test_the_paper_s_example_needs_one_shift_and_three_edits():
    """Snover et al. 2006, section 3: 4 edits for 13 words."""
    text = "SAUDI ARABIA denied THIS WEEK information published in the AMERICAN new york times"
    output = "THIS WEEK THE SAUDIS denied information published in the new york times"
    assert ter([output], [[text]]) == [4 / 13]


@pytest.mark.parametrize(
    ("output", "group", "rate"),
    [("a b", ["a b"], 0.0), ("", [""], 0.0), ("", ["a b"], 1.0), ("a b", [""], 1.0), ("a", ["", "a"], 0.0)],
)
def test_empty_texts_have_a_rate(output, group, rate):
    assert ter([output], [group]) == [rate]


def test_every_prediction_needs_its_references():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ter(["a b", "c d"], [["a b"]])
