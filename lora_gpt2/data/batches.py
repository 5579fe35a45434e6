"""Rows to batches: dynamic padding, length buckets, a fair share for each rank.  B rows, T tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from lora_gpt2.data.jsonl import Row
from lora_gpt2.data.table import RowTable
from lora_gpt2.errors import UserError

PAD = 0
"""The published implementation pads with token 0; behind every real token, it is never read."""


class Batch(NamedTuple):
    input_ids: Tensor
    """(B, T) the rows, right-padded, without the last column."""
    labels: Tensor
    """(B, T) the rows without the first column: the next tokens."""
    mask: Tensor
    """(B, T) true where the label counts: completion tokens, or every real one (jlm)."""
    rows: Tensor
    """(B,) row numbers in the file."""
    tokens: int
    """Tokens that the model runs over, padding left out."""
    position_ids: Tensor | None = None
    """(B, T) where rows are packed: they start again at 0 with each row."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a loss is computed from: input ids, labels, mask, and positions where rows are packed."""
        rows = self.input_ids, self.labels, self.mask
        return rows if self.position_ids is None else (*rows, self.position_ids)

    def packed(self, line: int, multiple: int = 1) -> "Batch":
        """The rows one behind another, the longest first, each in the first line of `line` tokens it fits.

        T is padded to a `multiple`, up to `line`.
        """
        places = torch.arange(1, self.mask.size(1) + 1)
        lengths = (self.mask * places).amax(dim=1).tolist()  # what lies behind the last target is not needed
        lines: list[list[int]] = []
        room: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            place = next((place for place, free in enumerate(room) if free >= lengths[i]), len(lines))
            if place == len(lines):
                lines.append([])
                room.append(line)
            lines[place].append(i)
            room[place] -= lengths[i]

        def laid(values: Tensor) -> Tensor:
            parts = [torch.cat([values[i, : lengths[i]] for i in members]) for members in lines]
            laid_out = pad_sequence(parts, batch_first=True)
            width = laid_out.size(1)
            return F.pad(laid_out, (0, _rounded_up(width, multiple, line) - width))

        positions = torch.arange(self.input_ids.size(1)).expand_as(self.input_ids)
        ids, labels, mask = laid(self.input_ids), laid(self.labels), laid(self.mask)
        return Batch(ids, labels, mask, self.rows, self.tokens, laid(positions))


class EncodedRows(Dataset[Batch]):
    """All rows of a split, indexed by lists of row numbers: one index, one batch.

    `seq_len` cuts rows (context and completion together); ``cut`` counts those that lost tokens and
    ``lost`` those of them that kept no completion token.
    """

    def __init__(
        self,
        rows: RowTable | Iterable[Row],
        seq_len: int,
        every_token: bool = False,
        packed: bool = False,
        multiple: int = 1,
    ) -> None:
        """`packed`: see `Batch.packed`; lines have up to `seq_len` - 1 tokens, as the longest row has.

        T is padded to a `multiple`, up to `seq_len` - 1.
        """
        self.every_token, self.seq_len, self.packed, self.multiple = every_token, seq_len, packed, multiple
        table = rows if isinstance(rows, RowTable) else RowTable.of(rows)
        self.tokens, whole, contexts = table
        self.cut = int((whole > seq_len).sum())
        self.lost = int((contexts >= seq_len).sum())
        self.starts = whole.cumsum(0) - whole
        self.lengths = whole.clamp(max=seq_len)
        """(rows,) tokens of each row after cutting."""
        self.contexts = contexts.clamp(max=seq_len)

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        index = torch.as_tensor(rows)
        starts, lengths = self.starts[index], self.lengths[index]
        width = _rounded_up(int(lengths.max()) - 1, self.multiple, self.seq_len - 1)
        columns = torch.arange(width + 1)
        real = columns < lengths[:, None]  # (B, T + 1)
        places = (starts[:, None] + columns).clamp(max=len(self.tokens) - 1)
        ids = torch.where(real, self.tokens[places].long(), PAD)
        counts = real[:, 1:]
        if not self.every_token:
            counts = counts & (columns[1:] >= self.contexts[index, None])
        tokens = int(lengths.sum()) - len(index)
        batch = Batch(ids[:, :-1], ids[:, 1:], counts, index, tokens)
        return batch.packed(self.seq_len - 1, self.multiple) if self.packed else batch


def _rounded_up(tokens: int, multiple: int, most: int) -> int:
    """To the next multiple, but not beyond `most`."""
    return min(-(-tokens // multiple) * multiple, most)


class LengthBuckets(Sampler[list[int]]):
    """Lists of row numbers, each row once an epoch: one rank's share of batches that all `ranks` share.

    Rows are shuffled, cut into buckets of `bucket` batches, sorted by length inside a bucket, cut into
    batches, and the batches shuffled again; `bucket` 0 turns sorting off. The order depends on `seed` and
    the epoch alone, and so does a batch: it has the same rows over one device and over many. Sizes differ by
    one row at most and none exceeds `batch_size`. Without `shuffle` rows come longest first. An epoch
    that was interrupted goes on behind the first `skip()` batches.
    """

    def __init__(
        self,
        lengths: Tensor,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        bucket: int = 100,
        rank: int = 0,
        ranks: int = 1,
        skip: Callable[[], int] = lambda: 0,
    ) -> None:
        """Raises UserError where a batch has no row for some rank, for which the others would wait."""
        self.lengths, self.batch_size, self.shuffle = lengths, batch_size, shuffle
        self.seed, self.bucket, self.rank, self.ranks = seed, bucket, rank, ranks
        self.skip, self.epoch = skip, 0
        self.batches = -(-len(lengths) // batch_size)
        fewest = len(lengths) // max(1, self.batches)
        if fewest < ranks:
            what = f"a batch of {fewest} rows is too small for {ranks} devices"
            key = "data.batch_size" if shuffle else "data.eval_batch_size"
            raise UserError(key, what, "set it higher, or trainer.devices lower")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        order, turns = self._order()
        for number in range(self.skip(), self.batches):
            turn = int(turns[number])
            start, end = (i * len(order) // self.batches for i in (turn, turn + 1))
            yield order[start:end][self.rank :: self.ranks].tolist()

    def _order(self) -> tuple[Tensor, Tensor]:
        """The rows as they are cut into batches, and the batches in their turn."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if not self.shuffle:
            order = torch.sort(self.lengths, descending=True, stable=True).indices
            return order, torch.arange(self.batches)
        order = torch.randperm(len(self.lengths), generator=generator)
        if self.bucket:
            parts = torch.split(order, self.bucket * self.batch_size)
            order = torch.cat([part[self.lengths[part].sort(stable=True).indices] for part in parts])
        return order, torch.randperm(self.batches, generator=generator)
