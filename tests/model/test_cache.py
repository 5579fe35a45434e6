"""Keys and values that beams share, against every beam holding its own."""

import pytest
import torch

from lora_gpt2.model.attention import attend
from lora_gpt2.model.cache import BeamTree

PLACES, BEAMS, HEADS, WIDTH, LAYERS = 3, 4, 2, 8, 2
Tokens = list[torch.Tensor]
"""Keys and values (2, H, D) of each token that a beam descends from."""


class Owned:
    """The same without sharing: a list for each beam of each place and layer."""

    def __init__(self) -> None:
        self.tokens: list[list[list[Tokens]]] = [
            [[[] for _ in range(LAYERS)] for _ in range(BEAMS)] for _ in range(PLACES)
        ]

    def admit(self, place: int, length: int, presents: Tokens) -> None:
        for beam in range(BEAMS):
            self.tokens[place][beam] = [list(present[:, :, :length].unbind(2)) for present in presents]

    def advance(self, parents: torch.Tensor) -> None:
        self.tokens = [
            [[list(layer) for layer in place[parent]] for parent in row]
            for place, row in zip(self.tokens, parents.tolist(), strict=True)
        ]

    def attend(self, place: int, beam: int, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        own = self.tokens[place][beam][layer]
        own.append(kv)
        keys, values = torch.stack(own, dim=2)[:, None]  # (1, H, S, D) each
        return attend(q[None], keys, values, torch.ones(1, len(own), dtype=torch.bool))[0]


def contexts(length: int) -> Tokens:
    return [torch.randn(2, HEADS, length, WIDTH) for _ in range(LAYERS)]


@pytest.mark.parametrize("seed", range(5))
def test_each_beam_sees_what_it_descends_from(seed):
    """However beams branch and die, queries come and go, and the table grows and shrinks."""
    torch.manual_seed(seed)
    tree = BeamTree(LAYERS, PLACES, BEAMS, torch.empty(2, 1, HEADS, 1, WIDTH))
    owned, sizes = Owned(), set()
    alive = torch.zeros(PLACES, BEAMS, dtype=torch.bool)
    for step in range(90):
        if step % 30 == 0:  # new contexts, the second ones long
            taken = torch.tensor([0, 1, 2] if step == 0 else [1, 2])
            lengths = torch.randint(1, 150 if step == 30 else 20, (len(taken),))
            presents = [contexts(int(lengths.max())) for _ in taken]
            tree.admit(taken, lengths, [torch.stack(layer, dim=1) for layer in zip(*presents, strict=True)])
            for place, length, present in zip(taken.tolist(), lengths.tolist(), presents, strict=True):
                owned.admit(place, length, present)
            alive[taken] = True
        going_on = alive.any(dim=1, keepdim=True)
        parents = torch.where(going_on, alive.float(), 1.0).multinomial(BEAMS, replacement=True)
        alive = going_on & (torch.rand(PLACES, BEAMS) < 0.8)
        computed = alive | (torch.rand(PLACES, BEAMS) < 0.3)
        tree.advance(parents, alive, computed)
        owned.advance(parents)
        rows = computed.nonzero().tolist()
        for number, layer in enumerate(tree.layers):
            q, k, v = torch.randn(3, len(rows), HEADS, 1, WIDTH)
            found = layer.attend(q, k, v)
            assert bool(found.isfinite().all())
            for row, (place, beam) in enumerate(rows):
                if not alive[place, beam]:
                    continue
                kv = torch.stack((k[row, :, 0], v[row, :, 0]))
                expected = owned.attend(place, beam, number, q[row], kv)
                torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
        sizes.add(tree.sees.size(2))
    assert len(sizes) > 2


def test_memory_is_that_of_what_is_alive():
    """All beams of one origin, again and again: what the others said is given up."""
    tree = BeamTree(1, 1, 8, torch.empty(2, 1, HEADS, 1, WIDTH))
    tree.admit(torch.tensor([0]), torch.tensor([5]), [torch.randn(2, 1, HEADS, 5, WIDTH)])
    alive = torch.ones(1, 8, dtype=torch.bool)
    for step in range(100):
        tree.advance(torch.zeros(1, 8, dtype=torch.long), alive, alive)
        needed = 5 + step + 8  # the context, one token a step, and the newest
        assert needed <= tree.sees.size(2) < needed + 64
        tree.layers[0].attend(*torch.randn(3, 8, HEADS, 1, WIDTH))


def test_places_that_are_given_up_take_nothing_along():
    torch.manual_seed(0)
    tree = BeamTree(1, 3, 2, torch.empty(2, 1, HEADS, 1, WIDTH))
    present = torch.randn(2, 3, HEADS, 4, WIDTH)
    tree.admit(torch.tensor([0, 1, 2]), torch.tensor([4, 4, 4]), [present])
    tree.keep(torch.tensor([2, 0]))
    alive = torch.tensor([[True, False], [True, False]])
    tree.advance(torch.zeros(2, 2, dtype=torch.long), alive, alive)
    q, k, v = torch.randn(3, 2, HEADS, 1, WIDTH)
    found = tree.layers[0].attend(q, k, v)
    for row, place in enumerate((2, 0)):
        keys, values = torch.cat((present[:, place], torch.stack((k[row], v[row]))), dim=2)[:, None]
        expected = attend(q[row : row + 1], keys, values, torch.ones(1, 5, dtype=torch.bool))
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
