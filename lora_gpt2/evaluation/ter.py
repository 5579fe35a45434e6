"""Translation edit rate as the WebNLG scripts measure it: pyter's rule, the best reference of each segment.

Snover et al. 2006 define the rate; sacrebleu's and torchmetrics' implementations shift phrases by other rules
and give other numbers. The values here are pyter's to the last bit, at about a tenth of its time: the edit
distance runs on bits (Myers 1999, Hyyrö 2003) and continues from the words that a shift leaves in place.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Words = list[str]


def ter(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Edits per reference word, 0 (equal) up, of each segment: the least over its references.

    Takes tokenised texts, tokens separated by spaces. Against a reference without words the rate is 0 for an
    output without words and 1 for any other (pyter divides by zero).
    """
    return [_best(output.split(), group) for output, group in zip(predictions, references, strict=True)]


def _best(output: Words, group: Sequence[str]) -> float:
    """Tries the likeliest reference first and skips those that cannot win: the value stays the same."""
    best = float("inf")
    texts = [reference.split() for reference in group]
    for bound, text in sorted((_lower_bound(output, text), text) for text in texts):
        if bound >= best:
            break
        best = min(best, edit_rate(output, text) if text and output != text else bound)
    return best


def _lower_bound(output: Words, text: Words) -> float:
    """Shifts move words but make none: every word that the two do not share costs an edit."""
    if not text:
        return float(bool(output))
    shared = (Counter(output) & Counter(text)).total()
    return (max(len(output), len(text)) - shared) / len(text)


def edit_rate(output: Words, text: Words) -> float:
    """Shifts and word edits from `output` to the non-empty `text`, per word of `text`.

    Greedy: while some shift of a common phrase lessens the edit distance, the one that lessens it most is
    made; of equal ones, pyter takes the result that sorts last.
    """
    distance = _EditDistance(text)
    columns = distance.columns(output)
    shifts = 0
    while True:
        candidates = (
            (-distance.columns(shifted, columns[: kept + 1])[-1].distance, shifted)
            for shifted, kept in _shifted(output, text)
        )
        negated, shifted = max(candidates, default=(-columns[-1].distance, output))
        if -negated >= columns[-1].distance:
            return (shifts + columns[-1].distance) / len(text)
        output, columns = shifted, distance.columns(shifted)
        shifts += 1


def _shifted(output: Words, text: Words) -> Iterator[tuple[Words, int]]:
    """Every output with one phrase moved to its equal's place in `text`, and how many words stay ahead."""
    for start, word in enumerate(output):
        for place, other in enumerate(text):
            if start == place or word != other:
                continue
            length = 1
            while (
                output[start + length : start + length + 1] == text[place + length : place + length + 1] != []
            ):
                length += 1
            phrase, rest = output[start : start + length], output[:start] + output[start + length :]
            yield rest[:place] + phrase + rest[place:], min(start, place)


class _Column(NamedTuple):
    """A column of the table of edit distances; bit i is the step from its row i to row i + 1."""

    up: int
    """Bits of the steps of +1."""
    down: int
    """Bits of the steps of -1."""
    distance: int
    """The last row: from the words so far to the whole text."""


class _EditDistance:
    """Levenshtein's distance from lists of words to one text, a column of the table per word."""

    def __init__(self, text: Words) -> None:
        self.places: dict[str, int] = {}
        for place, word in enumerate(text):
            self.places[word] = self.places.get(word, 0) | 1 << place
        self.all, self.last = (1 << len(text)) - 1, 1 << len(text) - 1
        self.first = _Column(self.all, 0, len(text))

    def columns(self, words: Words, known: Sequence[_Column] = ()) -> list[_Column]:
        """The first column and one per word; `known` are those already computed, for the same first words."""
        columns = list(known) or [self.first]
        up, down, distance = columns[-1]
        for word in words[len(columns) - 1 :]:
            equal = self.places.get(word, 0)
            diagonal = ((equal & up) + up ^ up) | equal | down  # where the diagonal step is free
            right_up = down | self.all & ~(diagonal | up)
            right_down = diagonal & up
            distance += bool(right_up & self.last) - bool(right_down & self.last)
            right_up = (right_up << 1 | 1) & self.all
            up = right_down << 1 & self.all | self.all & ~(diagonal | right_up)
            down = right_up & diagonal
            columns.append(_Column(up, down, distance))
        return columns
