"""Adapters and models in other programs' files: the published scripts', PEFT's, transformers'.

C = n_embd, R rank of one projection, n adapted projections of a layer, P parts of its output.
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
from lora_gpt2.files import read_json, replacing, write_json
from lora_gpt2.model.config import PROJECTIONS, TARGETS, GPT2Config, LayerLora
from lora_gpt2.model.keys import canonical, is_lora
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.store import plain_update

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


# --- the published scripts ---------------------------------------------------------------------------------


def write_reference(path: Path, model: GPT2LMModel, everything: bool = False) -> None:
    """A .pt file as the published scripts write it: the LoRA matrices, or all weights with `everything`.

    Raises UserError for an update that their code cannot compute: other targets than q, k, v, ranks that
    differ by layer, DoRA, trained biases, a model without biases.
    """
    config, tensors = plain_update(model)
    kinds = {(lora.rank, config.scaling(lora), *lora.enable) for lora in config.lora_layers.values()}
    blocks = [name for name in config.lora_layers if name.endswith("attn.c_attn")]
    plain = {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B"}
    fits = plain and len(kinds) == 1 and len(blocks) == len(config.lora_layers) == config.n_layer
    if not fits or "c_attn" in config.lora_targets or not config.bias:
        what = "the published scripts know one rank and alpha on q, k and v alone"
        raise UserError(path, what, "export for peft or transformers")
    if everything:
        tensors = {**model.weights(), "lm_head.decoder.weight": model.transformer.wte.weight}
    named = {f"module.{name}": value.detach().cpu().clone() for name, value in tensors.items()}
    with replacing(path) as temporary:
        torch.save({"model_state_dict": named}, temporary)


def read_reference(
    path: Path, base: GPT2Config, alpha: float | None, rank: int | None, targets: Sequence[str] | None
) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The update in a .pt file of the published scripts, and the config with it.

    The file holds neither alpha nor the targets' names: `alpha` must be given, `targets` unless they are
    two (then q and v) or all three. `rank`, when given, is checked. Raises UserError.
    """
    tensors = {name: value for name, value in _torch_load(path).items() if is_lora(name)}
    b = tensors.get("transformer.h.0.attn.c_attn.lora_B")
    if b is None or b.ndim != 2 or b.shape[0] % base.n_embd:
        raise UserError(path, f"holds no LoRA of a GPT-2 of width {base.n_embd}", "give its own base")
    count, found = b.shape[0] // base.n_embd, b.shape[1]
    if rank is not None and rank != found:
        raise UserError(path, f"has rank {found}, not {rank}", f"use --rank {found}, or leave it out")
    if alpha is None:
        raise UserError(path, "does not say its alpha", "give it: --alpha 32 in the paper's GPT-2 runs")
    targets = targets or {2: ("q", "v"), 3: PROJECTIONS}.get(count)
    if targets is None or len(targets) != count or not set(targets) <= set(PROJECTIONS):
        what = f"adapts {count} of q, k and v and does not say which"
        raise UserError(path, what, f"name them: --targets {','.join(PROJECTIONS[:count])}")
    lora = {"lora_attn_dim": found, "lora_attn_alpha": alpha, "lora_targets": list(targets)}
    return GPT2Config.from_dict({**base.to_dict(), **lora}), tensors


# --- PEFT --------------------------------------------------------------------------------------------------


def write_peft(folder: Path, model: GPT2LMModel, base_name: str) -> None:
    """A PEFT adapter for transformers' GPT-2 whose logits are the model's own.

    PEFT knows one A and B for the fused projection: the As are stacked, B becomes block-structured with zero
    rows for what is not adapted, and rank and alpha grow together, so that the scaling stays.
    Raises UserError for a model without biases, which transformers does not have.
    """
    config, update = plain_update(model)
    if not config.bias:
        raise UserError(folder, "transformers' GPT-2 has biases, this model has none", "merge it instead")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, lora in config.lora_layers.items():
        own, theirs = f"transformer.{name}.", f"{_PEFT_PREFIX}transformer.{name}."
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
        tensors[f"{_PEFT_PREFIX}{stem}{inner}"] = weights[f"{stem}bias"] + update[name]
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    write_json(
        folder / PEFT_CONFIG,
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
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(folder / PEFT_WEIGHTS) as temporary:
        save_file(values, temporary, {"format": "pt"})


def read_peft(folder: Path, base: GPT2LMModel) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The update in a PEFT adapter's folder and the config with it; `base` is the model below it.

    Where B has the block structure that `write_peft` gives it, q, k and v are separate targets again;
    otherwise the fused projection is one target, c_attn. Raises UserError.
    """
    do = "give the folder that save_pretrained wrote, of a LoRA adapter for this GPT-2"
    settings = read_json(folder / PEFT_CONFIG, do)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise UserError(folder / PEFT_CONFIG, "describes no LoRA adapter", do)
    layers = _peft_layers(folder / PEFT_WEIGHTS, do)
    own = {f"h.{i}.{kind}" for i in range(base.config.n_layer) for kind in TARGETS.values()}
    adapted = {name: parts for name, parts in layers.items() if "lora_A" in parts and "lora_B" in parts}
    if foreign := [name for name in adapted if name not in own] or (not adapted and ["no LoRA at all"]):
        raise UserError(folder / PEFT_WEIGHTS, f"adapts {foreign[0]}, which is no layer of this GPT-2", do)
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
        ranks[name], alphas[name] = rank, _peft_scaling(settings, name, len(parts["lora_A"])) * rank
    for name, parts in layers.items():
        if "bias" in parts:
            key = f"transformer.{name}.bias"
            if key not in weights or weights[key].shape != parts["bias"].shape:
                raise UserError(folder / PEFT_WEIGHTS, f"has a bias of {name}, which does not fit", do)
            tensors[f"transformer.{name}.lora_bias"] = parts["bias"] - weights[key]
    kinds = {name.split(".", 2)[2] for name in adapted}
    targets = [target for target, kind in TARGETS.items() if kind in kinds and target != "c_attn"]
    if "attn.c_attn" in kinds:
        named = [part for part, on in zip(PROJECTIONS, enable, strict=False) if on]
        targets = (["c_attn"] if len(enable) == 1 else named) + targets
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    expected = [f"h.{i}.{kind}" for i in range(base.config.n_layer) for kind in sorted(kinds)]
    has_bias = any(name.endswith("lora_bias") for name in tensors)
    lora = {
        "lora_attn_dim": rank,
        "lora_attn_alpha": alpha,
        "lora_targets": targets,
        "lora_rank_pattern": {name: ranks.get(name, 0) for name in expected if ranks.get(name) != rank},
        "lora_alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": float(settings.get("lora_dropout", 0)),
        "lora_dora": bool(settings.get("use_dora", False)),
        "lora_bias": settings.get("bias", "none") if has_bias else "none",
    }
    return GPT2Config.from_dict({**base.config.to_dict(), **lora}), tensors


def _peft_layers(path: Path, do: str) -> dict[str, dict[str, Tensor]]:
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


def _peft_scaling(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r by PEFT's rule: a pattern fits where it is the end of the module's name."""
    patterns = settings.get("alpha_pattern") or {}
    fitting = (
        value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", f"transformer.{name}")
    )
    alpha = float(next(fitting, settings.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


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


# --- transformers ------------------------------------------------------------------------------------------


def transformers_config(config: GPT2Config, end_token: int) -> dict[str, Any]:
    """What config.json says of a GPT-2 with these sizes."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_ctx": config.n_ctx,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "activation_function": "gelu_new",
        "attn_pdrop": config.fix_dropout,
        "embd_pdrop": config.fix_dropout,
        "resid_pdrop": config.fix_dropout,
        "bos_token_id": end_token,
        "eos_token_id": end_token,
        "tie_word_embeddings": True,
    }


def transformers_weights(model: GPT2LMModel) -> dict[str, Tensor]:
    """The weights under transformers' names, as they are now (merged or not); absent biases are zeros."""
    tensors = {name: value.detach() for name, value in model.weights().items() if not is_lora(name)}
    if not model.config.bias:
        for name, value in list(tensors.items()):
            if name.endswith(".weight") and ".wte." not in name and ".wpe." not in name:
                tensors[name.replace(".weight", ".bias")] = value.new_zeros(value.shape[-1])
    return tensors


def _torch_load(path: Path) -> dict[str, Tensor]:
    """The canonical tensors of a .pt file. Raises UserError for anything but plain tensors."""
    do = "give a whole file of weights, from a source you trust"
    if not path.is_file():
        raise UserError(path, "there is no such file", do)
    try:
        return canonical(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises several kinds for a damaged or unsafe file
        what = f"could not be read as plain tensors ({str(error).splitlines()[0]})"
        raise UserError(path, what, do) from None
