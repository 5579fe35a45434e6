import numpy as np
import pytest

from lora_gpt2.evaluation import meteor
from lora_gpt2.evaluation.scorer import e2e_statistics, score_e2e, score_webnlg, webnlg_statistics
from lora_gpt2.evaluation.significance import interval, p_value, resampled
from lora_gpt2.evaluation.statistics import mean


@pytest.fixture(autouse=True)
def _without_meteor(monkeypatch):
    """Its statistics have a test of their own."""
    monkeypatch.setattr(meteor, "find_jar", lambda name: None)


@pytest.fixture(params=["e2e", "webnlg"])
def both(request):
    """Scores and statistics by the conventions of each benchmark, of two systems."""
    score, statistics = {
        "e2e": (score_e2e, e2e_statistics),
        "webnlg": (score_webnlg, webnlg_statistics),
    }[request.param]
    return score, statistics


def worse(texts: list[str]) -> list[str]:
    return [" ".join(text.split()[::-1]) if number % 2 else text for number, text in enumerate(texts)]


def test_the_score_of_a_corpus_is_that_of_its_summed_statistics(both, corpus):
    predictions, references = corpus
    score, statistics = both
    found = statistics([predictions, worse(predictions)], references)
    for system, texts in zip(found, (predictions, worse(predictions)), strict=True):
        scores = {one.name: one.value for one in score(texts, references)}
        assert system.keys() == scores.keys() - {"meteor"}
        for name, one in system.items():
            assert one.of() == pytest.approx(scores[name], rel=1e-9), name


def test_a_system_against_itself_and_against_a_worse_one(both, corpus):
    references = [group for group in corpus[1] for _ in range(4)]
    ours = [group[0] for group in references]
    good, same, bad = both[1]([ours, ours, worse(worse(ours)[::-1])], references)
    for name, one in good.items():
        assert p_value(one, same[name]) == 1.0
        assert p_value(one, bad[name]) < 0.01, name


def test_intervals_hold_the_score_and_narrow_with_the_segments():
    values = np.random.default_rng(1).normal(size=800)
    few, many = (interval(resampled(mean(list(values[:count])))) for count in (50, 800))
    assert few.low < values[:50].mean() < few.high
    assert many.high - many.low < (few.high - few.low) / 2
    # Normal theory: 1.96 standard errors on either side.
    assert many.high - many.low == pytest.approx(2 * 1.96 * values.std() / 800**0.5, rel=0.1)


def test_chance_is_found_as_often_as_it_should_be():
    """Of pairs of systems that differ by chance alone, about one in twenty has p below 0.05."""
    random = np.random.default_rng(2)
    found = [
        p_value(mean(list(random.normal(size=60))), mean(list(random.normal(size=60))), resamples=200)
        for _ in range(200)
    ]
    assert 2 <= sum(p < 0.05 for p in found) <= 22


def test_the_same_seed_draws_the_same_segments():
    one = mean([0.0, 1.0, 2.0, 5.0])
    assert resampled(one, 20, seed=3).tolist() == resampled(one, 20, seed=3).tolist()
    assert resampled(one, 20, seed=3).tolist() != resampled(one, 20, seed=4).tolist()
