"""The demonstration: the commands of a real experiment, one after the other, on the embedded corpus."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from lora_gpt2 import gate, settings
from lora_gpt2.files import locked
from lora_gpt2.weights.store import ADAPTER_FILE, MODEL_FILE


def run(output: Path, again: bool) -> None:
    """Runs what has not been run yet into folders of `output` and shows everything."""
    from lora_gpt2.reporting import screen

    base, adapter = output / "base", output / "adapter"
    before, after = output / "before", output / "after"
    if again:
        for folder in (base, adapter, before, after):
            shutil.rmtree(folder, ignore_errors=True)
    screen.title("1. The base: a small GPT-2, trained from scratch on the base domain (restaurants)")
    _stage("train", ["demo=base"], base, MODEL_FILE)
    screen.title("2. The base on the adaptation domain (museums)")
    _stage("generate", [f"base={base}", "data=demo"], before, "scores.json")
    screen.title("3. LoRA: the base is frozen, a few matrices learn the new domain")
    _stage("train", ["demo=adapt", f"base={base}"], adapter, ADAPTER_FILE)
    screen.title("4. The adapted model, decoded in the same way")
    _stage("generate", [f"adapter={adapter}", "data=demo"], after, "scores.json")
    screen.title("5. What it writes")
    screen.samples(before, after, 4)
    screen.before_and_after(_scores(before), _scores(after))
    screen.title("6. Where everything lies")
    for folder in (base, before, adapter, after):
        screen.artefacts(folder)


def _stage(script: str, overrides: list[str], folder: Path, result: str) -> None:
    """One command, or what it said the last time when its `result` is there already."""
    from lora_gpt2 import experiment
    from lora_gpt2.reporting import screen

    screen.command(f"python {script}.py {' '.join(overrides)} hydra.run.dir={folder}")
    if (folder / result).is_file():
        screen.command(f"{folder / result} is there already (lora-gpt2 demo --again runs it again)")
        if result == "scores.json":
            screen.scores(_scores(folder))
        return
    gate.register()
    with initialize_config_module("configs", version_base="1.3"):
        cfg = compose(script, overrides=overrides)
    stages: dict[str, tuple[type, Callable[..., Any]]] = {
        "train": (settings.TrainSettings, experiment.train),
        "generate": (settings.GenerateSettings, experiment.generate),
    }
    schema, function = stages[script]
    with locked(folder):
        function(gate.resolve(cfg, schema), folder)


def _scores(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    return report
