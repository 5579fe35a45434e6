"""`lora-gpt2 sweep`: the tools for the jobs of ``python train.py -m``."""

import json
import re
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from lora_gpt2.errors import UserError

app = typer.Typer(
    no_args_is_help=True, help="The jobs of python train.py -m …: their states, the rest, a table."
)

_LAUNCHER = (
    "account|array_parallelism|constraint|cpus_per_task|gpus_per_node|max_num_timeout|mem_gb|mem_per_cpu|name"
    "|n_jobs|nodes|partition|qos|signal_delay_s|tasks_per_node|timeout_min"
)
_HARMLESS = re.compile(
    r"\+*hydra(/(launcher|sweeper)=\w+"
    rf"|\.(mode|verbose|sweep\.\w+|sweeper\.max_batch_size|launcher\.({_LAUNCHER}))=[\w ./\\:@%+,~'\"-]*)"
)
"""What of Hydra's own settings is taken from a sweep's folder: the others may name code to be run.

A launcher writes its values into a script, where a new line is a command.
"""

SweepFolder = Annotated[Path, typer.Argument(help="Folder of the sweep: outputs/sweeps/…")]


@app.command()
def status(folder: SweepFolder) -> None:
    """List the jobs: which are finished, running, failed, or not begun."""
    from lora_gpt2 import jobs, sweeps
    from lora_gpt2.reporting import sweep

    planned, found = sweeps.planned(folder), jobs.jobs(folder)
    of_all = set.intersection(*map(set, planned.values())) if len(planned) > 1 else set()
    lines = []
    for name, overrides in planned.items():
        told = found[name].told() if name in found else ["not begun"]
        own = [one for one in overrides if one not in of_all and not one.startswith("+callbacks.pruning=")]
        lines.append([name, " ".join(own), *told])
    sweep.states(lines)
    typer.echo(f"{jobs.finished(found)} of {len(planned)} are finished")


@app.command()
def resume(folder: SweepFolder) -> None:
    """Run what is not finished; a job that was cut off goes on from its last checkpoint."""
    from lora_gpt2 import launch
    from lora_gpt2.sweeps import SWEEP_FILE, Sweep

    noted = Sweep.read(folder)
    overrides = [*noted.hydra, *noted.task]
    again = f"give the sweep's own command again with hydra.sweep.dir={folder}"
    for override in filter(_asks_for_more, overrides):
        what = f"asks for {override}, which is not done at a file's word"
        raise UserError(folder / SWEEP_FILE, what, f"if you wrote it, {again}")
    if Path(noted.cwd).resolve() != Path.cwd().resolve():
        what = f"was begun in {noted.cwd}, from where its paths are meant"
        raise UserError(folder, what, f"go there first, or {again}")
    place = f"hydra.sweep.dir={launch.quoted(folder.resolve())}"
    sys.argv = ["train.py", *overrides, place]
    launch.main()


def _asks_for_more(override: str) -> bool:
    """Whether it asks for anything but a value of a training's setting, or an option that comes with us."""
    from hydra.errors import HydraException

    from lora_gpt2.sweeps import parsed

    if _HARMLESS.fullmatch(override):
        return False
    try:
        (one,) = parsed([override])
    except HydraException:  # a flag of the command line
        return True
    first = re.split("[./]", one.key_or_group)[0]
    elsewhere = one.key_or_group in _groups() and re.search(r"[/\\$]|\.\.", override.partition("=")[2])
    return first == "hydra" or one.package is not None or bool(elsewhere)


def _groups() -> set[str]:
    """Settings of which a file is chosen by its name, which could be the way to any other."""
    packages = map(resources.files, ("configs", "conf_presets"))
    return {folder.name for package in packages for folder in package.iterdir() if folder.is_dir()}


@app.command(context_settings={"ignore_unknown_options": True})
def search(
    folder: Annotated[Path, typer.Argument(help="Where the trials go; a search there goes on.")],
    overrides: Annotated[
        list[str], typer.Argument(help="As for train.py; choice(…), range(…), interval(…) are searched.")
    ],
    trials: Annotated[int, typer.Option(help="How many, those of earlier times included.", min=1)] = 20,
    by: Annotated[
        str, typer.Option(help="What decides: valid_loss, or bleu with score=valid.")
    ] = "valid_loss",
    seed: Annotated[int, typer.Option(help="Of the choices, not of the trainings.")] = 0,
) -> None:
    """Search for the best settings with Optuna; trials that fall behind are given up."""
    try:
        from lora_gpt2.search import search as run
    except ImportError as error:
        if error.name != "optuna":
            raise
        raise UserError("search", "needs Optuna", 'pip install "lora-gpt2[search]"') from None
    study = run(folder, overrides, trials, by, seed)
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.values]
    if not done:
        raise UserError(folder, "no trial came to its end", "see what they said above")
    best = study.best_trial
    chosen = " ".join(f"{key}={value}" for key, value in best.params.items())
    typer.echo(f"best of {len(done)}: {by} {best.value:.4f} with {chosen}\nin {folder / str(best.number)}")


@app.command()
def table(
    folder: SweepFolder,
    by: Annotated[str | None, typer.Option(help="The metric that decides, e.g. nist or valid_loss.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Compare what is finished: means and standard deviations over seeds, the best first."""
    from lora_gpt2 import jobs, sweeps
    from lora_gpt2.reporting import sweep

    finished = {place: job.settings for place, job in jobs.adapters(folder).items()}
    if not finished:
        raise UserError(folder, "holds no finished jobs", "see lora-gpt2 sweep status")
    found = sweep.points(finished, by)
    if as_json:
        typer.echo(json.dumps(sweep.as_json(found), indent=2))
    else:
        sweep.table(found)
        others = sorted(sweep.INPUTS.intersection(*[point.settings for point in found]))
        if others:
            typer.echo(f"not all were scored on the same inputs: they differ in {', '.join(others)}")
        planned = len(sweeps.planned(folder)) if (folder / sweeps.SWEEP_FILE).is_file() else 0
        if (done := jobs.finished(jobs.jobs(folder))) < planned:
            typer.echo(f"{done} of {planned} are finished")
