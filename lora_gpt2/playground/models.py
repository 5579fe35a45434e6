"""What the page asks: adapters over their bases, each with and without."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lora_gpt2 import conversion, jobs, runs
from lora_gpt2.data.encode import encode_rows
from lora_gpt2.data.jsonl import TextRow, read_text_rows
from lora_gpt2.data.tokenizer import Tokenizer, load_tokenizer
from lora_gpt2.decoding.config import decoding_settings
from lora_gpt2.decoding.predictions import rounded
from lora_gpt2.decoding.tree import decode_with_tree
from lora_gpt2.errors import UserError
from lora_gpt2.evaluation import text_files
from lora_gpt2.files import read_json
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.report.coverage import coverage
from lora_gpt2.reporting import sweep
from lora_gpt2.weights.adapter import holds_adapter, open_adapter

BASE = "without an adapter"

CHOICES: dict[str, tuple[float, float]] = {
    "beam_size": (1, 32),
    "eval_len": (1, 1024),
    "length_penalty": (-10, 10),
    "no_repeat_ngram_size": (0, 1024),
    "min_length": (0, 1024),
    "repetition_penalty": (0.1, 10),
}
"""The settings of decoding that the page may change, with the least and the most of each."""

_EXAMPLES = 1000


class Playground:
    """Models by their names; one text at a time."""

    def __init__(
        self, models: Mapping[str, GPT2LMModel], tokenizer: Tokenizer, examples: Sequence[str], seconds: float
    ) -> None:
        """`examples`: inputs to choose from; `seconds`: the longest that an answer may take."""
        self.models, self.tokenizer, self.examples, self.seconds = models, tokenizer, examples, seconds

    def about(self) -> dict[str, Any]:
        """What can be asked: ``decoding`` has default, least, most and step of each setting."""
        defaults = decoding_settings({}, "decoding")
        decoding = {}
        for name, (least, most) in CHOICES.items():
            value = getattr(defaults, name)
            step = 1 if isinstance(value, int) else "any"
            decoding[name] = {"value": value, "min": least, "max": most, "step": step}
        return {"adapters": list(self.models), "examples": list(self.examples), "decoding": decoding}

    def decode(self, asked: Any) -> dict[str, Any]:
        """The outputs for ``{"input": text, "adapter": name, "decoding": {setting: number}}``, best first,
        and the tree of their search.

        Raises UserError for anything else, and TimeoutError.
        """
        text, model, given = self._understood(asked)
        settings = decoding_settings(given, "decoding")
        settings = replace(settings, n_best=settings.beam_size)
        ((tokens, *_),) = encode_rows([TextRow(text, "")], self.tokenizer)
        start = time.perf_counter()
        try:
            outputs, nodes = decode_with_tree(
                model, tokens, settings, self.tokenizer.end_tokens, self.seconds
            )
        except ValueError as error:  # too long, or more beams than tokens
            do = "shorten the input or change the settings"
            raise UserError("input", str(error), do) from None
        seconds = time.perf_counter() - start
        texts = [self.tokenizer.clean(output.tokens) for output in outputs]
        checked = coverage([text] * len(texts), texts)
        told = [
            {
                "text": clean,
                "score": rounded(output.score),
                "tokens": [
                    [self.tokenizer.decode([token]), rounded(log_prob)]
                    for token, log_prob in zip(output.tokens, output.log_probs, strict=True)
                ],
                "missed": [f"{name}: {value}" for name, value in one.missed],
            }
            for output, clean, one in zip(outputs, texts, checked, strict=True)
        ]
        tree = [
            [one.parent, self.tokenizer.decode([one.token]), rounded(one.log_prob), one.output]
            for one in nodes
        ]
        return {"outputs": told, "tree": tree, "seconds": round(seconds, 3)}

    def _understood(self, asked: Any) -> tuple[str, GPT2LMModel, dict[str, float]]:
        if not isinstance(asked, dict):
            raise UserError("request", "is no JSON object", 'send {"input": …, "adapter": …}')
        keys = "input", "adapter", "decoding"
        if unknown := sorted(set(asked) - set(keys)):
            raise UserError(f"request.{unknown[0]}", "is not known", f"use {', '.join(keys)}")
        text, name, given = (asked.get(key) for key in keys)
        if not isinstance(text, str) or not text.strip():
            raise UserError("input", "a text was expected", "write what the text is to say")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError("input", "holds half of a character (a lone surrogate)", "remove it")
        if not isinstance(name, str) or name not in self.models:
            known = ", ".join(f'"{model}"' for model in self.models)
            raise UserError("adapter", "is none of those here", f"choose {known}")
        given = {} if given is None else given
        _check_choices(given)
        return text.strip(), self.models[name], given


def _check_choices(given: Any) -> None:
    if not isinstance(given, dict):
        raise UserError("decoding", "settings by their names were expected", "e.g. {beam_size: 4}")
    for setting, value in given.items():
        if setting not in CHOICES:
            raise UserError("decoding", "has a setting that is none", f"use {', '.join(CHOICES)}")
        least, most = CHOICES[setting]
        if type(value) not in (int, float):
            raise UserError(f"decoding.{setting}", "is no number", f"use {least} to {most}")
        if not least <= value <= most:
            raise UserError(f"decoding.{setting}", "is out of range", f"use {least} to {most}")


def open_playground(
    sources: Sequence[str], base: str | None = None, seconds: float = 60, device: str = "cpu"
) -> Playground:
    """What is at `sources`: runs, sweeps, adapter files or models. `base`: where theirs lies now.

    Adapters over one base share it in memory. Raises UserError where they have different tokenizers.
    """
    named = _named(sources)
    tokenizer = load_tokenizer(runs.tokenizer_of(next(iter(named.values()))))
    models: dict[str, GPT2LMModel] = {}
    bases: dict[str, GPT2LMModel] = {}
    for name, source in named.items():
        if not holds_adapter(source):
            found = conversion.open_base(source, None, None)
            models[name], theirs = found.model, found.tokenizer.sha256
        else:
            models[name], about = open_adapter(source, base)
            theirs = about.tokenizer
            if (same := bases.setdefault(about.base_sha256, models[name])) is not models[name]:
                models[name].share_base(same)
        if theirs != tokenizer.sha256:
            what = f"has tokenizer {theirs[:12]}…, the first one's folder {tokenizer.sha256[:12]}…"
            raise UserError(source, what, "serve models of one tokenizer, each in the folder of its run")
    for number, model in enumerate(bases.values(), start=1):
        plain = models[BASE if len(bases) == 1 else f"base {number}, {BASE}"] = GPT2LMModel(
            model.config.without_lora()
        )
        plain.share_base(model)
    for model in models.values():
        model.eval().to(torch.device(device))
    return Playground(models, tokenizer, _examples(named.values()), seconds)


def _named(sources: Sequence[str]) -> dict[str, str]:
    """Each model's folder or file by a name to show; a sweep is many."""
    found: dict[str, str] = {}
    for source in sources:
        places = jobs.adapters(Path(source))
        if not places and (job := jobs.Job.read(Path(source))) is not None:
            raise UserError(source, f"its job is {job.told()[0]}", "serve one that is finished")
        names = sweep.names({place: job.settings for place, job in places.items()})
        each = {name: str(place) for place, name in names.items()} or {Path(source).name: source}
        for name, place in each.items():
            found[name if name not in found else place] = place
    return found


def _examples(sources: Iterable[str]) -> list[str]:
    """Inputs that the runs were scored on, or else those that they were validated on, if still there."""
    found: dict[str, None] = {}
    for folder in map(Path, sources):
        if (scored := folder / "contexts.txt").is_file():
            found.update(dict.fromkeys(text_files.read_predictions(scored)))
        elif (noted := folder / runs.PROVENANCE_FILE).is_file():
            rows = Path(read_json(noted, "remove it")["corpus"]) / "valid.text.jsonl"
            if rows.is_file():
                found.update(dict.fromkeys(row.context for row in read_text_rows(rows)))
    return list(islice(found, _EXAMPLES))
