"""Bases to adapt: a model of ours, a GPT-2 folder or file, or a name on the hub."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.errors import UserError
from lora_gpt2.hub import fetch
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.store import MODEL_FILE, Description, read_weights

_SUFFIXES = (".safetensors", ".bin", ".pt")
_ARCHITECTURE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon")


def load_base(model: GPT2LMModel, source: str, card: str, tokenizer: str) -> None:
    """Loads the base weights found at `source` into `model`, all of them or none.

    `source`: a run's folder, a folder in transformers' form, a file (.safetensors, .bin, .pt), or
    a hub name such as openai-community/gpt2. `card` and `tokenizer` (its SHA-256) are what the run uses;
    a model of ours that was made with others is refused. Raises UserError.
    """
    path = _locate(source)
    description, tensors = _read(path)
    if description is not None:
        if description.kind != "model":
            raise UserError(path, "holds an adapter, not a base", "give the base's own run or file as base=")
        check_description(path, description, model.config, card, tokenizer)
    try:
        model.load_weight(tensors)
    except ValueError as error:
        do = "choose the model card that the weights belong to (model=…)"
        raise UserError(path, f"does not fit model {card}: {error}", do) from None


def describe_base(source: str) -> Description | None:
    """What the base at `source` says of itself; None where it is not one of ours. Raises UserError."""
    return _read(_locate(source))[0]


def check_description(
    path: Path, description: Description, config: GPT2Config, card: str, tokenizer: str
) -> None:
    """Raises UserError unless the file was made for this architecture and this tokenizer."""
    theirs = description.config
    differing = [
        f"{name} {theirs[name]} (here {getattr(config, name)})"
        for name in _ARCHITECTURE
        if theirs[name] != getattr(config, name)
    ]
    if differing:
        other = f"model {description.card}, not {card}" if description.card != card else f"another {card}"
        what = f"was made for {other}: it has {', '.join(differing)}"
        raise UserError(path, what, f"use model={description.card} and the data it was made with")
    if description.tokenizer != tokenizer:
        what = f"was made with tokenizer {description.tokenizer[:12]}…, the data has {tokenizer[:12]}…"
        raise UserError(path, what, "set data.tokenizer to the tokenizer/ folder of that run")


def _locate(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        for name in (MODEL_FILE, "pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
        raise UserError(path, f"holds neither {MODEL_FILE} nor pytorch_model.bin", "give a folder that does")
    if path.exists() or path.suffix in _SUFFIXES or source.count("/") != 1 or source[0] in "./~":
        return path
    do = "check the name and the network, or download the folder elsewhere and give its path"
    return fetch(source, MODEL_FILE, f"base={source}", do)


def _read(path: Path) -> tuple[Description | None, dict[str, Tensor]]:
    if path.suffix == ".safetensors" or not path.exists():
        return read_weights(path)
    try:
        values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged or unsafe file
        what = f"could not be read as plain tensors ({str(error).splitlines()[0]})"
        raise UserError(path, what, "give a whole weight file from a source you trust") from None
    if not isinstance(values, dict):
        raise UserError(path, f"holds a {type(values).__name__}", "expected a dict of tensors")
    return None, values
