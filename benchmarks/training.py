"""LoRA fine-tuning side by side: lora-gpt2 and PEFT on transformers, the same rows and the same sizes.

    python benchmarks/training.py                         gpt2.sm's size, batch 8, rows as long as E2E's
    python benchmarks/training.py --model gpt2.md --batch 32 --rows FILE.jsonl

LoRA of rank 4 on q and v (PEFT: on c_attn, which holds them), label smoothing 0.1, AdamW, random weights.
Every measurement is a process of its own that warms up first; programs take turns. Prints medians over
the repeats of rows per second, the ratio to PEFT in the same type, the share of the machine's measured
matrix products per second (MFU), and peak memory. `lightning` is `ours` under lightning.Trainer;
`four-adapters` trains ranks 1, 2, 4 and 8 side by side, with a batch for each.
All get random batches; PEFT's are padded to their longest row, as transformers' Trainer has them by default.
`peft-grouped` gets batches of like lengths. `--output FOLDER` keeps the figures.
`--smoke` runs every program for a few steps on a small card, to see that all run; the figures say nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cards import SIZES
from machine import machine, peak_memory, peak_operations
from training_programs import PROGRAMS

CPU_PROGRAMS = [
    "ours:float32",
    "peft:float32",
    "peft-grouped:float32",
    "ours:bfloat16",
    "lightning:bfloat16",
    "peft:bfloat16",
    "peft-grouped:bfloat16",
]
GPU_PROGRAMS = [
    "ours:bfloat16",
    "ours-compiled:bfloat16",
    "lightning-compiled:bfloat16",
    "four-adapters:bfloat16",
    "peft:bfloat16",
    "peft-compiled:bfloat16",
]
SMOKE = {"model": "gpt2.mini", "batch": 2, "steps": 2, "warm": 1, "repeats": 1}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2.sm", choices=SIZES)
    parser.add_argument("--rows", type=Path, help="BPE JSONL of GPT-2's tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0, help="on LoRA's input")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5, help="steps that are not counted")
    parser.add_argument("--programs", nargs="*", metavar="NAME:TYPE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--smoke", action="store_true", help="all programs, a few steps of a small card")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE, programs=options.programs or sorted({*CPU_PROGRAMS, *GPU_PROGRAMS}))
    if options.one:
        measure(options, *options.one.split(":"))
    else:
        report(options, *compare(options))


def compare(options: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], dict[str, float]]:
    """Each program's measurements, and each type's operations per second."""
    programs = options.programs or (CPU_PROGRAMS if options.device == "cpu" else GPU_PROGRAMS)
    limits = {dtype: peak_operations(dtype, options.device) for dtype in {p.split(":")[1] for p in programs}}
    results: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for repeat in range(options.repeats):
        for program in programs:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", program]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            results[program].append(found)
            print(
                f"run {repeat + 1}  {program:<28} {found['rows_per_second']:8.2f} rows/s"
                f"  {found['peak_gb']:.2f} GB  last loss {found['loss']:.3f}",
                flush=True,
            )
    return results, limits


def measure(options: argparse.Namespace, program: str, dtype: str) -> None:
    """Prints rows per second, peak memory and the last loss of one program as JSON."""
    torch.manual_seed(0)
    seconds, loss, rows, operations = PROGRAMS[program](options, getattr(torch, dtype))
    found = {"rows_per_second": rows / seconds, "flops": operations / seconds, "loss": loss}
    print(json.dumps({**found, "peak_gb": peak_memory(options.device)}))


def report(
    options: argparse.Namespace, results: dict[str, list[dict[str, Any]]], limits: dict[str, float]
) -> None:
    """Prints the table and keeps it."""
    speed = {
        name: statistics.median(run["rows_per_second"] for run in runs) for name, runs in results.items()
    }
    for dtype, limit in limits.items():
        print(f"{dtype}: {limit / 1e12:.2f} TFLOP/s in a large matrix product")
    print(f"\n{'program':<28} {'rows/s':>8} {'spread':>15} {'x peft':>8} {'MFU':>6} {'peak GB':>8}")
    for program, runs in results.items():
        dtype = program.split(":")[1]
        rows = [run["rows_per_second"] for run in runs]
        peer = speed.get(f"peft:{dtype}")
        ratio = f"{speed[program] / peer:.2f}" if peer else "n/a"
        use = statistics.median(run["flops"] for run in runs) / limits[dtype]
        spread = f"{min(rows):.1f}-{max(rows):.1f}"
        memory = max(run["peak_gb"] for run in runs)
        print(f"{program:<28} {speed[program]:>8.2f} {spread:>15} {ratio:>8} {use:>6.1%} {memory:>8.2f}")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        named = {**vars(options), "rows": options.rows and options.rows.name}
        settings = {name: str(value) for name, value in named.items() if name not in ("output", "one")}
        about = {"settings": settings, **machine(), "products": limits, "runs": results}
        (options.output / "results.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
