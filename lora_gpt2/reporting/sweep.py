"""The results of a sweep as a table: means over seeds, the best first."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors import safe_open

from lora_gpt2.errors import UserError
from lora_gpt2.evaluation.scorer import figures
from lora_gpt2.files import read_json
from lora_gpt2.reporting.screen import show
from lora_gpt2.weights.store import ADAPTER_FILE, MODEL_FILE, read_description

LOSS = "valid_loss"
FALLING = (LOSS, "ter")
"""The metrics of which less is better."""

INPUTS = {"data.corpus", "data.root", "data.seq_len", "score", "limit"}
"""Settings by which runs are scored on other inputs."""

TABLE_18: dict[int, dict[str, float]] = {
    rank: dict(zip((LOSS, "bleu", "nist", "meteor", "rouge_l", "cider"), values, strict=True))
    for rank, values in {
        1: (1.23, 0.6872, 8.7215, 0.4565, 0.7052, 2.4329),
        2: (1.21, 0.6917, 8.7413, 0.4590, 0.7052, 2.4639),
        4: (1.18, 0.7038, 8.8439, 0.4689, 0.7186, 2.5349),
        8: (1.17, 0.6957, 8.7457, 0.4636, 0.7196, 2.5196),
        16: (1.16, 0.6961, 8.7483, 0.4629, 0.7177, 2.4985),
        32: (1.16, 0.6933, 8.7736, 0.4642, 0.7105, 2.5255),
        64: (1.16, 0.6924, 8.7174, 0.4651, 0.7180, 2.5070),
        128: (1.16, 0.6873, 8.6718, 0.4628, 0.7127, 2.5030),
    }.items()
}
"""GPT-2 medium on E2E by rank: Hu et al. 2021, Table 18."""


@dataclass
class Point:
    """The runs that differ in nothing but their seed."""

    settings: dict[str, Any]
    """What other points have otherwise, by dotted names."""
    runs: int
    parameters: int
    """Trainable ones."""
    values: dict[str, list[float]]
    """Of each metric, one a run."""
    paper: dict[str, float] | None = None
    """The paper's figures of this rank, where it has them."""

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values[metric]) if self.values.get(metric) else math.nan

    def spread(self, metric: str) -> float | None:
        """The standard deviation over seeds; None for one seed."""
        values = self.values.get(metric, [])
        return statistics.stdev(values) if len(values) > 1 else None


def points(runs: Mapping[Path, Mapping[str, Any]], by: str | None = None) -> list[Point]:
    """The runs of a sweep, each folder with its settings, put together over seeds, the best first.

    `by`: the metric that decides; default: see `deciding`.
    Raises UserError for a metric that no run has.
    """
    alike: dict[str, list[Path]] = {}
    for folder, settings in runs.items():
        alike.setdefault(repr(sorted((k, v) for k, v in settings.items() if k != "seed")), []).append(folder)
    firsts = [runs[folders[0]] for folders in alike.values()]
    names = [name for name in varying(firsts) if name != "seed"]
    found = []
    for folders in alike.values():
        settings = runs[folders[0]]
        held = [metrics(folder) for folder in folders]
        names_held = dict.fromkeys(name for one in held for name in one)
        values = {name: [one[name] for one in held if name in one] for name in names_held}
        paper = TABLE_18.get(settings["lora.rank"]) if is_table_18(settings) else None
        chosen = {name: settings.get(name) for name in names}
        found.append(Point(chosen, len(folders), parameters(folders[0]), values, paper))
    known = list(dict.fromkeys(name for point in found for name in point.values))
    by = by or deciding([point.values for point in found])
    if by is None:
        return found
    if by not in known:
        raise UserError("--by", f"no run has {by}", f"there are {', '.join(known) or 'no figures yet'}")
    sign = 1 if by in FALLING else -1
    return sorted(found, key=lambda point: sign * point.mean(by) if point.values.get(by) else math.inf)


def deciding(of_each: Sequence[Mapping[str, Any]]) -> str | None:
    """The metric that tells which is best: BLEU where all have it, else the validation loss."""
    if of_each and all("bleu" in values for values in of_each):
        return "bleu"
    return LOSS if any(LOSS in values for values in of_each) else None


def is_table_18(settings: Mapping[str, Any]) -> bool:
    """Whether the paper's Table 18 is of this model and corpus, and of all inputs that were scored."""
    ours = [settings.get(name) for name in ("model.name", "data.corpus", "score", "limit")]
    return ours == ["gpt2.md", "e2e", "test", None]


def varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the settings in which some differ."""
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]


def names(runs: Mapping[Path, Mapping[str, Any]]) -> dict[Path, str]:
    """What tells each run, a folder with its settings, from the others: rank 4, alpha 16."""
    telling = varying(list(runs.values()))

    def name(folder: Path, settings: Mapping[str, Any]) -> str:
        chosen = (f"{setting.rpartition('.')[2]} {settings.get(setting)}" for setting in telling)
        return ", ".join(chosen) or folder.resolve().name

    return {folder: name(folder, settings) for folder, settings in runs.items()}


def states(jobs: Sequence[Sequence[str]]) -> None:
    """Prints a line for each job."""
    shown = Table("job", "settings", "state", "validation loss", "minutes", "error")
    for job in jobs:
        shown.add_row(*job)
    show(shown)


def table(found: Sequence[Point]) -> None:
    """Prints a line for each point, with the standard deviation over its seeds; the paper's below it."""
    names = list(dict.fromkeys(name for point in found for name in point.values))
    shown = Table(*found[0].settings, "parameters", "runs", *names)
    for point in found:
        chosen = ["" if value is None else f"{value}" for value in point.settings.values()]
        values = [_with_spread(point.mean(name), point.spread(name)) for name in names]
        shown.add_row(*chosen, f"{point.parameters:,}", f"{point.runs}", *values)
        if point.paper is not None:
            values = [f"{point.paper[name]:.4f}" if name in point.paper else "" for name in names]
            shown.add_row(*[""] * len(chosen), "", "paper", *values, style="dim")
    show(shown)


def as_json(found: Sequence[Point]) -> list[dict[str, Any]]:
    """The same with every value of every seed."""
    return [
        {
            "settings": point.settings,
            "parameters": point.parameters,
            "values": point.values,
            "mean": {name: point.mean(name) for name in point.values},
            "standard_deviation": {name: point.spread(name) for name in point.values},
            "paper": point.paper,
        }
        for point in found
    ]


def _with_spread(mean: float, spread: float | None) -> str:
    if math.isnan(mean):
        return ""
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"


def _weights(folder: Path) -> Path:
    return next((folder / name for name in (ADAPTER_FILE, MODEL_FILE) if (folder / name).is_file()), folder)


def metrics(folder: Path) -> dict[str, float]:
    """What a run's own files tell of its quality; figures that are not finite tell nothing."""
    found = {}
    description = read_description(_weights(folder))
    loss = description.notes.get(LOSS) if description is not None else None
    if loss is not None:
        found[LOSS] = float(loss)
    if (path := folder / "scores.json").is_file():
        found.update(figures(read_json(path, "score the run again with generate.py")))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def parameters(folder: Path) -> int:
    """Trained ones, by the file that a run left."""
    with safe_open(_weights(folder), framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
