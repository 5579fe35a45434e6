"""The group `decoding`: beam search, sampling, and their rules."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_gpt2.errors import UserError
from lora_gpt2.model.settings import Precision


class Strategy(str, Enum):
    """How a beam is continued."""

    beam = "beam"
    sample = "sample"


class Dialect(str, Enum):
    """Whose beam search."""

    reference = "reference"
    hf = "hf"


class EarlyStopping(str, Enum):
    """When `dialect=hf` takes a query for done."""

    heuristic = "heuristic"
    first = "first"
    never = "never"


@dataclass
class DecodingSettings:
    strategy: Strategy = Strategy.beam
    """beam: search for the best outputs; sample: draw each beam's tokens by chance."""
    beam_size: int = 10
    """Beams of each query; 1: greedy. With strategy=sample the samples of each query."""
    n_best: int = 1
    """Outputs of each query that are kept, best first; at most beam_size."""
    length_penalty: float = 0.9
    """A hypothesis' score is its log-probability / length ** length_penalty."""
    no_repeat_ngram_size: int = 4
    """No n-gram of this size occurs twice in an output; 0: off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already in the output; 1: off."""
    min_length: int = 0
    """End tokens are excluded from the first so many tokens."""
    end_tokens: list[int] | None = None
    """Token ids that end an output; null: the tokenizer's end token and its blank line, if it has one."""
    eval_len: int = 64
    """Longest output, in tokens."""
    dialect: Dialect = Dialect.reference
    """reference: the LoRA paper's beam search; hf: that of transformers, which keeps as many living beams
    however many have ended, stops by `early_stopping`, and counts the context as said."""
    early_stopping: EarlyStopping = EarlyStopping.heuristic
    """Of dialect=hf; transformers' False, True and "never"."""
    beam_groups: int = 1
    """The beams are searched in so many groups, one after the other (Vijayakumar et al. 2018)."""
    diversity_penalty: float = 0.5
    """What a token loses for each beam of an earlier group that chose it at the same step."""
    temperature: float = 1.0
    """Of strategy=sample: divides the logits."""
    top_k: int = 0
    """Of strategy=sample: only the so many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Of strategy=sample: only the likeliest tokens that together have this probability."""
    seed: int = 42
    """Of strategy=sample."""
    precision: Precision = Precision.float32
    """float32; or bfloat16, or (on a CPU) int8 products: faster, and a few outputs differ."""
    batch_size: int | None = None
    """Queries decoded side by side, which changes speed and memory alone; null: by the free memory."""

    def __post_init__(self) -> None:
        for name, least in {
            "beam_size": 1,
            "n_best": 1,
            "no_repeat_ngram_size": 0,
            "min_length": 0,
            "eval_len": 1,
            "beam_groups": 1,
            "diversity_penalty": 0,
            "top_k": 0,
            "batch_size": 1,
        }.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"decoding.{name} must be at least {least}, not {value}")
        for name in ("repetition_penalty", "temperature", "top_p"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"decoding.{name} must be above 0 and finite, not {getattr(self, name)}")
        if not -10 <= self.length_penalty <= 10:
            raise ValueError(f"decoding.length_penalty must be from -10 to 10, not {self.length_penalty}")
        if not self.diversity_penalty < math.inf:
            raise ValueError(f"decoding.diversity_penalty must be finite, not {self.diversity_penalty}")
        if self.top_p > 1:
            raise ValueError(f"decoding.top_p must be at most 1, not {self.top_p}")
        if self.n_best > self.beam_size:
            raise ValueError(
                f"decoding.n_best {self.n_best} is more than decoding.beam_size {self.beam_size}"
            )
        self._check_strategy()
        if self.end_tokens is not None and not self.end_tokens:
            raise ValueError("decoding.end_tokens must name at least one token id, or be null")

    @property
    def takes_phrases(self) -> bool:
        """Whether outputs can be required to contain phrases."""
        plain = self.strategy is Strategy.beam and self.dialect is Dialect.reference
        return plain and self.beam_groups == 1

    def _check_strategy(self) -> None:
        if self.beam_size % self.beam_groups:
            what = f"decoding.beam_size {self.beam_size} is not divisible by"
            raise ValueError(f"{what} decoding.beam_groups {self.beam_groups}")
        if self.beam_groups > 1 and (self.strategy, self.dialect) != (Strategy.beam, Dialect.reference):
            raise ValueError(
                "decoding.beam_groups needs decoding.strategy=beam and decoding.dialect=reference"
            )
        if self.dialect is Dialect.hf and self.strategy is not Strategy.beam:
            raise ValueError("decoding.dialect=hf is a beam search: it needs decoding.strategy=beam")


def decoding_settings(given: Mapping[str, Any], where: str) -> DecodingSettings:
    """The settings with their defaults. Raises UserError, at `where`, for what is no setting or no value."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(DecodingSettings), dict(given))
        return cast(DecodingSettings, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, ValueError) as error:
        do = "give settings of the group decoding, e.g. {beam_size: 4}"
        raise UserError(where, str(error).splitlines()[0], do) from None
