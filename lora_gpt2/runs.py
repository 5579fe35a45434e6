"""A run's folder: what training leaves there, and how the next stage starts from it."""

import csv
import inspect
import math
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_only

from lora_gpt2.data.module import DataToText
from lora_gpt2.data.tokenizer import MERGES_FILES, Tokenizer
from lora_gpt2.errors import UserError
from lora_gpt2.files import write_json
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.settings import LoraSettings, Precision, gpt2_config
from lora_gpt2.settings import LAST_CHECKPOINT, GenerateSettings, Keep, TrainSettings
from lora_gpt2.training.callbacks import BestCheckpoints
from lora_gpt2.training.module import LanguageModeling
from lora_gpt2.training.together import AdaptersTogether
from lora_gpt2.weights.adapter import describe_adapter, open_adapter
from lora_gpt2.weights.pretrained import build_base, check_tokenizer, describe_base
from lora_gpt2.weights.store import (
    ADAPTER_FILE,
    MODEL_FILE,
    Description,
    find,
    read_pickle,
    save_adapter,
    save_model,
)

PROVENANCE_FILE = "provenance.json"
"""What a run needs to be done again, beside its settings."""

_PACKAGES = "torch", "lightning", "hydra-core", "omegaconf", "torchmetrics", "tokenizers", "lora-gpt2"


@rank_zero_only
def write_provenance(folder: Path, data: DataToText) -> None:
    """Writes command, versions, commit, machine, and the hashes of corpus and tokenizer."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    written = {
        "command": shlex.join(sys.argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": ", ".join(filter(None, map(_version, _PACKAGES))),
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{gpu}",
        "corpus": str(data.folder.resolve()),
        "tokenizer": data.tokenizer.sha256,
    }
    write_json(folder / PROVENANCE_FILE, written)


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # run from a checkout
        return ""


def _commit() -> str:
    """Of the checkout that this code lies in, where it lies in one."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        where = Path(__file__).parent
        return subprocess.check_output(command, cwd=where, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def tokenizer_of(source: str | None) -> str:
    """The tokenizer that the folder of a run, or of a GPT-2 in transformers' form, holds, or else GPT-2's."""
    if source is not None:
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        for place in (folder / "tokenizer", folder):
            if any((place / name).is_file() for name in MERGES_FILES):
                return str(place)
    return "gpt2"


def build_config(settings: TrainSettings, tokenizer: Tokenizer) -> GPT2Config:
    """The model's sizes, by the groups `model` and `lora` and the tokenizer. Raises UserError."""
    try:
        return gpt2_config(settings.model, settings.lora, tokenizer.vocab_size)
    except ValueError as error:
        raise UserError("model, lora", str(error), "change the settings named") from None


def base_dtype(settings: TrainSettings) -> torch.dtype | None:
    """What a frozen base is converted to; None: it stays as it is."""
    kind: torch.dtype = getattr(torch, settings.precision.value)
    return None if settings.precision is Precision.float32 else kind


def load(settings: GenerateSettings, tokenizer: str, vocab_size: int) -> dict[str, GPT2LMModel]:
    """The models to decode with, by the names that rows give them; "" for rows that name none.

    One adapter is merged into its base; several share one base in memory, unmerged.
    Raises UserError when card, tokenizer or base do not fit each other.
    """
    if not settings.adapters:
        return {"": _load_one(settings, settings.adapter, tokenizer, vocab_size)}
    default = settings.adapter or next(iter(settings.adapters))
    first = describe_adapter(settings.adapters[default])[1]
    models = {default: _load_one(settings, settings.adapters[default], tokenizer, vocab_size)}
    for name, source in settings.adapters.items():
        if (found := describe_adapter(source)[1].base_sha256) != first.base_sha256:
            what = f"has another base (hash {found[:12]}…) than {default} ({first.base_sha256[:12]}…)"
            raise UserError(f"adapters.{name}", what, "decode with adapters over one base")
        if name != default:
            models[name] = _load_one(settings, source, tokenizer, vocab_size)
            models[name].share_base(models[default])
    if settings.adapter is not None:
        return {**models, "": models[default]}
    plain = GPT2LMModel(first.gpt2_config.without_lora()).eval()
    plain.share_base(models[default])
    return {**models, "": plain}


def _load_one(
    settings: GenerateSettings, adapter: str | None, tokenizer: str, vocab_size: int
) -> GPT2LMModel:
    if adapter is not None:
        path, about = describe_adapter(adapter)
        _check_card(settings, str(path), about.card)
        check_tokenizer(path, about, tokenizer)
        model, _ = open_adapter(adapter, settings.base)
        if not settings.adapters:
            model.merge()
        return model
    source = str(settings.base)
    described = describe_base(source)
    if described is not None and (described.card or settings.model is None):
        _check_card(settings, source, described.card)
        config, card = described.gpt2_config, described.card or "gpt2"
        return build_base(config, source, card, tokenizer, settings.seed).eval()
    if settings.model is None:
        raise UserError(source, "does not say which model it is", "name the card, e.g. model=gpt2.md")
    config = gpt2_config(settings.model, LoraSettings(), vocab_size)
    return build_base(config, source, settings.model.name, tokenizer, settings.seed).eval()


def _check_card(settings: GenerateSettings, source: str, card: str) -> None:
    if settings.model is not None and settings.model.name != card:
        what = f"was made for model {card}, not {settings.model.name}"
        raise UserError(source, what, f"leave model= out or use model={card}")


def checkpoint_file(settings: TrainSettings, data: DataToText | None = None) -> str | None:
    """The checkpoint to go on from.

    Raises UserError when it is missing, cut short, of other settings or, where `data` is given, other rows.
    """
    if settings.resume is None:
        return None
    path = find(settings.resume, str(LAST_CHECKPOINT))
    if not path.is_file():
        raise UserError(path, "there is no such file", "give the folder of a run or one of its .ckpt files")
    held = read_pickle(path, mmap=True)
    kinds = {"state_dict": dict, "optimizer_states": list, "lr_schedulers": list, "loops": dict}
    if not all(isinstance(held.get(name), kind) and held[name] for name, kind in kinds.items()):
        raise UserError(path, "holds no state of a run", "give the run's folder or one of its .ckpt files")
    earlier = held.get("settings")
    settings.check_goes_on(earlier if isinstance(earlier, dict) else {})
    for unit, most in (("global_step", "max_steps"), ("epoch", "max_epochs")):
        asked = settings.trainer.get(most)
        there = held.get(unit)
        if isinstance(asked, int) and isinstance(there, int) and 0 <= asked < there:
            what = f"its {unit.replace('_', ' ')} is {there} already, trainer.{most} is {asked}"
            raise UserError(f"resume={settings.resume}", what, "give more, or leave it as it was")
    if data is not None and isinstance(rows := held.get(type(data).__name__), dict):
        data.load_state_dict(rows)
    return str(path)


def begun_at(checkpoint: Path) -> Path | None:
    """The one of another place or name at which the run of `checkpoint` had begun."""
    begun = read_pickle(checkpoint, mmap=True).get("begun")
    return Path(begun) if isinstance(begun, str) else None


@rank_zero_only
def keep_metrics(folder: Path, resumed: bool) -> None:
    """Moves an earlier run's metrics.csv out of the logger's way, which would delete it.

    `resumed`: it is of this very run. Else it, and what it had of its own, goes to earlier-*.csv.
    """
    if (old := folder / "metrics.csv").is_file():
        count = len(list(folder.glob("metrics.*.csv")))
        old.rename(folder / f"metrics.{count + 1}.csv")
    for other in [] if resumed else sorted(folder.glob("metrics.*.csv")):
        count = len(list(folder.glob("earlier-*.csv")))
        other.rename(folder / f"earlier-{count + 1}.csv")


def logged(folder: Path, column: str) -> dict[float, float]:
    """A column of metrics.csv by its steps, and before it that of the files of interrupted runs.

    A last line that a kill cut short is left out.
    """
    earlier = sorted(folder.glob("metrics.*.csv"), key=lambda path: (len(path.name), path))
    found: dict[float, float] = {}
    for path in filter(Path.is_file, [*earlier, folder / "metrics.csv"]):
        with open(path, encoding="utf-8", newline="") as file:
            whole = [line for line in file if line.endswith("\n")]
        rows = [(row.get("step"), row.get(column)) for row in csv.DictReader(whole)]
        found.update((float(step), float(value)) for step, value in rows if step and value)
    return dict(sorted(found.items()))


def keep_weights(
    trainer: Trainer, module: LanguageModeling | AdaptersTogether, keep: Keep, folder: Path
) -> list[float | None]:
    """Saves the last state for a later resume, and puts the weights to keep into `module`.

    Returns the validation loss of each member's best weights; None when none was taken (then the last weights
    are kept).
    """
    trainer.save_checkpoint(folder / LAST_CHECKPOINT)
    if isinstance(module, AdaptersTogether):
        if keep is Keep.best:
            module.keep_best()
        return [loss if math.isfinite(loss) else None for loss in module.lowest]
    best = next((c for c in trainer.checkpoint_callbacks if isinstance(c, BestCheckpoints)), None)
    if best is None or best.best_model_score is None:
        return [None]
    checkpoint = read_pickle(Path(best.best_model_path))
    if keep is Keep.best:
        module.load_state_dict(checkpoint["state_dict"], strict=False)
    return [checkpoint.get("valid_loss")]


def save(
    folder: Path,
    module: LanguageModeling,
    settings: TrainSettings,
    tokenizer: Tokenizer,
    notes: dict[str, Any],
) -> None:
    """Writes the adapter, or the model where everything trained, and the tokenizer it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    local = settings.base is not None and Path(settings.base).exists()
    description = Description(
        kind="adapter" if settings.lora.rank else "model",
        card=settings.model.name,
        config=module.model.config.to_dict(),
        tokenizer=tokenizer.sha256,
        base_sha256=module.base_sha256,
        base_source=str(Path(str(settings.base)).resolve()) if local else settings.base,
        base_may_lack=settings.base_may_lack,
        seed=settings.seed,
        notes=notes,
    )
    if settings.lora.rank:
        save_adapter(folder / ADAPTER_FILE, module.model, description)
    else:
        save_model(folder / MODEL_FILE, module.model, description)
    tokenizer.save(folder / "tokenizer")


def parameters(target: str) -> set[str]:
    """Names of the arguments that a `_target_` takes."""
    return set(inspect.signature(get_object(target)).parameters)
