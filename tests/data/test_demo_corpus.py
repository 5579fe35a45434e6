import re
from itertools import groupby

import pytest

from lora_gpt2.data.corpora import demo
from lora_gpt2.data.corpora.demo_grammar import Domain
from lora_gpt2.errors import UserError

SPLITS = ("train", "valid", "test")
EVERY = [(domain, split) for domain in demo.DOMAINS for split in SPLITS]


def contexts(domain: str, split: str) -> list[str]:
    return list(dict.fromkeys(row.context for row in demo.rows(domain, split)))


def slots(context: str) -> dict[str, str]:
    return dict(pair.split(" : ") for pair in context.split(" | "))


@pytest.mark.parametrize(("domain", "split"), EVERY)
def test_rows_are_the_same_at_every_call(domain, split):
    first = list(demo.rows(domain, split))
    demo.rows.cache_clear()
    demo._meanings.cache_clear()
    assert demo.rows(domain, split) == first


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_no_two_splits_share_a_context(domain):
    every = [context for split in SPLITS for context in contexts(domain, split)]
    assert len(every) == len(set(every)) == sum(demo.CONTEXTS[domain].values())


def test_the_sizes_are_those_of_a_corpus():
    assert len(demo.rows("demo_base", "train")) > 6000
    assert len(demo.rows("demo", "train")) > 2500
    for domain in demo.DOMAINS:
        assert [len(contexts(domain, split)) for split in ("valid", "test")] == [80, 80]


@pytest.mark.parametrize(("domain", "split"), EVERY)
def test_references_of_a_context_stand_together_and_differ(domain, split):
    fewest, most = demo.REFERENCES[split]
    groups = [list(group) for _, group in groupby(demo.rows(domain, split), key=lambda row: row.context)]
    assert len(groups) == len(contexts(domain, split))
    for group in groups:
        assert fewest <= len(group) <= most
        assert len({row.completion for row in group}) == len(group)


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_every_test_value_was_seen_in_training_but_for_those_to_copy(domain):
    values = {
        split: {pair for context in contexts(domain, split) for pair in slots(context).items()}
        for split in ("train", "test")
    }
    unseen = {slot for slot, _ in values["test"] - values["train"]}
    assert unseen <= {"name", "shows", "decoration"}


def test_the_two_worlds_share_no_name():
    names = [set(demo.DOMAINS[domain].values["name"]) for domain in ("demo", "demo_base")]
    assert not names[0] & names[1]


def said(domain: Domain, slot: str, value: str) -> set[str]:
    """The ways in which a value may show in a text: itself, or words of its own."""
    wordings = (domain.before, domain.after, domain.verbs, domain.clauses)
    own = {template for wording in wordings for template in wording.get(f"{slot}={value}", ())}
    return {template.format(**{slot: value}).lower() for template in own} | {value.lower()}


@pytest.mark.parametrize(("domain", "split"), EVERY)
def test_every_reference_says_every_value(domain, split):
    world = demo.DOMAINS[domain]
    for row in demo.rows(domain, split):
        text = row.completion.lower()
        for slot, value in slots(row.context).items():
            if slot != world.noun:  # "Visit Maple Hall to see old clocks" needs no noun
                assert any(words in text for words in said(world, slot, value)), (row, slot)


@pytest.mark.parametrize(("domain", "split"), EVERY)
def test_references_are_well_formed_sentences(domain, split):
    for row in demo.rows(domain, split):
        assert not re.search(r"[{}]|  | [.,]|\.\.", row.completion), row
        assert all(re.fullmatch(r"[A-Z].*", sentence) for sentence in row.completion.split(". ")), row
        assert row.completion.endswith(".")
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiouAEIOU]", row.completion), row


def test_every_template_is_used():
    for name, world in demo.DOMAINS.items():
        texts = "\n".join(row.completion for row in demo.rows(name, "train")).lower()
        wordings = (world.before, world.after, world.verbs, world.clauses)
        for template in [t for wording in wordings for ts in wording.values() for t in ts]:
            pattern = re.sub(r"\\{\w+\\}", ".+", re.escape(template.lower()).replace("a\\ ", "an?\\ "))
            assert re.search(pattern, texts), template


def test_the_two_worlds_share_words_but_not_slots():
    worlds = [demo.DOMAINS[domain] for domain in ("demo", "demo_base")]
    assert set(worlds[0].values) & set(worlds[1].values) == {"name", "area"}
    words = [
        set(re.findall(r"\w+", " ".join(row.completion for row in demo.rows(domain, "train")).lower()))
        for domain in ("demo", "demo_base")
    ]
    assert len(words[0] & words[1]) > 0.5 * len(words[0])


@pytest.mark.parametrize(("domain", "split"), [("demos", "train"), ("demo", "dev")])
def test_another_domain_or_split_is_refused(domain, split):
    with pytest.raises(UserError, match="is no domain and split of the demo"):
        demo.rows(domain, split)
