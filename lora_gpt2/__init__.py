"""Adapt GPT-2 with LoRA to data-to-text generation.

The model's documented classes load when they are first asked for; importing the package alone loads no
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_gpt2.model.config import GPT2Config
    from lora_gpt2.model.language_model import GPT2LMHead, GPT2LMModel
    from lora_gpt2.model.lora import MergedLinear
    from lora_gpt2.model.transformer import GPT2Model

__all__ = ["GPT2Config", "GPT2LMHead", "GPT2LMModel", "GPT2Model", "MergedLinear"]

_HOMES = {
    "GPT2Config": "config",
    "GPT2LMHead": "language_model",
    "GPT2LMModel": "language_model",
    "GPT2Model": "transformer",
    "MergedLinear": "lora",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lora_gpt2.model.{_HOMES[name]}"), name)
