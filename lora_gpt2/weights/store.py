"""Our two weight files, safetensors with a description inside: a whole model, and an adapter alone.

Both hold unmerged weights and plain values, appear whole or not at all, and say what they are: card,
sizes, tokenizer, and, for an adapter, the hash of the base that it was trained on.
"""

import hashlib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_gpt2.errors import UserError
from lora_gpt2.files import parse_json, replacing
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.keys import is_lora
from lora_gpt2.model.language_model import GPT2LMModel

FORMAT = 1
MODEL_FILE, ADAPTER_FILE = "model.safetensors", "adapter.safetensors"
WHICH_FILE = "give the run's folder or its .safetensors file, or train again if the file was cut short"

_KEY = "lora-gpt2"
"""Under which a file of ours holds what it says of itself."""


@dataclass
class Description:
    """What a weight file says of itself."""

    kind: str
    """Either "model" or "adapter"."""
    card: str
    """Name of the architecture card."""
    config: dict[str, Any]
    """`GPT2Config.to_dict()`, LoRA settings included."""
    tokenizer: str
    """SHA-256 of the tokenizer whose ids the weights know."""
    base_sha256: str = ""
    """Adapter: `base_hash` of the base below it."""
    base_source: str | None = None
    """Adapter: where that base came from; None: drawn at random with `seed`."""
    base_may_lack: list[str] = field(default_factory=list)
    """Adapter: patterns of weights that the base lacked, drawn at random with `seed` instead."""
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, e.g. steps and validation loss."""
    sha256: str = ""
    """Of the tensors and of all the rest of this, put there when the file is written."""

    @property
    def gpt2_config(self) -> GPT2Config:
        return GPT2Config.from_dict(self.config)

    def check(self) -> None:
        """Raises TypeError, ValueError and others where it is not what its annotations say."""
        texts = self.kind, self.card, self.tokenizer, self.base_sha256, self.sha256, self.base_source or ""
        if not all(isinstance(text, str) for text in (*texts, *self.base_may_lack)):
            raise TypeError("a text was expected")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed}")
        if not isinstance(self.notes, dict):
            raise TypeError("notes by their names were expected")
        GPT2Config.from_dict(self.config)


def base_hash(model: GPT2LMModel) -> str:
    """`weights_hash` of the unmerged base alone."""
    return digest({name: value for name, value in model.weights().items() if not is_lora(name)})


def weights_hash(model: GPT2LMModel) -> str:
    """`digest` of the weights as they are."""
    return digest(model.weights())


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes."""
    told = hashlib.sha256()
    for name, value in sorted(weights.items()):
        value = value.detach().cpu().contiguous()
        told.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        told.update(value.view(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()


def save_model(path: Path, model: GPT2LMModel, description: Description) -> None:
    """Writes every weight but LoRA's; `description.kind` is "model"."""
    assert not any(layer.merged for layer in model.lora_layers()), "files hold unmerged weights"
    write_weights(path, {k: v for k, v in model.weights().items() if not is_lora(k)}, description)


def save_adapter(path: Path, model: GPT2LMModel, description: Description) -> None:
    """Writes the update alone, as plain factors: its description's config is that of the file."""
    assert not any(layer.merged for layer in model.lora_layers()), "files hold unmerged weights"
    config, tensors = plain_update(model)
    write_weights(path, tensors, replace(description, config=config.to_dict()))


def write_weights(path: Path, tensors: Mapping[str, Tensor], description: Description) -> None:
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    told = {"format": FORMAT, **asdict(description)}
    told["sha256"] = _sum(told, values)
    metadata = {"format": "pt", _KEY: json.dumps(told)}
    with replacing(path) as temporary:
        save_file(values, temporary, metadata)
        _sort_metadata(temporary)


def _sum(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a description, but for the sum in it, and the `digest` of the tensors with it."""
    rest = json.dumps({name: value for name, value in told.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(f"{rest} {digest(tensors)}".encode()).hexdigest()


def _sort_metadata(path: Path) -> None:
    """The same weights and description are the same bytes: safetensors writes metadata in any order."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def plain_update(model: GPT2LMModel) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The LoRA tensors without any start to subtract, and the config that they are right for.

    PiSSA's and OLoRA's s (B A - B0 A0) is s [B - B0, B0] [A; A - A0]: plain LoRA of twice the rank, which
    needs nothing of how it was trained. Every other update is returned as it is.
    """
    tensors = {name: value.detach() for name, value in model.weights().items() if is_lora(name)}
    config = model.config
    if config.lora_init == "kaiming":
        return config, tensors
    for name in [name for name in tensors if name.endswith("lora_A0")]:
        stem = name.removesuffix("A0")
        a0, b0 = tensors.pop(f"{stem}A0"), tensors.pop(f"{stem}B0")
        a, b = tensors[f"{stem}A"], tensors[f"{stem}B"]
        rank = b.shape[1]
        pairs = zip(torch.split(a, rank), torch.split(a - a0, rank), strict=True)
        tensors[f"{stem}A"] = torch.cat([part for pair in pairs for part in pair])  # (n * 2 R, in)
        tensors[f"{stem}B"] = torch.cat((b - b0, b0), dim=1)  # (n * out / P, 2 R)
    grow = math.sqrt(2) if config.lora_rslora else 2
    values = {
        **config.to_dict(),
        "lora_init": "kaiming",
        "lora_attn_dim": 2 * config.lora_attn_dim,
        "lora_attn_alpha": grow * config.lora_attn_alpha,
        "lora_rank_pattern": {k: 2 * rank for k, rank in config.lora_rank_pattern.items()},
        "lora_alpha_pattern": {k: grow * alpha for k, alpha in config.lora_alpha_pattern.items()},
    }
    return GPT2Config.from_dict(values), tensors


def read_description(path: Path) -> Description | None:
    """What a safetensors file says of itself; None: the file is not one of ours. Raises UserError."""
    with _opened(path) as file:
        return _description(path, _told(path, file.metadata() or {}))


def read_weights(path: Path) -> tuple[Description | None, dict[str, Tensor]]:
    """Description and tensors of a safetensors file; no description: the file is not one of ours.

    Raises UserError for a file that is missing, cut short, damaged, or of a newer format.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
        told = _told(path, file.metadata() or {})
    if told.get("sha256", "") not in ("", _sum(told, tensors)):
        what = "is damaged: it is not what was written"
        raise UserError(path, what, "take another copy, or write it again")
    return _description(path, told), tensors


def read_pickle(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The dict in a .pt, .bin or .ckpt file, read as plain values: no code in it is ever run.

    `mmap`: tensors stay in the file; those of torch before 1.6 cannot be read so.
    Raises UserError for a file that is missing, cut short, or holds anything else.
    """
    if not path.is_file():
        raise UserError(path, "there is no such file", "give a file of weights")
    if fault := _archive_fault(path):
        raise UserError(path, fault, "take another copy, or write it again")
    if mmap and not zipfile.is_zipfile(path):
        raise UserError(path, "is no checkpoint of this version", "give one that train.py has written")
    try:
        values: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = "is no file of plain tensors, nothing in it was run"
        if found:
            what = f"holds more than plain tensors ({found[1]}), nothing was run"
        raise UserError(path, what, "give a file of weights alone, from a source you trust") from None
    except Exception as error:  # torch raises several kinds for a damaged file
        told = next(iter(str(error).splitlines()), type(error).__name__)
        what = f"could not be read as plain tensors ({told})"
        raise UserError(path, what, "give a whole weight file from a source you trust") from None
    if not isinstance(values, dict):
        raise UserError(path, f"holds a {type(values).__name__}", "expected a dict of tensors")
    return values


def _archive_fault(path: Path) -> str:
    """What is wrong with a file of torch.save by its own checksums; "" where nothing is, or it has none.

    Compressed parts are refused: torch writes none, and a small one may grow to any size.
    """
    try:
        with open(path, "rb") as file:
            if (start := file.read(4)) != b"PK\3\4":
                return "" if start else "is empty"
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                return "has compressed parts, which torch does not write"
            broken = archive.testzip()
            return f"is damaged at {broken}" if broken else ""
    except Exception as error:  # zipfile raises many kinds for a damaged file
        return f"is damaged ({error or type(error).__name__})"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise UserError(path, "there is no such file", WHICH_FILE)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(path, f"is not a whole safetensors file ({error})", WHICH_FILE) from None


def _told(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What is written in a file of ours, its format among it; nothing, if it is not one."""
    if _KEY not in metadata:
        return {}
    told = parse_json(metadata[_KEY], path, WHICH_FILE)
    if not isinstance(told, dict):
        raise UserError(path, "has a description that cannot be read", WHICH_FILE)
    if (found := told.get("format")) != FORMAT:
        raise UserError(path, f"has format {found}, this version reads {FORMAT}", "update lora-gpt2")
    return told


def _description(path: Path, told: Mapping[str, Any]) -> Description | None:
    if not told:
        return None
    try:
        found = Description(**{name: value for name, value in told.items() if name != "format"})
        found.check()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(path, f"has a description that cannot be read ({error})", WHICH_FILE) from None
    return found


def find(source: str | Path, file_name: str) -> Path:
    """The weight file itself: `source` is the file, or a run's folder that holds `file_name`."""
    path = Path(source)
    if not path.is_dir():
        return path
    if (path / file_name).is_file():
        return path / file_name
    has = {ADAPTER_FILE: "trained an adapter", MODEL_FILE: "trained a model"}.get(file_name, "has one")
    do = f"give the folder of a run that {has}"
    if inside := sorted(str(path / one.relative_to(path).parts[0]) for one in path.glob(f"*/{file_name}")):
        do = f"give one of {', '.join(inside)}"
    raise UserError(path, f"holds no {file_name}", do)
