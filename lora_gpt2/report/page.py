"""One page about a run or a sweep: what was run, how good it is, how sure that is, what it writes."""

import difflib
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2

from lora_gpt2 import conversion, jobs, runs
from lora_gpt2.evaluation import significance
from lora_gpt2.evaluation.rouge_cider import rouge_l
from lora_gpt2.files import read_json, write_text
from lora_gpt2.gate import composed
from lora_gpt2.jobs import Job
from lora_gpt2.report import coverage, pictures
from lora_gpt2.report.entries import Entry, best_of, compare, entries_of, metrics_of, names_of, over_seeds
from lora_gpt2.reporting import sweep
from lora_gpt2.sweeps import SEARCH_FILE, planned
from lora_gpt2.weights.adapter import holds_adapter
from lora_gpt2.weights.analysis import analyse

_SHOWN = 5
"""So many of the best and of the worst predictions."""

_BETWEEN = 300.0
"""No job of a sweep may run for so many seconds before the sweep counts as over."""


def write(folder: Path, output: Path, baseline: Path | None = None, refresh: int | None = None) -> bool:
    """Writes the page; returns whether anything in `folder` is still running.

    `refresh`: seconds after which a browser loads the page again. Raises UserError for a folder without jobs,
    and for a baseline that was not scored on the same inputs.
    """
    listed = {_place(folder, name): job for name, job in jobs.jobs(folder).items()}
    names = names_of(folder, listed)
    entries = entries_of(folder, names)
    compared, apart = compare(entries, baseline)
    running = any(job.alive for job in listed.values()) or _between(folder, listed)
    text = _template().render(
        title=folder.resolve().name,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        refresh=refresh if running else None,
        jobs=[(place.name, names[place], *job.told()) for place, job in listed.items()],
        differences=_differences([job.settings for job in listed.values()]),
        entries=entries,
        metrics=metrics_of(entries),
        compared=compared,
        apart=apart,
        best=best_of(entries) if compared is not None and baseline is None else None,
        seeds=over_seeds(entries),
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


def _between(folder: Path, listed: Mapping[Path, Job]) -> bool:
    """Whether a sweep that has jobs to begin was at work a moment ago."""
    if (folder / jobs.STATUS_FILE).is_file():
        return False
    left = len(planned(folder)) > len(listed) or (folder / SEARCH_FILE).is_file()
    return left and time.time() - max(job.seen for job in listed.values()) < _BETWEEN


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html")


def _differences(of_each: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Settings that are not as they stand without any override: name, value or values, default.

    Those in which jobs differ come first.
    """
    usual = composed([]).decisive()
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
