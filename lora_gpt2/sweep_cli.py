"""`lora-gpt2 sweep`: the tools for the jobs of ``python train.py -m``."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_gpt2.errors import UserError

app = typer.Typer(
    no_args_is_help=True, help="The jobs of python train.py -m …: their states, the rest, a table."
)

SweepFolder = Annotated[Path, typer.Argument(help="Folder of the sweep: outputs/sweeps/…")]


@app.command()
def status(folder: SweepFolder) -> None:
    """List the jobs: which are finished, running, failed, or not begun."""
    from lora_gpt2 import jobs
    from lora_gpt2.reporting import sweep

    planned, found = jobs.planned(folder), jobs.jobs(folder)
    lines = []
    for number, overrides in enumerate(planned):
        told = found[str(number)].told() if str(number) in found else ["not begun"]
        lines.append([str(number), " ".join(overrides), *told])
    sweep.states(lines)
    finished = sum(job.state is jobs.State.finished for job in found.values())
    typer.echo(f"{finished} of {len(planned)} are finished")


@app.command()
def resume(folder: SweepFolder) -> None:
    """Run what is not finished; a job that was cut off goes on from its last checkpoint."""
    import hydra

    from lora_gpt2 import jobs, settings

    noted = jobs.sweep_of(folder).hydra
    place = f"hydra.sweep.dir={folder.resolve()}"
    sys.argv = ["train.py", *noted.overrides.hydra, *noted.overrides.task, place]
    os.chdir(noted.runtime.cwd)  # paths in the settings are meant from there
    settings.register()
    hydra.main(version_base="1.3", config_path="pkg://configs", config_name="train")(jobs.launch)()


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
