"""The group `data`: which corpus, where it lies, how it becomes batches."""

from dataclasses import dataclass
from enum import Enum


class Corpus(str, Enum):
    """The corpora that can be encoded, and `jsonl` for rows that are."""

    demo = "demo"
    demo_base = "demo_base"
    e2e = "e2e"
    webnlg = "webnlg"
    dart = "dart"
    jsonl = "jsonl"


class Objective(str, Enum):
    """Where the loss is taken."""

    clm = "clm"
    jlm = "jlm"


@dataclass
class DataSettings:
    corpus: Corpus
    """demo, demo_base, e2e, webnlg, dart, or jsonl."""
    root: str | None = None
    """Folder of the raw corpus, or of encoded files; not needed for demo."""
    tokenizer: str | None = None
    """gpt2, a hub name, a folder with the BPE files, or corpus:SIZE to train one on the train split;
    null: the one that the base or the adapter was made with, else gpt2."""
    cache: str = "~/.cache/lora-gpt2"
    """Where encoded corpora are kept, by the hash of their content."""
    objective: Objective = Objective.clm
    """clm: loss on the completion; jlm: on every token."""
    seq_len: int = 512
    """Rows are cut to this many tokens."""
    batch_size: int = 8
    """Rows of a training batch, over all devices: a step has the same rows on one device and on many."""
    eval_batch_size: int = 32
    """Rows of a validation batch, on each device."""
    bucket: int = 0
    """Batches among which rows are sorted by length, against padding on a GPU; a step then learns less."""
    pad_multiple: int = 4
    """Batches are padded to a multiple of so many tokens, so that few different shapes come up."""
    pack: bool = False
    """Lay the rows of a training batch one behind another in lines of up to seq_len tokens, in place of
    padding each; a row reads itself alone."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(f"data.seq_len must be at least 2, a token and the next, not {self.seq_len}")
        for name in ("batch_size", "eval_batch_size", "pad_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if self.bucket < 0:
            raise ValueError(f"data.bucket must be at least 0, not {self.bucket}")
        if self.root is None and self.corpus not in (Corpus.demo, Corpus.demo_base):
            raise ValueError(f"data.root is missing: set it to the folder of the {self.corpus.value} files")
