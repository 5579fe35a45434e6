"""The built-in corpus: E2E's shape in two small invented worlds, made by a seeded grammar, no files.

``demo_base`` describes places to eat, for training a tiny base model; ``demo`` describes museums, for
adapting it. Much of their vocabulary is common, their slots and sentences are not.
"""

from functools import cache
from random import Random

from lora_gpt2.data.corpora.demo_grammar import Domain, Meaning, meaning, references
from lora_gpt2.data.corpora.demo_worlds import EATING, MUSEUMS
from lora_gpt2.data.jsonl import TextRow
from lora_gpt2.errors import UserError

DOMAINS: dict[str, Domain] = {"demo": MUSEUMS, "demo_base": EATING}
CONTEXTS = {
    "demo": {"train": 730, "valid": 80, "test": 80},
    "demo_base": {"train": 1740, "valid": 80, "test": 80},
}
"""Distinct meaning representations of each split; no two splits share one."""
REFERENCES = {"train": (2, 5), "valid": (3, 5), "test": (3, 5)}
"""Fewest and most texts of one meaning representation."""
SEED = 2106


@cache
def rows(domain: str, split: str) -> list[TextRow]:
    """The rows of ``demo`` or ``demo_base``: train, valid or test; the same at every call, on every machine.

    Texts of one context stand together. Raises UserError for another domain or split.
    """
    if domain not in DOMAINS or split not in CONTEXTS[domain]:
        raise UserError(f"{domain}, {split}", "is no domain and split of the demo", "see demo.CONTEXTS")
    world, random = DOMAINS[domain], Random(f"{SEED} {domain} {split}")
    found = []
    for slots in _meanings(domain)[split]:
        context = " | ".join(f"{slot} : {value}" for slot, value in slots.items())
        count = random.randint(*REFERENCES[split])
        found += [TextRow(context, text) for text in references(world, slots, count, random)]
    return found


@cache
def _meanings(domain: str) -> dict[str, list[Meaning]]:
    """Distinct meaning representations, dealt to the splits."""
    random, sizes = Random(f"{SEED} {domain}"), CONTEXTS[domain]
    distinct: dict[tuple[tuple[str, str], ...], Meaning] = {}
    while len(distinct) < sum(sizes.values()):
        slots = meaning(DOMAINS[domain], random)
        distinct.setdefault(tuple(slots.items()), slots)
    pool = iter(distinct.values())
    return {split: [next(pool) for _ in range(size)] for split, size in sizes.items()}
