"""The names under which GPT-2 weights are published, and ours: ``transformer.h.0.attn.c_attn.weight``."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "model.", "transformer.")
"""Prefixes that DDP, torch.compile, PEFT, Lightning and transformers put before GPT-2's own names."""

TOKEN_TABLE, POSITION_TABLE = "transformer.wte.weight", "transformer.wpe.weight"

_SUFFIXES = {".g": ".weight", ".w": ".weight", ".b": ".bias"}
"""The endings of OpenAI's original names."""

_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
"""The causal mask that older files store beside the weights; it holds nothing learned."""

_LINEAR = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.(c_attn|c_proj|c_fc)\.weight")


def canonical(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A published state dict under our names, without mask buffers and without the tied head.

    Takes the dict itself or a checkpoint that holds it as ``model_state_dict`` (the published scripts),
    ``state_dict`` (Lightning) or ``model`` (nanoGPT, whose linear layers lie (out, in)). Raises ValueError
    for a value that is no tensor, a weight that is there twice, and a head that differs from the token
    embedding, which GPT-2 ties.
    """
    holders = ("model_state_dict", "state_dict", "model")
    inner = next((state_dict[key] for key in holders if isinstance(state_dict.get(key), Mapping)), state_dict)
    tensors: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key, value in inner.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f'"{key}" is a {type(value).__name__}, expected a tensor under a name')
        name = _bare(key)
        if f"transformer.{name}" in tensors:
            raise ValueError(f"holds transformer.{name} twice, under different names")
        if name.startswith("lm_head."):
            heads[key] = value
        elif not _MASK_BUFFER.fullmatch(name):
            tensors[f"transformer.{name}"] = value
    embedding = tensors.get(TOKEN_TABLE)
    for key, head in heads.items():
        if embedding is not None and not torch.equal(head, embedding):
            raise ValueError(f'"{key}" differs from the token embedding; GPT-2 ties the two')
    first = tensors.get("transformer.h.0.attn.c_attn.weight")
    if first is not None and first.ndim == 2 and first.shape[0] == 3 * first.shape[1]:  # (3 C, C)
        tensors = {name: value.T if _LINEAR.fullmatch(name) else value for name, value in tensors.items()}
    return tensors


def check_keys(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], may_be_missing: Sequence[str] = ()
) -> None:
    """Raises ValueError unless `given` holds the whole base, the whole update, or both, in fitting shapes.

    `may_be_missing`: patterns of names, with ``*`` and ``?``, that need not be there.
    """
    lora = {name for name in own if is_lora(name)}
    base = own.keys() - lora
    expected = {name for group in (base, lora) if group & given.keys() for name in group} or base
    problems = {
        "missing": sorted(
            name
            for name in expected - given.keys()
            if not any(fnmatchcase(name, pattern) for pattern in may_be_missing)
        ),
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
    """Whether a weight belongs to the update: factors, their start, magnitude or bias."""
    return name.rpartition(".")[2].startswith("lora_")


def _bare(key: str) -> str:
    while prefix := next((prefix for prefix in _WRAPPERS if key.startswith(prefix)), None):
        key = key.removeprefix(prefix)
    key = key.replace(".base_layer.", ".")  # where PEFT keeps what it wraps
    for ending, ours in _SUFFIXES.items():
        if key.endswith(ending):
            return key.removesuffix(ending) + ours
    return key


def _count(kind: str, names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} {kind} ({', '.join(names[:shown])}{more})"
