"""Where and when a benchmark ran, what it took there, and what the machine can do."""

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lora_gpt2.memory import peak
from lora_gpt2.model.products import blocks, product

PACKAGES = "torch", "lightning", "transformers", "peft", "ctranslate2", "lora-gpt2"


def machine() -> dict[str, Any]:
    """Where and when this was measured, and with what."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    cpu = next((line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")), "")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
    }


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def peak_memory(device: str) -> float:
    """The most memory that this process ever held, in GB."""
    return peak(torch.device(device)) / 1e9


def peak_operations(dtype: str, device: str) -> float:
    """The most operations per second of a large matrix product, of several ways to ask for it."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    ways: list[Callable[[], Any]] = [lambda: a @ b, lambda: torch.nn.functional.linear(a, b)]
    if device == "cpu":
        packed = blocks(b, size)
        ways.append(lambda: product(a, packed))
    best = float("inf")
    for way in ways:
        for _ in range(10):
            synchronize(device)
            start = time.perf_counter()
            way()
            synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
