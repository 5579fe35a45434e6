"""The programs that `training.py` compares, each on the same sizes and rows with the same loss."""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cards import SIZES
from machine import synchronize
from torch import Tensor, nn

from lora_gpt2.data.batches import Batch, EncodedRows, LengthBuckets
from lora_gpt2.data.config import Corpus, DataSettings
from lora_gpt2.data.jsonl import Row, read_rows
from lora_gpt2.memory import keep_freed
from lora_gpt2.model.parts import Rows, loss_in_parts

SMOOTHING = 0.1
VOCABULARY = 50257
OURS = DataSettings(Corpus.demo)


def batches(
    options: argparse.Namespace,
    *,
    multiple: int = OURS.pad_multiple,
    bucket: int = OURS.bucket,
    seed: int = 0,
) -> Iterator[Batch]:
    """The warm-up's batches and the counted ones, by default as our training has them."""
    count = options.warm + options.steps
    if options.rows:
        rows = EncodedRows(read_rows(options.rows, VOCABULARY), 512, multiple=multiple)
    else:
        rng = random.Random(0)
        rows = EncodedRows(random_rows(rng, max(4000, count * options.batch)), 512, multiple=multiple)
    order = LengthBuckets(rows.lengths, options.batch, shuffle=True, seed=seed, bucket=bucket)
    for numbers, _ in zip(order, range(count), strict=False):
        yield rows[numbers]


def random_rows(rng: random.Random, count: int) -> Iterator[Row]:
    """Random tokens in rows as long as those of E2E's train split: mean, spread, limits and correlation."""
    for _ in range(count):
        context = min(max(round(rng.gauss(28.5, 6.7)), 13), 44)
        completion = min(max(round(24.8 + 0.82 * (context - 28.5) + rng.gauss(0, 5.7)), 2), 77)
        yield Row(*([rng.randrange(VOCABULARY) for _ in range(n)] for n in (context, completion)))


Measured = tuple[float, float, int, float]
"""Seconds, last loss, rows, and floating-point operations that the rows need."""


def bare_loop(
    options: argparse.Namespace, loss_of: Callable[[Rows], Tensor], model: nn.Module, given: Iterator[Batch]
) -> Measured:
    """Forward, backward and AdamW over the batches."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01, fused=True)
    start, rows, operations = 0.0, 0, 0.0
    loss = torch.zeros(())
    for number, batch in enumerate(given):
        if number == options.warm:
            synchronize(options.device)
            start = time.perf_counter()
        loss = loss_of(tuple(one.to(options.device) for one in batch.tensors))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number >= options.warm:
            rows += len(batch.rows)
            operations += needed(options.model, batch)
    synchronize(options.device)
    return time.perf_counter() - start, loss.item(), rows, operations


def ours(options: argparse.Namespace, dtype: torch.dtype, compiled: bool = False) -> Measured:
    model = our_model(options, dtype)
    model.prepack()
    keep_freed()
    if compiled:
        model.compile_blocks()

    def loss_of(rows: Rows) -> Tensor:
        return loss_in_parts(model, rows, SMOOTHING)

    return bare_loop(options, loss_of, model, batches(options))


def lightning(options: argparse.Namespace, dtype: torch.dtype, compiled: bool = False) -> Measured:
    """The same steps by lightning.Trainer with our module, the CSV logger and the progress report."""
    from lightning import Callback, Trainer
    from lightning.pytorch.loggers import CSVLogger

    from lora_gpt2.training.callbacks import Progress
    from lora_gpt2.training.config import OptimizerSettings
    from lora_gpt2.training.module import LanguageModeling

    class Clock(Callback):
        start = end = loss = 0.0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == options.warm:
                synchronize(options.device)
                self.start = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            synchronize(options.device)
            self.end, self.loss = time.perf_counter(), float(trainer.callback_metrics["train/loss"])

    given = list(batches(options))
    clock = Clock()
    model = our_model(options, torch.float32)
    module = LanguageModeling(model, OptimizerSettings(), SMOOTHING, dtype=dtype, compiled=compiled)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu" if options.device == "cpu" else "gpu",
            devices=1,
            max_epochs=1,
            logger=CSVLogger(folder, name="", version=""),
            callbacks=[clock, Progress()],
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(given, batch_size=None))  # type: ignore[arg-type]
    counted = given[options.warm :]
    operations = sum(needed(options.model, batch) for batch in counted)
    return clock.end - clock.start, clock.loss, sum(len(batch.rows) for batch in counted), operations


def lightning_compiled(options: argparse.Namespace, dtype: torch.dtype) -> Measured:
    return lightning(options, dtype, compiled=True)


def four_adapters(options: argparse.Namespace, dtype: torch.dtype) -> Measured:
    """Ranks 1, 2, 4 and 8 side by side over one base, a batch for each; all their rows count."""
    from lora_gpt2.model.side_by_side import SideBySide

    models = [our_model(options, dtype, rank) for rank in (1, 2, 4, 8)]
    together = SideBySide(models)
    models[0].prepack()
    together.share()
    keep_freed()
    given = [list(batches(options, seed=seed)) for seed in range(len(models))]
    optimizer = torch.optim.AdamW(
        [p for model in models for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True
    )
    start, rows, operations = 0.0, 0, 0.0
    losses = torch.zeros(len(models))
    for number, several in enumerate(zip(*given, strict=True)):
        if number == options.warm:
            synchronize(options.device)
            start = time.perf_counter()
        moved = [tuple(one.to(options.device) for one in batch.tensors) for batch in several]
        loss, losses = together.loss(moved, [SMOOTHING] * len(models))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number >= options.warm:
            rows += sum(len(batch.rows) for batch in several)
            operations += sum(needed(options.model, batch) for batch in several)
    synchronize(options.device)
    return time.perf_counter() - start, losses[2].item(), rows, operations


def our_model(options: argparse.Namespace, dtype: torch.dtype, rank: int | None = None) -> Any:
    from lora_gpt2.model.config import GPT2Config
    from lora_gpt2.model.language_model import GPT2LMModel

    lora: dict[str, Any] = {
        "lora_attn_dim": rank or options.rank,
        "lora_attn_alpha": 32,
        "lora_dropout": options.dropout,
    }
    model = GPT2LMModel(GPT2Config(**SIZES[options.model], **lora)).to(options.device).train()
    model.train_only_lora(dtype)
    return model


def peft(
    options: argparse.Namespace, dtype: torch.dtype, grouped: bool = False, compiled: bool = False
) -> Measured:
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    zero = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    base = GPT2LMHeadModel(GPT2Config(**SIZES[options.model], **zero)).to(options.device, dtype)
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=32,
        lora_dropout=options.dropout,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base, lora).train()
    if compiled:
        model = torch.compile(model, dynamic=True)

    def loss_of(rows: Rows) -> Tensor:
        ids, labels, mask = rows
        real = mask.flip(1).cumsum(1).flip(1) > 0  # a row ends with a target
        logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
        labels = labels.masked_fill(~mask, -100)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=SMOOTHING)

    bucket = 100 if grouped else 0
    return bare_loop(options, loss_of, model, batches(options, multiple=1, bucket=bucket))


def ours_compiled(options: argparse.Namespace, dtype: torch.dtype) -> Measured:
    return ours(options, dtype, compiled=True)


def peft_grouped(options: argparse.Namespace, dtype: torch.dtype) -> Measured:
    return peft(options, dtype, grouped=True)


def peft_compiled(options: argparse.Namespace, dtype: torch.dtype) -> Measured:
    return peft(options, dtype, compiled=True)


PROGRAMS: dict[str, Callable[..., Measured]] = {
    "ours": ours,
    "ours-compiled": ours_compiled,
    "lightning": lightning,
    "lightning-compiled": lightning_compiled,
    "four-adapters": four_adapters,
    "peft": peft,
    "peft-grouped": peft_grouped,
    "peft-compiled": peft_compiled,
}


def needed(model: str, batch: Batch) -> float:
    """Operations of the products that a step needs: forward, and backward to activations alone.

    Padding is left out, attention is causal, and the head is computed on the targets.
    """
    size, layers = SIZES[model]["n_embd"], SIZES[model]["n_layer"]
    lengths = batch.tokens / len(batch.rows)
    linear = 24 * size**2 * batch.tokens
    attention = 2 * 2 * size * batch.tokens * lengths / 2
    head = 2 * size * VOCABULARY * int(batch.mask.sum())
    return 2 * (layers * (linear + attention) + head) + layers * attention
