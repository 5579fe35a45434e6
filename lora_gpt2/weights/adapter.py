"""Loading an adapter: over its own base or not at all."""

from pathlib import Path

from lora_gpt2.errors import UserError
from lora_gpt2.model.language_model import GPT2LMModel
from lora_gpt2.weights.store import ADAPTER_FILE, Description, base_hash, find, read_weights


def read_description(source: str | Path) -> tuple[Path, Description]:
    """The adapter file at `source` (a run's folder or the file) and what it says of itself."""
    path = find(source, ADAPTER_FILE)
    description, _ = read_weights(path)
    if description is None or description.kind != "adapter":
        raise UserError(path, "holds no adapter of lora-gpt2", "give the run or the file of an adapter")
    return path, description


def load_adapter(model: GPT2LMModel, source: str | Path) -> Description:
    """Loads the LoRA matrices into `model`, whose base is in place already.

    Raises UserError when the file is no adapter, was trained on another base, or with other LoRA settings;
    nothing is loaded then.
    """
    path, description = read_description(source)
    theirs, ours = description.gpt2_config.to_dict(), model.config.to_dict()
    if differing := [
        f"{name} {theirs[name]} (here {ours[name]})"
        for name in theirs
        if name.startswith("lora_") and "dropout" not in name and theirs[name] != ours[name]
    ]:
        do = "use the LoRA settings the adapter was trained with"
        raise UserError(path, f"was trained with {', '.join(differing)}", do)
    if (found := base_hash(model)) != description.base_sha256:
        origin = description.base_source or f"random weights, seed {description.seed}"
        what = f"was trained on another base (hash {description.base_sha256[:12]}…, this one {found[:12]}…)"
        raise UserError(path, what, f"give the base it was trained on with base=… (then it was: {origin})")
    try:
        model.load_weight(read_weights(path)[1])
    except ValueError as error:
        do = "use the rank and targets the adapter was trained with"
        raise UserError(path, f"does not fit: {error}", do) from None
    return description
