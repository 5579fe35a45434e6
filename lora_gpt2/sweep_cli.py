"""`lora-gpt2 sweep`: the tools for the jobs of ``python train.py -m``."""

import json
import os
import re
import sys
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
    rf"\+*hydra(/(launcher|sweeper)=\w+|\.(mode|verbose|sweep\.\w+|launcher\.({_LAUNCHER}))=[^{{}}\[\]]*)"
)
"""What of Hydra's own settings is taken from a sweep's folder: the others may name code to be run."""

SweepFolder = Annotated[Path, typer.Argument(help="Folder of the sweep: outputs/sweeps/…")]


@app.command()
def status(folder: SweepFolder) -> None:
    """List the jobs: which are finished, running, failed, or not begun."""
    from lora_gpt2 import jobs
    from lora_gpt2.reporting import sweep

    planned, found = jobs.planned(folder), jobs.jobs(folder)
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
    from lora_gpt2 import jobs, launch

    noted = jobs.sweep_of(folder).hydra
    for override in [*noted.overrides.hydra, *noted.overrides.task]:
        if re.match(r"[+~]*hydra\b|-", override) and not _HARMLESS.fullmatch(override):
            what = f"asks for {override}, which is not done at a file's word"
            do = f"if you wrote it, give the sweep's own command again with hydra.sweep.dir={folder}"
            raise UserError(folder / jobs.SWEEP_FILE, what, do)
    place = f"hydra.sweep.dir={launch.quoted(folder.resolve())}"
    sys.argv = ["train.py", *noted.overrides.hydra, *noted.overrides.task, place]
    os.chdir(noted.runtime.cwd)  # paths in the settings are meant from there
    launch.main()


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
    from lora_gpt2 import jobs
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
        planned = len(jobs.planned(folder)) if (folder / jobs.SWEEP_FILE).is_file() else 0
        if (done := jobs.finished(jobs.jobs(folder))) < planned:
            typer.echo(f"{done} of {planned} are finished")
