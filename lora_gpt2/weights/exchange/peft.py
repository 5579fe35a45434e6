"""PEFT's adapters for transformers' GPT-2: adapter_config.json and adapter_model.safetensors.

R rank of one projection, n adapted projections of a layer.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_gpt2.errors import UserError
from lora_gpt2.files import brief, read_json, replacing, write_json
from lora_gpt2.model.config import TARGETS, GPT2Config, LayerLora
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.factors import with_lora
from lora_gpt2.weights.store import plain_update

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base as it was."""
# fmt: off
_UNDERSTOOD = frozenset((
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "target_modules",
    "exclude_modules", "fan_in_fan_out", "bias", "use_dora", "use_rslora", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config",
    "qalora_group_size", "runtime_config",
))
# fmt: on
"""Settings that are read, or only say how the adapter was made."""

_NAME = r"(?:[\w.]|\\[.d]|\[[\w-]+\]|(?<=\\d)\+)*"
_PATTERN = re.compile(rf"\^?(?:\.\*)?{_NAME}(?:\(\w+(?:\|\w+)*\){_NAME})?\$?")
"""The regular expressions for layers that are tried: names, digits, one choice. None has many ways to fit."""


def write(folder: Path, model: GPT2LMModel, base_name: str) -> None:
    """A PEFT adapter for transformers' GPT-2 whose logits are the model's own.

    PEFT knows one A and B for the fused projection: the As are stacked, B becomes block-structured with zero
    rows for what is not adapted, and rank and alpha grow together, so that the scaling stays.
    Raises UserError for a model without biases, which transformers does not have.
    """
    config, update = plain_update(model)
    if not config.bias:
        raise UserError(
            folder, "transformers' GPT-2 has biases, this model has none", "merge the adapter instead"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, lora in config.lora_layers.items():
        own, theirs = f"transformer.{name}.", f"{_PREFIX}transformer.{name}."
        a, b = update[f"{own}lora_A"], update[f"{own}lora_B"]
        ranks[name] = len(a)
        alphas[name] = config.scaling(lora) * len(a)
        tensors[f"{theirs}lora_A.weight"] = a
        tensors[f"{theirs}lora_B.weight"] = _spread(b, lora)
        if config.lora_dora:
            lengths = model.weights()[f"{own}weight"].detach().float().norm(dim=0)  # (out,)
            magnitude = update[f"{own}lora_magnitude"]
            tensors[f"{theirs}lora_magnitude_vector"] = _put(lengths, magnitude, lora)
    weights = model.weights()
    for name in (name for name in update if name.endswith(".lora_bias")):
        stem = name.removesuffix("lora_bias")
        inner = "base_layer.bias" if stem.removeprefix("transformer.").rstrip(".") in ranks else "bias"
        tensors[f"{_PREFIX}{stem}{inner}"] = weights[f"{stem}bias"] + update[name]
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    (folder / CONFIG_FILE).unlink(missing_ok=True)  # never beside the weights of another adapter
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(values, temporary, {"format": "pt"})
    write_json(
        folder / CONFIG_FILE,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
            "lora_dropout": config.lora_dropout,
            "target_modules": _modules(list(ranks), config.n_layer),
            "fan_in_fan_out": True,
            "bias": config.lora_bias,
            "use_dora": config.lora_dora,
            "use_rslora": False,
            "init_lora_weights": True,
        },
    )


def read(folder: Path, base: GPT2LMModel) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The update in a PEFT adapter's folder and the config with it; `base` is the model below it.

    Where B has the block structure that `write` gives it, q, k and v are separate targets again;
    otherwise the fused projection is one target, c_attn. Raises UserError.
    """
    do = "give the folder that save_pretrained wrote, of a LoRA adapter for this GPT-2"
    settings = read_json(folder / CONFIG_FILE, do)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise UserError(folder / CONFIG_FILE, "describes no LoRA adapter", do)
    _refuse_other_kinds(folder / CONFIG_FILE, settings)
    layers = _layers(folder / WEIGHTS_FILE, do)
    try:
        adapted = _adapted(layers, base.config, bool(settings.get("use_dora")))
    except ValueError as error:
        raise UserError(folder / WEIGHTS_FILE, str(error), do) from None
    enable = _structure(adapted, base, settings.get("use_dora", False))
    weights = base.weights()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, parts in adapted.items():
        kept = enable if name.endswith("c_attn") else [True]
        rows = _enabled_rows(parts["lora_B"], kept)
        rank = len(parts["lora_A"]) // sum(kept)
        blocks = [b[:, i * rank : (i + 1) * rank] for i, b in enumerate(rows)]
        tensors[f"transformer.{name}.lora_A"] = parts["lora_A"]
        tensors[f"transformer.{name}.lora_B"] = torch.cat(blocks)
        if "lora_magnitude_vector" in parts:
            magnitude = torch.cat(_enabled_rows(parts["lora_magnitude_vector"], kept))
            tensors[f"transformer.{name}.lora_magnitude"] = magnitude
        ranks[name], alphas[name] = rank, _scaling(settings, name, len(parts["lora_A"])) * rank
    for name, parts in layers.items():
        if "bias" in parts:
            key = f"transformer.{name}.bias"
            if key not in weights or weights[key].shape != parts["bias"].shape:
                raise UserError(folder / WEIGHTS_FILE, f"has a bias of {name}, which does not fit", do)
            tensors[f"transformer.{name}.lora_bias"] = parts["bias"] - weights[key]
    has_bias = any(name.endswith("lora_bias") for name in tensors)
    found = {
        name: LayerLora(ranks[name], alphas[name], enable if "c_attn" in name else [True]) for name in ranks
    }
    try:
        config = with_lora(
            base.config,
            found,
            lora_dropout=float(settings.get("lora_dropout", 0)),
            lora_dora=bool(settings.get("use_dora", False)),
            lora_bias=settings.get("bias", "none") if has_bias else "none",
        )
    except (TypeError, ValueError) as error:
        raise UserError(folder / CONFIG_FILE, f"has settings that do not fit: {error}", do) from None
    return config, tensors


def _adapted(
    layers: Mapping[str, dict[str, Tensor]], config: GPT2Config, dora: bool
) -> dict[str, dict[str, Tensor]]:
    """The layers that have an update. Raises ValueError unless each is whole and there are some."""
    own = {f"h.{i}.{kind}" for i in range(config.n_layer) for kind in TARGETS.values()}
    adapted = {name: parts for name, parts in layers.items() if parts.keys() - {"bias"}}
    needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if dora else set())
    for name, parts in adapted.items():
        if name not in own:
            raise ValueError(f"adapts {name}, which is no layer of this GPT-2")
        if lacking := sorted(needed - parts.keys()):
            raise ValueError(f"has no {lacking[0]} of {name}")
    if not adapted:
        raise ValueError("adapts no layer")
    return adapted


def _refuse_other_kinds(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError for what would change the meaning of A and B and is not understood here."""
    init = settings.get("init_lora_weights", True)
    if init not in _KEEP_THE_BASE:
        do = "convert it with PEFT first: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        raise UserError(path, f"init_lora_weights {init} has changed the base under the adapter", do)
    for key, value in settings.items():
        if value and key not in _UNDERSTOOD:
            raise UserError(path, f"sets {key}, which has no counterpart here", "merge it with PEFT instead")


def _layers(path: Path, do: str) -> dict[str, dict[str, Tensor]]:
    """Layer name to its tensors: lora_A, lora_B, lora_magnitude_vector, bias."""
    if not path.is_file():
        raise UserError(path, "there is no such file", do)
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises several kinds
        raise UserError(path, f"is not a whole safetensors file ({error})", do) from None
    layers: dict[str, dict[str, Tensor]] = {}
    form = re.compile(
        r"base_model\.model\.transformer\.(?P<layer>(?:h\.\d+|ln_f).*?)\.?(?:base_layer\.)?"
        r"(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?|bias)"
    )
    for key, value in tensors.items():
        if (match := form.fullmatch(key)) is None:
            raise UserError(path, f"holds {key}, which has no place in a LoRA GPT-2 here", do)
        layers.setdefault(match["layer"], {})[match["part"].removesuffix(".weight")] = value.float()
    return layers


def _scaling(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r of a layer; `rank` is that of its A. Raises UserError where the settings say otherwise."""
    said, alpha = (_setting(settings, key, name) for key in ("r", "lora_alpha"))
    if said != rank or not 0 < alpha < math.inf:
        what = f"says rank {said:g} and alpha {alpha:g} for {name}, the weights have rank {rank}"
        raise UserError(CONFIG_FILE, what, "give the files of one adapter")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") is True else rank)


def _setting(settings: Mapping[str, Any], key: str, name: str) -> float:
    """By PEFT's rule: a pattern fits where it is the end of the module's name.

    Raises UserError for what cannot be read and for a regular expression that may take forever.
    """
    try:
        patterns = settings.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
        if unsafe := next((end for end in patterns if not _PATTERN.fullmatch(end)), None):
            raise ValueError(rf"{brief(unsafe)} is more than names, .* before them, \d+, [0-9] and one (a|b)")
        fitting = [
            value for end, value in patterns.items() if re.match(rf"(.*\.)?({end})$", f"transformer.{name}")
        ]
        return float(fitting[0] if fitting else settings.get(key, 8))
    except (AttributeError, OverflowError, TypeError, ValueError, re.error) as error:
        raise UserError(CONFIG_FILE, f"has a {key} that cannot be read ({error})", "mend it") from None


def _structure(layers: Mapping[str, Mapping[str, Tensor]], base: GPT2LMModel, dora: bool) -> list[bool]:
    """Which of q, k, v the fused layers adapt one by one; [True] where they do not."""
    fused = {name: parts for name, parts in layers.items() if name.endswith("attn.c_attn")}
    parts = [[part.any() for part in layer["lora_B"].chunk(3)] for layer in fused.values()]
    enable = [any(bool(layer[i]) for layer in parts) for i in range(3)]
    for name, layer in fused.items():
        b, n = layer["lora_B"], sum(enable)
        if not n or b.shape[1] % n:
            return [True]
        lora = LayerLora(b.shape[1] // n, 1, enable)
        blocks = [
            part[:, i * lora.rank : (i + 1) * lora.rank] for i, part in enumerate(_enabled_rows(b, enable))
        ]
        if not torch.equal(_spread(torch.cat(blocks), lora), b):
            return [True]
        if dora:
            lengths = base.weights()[f"transformer.{name}.weight"].float().norm(dim=0)
            magnitude = layer["lora_magnitude_vector"]
            kept = _put(lengths, torch.cat(_enabled_rows(magnitude, enable)), lora)
            if not torch.allclose(kept, magnitude, rtol=1e-5):
                return [True]
    return enable


def _enabled_rows(tensor: Tensor, enable: Sequence[bool]) -> list[Tensor]:
    """Of the P equal parts of the first axis, the enabled ones."""
    return [part for part, on in zip(tensor.chunk(len(enable)), enable, strict=True) if on]


def _spread(b: Tensor, lora: LayerLora) -> Tensor:
    """Stacked Bs (n * out / P, R) as one block-structured B (out, n * R), zero where nothing is adapted."""
    n, parts = sum(lora.enable), len(lora.enable)
    size = len(b) // n
    whole = b.new_zeros(parts * size, n * lora.rank)
    for j, i in enumerate(i for i, on in enumerate(lora.enable) if on):
        whole[i * size : (i + 1) * size, j * lora.rank : (j + 1) * lora.rank] = b[j * size : (j + 1) * size]
    return whole


def _put(whole: Tensor, parts: Tensor, lora: LayerLora) -> Tensor:
    """`whole` (out,) with the enabled parts replaced by `parts` (n * out / P,)."""
    given = iter(parts.chunk(sum(lora.enable)))
    chunks = zip(whole.chunk(len(lora.enable)), lora.enable, strict=True)
    return torch.cat([next(given) if on else chunk for chunk, on in chunks])


def _modules(names: list[str], blocks: int) -> list[str]:
    """PEFT's target_modules: the kind of layer where every block's is adapted, else each one's name."""
    kinds = Counter(name.split(".", 2)[2] for name in names)
    return [kind for kind, count in kinds.items() if count == blocks] + [
        name for name in names if kinds[name.split(".", 2)[2]] != blocks
    ]
