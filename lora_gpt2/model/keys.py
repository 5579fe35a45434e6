"""The names under which GPT-2 weights are published, and ours: ``transformer.h.0.attn.c_attn.weight``."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "model.", "transformer.")
"""Prefixes that DDP, torch.compile, PEFT, Lightning and transformers put before GPT-2's own names."""

_SUFFIXES = {".g": ".weight", ".w": ".weight", ".b": ".bias"}
"""The endings of OpenAI's original names."""

_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
"""The causal mask that older files store beside the weights; it holds nothing learned."""


def canonical(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A published state dict under our names, without mask buffers and without the tied head.

    Takes the dict itself or ``{"model_state_dict": dict}``. Raises ValueError for a value that is no
    tensor and for a head that differs from the token embedding, which GPT-2 ties.
    """
    inner = state_dict.get("model_state_dict", state_dict.get("state_dict", state_dict))
    tensors: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key, value in inner.items():
        if not isinstance(value, Tensor):
            raise ValueError(f'"{key}" is a {type(value).__name__}, expected a tensor')
        name = _bare(key)
        if name.startswith("lm_head."):
            heads[key] = value
        elif not _MASK_BUFFER.fullmatch(name):
            tensors[f"transformer.{name}"] = value
    embedding = tensors.get("transformer.wte.weight")
    for key, head in heads.items():
        if embedding is not None and not torch.equal(head, embedding):
            raise ValueError(f'"{key}" differs from the token embedding; GPT-2 ties the two')
    return tensors


def check_keys(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless `given` holds the whole base, the whole update, or both, in fitting shapes."""
    lora = {name for name in own if is_lora(name)}
    base = own.keys() - lora
    expected = {name for group in (base, lora) if group & given.keys() for name in group} or base
    problems = {
        "missing": sorted(expected - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "misshapen": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & given.keys())
            if own[name].shape != given[name].shape
        ],
    }
    if any(problems.values()):
        raise ValueError("; ".join(_count(kind, names) for kind, names in problems.items() if names))


def is_lora(name: str) -> bool:
    return name.endswith(("lora_A", "lora_B"))


def _bare(key: str) -> str:
    while prefix := next((prefix for prefix in _WRAPPERS if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    for ending, ours in _SUFFIXES.items():
        if key.endswith(ending):
            return key.removesuffix(ending) + ours
    return key


def _count(kind: str, names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {kind} ({', '.join(names[:shown])}{more})"
