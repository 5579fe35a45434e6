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

from lora_gpt2.evaluation.java import HOW_TO_GET, METEOR_JAR, OPTIONS, find_jar, find_java


class MeteorUnavailable(RuntimeError):
    """METEOR cannot be computed here; the message is one sentence that says why and what to do."""


def meteor(
    predictions: Sequence[str], references: Sequence[Sequence[str]], parts: Sequence[Sequence[int]]
) -> list[float]:
    """The corpus score, 0 to 1, of each part, a list of segment numbers; all parts with one start of Java.

    Options as in the COCO tools: English, ``-norm`` (METEOR's own tokens and case). Raises MeteorUnavailable
    when Java or the jar is missing, or when it stops.
    """
    with _Meteor() as jar:
        statistics = [
            jar.ask("SCORE", *(_one_line(text) for text in group), _one_line(output))
            for output, group in zip(predictions, references, strict=True)
        ]
        return [jar.evaluate([statistics[segment] for segment in part]) for part in parts]


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
        """The jar's first line of answer to one line of fields."""
        assert self.process.stdin
        try:
            self.process.stdin.write(" ||| ".join(fields) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._stopped() from None
        return self._answer()

    def evaluate(self, statistics: Sequence[str]) -> float:
        """The corpus score of these segments: the last line after one line for each of them."""
        lines = [self.ask("EVAL", *statistics), *(self._answer() for _ in statistics)]
        return float(lines[-1])

    def _answer(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise self._stopped()
        return line.strip()

    def _stopped(self) -> MeteorUnavailable:
        self.process.kill()
        self.reader.join()
        last = " ".join("".join(self.complaints).split()) or "no message"
        return MeteorUnavailable(f"METEOR's Java program stopped ({last}); {HOW_TO_GET}, or try another Java")
