"""The prediction loop: each different context once, spread over the ranks, written in row order."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import Dataset

from lora_gpt2.decoding.beam import Hypothesis
from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.files import write_text
from lora_gpt2.model.language_model import GPT2LMModel


class Query(NamedTuple):
    number: int
    context: list[int]


class Queries(Dataset[list[Query]]):
    """The different contexts of a split in order of first appearance; ``of_row``: which one a row has."""

    def __init__(self, contexts: Iterable[Sequence[int]], longest: int) -> None:
        """A context is cut to its last `longest` tokens; ``cut`` counts those."""
        numbers: dict[tuple[int, ...], int] = {}
        found = (numbers.setdefault(tuple(context), len(numbers)) for context in contexts)
        self.of_row = dict(enumerate(found))
        self.contexts = [list(context[-longest:]) for context in numbers]
        self.cut = sum(len(context) > longest for context in numbers)

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, numbers: Sequence[int]) -> list[Query]:
        return [Query(number, self.contexts[number]) for number in numbers]

    def limit(self, count: int) -> None:
        """Keeps the first `count` contexts and the rows that have them."""
        self.contexts = self.contexts[:count]
        self.of_row = {row: number for row, number in self.of_row.items() if number < count}


class Decoding(LightningModule):
    """Decodes one batch of queries."""

    def __init__(self, model: GPT2LMModel, settings: DecodingSettings, end_tokens: list[int]) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer queries than ranks
        self.model, self.settings, self.end_tokens = model, settings, end_tokens

    def predict_step(self, batch: list[Query], batch_idx: int) -> list[Hypothesis]:
        return decode(self.model, [query.context for query in batch], self.settings, self.end_tokens)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch  # plain lists; `decode` makes the tensors


class PartWriter(BasePredictionWriter):
    """Appends each rank's hypotheses to a file of its own, as they come."""

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        part_file(self.folder, trainer.global_rank).write_text("", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[Hypothesis],
        batch_indices: Sequence[int] | None,
        batch: list[Query],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        with open(part_file(self.folder, trainer.global_rank), "a", encoding="utf-8") as file:
            for query, hypothesis in zip(batch, prediction, strict=True):
                file.write(json.dumps([query.number, hypothesis.tokens, hypothesis.score]) + "\n")


def part_file(folder: Path, rank: int) -> Path:
    return folder / f".part-{rank}.jsonl"


def merge_parts(folder: Path, ranks: int, queries: int) -> list[Hypothesis]:
    """The hypotheses of all ranks by query number; their files are removed."""
    found: dict[int, Hypothesis] = {}
    for rank in range(ranks):
        for line in part_file(folder, rank).read_text(encoding="utf-8").splitlines():
            number, tokens, score = json.loads(line)
            assert number not in found, f"query {number} was decoded twice"
            found[number] = Hypothesis(tokens, score)
    assert len(found) == queries, f"{len(found)} of {queries} queries were decoded"
    for rank in range(ranks):
        part_file(folder, rank).unlink()
    return [found[number] for number in range(queries)]


def write_predictions(
    path: Path,
    of_row: Mapping[int, int],
    hypotheses: Sequence[Hypothesis],
    texts: Sequence[str],
    eval_len: int,
) -> None:
    """One line a row, in order: {"id", "predict", "score", "text"}, predict zero-padded to `eval_len`."""
    lines = []
    for row, number in of_row.items():
        tokens, score = hypotheses[number]
        predict = tokens + [0] * (eval_len - len(tokens))
        line = {"id": row, "predict": predict, "score": score, "text": texts[number]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
