"""One page about a run or a sweep: what was run, how good it is, how sure that is, what it writes."""

import difflib
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from lora_gpt2 import conversion, jobs, runs, settings
from lora_gpt2.errors import UserError
from lora_gpt2.evaluation import significance, text_files
from lora_gpt2.evaluation.rouge_cider import rouge_l
from lora_gpt2.evaluation.scorer import e2e_statistics, webnlg_statistics
from lora_gpt2.evaluation.significance import Interval
from lora_gpt2.files import read_json, write_text
from lora_gpt2.jobs import Job
from lora_gpt2.report import coverage, pictures
from lora_gpt2.reporting import sweep
from lora_gpt2.weights.adapter import holds_adapter
from lora_gpt2.weights.analysis import analyse

_SHOWN = 5
"""So many of the best and of the worst predictions."""

_SURE = 0.05
"""Above this p-value a run may be as good as the best."""

_BETWEEN = 300.0
"""No job of a sweep may run for so many seconds before the sweep counts as over."""


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


def write(folder: Path, output: Path, baseline: Path | None = None, refresh: int | None = None) -> bool:
    """Writes the page; returns whether anything in `folder` is still running.

    `refresh`: seconds after which a browser loads the page again. Raises UserError for a folder without jobs,
    and for a baseline that was not scored on the same inputs.
    """
    listed = {_place(folder, name): job for name, job in jobs.jobs(folder).items()}
    names = _names(folder, listed)
    entries = _entries(folder, names)
    compared, apart = _compare(entries, baseline)
    running = any(job.alive for job in listed.values()) or _between(folder, listed)
    text = _template().render(
        title=folder.resolve().name,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        refresh=refresh if running else None,
        jobs=[(place.name, names[place], *job.told()) for place, job in listed.items()],
        differences=_differences([job.settings for job in listed.values()]),
        entries=entries,
        metrics=_metrics(entries),
        compared=compared,
        apart=apart,
        best=_best(entries) if compared is not None and baseline is None else None,
        seeds=_over_seeds(entries),
        resamples=significance.RESAMPLES,
        papers=_papers(entries),
        pictures=_pictures({names[place]: place for place in listed}, entries),
        best_and_worst=_best_and_worst(entries[0]) if entries else {},
        coverage=_coverage(entries[0]) if entries else None,
        shown=entries[0].name if entries else "",
        repeat=_repeat(folder, listed),
    )
    write_text(output, text)
    return running


def _place(folder: Path, name: str) -> Path:
    """Of a job that is known by its name; a run is its only one."""
    return folder / name if (folder / name).is_dir() else folder


def _names(folder: Path, listed: Mapping[Path, Job]) -> dict[Path, str]:
    """One name for each job and each adapter, by which all parts of the page call it."""
    every = {**listed, **jobs.adapters(folder)}
    return sweep.names({place: job.settings for place, job in every.items()})


def _between(folder: Path, listed: Mapping[Path, Job]) -> bool:
    """Whether a sweep that has jobs to begin was at work a moment ago."""
    if (folder / jobs.STATUS_FILE).is_file():
        return False
    left = len(jobs.planned(folder)) > len(listed) or (folder / jobs.SEARCH_FILE).is_file()
    return left and time.time() - max(job.seen for job in listed.values()) < _BETWEEN


def figures(folder: Path) -> dict[str, list[Any]]:
    """What is finished, the best first, column by column: its name, rank and alpha, and its scores."""
    entries = _entries(folder, _names(folder, {}))
    chosen = {
        name: [entry.job.settings.get(name) for entry in entries] for name in ("lora.rank", "lora.alpha")
    }
    scores = {name: [entry.values.get(name) for entry in entries] for name in _metrics(entries)}
    return {"run": [entry.name for entry in entries], **chosen, **scores}


def _metrics(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry.values))


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html")


def _entries(folder: Path, names: Mapping[Path, str]) -> list[Entry]:
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


def _best(entries: Sequence[Entry]) -> dict[str, Any]:
    """By what the first is the best, over how many inputs, and which others may be as good."""
    first, by = entries[0], sweep.deciding([entry.values for entry in entries]) or sweep.LOSS
    close = [one.name for one in entries[1:] if one.p_values.get(by, 0.0) > _SURE]
    told = "" if first.texts is None else f"{len(first.texts.predictions):,} inputs"
    split = first.job.settings.get("score") or "scored"
    return {"name": first.name, "by": by, "over": f"{told} of the {split} split", "close": close}


def _over_seeds(entries: Sequence[Entry]) -> list[sweep.Point]:
    """Means over seeds, where there are several of some setting."""
    found = sweep.points({entry.folder: entry.job.settings for entry in entries}) if entries else []
    return found if any(point.runs > 1 for point in found) else []


def _compare(entries: Sequence[Entry], baseline: Path | None) -> tuple[str | None, list[str]]:
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


def _differences(of_each: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Settings that are not as they stand without any override: name, value or values, default.

    Those in which jobs differ come first.
    """
    usual = settings.composed([]).decisive()
    found = []
    for name in dict.fromkeys(name for one in of_each for name in one):
        values = list(dict.fromkeys(json.dumps(one.get(name)) for one in of_each))
        default = json.dumps(usual.get(name))
        if values != [default]:
            found.append((len(values) == 1, name, ", ".join(values), default))
    return [(name, values, default) for _, name, values, default in sorted(found)]


def _papers(entries: Sequence[Entry]) -> dict[int, dict[str, float]]:
    """The paper's figures of the ranks that are here, for its model and corpus."""
    ranks = {
        entry.job.settings.get("lora.rank") for entry in entries if sweep.is_table_18(entry.job.settings)
    }
    return {rank: values for rank, values in sweep.TABLE_18.items() if rank in ranks}


def _pictures(places: Mapping[str, Path], entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Titles and pictures."""
    found = []
    for column, title in {
        "train/loss": "Training loss",
        "valid/loss": "Validation loss",
        "valid/bleu": "BLEU on validation inputs while training",
    }.items():
        logged = {name: runs.logged(place, column) for name, place in places.items()}
        lines = {name: (list(one), list(one.values())) for name, one in logged.items() if one}
        if lines:
            found.append((title, pictures.curves(lines, "step", column)))
    by = sweep.deciding([entry.values for entry in entries])
    if by and len(entries) > 1 and all(by in entry.values for entry in entries):
        found += _of_sweep(entries, by)
    if entries and holds_adapter(entries[0].folder):
        found.append((f"Singular values of the updates: {entries[0].name}", _spectra(entries[0].folder)))
    return found


def _of_sweep(entries: Sequence[Entry], by: str) -> list[tuple[str, str]]:
    cells: dict[tuple[Any, Any], list[float]] = {}
    for entry in entries:
        key = entry.job.settings.get("lora.rank"), entry.job.settings.get("lora.alpha")
        cells.setdefault(key, []).append(entry.values[by])
    found = []
    if len(cells) > 1:
        means = {key: statistics.fmean(values) for key, values in cells.items()}
        found.append((f"{by} by rank and alpha", pictures.heat_map(means, "rank", "alpha", by)))
    points = {e.name: (float(sweep.parameters(e.folder)), e.values[by]) for e in entries}
    falling = by in sweep.FALLING
    found.append((f"{by} by parameters", pictures.front(points, "trained parameters", by, falling)))
    return found


def _spectra(folder: Path) -> str:
    analyses = analyse(conversion.update_of(str(folder)), None)
    lines = {
        f"{one.layer.split('.')[1]} {one.part}".strip(): (
            list(range(1, len(one.spectrum) + 1)),
            one.spectrum.tolist(),
        )
        for one in analyses
    }
    return pictures.curves(lines, "i", "singular value, block and projection")


Words = list[tuple[str, str]]
"""Runs of words: "same", "ours" or "theirs", and the text."""


def _best_and_worst(entry: Entry) -> dict[str, list[dict[str, Any]]]:
    """Predictions by their ROUGE-L, with the words in which each departs from its closest reference."""
    if entry.texts is None:
        return {}
    texts = entry.texts
    values = rouge_l([one.lower() for one in texts.predictions],
                     [[one.lower() for one in group] for group in texts.references])  # fmt: skip
    order = sorted(range(len(values)), key=lambda number: (-values[number], number))
    half = min(_SHOWN, len(order) // 2)

    def told(number: int) -> dict[str, Any]:
        closest = max(
            texts.references[number],
            key=lambda text: difflib.SequenceMatcher(None, text, texts.predictions[number]).ratio(),
        )
        return {
            "input": texts.contexts[number],
            "value": values[number],
            "words": _word_differences(texts.predictions[number], closest),
            "references": texts.references[number],
        }

    return {
        "worst": [told(number) for number in order[::-1][:half]],
        "best": [told(number) for number in order[:half]],
    }


def _word_differences(ours: str, theirs: str) -> Words:
    a, b = ours.split(), theirs.split()
    found: Words = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            found.append(("same", " ".join(a[i:j])))
            continue
        if i < j:
            found.append(("ours", " ".join(a[i:j])))
        if k < m:
            found.append(("theirs", " ".join(b[k:m])))
    return found


def _coverage(entry: Entry) -> dict[str, Any] | None:
    """By slot, and the texts that miss or add most."""
    if entry.texts is None or not any(coverage.slots(context) for context in entry.texts.contexts):
        return None
    found = coverage.coverage(entry.texts.contexts, entry.texts.predictions)
    order = sorted(range(len(found)), key=lambda i: (-len(found[i].missed) - len(found[i].added), i))
    faulty = [i for i in order if found[i].missed or found[i].added]
    return {
        "by_slot": coverage.by_slot(found),
        "texts": len(found),
        "faulty": len(faulty),
        "examples": [
            (entry.texts.contexts[i], entry.texts.predictions[i], found[i].missed, found[i].added)
            for i in faulty[:_SHOWN]
        ],
    }


def _repeat(folder: Path, listed: Iterable[Path]) -> dict[str, str]:
    """What is needed to do it again."""
    places = [folder, *listed]
    path = next(
        (place / runs.PROVENANCE_FILE for place in places if (place / runs.PROVENANCE_FILE).is_file()), None
    )
    if path is None:
        return {}
    held = read_json(path, "train again to have it written")
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in held.items()}
