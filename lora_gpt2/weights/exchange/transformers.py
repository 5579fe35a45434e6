"""A GPT-2 in transformers' form: config.json and model.safetensors, beside the tokenizer's files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_gpt2.files import write_json
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.keys import is_lora
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.store import MODEL_FILE, Description, write_weights


def write(
    folder: Path, model: GPT2LMModel, description: Description, end_token: int, dtype: torch.dtype
) -> None:
    """Writes the model as its weights are now, in `dtype`; AutoModelForCausalLM loads it, and so does base=.

    Call `model.merge()` before to have the update in it.
    """
    sizes = model.config.without_lora().to_dict()
    config = GPT2Config.from_dict({**sizes, "bias": True, "vocab_multiple": 1})
    tensors = {name: value.to(dtype) for name, value in weights(model).items()}
    about = replace(description, kind="model", config=config.to_dict(), base_sha256="", base_source=None)
    write_weights(folder / MODEL_FILE, tensors, about)
    name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**config_json(config, end_token), "torch_dtype": name})


def config_json(config: GPT2Config, end_token: int) -> dict[str, Any]:
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


def weights(model: GPT2LMModel) -> dict[str, Tensor]:
    """The base weights under transformers' names, merged or as they are; absent biases are zeros."""
    tensors = {name: value.detach() for name, value in model.weights().items() if not is_lora(name)}
    if not model.config.bias:
        for name, value in list(tensors.items()):
            if name.endswith(".weight") and ".wte." not in name and ".wpe." not in name:
                tensors[name.replace(".weight", ".bias")] = value.new_zeros(value.shape[-1])
    return tensors
