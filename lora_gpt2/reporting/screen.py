"""What a run prints: the corpus, the model, the scores. Rank 0 alone speaks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from lora_gpt2.data.batches import EncodedRows
from lora_gpt2.decoding.predictions import Queries
from lora_gpt2.evaluation.text_files import read_references
from lora_gpt2.model.keys import is_lora
from lora_gpt2.model.language_model import GPT2LMModel

_console = Console(soft_wrap=True, highlight=False, markup=False)  # names and paths hold brackets


@rank_zero_only
def corpus(meta: dict[str, Any]) -> None:
    """The encoded corpus in numbers; `meta` is what meta.json holds."""
    title = f"corpus {meta['corpus']}, BPE of {meta['tokenizer']['vocab_size']:,} entries"
    table = Table("split", "rows", "contexts", "tokens/context", "tokens/completion", "longest", title=title)
    for name, split in meta["splits"].items():
        counts = f"{split['rows']:,}", f"{split['contexts']:,}"
        means = f"{split['context_tokens']:.1f}", f"{split['completion_tokens']:.1f}"
        table.add_row(name, *counts, *means, str(split["longest"]))
    _console.print(table)


@rank_zero_only
def model(card: str, built: GPT2LMModel) -> None:
    """Parameters in all and trainable. Without freezing done yet, LoRA decides what trains."""
    config = built.config
    total = sum(parameter.numel() for parameter in built.parameters())
    lora = sum(parameter.numel() for name, parameter in built.named_parameters() if is_lora(name))
    trainable = lora or total
    _console.print(
        f"model {card}: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"vocabulary {config.vocab_size:,}; {total:,} parameters, "
        f"{trainable:,} trainable ({100 * trainable / total:.3g} %)"
    )


@rank_zero_only
def rows_cut(seq_len: int, **splits: EncodedRows) -> None:
    """How many rows `seq_len` shortened, where it did; more than one in a hundred are a warning."""
    for name, rows in splits.items():
        if rows.cut:
            warning = "warning: " if rows.cut > len(rows) / 100 else ""
            _console.print(
                f"{warning}{name}: {rows.cut:,} of {len(rows):,} rows cut to data.seq_len={seq_len} tokens, "
                f"{rows.lost:,} of them keep nothing of their completion"
            )


@rank_zero_only
def queries(split: str, asked: Queries) -> None:
    _console.print(f"{split}: {len(asked.of_row):,} rows, {len(asked):,} different contexts to decode")
    if asked.cut:
        _console.print(f"{split}: {asked.cut:,} contexts keep only their last tokens (data.seq_len)")


@rank_zero_only
def scores(report: dict[str, Any]) -> None:
    """Scores by metric; for WebNLG by part, one column each."""
    parts = report if "signatures" not in report else {"score": report}
    table = Table("metric", *parts)
    first = next(iter(parts.values()))
    for metric in first["signatures"]:
        values = [part.get(metric) for part in parts.values()]
        table.add_row(metric, *map(_figure, values))
    _console.print(table)
    for metric, signature in first["signatures"].items():
        _console.print(f"  {metric}: {first['notes'].get(metric) or signature}")


@rank_zero_only
def artefacts(folder: Path) -> None:
    """The files of a run's folder."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir() if p.name[0] != ".")
    _console.print(f"in {folder}: {', '.join(names)}")


@rank_zero_only
def note(text: str) -> None:
    _console.print(f"note: {text}", style="yellow")


@rank_zero_only
def title(text: str) -> None:
    _console.print(f"\n{text}", style="bold")


@rank_zero_only
def command(text: str) -> None:
    _console.print(f"$ {text}", style="dim")


@rank_zero_only
def samples(before: Path, after: Path, count: int) -> None:
    """A few inputs with a reference, and what the model wrote before and after adapting."""
    texts = {
        name: _lines(folder / "hypotheses.txt") for name, folder in (("base", before), ("adapted", after))
    }
    contexts = _lines(after / "contexts.txt")
    references = read_references(after / "references.txt")
    step = max(1, len(contexts) // count)
    for i in range(0, step * count, step):
        _console.print(f"\ninput     {contexts[i]}")
        for reference in references[i][:2]:
            _console.print(f"reference {reference}")
        for name, lines in texts.items():
            _console.print(f"{name:<9} {lines[i]}", style="bold" if name == "adapted" else None)
    _console.print()


@rank_zero_only
def before_and_after(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two score reports side by side."""
    table = Table("metric", "base", "adapted")
    for metric in after["signatures"]:
        table.add_row(metric, *(_figure(report[metric]) for report in (before, after)))
    _console.print(table)


@rank_zero_only
def figures(named: Mapping[str, str]) -> None:
    """A table of two columns."""
    table = Table(show_header=False)
    for name, figure in named.items():
        table.add_row(name, figure)
    _console.print(table)


def show(table: Table) -> None:
    """Prints a table in its full width: a narrow screen wraps it, a file keeps it whole."""
    wide = _console.options.update(max_width=1000)
    Console(width=_console.measure(table, options=wide).maximum, markup=False).print(table)


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
