"""`lora-gpt2`: the tools that are no experiment. Experiments are train.py and generate.py."""

import json
import math
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lora_gpt2.errors import UserError
from lora_gpt2.files import UNWRITABLE, unwritable
from lora_gpt2.sweep_cli import app as sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt GPT-2 with LoRA to data-to-text generation. Experiments: train.py and generate.py.",
)
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


class DType(str, Enum):
    """What weights are written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Form(str, Enum):
    """Whose adapter files are written and read."""

    peft = "peft"
    reference = "reference"


_LIVE = 10
"""Seconds between two pages of a run that is under way."""

BASE_HELP = "Its base, if it is not where it was in training."


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
def merge(
    run: Annotated[str, typer.Argument(help="A run's folder or file: an adapter, or a base alone.")],
    output: Annotated[Path, typer.Option(help="Folder for the model.")],
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    dtype: Annotated[DType, typer.Option(help="Type of the weights written.")] = DType.float32,
    tokenizer: Annotated[str | None, typer.Option(help="Its BPE, if not in its folder.")] = None,
) -> None:
    """Fold an adapter into its base: a folder that transformers loads, and base= here."""
    import torch

    from lora_gpt2 import conversion

    found = conversion.merge(run, base, output, getattr(torch, dtype.value), tokenizer)
    for name, value in found.items():
        typer.echo(f"largest logit difference, merged against unmerged, in {name}: {value:.2g}")
    typer.echo(f"in {output}")


@app.command()
def export(
    form: Annotated[
        Form, typer.Argument(help="peft: a folder; reference: a .pt file of the published scripts.")
    ],
    run: Annotated[str, typer.Argument(help="Folder or file of an adapter.")],
    output: Annotated[Path, typer.Option(help="The folder or the .pt file to write.")],
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    everything: Annotated[bool, typer.Option(help="reference: the base's weights too.")] = False,
) -> None:
    """Write an adapter for PEFT or for the published scripts."""
    from lora_gpt2 import conversion

    note = conversion.export(form.value, run, base, output, everything)
    typer.echo(f"{note}\nin {output}" if note else f"in {output}")


@app.command(name="import")
def import_(
    form: Annotated[
        Form, typer.Argument(help="peft: a folder; reference: a .pt file of the published scripts.")
    ],
    source: Annotated[Path, typer.Argument(help="What save_pretrained or the published scripts wrote.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    base: Annotated[
        str | None,
        typer.Option(help="Its base: run, folder, file or hub name; reference: may be in the file."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Card of a base that does not say it, e.g. gpt2.md.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The base's BPE, if not in its folder and not GPT-2's.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="reference: the file does not say it.")] = None,
    rank: Annotated[int | None, typer.Option(help="reference: checked against the file.")] = None,
    targets: Annotated[str | None, typer.Option(help="reference: e.g. q,v.")] = None,
) -> None:
    """Take an adapter from PEFT or from the published scripts."""
    from lora_gpt2 import conversion
    from lora_gpt2.gate import composed

    card = composed([f"model={model}"]).model if model is not None else None
    if base is not None:
        below = conversion.open_base(base, card, tokenizer)
    elif form is Form.reference and card is not None:
        below = conversion.held_base(source, card, tokenizer)
    else:
        raise UserError("import", "no base is given", "use --base, or --model where the .pt file holds it")
    if form is Form.peft:
        conversion.import_peft(source, below, output)
    else:
        names = [name.strip() for name in targets.split(",")] if targets else None
        conversion.import_reference(source, below, output, alpha, rank, names)
    typer.echo(f"in {output}")


@app.command()
def combine(
    runs: Annotated[list[str], typer.Argument(help="Folders or files of adapters over one base.")],
    output: Annotated[Path, typer.Option(help="Folder for the sum.")],
    weights: Annotated[
        str | None, typer.Option(help="A factor each, e.g. 0.7,0.3; default: the average.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Cut the sum to this rank.", min=1)] = None,
) -> None:
    """Add adapters up, weighted; without a rank the sum is exact."""
    from lora_gpt2 import conversion

    kept = conversion.combine(runs, _weights(weights, len(runs)), output, rank)
    typer.echo(f"{100 * kept:.4g} % of the energy kept\nin {output}")


@app.command()
def inspect(
    run: Annotated[str, typer.Argument(help="Folder or file of an adapter.")],
    other: Annotated[
        str | None, typer.Option(help="A second adapter: which subspaces do they share?")
    ] = None,
    base: Annotated[str | None, typer.Option(help=BASE_HELP)] = None,
    to_rank: Annotated[int | None, typer.Option(help="What a cut to this rank would keep.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="Write the cut adapter into this folder.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw spectra and similarities: .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Show what an adapter changed: norms, spectra, effective ranks, amplification."""
    from lora_gpt2 import conversion
    from lora_gpt2.reporting import inspection
    from lora_gpt2.weights.adapter import open_adapter
    from lora_gpt2.weights.analysis import analyse, similarities

    if output is not None and to_rank is None:
        raise UserError("--output", "is where the cut adapter goes", "say to which rank: --to-rank 2")
    model, _ = open_adapter(run, base)
    update = conversion.update_of(run)
    analyses = analyse(update, model.weights())
    overlaps = None
    if other is not None:
        conversion.check_same_base([run, other])
        overlaps = similarities(update, conversion.update_of(other))
    if as_json:
        typer.echo(json.dumps(inspection.as_json(analyses, overlaps), indent=2))
    else:
        inspection.table(analyses, to_rank, overlaps)
    if picture is not None:
        inspection.picture(picture, analyses, overlaps)
    if output is not None:
        kept = conversion.combine([run], [1.0], output, to_rank)
        typer.echo(f"{100 * kept:.4g} % of the energy kept\nin {output}", err=as_json)


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


@app.command(name="verify-resume", context_settings={"ignore_unknown_options": True})
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
        f"{found.finished} runs to their end, {found.missing} logged steps lost, "
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


def _weights(given: str | None, count: int) -> list[float]:
    if given is None:
        return [1 / count] * count
    try:
        weights = [float(weight) for weight in given.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise UserError(
            "--weights", f"{given!r} is not {count} numbers", "give one for each adapter: 0.7,0.3"
        )
    return weights


def main() -> None:
    """Runs a command; a fault of the user's is one line and exit code 1."""
    try:
        app()
    except UserError as error:
        sys.exit(f"lora-gpt2: {error}")
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        sys.exit(f"lora-gpt2: {unwritable(error)}")


if __name__ == "__main__":
    main()
