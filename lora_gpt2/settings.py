"""The two experiments' settings: the groups' dataclasses put together, and the gate they pass through.

Torch-free: a wrong key, type or value stops the run in a second. Owns no default but the roots' own.
"""

import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar, cast, get_origin, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException, HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_gpt2.data.config import DataSettings
from lora_gpt2.decoding.config import DecodingSettings
from lora_gpt2.errors import UserError
from lora_gpt2.model.config import LoraBias
from lora_gpt2.model.settings import LoraSettings, ModelSettings, Precision
from lora_gpt2.training.config import OptimizerSettings, Schedule, listed

S = TypeVar("S")

TOGETHER = {"lora.rank": int, "lora.alpha": float, "lora.dropout": float, "optimizer.lr": float, "seed": int}
"""Settings of training that may be lists, a value for each of several adapters over one base."""

WITHOUT_EFFECT = (
    "logger.",
    "callbacks.progress.",
    "callbacks.pruning.",
    "data.cache",
    "point.",
    "dry_run",
)
"""How the names of settings begin that do not decide what training gives."""

TARGETS = "LORA_GPT2_TARGETS"
"""The environment variable that names further modules, with commas, whose classes settings may have built.

Settings may come from anywhere, and a `_target_` is code that runs.
"""

FULL_PRECISION = (None, "32-true", "32", 32)
"""What `trainer.precision` says where Lightning converts nothing."""


class ConfigError(CompactHydraException):
    """A fault of the user's: Hydra prints its message without a traceback and exits with 1."""


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
        _check_limit(self.limit)
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
        """Every setting that decides what training gives, by its dotted name."""
        flat = dict(_flat(json.loads(json.dumps(asdict(self)))))
        return {name: value for name, value in flat.items() if not name.startswith(WITHOUT_EFFECT)}

    def members(self) -> dict[str, "TrainSettings"]:
        """The experiment of each adapter, under a name that says its values; "" where there is but one.

        Raises ValueError for lists of different lengths, and for what adapters over one base cannot have.
        """
        lists = {key: value for key in TOGETHER if isinstance(value := _get(self, key), list)}
        if not lists:
            return {"": self}
        if len(set(map(len, lists.values()))) > 1 or not all(lists.values()):
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
        _check_limit(self.limit)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")


def register() -> None:
    """Makes the typed schemas known to Hydra, under the name that each group's files start from."""
    store = ConfigStore.instance()
    store.store("train_schema", _open_mappings(TrainSettings))
    store.store("generate_schema", _open_mappings(GenerateSettings))
    for group, schema in {
        "model": ModelSettings,
        "lora": LoraSettings,
        "data": DataSettings,
        "optimizer": OptimizerSettings,
        "decoding": DecodingSettings,
    }.items():
        store.store("schema", _open_mappings(schema), group=group)


def _open_mappings(schema: type) -> DictConfig:
    """The schema with mappings that take new keys: ``adapters={a:RUN}``, where Hydra would want a ``+``."""
    cfg = OmegaConf.structured(schema)
    for one in fields(schema):
        if get_origin(get_type_hints(schema)[one.name]) is dict and not OmegaConf.is_missing(cfg, one.name):
            OmegaConf.set_struct(cfg[one.name], False)
    return cast(DictConfig, cfg)


def composed(overrides: list[str]) -> TrainSettings:
    """The settings of ``python train.py OVERRIDES``. Raises UserError for overrides that are wrong."""
    register()
    running = get_gh_backup()  # a script that Hydra has started may ask too
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("configs", version_base="1.3"):
            return resolve(compose("train", overrides), TrainSettings)
    except HydraException as error:
        raise UserError("settings", str(error).strip(), "see python train.py --help") from None
    finally:
        restore_gh_from_backup(running)


def resolve(cfg: DictConfig, schema: type[S]) -> S:
    """The composed config as dataclasses. Raises ConfigError for a key, type or value that is wrong."""
    with user_errors():
        for key, value in (cfg.get("point") or {}).items():
            OmegaConf.update(cfg, key, value)
        faults = list(_unknown_keys(cfg, schema)) or list(_ill_typed(cfg, schema))
        if faults := faults or list(_unknown_arguments(cfg)):
            raise ConfigError("\n".join(faults))
        try:
            return cast(S, OmegaConf.to_object(cfg))
        except ValueError as error:  # from a dataclass' __post_init__
            raise ConfigError(str(error)) from None


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns the faults that a user can mend into ConfigError."""
    try:
        yield
    except (UserError, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from None


_IN_A_LINE = "LORA_GPT2_IN_A_LINE"


@contextmanager
def told_in_a_line(script: str) -> Iterator[None]:
    """Says what Hydra finds wrong with the command line of `script` in one line, and exits with 1.

    Where HYDRA_FULL_ERROR is set, the whole traceback is shown, as Hydra does.
    """
    if os.environ.setdefault(_IN_A_LINE, "" if "HYDRA_FULL_ERROR" in os.environ else "1"):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would tell it itself, in many
    try:
        yield
    except HydraException as error:
        if not os.environ[_IN_A_LINE]:
            raise
        print(_in_a_line(script, str(error).strip()), file=sys.stderr)
        raise SystemExit(1) from None


def _in_a_line(script: str, told: str) -> str:
    """Hydra's words for a key or an option that is none, as ours are."""
    if found := re.match(r"Could not override '([^']+)'", told):
        path, _, key = found[1].rpartition(".")
        with initialize_config_module("configs", version_base="1.3"):
            group = OmegaConf.select(compose(script), path) if path else compose(script)
        known = [str(name) for name in group] if isinstance(group, DictConfig) else []
        return f"{found[1]}: no such setting{_nearest(key, known, f'{path}.' if path else '')}"
    if found := re.search(
        r"Could not find '([^']+)'\s+Available options in '[^']+':\s+(.*)", told, re.DOTALL
    ):
        group, _, option = found[1].rpartition("/")
        known = [name for name in found[2].split("Config search path")[0].split() if "schema" not in name]
        return f"{group}: there is no {option}{_nearest(option, known, f'{group}=')}"
    return told


def _unknown_keys(cfg: Any, schema: Any, path: str = "") -> Iterator[str]:
    """Keys that are no field of their dataclass: Hydra lets `+lora.rr=3` pass and drops it."""
    if not is_dataclass(schema) or not isinstance(cfg, DictConfig):
        return
    known = {field.name: field.type for field in fields(schema)}
    for key in map(str, cfg):
        if key not in known:
            yield f"{path}{key}: no such setting{_nearest(key, list(known), path)}"
        elif not OmegaConf.is_missing(cfg, key):
            yield from _unknown_keys(cfg._get_node(key), known[key], f"{path}{key}.")


def _ill_typed(cfg: DictConfig, schema: type) -> Iterator[str]:
    """Settings that may be lists, and so are not typed by Hydra. Numbers are made what they should be."""
    for key, kind in TOGETHER.items() if schema is TrainSettings else ():
        value = OmegaConf.select(cfg, key)
        several = OmegaConf.is_list(value)
        numbers = [_number(one, kind) for one in (value if several else [value])]
        if None in numbers:
            wanted = "a whole number" if kind is int else "a number"
            yield f"{key} must be {wanted}, or a list with one for each of several adapters, not {value}"
        else:
            OmegaConf.update(cfg, key, numbers if several else numbers[0])


def _number(value: Any, kind: type) -> Any:
    """The value as a number of that kind; None: it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value % 1):
        return None
    return kind(value)


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


def _unknown_arguments(cfg: DictConfig) -> Iterator[str]:
    """Arguments that a `_target_` does not take; this imports what it names, torch among it."""
    for group in ("trainer", "callbacks", "logger"):
        nodes = OmegaConf.to_container(cfg.get(group, OmegaConf.create()), resolve=True)
        for path, node in _targets(nodes, group):
            if not str(target := node["_target_"]).startswith(_trusted()):
                yield f"{path}._target_: {target} is not trusted; if you wrote it, set {TARGETS}={target}"
                continue
            try:
                built = get_object(target)
                parameters = inspect.signature(built).parameters
            except (ImportError, TypeError, ValueError) as error:
                yield f"{path}._target_: {str(error).splitlines()[0]}"
                continue
            if not inspect.isclass(built):
                yield f"{path}._target_: {target} is no class"
                continue
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                continue
            for key in node.keys() - parameters.keys() - {"_target_", "_partial_"}:
                near = _nearest(key, list(parameters), f"{path}.")
                yield f"{path}.{key}: no such argument of {node['_target_']}{near}"


def _targets(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}")
    if isinstance(node, list):
        for number, value in enumerate(node):
            yield from _targets(value, f"{path}[{number}]")


def _trusted() -> tuple[str, ...]:
    """How the names begin of what settings may have built."""
    own = (name.strip() for name in os.environ.get(TARGETS, "").split(","))
    kinds = "callbacks", "loggers", "strategies", "plugins", "profilers", "accelerators"
    theirs = (f"lightning.pytorch.{kind}." for kind in kinds)
    return "lora_gpt2.", "lightning.Trainer", *theirs, *filter(None, own)


def _nearest(key: str, known: list[str], path: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {path}{near[0]}?" if near else f"; there are {', '.join(known)}"
