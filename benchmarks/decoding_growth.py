"""Contexts per second of lora-gpt2's beam search as beams, output length and batch grow; with a picture.

    python benchmarks/decoding_growth.py --output FOLDER

Random weights of gpt2.sm's size and random contexts, so that nothing ends early. The benchmark's other
settings stay at beam 10, 64 tokens, batch 16. Each point is the median of `--repeats` in one process.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from machine import machine

from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.decoding.decoder import decode
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.inference import prepare_for_decoding
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.settings import Precision

AXES: dict[str, list[int]] = {
    "beam_size": [1, 4, 10, 20],
    "eval_len": [16, 64, 256],
    "batch_size": [1, 4, 16, 64],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precision", default="bfloat16", choices=[kind.value for kind in Precision])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = prepare_for_decoding(GPT2LMModel(GPT2Config()).to(options.device), Precision(options.precision))
    rng = random.Random(0)
    contexts = [[rng.randrange(50257) for _ in range(rng.randint(20, 60))] for _ in range(64)]
    found: dict[str, dict[int, float]] = {}
    for axis, values in AXES.items():
        for value in values:
            settings = DecodingSettings(**{"batch_size": 16, axis: value})
            asked = contexts[: max(4, min(settings.batch_size, 64))]
            seconds = [measure(model, asked, settings) for _ in range(options.repeats)]
            found.setdefault(axis, {})[value] = len(asked) / statistics.median(seconds)
            print(f"{axis:<11} {value:>4}  {found[axis][value]:8.3f} contexts/s", flush=True)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        about = {"precision": options.precision, "repeats": options.repeats, **machine()}
        (options.output / "growth.json").write_text(json.dumps({**about, "runs": found}, indent=2) + "\n")
        draw(found, options.output / "growth.svg", "contexts per second")


def measure(model: GPT2LMModel, contexts: list[list[int]], settings: DecodingSettings) -> float:
    start = time.perf_counter()
    decode(model, contexts, settings, [model.config.vocab_size])
    return time.perf_counter() - start


def draw(found: Mapping[str, Mapping[Any, float]], path: Path, label: str) -> None:
    """A panel for each axis; values that are no numbers stand side by side."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(10, 3), sharey=True)
    for panel, (axis, points) in zip(axes, found.items(), strict=True):
        style: dict[str, Any] = {"marker": "o", "color": "tab:blue"}
        numbers = all(isinstance(value, int) for value in points)
        places = list(points) if numbers else list(range(1, len(points) + 1))
        (panel.loglog if numbers else panel.semilogy)(places, list(points.values()), **style)
        panel.set_xticks(places, [str(value) for value in points])
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(label)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
