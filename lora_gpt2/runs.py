"""A run's folder: what training leaves there, and how the next stage starts from it."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from lora_gpt2.data.tokenizer import Tokenizer
from lora_gpt2.errors import UserError
from lora_gpt2.model.config import GPT2Config, LoraSettings, gpt2_config
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.settings import GenerateSettings, Keep, TrainSettings
from lora_gpt2.training.module import LanguageModeling
from lora_gpt2.weights.adapter import load_adapter, read_description
from lora_gpt2.weights.pretrained import describe_base, load_base
from lora_gpt2.weights.store import ADAPTER_FILE, MODEL_FILE, Description, find, save_adapter, save_model


def tokenizer_of(source: str | None) -> str:
    """The tokenizer that a run's folder holds, or else GPT-2's."""
    if source is not None:
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        if (folder / "tokenizer").is_dir():
            return str(folder / "tokenizer")
    return "gpt2"


def build_base(
    config: GPT2Config,
    source: str | None,
    card: str,
    tokenizer: str,
    seed: int,
    may_be_missing: Sequence[str] = (),
) -> GPT2LMModel:
    """A model with the base weights found at `source`, or random ones drawn from `seed`."""
    torch.manual_seed(seed)
    model = GPT2LMModel(config)
    if source is not None:
        load_base(model, source, card, tokenizer, may_be_missing)
    return model


def load(settings: GenerateSettings, tokenizer: str, vocab_size: int) -> GPT2LMModel:
    """The model that `base` and `adapter` name, the adapter merged into it.

    Raises UserError when card, tokenizer or base do not fit each other.
    """
    card, config, seed, source = _described(settings, vocab_size)
    if settings.model is not None and settings.model.name != card:
        what = f"was made for model {card}, not {settings.model.name}"
        raise UserError(settings.adapter or str(source), what, f"leave model= out or use model={card}")
    model = build_base(config, source, card, tokenizer, seed)
    if settings.adapter is not None:
        load_adapter(model, settings.adapter)
        model.merge()
    return model


def _described(settings: GenerateSettings, vocab_size: int) -> tuple[str, GPT2Config, int, str | None]:
    """Card, sizes, seed and source of the base: as the adapter or the base says, else as `model` does."""
    if settings.adapter is not None:
        _, description = read_description(settings.adapter)
        source = settings.base or description.base_source
        return description.card, description.gpt2_config, description.seed, source
    source = str(settings.base)
    if (own := describe_base(source)) is not None:
        return own.card, own.gpt2_config, own.seed, source
    if settings.model is None:
        raise UserError(source, "does not say which model it is", "name the card, e.g. model=gpt2.md")
    return settings.model.name, gpt2_config(settings.model, LoraSettings(), vocab_size), 0, source


def checkpoint_file(resume: str | None) -> str | None:
    """The checkpoint to go on from. Raises UserError when it is missing or cut short."""
    if resume is None:
        return None
    path = find(resume, str(Path("checkpoints") / "last.ckpt"))
    if not path.is_file():
        raise UserError(path, "there is no such file", "give the folder of a run or one of its .ckpt files")
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        what = f"is not a whole checkpoint ({str(error).split('.')[0]})"
        raise UserError(path, what, "resume from another checkpoint of the run, or train again") from None
    return str(path)


@rank_zero_only
def keep_metrics(folder: Path) -> None:
    """Moves an earlier run's metrics.csv out of the logger's way, which would delete it."""
    if (old := folder / "metrics.csv").is_file():
        count = len(list(folder.glob("metrics.*.csv")))
        old.rename(folder / f"metrics.{count + 1}.csv")


def keep_weights(trainer: Trainer, module: LanguageModeling, keep: Keep, folder: Path) -> float | None:
    """Saves the last state for a later resume, and puts the weights to keep into `module`.

    Returns the lowest validation loss; None when none was taken (then the last weights are kept).
    """
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    best = next((c for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)), None)
    if not isinstance(best, ModelCheckpoint) or best.best_model_score is None:
        return None
    if keep is Keep.best:
        checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
    return float(best.best_model_score)


def save(
    folder: Path,
    module: LanguageModeling,
    settings: TrainSettings,
    tokenizer: Tokenizer,
    notes: dict[str, Any],
) -> None:
    """Writes the adapter, or the model where everything trained, and the tokenizer it belongs to."""
    local = settings.base is not None and Path(settings.base).exists()
    description = Description(
        kind="adapter" if settings.lora.rank else "model",
        card=settings.model.name,
        config=module.model.config.to_dict(),
        tokenizer=tokenizer.sha256,
        base_sha256=module.base_sha256,
        base_source=str(Path(str(settings.base)).resolve()) if local else settings.base,
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
