"""The LightningDataModule over BPE JSONL."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lora_gpt2.data.batches import Batch, EncodedRows, LengthBuckets
from lora_gpt2.data.config import DataSettings, Objective
from lora_gpt2.data.encode import encoded, read_meta
from lora_gpt2.data.jsonl import DELETE_FOLDER, Row, checked, read_rows
from lora_gpt2.data.table import read_table
from lora_gpt2.data.tokenizer import load_tokenizer
from lora_gpt2.errors import UserError
from lora_gpt2.files import sha256


class DataToText(LightningDataModule):
    """Encodes the corpus when needed and serves its splits.

    ``folder`` holds the encoded files, ``meta`` what is known of them, ``tokenizer`` is theirs.
    """

    def __init__(self, settings: DataSettings, tokenizer: str, *seeds: int) -> None:
        """`tokenizer` is the source to use where the settings name none.

        With several `seeds` a training batch is a list: one of each order.
        """
        super().__init__()
        self.settings, self.seeds = settings, seeds
        root = Path(settings.root).expanduser() if settings.root else None
        self.folder = encoded(
            settings.corpus.value, root, settings.tokenizer or tokenizer, Path(settings.cache).expanduser()
        )
        self.meta = read_meta(self.folder)
        self.tokenizer = load_tokenizer(str(self.folder / "tokenizer"))
        if self.tokenizer.sha256 != self.meta["tokenizer"]["sha256"]:
            what = "is damaged: it is not what the rows were encoded with"
            raise UserError(self.folder / "tokenizer", what, DELETE_FOLDER)
        self._rows: dict[str, EncodedRows] = {}
        self._train_sha256 = ""

    def expected(self, file: Path) -> str | None:
        """The SHA-256 that one of the encoded files had when it was written, where that is known."""
        found: str | None = self.meta["files"].get(file.name)
        return found

    def rows(self, split: str, positions: int) -> Iterator[Row]:
        """The rows of a split. Raises UserError for one whose context leaves no position for an answer."""
        path = self.folder / f"{split}.jsonl"
        checked(path, self.expected(path))
        for number, row in enumerate(read_rows(path, self.tokenizer.vocab_size)):
            _check_context(path, number, len(row.context), positions)
            yield row

    def split(self, name: str, positions: int) -> EncodedRows:
        every_token = self.settings.objective is Objective.jlm
        packed = self.settings.pack and name == "train"
        path = self.folder / f"{name}.jsonl"
        cache = Path(self.settings.cache).expanduser()
        table = read_table(path, self.tokenizer.vocab_size, cache, self.expected(path))
        for number in (table.contexts >= positions).nonzero()[:1].flatten().tolist():
            _check_context(path, number, int(table.contexts[number]), positions)
        return EncodedRows(table, self.settings.seq_len, every_token, packed, self.settings.pad_multiple)

    def load(self, positions: int) -> None:
        """Reads the splits that training needs. Raises UserError for any row that cannot be used."""
        if self.settings.seq_len > positions:
            what = f"{self.settings.seq_len} is more than the model's {positions} positions"
            raise UserError("data.seq_len", what, f"set data.seq_len={positions} or use a larger model")
        self._rows = {name: self.split(name, positions) for name in ("train", "valid")}
        train = self.folder / "train.jsonl"
        self._train_sha256 = self.expected(train) or sha256(train)

    @property
    def train_rows(self) -> EncodedRows:
        return self._rows["train"]

    @property
    def valid_rows(self) -> EncodedRows:
        return self._rows["valid"]

    def state_dict(self) -> dict[str, Any]:
        """Which rows they are, through which a run goes in its order."""
        return {"train_sha256": self._train_sha256}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UserError for the state of a run over other rows."""
        if state_dict != self.state_dict():
            what = "the checkpoint is of a run over other rows, or in another order"
            raise UserError("resume", what, "give the corpus and the tokenizer of that run")

    def train_dataloader(self) -> DataLoader[Batch] | CombinedLoader:
        rows, size = self.train_rows, self.settings.batch_size
        loaders = [self._loader(rows, size, seed, shuffle=True, skip=self._served) for seed in self.seeds]
        return loaders[0] if len(loaders) == 1 else CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> DataLoader[Batch]:
        size = self.settings.eval_batch_size * self._ranks
        return self._loader(self.valid_rows, size, self.seeds[0], shuffle=False)

    @property
    def _ranks(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _loader(self, rows: EncodedRows, batch_size: int, seed: int, **options: Any) -> DataLoader[Batch]:
        batches = LengthBuckets(
            rows.lengths,
            batch_size,
            seed=seed,
            bucket=self.settings.bucket,
            rank=self.trainer.global_rank if self.trainer else 0,
            ranks=self._ranks,
            **options,
        )
        return DataLoader(rows, sampler=batches, batch_size=None)

    def _served(self) -> int:
        """Batches of this epoch that were trained on, before the run was resumed."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer else 0


def _check_context(path: Path, number: int, tokens: int, positions: int) -> None:
    if tokens >= positions:
        what = f"a context of {tokens} tokens does not fit {positions} positions"
        raise UserError(f"{path}:{number + 1}", what, "remove the row or use a model with more positions")
