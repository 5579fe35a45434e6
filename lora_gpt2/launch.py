"""How a job of ``train.py`` begins: alone, in a sweep, or as a run of its own with processes of its own."""

import copy
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from lora_gpt2 import gate
from lora_gpt2.errors import UserError
from lora_gpt2.files import first_process, locked
from lora_gpt2.jobs import STATUS_FILE, Job, check_unclaimed, run
from lora_gpt2.settings import TrainSettings
from lora_gpt2.signals import end_together, wait_for
from lora_gpt2.sweeps import Sweep, number_of, overrides_of, parsed


def main() -> None:
    """What ``train.py`` is, and ``python -m lora_gpt2.launch``."""
    end_together(first_process())
    gate.register()
    with gate.told_in_a_line("train"):
        hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")(launch)()


class OwnFolder(Callback):
    """Refuses a run or a sweep over another one's folder, before Hydra writes its settings there."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.run.dir)
        with gate.refused():
            asked = copy.deepcopy(config)
            with open_dict(asked):
                asked.hydra.runtime.output_dir = str(folder.absolute())
                HydraConfig.instance().set_config(asked)  # for ${hydra:…}, as Hydra itself does later
                del asked["hydra"]
            settings = gate.resolve(asked, TrainSettings)
            with locked(folder):
                check_unclaimed(folder, settings)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        begun = {path.parent.name: path.parent for path in folder.glob(f"*/{STATUS_FILE}")}
        if not begun:
            return
        with gate.refused():
            sweep = Sweep.composed(config.hydra)
            asked = sweep.jobs()
            for name, place in begun.items():
                number = number_of(overrides_of(place), asked) if sweep.named else name
                if number not in asked:
                    what = f"holds {len(begun)} jobs, and this sweep of {len(asked)} has none that is {name}"
                    raise UserError(folder, what, "give another hydra.sweep.dir")
                asks_hydra = any("${hydra:" in one.replace("\\", "") for one in asked[number])
                if not asks_hydra and (job := Job.read(place)) is not None:  # else the job itself looks
                    job.check_same(gate.composed(asked[number]).decisive(), place, "hydra.sweep.dir")


def launch(cfg: DictConfig) -> float | None:
    """The experiment that Hydra composed, in the folder that Hydra chose."""
    in_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    with gate.refused(in_sweep):
        resolved, here = gate.resolve(cfg, TrainSettings), HydraConfig.get()
        if in_sweep and _under_torchrun():
            do = "start the sweep without it: each of its jobs starts its own processes"
            raise UserError("torchrun", "would run the whole sweep in each of its processes", do)
        if in_sweep:
            _name_for_dashboards(here)
        folder = Path(here.runtime.output_dir)
        if resolved.dry_run:
            return _train(resolved, folder)
        if in_sweep and _starts_processes(resolved.trainer):
            return run(resolved, folder, partial(_train_apart, here), once=True)
        with locked(folder):
            return run(resolved, folder, _train, once=in_sweep)


def _train(settings: TrainSettings, folder: Path) -> float | None:
    from lora_gpt2 import experiment  # so late that a wrong setting is reported before torch is loaded

    return experiment.train(settings, folder)


def _name_for_dashboards(here: HydraConf) -> None:
    """W&B takes these where the settings name no group and no run."""
    given = parsed(Sweep.read(Path(here.sweep.dir)).task)
    of_all = {one.get_key_element() for one in given if not one.is_sweep_override()}
    own = [one for one in parsed(here.overrides.task) if one.get_key_element() not in of_all]
    os.environ["WANDB_RUN_GROUP"] = Path(here.sweep.dir).name
    os.environ["WANDB_NAME"] = " ".join(str(one.input_line) for one in own)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _starts_processes(trainer: dict[str, Any]) -> bool:
    """Whether Lightning would start the other ranks by the command line of this process, sweep and all."""
    strategy = str(trainer.get("strategy") or "auto")
    spawned = strategy.endswith(("spawn", "fork", "notebook"))  # those do without a command line
    there_already = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
    return trainer.get("devices") not in (1, "1") and not spawned and not there_already


def _train_apart(here: HydraConf, settings: TrainSettings, folder: Path) -> float | None:
    """Trains as a run of its own, whose ranks know nothing of the sweep. Raises UserError where it fails."""
    resume = [] if settings.resume is None else [f"resume={quoted(settings.resume)}"]
    overrides = [*here.overrides.task, *resume, "hydra.output_subdir=null"]
    clean = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
    code = wait_for(command(overrides, folder), cwd=here.runtime.cwd, env=clean)
    ended = Job.read(folder)
    if code or ended is None:
        why = f": {ended.error}" if ended is not None and ended.error else ""
        what = f"its processes ended with exit code {code}{why}"
        raise UserError(folder, what, "see what they said above")
    return ended.valid_loss


_OF_RANKS = (
    "LOCAL_RANK",
    "GLOBAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Lightning leaves these behind a job of several devices; in the next they would mean that it has them."""


def command(overrides: Iterable[str], folder: Path) -> list[str]:
    """What trains with `overrides` in `folder` as a run of its own."""
    own = [f"hydra.run.dir={quoted(folder)}", "hydra.mode=RUN"]
    return [sys.executable, "-m", __spec__.name, *overrides, *own]


def quoted(value: object) -> str:
    """As Hydra's command line takes any text."""
    return "'" + str(value).replace("'", "\\'") + "'"


if __name__ == "__main__":
    main()
