"""Bases to adapt: a model of ours, a GPT-2 folder or file, or a name on the hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_gpt2.errors import UserError
from lora_gpt2.hub import fetch
from lora_gpt2.memory import installed
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.keys import POSITION_TABLE, canonical, is_lora
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.store import MODEL_FILE, Description, read_description, read_pickle, read_weights

_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")
CHOOSE = "choose the model card that the weights belong to (model=…)"
_FILES = (MODEL_FILE, "pytorch_model.bin")
_ARCHITECTURE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon", "bias")


def base_weights(
    config: GPT2Config, source: str, card: str, tokenizer: str, may_be_missing: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The weights found at `source`, compared with `config` before a model of its sizes takes memory.

    `source`: a run's folder, a folder in transformers' form, a file (.safetensors, .bin, .pt), or
    a hub name such as openai-community/gpt2. `card` and `tokenizer` (its SHA-256) are what the run uses;
    a base that says it was made with others is refused. Only its positions may be more than the model's:
    they are cut. `may_be_missing`: patterns of weights that the base may lack. Raises UserError.
    """
    path = _locate(source)
    description, tensors = _read(path)
    if description is not None:
        if description.kind != "model":
            raise UserError(path, "holds an adapter, not a base", "give the base's own run or file as base=")
        check_description(path, description, config, card, tokenizer)
    elif (path.parent / "config.json").is_file():
        _check_architecture(path.parent / "config.json", card, config)
    try:
        tensors = canonical(tensors)
        if lora := [name for name in tensors if is_lora(name)]:
            held = "LoRA beside the base" if len(lora) < len(tensors) else "LoRA alone, no base"
            do = "take it as an adapter: lora-gpt2 import reference, then merge"
            raise UserError(path, f"holds {held} ({lora[0]} and others)", do)
        positions = tensors.get(POSITION_TABLE)
        if positions is not None:
            tensors[POSITION_TABLE] = positions[: config.n_positions]
        check_fit(config.without_lora(), tensors, may_be_missing)
    except (RuntimeError, ValueError) as error:  # torch compares no tensors of two types
        raise UserError(path, f"does not fit model {card}: {error}", CHOOSE) from None
    return tensors


def check_fit(config: GPT2Config, tensors: Mapping[str, Tensor], may_be_missing: Sequence[str] = ()) -> None:
    """Raises ValueError where `GPT2LMModel.load_weight` would, for a model of any sizes, in no memory."""
    try:
        with torch.device("meta"):
            model = GPT2LMModel(config)
        model.load_weight(tensors, may_be_missing)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"torch has no tensors of its sizes ({error})") from None


def build_base(
    config: GPT2Config,
    source: str | None,
    card: str,
    tokenizer: str,
    seed: int,
    may_be_missing: Sequence[str] = (),
) -> GPT2LMModel:
    """A model with the base weights found at `source`, or random ones drawn from `seed`.

    Raises UserError for weights that do not fit, or a model that this machine has no room for.
    """
    tensors = None if source is None else base_weights(config, source, card, tokenizer, may_be_missing)
    tables = config.padded_vocab_size + config.n_positions
    ranks = sum(lora.rank for lora in config.lora_layers.values())
    rows = tables + 12 * config.n_layer * config.n_embd + 2 * ranks  # at least, of n_embd float32 values
    needed = 4 * rows * config.n_embd
    if needed > (most := installed()):
        what = f"takes {needed / 1e9:.1f} GB, this machine has {most / 1e9:.1f}"
        raise UserError(f"model {card}", what, "choose a smaller one (model=…)")
    torch.manual_seed(seed)
    model = GPT2LMModel(config)
    if tensors is not None:
        model.load_weight(tensors, may_be_missing)
    return model


def describe_base(source: str) -> Description | None:
    """What the base at `source` says of itself; None where it says nothing. Raises UserError.

    Of a GPT-2 in transformers' form that is its sizes: card and tokenizer are empty.
    """
    path = _locate(source)
    safe = path.suffix == ".safetensors" or not path.exists()
    if safe and (own := read_description(path)) is not None:
        return own
    if (path.parent / "config.json").is_file():
        return Description("model", "", _their_config(path.parent / "config.json").to_dict(), "")
    return None


def check_description(
    path: Path, description: Description, config: GPT2Config, card: str, tokenizer: str
) -> None:
    """Raises UserError unless the file was made for this architecture and this tokenizer."""
    if differing := _differences(description.gpt2_config, config):
        other = f"model {description.card}, not {card}" if description.card != card else f"another {card}"
        what = f"was made for {other}: it has {', '.join(differing)}"
        raise UserError(path, what, f"use model={description.card} and the data it was made with")
    check_tokenizer(path, description, tokenizer)


def check_tokenizer(path: Path, description: Description, tokenizer: str) -> None:
    """Raises UserError unless the file was made with this tokenizer (its SHA-256)."""
    if description.tokenizer != tokenizer:
        what = f"was made with tokenizer {description.tokenizer[:12]}…, the data has {tokenizer[:12]}…"
        raise UserError(path, what, "set data.tokenizer to the tokenizer/ folder of that run")


def _check_architecture(path: Path, card: str, config: GPT2Config) -> None:
    """Raises UserError unless the transformers config.json at `path` describes this architecture."""
    if differing := _differences(_their_config(path), config):
        raise UserError(path, f"does not fit model {card}: it has {', '.join(differing)}", CHOOSE)


def _their_config(path: Path) -> GPT2Config:
    try:
        return GPT2Config(path)
    except UserError:
        raise
    except (RecursionError, TypeError, ValueError) as error:
        raise UserError(path, f"is no GPT-2 ({error})", "give the folder of a GPT-2") from None


def _differences(theirs: GPT2Config, ours: GPT2Config) -> list[str]:
    """What the base has otherwise; more positions than needed are no difference, nor is padding."""
    allowed = {
        "n_positions": theirs.n_positions > ours.n_positions,
        "vocab_size": theirs.vocab_size == ours.padded_vocab_size,
    }
    return theirs.differences(ours, [name for name in _ARCHITECTURE if not allowed.get(name)])


def _locate(source: str) -> Path:
    path = Path(source)
    if source in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        raise UserError(f"base={source}", "there is no such file", f"the hub's is openai-community/{source}")
    if path.is_dir():
        for name in _FILES:
            if (path / name).is_file():
                return path / name
        raise UserError(path, f"holds neither {' nor '.join(_FILES)}", "give a folder that does")
    if path.exists() or path.suffix in _SUFFIXES or source.count("/") != 1 or source[0] in "./~":
        return path
    if path.parent.is_dir():
        raise UserError(path, "there is no such file or folder", "check the path")
    do = "check the name and the network, or download the folder elsewhere and give its path"
    fetch(source, "config.json", f"base={source}", do)
    return fetch(source, _FILES, f"base={source}", do)


def _read(path: Path) -> tuple[Description | None, dict[str, Tensor]]:
    if path.suffix == ".safetensors" or not path.exists():
        return read_weights(path)
    return None, read_pickle(path)
