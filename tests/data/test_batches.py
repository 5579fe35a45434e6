from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_gpt2.data.batches import PAD, EncodedRows, LengthBuckets
from lora_gpt2.data.jsonl import Row
from lora_gpt2.errors import UserError

ROWS = [Row([11, 12, 9], [13, 9]), Row([21, 9], [22, 23, 24, 9]), Row([9], [31, 9])]


def test_labels_are_the_next_tokens_and_count_on_the_completion_alone():
    batch = EncodedRows(ROWS, 512)[[0, 1]]
    assert batch.input_ids.tolist() == [[11, 12, 9, 13, 9], [21, 9, 22, 23, 24]]
    assert batch.labels.tolist() == [[12, 9, 13, 9, PAD], [9, 22, 23, 24, 9]]
    assert batch.mask.tolist() == [[False, False, True, True, False], [False, True, True, True, True]]
    assert (batch.rows.tolist(), batch.tokens) == ([0, 1], 9)


def test_with_jlm_every_real_token_counts():
    batch = EncodedRows(ROWS, 512, every_token=True)[[2, 0]]
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]


def test_cut_rows_are_counted_and_lose_their_ends():
    rows = EncodedRows(ROWS, 3)
    assert (rows.cut, rows.lost) == (2, 1)  # of the first row only its context is left
    assert rows.lengths.tolist() == [3, 3, 3]
    assert rows[[0]].input_ids.tolist() == [[11, 12]]
    assert not rows[[0]].mask.any()
    assert rows[[1]].mask.tolist() == [[False, True]]


lengths = st.lists(st.integers(2, 60), min_size=1, max_size=80).map(torch.tensor)


@given(lengths, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.booleans())
def test_every_row_comes_once_an_epoch_over_all_ranks(lengths, size, ranks, bucket, shuffle):
    assume(len(lengths) // -(-len(lengths) // size) >= ranks)
    of_rank = [
        LengthBuckets(lengths, size, shuffle=shuffle, bucket=bucket, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    batches = [list(sampler) for sampler in of_rank]
    assert [len(sampler) for sampler in of_rank] == list(map(len, batches))
    assert len(set(map(len, batches))) == 1
    served = [row for rank in batches for batch in rank for row in batch]
    assert Counter(served) == Counter(range(len(lengths)))
    assert all(1 <= len(batch) <= size for rank in batches for batch in rank)


def order(seed: int, epoch: int, bucket: int = 2, skip: int = 0) -> list[list[int]]:
    lengths = torch.randint(2, 60, (100,), generator=torch.Generator().manual_seed(1))
    sampler = LengthBuckets(lengths, 8, shuffle=True, seed=seed, bucket=bucket, skip=lambda: skip)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_order_depends_on_seed_and_epoch_alone():
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_an_interrupted_epoch_goes_on_where_it_stopped():
    assert order(1, 3, skip=5) == order(1, 3)[5:]


def test_buckets_save_padding():
    lengths = torch.randint(2, 60, (100,), generator=torch.Generator().manual_seed(1))

    def padding(bucket: int) -> int:
        return sum(int(lengths[rows].max() * len(rows) - lengths[rows].sum()) for rows in order(1, 0, bucket))

    assert padding(20) < 0.3 * padding(0)


@pytest.mark.parametrize(("shuffle", "key"), [(True, "data.batch_size"), (False, "data.eval_batch_size")])
def test_too_few_rows_for_the_ranks_are_refused(shuffle, key):
    with pytest.raises(UserError, match=f"{key}: a batch of 2 rows is too small for 3 devices"):
        LengthBuckets(torch.tensor([4, 5]), 8, shuffle=shuffle, ranks=3)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_every_rank_skips_its_own_first_batches(rank):
    lengths = torch.randint(2, 60, (100,), generator=torch.Generator().manual_seed(1))
    whole, rest = (
        list(LengthBuckets(lengths, 8, shuffle=True, rank=rank, ranks=3, skip=lambda n=n: n)) for n in (0, 2)
    )
    assert rest == whole[2:]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_step_has_the_same_rows_on_one_device_and_on_many(ranks):
    lengths = torch.randint(2, 60, (100,), generator=torch.Generator().manual_seed(1))

    def served(rank: int, ranks: int) -> list[list[int]]:
        return list(LengthBuckets(lengths, 8, shuffle=True, seed=3, rank=rank, ranks=ranks))

    shares = [served(rank, ranks) for rank in range(ranks)]
    for alone, *together in zip(served(0, 1), *shares, strict=True):
        assert sorted(alone) == sorted(row for share in together for row in share)


def test_rows_too_few_for_full_batches_are_still_shared_fairly():
    lengths = torch.tensor([3, 4, 5, 6, 7])
    of_rank = [list(LengthBuckets(lengths, 8, shuffle=True, rank=rank, ranks=4)) for rank in range(4)]
    assert [len(batches) for batches in of_rank] == [1, 1, 1, 1]
    assert sorted(row for batches in of_rank for batch in batches for row in batch) == [0, 1, 2, 3, 4]
