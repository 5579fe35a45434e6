"""The command line's two groups that make a `GPT2Config`, and what a model that only decodes computes in."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lora_gpt2.model.config import GPT2Config, LoraBias, LoraInit, Target


class Precision(str, Enum):
    """What a model that only decodes computes its products in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


@dataclass
class ModelSettings:
    """The group `model`: an architecture card."""

    name: str
    """The card's name, e.g. gpt2.sm; kept in every file that the model leaves."""
    vocab_size: int | None = None
    """Number of token ids; null: the data's tokenizer says it."""
    n_positions: int = 1024
    """Longest input, in tokens."""
    n_embd: int = 768
    """Width of the residual stream."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads; divides n_embd."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    dropout: float = 0.0
    """On embeddings, attention weights and residual branches, while training."""
    bias: bool = True
    """Whether linear layers and LayerNorms have one."""
    vocab_multiple: int = 1
    """The token table is padded to a multiple of this, e.g. 64; the extra ids are never predicted."""


@dataclass
class LoraSettings:
    """The group `lora`: W = W0 + (alpha / rank) B A on the chosen projections (Hu et al. 2021, eq. 3)."""

    rank: Any = 0
    """r, a whole number; 0: no LoRA, every weight trains. A list: several adapters at once."""
    alpha: Any = 32.0
    """The update is scaled by alpha / rank. A number or a list."""
    dropout: Any = 0.0
    """On the input of A, while training. A number or a list."""
    rank_dropout: float = 0.0
    """Between A and B, while training."""
    targets: list[Target] = field(default_factory=lambda: [Target.q, Target.v])
    """What is adapted: q, k, v, or c_attn (the three as one), c_proj, mlp_c_fc, mlp_c_proj."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks by layer, e.g. {h.0.*:8,*.mlp.*:2}; the first pattern that fits counts, 0 leaves out."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas by layer."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA)."""
    dora: bool = False
    """Train the magnitude of each output apart from its direction (DoRA)."""
    init: LoraInit = LoraInit.kaiming
    """kaiming: A random, B zero; pissa, olora: the leading factors of the base's SVD or QR."""
    bias: LoraBias = LoraBias.none
    """Which biases train too: none, lora_only (of the adapted layers), all."""
    alpha_ratio: float | None = None
    """alpha as so many times the rank, in place of `alpha`: what a sweep over ranks may want."""

    def __post_init__(self) -> None:
        if self.alpha_ratio is not None:
            several = isinstance(self.rank, list)
            self.alpha = (
                [self.alpha_ratio * r for r in self.rank] if several else self.alpha_ratio * self.rank
            )


def gpt2_config(model: ModelSettings, lora: LoraSettings, vocab_size: int) -> GPT2Config:
    """The two groups of the command line as one `GPT2Config`; `vocab_size` is the tokenizer's.

    Raises ValueError when a value is out of range or the card's vocabulary is smaller than the tokenizer's.
    """
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise ValueError(f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's {vocab_size}")
    return GPT2Config(
        model.vocab_size or vocab_size,
        n_positions=model.n_positions,
        n_ctx=model.n_positions,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        layer_norm_epsilon=model.layer_norm_epsilon,
        initializer_range=model.initializer_range,
        lora_attn_dim=lora.rank,
        lora_attn_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        lora_r_dropout=lora.rank_dropout,
        fix_dropout=model.dropout,
        lora_targets=[target.value for target in lora.targets],
        bias=model.bias,
        vocab_multiple=model.vocab_multiple,
        lora_rank_pattern=lora.rank_pattern,
        lora_alpha_pattern=lora.alpha_pattern,
        lora_rslora=lora.rslora,
        lora_dora=lora.dora,
        lora_init=lora.init.value,
        lora_bias=lora.bias.value,
    )
