"""The prediction loop: each different context once, spread over the ranks, written in row order."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn
from torch.utils.data import Dataset

from lora_gpt2.decoding.beam import Hypothesis
from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.files import write_text
from lora_gpt2.model.language_model import GPT2LMModel


class Query(NamedTuple):
    number: int
    context: list[int]
    adapter: str = ""


class Queries(Dataset[list[Query]]):
    """What a split asks for: its different contexts in order of first appearance.

    ``of_row``: which one a row has; ``adapters``: whom each one asks, the same context with two adapters
    being two queries.
    """

    def __init__(self, rows: Iterable[tuple[str, Sequence[int]]], longest: int) -> None:
        """`rows`: (adapter, context). A context is cut to its last `longest` tokens; ``cut`` counts those."""
        numbers: dict[tuple[str, tuple[int, ...]], int] = {}
        found = (numbers.setdefault((adapter, tuple(context)), len(numbers)) for adapter, context in rows)
        self.of_row = dict(enumerate(found))
        self.adapters = [adapter for adapter, _ in numbers]
        self.contexts = [list(context[-longest:]) for _, context in numbers]
        self.cut = sum(len(context) > longest for _, context in numbers)

    def __len__(self) -> int:
        return len(self.contexts)

    def __getitem__(self, numbers: Sequence[int]) -> list[Query]:
        return [Query(number, self.contexts[number], self.adapters[number]) for number in numbers]

    def limit(self, count: int) -> None:
        """Keeps the first `count` contexts and the rows that have them."""
        self.contexts, self.adapters = self.contexts[:count], self.adapters[:count]
        self.of_row = {row: number for row, number in self.of_row.items() if number < count}


class Decoding(LightningModule):
    """Decodes one batch of queries, each by the model of the adapter that it asks for."""

    def __init__(
        self, models: Mapping[str, GPT2LMModel], settings: DecodingSettings, end_tokens: list[int]
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer queries than ranks
        self.names, self.models = list(models), nn.ModuleList(models.values())
        self.settings, self.end_tokens = settings, end_tokens

    def predict_step(self, batch: list[Query], batch_idx: int) -> list[Hypothesis]:
        found: dict[int, Hypothesis] = {}
        for name in dict.fromkeys(query.adapter for query in batch):
            queries = [query for query in batch if query.adapter == name]
            model = cast(GPT2LMModel, self.models[self.names.index(name)])
            outputs = decode(model, [query.context for query in queries], self.settings, self.end_tokens)
            found |= {query.number: output for query, output in zip(queries, outputs, strict=True)}
        return [found[query.number] for query in batch]

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
    queries: Queries,
    hypotheses: Sequence[Hypothesis],
    texts: Sequence[str],
    eval_len: int,
) -> None:
    """One line a row, in order: {"id", "predict", "score", "text"}, predict zero-padded to `eval_len`.

    "adapter" is there where the row asked for one.
    """
    lines = []
    for row, number in queries.of_row.items():
        tokens, score = hypotheses[number]
        predict = tokens + [0] * (eval_len - len(tokens))
        line = {"id": row, "predict": predict, "score": score, "text": texts[number]}
        if adapter := queries.adapters[number]:
            line["adapter"] = adapter
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
