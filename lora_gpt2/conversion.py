"""Adapters on their way elsewhere and back: merged, exported, imported, combined, cut in rank."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_gpt2 import runs
from lora_gpt2.data.tokenizer import Tokenizer, load_tokenizer
from lora_gpt2.errors import UserError
from lora_gpt2.model.config import GPT2Config
from lora_gpt2.model.keys import canonical
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.model.settings import LoraSettings, ModelSettings, gpt2_config
from lora_gpt2.training.guards import ROUNDING
from lora_gpt2.weights import factors
from lora_gpt2.weights.adapter import describe_adapter, holds_adapter, open_adapter
from lora_gpt2.weights.exchange import peft, reference, transformers
from lora_gpt2.weights.pretrained import build_base, describe_base
from lora_gpt2.weights.store import (
    ADAPTER_FILE,
    MODEL_FILE,
    Description,
    base_hash,
    read_weights,
    save_adapter,
    save_model,
    write_weights,
)


def merge(
    source: str, base: str | None, output: Path, dtype: torch.dtype, bpe: str | None = None
) -> dict[str, float]:
    """Writes the adapter merged into its base, or a base alone, as a folder in transformers' form.

    Returns the largest difference between merged and unmerged logits by the type they were computed in:
    float32, and `dtype`. `bpe`: its tokenizer, if not in its folder. Raises UserError.
    """
    _check_output(output, source, base)
    if not holds_adapter(source):
        if base is not None:
            raise UserError(source, "holds no adapter, so that nothing goes over a base", "leave --base out")
        about = describe_base(source)
        if about is None:
            do = "give a run, a folder with a config.json beside the weights, or a hub name"
            raise UserError(source, "holds no adapter and does not say which model it is", do)
        model = build_base(about.gpt2_config, source, about.card, about.tokenizer, about.seed)
    else:
        model, about = open_adapter(source, base)
    _check_output(output, about.base_source)
    tokenizer = _tokenizer(source, about, bpe)
    model.eval()
    differences = {
        str(kind).removeprefix("torch."): _merge_difference(model, kind)
        for kind in dict.fromkeys((torch.float32, dtype))
    }
    model.merge()
    about = replace(about, card=about.card or "gpt2", tokenizer=tokenizer.sha256)
    transformers.write(output, model, about, tokenizer.end_token, dtype)
    tokenizer.save_for_transformers(output, model.config.n_positions)
    return differences


def _check_output(output: Path, *inputs: str | None) -> None:
    """Raises UserError where writing `output` would replace what is read, or the base below it."""
    for source in (Path(source).resolve() for source in inputs if source is not None):
        folder = source.parent if source.is_file() else source
        if output.resolve() in (source, folder):
            raise UserError(output, "holds what is read here or its base", "give another folder")
    if output.is_file() and not output.suffix:
        raise UserError(output, "is a file, a folder was expected", "give another folder")


def _tokenizer(source: str, about: Description, given: str | None = None) -> Tokenizer:
    """That of `source`, or `given`. Raises UserError where it is not the one that the weights know."""
    tokenizer = load_tokenizer(given or runs.tokenizer_of(source))
    own = about.tokenizer not in ("", tokenizer.sha256)
    if own or tokenizer.vocab_size > about.gpt2_config.vocab_size:
        what = f"knows another tokenizer than {given or runs.tokenizer_of(source)}"
        raise UserError(source, what, "give its own, the tokenizer/ folder of its run: --tokenizer")
    return tokenizer


@torch.inference_mode()
def _merge_difference(model: GPT2LMModel, dtype: torch.dtype) -> float:
    """Over random tokens, both models computed in `dtype`.

    Raises UserError where it is more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    shape = 4, min(64, model.config.n_ctx)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    unmerged = copy.deepcopy(model).to(dtype)
    merged = copy.deepcopy(model)
    merged.merge()
    expected = unmerged(ids)[0].float()
    difference = float((expected - merged.to(dtype)(ids)[0].float()).abs().max())
    if not difference <= ROUNDING[dtype] * float(expected.abs().max()):
        what = f"merged and unmerged logits differ by {difference:.3g}, nothing was written"
        raise UserError("merge", what, "look for weights that are not finite, or are very large")
    return difference


def export(form: str, source: str, base: str | None, output: Path, everything: bool) -> str:
    """Writes an adapter for `form`: a PEFT folder, or a .pt file of the published scripts ("reference").

    Returns what the other program must be told, because the file does not say it.
    """
    model, about = open_adapter(source, base)
    _check_output(output, source, base, about.base_source)
    if form == "peft":
        peft.write(output, model, base or about.base_source or "")
        return ""
    rank, alpha = reference.write(output, model, everything)
    return f"load it with --lora_dim {rank} --lora_alpha {alpha:g}"


class Base(NamedTuple):
    """What an imported adapter is put over."""

    model: GPT2LMModel
    card: str
    source: str | None
    """Where it lies; None: nowhere yet, it is written beside the adapter."""
    tokenizer: Tokenizer


def open_base(source: str, card: ModelSettings | None, tokenizer: str | None) -> Base:
    """The base at `source`: one of ours, or any GPT-2, whose sizes are in its config.json or in `card`.

    `tokenizer` is where its BPE comes from, if not from its folder. Raises UserError.
    """
    about = describe_base(source)
    bpe = load_tokenizer(tokenizer or runs.tokenizer_of(source))
    name = card.name if card is not None else (about and about.card) or "gpt2"
    if card is not None:
        config = _sizes(card, bpe)
    elif about is not None:
        config = about.gpt2_config
    else:
        raise UserError(source, "does not say which model it is", "name the card, e.g. --model gpt2.md")
    if bpe.vocab_size > config.vocab_size:
        what = f"has {config.vocab_size} tokens, its tokenizer ({tokenizer or 'GPT-2s'}) {bpe.vocab_size}"
        raise UserError(source, what, "give its own: --tokenizer")
    model = build_base(config, source, name, bpe.sha256, 0).eval()
    return Base(model, name, str(Path(source).resolve()) if Path(source).exists() else source, bpe)


def held_base(file: Path, card: ModelSettings, tokenizer: str | None) -> Base:
    """The base inside a .pt file that holds everything. Raises UserError."""
    bpe = load_tokenizer(tokenizer or "gpt2")
    held, _ = reference.read(file)
    if not held:
        raise UserError(file, "holds LoRA alone", "give the base that it was trained on: --base")
    model = GPT2LMModel(_sizes(card, bpe)).eval()
    try:
        model.load_weight(held)
    except ValueError as error:
        raise UserError(file, f"does not fit {card.name}: {error}", "choose its own card") from None
    return Base(model, card.name, None, bpe)


def _sizes(card: ModelSettings, tokenizer: Tokenizer) -> GPT2Config:
    try:
        return gpt2_config(card, LoraSettings(), tokenizer.vocab_size)
    except ValueError as error:
        raise UserError(f"--model {card.name}", str(error), "choose the base's own card") from None


def import_peft(folder: Path, base: Base, output: Path) -> None:
    """Writes the PEFT adapter in `folder` as an adapter of ours."""
    _check_output(output, str(folder), base.source)
    _save_imported(folder, base, *peft.read(folder, base.model), output)


def import_reference(
    file: Path, base: Base, output: Path, alpha: float | None, rank: int | None, targets: Sequence[str] | None
) -> None:
    """Writes the LoRA in a .pt file of the published scripts as an adapter of ours.

    Raises UserError where the file holds a base too and it is not `base`, bit for bit.
    """
    _check_output(output, base.source)
    held, update = reference.read(file)
    own = base.model.weights()
    if held and any(name not in held or not torch.equal(own[name], held[name]) for name in own):
        do = "leave --base out and name the card (--model), to take the base that it holds"
        raise UserError(file, f"holds a whole model whose base is not that at {base.source}", do)
    config = reference.adapter_config(file, update, base.model.config, alpha, rank, targets)
    _save_imported(file, base, config, update, output)


def combine(sources: Sequence[str], weights: Sequence[float], output: Path, rank: int | None) -> float:
    """Writes the sum of weight * adapter over adapters of one base; `rank` cuts it.

    Returns the share of the sum's energy, its squared Frobenius norm, that is kept. Raises UserError for
    adapters over different bases and for DoRA, whose updates do not add up.
    """
    abouts = check_same_base(sources)
    _check_output(output, *sources, abouts[0].base_source)
    tokenizer = _tokenizer(sources[0], abouts[0])
    for source, about in zip(sources, abouts, strict=True):
        if about.gpt2_config.lora_dora or about.gpt2_config.lora_bias != "none":
            what = "trains magnitudes or biases, which no sum of low-rank updates expresses"
            raise UserError(source, what, "merge it instead")
    total = factors.combined([update_of(source) for source in sources], weights)
    cut, kept = factors.truncated(total, rank)
    first = abouts[0]
    config, tensors = factors.as_adapter(first.gpt2_config, cut)
    notes = {"combined": dict(zip(sources, weights, strict=True)), "energy_kept": kept}
    write_weights(output / ADAPTER_FILE, tensors, replace(first, config=config.to_dict(), notes=notes))
    tokenizer.save(output / "tokenizer")
    return kept


def check_same_base(sources: Sequence[str]) -> list[Description]:
    """What the adapters say of themselves. Raises UserError unless all were trained on one base."""
    abouts = [describe_adapter(source)[1] for source in sources]
    for source, about in zip(sources, abouts, strict=True):
        if about.base_sha256 != abouts[0].base_sha256:
            hashes = f"{about.base_sha256[:12]}…, that of {sources[0]} {abouts[0].base_sha256[:12]}…"
            raise UserError(source, f"has another base (hash {hashes})", "give adapters over one base")
    return abouts


def update_of(source: str) -> factors.Update:
    """The low-rank updates in an adapter; DoRA's magnitudes and trained biases left aside."""
    path, about = describe_adapter(source)
    return factors.factors(about.gpt2_config, canonical(read_weights(path)[1]))


def _save_imported(
    origin: Path, base: Base, config: GPT2Config, update: dict[str, Tensor], output: Path
) -> None:
    model = GPT2LMModel(config)
    try:
        model.load_weight({**base.model.weights(), **update})
    except ValueError as error:
        raise UserError(
            origin, f"does not fit the base: {error}", "give the base it was trained on"
        ) from None
    source = base.source
    if source is None:
        source = str((output / "base").resolve())
        own = Description("model", base.card, base.model.config.to_dict(), base.tokenizer.sha256)
        save_model(output / "base" / MODEL_FILE, base.model, own)
        base.tokenizer.save(output / "base" / "tokenizer")
    about = Description(
        kind="adapter",
        card=base.card,
        config=config.to_dict(),
        tokenizer=base.tokenizer.sha256,
        base_sha256=base_hash(model),
        base_source=source,
        notes={"imported_from": str(origin)},
    )
    save_adapter(output / ADAPTER_FILE, model, about)
    base.tokenizer.save(output / "tokenizer")
