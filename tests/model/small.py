"""A small model and one batch, with its loss and gradients by the plain formulas and as training has them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel

GENERATOR = torch.Generator().manual_seed(1)
IDS, LABELS = (torch.randint(0, 300, (5, 23), generator=GENERATOR) for _ in range(2))
MASK = torch.rand(5, 23, generator=GENERATOR) < 0.5


def build(**options) -> GPT2LMModel:
    torch.manual_seed(0)
    config = GPT2Config(
        300,
        64,
        64,
        64,
        2,
        4,
        **{"initializer_range": 0.1, "lora_attn_dim": 4, "lora_attn_alpha": 32, **options},
    )
    model = GPT2LMModel(config).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_B", "lora_bias")):
            torch.nn.init.normal_(parameter, std=0.05)
    model.train_only_lora()
    return model


def gradients(model: GPT2LMModel, value: Tensor) -> dict[str, Tensor]:
    value.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def plain(model: GPT2LMModel) -> tuple[float, dict[str, Tensor]]:
    """All logits in float64, attention by torch, one formula."""
    model = model.double()
    logits = model.lm_head(model.transformer.hidden_states(IDS))
    losses = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), reduction="none", label_smoothing=0.1)
    value = losses[MASK.flatten()].sum() / (MASK.sum() + 1e-4)
    return value.item(), gradients(model, value)


def fast(model: GPT2LMModel) -> tuple[float, dict[str, Tensor]]:
    value = model.completion_loss(IDS, LABELS, MASK, 0.1)
    return value.item(), gradients(model, value)


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


VARIANTS = [
    {},
    {"bias": False},
    {"vocab_multiple": 64},
    {"lora_bias": "all"},
    {"lora_dora": True},
    {"lora_init": "pissa"},
    {"lora_targets": ["c_attn", "c_proj", "mlp_c_fc", "mlp_c_proj"], "lora_rslora": True},
]
