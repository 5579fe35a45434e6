"""A search over settings by Optuna: each trial a job of ``train.py`` in a folder of its own."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from lightning import Callback, LightningModule, Trainer
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lora_gpt2 import launch
from lora_gpt2.errors import UserError
from lora_gpt2.files import locked
from lora_gpt2.jobs import Job, State
from lora_gpt2.reporting import sweep
from lora_gpt2.reporting.sweep import FALLING, LOSS
from lora_gpt2.signals import wait_for
from lora_gpt2.sweeps import SEARCH_FILE, parsed

_STUDY = "search"

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Pruning(Callback):
    """Tells the study each validation loss, and gives a trial up that the others are ahead of."""

    def __init__(self, folder: str, number: int) -> None:
        """`folder` of the search, `number` of the trial."""
        self.folder, self.number = folder, number

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss, gone = trainer.callback_metrics.get("valid/loss"), False
        if loss is None or trainer.sanity_checking:
            return
        if trainer.is_global_zero:
            study = _study(Path(self.folder))
            trial = optuna.trial.Trial(study, study.get_trials(deepcopy=False)[self.number]._trial_id)
            rising = study.direction is optuna.study.StudyDirection.MAXIMIZE  # BLEU: less loss is more
            trial.report(-float(loss) if rising else float(loss), trainer.global_step)
            gone = trial.should_prune()
        if trainer.strategy.broadcast(gone):
            raise optuna.TrialPruned(f"validation loss {float(loss):.4f} at step {trainer.global_step}")


def search(
    folder: Path, overrides: Sequence[str], trials: int, by: str = LOSS, seed: int = 0
) -> optuna.Study:
    """Asks for settings, trains with them and tells what came out, until `trials` have come to an end.

    `overrides` as for train.py, with ``choice(…)``, ``range(…)`` or ``interval(…)`` for what is searched.
    A search that was interrupted goes on. Raises UserError for overrides that cannot be searched, for a
    folder that another search uses, and when three trials in a row have failed.
    """
    fixed, spaces = _parsed(overrides)
    if by != LOSS and not any(one.startswith("score=") for one in fixed):
        raise UserError("--by", f"only a scored run has {by}", "add score=valid, or search by valid_loss")
    with locked(folder):
        study = _study(folder, by, seed)
        _check(study, folder, fixed, spaces, by)
        for lost in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(lost.number, state=TrialState.FAIL)
        failed, ended = 0, (TrialState.COMPLETE, TrialState.PRUNED)
        while len(study.get_trials(deepcopy=False, states=ended)) < trials:
            trial = study.ask()
            chosen = [f"{key}={one.suggest(trial)}" for key, one in spaces.items()]
            print(f"trial {trial.number}: {' '.join(chosen)}", flush=True)
            place = folder / str(trial.number)
            _train(place, [*fixed, *chosen], folder, trial.number)
            _tell(study, trial, place, by)
            failed = failed + 1 if study.trials[-1].state is TrialState.FAIL else 0
            if failed == 3:
                raise UserError(folder, "three trials in a row have failed", "see what they said above")
    return study


def _study(folder: Path, by: str = LOSS, seed: int = 0) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder / SEARCH_FILE)))
    study = optuna.create_study(
        storage=storage,
        study_name=_STUDY,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
        direction="minimize" if by in FALLING else "maximize",
    )
    begun = len(study.trials)  # the same seed again would choose the same again
    study.sampler = optuna.samplers.TPESampler(seed=seed + begun)
    return study


def _check(
    study: optuna.Study, folder: Path, fixed: Sequence[str], spaces: Mapping[str, "Space"], by: str
) -> None:
    """Raises UserError where the folder holds a search for something else."""
    asked = {"by": by, "overrides": sorted([*fixed, *(one.line for one in spaces.values())])}
    known = study.user_attrs.get("asked", asked)
    if known != asked:
        what = f"holds a search by {known['by']} with {' '.join(known['overrides'])}"
        raise UserError(folder, what, "give another folder, or these settings")
    study.set_user_attr("asked", asked)


class Space(NamedTuple):
    """The values of one setting, as the command line has them, and how a trial chooses."""

    line: str
    suggest: Callable[[optuna.trial.BaseTrial], Any]


def _parsed(overrides: Sequence[str]) -> tuple[list[str], dict[str, Space]]:
    """What every trial has, and what is searched."""
    try:
        given = parsed(overrides)
    except HydraException as error:
        raise UserError("search", str(error).splitlines()[0], "see python train.py --help") from None
    spaces = {
        one.key_or_group: Space(str(one.input_line), _space(one)) for one in given if one.is_sweep_override()
    }
    trial = optuna.create_study().ask()
    for space in spaces.values():
        try:
            space.suggest(trial)
        except ValueError as error:
            raise UserError(space.line, f"cannot be searched ({error})", "give a range that rises") from None
    if not spaces:
        do = "write e.g. lora.rank=choice(1,2,4) 'optimizer.lr=tag(log,interval(1e-5,1e-3))'"
        raise UserError("search", "nothing is to be searched", do)
    return [str(one.input_line) for one in given if not one.is_sweep_override()], spaces


def _space(override: Override) -> Callable[[optuna.trial.BaseTrial], Any]:
    """How a trial chooses a value. ``tag(log, …)`` searches by orders of magnitude."""
    key, value = override.key_or_group, override.value()
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, ChoiceSweep):
        choices = [_plain(one) for one in value.list]
        return lambda trial: trial.suggest_categorical(key, choices)
    if isinstance(value, RangeSweep):
        start, stop, step = value.start, value.stop, value.step
        if start is not None and stop is not None and all(isinstance(n, int) for n in (start, stop, step)):
            return lambda trial: trial.suggest_int(key, int(start), int(stop) - 1, step=int(step))
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        low, high = float(value.start), float(value.end)
        return lambda trial: trial.suggest_float(key, low, high, log=log)
    do = "use choice(a,b), range(1,9) of whole numbers, or interval(low,high)"
    raise UserError(str(override.input_line), "cannot be searched", do)


def _plain(value: Any) -> Any:
    """A choice as Optuna can note it, written as on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return value if isinstance(value, bool | int | float) else str(value)


def _train(place: Path, overrides: list[str], folder: Path, number: int) -> None:
    """One trial as a process of its own: what it does to memory or to the machine ends with it."""
    pruning = {"_target_": f"{__name__}.Pruning", "folder": str(folder.resolve()), "number": number}
    told = ",".join(f"{name}:{json.dumps(value)}" for name, value in pruning.items())
    wait_for(launch.command([*overrides, f"+callbacks.pruning={{{told}}}"], place))


def _tell(study: optuna.Study, trial: optuna.Trial, place: Path, by: str) -> None:
    job = Job.read(place)
    if job is None or job.state in (State.failed, State.running):
        study.tell(trial, state=TrialState.FAIL)
    elif job.state is State.pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        value = sweep.metrics(place).get(by)
        if value is None:
            raise UserError("--by", f"{place} has no {by}", "add score=valid, or search by valid_loss")
        study.tell(trial, value)
