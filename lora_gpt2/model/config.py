"""What a GPT-2 with LoRA is made of: the documented `GPT2Config` and the command line's two groups.

Knows no torch, so that a wrong setting is refused before anything is loaded.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

PROJECTIONS = ("q", "k", "v")
"""The three parts of GPT-2's fused attention projection, in the order in which they are stored."""


class GPT2Config:
    """Sizes of a GPT-2 and of its LoRA update, with the published implementation's argument names.

    `vocab_size_or_config_json_file` is the vocabulary's size or the path of a JSON file with the other
    arguments (ours, or the `config.json` of a transformers GPT-2 folder).

    * ``n_positions``: longest input the position table holds; ``n_ctx``: longest input accepted.
    * ``lora_attn_dim``: rank r (0: no LoRA); ``lora_attn_alpha``: alpha, the update is scaled by alpha / r.
    * ``lora_dropout``: before A; ``lora_r_dropout``: between A and B;
      ``fix_dropout``: on embeddings, attention weights and residual branches.
    * ``lora_targets``: the adapted ones of q, k and v (Hu et al. 2021, section 4.2: q and v).

    Raises ValueError, naming every fault, when the values do not fit each other.
    """

    def __init__(
        self,
        vocab_size_or_config_json_file: int | str | Path = 50257,
        n_positions: int = 1024,
        n_ctx: int = 1024,
        n_embd: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        lora_attn_dim: int = 0,
        lora_attn_alpha: float = 128,
        lora_dropout: float = 0.0,
        lora_r_dropout: float = 0.0,
        fix_dropout: float = 0.0,
        lora_targets: Sequence[str] = ("q", "v"),
    ) -> None:
        self.vocab_size: int = 0
        self.n_positions = n_positions
        self.n_ctx = n_ctx
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.lora_attn_dim = lora_attn_dim
        self.lora_attn_alpha = lora_attn_alpha
        self.lora_dropout = lora_dropout
        self.lora_r_dropout = lora_r_dropout
        self.fix_dropout = fix_dropout
        self.lora_targets = tuple(lora_targets)
        if isinstance(vocab_size_or_config_json_file, str | Path):
            self._read_json(Path(vocab_size_or_config_json_file))
        else:
            self.vocab_size = vocab_size_or_config_json_file
        if faults := self._faults():
            raise ValueError("; ".join(faults))

    @property
    def enable_lora(self) -> list[bool]:
        """Which of q, k, v are adapted; all False at rank 0."""
        return [self.lora_attn_dim > 0 and name in self.lora_targets for name in PROJECTIONS]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `GPT2Config.from_dict` takes them back."""
        return {**self.__dict__, "lora_targets": list(self.lora_targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPT2Config":
        values = dict(values)
        return cls(values.pop("vocab_size"), **values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GPT2Config) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # mutable, and compared by value

    def __repr__(self) -> str:
        return f"GPT2Config({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"

    def _read_json(self, path: Path) -> None:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "vocab_size" not in values:
            raise ValueError(f'{path}: expected a JSON object with at least "vocab_size"')
        if values.get("model_type") == "gpt2":  # transformers' file: its other keys are not ours
            if (activation := values.get("activation_function", "gelu_new")) != "gelu_new":
                raise ValueError(f'{path}: activation_function is "{activation}", GPT-2 uses "gelu_new"')
            values = {"n_ctx": values.get("n_positions", self.n_ctx), **values}
            values = {key: value for key, value in values.items() if key in self.__dict__}
        if unknown := sorted(values.keys() - self.__dict__.keys()):
            raise ValueError(f"{path}: no such settings: {', '.join(unknown)}")
        self.__dict__.update(values)
        self.lora_targets = tuple(self.lora_targets)

    def _faults(self) -> list[str]:
        faults = [
            f"{name} must be a whole number of at least 1, not {value!r}"
            for name in ("vocab_size", "n_positions", "n_ctx", "n_embd", "n_layer", "n_head")
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool) or value < 1
        ]
        if not faults and self.n_embd % self.n_head:
            faults.append(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not faults and self.n_ctx > self.n_positions:
            faults.append(f"n_ctx {self.n_ctx} is larger than n_positions {self.n_positions}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if getattr(self, name) <= 0:
                faults.append(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("lora_dropout", "lora_r_dropout", "fix_dropout"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} must be in [0, 1), not {getattr(self, name)}")
        return faults + self._lora_faults()

    def _lora_faults(self) -> list[str]:
        faults = []
        rank = self.lora_attn_dim
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            faults.append(f"LoRA rank must be a whole number of at least 0, not {rank!r}")
        if self.lora_attn_alpha <= 0:
            faults.append(f"LoRA alpha must be above 0, not {self.lora_attn_alpha}")
        if not self.lora_targets or len(set(self.lora_targets)) != len(self.lora_targets):
            faults.append(f"LoRA targets must be different ones of q, k, v, not {self.lora_targets}")
        if unknown := [target for target in self.lora_targets if target not in PROJECTIONS]:
            faults.append(f"LoRA targets must be among q, k, v, not {', '.join(map(str, unknown))}")
        return faults


class Projection(str, Enum):
    """A target of LoRA in the fused attention projection."""

    q = "q"
    k = "k"
    v = "v"


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


@dataclass
class LoraSettings:
    """The group `lora`: W = W0 + (alpha / rank) B A on the chosen projections (Hu et al. 2021, eq. 3)."""

    rank: int = 0
    """r; 0: no LoRA, every weight trains."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """On the input of A, while training."""
    rank_dropout: float = 0.0
    """Between A and B, while training."""
    targets: list[Projection] = field(default_factory=lambda: [Projection.q, Projection.v])
    """Which of q, k, v are adapted."""


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
        lora_targets=[projection.value for projection in lora.targets],
    )
