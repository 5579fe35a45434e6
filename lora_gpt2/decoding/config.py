"""The group `decoding`: beam search and its rules."""

from dataclasses import dataclass


@dataclass
class DecodingSettings:
    beam_size: int = 10
    """Beams of each query; 1: greedy."""
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
    batch_size: int = 16
    """Queries decoded side by side; changes speed, never results."""

    def __post_init__(self) -> None:
        for name, least in {
            "beam_size": 1,
            "no_repeat_ngram_size": 0,
            "min_length": 0,
            "eval_len": 1,
            "batch_size": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"decoding.{name} must be at least {least}, not {getattr(self, name)}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"decoding.repetition_penalty must be above 0, not {self.repetition_penalty}")
        if self.end_tokens is not None and not self.end_tokens:
            raise ValueError("decoding.end_tokens must name at least one token id, or be null")
