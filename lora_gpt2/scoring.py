"""Decoded texts against a corpus' references, after a run or while it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from lora_gpt2.data.config import DataSettings
from lora_gpt2.data.jsonl import TextRow, checked, read_text_rows
from lora_gpt2.data.module import DataToText
from lora_gpt2.decoding.config import DecodingSettings, decoding_settings
from lora_gpt2.decoding.decoder import decode_stream
from lora_gpt2.decoding.predictions import Queries
from lora_gpt2.errors import UserError
from lora_gpt2.evaluation import text_files
from lora_gpt2.evaluation.scorer import WEBNLG_CORPORA, figures, score_by_part, score_e2e, scores_as_dict
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.training.module import LanguageModeling
from lora_gpt2.training.together import AdaptersTogether


def longest_context(data: DataSettings, positions: int, decoding: DecodingSettings, where: str) -> int:
    """Tokens of a context that leave room for an answer. Raises UserError where none do.

    `where`: the name of the group that `decoding` is.
    """
    longest = min(data.seq_len, positions) - decoding.eval_len
    if longest < 1:
        what = f"{decoding.eval_len} leaves no room for a context"
        raise UserError(f"{where}.eval_len", what, "make it smaller than data.seq_len")
    return longest


@dataclass
class Asked:
    """What was decoded, each list in the order of the queries."""

    corpus: str
    contexts: list[str]
    references: list[list[str]]
    parts: list[str]
    """WebNLG's seen and unseen; "all" elsewhere."""

    @classmethod
    def of(cls, data: DataToText, split: str, queries: Queries) -> "Asked":
        path = data.folder / f"{split}.text.jsonl"
        checked(path, data.expected(path))
        rows: list[TextRow] = list(read_text_rows(path))
        references: list[list[str]] = [[] for _ in range(len(queries))]
        parts = ["all"] * len(queries)
        for row, number in queries.of_row.items():
            if text := rows[row].completion.strip():  # one of DART's texts is empty
                references[number].append(text)
            parts[number] = rows[row].part or "all"
        contexts = {number: rows[row].context for row, number in reversed(queries.of_row.items())}
        texts = [contexts[number] for number in range(len(queries))]
        return cls(data.meta["corpus"], texts, references, parts)

    def scores(self, texts: Sequence[str]) -> dict[str, Any]:
        """What scores.json holds, by the conventions of the corpus."""
        if self.corpus in WEBNLG_CORPORA:
            by_part = score_by_part(texts, self.references, self.parts)
            return {part: scores_as_dict(values, self.references) for part, values in by_part.items()}
        return scores_as_dict(score_e2e(texts, self.references), self.references)

    def write(self, folder: Path, texts: Sequence[str]) -> None:
        text_files.write_predictions(folder / "contexts.txt", self.contexts)
        text_files.write_predictions(folder / "hypotheses.txt", texts)
        text_files.write_references(folder / "references.txt", self.references)


class ValidationScores(Callback):
    """Decodes some validation inputs at each validation, and logs their scores: valid/bleu and the others.

    Checkpoints and early stopping can go by them, with monitor valid/bleu and mode max. Of several adapters
    at once valid/bleu is the mean, and each one's stands beside it.
    """

    def __init__(self, contexts: int = 100, decoding: Mapping[str, Any] | None = None) -> None:
        """`contexts`: how many different ones, the first of the split; `decoding`: settings of that group.

        Raises UserError for settings that are none.
        """
        self.decoding = decoding_settings(decoding or {}, "callbacks.scores.decoding")
        if contexts < 1:
            raise UserError("callbacks.scores.contexts", f"{contexts} are too few", "decode at least one")
        self.contexts = contexts
        self._asked: tuple[Queries, Asked] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, LanguageModeling) and pl_module.model.sharded:
            do = "use trainer=ddp, or decode with generate.py behind the training"
            raise UserError("callbacks.scores", "cannot decode with a sharded base", do)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = cast(Any, trainer).datamodule
        modules: dict[str, LanguageModeling] = {}
        if isinstance(pl_module, AdaptersTogether):
            modules = pl_module.by_name()
        elif isinstance(pl_module, LanguageModeling):
            modules = {"": pl_module}
        if not modules or not isinstance(data, DataToText) or trainer.sanity_checking:
            return
        queries, asked = self._asked = self._asked or self._ask(data, next(iter(modules.values())).model)
        of_each: dict[str, dict[str, float]] = {}
        for name, module in modules.items():
            texts = self._decode(trainer, data, queries, module.model)
            found = figures(asked.scores(texts)) if trainer.is_global_zero else {}
            of_each[name] = trainer.strategy.broadcast(found)
            for logger in trainer.loggers:
                if callable(log := getattr(logger, "log_predictions", None)):
                    log(name, trainer.global_step, asked.contexts, asked.references, texts)
        for metric in next(iter(of_each.values())):
            values = [one[metric] for one in of_each.values()]
            pl_module.log(f"valid/{metric}", sum(values) / len(values))
            if len(values) > 1:
                pl_module.log_dict({f"valid/{metric}/{name}": one[metric] for name, one in of_each.items()})

    def _ask(self, data: DataToText, model: GPT2LMModel) -> tuple[Queries, Asked]:
        positions = model.config.n_positions
        longest = longest_context(data.settings, positions, self.decoding, "callbacks.scores.decoding")
        queries = Queries((("", row.context, ()) for row in data.rows("valid", positions)), longest)
        queries.limit(self.contexts)
        return queries, Asked.of(data, "valid", queries)

    def _decode(self, trainer: Trainer, data: DataToText, queries: Queries, model: GPT2LMModel) -> list[str]:
        """The best text of each query; every rank decodes its share."""
        end_tokens = self.decoding.end_tokens or data.tokenizer.end_tokens
        own = queries.share(trainer.global_rank, trainer.world_size, set())
        asked = (query for numbers in own for query in queries[numbers])
        was = model.training
        model.eval()
        found = {
            number: data.tokenizer.clean(outputs[0].tokens)
            for number, outputs in decode_stream(model, asked, self.decoding, end_tokens)
        }
        model.train(was)
        if trainer.world_size > 1:
            of_all: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(of_all, found)
            found = {number: text for one in of_all for number, text in one.items()}
        return [found[number] for number in range(len(queries))]
