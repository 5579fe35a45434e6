"""`lora-gpt2`: the tools that are no experiment. Experiments are train.py and generate.py."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lora_gpt2.adapter_cli import BASE_HELP
from lora_gpt2.adapter_cli import app as adapters
from lora_gpt2.errors import UserError
from lora_gpt2.files import disk_fault
from lora_gpt2.sweep_cli import app as sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt GPT-2 with LoRA to data-to-text generation. Experiments: train.py and generate.py.",
)
app.add_typer(adapters)
app.add_typer(sweep, name="sweep")


class Raw(str, Enum):
    """The corpora that `encode` reads."""

    e2e = "e2e"
    webnlg = "webnlg"
    dart = "dart"
    jsonl = "jsonl"


class Task(str, Enum):
    """Whose conventions scores follow."""

    e2e = "e2e"
    webnlg = "webnlg"


_LIVE = 10
"""Seconds between two pages of a run that is under way."""


@app.command()
def encode(
    corpus: Annotated[Raw, typer.Argument(help="Form of the raw corpus.")],
    input: Annotated[Path, typer.Option(help="Its folder, or one file of it.")],
    output: Annotated[Path, typer.Option(help="Folder for the encoded files.")],
    tokenizer: Annotated[
        str, typer.Option(help="gpt2, a hub name, a folder with BPE files, or corpus:SIZE to train one.")
    ] = "gpt2",
    split: Annotated[str | None, typer.Option(help="train, valid or test, for one file.")] = None,
) -> None:
    """Turn a raw corpus into BPE JSONL, with its texts, tokenizer and a meta.json beside it."""
    from lora_gpt2.data.encode import encode_corpus

    meta = encode_corpus(corpus.value, input, tokenizer, output, split)
    for name, figures in meta["splits"].items():
        typer.echo(f"{name}: {figures['rows']:,} rows, {figures['contexts']:,} different contexts")
    typer.echo(f"in {output}")


@app.command()
def score(
    predictions: Annotated[Path, typer.Option(help="One text a line, or predictions.jsonl.")],
    references: Annotated[Path, typer.Option(help="Groups of lines with blank lines between, or a CSV.")],
    task: Annotated[
        Task, typer.Option(help="e2e: BLEU, NIST, METEOR, ROUGE-L, CIDEr; webnlg: BLEU, METEOR, TER, chrF++.")
    ] = Task.e2e,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Score a file of texts against a file of references, both in the official scorer's format."""
    from lora_gpt2.evaluation.scorer import score_e2e, score_webnlg, scores_as_dict
    from lora_gpt2.evaluation.text_files import read_pairs

    groups, texts = read_pairs(references, predictions)
    values = score_e2e(texts, groups) if task is Task.e2e else score_webnlg(texts, groups)
    report = scores_as_dict(values, groups)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        from lora_gpt2.reporting.screen import scores

        scores(report)


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="As for train.py, e.g. paper=e2e_gpt2_md data.root=DIR.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: what there is.")] = "",
    steps: Annotated[int, typer.Option(help="Real steps to time; 0: none.", min=0)] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Say what an experiment costs before it runs: parameters, memory, steps, padding, operations, time."""
    from lora_gpt2.gate import composed

    settings = composed(overrides or [])  # a wrong one is told before torch is loaded
    import torch

    from lora_gpt2.plan import plan as make
    from lora_gpt2.reporting.screen import figures

    made = make(settings, device or ("cuda" if torch.cuda.is_available() else "cpu"), steps)
    if as_json:
        typer.echo(json.dumps(made.as_json(), indent=2))
    else:
        figures(made.figures())


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run or of a sweep.")],
    output: Annotated[Path | None, typer.Option(help="The page; default: report.html there.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A scored run to compare with; default: the best of the sweep.")
    ] = None,
    live: Annotated[
        bool, typer.Option(help="Write it again every ten seconds while jobs are running.")
    ] = False,
    wandb: Annotated[bool, typer.Option(help="Send it to the group of its runs on W&B, too.")] = False,
) -> None:
    """Write one page of HTML: settings, curves, scores and how sure they are, texts, how to repeat it."""
    import time

    from lora_gpt2 import jobs
    from lora_gpt2.report.entries import figures
    from lora_gpt2.report.page import write

    page = output or folder / "report.html"
    while write(folder, page, baseline, refresh=_LIVE if live else None) and live:
        typer.echo(f"in {page}, again in {_LIVE} seconds")
        time.sleep(_LIVE)
    typer.echo(f"in {page}")
    if wandb:
        from lora_gpt2.reporting.dashboards import send_report

        send_report(page, jobs.adapters(folder), figures(folder))


@app.command()
def serve(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs or sweeps, adapter files, or models.")],
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8000,
    seconds: Annotated[float, typer.Option(help="The longest that an answer may take.", min=1)] = 60,
) -> None:
    """Try adapters by hand, in a browser on this machine: inputs, beams and their tree, two side by side."""
    try:
        import torch

        from lora_gpt2.playground.models import open_playground
        from lora_gpt2.playground.server import serve as answer
    except ModuleNotFoundError as error:
        raise UserError("serve", f"needs {error.name}", 'pip install "lora-gpt2[serve]"') from None
    playground = open_playground(runs, base, seconds, "cuda" if torch.cuda.is_available() else "cpu")
    answer(playground, port, lambda address: typer.echo(f"{address}  (stop it with Ctrl-C)"))


@app.command(name="verify-resume")
def verify_resume(
    overrides: Annotated[list[str], typer.Argument(help="Settings, as for train.py.")],
    kills: Annotated[int, typer.Option(help="How many interruptions.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Of their moments.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="An empty folder.")] = Path(
        "outputs/verify-resume"
    ),
) -> None:
    """Interrupt and resume a training at random, and compare it to the bit with one left in peace."""
    from lora_gpt2 import resuming

    found = resuming.verify(overrides, output, kills, seed)
    sent = ", ".join(f"{count} {name}" for name, count in sorted(found.kills.items()))
    typer.echo(
        f"{found.steps} steps in {found.seconds:.0f} s undisturbed; {sent}; {found.resumed} times resumed, "
        f"came to the end {found.finished} times, {found.missing} logged steps lost, "
        f"{len(found.differences)} differences"
    )
    if found.differences:
        raise UserError(output, found.differences[0], "report it with these settings")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the artefacts.")] = Path("outputs/demo"),
    again: Annotated[
        bool, typer.Option(help="Run every stage again, even where its result is there.")
    ] = False,
) -> None:
    """Run the whole way on the embedded corpus: train a base, adapt it, decode and score before and after."""
    from lora_gpt2.demo import run

    run(output, again)


def main() -> None:
    """Runs a command; a fault of the user's is one line and exit code 1."""
    try:
        app()
    except UserError as error:
        sys.exit(f"lora-gpt2: {error}")
    except OSError as error:
        if (fault := disk_fault(error)) is None:
            raise
        sys.exit(f"lora-gpt2: {fault}")


if __name__ == "__main__":
    main()
