import pytest

from lora_gpt2.report.coverage import by_slot, coverage, slots

CONTEXTS = [
    "name : Blue Spice | Type : pub | area : riverside | family friendly : yes",
    "name : Aromi | Type : coffee shop | area : city centre",
]


def test_slots_of_e2e_and_of_triples():
    assert slots(CONTEXTS[1]) == [("name", "Aromi"), ("Type", "coffee shop"), ("area", "city centre")]
    assert slots("Aarhus : leaderName : Jacob_B | Aarhus : area : 91.0") == [
        ("subject", "Aarhus"), ("leaderName", "Jacob_B"), ("area", "91.0"),
    ]  # fmt: skip
    assert slots("no slots at all") == []


@pytest.mark.parametrize(
    ("text", "missed", "added"),
    [
        ("Blue Spice is a riverside pub for families.", [], []),
        ("Blue Spice is a pub where kids are welcome.", [("area", "riverside")], []),
        ("Blue Spice, a family pub in the city centre.", [("area", "riverside")], [("area", "city centre")]),
        ("", slots(CONTEXTS[0]), []),
    ],
)  # fmt: skip
def test_what_is_missed_and_added(text, missed, added):
    found = coverage(CONTEXTS, [text, "Aromi is a coffee shop in the city centre."])
    assert (found[0].missed, found[0].added) == (missed, added)
    assert (found[1].missed, found[1].added) == ([], [])


def test_words_count_with_other_endings_numbers_and_underscores():
    (found,) = coverage(
        ["price range : moderate | rating : 5 out of 5 | leaderName : Jacob_Bundsgaard"],
        ["Moderately priced, rated five out of five, says Jacob Bundsgaard"],
    )
    assert found.missed == []


def test_slots_are_counted_the_most_missed_first():
    found = coverage(CONTEXTS, ["Blue Spice is a pub for kids.", "Aromi is a coffee shop."])
    assert next(iter(by_slot(found).items())) == ("area", (2, 2))
    assert by_slot(found)["name"] == (2, 0)
