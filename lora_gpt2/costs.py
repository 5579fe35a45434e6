"""What a training step takes: memory and operations counted, time measured.

Both are counted in one step of the model itself, over tensors that have a shape and a device but no storage,
so that they hold for every setting; time is that of a few real steps.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lora_gpt2 import runs
from lora_gpt2.errors import UserError
from lora_gpt2.memory import LiveBytes, forget_most_resident, keep_freed, most_resident, size_of
from lora_gpt2.model.cache import PackedRows
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.keys import is_lora
from lora_gpt2.model.language_model import GPT2LMModel, Targets
from lora_gpt2.model.lora import MergedLinear
from lora_gpt2.model.parts import loss_in_parts, parts_of
from lora_gpt2.model.products import HAS_ONEDNN, Prepacked
from lora_gpt2.settings import TrainSettings
from lora_gpt2.training.optimization import build_optimizer

TYPES = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
ADAM_STATES = 2
HELD = 1.25
"""On a CPU the C library holds this many times what is in use, in freed pieces that no later tensor fits:
measured in five experiments on Linux, 1.05 to 1.4."""
FIRST_USE = 50_000_000
"""Bytes that kernels and threads take when they are first used."""


def _product_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * int(weight[0])


ONEDNN = {torch.ops.mkldnn._linear_pointwise: _product_flops} if HAS_ONEDNN else {}
"""Operations of the products that torch's counter does not know, by the shapes of x and W (out, in)."""


class Memory(NamedTuple):
    """Bytes on one device at the largest batch."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    step: int
    """Most at one time within a step, the three above and everything passing included."""
    process: int
    """The program, its libraries and data; on a CPU, where they share the memory."""

    @property
    def peak(self) -> int:
        """Most at one time in all."""
        if not self.process:
            return self.step
        return self.process + FIRST_USE + round(HELD * self.step)


class Measured(NamedTuple):
    """A few real steps."""

    seconds_per_step: float
    """Scaled to the mean batch of the run."""
    peak: int
    """Bytes, one of the steps having the largest batch."""


class Shape(NamedTuple):
    """A batch of B rows of T tokens, on average where they lie in a line, with N targets."""

    rows: int
    tokens: int
    targets: int


def count_step(config: GPT2Config, settings: TrainSettings, device: str, shape: Shape) -> tuple[Memory, int]:
    """Memory and floating-point operations of one step, on tensors without storage.

    Without a GPU its memory is counted by the CPU's kernels, which keep attention weights: at most too much.
    """
    there = device if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(), torch.device(there), LiveBytes() as live:
        model, autocast = _built(config, settings, there)
        packed = _prepacked_bytes(model) if device == "cpu" else 0
        weights = live.now + packed
        parts = parts_of(model, shape.rows * shape.tokens) if device == "cpu" else 1
        rows = -(-shape.rows // parts)
        ids = torch.zeros(rows, shape.tokens, dtype=torch.long)
        positions = torch.zeros(-(-shape.targets * rows // shape.rows), dtype=torch.long)
        with FlopCounterMode(display=False, custom_mapping=ONEDNN) as counter:
            with autocast():
                targets = Targets.at(positions, positions)
                lines = PackedRows(ids) if settings.data.pack and device != "cpu" else None
                loss = model.loss_at(ids, targets, settings.label_smoothing, cache=lines)
            activations = live.now + packed - weights
            torch.autograd.backward(loss)
        gradients = sum(size_of(parameter) for _, parameter in trained_parameters(model))
    optimizer = ADAM_STATES * gradients
    step = (
        live.most + packed + optimizer + (gradients if rows < shape.rows else 0)
    )  # their sum beside a part's own
    memory = Memory(weights, gradients, optimizer, activations, step, 0)
    return memory, round(counter.get_total_flops() * shape.rows / rows)


def time_steps(
    config: GPT2Config, settings: TrainSettings, device: str, batches: list[Any]
) -> tuple[float, int]:
    """Seconds of all steps but the first two, which warm up, and the most memory that was taken."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda", "there is no such device here to time steps on", "add --steps 0")
    forget_most_resident()
    torch.manual_seed(settings.seed)
    model, autocast = _built(config, settings, device)
    model.to(device)
    model.prepack()
    keep_freed()
    if settings.compile:
        model.compile_blocks()
    optimizer, _ = build_optimizer([(trained_parameters(model), settings.optimizer)], len(batches))
    start = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == 2:
            _synchronize(device)
            start = time.perf_counter()
        rows = tuple(one.to(device) for one in batch.tensors)
        with autocast():
            loss = loss_in_parts(model, rows, settings.label_smoothing)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([parameter for _, parameter in trained_parameters(model)], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() if device == "cuda" else most_resident()


def _built(
    config: GPT2Config, settings: TrainSettings, device: str
) -> tuple[GPT2LMModel, Callable[[], contextlib.AbstractContextManager[Any]]]:
    """The model as training has it, and what its forward pass runs in by trainer.precision."""
    precision = str(settings.trainer.get("precision") or "32-true")
    bits, _, kind = precision.partition("-")
    kind = kind or ("mixed" if bits in ("16", "bf16") else "true")  # Lightning's short names
    if bits not in TYPES or kind not in ("true", "mixed"):
        what = f"{precision} cannot be planned"
        raise UserError("trainer.precision", what, "use 32-true, bf16-mixed, 16-mixed or bf16-true")
    with _default_type(torch.float32 if kind == "mixed" else TYPES[bits]):
        model = GPT2LMModel(config).train()
    if settings.lora.rank:
        model.train_only_lora(runs.base_dtype(settings))
    model.transformer.gradient_checkpointing = settings.gradient_checkpointing
    if kind == "mixed":
        return model, lambda: torch.autocast(device, TYPES[bits])
    return model, contextlib.nullcontext


@contextlib.contextmanager
def _default_type(kind: torch.dtype) -> Iterator[None]:
    """Tensors made inside have this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trained_parameters(model: GPT2LMModel) -> list[tuple[str, nn.Parameter]]:
    named = list(model.named_parameters())
    return [(name, p) for name, p in named if is_lora(name)] or named


def _prepacked_bytes(model: GPT2LMModel) -> int:
    """Bytes that `GPT2LMModel.prepack` adds: each matrix's second layout, and both of the head."""
    layers = [module for module in model.modules() if isinstance(module, MergedLinear)]
    matrices = [layer.weight for layer in layers if layer.prepacks]
    head = model.lm_head.weight
    return sum(map(size_of, matrices)) + (2 * size_of(head) if Prepacked.fits(head) else 0)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
