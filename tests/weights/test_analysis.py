"""Figures about an adapter, against their definitions written out."""

import pytest
import torch

from lora_gpt2.weights.analysis import Analysis, analyse, similarities, similarity
from lora_gpt2.weights.factors import Factors
from tests.weights.test_factors import build, deltas, update


def test_every_projection_has_the_spectrum_of_its_own_update():
    model = build(["q", "v", "mlp_c_fc"], 1, lora_rslora=True)
    found = analyse(update(model), model.weights())
    assert [(one.layer, one.part) for one in found] == [
        (f"h.{i}.{kind}", part)
        for i in (0, 1)
        for kind, part in (("attn.c_attn", "q"), ("attn.c_attn", "v"), ("mlp.c_fc", ""))
    ]
    for one in found:
        delta = deltas(model)[one.layer].double()
        base = model.weights()[f"transformer.{one.layer}.weight"].T.double()
        rows = {"": slice(None), "q": slice(12), "v": slice(24, 36)}[one.part]
        delta, base = delta[rows], base[rows]
        u, s, vh = torch.linalg.svd(delta)
        torch.testing.assert_close(one.spectrum, s[:3], rtol=1e-5, atol=1e-6)
        assert one.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert one.relative_norm == pytest.approx(float(delta.norm() / base.norm()), rel=1e-5)
        projected = u[:, :3].T @ base @ vh[:3].T
        assert one.amplification == pytest.approx(float(delta.norm() / projected.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("spectrum", "effective"), [([2.0, 2.0, 2.0], 3.0), ([5.0, 0.0], 1.0), ([0.0, 0.0], 0.0)]
)
def test_the_effective_rank_counts_equal_values(spectrum, effective):
    one = Analysis("h.0", "", torch.tensor(spectrum), None, None)
    assert one.effective_rank == pytest.approx(effective)


def test_energy_is_the_share_of_the_squares():
    one = Analysis("h.0", "", torch.tensor([3.0, 4.0]).sort(descending=True)[0], None, None)
    assert (one.energy(1), one.energy(2)) == (pytest.approx(16 / 25), 1.0)
    assert Analysis("h.0", "", torch.zeros(2), None, None).energy(1) == 1.0


def test_an_update_that_is_zero_amplifies_nothing():
    zero = {"h.0.attn.c_proj": [Factors(torch.zeros(12, 2), torch.ones(2, 12))]}
    (one,) = analyse(zero, {"transformer.h.0.attn.c_proj.weight": torch.ones(12, 12)})
    assert (one.norm, one.amplification, one.effective_rank) == (0.0, None, 0.0)


def test_similarity_is_the_papers_formula():
    torch.manual_seed(2)
    one, other = (Factors(torch.zeros(5, rank), torch.randn(rank, 8)) for rank in (3, 4))
    spaces = [torch.linalg.svd(pair.a.double())[2] for pair in (one, other)]
    grid = similarity(one, other)
    for i in range(1, 4):
        for j in range(1, 5):
            expected = (spaces[0][:i] @ spaces[1][:j].T).square().sum() / min(i, j)
            torch.testing.assert_close(grid[i - 1, j - 1], expected)


def test_an_adapter_shares_all_of_itself_and_nothing_with_what_stands_upright():
    torch.manual_seed(3)
    a = torch.randn(2, 6)
    same = similarity(Factors(torch.zeros(5, 2), a), Factors(torch.zeros(5, 2), 3 * a))
    torch.testing.assert_close(same[-1, -1], torch.tensor(1.0).double())
    eye = torch.eye(6)
    assert not similarity(Factors(eye, eye[:2]), Factors(eye, eye[2:5])).any()


def test_two_adapters_are_compared_where_both_adapt():
    found = similarities(update(build(["q", "v"], 4)), update(build(["v", "c_proj"], 5)))
    assert list(found) == [("h.0.attn.c_attn", "v"), ("h.1.attn.c_attn", "v")]


def test_zeros_that_fill_up_a_rank_share_no_subspace():
    torch.manual_seed(0)
    one, other = (Factors(torch.randn(6, 2), torch.randn(2, 8)) for _ in range(2))
    padded = Factors(torch.cat((one.b, torch.zeros(6, 1)), 1), torch.cat((one.a, torch.zeros(1, 8))))
    assert torch.allclose(similarity(padded, other), similarity(one, other))
