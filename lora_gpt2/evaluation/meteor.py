"""METEOR 1.5 (Denkowski and Lavie 2014) through its official jar, spoken to over ``-stdio``.

The jar is a program of its own (LGPL) and comes with ``pip install "lora-gpt2[meteor]"``. Starting it takes
8 to 10 seconds, for its paraphrase table; a segment then takes less than a millisecond.
"""

import re
import subprocess
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread
from types import TracebackType

import numpy as np

from lora_gpt2.evaluation.java import HOW_TO_GET, METEOR_JAR, OPTIONS, find_jar, find_java
from lora_gpt2.evaluation.statistics import Array, Statistics


class MeteorUnavailable(RuntimeError):
    """METEOR cannot be computed here; the message is one sentence that says why and what to do."""


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Statistics:
    """The statistics of each segment, by one start of Java, and a corpus' score, 0 to 1, from their sums.

    Options as in the COCO tools: English, ``-norm`` (METEOR's own tokens and case). Raises MeteorUnavailable
    when Java or the jar is missing, or when it stops.
    """
    with _Meteor() as jar:
        told = [
            jar.ask("SCORE", *(_one_line(text) for text in group), _one_line(output))
            for output, group in zip(predictions, references, strict=True)
        ]
    found = np.array([[float(value) for value in line.split()] for line in told])
    output_length, reference_length, *_, chunks, output_matches, reference_matches = found.T
    perfect = (output_matches == output_length) & (reference_matches == reference_length) & (chunks == 1)
    found[perfect, _CHUNKS] = 0  # all words in one piece: no penalty
    return Statistics(found, _score)


_CHUNKS = 20
"""Column of the pieces that a match falls into."""
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
"""Weight of recall, shape and size of the penalty, weight of content words: METEOR 1.5's for English."""
_STAGES = np.array([1.0, 0.6, 0.8, 0.6])
"""Weights of exact words, stems, synonyms and paraphrases."""


def _score(sums: Array) -> Array:
    """Denkowski and Lavie 2014, section 2, of the jar's 23 columns (…, 23).

    Lengths of output and reference; how many of those are function words; then, for each of four kinds of
    match, content words of either side and function words of either side; pieces; words matched of either.
    """

    def weighed(content: Array, function: Array) -> Array:
        result: Array = _DELTA * content + (1 - _DELTA) * function
        return result

    length, functions = sums[..., 0:2], sums[..., 2:4]
    matches = sums[..., 4:_CHUNKS].reshape(*sums.shape[:-1], 4, 4)
    matched = (_STAGES[:, None] * weighed(matches[..., 0:2], matches[..., 2:4])).sum(axis=-2)
    whole = weighed(length - functions, functions)
    share = np.divide(matched, whole, out=np.zeros_like(matched), where=whole > 0)  # precision and recall
    some = share.min(axis=-1) > 0
    precision, recall = (np.where(some, share[..., side], 1.0) for side in (0, 1))
    mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
    pieces = sums[..., _CHUNKS] / np.where(some, sums[..., -2:].mean(axis=-1), 1.0)
    result: Array = np.where(some, mean * (1 - _GAMMA * pieces**_BETA), 0.0)
    return result


def _one_line(text: str) -> str:
    """Without the protocol's separator and line breaks, as COCO's wrapper sends the output."""
    return re.sub(r"[\r\n\v\f\x85\u2028\u2029]+", " ", text).replace("|||", "").replace("  ", " ")


class _Meteor:
    """The running jar: one line out, one line back. Left open by nobody: the context manager kills it."""

    def __init__(self) -> None:
        java, jar = find_java(), find_jar(METEOR_JAR)
        if not (java and jar):
            missing = "its jar" if java else "Java"
            raise MeteorUnavailable(f"METEOR needs {missing}, which is not here; {HOW_TO_GET}")
        command = [str(java), *OPTIONS, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace"
            )
        except OSError as error:
            raise MeteorUnavailable(f"METEOR's Java does not start ({error}); {HOW_TO_GET}") from None
        self.complaints: deque[str] = deque(maxlen=3)
        # A full pipe would stop the jar, so its messages are read as they come.
        self.reader = Thread(target=self.complaints.extend, args=(self.process.stderr or (),), daemon=True)
        self.reader.start()

    def __enter__(self) -> "_Meteor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(OSError):  # closing flushes what the dead process can no longer take
                if stream:
                    stream.close()

    def ask(self, *fields: str) -> str:
        """The jar's answer to one line of fields."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(" ||| ".join(fields) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._stopped() from None
        line = self.process.stdout.readline()
        if not line:
            raise self._stopped()
        return line.strip()

    def _stopped(self) -> MeteorUnavailable:
        self.process.kill()
        self.reader.join()
        last = " ".join("".join(self.complaints).split()) or "no message"
        return MeteorUnavailable(f"METEOR's Java program stopped ({last}); {HOW_TO_GET}, or try another Java")
