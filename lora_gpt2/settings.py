"""The two experiments' settings: the groups' dataclasses put together. Owns no default but the roots' own."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from lora_gpt2.data.config import DataSettings
from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.errors import UserError, differences
from lora_gpt2.model.config import LoraBias
from lora_gpt2.model.settings import LoraSettings, ModelSettings, Precision
from lora_gpt2.training.config import OptimizerSettings, Schedule, listed

TOGETHER = {"lora.rank": int, "lora.alpha": float, "lora.dropout": float, "optimizer.lr": float, "seed": int}
"""Settings of training that may be lists, a value for each of several adapters over one base."""

LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
"""From where a run goes on, in its folder."""

WITHOUT_EFFECT = (
    "logger.",
    "callbacks.progress.",
    "callbacks.pruning.",
    "data.cache",
    "point.",
    "dry_run",
)
"""How the names of settings begin that do not decide what training gives."""

_SETTLED = (
    *("data.corpus", "data.objective", "data.seq_len", "data.batch_size"),
    *("data.bucket", "data.pad_multiple", "data.pack"),
    *("optimizer.", "model.", "lora.", "label_smoothing", "seed", "precision"),
)
"""How those begin that a checkpoint settles: its optimizer, its place among the rows, and its weights."""

FULL_PRECISION = (None, "32-true", "32", 32)
"""What `trainer.precision` says where Lightning converts nothing."""


class Keep(str, Enum):
    """Which weights a training run leaves."""

    best = "best"
    last = "last"


@dataclass
class TrainSettings:
    model: ModelSettings
    lora: LoraSettings
    data: DataSettings
    optimizer: OptimizerSettings
    trainer: dict[str, Any]
    callbacks: dict[str, Any]
    logger: dict[str, Any]
    decoding: DecodingSettings
    base: str | None = None
    """Weights to start from: a run's folder, a file, a hub name; null: random weights."""
    base_may_lack: list[str] = field(default_factory=list)
    """Weights, with * and ?, that stay random where the base lacks them, e.g. [transformer.wpe.*]."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary, while training."""
    keep: Keep = Keep.best
    """best: the weights of the lowest validation loss; last: those of the last step."""
    resume: str | None = None
    """A run's folder or a .ckpt file to go on from."""
    score: str | None = None
    """valid or test: decode that split with the trained weights, as `decoding` says, and score it."""
    limit: int | None = None
    """Score the first so many different contexts only."""
    point: dict[str, Any] = field(default_factory=dict)
    """Settings that a sweep changes together: -m point={seed:1,lora.rank:2},{seed:2,lora.rank:4}."""
    dry_run: bool = False
    """Print what would be trained, and stop."""
    seed: Any = 42
    """Of weights, order and dropout. A whole number, or a list for several adapters at once."""
    precision: Precision = Precision.float32
    """What the frozen base under LoRA is kept and computed in, float32 or bfloat16; LoRA stays float32."""
    compile: bool = False
    """Compile what gets faster by it; on a CPU that needs a C++ compiler, and takes some ten seconds."""
    gradient_checkpointing: bool = False
    """Keep each block's input alone and compute the block again for its gradients: less memory, more time."""

    def __post_init__(self) -> None:
        if self.precision is Precision.int8:
            raise ValueError("precision must be float32 or bfloat16 for training, int8 is for decoding")
        if self.precision is not Precision.float32 and not self.lora.rank:
            what = "precision is of the frozen base under LoRA, lora.rank is 0"
            raise ValueError(f"{what}: set lora.rank, or trainer.precision=bf16-mixed")
        self._check_precisions()
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")
        if self.precision is not Precision.float32 and self.lora.bias is not LoraBias.none:
            what = (
                f"lora.bias {self.lora.bias.value} trains what precision {self.precision.value} rounds away"
            )
            raise ValueError(f"{what}: leave precision out")
        if self.trainer.get("precision") in ("16-mixed", 16, "16") and self.trainer.get("gradient_clip_val"):
            raise ValueError("trainer.gradient_clip_val does not go with 16-mixed: use bf16-mixed")
        if self.score not in (None, "train", "valid", "test"):
            raise ValueError(f"score must be train, valid or test, or null, not {self.score}")
        steps = self.trainer.get("accumulate_grad_batches", 1)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            what = "must be a whole number of at least 1"
            raise ValueError(f"trainer.accumulate_grad_batches {what}, not {steps}")
        _check_limit_and_seed(self.limit, self.seed)
        self.members()
        if self.optimizer.lora_plus_ratio != 1 and not self.lora.rank:
            raise ValueError("optimizer.lora_plus_ratio is of LoRA's B: set lora.rank, or leave it out")

    def _check_precisions(self) -> None:
        kinds: dict[str, Precision] = {"precision": self.precision}
        if self.score:
            kinds["decoding.precision"] = self.decoding.precision
        for key, kind in kinds.items():
            if kind is not Precision.float32 and self.trainer.get("precision") not in FULL_PRECISION:
                what = f"trainer.precision {self.trainer['precision']} does not go with {key} {kind.value}"
                raise ValueError(f"{what}: leave one of them out")

    def decisive(self) -> dict[str, Any]:
        """Every setting that decides what training gives, by its dotted name; a list of one is that one."""
        alone = self.members().get("", self)
        flat = dict(_flat(json.loads(json.dumps(asdict(alone)))))
        return {name: value for name, value in flat.items() if not name.startswith(WITHOUT_EFFECT)}

    def check_goes_on(self, earlier: Mapping[str, Any]) -> None:
        """Raises UserError where a run whose `decisive` settings were `earlier` cannot go on with these."""
        now = self.decisive()
        settled = sorted(name for name in now if name in earlier and name.startswith(_SETTLED))
        if fixed := differences(earlier, now, settled):
            what = f"goes on from a run of other settings: {', '.join(fixed)}"
            do = "leave these as they were, or start anew with base="
            raise UserError(f"resume={self.resume}", what, do)

    def members(self) -> dict[str, "TrainSettings"]:
        """The experiment of each adapter, under a name that says its values; "" where there is but one.

        Raises ValueError for lists of different lengths, and for what adapters over one base cannot have.
        """
        lists = {key: value for key in TOGETHER if isinstance(value := _get(self, key), list)}
        if not lists:
            return {"": self}
        if empty := [key for key, values in lists.items() if not values]:
            raise ValueError(f"{empty[0]} is an empty list: one value for each adapter was expected")
        if len(set(map(len, lists.values()))) > 1:
            lengths = ", ".join(f"{key} {len(values)}" for key, values in lists.items())
            raise ValueError(f"lists for several adapters need one length, here: {lengths}")
        if several := len(next(iter(lists.values()))) > 1:
            self._refuse_several("seed" in lists)
        members: dict[str, TrainSettings] = {}
        for values in zip(*lists.values(), strict=True):
            chosen = dict(zip(lists, values, strict=True))
            lora = {key.partition(".")[2]: value for key, value in chosen.items() if key.startswith("lora.")}
            rate, seed = chosen.get("optimizer.lr", self.optimizer.lr), chosen.get("seed", self.seed)
            optimizer = replace(self.optimizer, lr=rate)
            name = "_".join(f"{key}-{value}" for key, value in chosen.items())
            members[name] = replace(self, seed=seed, lora=replace(self.lora, **lora), optimizer=optimizer)
        if len(members) < len(next(iter(lists.values()))):
            raise ValueError("two of several adapters at once are the same: leave one out")
        return members if several else {"": next(iter(members.values()))}

    def _kept_by(self) -> str:
        return str(self.callbacks.get("checkpoint", {}).get("monitor", "valid/loss"))

    def _refuse_several(self, seeds: bool) -> None:
        """Raises ValueError for what several adapters, perhaps of several `seeds`, cannot have."""
        wrong: dict[str, bool] = {
            "lora.rank must be above 0 for each of": any(not rank for rank in listed(self.lora.rank)),
            "lora.dora cannot be had with": self.lora.dora,
            "lora.bias must be none with": self.lora.bias is not LoraBias.none,
            "model.dropout must be 0 with": self.model.dropout > 0,
            "gradient_checkpointing cannot be had with": self.gradient_checkpointing,
            "data.pack cannot be had with": self.data.pack,
            "callbacks.checkpoint.monitor must be valid/loss with": self._kept_by() != "valid/loss",
            "optimizer.schedule=plateau cannot be had with": self.optimizer.schedule is Schedule.plateau,
            "base must be given, as its random weights depend on the seed, for": seeds and self.base is None,
        }
        for what, found in wrong.items():
            if found:
                raise ValueError(f"{what} several adapters at once")


@dataclass
class GenerateSettings:
    data: DataSettings
    decoding: DecodingSettings
    trainer: dict[str, Any]
    callbacks: dict[str, Any]
    model: ModelSettings | None = None
    """Only to insist on a card; the weights say theirs."""
    adapter: str | None = None
    """A run's folder or an adapter file; or one of the names in `adapters`, for rows that name none."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Several over one base, e.g. {hotels:RUN1,museums:RUN2}; a row says which by its "adapter"."""
    base: str | None = None
    """Base weights; null: those that the adapter was trained on."""
    split: str = "test"
    """train, valid or test."""
    resume: str | None = None
    """The folder of an interrupted decoding to go on from; one in this run's own folder goes on by itself."""
    limit: int | None = None
    """Decode the first so many different contexts only."""
    seed: int = 42

    def __post_init__(self) -> None:
        for name, run in self.adapters.items():
            if not isinstance(run, str):
                raise ValueError(f"adapters.{name} must be a run's folder or a file, not {run}")
        if self.adapters and self.adapter is not None and self.adapter not in self.adapters:
            raise ValueError(f"adapter {self.adapter} is none of adapters: {', '.join(self.adapters)}")
        if self.adapter is None and self.base is None and not self.adapters:
            raise ValueError("neither adapter nor base is set: give the folder of a run, adapter=outputs/…")
        if self.split not in ("train", "valid", "test"):
            raise ValueError(f"split must be train, valid or test, not {self.split}")
        _check_limit_and_seed(self.limit, self.seed)


def _check_limit_and_seed(limit: int | None, seed: Any) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    if not all(0 <= one < 2**32 for one in listed(seed)):
        raise ValueError(f"seed must be in [0, 2**32), not {seed}")


def _flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _get(settings: Any, key: str) -> Any:
    """The setting under a dotted name."""
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings
