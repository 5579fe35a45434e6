"""The prediction loop: each different context once, spread over the ranks, written in row order."""

import contextlib
import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import IO, Any, cast
from zlib import crc32

from lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import Query, decode_stream
from lora_gpt2.decoding.phrases import Phrases
from lora_gpt2.decoding.state import Beams, Hypothesis
from lora_gpt2.errors import UserError
from lora_gpt2.files import replacing
from lora_gpt2.model.inference import prepare_for_decoding
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.settings import Precision
from lora_gpt2.signals import Signals

_CHUNK = 1024
"""Queries that are handed to a rank at a time; the last ones of each leave places idle."""


class Queries(Dataset[list[Query]]):
    """What a split asks for: its different contexts in order of first appearance.

    ``of_row``: which one a row has; ``adapters`` and ``phrases``: whom each one asks and what its output must
    contain; the same context with other ones is another query. Of a context four bytes a token are held.
    """

    def __init__(self, rows: Iterable[tuple[str, Sequence[int], Phrases]], longest: int) -> None:
        """`rows`: (adapter, context, phrases). A context is cut to its last `longest` tokens;
        ``cut`` counts those.
        """
        numbers: dict[bytes, int] = {}
        self.of_row: dict[int, int] = {}
        self.adapters: list[str] = []
        self.phrases: dict[int, Phrases] = {}  # few have any
        self._tokens, self._ends = array("i"), array("q", [0])
        self.cut = 0
        for row, (adapter, context, phrases) in enumerate(rows):
            told = json.dumps([adapter, phrases]).encode() + array("i", context).tobytes()
            digest = sha256(told).digest()
            number = self.of_row[row] = numbers.setdefault(digest, len(numbers))
            if number == len(self.adapters):
                self.adapters.append(adapter)
                if phrases:
                    self.phrases[number] = phrases
                self._tokens.extend(context[-longest:])
                self._ends.append(len(self._tokens))
                self.cut += len(context) > longest

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, numbers: Sequence[int]) -> list[Query]:
        return [
            Query(number, self.context(number), self.adapters[number], self.phrases.get(number, ()))
            for number in numbers
        ]

    def context(self, number: int) -> list[int]:
        return self._tokens[self._ends[number] : self._ends[number + 1]].tolist()

    def limit(self, count: int) -> None:
        """Keeps the first `count` contexts and the rows that have them."""
        self.adapters, self._ends = self.adapters[:count], self._ends[: count + 1]
        self._tokens = self._tokens[: self._ends[-1]]
        self.of_row = {row: number for row, number in self.of_row.items() if number < count}

    def share(self, rank: int, ranks: int, finished: set[int]) -> list[list[int]]:
        """The rank's part of what is not finished, in chunks: by adapter, the longest contexts first.

        Contexts of like length are dealt to the ranks in turn, so that all have as much to do.
        """
        names = {name: i for i, name in enumerate(dict.fromkeys(self.adapters))}
        left = [number for number in range(len(self)) if number not in finished]
        left.sort(
            key=lambda number: (
                names[self.adapters[number]],
                self._ends[number] - self._ends[number + 1],
                number,
            )
        )
        own = left[rank::ranks]
        return [own[start : start + _CHUNK] for start in range(0, len(own), _CHUNK)]

    def digest(self) -> str:
        """SHA-256 of all contexts and whom they ask."""
        named = json.dumps([self.adapters, list(self.phrases.items())])
        parts = named.encode(), self._tokens.tobytes(), self._ends.tobytes()
        return sha256(b"\0".join(parts)).hexdigest()


class Decoding(LightningModule):
    """Decodes queries, each by the model of the adapter that it asks for, and hands on what is done.

    Told to stop, it leaves the rest undone, within a token; ``signals`` says so.
    """

    def __init__(
        self,
        models: Mapping[str, GPT2LMModel],
        settings: DecodingSettings,
        end_tokens: list[int],
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer queries than ranks
        self.names, self.models = list(models), nn.ModuleList(models.values())
        self.settings, self.end_tokens = settings, end_tokens
        self.done: Callable[[int, list[Hypothesis]], None] = lambda number, outputs: None
        """Is given number and outputs, best first, of each query, as they come."""
        self.signals = Signals()

    def on_predict_start(self) -> None:
        """Lays the models out for decoding where they are now; the trainer's own types stay as they are.

        Raises UserError where both name a type.
        """
        self.signals.listen()
        precision = self.settings.precision
        if self.trainer.precision == "32-true":
            for model in self.models:
                prepare_for_decoding(cast(GPT2LMModel, model), precision)
        elif precision is not Precision.float32:
            what = f"{precision.value} and trainer.precision={self.trainer.precision} exclude each other"
            raise UserError("decoding.precision", what, "leave trainer.precision out")

    def predict_step(self, batch: list[Query], batch_idx: int) -> None:
        with contextlib.suppress(_Told):
            for name, group in groupby(batch, key=lambda query: query.adapter):
                model = cast(GPT2LMModel, self.models[self.names.index(name)])
                found = decode_stream(model, group, self.settings, self.end_tokens, self._watch)
                for number, outputs in found:
                    self.done(number, outputs)

    def _watch(self, beams: Beams, parents: Tensor) -> None:
        if self.signals.heard():
            raise _Told

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch  # plain lists; `decode_stream` makes the tensors


class _Told(Exception):
    """To stop, between two tokens."""


class Parts:
    """Finished outputs on disk, a file for each rank: a run that was interrupted goes on from them."""

    def __init__(self, folder: Path, fingerprint: str, earlier: Path | None = None) -> None:
        """`fingerprint` says what is decoded, and how; `earlier`: the folder of an interrupted run.

        Raises UserError where one of the folders holds outputs of something else.
        """
        self.folders = [folder] if earlier is None else [folder, earlier]
        self._header = json.dumps({"decoding": fingerprint}).encode() + b"\n"
        self._file: IO[str] | None = None
        self._places: dict[int, tuple[Path, int]] = {}
        self.read()

    @property
    def finished(self) -> set[int]:
        return set(self._places)

    def read(self) -> None:
        """Finds what is finished by now."""
        for folder in self.folders:
            for path in sorted(folder.glob(".part-*.jsonl")):
                self._index(path)

    def write(self, rank: int, number: int, outputs: Sequence[Hypothesis]) -> None:
        """Appends to the rank's file, behind the last whole line of an interrupted run."""
        if self._file is None:
            path = self.folders[0] / f".part-{rank}.jsonl"
            whole = 0
            if path.exists():
                with open(path, "rb") as file:
                    whole = sum(len(line) for line in file if line.endswith(b"\n"))
                os.truncate(path, whole)
            self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115  (stays open)
            if not whole:
                self._file.write(self._header.decode())
        self._file.write(json.dumps([number, outputs, _sum(number, outputs)]) + "\n")
        self._file.flush()

    def outputs(self, number: int) -> list[Hypothesis]:
        """Of one query, best first."""
        path, place = self._places[number]
        with open(path, "rb") as file:
            file.seek(place)
            return _parsed(file.readline())[1]

    def remove(self) -> None:
        """Deletes the files in the run's own folder."""
        for path in self.folders[0].glob(".part-*.jsonl"):
            path.unlink()

    def _index(self, path: Path) -> None:
        """A line that is damaged, or holds no outputs, counts as not there: they are decoded again."""
        with open(path, "rb") as file:
            header = file.readline()
            if not header.endswith(b"\n"):
                return
            if header != self._header:
                what = "holds outputs of an interrupted decoding of something else, or with other settings"
                raise UserError(path, what, "give those settings again, choose another folder, or delete it")
            place = file.tell()
            while (line := file.readline()).endswith(b"\n"):
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    self._places.setdefault(_parsed(line)[0], (path, place))
                place = file.tell()


def _parsed(line: bytes) -> tuple[int, list[Hypothesis]]:
    """Number and outputs of a query. Raises ValueError or TypeError for another line, or a damaged one."""
    number, outputs, expected = json.loads(line)
    if _sum(number, outputs) != expected:
        raise ValueError("the line is not what was written")
    return int(number), [Hypothesis(*values) for values in outputs]


def _sum(number: int, outputs: Sequence[Sequence[Any]]) -> int:
    return crc32(json.dumps([number, outputs]).encode())


def write_predictions(
    path: Path, queries: Queries, parts: Parts, clean: Callable[[list[int]], str], settings: DecodingSettings
) -> None:
    """One line a row, in order: {"id", "predict", "score", "text"}, predict zero-padded to `eval_len`.

    `clean` makes texts of tokens. "adapter" is there where the row asked for one, and "n_best", the outputs
    with the log-probabilities of their tokens, where there are several. Scores have five decimals.
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for row, number in queries.of_row.items():
            found = parts.outputs(number)
            tokens, score, _ = found[0]
            predict = tokens + [0] * (settings.eval_len - len(tokens))
            line: dict[str, Any] = {
                "id": row,
                "predict": predict,
                "score": rounded(score),
                "text": clean(tokens),
            }
            if adapter := queries.adapters[number]:
                line["adapter"] = adapter
            if settings.n_best > 1:
                line["n_best"] = [
                    {
                        "text": clean(one.tokens),
                        "tokens": one.tokens,
                        "score": rounded(one.score),
                        "log_probs": [rounded(each) for each in one.log_probs],
                    }
                    for one in found
                ]
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def rounded(score: float) -> float | None:
    """To five decimals: the seventh digit depends on the rows beside. None where all was forbidden."""
    return round(score, 5) if math.isfinite(score) else None
