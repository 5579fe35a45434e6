import pytest

from lora_gpt2.evaluation import ptb

SAMPLES = {
    "The Mill's a family-friendly pub.": "the mill 's a family-friendly pub",
    "It isn't cheap: £20-25 (about €30)!": "it is n't cheap # 20-25 -lrb- about $ 30 -rrb-",
    "You cannot say 'no' - \"never\"...": "you can not say no never",
    "Food and/or wine at 3.50, 10,000 reviews": "food and/or wine at 3.50 10,000 reviews",
    "A low-priced café \u2013 \u201cgreat\u201d; 5 out of 5?": "a low-priced café great 5 out of 5",
    "They'll serve hors d'oeuvre; we've been": "they 'll serve hors d'oeuvre we 've been",
    "In the U.S. or the city center., near it": "in the u.s. or the city center. near it",
    "family - friendly , near the river .": "family friendly near the river",
    "": "",
    " . ": "",
}
BREAKS = ["a\nb", "a\r\nb", "a\u2028b", "a\vb", "a\fb", "", "end"]


def test_the_regular_expression_gives_the_recorded_stanford_tokens():
    assert ptb.tokenise(list(SAMPLES), "regex") == (list(SAMPLES.values()), ptb.REGEX)


def test_the_jar_gives_the_recorded_stanford_tokens():
    assert ptb.tokenise(list(SAMPLES), "jar") == (list(SAMPLES.values()), ptb.STANFORD)


def test_line_breaks_inside_texts_do_not_shift_the_others():
    assert ptb.tokenise(BREAKS, "auto").texts == ["a b", "a b", "a b", "a b", "a b", "", "end"]


def test_without_java_auto_says_that_the_regular_expression_was_used(monkeypatch):
    monkeypatch.setattr(ptb, "find_java", lambda: None)
    assert ptb.tokenise(["A pub."]) == (["a pub"], ptb.REGEX)
    with pytest.raises(ptb.StanfordUnavailable, match=r"lora-gpt2\[meteor\]"):
        ptb.tokenise(["A pub."], "jar")


@pytest.mark.parametrize("script", ["exit 1", "cat > /dev/null; echo one; echo two"])
def test_a_java_that_fails_is_not_trusted(monkeypatch, tmp_path, script):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setattr(ptb, "find_java", lambda: java)
    monkeypatch.setattr(ptb, "find_jar", lambda name: java)
    assert ptb.tokenise(["A pub."]).tokeniser == ptb.REGEX
    with pytest.raises(ptb.StanfordUnavailable, match="lines for 1 texts"):
        ptb.tokenise(["A pub."], "jar")
