"""Every score of a corpus, by the conventions of the E2E and of the WebNLG and DART scorers.

    E2E            BLEU  NIST  METEOR  ROUGE-L  CIDEr     e2e-metrics, ``measure_scores.py -p``
    WebNLG, DART   BLEU  METEOR  TER  chrF++              WebNLG's GenerationEval

A score that cannot be computed here is None, with one sentence on how to get it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lora_gpt2.errors import UserError
from lora_gpt2.evaluation.meteor import MeteorUnavailable, meteor
from lora_gpt2.evaluation.ngrams import bleu_and_nist
from lora_gpt2.evaluation.ptb import tokenise
from lora_gpt2.evaluation.rouge_cider import cider, rouge_l
from lora_gpt2.evaluation.ter import ter

References = Sequence[Sequence[str]]
Convention = Literal["tokenised", "plain"]

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
    bleu, nist = bleu_and_nist(predictions, references)
    flat, tokeniser = tokenise([*predictions, *(text for group in references for text in group)])
    in_order = iter(flat)
    outputs = [next(in_order) for _ in predictions]
    texts = [[next(in_order) for _ in group] for group in references]
    return [
        Score("bleu", bleu, f"bleu-4|0..1|13a|lower|{convention}", _mismatch(predictions, convention)),
        Score("nist", nist, f"nist-5|bits|13a|lower|{convention}"),
        _meteor(outputs, texts, [range(len(outputs))], tokeniser)[0],
        Score("rouge_l", fmean(rouge_l(outputs, texts)), f"rouge-l|0..1|beta:1.2|{tokeniser}"),
        Score("cider", fmean(cider(outputs, texts)), f"cider-d|0..10|sigma:6|{tokeniser}"),
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
            _sacrebleu("bleu", BLEU(tokenize="13a", smooth_method="none", force=True), ours, theirs),
            meteor_score,
            Score(
                "ter",
                fmean(rates[i] for i in segments),
                "ter|edits per reference word|pyter|best reference|words|lower",
            ),
            _sacrebleu("chrf", CHRF(word_order=2), ours, theirs),
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


def _meteor(
    outputs: Sequence[str], texts: References, parts: Sequence[Sequence[int]], tokens: str
) -> list[Score]:
    signature = f"meteor-1.5|0..1|-l en -norm|{tokens}"
    try:
        return [Score("meteor", value, signature) for value in meteor(outputs, texts, parts)]
    except MeteorUnavailable as reason:
        return [Score("meteor", None, signature, str(reason))] * len(parts)


def _sacrebleu(name: str, metric: BLEU | CHRF, outputs: Sequence[str], texts: References) -> Score:
    """sacrebleu wants all segments' first references, then the second ones: missing ones repeat the first."""
    most = max(map(len, texts))
    streams = [[group[i] if i < len(group) else group[0] for group in texts] for i in range(most)]
    value = metric.corpus_score(outputs, streams).score
    return Score(name, value, f"{name}|percent|words|lower|{metric.get_signature()}")
