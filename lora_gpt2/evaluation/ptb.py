"""Penn Treebank tokens, lower-cased and without punctuation, for ROUGE-L, CIDEr and METEOR of E2E.

The official scorer runs Stanford's tokeniser (CoreNLP 3.4.1, Java). Without it, a regular expression does
the same on all 5,323 texts of the E2E test set and its example outputs, and on all but 5 of the 42,061
texts of the training set.
"""

import re
import subprocess
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lora_gpt2.evaluation.java import HOW_TO_GET, OPTIONS, PTB_JAR, find_jar, find_java

STANFORD = "stanford-ptb-3.4.1"
REGEX = "regex-ptb"

_LINE_BREAK = re.compile(r"[\n\r\v\f\u2028\u2029]")
_BRACKETS = ("-LRB-", "-RRB-", "-LCB-", "-RCB-")
_REMOVED = frozenset((*_BRACKETS, "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""COCO's list. Brackets are lower-cased before it is applied, so ``-lrb-`` stays in the official scores."""


class StanfordUnavailable(RuntimeError):
    """Stanford's tokeniser cannot run here; the message says why."""


class Tokenised(NamedTuple):
    texts: list[str]
    """One a text, tokens joined by single spaces."""
    tokeniser: str
    """STANFORD or REGEX, whichever made them."""


def tokenise(texts: Sequence[str], how: Literal["auto", "jar", "regex"] = "auto") -> Tokenised:
    """`auto` takes Stanford's tokeniser where Java and the jar are there and work.

    Raises StanfordUnavailable when `how` is "jar" and they are not.
    """
    if how != "regex":
        try:
            return Tokenised([_without_punctuation(line.split(" ")) for line in _stanford(texts)], STANFORD)
        except StanfordUnavailable:
            if how == "jar":
                raise
    return Tokenised([_without_punctuation(_regex_tokens(text)) for text in texts], REGEX)


def _stanford(texts: Sequence[str]) -> list[str]:
    """The tokeniser's own lines, one a text, through standard input and output: no temporary file."""
    java, jar = find_java(), find_jar(PTB_JAR)
    if not (java and jar):
        raise StanfordUnavailable(f"the PTB tokeniser needs Java and pycocoevalcap's jar; {HOW_TO_GET}")
    main = "edu.stanford.nlp.process.PTBTokenizer"
    command = [str(java), *OPTIONS, "-cp", str(jar), main, "-preserveLines", "-lowerCase"]
    lines = "".join(f"{_LINE_BREAK.sub(' ', text)}\n" for text in texts).encode(errors="replace")
    try:
        done = subprocess.run(command, input=lines, capture_output=True, check=False)
    except OSError as error:
        raise StanfordUnavailable(f"Java does not start ({error}); {HOW_TO_GET}") from None
    answer = [line.rstrip() for line in done.stdout.decode(errors="replace").split("\n")[:-1]]
    if done.returncode or len(answer) != len(texts):
        last = " ".join(done.stderr.decode(errors="replace").split()[-20:])
        raise StanfordUnavailable(
            f"the PTB tokeniser gave {len(answer)} lines for {len(texts)} texts ({last})"
        )
    return answer


def _without_punctuation(tokens: Sequence[str]) -> str:
    return " ".join(token for token in tokens if token not in _REMOVED)


_REWRITTEN = str.maketrans(
    {
        **{"£": "#", "€": "$", "\u2018": "`", "\u2019": "'", "\u201c": " `` ", "\u201d": " '' ", '"': " '' "},
        **{"\u2013": "--", "\u2014": "--", "\u2026": "..."},  # both dashes and the ellipsis
        **{"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "},
    }
)
"""Stanford's spellings: one pound sign for all, one currency sign for the others, ASCII quotes and dashes."""

_TOKEN = re.compile(
    r"""
      -[lr][scr]b-                           # a bracket
    | can(?=not\b) | gon(?=na\b) | wan(?=na\b) | got(?=ta\b)
    | [^\W\d_]+?(?=n't\b) | n't\b            # do n't
    | '(?:s|re|ve|ll|d|m)\b                  # it 's
    | (?:[a-z]\.){2,} | (?:mr|mrs|ms|dr|st|jr|rd|ave)\.
    | [^\W\d_]+\.(?=,)                       # a full stop before a comma reads as an abbreviation
    | (?:d|o|l)'[^\W\d_]{2,}                 # hors d'oeuvre
    | -?\d+(?:[.,:]\d+)+(?:-\w+)* | -\d+ | \d/\d  # 10,000
    | \w+(?:[-&]\w+(?!'t)|/[a-z]\w*)*        # family-friendly, and/or
    | \.\.\. | -- | `` | '' | \S
    """,
    re.VERBOSE,
)


def _regex_tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower().translate(_REWRITTEN))
