"""The LightningDataModule over BPE JSONL."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from lora_gpt2.data.batches import Batch, EncodedRows, LengthBuckets
from lora_gpt2.data.config import DataSettings, Objective
from lora_gpt2.data.encode import encoded
from lora_gpt2.data.jsonl import Row, read_rows
from lora_gpt2.data.tokenizer import load_tokenizer
from lora_gpt2.errors import UserError
from lora_gpt2.files import read_json


class DataToText(LightningDataModule):
    """Encodes the corpus when needed and serves its splits.

    ``folder`` holds the encoded files, ``meta`` what is known of them, ``tokenizer`` is theirs.
    """

    def __init__(self, settings: DataSettings, tokenizer: str, seed: int) -> None:
        """`tokenizer` is the source to use where the settings name none."""
        super().__init__()
        self.settings, self.seed = settings, seed
        root = Path(settings.root).expanduser() if settings.root else None
        self.folder = encoded(
            settings.corpus.value, root, settings.tokenizer or tokenizer, Path(settings.cache).expanduser()
        )
        self.meta: dict[str, Any] = read_json(self.folder / "meta.json", "encode the corpus again")
        self.tokenizer = load_tokenizer(str(self.folder / "tokenizer"))
        self._train: EncodedRows | None = None
        self._train_batches: LengthBuckets | None = None
        self._resume_from = 0

    def rows(self, split: str, positions: int) -> Iterator[Row]:
        """The rows of a split. Raises UserError for one whose context leaves no position for an answer."""
        path = self.folder / f"{split}.jsonl"
        for line, row in enumerate(read_rows(path, self.tokenizer.vocab_size), start=1):
            if len(row.context) >= positions:
                what = f"a context of {len(row.context)} tokens does not fit {positions} positions"
                raise UserError(f"{path}:{line}", what, "remove the row or use a model with more positions")
            yield row

    def split(self, name: str, positions: int) -> EncodedRows:
        every_token = self.settings.objective is Objective.jlm
        return EncodedRows(self.rows(name, positions), self.settings.seq_len, every_token)

    def load(self, positions: int) -> None:
        """Reads the splits that training needs. Raises UserError for any row that cannot be used."""
        if self.settings.seq_len > positions:
            what = f"{self.settings.seq_len} is more than the model's {positions} positions"
            raise UserError("data.seq_len", what, f"set data.seq_len={positions} or use a larger model")
        self._train, self._valid = self.split("train", positions), self.split("valid", positions)

    @property
    def train_rows(self) -> EncodedRows:
        assert self._train is not None, "load() comes first"
        return self._train

    @property
    def valid_rows(self) -> EncodedRows:
        return self._valid

    def train_dataloader(self) -> DataLoader[Batch]:
        batches = self._batches(self.train_rows, self.settings.batch_size, shuffle=True)
        batches.start, self._resume_from = self._resume_from, 0
        return self._loader(self.train_rows, batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(
            self._valid, self._batches(self._valid, self.settings.eval_batch_size, shuffle=False)
        )

    def _batches(self, rows: EncodedRows, batch_size: int, shuffle: bool) -> LengthBuckets:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return LengthBuckets(
            rows.lengths,
            batch_size,
            shuffle=shuffle,
            seed=self.seed,
            bucket=self.settings.bucket,
            rank=rank,
            ranks=ranks,
        )

    def _loader(self, rows: EncodedRows, batches: LengthBuckets) -> DataLoader[Batch]:
        return DataLoader(
            rows,
            sampler=batches,
            batch_size=None,
            num_workers=self.settings.workers,
            persistent_workers=self.settings.workers > 0,
            pin_memory=False,
        )
