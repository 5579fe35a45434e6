"""Our two weight files, safetensors with a description inside: a whole model, and an adapter alone.

Both hold unmerged weights and plain values, appear whole or not at all, and say what they are: card,
sizes, tokenizer, and, for an adapter, the hash of the base that it was trained on.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_gpt2.errors import UserError
from lora_gpt2.files import replacing
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.keys import is_lora
from lora_gpt2.model.language_model import GPT2LMModel

FORMAT = 1
MODEL_FILE, ADAPTER_FILE = "model.safetensors", "adapter.safetensors"


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
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping, e.g. steps and validation loss."""

    @property
    def gpt2_config(self) -> GPT2Config:
        return GPT2Config.from_dict(self.config)


def base_hash(model: GPT2LMModel) -> str:
    """SHA-256 over names, shapes, types and bytes of the unmerged base weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.weights().items()):
        if not is_lora(name):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(path: Path, model: GPT2LMModel, description: Description) -> None:
    """Writes the whole base or the LoRA matrices, as `description.kind` says."""
    assert not any(layer.merged for layer in model.lora_layers()), "files hold unmerged weights"
    adapter = description.kind == "adapter"
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in model.weights().items()
        if is_lora(name) == adapter
    }
    metadata = {"lora-gpt2": json.dumps({"format": FORMAT, **asdict(description)})}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def read_weights(path: Path) -> tuple[Description | None, dict[str, Tensor]]:
    """Description and tensors of a safetensors file; no description: the file is not one of ours.

    Raises UserError for a file that is missing, cut short, or of a newer format.
    """
    do = "give the run's folder or its .safetensors file, or train again if the file was cut short"
    if not path.is_file():
        raise UserError(path, "there is no such file", do)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("lora-gpt2")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
    except SafetensorError as error:
        raise UserError(path, f"is not a whole safetensors file ({error})", do) from None
    if metadata is None:
        return None, tensors
    try:
        values = json.loads(metadata)
        if (found := values.pop("format", None)) != FORMAT:
            raise UserError(path, f"has format {found}, this version reads {FORMAT}", "update lora-gpt2")
        return Description(**values), tensors
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(path, f"has a description that cannot be read ({error})", do) from None


def find(source: str | Path, file_name: str) -> Path:
    """The weight file itself: `source` is the file, or a run's folder that holds `file_name`."""
    path = Path(source)
    if not path.is_dir():
        return path
    if (path / file_name).is_file():
        return path / file_name
    kind = "an adapter" if file_name == ADAPTER_FILE else "a model"
    raise UserError(path, f"holds no {file_name}", f"give the folder of a run that trained {kind}")
