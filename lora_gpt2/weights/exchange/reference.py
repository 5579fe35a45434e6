"""The published scripts' .pt files: LoRA matrices alone, or every weight."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_gpt2.errors import UserError
from lora_gpt2.files import replacing
from lora_gpt2.model.config import PROJECTIONS, GPT2Config
from lora_gpt2.model.keys import TOKEN_TABLE, canonical, is_lora
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.store import plain_update, read_pickle


def write(path: Path, model: GPT2LMModel, everything: bool = False) -> tuple[int, float]:
    """The LoRA matrices, or all weights with `everything`.

    Returns the rank and the alpha that the file does not hold; they are those of training but for rsLoRA,
    PiSSA and OLoRA. Raises UserError for an update that the published code cannot compute: other targets
    than q, k, v, ranks that differ by layer, DoRA, trained biases, a model without biases.
    """
    config, tensors = plain_update(model)
    kinds = {(lora.rank, config.scaling(lora), *lora.enable) for lora in config.lora_layers.values()}
    blocks = [name for name in config.lora_layers if name.endswith("attn.c_attn")]
    plain = {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B"}
    fits = plain and len(kinds) == 1 and len(blocks) == len(config.lora_layers) == config.n_layer
    if not fits or "c_attn" in config.lora_targets or not config.bias:
        reasons = {
            "the model has no biases": not config.bias,
            "it is DoRA": config.lora_dora,
            "it trains biases": config.lora_bias != "none",
        }
        reason = next((reason for reason, true in reasons.items() if true), "it has others")
        what = f"the published scripts know one rank and alpha on q, k and v alone; {reason}"
        raise UserError(path, what, "merge it, or export it for peft" if config.bias else "merge it")
    if everything:
        base = {name: value for name, value in model.weights().items() if not is_lora(name)}
        tensors = {**base, **tensors, "lm_head.decoder.weight": model.weights()[TOKEN_TABLE]}
    named = {f"module.{name}": value.detach().cpu().clone() for name, value in tensors.items()}
    with replacing(path) as temporary:
        torch.save({"model_state_dict": named}, temporary)
    lora = next(iter(config.lora_layers.values()))
    return lora.rank, config.scaling(lora) * lora.rank


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base weights and the LoRA matrices in the file; either may be empty. Raises UserError."""
    held = read_pickle(path)
    try:
        tensors = canonical(held)
    except ValueError as error:
        raise UserError(path, str(error), "give a file that the published scripts wrote") from None
    base = {name: value for name, value in tensors.items() if not is_lora(name)}
    return base, {name: value for name, value in tensors.items() if is_lora(name)}


def adapter_config(
    path: Path,
    update: dict[str, Tensor],
    base: GPT2Config,
    alpha: float | None,
    rank: int | None,
    targets: Sequence[str] | None,
) -> GPT2Config:
    """The config of the model `base` with the `update` that `read` found.

    The file holds neither alpha nor the targets' names: `alpha` must be given, `targets` unless they are
    two (then q and v) or all three. `rank`, when given, is checked. Raises UserError.
    """
    b = update.get("transformer.h.0.attn.c_attn.lora_B")
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
    try:
        return GPT2Config.from_dict({**base.to_dict(), **lora})
    except ValueError as error:
        raise UserError("import reference", str(error), "change --alpha or --targets") from None
