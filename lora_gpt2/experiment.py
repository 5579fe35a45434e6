"""The two experiments, step by step in the order in which data flows. Only wires."""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader

from lora_gpt2 import runs
from lora_gpt2.data.config import Corpus
from lora_gpt2.data.module import DataToText
from lora_gpt2.decoding.predictions import Decoding, Parts, Queries, write_predictions
from lora_gpt2.decoding.state import Hypothesis
from lora_gpt2.errors import UserError
from lora_gpt2.evaluation.scorer import figures
from lora_gpt2.files import write_json
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.reporting import screen
from lora_gpt2.reporting.metrics import Metrics
from lora_gpt2.scoring import Asked, longest_context
from lora_gpt2.settings import GenerateSettings, TrainSettings
from lora_gpt2.signals import Signals
from lora_gpt2.training.callbacks import Progress, SameSettings
from lora_gpt2.training.checkpoints import LastCheckpoint, WholeCheckpoints
from lora_gpt2.training.module import LanguageModeling
from lora_gpt2.training.together import AdaptersTogether
from lora_gpt2.weights.pretrained import build_base
from lora_gpt2.weights.store import base_hash, weights_hash


def train(settings: TrainSettings, folder: Path) -> float | None:
    """Trains and leaves the weights in `folder`; returns the lowest validation loss, if one was taken.

    Several adapters at once leave theirs in folders of their own.
    """
    _quiet()
    members = settings.members()
    seeds = [member.seed for member in members.values()]
    seed_everything(seeds[0], workers=True, verbose=False)
    data = DataToText(settings.data, runs.tokenizer_of(settings.base), *seeds)
    configs = [runs.build_config(member, data.tokenizer) for member in members.values()]
    screen.corpus(data.meta)
    if settings.dry_run:
        for config in configs:
            with torch.device("meta"):
                screen.model(settings.model.name, GPT2LMModel(config))
        return None
    data.load(settings.model.n_positions)
    checkpoint = runs.checkpoint_file(settings, data)
    if settings.score:
        _check_scoring(settings, data)
    screen.rows_cut(settings.data.seq_len, train=data.train_rows, valid=data.valid_rows)
    modules = _modules(members, configs, data.tokenizer.sha256)
    if settings.lora.rank and settings.base is None:
        screen.note("the base has random weights: base= names a run, a folder, a file or a hub name")
    module = AdaptersTogether(modules) if len(modules) > 1 else modules[""]
    runs.write_provenance(folder, data)
    with _logged(settings, folder) as loggers:
        callbacks = [SameSettings(settings.decisive()), *_callbacks(settings.callbacks, folder)]
        trainer = _trainer(settings.trainer, callbacks, loggers, folder)
        try:
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        finally:
            for one in modules.values():  # where the fit did not come to its end
                one.model.unpack()
        losses = runs.keep_weights(trainer, module, settings.keep, folder)
        if trainer.is_global_zero:
            for (name, member), loss in zip(members.items(), losses, strict=True):
                notes = {"steps": trainer.global_step, "valid_loss": loss}
                runs.save(folder / name, modules[name], member, data.tokenizer, notes)
                screen.artefacts(folder / name)
        _obey(_signals(callbacks), trainer, f"behind the last step, go on with resume={folder}")
        for name, member in members.items() if settings.score else ():
            scores = generate(_scoring(member, str(folder / name)), folder / name)
            prefix = "/".join(filter(None, ["final", settings.score, name]))
            final = {f"{prefix}/{key}": value for key, value in figures(scores or {}).items()}
            for logger in loggers if final else ():
                logger.log_metrics(final)
                logger.save()
    return min((loss for loss in losses if loss is not None), default=None)


def _check_scoring(settings: TrainSettings, data: DataToText) -> None:
    """Raises UserError, before hours of training, for what could not be decoded behind it."""
    positions = settings.model.n_positions
    longest_context(settings.data, positions, settings.decoding, "decoding")
    next(data.rows(str(settings.score), positions), None)


def _scoring(settings: TrainSettings, run: str) -> GenerateSettings:
    """How what a training left in `run` is decoded and scored."""
    return GenerateSettings(
        settings.data,
        settings.decoding,
        settings.trainer,
        {name: node for name, node in settings.callbacks.items() if name == "progress"},
        adapter=run if settings.lora.rank else None,
        base=None if settings.lora.rank else run,
        split=str(settings.score),
        limit=settings.limit,
        seed=settings.seed,
    )


def _modules(
    members: Mapping[str, TrainSettings], configs: Sequence[GPT2Config], tokenizer: str
) -> dict[str, LanguageModeling]:
    """A model for each member; several share the first one's base."""
    modules: dict[str, LanguageModeling] = {}
    for (name, member), config in zip(members.items(), configs, strict=True):
        one = modules[name] = _module(member, config, tokenizer)
        one.model.share_base(next(iter(modules.values())).model)  # at once: two bases are most in memory
        screen.model(member.model.name, one.model)
    return modules


def _module(settings: TrainSettings, config: GPT2Config, tokenizer: str) -> LanguageModeling:
    """A model over its base, as it trains."""
    names = settings.model.name, tokenizer
    model = build_base(config, settings.base, *names, settings.seed, settings.base_may_lack)
    model.transformer.gradient_checkpointing = settings.gradient_checkpointing
    return LanguageModeling(
        model,
        settings.optimizer,
        settings.label_smoothing,
        settings.seed,
        base_sha256=base_hash(model) if settings.lora.rank else "",
        dtype=runs.base_dtype(settings),
        compiled=settings.compile,
    )


def generate(settings: GenerateSettings, folder: Path) -> dict[str, Any] | None:
    """Decodes a split into `folder` and scores it; returns what scores.json holds, None on other ranks."""
    _quiet()
    seed_everything(settings.seed, workers=True, verbose=False)
    source = next(iter(settings.adapters.values()), settings.adapter or settings.base)
    data = DataToText(settings.data, runs.tokenizer_of(source), settings.seed)
    models = runs.load(settings, data.tokenizer.sha256, data.tokenizer.vocab_size)
    queries = _queries(settings, data, models)
    screen.queries(settings.split, queries)
    end_tokens = settings.decoding.end_tokens or data.tokenizer.end_tokens
    if unknown := [token for token in end_tokens if not 0 <= token < data.tokenizer.vocab_size]:
        what = f"{unknown[0]} is no token, the tokenizer has 0 to {data.tokenizer.vocab_size - 1}"
        raise UserError("decoding.end_tokens", what, "give others, or leave them to the tokenizer")
    parts = _parts(settings, folder, queries, models, end_tokens)
    callbacks = _callbacks(settings.callbacks, folder)
    trainer = _trainer(settings.trainer, callbacks, [], folder)
    if len(parts.finished) < len(queries):
        progress = [callback for callback in callbacks if isinstance(callback, Progress)]
        _decode(queries, parts, Decoding(models, settings.decoding, end_tokens), trainer, progress)
    if not trainer.is_global_zero:
        return None
    parts.read()
    path, clean = folder / "predictions.jsonl", data.tokenizer.clean
    write_predictions(path, queries, parts, clean, settings.decoding)
    texts = [clean(parts.outputs(number)[0].tokens) for number in range(len(queries))]
    asked = Asked.of(data, settings.split, queries)
    asked.write(folder, texts)
    scores = asked.scores(texts)
    write_json(folder / "scores.json", scores)
    screen.scores(scores)
    screen.artefacts(folder)
    parts.remove()
    return scores


def _quiet() -> None:
    """Silences what Lightning says of itself and of ways that we chose on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for expected in (
        r".*LeafSpec",  # Lightning 2.6 on torch 2.13
        r"Experiment logs directory",  # the run's folder is made before the logger
        r".*could not find the monitored key",  # a run may end before its first validation
        r"Couldn't infer the batch indices",  # LengthBuckets is a sampler of batches
        r".*does not have many workers",  # batches come from arrays in memory
        r"Checkpoint directory .* exists",  # two callbacks write there
        r"predict returned None",  # outputs go to disk as they come
        r"The dirpath has changed",  # a resumed run takes its best weights along
        r"It is recommended to use `self.log\('valid/",  # StageMetrics are over all ranks already
        r"The number of training batches .* is smaller than the logging interval",
        r"You're resuming from a checkpoint that ended before",  # LengthBuckets goes on where it stopped
    ):
        warnings.filterwarnings("ignore", message=expected)


def _callbacks(nodes: dict[str, Any], folder: Path) -> list[Callback]:
    return [_build(node, dirpath=str(folder / "checkpoints")) for node in nodes.values()]


def _trainer(
    arguments: dict[str, Any], callbacks: list[Callback], loggers: list[Logger], folder: Path
) -> Trainer:
    plugins = [*(arguments.get("plugins") or []), WholeCheckpoints()]
    rest = {"default_root_dir": str(folder), "callbacks": callbacks, "logger": loggers or False}
    return instantiate({**arguments, "plugins": None}, plugins=plugins, **rest)


@contextmanager
def _logged(settings: TrainSettings, folder: Path) -> Iterator[list[Logger]]:
    """The logger, with every setting noted in it; one that has a `close` hears how it ended.

    metrics.csv, from which reports are made, is written beside any other.
    """
    if not settings.logger:
        yield []
        return
    runs.keep_metrics(folder, resumed=settings.resume is not None)
    where = {"save_dir": str(folder), "name": "", "version": "", "resume": settings.resume}
    logger: Logger = _build(settings.logger, **where)
    loggers = [logger]
    if not isinstance(logger, CSVLogger):
        loggers.append(Metrics(folder, name="", version=""))
    close = getattr(logger, "close", lambda failed: None)
    try:
        for one in loggers:
            one.log_hyperparams(json.loads(json.dumps(asdict(settings))))
        yield loggers
    except BaseException:
        close(failed=True)
        raise
    close(failed=False)


def _build(node: Any, **where: str | None) -> Any:
    """An object from its `_target_`; of `where`, those places that it takes and that are not set."""
    if not isinstance(node, dict):
        return node
    taken = {name: value for name, value in where.items() if name in runs.parameters(node["_target_"])}
    return instantiate({**taken, **node})


def _queries(settings: GenerateSettings, data: DataToText, models: Mapping[str, GPT2LMModel]) -> Queries:
    positions = models[""].config.n_positions
    longest = longest_context(settings.data, positions, settings.decoding, "decoding")
    rows = list(data.rows(settings.split, positions))
    for number, row in enumerate(rows):
        if row.adapter not in models:
            known = ", ".join(filter(None, models)) or "none"
            what = f'asks for the adapter "{row.adapter}", loaded are: {known}'
            do = f"give its run: adapters={{{row.adapter}:RUN}}"
            raise UserError(_line(settings, data, number), what, do)
    queries = Queries(((row.adapter, row.context, row.require) for row in rows), longest)
    if settings.limit:
        queries.limit(settings.limit)
    if queries.phrases and not settings.decoding.takes_phrases:
        first = next(row for row, number in queries.of_row.items() if number in queries.phrases)
        where = _line(settings, data, first)
        raise UserError(where, '"require" needs a plain beam search', "use decoding=beam or decoding=greedy")
    return queries


def _line(settings: GenerateSettings, data: DataToText, row: int) -> str:
    """Where the user finds a row: in a JSONL corpus each line is one."""
    root = settings.data.root if settings.data.corpus is Corpus.jsonl else None
    folder = data.folder if root is None else Path(root)
    return f"{folder / settings.split}.jsonl:{row + 1}"


def _parts(
    settings: GenerateSettings,
    folder: Path,
    queries: Queries,
    models: Mapping[str, GPT2LMModel],
    end_tokens: list[int],
) -> Parts:
    """What is decoded already, in `folder` or in that of an interrupted run."""
    how = {name: value for name, value in asdict(settings.decoding).items() if name != "batch_size"}
    weights = {name: weights_hash(model) for name, model in models.items()}
    told = json.dumps([queries.digest(), how, settings.trainer.get("precision"), end_tokens, weights])
    earlier = Path(settings.resume) if settings.resume is not None else None
    if earlier is not None and not earlier.is_dir():
        raise UserError("resume", f"{earlier}: there is no such folder", "give that of the interrupted run")
    parts = Parts(folder, hashlib.sha256(told.encode()).hexdigest(), earlier)
    if parts.finished:
        screen.note(f"{len(parts.finished):,} of {len(queries):,} are decoded already")
    return parts


def _decode(
    queries: Queries, parts: Parts, decoding: Decoding, trainer: Trainer, progress: Sequence[Progress]
) -> None:
    """Decodes what is not finished, on all ranks."""
    share = queries.share(trainer.global_rank, trainer.world_size, parts.finished)
    total = sum(map(len, share))

    def done(number: int, outputs: list[Hypothesis]) -> None:
        parts.write(trainer.global_rank, number, outputs)
        for callback in progress:
            callback.on_decoded(total)

    decoding.done = done
    loader = DataLoader(queries, sampler=share, batch_size=None)
    trainer.predict(decoding, loader, return_predictions=False)
    _obey(decoding.signals, trainer, f"decoding, what is done is kept in {parts.folders[0]}")


def _signals(callbacks: Sequence[Callback]) -> Signals:
    """What was told during the fit."""
    return next((one.signals for one in callbacks if isinstance(one, LastCheckpoint)), Signals())


def _obey(signals: Signals, trainer: Trainer, where: str) -> None:
    """Waits for all ranks, and ends them where one was told to stop: what each had to write is there."""
    told = torch.tensor(signals.told, device=trainer.strategy.root_device)
    if number := int(trainer.strategy.reduce(told, reduce_op="max")):
        raise signals.end(number, trainer.is_global_zero, where)
