"""Rows that are packed are the same rows: same targets, same loss, none read by another."""

import pytest
import torch

from lora_gpt2.data.batches import EncodedRows
from lora_gpt2.data.jsonl import Row
from lora_gpt2.model import attention
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel


def rows(count: int, seq_len: int, *, packed: bool, every_token: bool = False) -> EncodedRows:
    generator = torch.Generator().manual_seed(0)

    def ids(most: int) -> list[int]:
        size = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(1, 300, (size,), generator=generator).tolist()

    return EncodedRows((Row(ids(12), ids(9)) for _ in range(count)), seq_len, every_token, packed)


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("seq_len", [8, 20, 64, 512])
def test_packed_lines_hold_the_rows_targets_and_positions(seq_len, every_token):
    plain, packed = (rows(30, seq_len, packed=kind, every_token=every_token) for kind in (False, True))
    members = list(range(30))
    batch, lines = plain[members], packed[members]
    assert lines.input_ids.size(1) < seq_len
    assert len(lines.input_ids) < 30 or seq_len == 8
    assert int(lines.mask.sum()) == int(batch.mask.sum())
    found = set(map(tuple, triples(lines).tolist()))
    assert found == set(map(tuple, triples(batch).tolist()))
    assert lines.tokens == batch.tokens
    assert torch.equal(lines.rows, batch.rows)


def triples(batch) -> torch.Tensor:
    """Input, label and position of every target."""
    places = batch.position_ids
    if places is None:
        places = torch.arange(batch.input_ids.size(1)).expand_as(batch.input_ids)
    return torch.stack([part[batch.mask] for part in (batch.input_ids, batch.labels, places)], 1)


@pytest.mark.parametrize("below", [0, 512], ids=["fused attention", "plain attention"])
@pytest.mark.parametrize("seq_len", [24, 100, 512])
def test_the_packed_loss_and_its_gradients_are_the_unpacked_ones(monkeypatch, seq_len, below):
    monkeypatch.setattr(attention, "_PLAIN_BELOW", below)
    members, results = [3, 1, 4, 15, 9, 2, 6], []
    for packed in (False, True):
        torch.manual_seed(0)
        model = GPT2LMModel(GPT2Config(300, 64, 64, 32, 2, 4, initializer_range=0.2)).double()
        batch = rows(30, seq_len, packed=packed)[members]
        loss = model.completion_loss(batch.input_ids, batch.labels, batch.mask, 0.1, batch.position_ids)
        loss.backward()
        results.append((loss, model.transformer.wte.weight.grad, model.transformer.wpe.weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)  # head_loss sums in float32


def test_a_row_that_lost_its_completion_is_left_out():
    short = EncodedRows([Row([5] * 9, [1]), Row([7], [8, 9])], 6, packed=True)
    batch = short[[0, 1]]
    assert batch.input_ids.tolist() == [[7, 8]]


@pytest.mark.parametrize(("multiple", "width"), [(1, 13), (4, 16), (8, 16), (100, 19)])
def test_batches_are_padded_to_a_multiple_up_to_the_longest_row(multiple, width):
    found = EncodedRows([Row([1] * 9, [2] * 5), Row([1], [3])], 20, multiple=multiple)[[0, 1]]
    assert found.input_ids.shape == (2, width)
    assert int(found.mask.sum()) == 6
