"""What sweeps and searches were asked for, as Hydra has it and notes it in their folders."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # omegaconf's own
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lora_gpt2.errors import UserError
from lora_gpt2.files import read_text
from lora_gpt2.jobs import STATUS_FILE, jobs

SWEEP_FILE = "multirun.yaml"
"""What Hydra leaves in a sweep's folder."""

SEARCH_FILE = "search.journal"
"""What Optuna notes in a search's folder."""


@dataclass
class Sweep:
    """What a sweep was asked for, in the words of its command line: nothing in them is resolved."""

    task: list[str]
    """The overrides of the training."""
    hydra: list[str]
    """Those of Hydra's own settings."""
    cwd: str
    """The folder it was begun in."""
    params: dict[str, Any]
    """What its sweeper adds: the values to go through, by the setting's name."""
    named: bool = False
    """Whether its jobs have names (`hydra.sweep.subdir`) and not numbers."""

    @classmethod
    def of(cls, hydra: Any) -> "Sweep":
        """From the node ``hydra`` as Hydra composed or noted it. Raises KeyError or TypeError for another."""
        overrides, params = hydra["overrides"], hydra["sweeper"]["params"]
        named = hydra["sweep"]["subdir"] != "${hydra.job.num}"
        found = cls(overrides["task"], overrides["hydra"], hydra["runtime"]["cwd"], params or {}, named)
        lists = found.task, found.hydra, found.params
        if [*map(type, lists)] != [list, list, dict]:
            raise TypeError
        if not all(isinstance(text, str) for text in (*found.task, *found.hydra, found.cwd)):
            raise TypeError
        return found

    @classmethod
    def composed(cls, cfg: DictConfig) -> "Sweep":
        """From the node ``hydra`` of a composed config, whose sweeper resolves its own settings alone."""
        found = cls.of(OmegaConf.to_container(cfg, resolve=False))
        params = {name: cfg.sweeper.params[name] for name in found.params}
        return replace(found, params=params)

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """What Hydra noted of it in `folder`. Raises UserError where that is no sweep's."""
        path, do = folder / SWEEP_FILE, "give the folder of a sweep: outputs/sweeps/…"
        if (folder / SEARCH_FILE).is_file():
            raise UserError(folder, "is a search, no sweep", "give the same lora-gpt2 sweep search again")
        if not path.is_file():
            raise UserError(path, "there is no such file", do)
        try:
            return cls.of(yaml.safe_load(read_text(path, do))["hydra"])
        except (KeyError, RecursionError, TypeError, ValueError, yaml.YAMLError):
            raise UserError(path, "does not tell of a sweep", do) from None

    def jobs(self) -> dict[str, list[str]]:
        """The overrides of each job by its number. Raises HydraException for what is no override."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        given = [f"{name}={values}" for name, values in self.params.items()]
        batches = BasicSweeper.split_arguments(parsed([*given, *self.task]), None)
        each = [overrides for batch in batches for overrides in batch]
        return {str(number): overrides for number, overrides in enumerate(each)}


def planned(folder: Path) -> dict[str, list[str]]:
    """The overrides of each job of a sweep or a search, in their order, by the names of their folders.

    Those that a sweep's file does not tell of, as values come from elsewhere, are listed once begun.
    Those that have names are called by them once begun, and till then by their numbers, as in #3.
    """
    if not (folder / SWEEP_FILE).is_file():
        return {name: overrides_of(folder / name) for name in jobs(folder)}
    try:
        sweep = Sweep.read(folder)
        asked, begun = sweep.jobs(), [path.parent.name for path in folder.glob(f"*/{STATUS_FILE}")]
        begun.sort(key=lambda name: (len(name), name))
        others = {name: overrides_of(folder / name) for name in begun if sweep.named or name not in asked}
        if not sweep.named:
            return asked | others
        there = {number_of(overrides, asked) for overrides in others.values()}
        return others | {f"#{number}": one for number, one in asked.items() if number not in there}
    except HydraException as error:
        fault = str(error).splitlines()[0]
        raise UserError(folder / SWEEP_FILE, f"does not tell of a sweep: {fault}", "give another") from None


def number_of(overrides: Iterable[str], jobs: Mapping[str, Iterable[str]]) -> str | None:
    """Which of a sweep's `jobs` has these."""
    own = sorted(overrides)
    return next((number for number, one in jobs.items() if sorted(one) == own), None)


def parsed(overrides: Iterable[str]) -> list[Override]:
    """Raises HydraException for what is no override."""
    return OverridesParser.create().parse_overrides(list(overrides))


def overrides_of(place: Path) -> list[str]:
    """What Hydra noted of one job. Raises UserError for a file that is not so."""
    path, do = place / ".hydra" / "overrides.yaml", "remove it: the job's settings are not shown then"
    if not path.is_file():
        return []
    try:
        return list(map(str, yaml.safe_load(read_text(path, do))))
    except (RecursionError, TypeError, ValueError, yaml.YAMLError):
        raise UserError(path, "holds no list of overrides", do) from None
