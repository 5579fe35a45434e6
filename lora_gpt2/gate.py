"""What composed settings pass through: a wrong key, type or value stops a run in a second, in one line.

Torch-free, unless a `_target_` asks for more.
"""

import difflib
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
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
from lora_gpt2.files import disk_fault
from lora_gpt2.model.settings import LoraSettings, ModelSettings
from lora_gpt2.settings import TOGETHER, GenerateSettings, TrainSettings
from lora_gpt2.training.config import OptimizerSettings

S = TypeVar("S")

TARGETS = "LORA_GPT2_TARGETS"
"""The environment variable that names further modules, with commas, whose classes settings may have built.

Settings may come from anywhere, and a `_target_` is code that runs.
"""

_IN_A_LINE = "LORA_GPT2_IN_A_LINE"
"""The environment variable by which a run tells its other processes that mistakes are told in a line."""


class ConfigError(CompactHydraException):
    """A fault of the user's: Hydra prints its message without a traceback and exits with 1."""


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
    except Exception as error:
        if not _of_hydra(error):
            raise
        raise UserError("settings", _told(error), "see python train.py --help") from None
    finally:
        restore_gh_from_backup(running)


def _of_hydra(error: Exception) -> bool:
    """Whether it finds fault with settings: Hydra raises many kinds, such as ValueError for ``lora=4``."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    where = str(frame.tb_frame.f_globals.get("__name__")) if frame else ""
    return isinstance(error, HydraException) or where.startswith(("hydra.", "omegaconf.", "antlr4.", "yaml."))


def resolve(cfg: DictConfig, schema: type[S]) -> S:
    """The composed config as dataclasses. Raises ConfigError for a key, type or value that is wrong."""
    with user_errors():
        for key, value in (cfg.get("point") or {}).items():
            OmegaConf.update(cfg, key, value)
        faults = list(_unknown_keys(cfg, schema)) or list(_ill_typed(cfg, schema))
        if faults := faults or list(_faults_of_targets(cfg)):
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
        raise ConfigError(str(error)) from error


@contextmanager
def refused(in_sweep: bool = False) -> Iterator[None]:
    """Ends the process in a line for a fault of the user's; Hydra would write more, or go on.

    `in_sweep`: raises ConfigError instead, as the other jobs do go on. Where HYDRA_FULL_ERROR is set, the
    whole traceback is shown.
    """
    try:
        with user_errors():
            yield
    except HydraException as error:
        if in_sweep:
            raise
        if os.environ.get(_IN_A_LINE, "1"):
            print(error, file=sys.stderr)
        else:
            traceback.print_exception(error)
        raise SystemExit(1) from None


@contextmanager
def told_in_a_line(script: str) -> Iterator[None]:
    """Says in one line what Hydra finds wrong with the command line of `script`, or the disk; exits with 1.

    Where HYDRA_FULL_ERROR is set, the whole traceback is shown, as Hydra does.
    """
    if os.environ.setdefault(_IN_A_LINE, "" if "HYDRA_FULL_ERROR" in os.environ else "1"):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would tell it itself, in many
    try:
        yield
    except KeyboardInterrupt:  # before there was anything to save
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        if fault := disk_fault(error):
            told = str(fault)
        elif _of_hydra(error):
            told = _in_a_line(script, _told(error))
        else:
            raise
        if not os.environ[_IN_A_LINE]:
            raise
        print(told, file=sys.stderr)
        raise SystemExit(1) from None


def _told(error: Exception) -> str:
    """What it says; of a value of the wrong kind Hydra leaves out why."""
    told = str(error).strip()
    if told.startswith(bad := "Error merging override ") and error.__cause__:
        return f"{told.removeprefix(bad)}: {str(error.__cause__).splitlines()[0]}"
    return told


def _in_a_line(script: str, told: str) -> str:
    """Hydra's words for a key or an option that is none, as ours are."""
    if told.startswith("Config group override must be"):
        return f"a group takes the name of an option, as in lora=qv; see python {script}.py --help"
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


def _faults_of_targets(cfg: DictConfig) -> Iterator[str]:
    """What is wrong with a `_target_` and its arguments; this imports what it names, torch among it."""
    for group in ("trainer", "callbacks", "logger"):
        nodes = OmegaConf.to_container(cfg.get(group, OmegaConf.create()), resolve=True)
        if group == "callbacks" and isinstance(nodes, dict):
            for name, node in nodes.items():
                if not isinstance(node, dict) or "_target_" not in node:
                    yield f"callbacks.{name!s}: has no _target_, which names the class"
        for path, node in _nodes(nodes, group):
            if isinstance(node, dict) and "_target_" in node:
                yield from _faults_of_target(path, node)
            if isinstance(node, str) and "${" in node:  # whoever builds it would resolve it once more
                yield f"{path}: {node} is not resolved; leave out its backslash"


def _faults_of_target(path: str, node: dict[str, Any]) -> Iterator[str]:
    if not str(target := node["_target_"]).startswith(_trusted()):
        yield f"{path}._target_: {target} is not trusted; if you wrote it, set {TARGETS}={target}"
        return
    try:
        built = get_object(target)
        parameters = inspect.signature(built).parameters
    except (ImportError, TypeError, ValueError) as error:
        yield f"{path}._target_: {str(error).splitlines()[0]}"
        return
    if not inspect.isclass(built):
        yield f"{path}._target_: {target} is no class"
    elif not (target.startswith(_own()) or issubclass(built, _parts_of_a_trainer())):
        # such as what a trusted module has imported
        yield f"{path}._target_: {target} is no trainer and no part of one"
    elif all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in node.keys() - parameters.keys() - {"_target_", "_partial_"}:
            near = _nearest(key, list(parameters), f"{path}.")
            yield f"{path}.{key}: no such argument of {target}{near}"


def _nodes(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A node and all below it, each with its dotted name."""
    yield path, node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _nodes(value, f"{path}.{key}")
    if isinstance(node, list):
        for number, value in enumerate(node):
            yield from _nodes(value, f"{path}[{number}]")


def _own() -> tuple[str, ...]:
    """How the names begin of what the user trusts beside ours."""
    return tuple(filter(None, (name.strip() for name in os.environ.get(TARGETS, "").split(","))))


def _trusted() -> tuple[str, ...]:
    """How the names begin of what settings may have built."""
    kinds = "callbacks", "loggers", "strategies", "plugins", "profilers", "accelerators"
    theirs = (f"lightning.pytorch.{kind}." for kind in kinds)
    return "lora_gpt2.", "lightning.Trainer", *theirs, *_own()


def _parts_of_a_trainer() -> tuple[type, ...]:
    """Classes; so late that a wrong setting is reported before torch is loaded."""
    from lightning import Callback, Trainer
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.plugins import LayerSync, Precision
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy

    return (
        *(Trainer, Callback, Logger, Strategy, Accelerator, Profiler),
        *(Precision, LayerSync, CheckpointIO, ClusterEnvironment),
    )


def _nearest(key: str, known: list[str], path: str) -> str:
    if not known:
        return f"; +{path}{key} adds it"
    near = difflib.get_close_matches(key, known, n=1)
    return f", did you mean {path}{near[0]}?" if near else f"; there are {', '.join(known)}"
