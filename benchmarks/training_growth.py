"""Tokens per second of LoRA fine-tuning as rank, row length, batch and model grow; with a picture.

    python benchmarks/training_growth.py --output FOLDER

Random weights and rows of one length, half of it completion; rank 4 on q and v, batch 8, 64 tokens, gpt2.sm's
size where an axis does not say otherwise. Each point is the median step of `--repeats`, after two to warm up.
`--processes 2` measures instead how DDP scales: one process on one core, and two on one core each, whose
gradients are averaged as DDP does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cards import SIZES
from decoding_growth import draw
from machine import machine, peak_memory, synchronize

from lora_gpt2.memory import forget_most_resident, keep_freed
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.parts import loss_in_parts

AXES: dict[str, list[Any]] = {
    "rank": [1, 4, 16, 64, 256],
    "tokens": [32, 64, 128, 256, 512, 1024],
    "batch": [1, 4, 8, 16, 32, 64],
    "model": list(SIZES),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=AXES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--rank-of", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        one_of(options, *options.rank_of)
        return
    if options.processes:
        scaling(options)
        return
    found: dict[str, dict[Any, dict[str, float]]] = {}
    for axis in options.axes:
        for value in AXES[axis]:
            point = measure(options, **{axis: value})
            found.setdefault(axis, {})[value] = point
            print(
                f"{axis:<7} {value!s:>9}  {point['tokens_per_second']:9.0f} tokens/s"
                f"  {1e3 * point['seconds']:8.1f} ms a step  {point['peak_gb']:.2f} GB",
                flush=True,
            )
    if options.output:
        keep(options, "growth.json", found)
        speeds = {
            axis: {value: point["tokens_per_second"] for value, point in points.items()}
            for axis, points in found.items()
        }
        draw(speeds, options.output / "growth.svg", "tokens per second")


def keep(options: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    about = {"dtype": options.dtype, "repeats": options.repeats, **machine(), "runs": found}
    (options.output / name).write_text(json.dumps(about, indent=2) + "\n")


def measure(
    options: argparse.Namespace,
    rank: int = 4,
    tokens: int = 64,
    batch: int = 8,
    model: str = "gpt2.sm",
) -> dict[str, float]:
    """Tokens per second, seconds of a step, and peak memory in GB."""
    forget_most_resident()
    trained = build(options, model, rank)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    ids = torch.randint(0, 50257, (batch, tokens), device=options.device)
    mask = (torch.arange(tokens, device=options.device) >= tokens // 2).expand_as(ids)
    seconds = []
    for _ in range(options.repeats + 2):
        start = time.perf_counter()
        loss_in_parts(trained, (ids, ids, mask), 0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(options.device)
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[2:])
    peak = peak_memory(options.device)
    return {"tokens_per_second": batch * tokens / step, "seconds": step, "peak_gb": peak}


def build(options: argparse.Namespace, model: str, rank: int) -> GPT2LMModel:
    torch.manual_seed(0)
    config = GPT2Config(**SIZES[model], lora_attn_dim=rank, lora_attn_alpha=32)
    trained = GPT2LMModel(config).to(options.device).train()
    trained.train_only_lora(getattr(torch, options.dtype))
    trained.prepack()
    keep_freed()
    return trained


def scaling(options: argparse.Namespace) -> None:
    """Rows per second of one process with one thread, and of several with one each; and of one with all."""
    count = options.processes
    found = {}
    for processes, threads in ((1, 1), (1, count), (count, 1)):
        commands = [
            [sys.executable, __file__, *sys.argv[1:], "--rank-of", str(rank), str(processes)]
            for rank in range(processes)
        ]
        variables = {"OMP_NUM_THREADS": str(threads), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})
            for command in commands
        ]
        seconds = [float(process.communicate()[0].splitlines()[-1]) for process in running]
        name, speed = f"{processes} processes, {threads} threads each", 8 * processes / max(seconds)
        print(f"{name}: {speed:.2f} rows/s of 64 tokens", flush=True)
        found[name] = {"rows_per_second": speed}
    if options.output:
        keep(options, "scaling.json", found)


def one_of(options: argparse.Namespace, rank: int, processes: int) -> None:
    """One process' median seconds of a step."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    trained = build(options, "gpt2.sm", 4)
    model: Any = Loss(trained)
    if processes > 1:
        ignored = [f"model.{name}" for name, p in trained.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, 50257, (8, 64))
    seconds = []
    for _ in range(options.repeats + 2):
        start = time.perf_counter()
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds[2:]))


class Loss(torch.nn.Module):
    """What DDP wraps: rows to their loss."""

    def __init__(self, model: GPT2LMModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(ids.size(1)) >= ids.size(1) // 2).expand_as(ids)
        return loss_in_parts(self.model, (ids, ids, mask), 0.1)


if __name__ == "__main__":
    main()
