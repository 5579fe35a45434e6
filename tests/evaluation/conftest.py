"""Random texts that share words, so that every metric has something to find."""

import random

import pytest

WORDS = ["the", "a", "pub", "café", "near", "river", "serves", "cheap", "food", "family-friendly", "£20-25"]
Corpus = tuple[list[str], list[list[str]]]


@pytest.fixture
def corpus() -> Corpus:
    """30 predictions of 5 to 14 words, each with 1 to 4 references."""
    generator = random.Random(7)

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(5, 14))).capitalize() + "."

    return [text() for _ in range(30)], [[text() for _ in range(generator.randint(1, 4))] for _ in range(30)]
