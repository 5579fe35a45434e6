"""Every score of a corpus, by the conventions of the E2E and of the WebNLG and DART scorers.

    E2E            BLEU  NIST  METEOR  ROUGE-L  CIDEr     e2e-metrics, ``measure_scores.py -p``
    WebNLG, DART   BLEU  METEOR  TER  chrF++              WebNLG's GenerationEval

A score that cannot be computed here is None, with one sentence on how to get it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lora_gpt2.errors import UserError
from lora_gpt2.evaluation.meteor import MeteorUnavailable, meteor
from lora_gpt2.evaluation.ngrams import bleu as bleu_of
from lora_gpt2.evaluation.ngrams import ngram_statistics
from lora_gpt2.evaluation.ngrams import nist as nist_of
from lora_gpt2.evaluation.ptb import tokenise
from lora_gpt2.evaluation.rouge_cider import cider, rouge_l
from lora_gpt2.evaluation.statistics import Array, Statistics, mean
from lora_gpt2.evaluation.ter import ter

References = Sequence[Sequence[str]]
Convention = Literal["tokenised", "plain"]

WEBNLG_CORPORA = "webnlg", "dart"
"""The corpora that are scored as WebNLG's scripts do."""

MEANING: dict[Convention, str] = {
    "plain": "The references are plain text, as in the official scorer's published figures.",
    "tokenised": "The references are tokenised text, as in the LoRA paper; on E2E this lifts BLEU by about "
    "one point over the official plain references.",
}


@dataclass(frozen=True)
class Score:
    name: str
    value: float | None
    signature: str
    """How it was computed and in which unit, enough to compute it again."""
    note: str = ""
    """What the reader must know: how to get a missing score, or a doubt about this one."""


def score_e2e(predictions: Sequence[str], references: References) -> list[Score]:
    """bleu, nist, meteor, rouge_l and cider, in this order; bleu, meteor and rouge_l from 0 to 1.

    Raises UserError when the counts differ or a segment has no reference.
    """
    _check(predictions, references)
    convention = reference_convention(references)
    ngrams = ngram_statistics(predictions, references).sum(axis=0)
    outputs, texts, tokeniser = _tokenised(predictions, references)
    bleu = f"bleu-4|0..1|13a|lower|{convention}"
    return [
        Score("bleu", float(bleu_of(ngrams)), bleu, _mismatch(predictions, convention)),
        Score("nist", float(nist_of(ngrams)), f"nist-5|bits|13a|lower|{convention}"),
        _meteor(outputs, texts, [range(len(outputs))], tokeniser)[0],
        Score("rouge_l", fmean(rouge_l(outputs, texts)), f"rouge-l|0..1|beta:1.2|{tokeniser}"),
        Score("cider", fmean(cider(outputs, texts)), f"cider-d|0..10|sigma:6|{tokeniser}"),
    ]


def e2e_statistics(systems: Sequence[Sequence[str]], references: References) -> list[dict[str, Statistics]]:
    """The statistics behind `score_e2e` of each of several systems; METEOR's where it can be computed.

    Raises UserError as `score_e2e` does.
    """
    for predictions in systems:
        _check(predictions, references)
    tokenised = [_tokenised(predictions, references)[:2] for predictions in systems]
    found = []
    for predictions, (outputs, texts), meteors in zip(systems, tokenised, _meteors(tokenised), strict=True):
        ngrams = ngram_statistics(predictions, references)
        of_ngrams = {"bleu": Statistics(ngrams, bleu_of), "nist": Statistics(ngrams, nist_of)}
        means = {"rouge_l": mean(rouge_l(outputs, texts)), "cider": mean(cider(outputs, texts))}
        found.append({**of_ngrams, **meteors, **means})
    return found


def webnlg_statistics(
    systems: Sequence[Sequence[str]], references: References
) -> list[dict[str, Statistics]]:
    """As `e2e_statistics`, behind `score_webnlg`."""
    for predictions in systems:
        _check(predictions, references)
    texts = [[split_words(text) for text in group] for group in references]
    split = [([split_words(text) for text in predictions], texts) for predictions in systems]
    return [
        {
            "bleu": _summed(_bleu(), outputs, texts),
            **meteors,
            "ter": mean(ter(outputs, texts)),
            "chrf": _summed(_chrf(), outputs, texts),
        }
        for (outputs, _), meteors in zip(split, _meteors(split), strict=True)
    ]


def score_webnlg(predictions: Sequence[str], references: References) -> list[Score]:
    """bleu in percent, meteor from 0 to 1, ter in edits per reference word (less is better), chrf (chrF++) in
    percent.

    Raises UserError when the counts differ or a segment has no reference.
    """
    return score_by_part(predictions, references, ["all"] * len(predictions))["all"]


def score_by_part(
    predictions: Sequence[str], references: References, parts: Sequence[str]
) -> dict[str, list[Score]]:
    """WebNLG's scores over "all" segments and apart over each name in `parts`, one name a segment.

    WebNLG names them "seen" and "unseen", by category. Raises UserError as `score_webnlg` does.
    """
    _check(predictions, references)
    if len(parts) != len(predictions):
        found = f"{len(parts)} names of parts for {len(predictions)} predictions"
        raise UserError("scoring", found, "name each segment's part")
    members = {"all": list(range(len(parts)))}
    for name in sorted(set(parts) - {"all"}):
        members[name] = [segment for segment, part in enumerate(parts) if part == name]

    outputs = [split_words(text) for text in predictions]
    texts = [[split_words(text) for text in group] for group in references]
    rates = ter(outputs, texts)
    meteors = _meteor(outputs, texts, list(members.values()), "words|lower")
    scores = {}
    for (name, segments), meteor_score in zip(members.items(), meteors, strict=True):
        ours, theirs = [outputs[i] for i in segments], [texts[i] for i in segments]
        scores[name] = [
            _sacrebleu("bleu", _bleu(), ours, theirs),
            meteor_score,
            Score(
                "ter",
                fmean(rates[i] for i in segments),
                "ter|edits per reference word|pyter|best reference|words|lower",
            ),
            _sacrebleu("chrf", _chrf(), ours, theirs),
        ]
    return scores


def split_words(text: str) -> str:
    """Lower-cased, characters other than letters, digits and _ set apart: the paper's WebNLG, DART text."""
    return " ".join(" ".join(re.split(r"(\W)", text.lower())).split())


def reference_convention(references: References) -> Convention:
    """Says "tokenised" when most full stops at the texts' ends follow a space ("food ."), else "plain"."""
    return _convention([text for group in references for text in group])


def scores_as_dict(scores: Sequence[Score], references: References | None = None) -> dict[str, Any]:
    """For scores.json: a number (or None) under each name, then "signatures" and the non-empty "notes".

    With the references also "convention", and its meaning among the notes.
    """
    notes = {score.name: score.note for score in scores if score.note}
    report: dict[str, Any] = {score.name: score.value for score in scores}
    if references is not None:
        report["convention"] = reference_convention(references)
        notes["convention"] = MEANING[report["convention"]]
    return {**report, "signatures": {score.name: score.signature for score in scores}, "notes": notes}


def figures(scores: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a scores.json that have a value, of all segments."""
    whole = scores if "signatures" in scores else scores.get("all", {})
    return {name: whole[name] for name in whole.get("signatures", {}) if whole[name] is not None}


def _check(predictions: Sequence[str], references: References) -> None:
    if len(predictions) != len(references) or not predictions:
        found = f"{len(predictions)} predictions for {len(references)} segments of references"
        raise UserError("scoring", found, "give one prediction a segment, and at least one segment")
    for number, group in enumerate(references, start=1):
        if not group:
            raise UserError(f"scoring, segment {number}", "has no reference", "give each segment one or more")


def _convention(texts: Sequence[str]) -> Convention:
    ends = [text[-2:-1].isspace() for text in map(str.rstrip, texts) if text.endswith((".", "!", "?"))]
    return "tokenised" if 2 * sum(ends) > len(ends) else "plain"


def _mismatch(predictions: Sequence[str], convention: Convention) -> str:
    """A doubt, when only one side is tokenised: that costs up to three points of BLEU."""
    if any(text.rstrip().endswith((".", "!", "?")) for text in predictions):
        ours = _convention(predictions)
        if ours != convention:
            return f"the predictions are {ours} text and the references {convention}; give both in one form"
    return ""


def _tokenised(predictions: Sequence[str], references: References) -> tuple[list[str], list[list[str]], str]:
    """Both as the COCO tools see them, and by what they were tokenised."""
    flat, tokeniser = tokenise([*predictions, *(text for group in references for text in group)])
    in_order = iter(flat)
    outputs = [next(in_order) for _ in predictions]
    return outputs, [[next(in_order) for _ in group] for group in references], tokeniser


def _meteor(
    outputs: Sequence[str], texts: References, parts: Sequence[Sequence[int]], tokens: str
) -> list[Score]:
    signature = f"meteor-1.5|0..1|-l en -norm|{tokens}"
    try:
        found = meteor(outputs, texts)
    except MeteorUnavailable as reason:
        return [Score("meteor", None, signature, str(reason))] * len(parts)
    return [Score("meteor", found.of(segments), signature) for segments in parts]


def _meteors(systems: Sequence[tuple[Sequence[str], References]]) -> Iterator[dict[str, Statistics]]:
    """Each system's, by one start of Java; nothing where METEOR cannot be computed."""
    outputs = [text for one, _ in systems for text in one]
    texts = [group for _, groups in systems for group in groups]
    try:
        found = meteor(outputs, texts)
    except MeteorUnavailable:
        yield from ({} for _ in systems)
        return
    for segments in np.split(found.segments, len(systems)):
        yield {"meteor": Statistics(segments, found.score)}


def _bleu() -> BLEU:
    return BLEU(tokenize="13a", smooth_method="none", force=True)


def _chrf() -> CHRF:
    return CHRF(word_order=2)


def _sacrebleu(name: str, metric: BLEU | CHRF, outputs: Sequence[str], texts: References) -> Score:
    value = metric.corpus_score(outputs, _streams(texts)).score
    return Score(name, value, f"{name}|percent|words|lower|{metric.get_signature()}")


def _summed(metric: BLEU | CHRF, outputs: Sequence[str], texts: References) -> Statistics:
    """sacrebleu's own statistics, which its bootstrap adds up too."""

    def score(sums: Array) -> Array:
        each: list[Any] = sums.reshape(-1, sums.shape[-1]).tolist()
        return np.array([metric._compute_score_from_stats(one).score for one in each]).reshape(
            sums.shape[:-1]
        )

    segments = metric._extract_corpus_statistics(outputs, _streams(texts))
    return Statistics(np.array(segments, dtype=np.float64), score)


def _streams(texts: References) -> list[list[str]]:
    """sacrebleu wants all segments' first references, then the second ones: missing ones repeat the first."""
    most = max(map(len, texts))
    return [[group[i] if i < len(group) else group[0] for group in texts] for i in range(most)]
