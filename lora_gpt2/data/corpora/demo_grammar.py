"""How a meaning representation becomes English: an opening sentence, then what it left unsaid."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

Meaning = dict[str, str]
"""Slot to value, in the domain's order of slots."""
Wording = Mapping[str, tuple[str, ...]]
"""Slot, or ``slot=value`` for one value's own words, to templates with ``{slot}`` in the value's place."""


@dataclass(frozen=True)
class Domain:
    """A small world: what can be said, and the words for it."""

    values: Mapping[str, tuple[str, ...]]
    """Every slot with its values; the first two are always given, the second is the noun."""
    openings: tuple[str, ...]
    """First sentences; ``{np}`` is the noun with words before and after it, the rest are slots."""
    before: Wording
    """Words before the noun."""
    after: Wording
    """Words after the noun."""
    verbs: Wording
    """What "it" does, for the sentences that follow."""
    clauses: Wording
    """Whole sentences that follow."""

    @property
    def noun(self) -> str:
        return list(self.values)[1]


def meaning(domain: Domain, random: Random) -> Meaning:
    """Draws values for the first two slots and for two to five of the others."""
    fixed, optional = list(domain.values)[:2], list(domain.values)[2:]
    chosen = {*fixed, *random.sample(optional, random.choice((2, 3, 3, 4, 4, 5)))}
    return {slot: random.choice(values) for slot, values in domain.values.items() if slot in chosen}


def references(domain: Domain, slots: Meaning, count: int, random: Random) -> list[str]:
    """`count` different texts, each of which says every slot once."""
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[_text(domain, slots, random)] = None
    return list(texts)


def _text(domain: Domain, slots: Meaning, random: Random) -> str:
    possible = [opening for opening in domain.openings if _slots(opening) <= slots.keys()]
    opening = random.choice(possible)
    unsaid = [slot for slot in slots if slot not in _slots(opening) and slot not in list(domain.values)[:2]]
    random.shuffle(unsaid)
    phrase = slots[domain.noun]
    if "{np}" in opening:
        phrase = f"a {_noun_phrase(domain, slots, unsaid, random)}"
    sentences = [opening.format(np=phrase, **slots), *_rest(domain, slots, unsaid, random)]
    return " ".join(_spelled(sentence) for sentence in sentences)


def _noun_phrase(domain: Domain, slots: Meaning, unsaid: list[str], random: Random) -> str:
    """The noun with at most one word before and two phrases after it; takes what it says out of `unsaid`."""
    parts = [slots[domain.noun]]
    for wording, most, in_front in ((domain.before, 1, True), (domain.after, 2, False)):
        sayable = [slot for slot in unsaid if _templates(wording, slot, slots)]
        for slot in sayable[: random.randint(0, most)]:
            words = random.choice(_templates(wording, slot, slots)).format(**slots)
            parts.insert(0 if in_front else len(parts), words)
            unsaid.remove(slot)
    return " ".join(parts)


def _rest(domain: Domain, slots: Meaning, unsaid: list[str], random: Random) -> list[str]:
    """Sentences for the unsaid slots, some with two of them."""
    sentences, waiting = [], list(unsaid)
    subjects = [f"the {slots[domain.noun]}", f"this {slots[domain.noun]}"]
    random.shuffle(subjects)
    while waiting:
        slot = waiting.pop(0)
        clauses, verbs = (_templates(wording, slot, slots) for wording in (domain.clauses, domain.verbs))
        if clauses and (not verbs or random.random() < 0.35):
            sentences.append(random.choice(clauses).format(**slots) + ".")
            continue
        subject = subjects.pop() if subjects and random.random() < 0.4 else "it"
        sentence = f"{subject} {random.choice(verbs).format(**slots)}"
        partner = next((other for other in waiting if _templates(domain.verbs, other, slots)), None)
        if partner is not None and random.random() < 0.55:
            waiting.remove(partner)
            sentence += f" and {random.choice(_templates(domain.verbs, partner, slots)).format(**slots)}"
        sentences.append(sentence + ".")
    return sentences


def _templates(wording: Wording, slot: str, slots: Meaning) -> tuple[str, ...]:
    """The words for the slot's value: its own, else those of any value."""
    return wording.get(f"{slot}={slots[slot]}", wording.get(slot, ()))


def _slots(template: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", template)) - {"np"}


def _spelled(sentence: str) -> str:
    """With the article that the next word asks for, and a capital letter in front."""
    sentence = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", sentence)
    return sentence[0].upper() + sentence[1:]
