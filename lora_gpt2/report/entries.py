"""What a report tells of: each adapter with its scores, how sure these are, and which is the best."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_gpt2 import jobs
from lora_gpt2.errors import UserError
from lora_gpt2.evaluation import significance, text_files
from lora_gpt2.evaluation.scorer import e2e_statistics, webnlg_statistics
from lora_gpt2.evaluation.significance import Interval
from lora_gpt2.jobs import Job
from lora_gpt2.reporting import sweep

_SURE = 0.05
"""Above this p-value a run may be as good as the best."""


@dataclass
class Texts:
    """What a run wrote, beside its inputs and references."""

    contexts: list[str]
    references: list[list[str]]
    predictions: list[str]

    @classmethod
    def of(cls, folder: Path) -> "Texts | None":
        if not (folder / "hypotheses.txt").is_file():
            return None
        references, predictions = text_files.read_pairs(folder / "references.txt", folder / "hypotheses.txt")
        return cls(text_files.read_predictions(folder / "contexts.txt"), references, predictions)


@dataclass
class Entry:
    """One adapter or model, as the page tells of it."""

    name: str
    folder: Path
    job: Job
    values: dict[str, float]
    """Validation loss and scores, as its files have them."""
    texts: Texts | None
    intervals: dict[str, Interval] = field(default_factory=dict)
    p_values: dict[str, float] = field(default_factory=dict)
    """Against the one that all are compared to."""


def names_of(folder: Path, listed: Mapping[Path, Job]) -> dict[Path, str]:
    """One name for each job and each adapter, by which all parts of the page call it."""
    every = {**listed, **jobs.adapters(folder)}
    return sweep.names({place: job.settings for place, job in every.items()})


def figures(folder: Path) -> dict[str, list[Any]]:
    """What is finished, the best first, column by column: its name, rank and alpha, and its scores."""
    entries = entries_of(folder, names_of(folder, {}))
    chosen = {
        name: [entry.job.settings.get(name) for entry in entries] for name in ("lora.rank", "lora.alpha")
    }
    scores = {name: [entry.values.get(name) for entry in entries] for name in metrics_of(entries)}
    return {"run": [entry.name for entry in entries], **chosen, **scores}


def metrics_of(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.values))


def entries_of(folder: Path, names: Mapping[Path, str]) -> list[Entry]:
    """What is finished, the best first; of equals that of the lower validation loss."""
    found = [
        Entry(names[place], place, job, sweep.metrics(place), Texts.of(place))
        for place, job in jobs.adapters(folder).items()
    ]
    by = sweep.deciding([entry.values for entry in found]) or sweep.LOSS
    sign = 1 if by in sweep.FALLING else -1

    def place(entry: Entry) -> tuple[float, float]:
        inf = float("inf")
        return sign * entry.values.get(by, inf * sign), entry.values.get(sweep.LOSS, inf)

    return sorted(found, key=place)


def best_of(entries: Sequence[Entry]) -> dict[str, Any]:
    """By what the first is the best, over how many inputs, and which others may be as good."""
    first, by = entries[0], sweep.deciding([entry.values for entry in entries]) or sweep.LOSS
    close = [one.name for one in entries[1:] if one.p_values.get(by, 0.0) > _SURE]
    told = "" if first.texts is None else f"{len(first.texts.predictions):,} inputs"
    split = first.job.settings.get("score") or "scored"
    return {"name": first.name, "by": by, "over": f"{told} of the {split} split", "close": close}


def over_seeds(entries: Sequence[Entry]) -> list[sweep.Point]:
    """Means over seeds, where there are several of some setting."""
    found = sweep.points({entry.folder: entry.job.settings for entry in entries}) if entries else []
    return found if any(point.runs > 1 for point in found) else []


def compare(entries: Sequence[Entry], baseline: Path | None) -> tuple[str | None, list[str]]:
    """Fills in intervals and p-values.

    Returns what all are compared to, `baseline` or else the best, and those that were scored on other inputs.
    """
    scored = [entry for entry in entries if entry.texts]
    if not scored:
        return None, []
    against = Texts.of(baseline) if baseline is not None else None
    if baseline is not None and not baseline.is_dir():
        raise UserError("--baseline", f"{baseline}: there is no such folder", "give that of a scored run")
    if baseline is not None and against is None:
        raise UserError("--baseline", f"{baseline} holds no hypotheses.txt", "decode and score it first")
    first = against or scored[0].texts
    assert first is not None
    alike = [entry for entry in scored if entry.texts and entry.texts.references == first.references]
    others = [entry for entry in scored if entry not in alike]
    if against is not None and not alike:
        what = f"{baseline} was scored on other inputs than {scored[0].folder}"
        raise UserError("--baseline", what, "decode both with the same data, split and limit")
    _fill_in(alike, first.references, against)
    for entry in others:
        assert entry.texts is not None
        _fill_in([entry], entry.texts.references)
    compared = str(baseline) if baseline is not None else (scored[0].name if len(alike) > 1 else None)
    return compared, [entry.name for entry in others]


def _fill_in(
    entries: Sequence[Entry], references: Sequence[Sequence[str]], against: Texts | None = None
) -> None:
    """Intervals, and p-values against `against` or the first, of what was scored on the same inputs."""
    systems = [entry.texts.predictions for entry in entries if entry.texts]
    if against is not None:
        systems.append(against.predictions)
    of_webnlg = "ter" in entries[0].values  # E2E has no TER, whatever the settings call the corpus
    found = (webnlg_statistics if of_webnlg else e2e_statistics)(systems, references)
    reference = found[-1] if against is not None else found[0]
    for entry, of_each in zip(entries, found, strict=False):
        for metric, one in of_each.items():
            entry.intervals[metric] = significance.interval(significance.resampled(one))
            if metric in reference and one is not reference[metric]:
                entry.p_values[metric] = significance.p_value(one, reference[metric])
