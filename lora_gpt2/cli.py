"""`lora-gpt2`: the tools that are no experiment. Experiments are train.py and generate.py."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from lora_gpt2.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Adapt GPT-2 with LoRA to data-to-text generation. Experiments: train.py and generate.py.",
)


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


if __name__ == "__main__":
    main()
