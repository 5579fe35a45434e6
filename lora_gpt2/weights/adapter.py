"""Loading an adapter: over its own base or not at all."""

from pathlib import Path

from torch import Tensor

from lora_gpt2.errors import UserError
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.pretrained import build_base, check_fit
from lora_gpt2.weights.store import (
    ADAPTER_FILE,
    WHICH_FILE,
    Description,
    base_hash,
    find,
    read_description,
    read_weights,
)


def describe_adapter(source: str | Path) -> tuple[Path, Description]:
    """The adapter file at `source` (a run's folder or the file) and what it says of itself."""
    path = find(source, ADAPTER_FILE)
    description = read_description(path)
    if description is None or description.kind != "adapter":
        raise UserError(path, "holds no adapter of lora-gpt2", "give the run or the file of an adapter")
    return path, description


def holds_adapter(source: str | Path) -> bool:
    """Whether `source`, a run's folder or a file, is an adapter of ours. Raises UserError for a torn file."""
    path = Path(source)
    if path.is_dir():
        return (path / ADAPTER_FILE).is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return path.name == ADAPTER_FILE
    description = read_description(path)
    return description is not None and description.kind == "adapter"


def load_adapter(model: GPT2LMModel, source: str | Path) -> Description:
    """Loads the LoRA matrices into `model`, whose base is in place already.

    Raises UserError when the file is no adapter, was trained on another base, or with other LoRA settings;
    nothing is loaded then.
    """
    path, description = describe_adapter(source)
    _load(model, path, description, read_weights(path)[1])
    return description


def _load(model: GPT2LMModel, path: Path, description: Description, tensors: dict[str, Tensor]) -> None:
    theirs = description.gpt2_config
    names = [name for name in theirs.to_dict() if name.startswith("lora_") and "dropout" not in name]
    if differing := theirs.differences(model.config, names):
        do = "use the LoRA settings the adapter was trained with"
        raise UserError(path, f"was trained with {', '.join(differing)}", do)
    if (found := base_hash(model)) != description.base_sha256:
        origin = description.base_source or f"random weights, seed {description.seed}"
        what = f"was trained on another base (hash {description.base_sha256[:12]}…, this one {found[:12]}…)"
        raise UserError(path, what, f"give the base it was trained on (then it was: {origin})")
    try:
        model.load_weight(tensors)
    except ValueError as error:
        do = "use the rank and targets the adapter was trained with"
        raise UserError(path, f"does not fit: {error}", do) from None


def open_adapter(source: str | Path, base: str | None = None) -> tuple[GPT2LMModel, Description]:
    """The adapted model, unmerged and in eval mode, and what the adapter says of itself.

    `base` is where its base lies now, if not where it was. Raises UserError.
    """
    path, about = describe_adapter(source)
    where = base or about.base_source
    config, lacking = about.gpt2_config, about.base_may_lack
    tensors = read_weights(path)[1]
    try:  # before a base of such sizes, drawn at random perhaps, takes memory
        check_fit(config, tensors)
    except ValueError as error:
        raise UserError(path, f"does not fit what it says of itself: {error}", WHICH_FILE) from None
    model = build_base(config, where, about.card, about.tokenizer, about.seed, lacking)
    _load(model, path, about, tensors)
    return model.eval(), about
