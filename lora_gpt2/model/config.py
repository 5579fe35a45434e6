"""What a GPT-2 with LoRA is made of: the documented `GPT2Config`.

Knows no torch, so that a wrong setting is refused before anything is loaded.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from lora_gpt2.errors import differences
from lora_gpt2.files import read_json

PROJECTIONS = ("q", "k", "v")
"""The three parts of GPT-2's fused attention projection, in the order in which they are stored."""

TARGETS = {
    "c_attn": "attn.c_attn",
    "c_proj": "attn.c_proj",
    "mlp_c_fc": "mlp.c_fc",
    "mlp_c_proj": "mlp.c_proj",
}
"""LoRA's other targets and the layer of a block that each adapts as a whole."""

_THEIR_SIZES = (
    "vocab_size", "n_positions", "n_ctx", "n_embd", "n_layer", "n_head", "layer_norm_epsilon",
    "initializer_range",
)  # fmt: skip
"""What is taken from transformers' config.json."""

_THEIR_USUAL = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""What transformers' config.json may say otherwise, and no GPT-2 here computes."""


_MOST_LAYERS = 1_000
"""The largest GPT-2 has 48; a file may say any number, and each takes time to look at."""


class Target(str, Enum):
    """What LoRA adapts in each block."""

    q = "q"
    k = "k"
    v = "v"
    c_attn = "c_attn"
    c_proj = "c_proj"
    mlp_c_fc = "mlp_c_fc"
    mlp_c_proj = "mlp_c_proj"


class LoraInit(str, Enum):
    """How A and B start."""

    kaiming = "kaiming"
    pissa = "pissa"
    olora = "olora"


class LoraBias(str, Enum):
    """Which biases train with LoRA."""

    none = "none"
    lora_only = "lora_only"
    all = "all"


class LayerLora(NamedTuple):
    """What LoRA does to one linear layer."""

    rank: int
    alpha: float
    enable: list[bool]
    """Which of the equal parts of its output are adapted."""


class GPT2Config:
    """Sizes of a GPT-2 and of its LoRA update, with the published implementation's argument names.

    `vocab_size_or_config_json_file` is the vocabulary's size or the path of a JSON file with the other
    arguments (ours, or the `config.json` of a transformers GPT-2 folder).

    * ``n_positions``: longest input the position table holds; ``n_ctx``: longest input accepted.
    * ``lora_attn_dim``: rank r (0: no LoRA); ``lora_attn_alpha``: alpha, the update is scaled by alpha / r.
    * ``lora_dropout``: before A; ``lora_r_dropout``: between A and B;
      ``fix_dropout``: on embeddings, attention weights and residual branches.
    * ``lora_targets``: what is adapted in each block: q, k, v (Hu et al. 2021, section 4.2: q and v), or
      c_attn, one update for all three; c_proj; mlp_c_fc; mlp_c_proj.
    * ``bias``: whether linear layers and LayerNorms have one.
    * ``vocab_multiple``: the token table is padded to a multiple of this; the extra ids are never predicted.
    * ``lora_rank_pattern``, ``lora_alpha_pattern``: other ranks and alphas for the layers whose name, e.g.
      ``h.3.attn.c_attn``, fits a pattern with ``*`` and ``?``; the first that fits counts, rank 0 leaves out.
    * ``lora_rslora``: scaled by alpha / sqrt(r) (Kalajdzievski 2023).
    * ``lora_dora``: the magnitude of each output trains apart from its direction (Liu et al. 2024).
    * ``lora_init``: kaiming (A random, B zero), pissa (Meng et al. 2024) or olora (Buyukakyuz 2024): A and B
      start as the leading factors of the base's SVD or QR, and what they start with is subtracted.
    * ``lora_bias``: which biases train too: none, lora_only (of the adapted layers), all.

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
        *,
        bias: bool = True,
        vocab_multiple: int = 1,
        lora_rank_pattern: Mapping[str, int] | None = None,
        lora_alpha_pattern: Mapping[str, float] | None = None,
        lora_rslora: bool = False,
        lora_dora: bool = False,
        lora_init: str = "kaiming",
        lora_bias: str = "none",
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
        self.bias = bias
        self.vocab_multiple = vocab_multiple
        self.lora_rank_pattern = dict(lora_rank_pattern or {})
        self.lora_alpha_pattern = dict(lora_alpha_pattern or {})
        self.lora_rslora = lora_rslora
        self.lora_dora = lora_dora
        self.lora_init = lora_init
        self.lora_bias = lora_bias
        if isinstance(vocab_size_or_config_json_file, str | Path):
            self._read_json(Path(vocab_size_or_config_json_file))
        else:
            self.vocab_size = vocab_size_or_config_json_file
        if faults := self._faults():
            raise ValueError("; ".join(faults))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def lora_layers(self) -> dict[str, LayerLora]:
        """The adapted layers by name, ``h.0.attn.c_attn`` and so on, first block first; none at rank 0."""
        layers = {}
        for block in range(self.n_layer if self.lora_attn_dim else 0):
            for kind, enable in self._lora_kinds().items():
                name = f"h.{block}.{kind}"
                rank = _first_match(self.lora_rank_pattern, name, self.lora_attn_dim)
                alpha = _first_match(self.lora_alpha_pattern, name, self.lora_attn_alpha)
                if rank:
                    layers[name] = LayerLora(rank, alpha, enable)
        return layers

    def scaling(self, lora: LayerLora) -> float:
        """The factor of B A."""
        return lora.alpha / (math.sqrt(lora.rank) if self.lora_rslora else lora.rank)

    def differences(self, here: "GPT2Config", names: Iterable[str]) -> list[str]:
        """Those of the settings `names` that differ, with both values."""
        return differences(self.to_dict(), here.to_dict(), names)

    def without_lora(self) -> "GPT2Config":
        """The same sizes, nothing adapted."""
        return GPT2Config.from_dict({k: v for k, v in self.to_dict().items() if not k.startswith("lora_")})

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
        values = read_json(path, "give the config.json of a GPT-2")
        if not isinstance(values, dict) or "vocab_size" not in values:
            raise ValueError(f'{path}: expected a JSON object with at least "vocab_size"')
        if values.get("model_type") == "gpt2":  # transformers' file: its other keys are not ours
            for key, usual in _THEIR_USUAL.items():
                if (found := values.get(key, usual)) != usual:
                    raise ValueError(f"{path}: {key} is {found!r}, GPT-2 has {usual!r}")
            width = values.get("n_embd", self.n_embd)
            if (inner := values.get("n_inner")) not in (None, 4 * width):
                raise ValueError(f"{path}: n_inner is {inner}, GPT-2 has 4 * n_embd, {4 * width}")
            values = {"n_ctx": values.get("n_positions", self.n_ctx), **values}
            values = {key: value for key, value in values.items() if key in _THEIR_SIZES}
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
        if not faults and self.n_layer > _MOST_LAYERS:
            return [f"n_layer must be at most {_MOST_LAYERS:,}, not {self.n_layer:,}"]
        if not faults and self.n_embd % self.n_head:
            faults.append(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not faults and self.n_ctx > self.n_positions:
            faults.append(f"n_ctx {self.n_ctx} is larger than n_positions {self.n_positions}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            if not 0 < getattr(self, name) < math.inf:
                faults.append(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("lora_dropout", "lora_r_dropout", "fix_dropout"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.vocab_multiple < 1:
            faults.append(f"vocab_multiple must be at least 1, not {self.vocab_multiple}")
        return faults + self._lora_faults() + self._variant_faults()

    def _lora_faults(self) -> list[str]:
        faults = []
        rank = self.lora_attn_dim
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            faults.append(f"LoRA rank must be a whole number of at least 0, not {rank!r}")
        if not 0 < self.lora_attn_alpha < math.inf:
            faults.append(f"LoRA alpha must be above 0, not {self.lora_attn_alpha}")
        known = (*PROJECTIONS, *TARGETS)
        if not self.lora_targets or len(set(self.lora_targets)) != len(self.lora_targets):
            faults.append(
                f"LoRA targets must be different ones of {', '.join(known)}, not {self.lora_targets}"
            )
        if unknown := [target for target in self.lora_targets if target not in known]:
            faults.append(
                f"LoRA targets must be among {', '.join(known)}, not {', '.join(map(str, unknown))}"
            )
        if "c_attn" in self.lora_targets and set(self.lora_targets) & set(PROJECTIONS):
            faults.append(
                "LoRA target c_attn adapts q, k and v as one: name it, or some of q, k, v, not both"
            )
        return faults

    def _variant_faults(self) -> list[str]:
        faults = []
        for name, value, kind in (("init", self.lora_init, LoraInit), ("bias", self.lora_bias, LoraBias)):
            if value not in (known := [member.value for member in kind]):
                faults.append(f"LoRA {name} must be one of {', '.join(known)}, not {value}")
        if self.lora_bias != "none" and not self.bias:
            faults.append(f"LoRA bias {self.lora_bias} needs a model with biases, bias is False")
        ranks = self.lora_rank_pattern.values()
        if any(not isinstance(rank, int) or isinstance(rank, bool) or rank < 0 for rank in ranks):
            faults.append(f"ranks must be whole numbers of at least 0, not {self.lora_rank_pattern}")
        if any(not 0 < alpha < math.inf for alpha in self.lora_alpha_pattern.values()):
            faults.append(f"alphas must be above 0, not {self.lora_alpha_pattern}")
        if faults or not isinstance(self.n_layer, int) or not self.lora_attn_dim:
            return faults
        return self._layer_faults()

    def _layer_faults(self) -> list[str]:
        """Of what the patterns make of the layers."""
        faults = []
        kinds, layers = self._lora_kinds(), self.lora_layers
        names = [f"h.{i}.{kind}" for i in range(self.n_layer) for kind in kinds]
        for pattern in (*self.lora_rank_pattern, *self.lora_alpha_pattern):
            if not any(fnmatchcase(name, pattern) for name in names):
                there = ", ".join(f"h.0.{kind}" for kind in kinds)
                faults.append(f"the pattern {pattern} fits no layer that is adapted: {there} and so on")
        if not layers and self.lora_bias != "all":
            faults.append(f"LoRA rank is 0 in every layer by {self.lora_rank_pattern}: nothing would train")
        largest = max((lora.rank for lora in layers.values()), default=0)
        if self.lora_init != "kaiming" and largest > self.n_embd:
            most = f"at most n_embd {self.n_embd}"
            faults.append(f"LoRA init {self.lora_init} needs ranks of {most}, not {largest}")
        return faults

    def _lora_kinds(self) -> dict[str, list[bool]]:
        """The adapted layers of a block and which of their equal parts are adapted."""
        kinds = {name: [True] for target, name in TARGETS.items() if target in self.lora_targets}
        parts = [part in self.lora_targets for part in PROJECTIONS]
        return {"attn.c_attn": parts, **kinds} if any(parts) else kinds


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), default)
