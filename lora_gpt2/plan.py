"""What an experiment will cost, before it runs: parameters, memory, steps, padding, operations, time."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lora_gpt2 import runs
from lora_gpt2.costs import Measured, Memory, Shape, count_step, time_steps, trained_parameters
from lora_gpt2.data.batches import EncodedRows, LengthBuckets
from lora_gpt2.data.module import DataToText
from lora_gpt2.errors import UserError
from lora_gpt2.memory import resident, size_of
from lora_gpt2.model.keys import is_lora
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.parts import line_tokens
from lora_gpt2.settings import TrainSettings
from lora_gpt2.weights.store import plain_update

PARTS = {".wte.": "token table", ".wpe.": "position table", ".attn.": "attention", ".mlp.": "MLP"}


@dataclass
class Plan:
    parameters: dict[str, int]
    """By part of the model."""
    trainable: int
    adapter_bytes: int
    """Size of the factors in adapter.safetensors; 0 where everything trains."""
    rows: int
    steps: int
    """Optimizer steps of the whole run."""
    padding: float
    """Share of the computed positions that hold no token."""
    padding_to_seq_len: float
    """The same, were every row padded to data.seq_len."""
    largest_batch: tuple[int, int]
    """Rows and tokens of a row."""
    flops_per_step: int
    """Of one optimizer step on mean batches, forward and backward."""
    memory: Memory
    measured: Measured | None

    @property
    def seconds(self) -> float | None:
        """Of all steps; validation comes on top."""
        return None if self.measured is None else self.measured.seconds_per_step * self.steps

    def as_json(self) -> dict[str, Any]:
        """Plain values under their names, bytes and seconds."""
        named = {**vars(self), "memory": {**self.memory._asdict(), "peak": self.memory.peak}}
        named["measured"] = self.measured and self.measured._asdict()
        named["largest_batch"] = dict(zip(("rows", "tokens"), self.largest_batch, strict=True))
        return {**named, "seconds": self.seconds}

    def figures(self) -> dict[str, str]:
        """What it says, to be read."""
        total = sum(self.parameters.values())
        found = {f"parameters: {part}": f"{count:,}" for part, count in self.parameters.items()}
        found["parameters in all"] = f"{total:,}"
        found["trainable"] = f"{self.trainable:,} ({100 * self.trainable / total:.3g} %)"
        if self.adapter_bytes:
            found["adapter file"] = f"{self.adapter_bytes / 1e6:.2f} MB"
        found["training rows"] = f"{self.rows:,}"
        found["optimizer steps"] = f"{self.steps:,}"
        found["padding"] = (
            f"{100 * self.padding:.1f} %, at data.seq_len {100 * self.padding_to_seq_len:.1f} %"
        )
        found["operations per step"] = f"{self.flops_per_step / 1e9:,.4g} GFLOP"
        found["largest batch"] = "{} rows of {} tokens".format(*self.largest_batch)
        for name, size in self.memory._asdict().items():
            found[f"memory: {name}"] = f"{size / 1e9:.3f} GB"
        found["memory: peak, estimated"] = f"{self.memory.peak / 1e9:.3f} GB"
        if self.measured is not None and self.seconds is not None:
            found["memory: peak, measured"] = f"{self.measured.peak / 1e9:.3f} GB"
            found["time per step"] = f"{self.measured.seconds_per_step:.3g} s"
            found["time in all, without validation"] = f"{self.seconds / 3600:.3g} h"
        return found


def plan(settings: TrainSettings, device: str, micro_steps: int) -> Plan:
    """The plan of an experiment, on random weights; `micro_steps` real steps are timed, 0: none.

    `device` is cpu or cuda; a few steps can be timed only where it is there.
    Raises UserError for settings and data that training refuses too.
    """
    if len(settings.members()) > 1:
        raise UserError("lora", "several adapters at once cannot be planned", "plan them one by one")
    data = DataToText(settings.data, runs.tokenizer_of(settings.base), settings.seed)
    config = runs.build_config(settings, data.tokenizer)
    data.load(config.n_positions)
    rows, arguments = data.train_rows, settings.trainer
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}", "is not known", "use cpu or cuda")
    batches = _batches(rows, settings, device)
    sizes = torch.tensor([rows[batch].input_ids.shape for batch in batches])
    positions = sizes.prod(dim=1)
    if device == "cpu":
        positions = torch.tensor([line_tokens((rows.lengths[batch] - 1).tolist()) for batch in batches])
    largest, mean = int(positions.argmax()), float(positions.double().mean())
    tokens = sum(int(rows.lengths[batch].sum()) - len(batch) for batch in batches)
    targets = sum(int((rows.lengths - rows.contexts)[batch].sum()) for batch in batches) / len(batches)
    accumulated = arguments.get("accumulate_grad_batches") or 1

    count, width = map(int, sizes[largest])
    many = len(batches[largest]) if device == "cpu" else count
    heaviest = Shape(many, -(-int(positions[largest]) // many), int(rows[batches[largest]].mask.sum()))
    process, measured = resident() if device == "cpu" else 0, None
    memory = count_step(config, settings, device, heaviest)[0]._replace(process=process)
    if micro_steps and device == "cpu" and memory.peak - process > psutil.virtual_memory().available:
        need, free = memory.peak / 1e9, psutil.virtual_memory().available / 1e9
        what = f"a step would take {need:.1f} GB, {free:.1f} GB are free"
        raise UserError("plan", what, "add --steps 0 to time none, or set data.batch_size lower")
    if micro_steps:
        order = [largest, *(i % len(batches) for i in range(micro_steps + 1))]
        seconds, peak = time_steps(config, settings, device, [rows[batches[i]] for i in order])
        timed = sum(int(positions[i]) for i in order[2:])
        measured = Measured(seconds / timed * mean * accumulated, peak)
    mean_rows = float(sizes[:, 0].double().mean())
    typical = Shape(round(mean_rows), round(mean / mean_rows), round(targets))
    _, flops = count_step(config, settings, device, typical)
    with torch.device("meta"):
        model = GPT2LMModel(config)
    trained = trained_parameters(model)
    return Plan(
        parameters=_by_part(model),
        trainable=sum(parameter.numel() for _, parameter in trained),
        adapter_bytes=sum(size_of(value) for value in plain_update(model)[1].values()),
        rows=len(rows),
        steps=_steps(arguments, len(batches), accumulated),
        padding=1 - tokens / int(positions.sum()),
        padding_to_seq_len=1 - tokens / (sum(map(len, batches)) * (settings.data.seq_len - 1)),
        largest_batch=(count, width),
        flops_per_step=flops * accumulated,
        memory=memory,
        measured=measured,
    )


def _batches(rows: EncodedRows, settings: TrainSettings, device: str) -> list[list[int]]:
    """The first epoch's batches of the first device."""
    return list(
        LengthBuckets(
            rows.lengths,
            settings.data.batch_size,
            shuffle=True,
            seed=settings.seed,
            bucket=settings.data.bucket,
            ranks=_ranks(settings.trainer, device),
        )
    )


def _ranks(arguments: dict[str, Any], device: str) -> int:
    """Processes of the run by the trainer's `devices` and `num_nodes`, as Lightning reads them."""
    devices = arguments.get("devices")
    if isinstance(devices, str) and devices != "auto":
        parts = [part for part in devices.split(",") if part.strip()]
        devices = int(devices) if len(parts) == 1 and devices.strip().lstrip("-").isdigit() else parts
    if isinstance(devices, list):
        count = len(devices)
    elif isinstance(devices, int) and devices > 0:
        count = devices
    else:  # as many as there are
        count = max(1, torch.cuda.device_count()) if device == "cuda" else 1
    return count * int(arguments.get("num_nodes") or 1)


def _steps(arguments: dict[str, Any], batches: int, accumulated: int) -> int:
    """Optimizer steps by the trainer's arguments; the last of an epoch may be of fewer batches.

    Raises UserError where they do not say when the run ends.
    """
    limit = arguments.get("limit_train_batches")
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    epochs, most = arguments.get("max_epochs"), arguments.get("max_steps", -1)
    per_epoch = -(-batches // accumulated)
    if most >= 0:
        return int(min(epochs * per_epoch, most) if epochs is not None and epochs >= 0 else most)
    if epochs == -1:
        raise UserError(
            "trainer.max_epochs", "-1 has no end, it cannot be planned", "set max_epochs or max_steps"
        )
    return int((1000 if epochs is None else epochs) * per_epoch)  # 1000: Lightning's own default


def _by_part(model: GPT2LMModel) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next((part for key, part in PARTS.items() if key in name), "LayerNorms")
        counts["LoRA" if is_lora(name) else part] += parameter.numel()
    return dict(counts)
