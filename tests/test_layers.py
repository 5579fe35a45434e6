"""Data flows one way: each part imports only what stands before it, and settings are ready without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_gpt2

PACKAGE = Path(lora_gpt2.__file__).parent
LAYERS = [
    {"errors"},
    {"files", "memory", "signals"},
    {"hub"},
    {"model"},
    {"weights"},
    {"data"},
    {"training", "decoding"},
    {"evaluation"},
    {"reporting", "scoring"},
    {"settings"},
    {"gate", "runs"},
    {"costs"},
    {"experiment", "conversion", "plan"},
    {"demo", "jobs"},
    {"sweeps"},
    {"launch"},
    {"search", "report", "resuming"},
    {"playground", "adapter_cli", "sweep_cli"},
    {"cli"},
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def part(module: str) -> str:
    """model, of lora_gpt2.model.lora."""
    return module.split(".")[1]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lora_gpt2"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= set(names) if node.module == "lora_gpt2" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_part_imports_only_what_stands_before_it(path):
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imported(path):
        assert part(module) == own or level[part(module)] < level[own], module


@pytest.mark.parametrize("path", sorted((PACKAGE / "model").glob("*.py")), ids=lambda path: path.name)
def test_the_model_knows_no_lightning_and_no_hydra(path):
    text = path.read_text(encoding="utf-8")
    assert not any(f"import {name}" in text or f"from {name}" in text for name in ("lightning", "hydra"))


@pytest.mark.parametrize("module", ["lora_gpt2", "lora_gpt2.settings", "lora_gpt2.cli"])
def test_a_wrong_setting_or_option_is_refused_before_torch_is_loaded(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
