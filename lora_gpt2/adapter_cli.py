"""`lora-gpt2 merge`, `export`, `import`, `combine`, `inspect`: what is done with a trained adapter."""

import json
import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lora_gpt2.errors import UserError

app = typer.Typer()


class DType(str, Enum):
    """What weights are written in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Form(str, Enum):
    """Whose adapter files are written and read."""

    peft = "peft"
    reference = "reference"


BASE_HELP = "Its base, if it is not where it was in training."


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
