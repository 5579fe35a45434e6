"""The two worlds of the demo: places to eat (for the base model) and museums (for the adapter)."""

from lora_gpt2.data.corpora.demo_grammar import Domain

# Lists of words read better in rows.
# fmt: off
AREAS = ("old town", "city centre", "harbour district", "north end", "garden quarter", "market district")
LANDMARKS = (
    "the clock tower", "the map shop", "the toy shop", "the boat house", "the stone bridge",
    "the glass market", "the piano school", "the railway station", "the copper fountain",
    "the painted gate", "the art college",
)
HOURS = ("in the morning", "in the afternoon", "at weekends", "every day", "from 9 to 5")
VISITORS = ("families", "students", "children", "art lovers")
# fmt: on


def _in_turn(first: str, second: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All pairs of a word of each list, dealt in turn to two tuples that share every word but no pair."""
    pairs = [(i + j, f"{a} {b}") for i, a in enumerate(first.split()) for j, b in enumerate(second.split())]
    return tuple(pair for turn, pair in pairs if turn % 2), tuple(
        pair for turn, pair in pairs if not turn % 2
    )


# Names and exhibits are too many to learn by heart: a model has to copy them, and can in the other world too.
_PLACES, _SIGHTS = _in_turn(
    "Paper Silver Blue Green Old Red Quiet Golden Copper Painted White Stone Little Glass North Wooden",
    "Boat Spoon Kettle Corner Clock Table Door Harbour Map Lantern Garden Piano Star Pear River Fox "
    "Heron Coin Station Maple Tower House Hall Rooms",
)
_DECORATION, _EXHIBITS = _in_turn(
    "old rare wooden paper glass painted copper stone Greek French Japanese Indian",
    "clocks maps toys boats plates pianos coins paintings lanterns pots lamps books",
)

EATING = Domain(
    values={
        "name": tuple(f"The {place}" for place in _PLACES),
        "type": ("restaurant", "café", "tea room", "bistro", "wine bar", "pub"),
        "food": ("Italian", "Indian", "Greek", "Mexican", "Japanese", "French", "vegetarian", "English"),
        "price": ("low", "moderate", "high", "10 euros", "20 euros", "30 euros"),
        "area": AREAS,
        "rating": ("1 out of 5", "2 out of 5", "3 out of 5", "4 out of 5", "5 out of 5"),
        "children": ("welcome", "not welcome"),
        "guests": VISITORS,
        "serving": HOURS,
        "decoration": _DECORATION,
        "near": LANDMARKS,
    },
    openings=(
        "{name} is {np}.",
        "{name} is {np}.",
        "there is a {type} called {name}.",
        "in the {area}, there is a {type} called {name}.",
        "in the {area} you will find {name}, {np}.",
        "near {near}, {name} is {np}.",
        "close to {near} there is a {type} named {name}.",
        "{name} is {np} where children are {children}.",
        "{name} serves {food} food and is {np}.",
        "{name}, {np}, serves {food} food.",
        "for {food} food, try {name}, {np}.",
        "if you like {food} food, go to {name}, {np}.",
        "{name}, {np}, is rated {rating}.",
        "{name}, {np}, has {decoration} on its walls.",
        "{guests} like {name}, {np}.",
    ),
    before={
        "price=low": ("cheap", "low-priced"),
        "price=moderate": ("mid-priced", "moderately priced"),
        "price=high": ("expensive", "high-priced"),
        "food": ("{food}",),
        "children=welcome": ("family-friendly", "child-friendly"),
    },
    after={
        "area": ("in the {area}", "located in the {area}"),
        "near": ("near {near}", "close to {near}", "not far from {near}"),
        "food": ("serving {food} food", "that serves {food} food"),
        "rating": ("with a rating of {rating}", "rated {rating}"),
        "decoration": ("decorated with {decoration}", "with {decoration} on its walls"),
        "serving": ("that opens {serving}",),
    },
    verbs={
        "food": ("serves {food} food", "offers {food} dishes", "cooks {food} meals"),
        "price": ("charges {price} for a meal", "offers meals for {price}"),
        "price=low": ("has low prices", "offers meals at low prices"),
        "price=moderate": ("has moderate prices", "offers meals at moderate prices"),
        "price=high": ("has high prices", "offers meals at high prices"),
        "area": ("is located in the {area}", "lies in the {area}"),
        "rating": ("is rated {rating}", "has a rating of {rating}"),
        "guests": ("is a favourite of {guests}", "is made for {guests}"),
        "serving": ("serves guests {serving}", "opens {serving}"),
        "decoration": ("is decorated with {decoration}", "shows {decoration} on its walls"),
        "near": ("is near {near}", "stands close to {near}"),
    },
    clauses={
        "price": ("a meal costs {price}", "you pay {price} for a meal"),
        "price=low": ("prices are low",),
        "price=moderate": ("prices are moderate",),
        "price=high": ("prices are high",),
        "area": ("you can find it in the {area}", "come and see it in the {area}"),
        "rating": (
            "guests rate it {rating}",
            "visitors give it {rating}",
            "the city guide rates it {rating}",
        ),
        "children": ("children are {children}", "families should know that children are {children}"),
        "guests": ("{guests} like it",),
        "serving": ("come {serving}", "you can eat here {serving}"),
        "near": ("you can find it near {near}",),
    },
)

MUSEUMS = Domain(
    values={
        "name": tuple(f"The {place}" for place in _SIGHTS),
        "kind": ("museum", "gallery", "art house", "exhibition hall"),
        "shows": _EXHIBITS,
        "ticket": ("free", "4 euros", "8 euros", "12 euros"),
        "hours": HOURS,
        "area": AREAS,
        "guide": ("audio guide", "guided tour", "printed guide", "school tour"),
        "visitors": VISITORS,
        "landmark": LANDMARKS,
    },
    openings=(
        "visit {name} to see {shows}.",
        "visit {name}, {np}.",
        "at {name}, {np}, you can see {shows}.",
        "{shows} are on display at {name}, {np}.",
        "if you like {shows}, go to {name}, {np}.",
        "anyone interested in {shows} should visit {name}, {np}.",
        "{name} welcomes {visitors} and shows {shows}.",
        "a visit to {name}, {np}, is ideal for {visitors}.",
        "a walk from {landmark} takes you to {name}, {np}.",
        "{name} opens its doors {hours}.",
        "among the sights of the {area} is {name}, {np}.",
    ),
    before={
        "ticket=free": ("free",),
        "visitors=families": ("family",),
        "visitors=children": ("children's",),
    },
    after={
        "area": ("in the {area}",),
        "landmark": ("next to {landmark}", "opposite {landmark}"),
        "shows": ("full of {shows}", "dedicated to {shows}"),
        "visitors": ("for {visitors}", "made for {visitors}"),
        "hours": ("open {hours}",),
    },
    verbs={
        "shows": ("shows {shows}", "displays {shows}", "is known for its {shows}"),
        "ticket": ("charges {ticket} for a ticket", "costs {ticket} to enter"),
        "ticket=free": ("is free to enter", "charges nothing for a ticket"),
        "hours": ("opens {hours}", "is open {hours}", "receives visitors {hours}"),
        "area": ("stands in the {area}", "lies in the {area}"),
        "guide": ("offers a {guide}", "provides a {guide}"),
        "visitors": ("is ideal for {visitors}", "is popular with {visitors}"),
        "landmark": ("stands next to {landmark}", "faces {landmark}"),
    },
    clauses={
        "ticket": ("tickets cost {ticket}", "the price of a ticket is {ticket}"),
        "ticket=free": ("entry is free", "you do not need a ticket"),
        "hours": ("its doors are open {hours}", "come {hours}"),
        "guide": ("visitors can take a {guide}", "a {guide} is available"),
        "visitors": ("{visitors} will enjoy it", "it is a good choice for {visitors}"),
        "landmark": ("look for it next to {landmark}",),
    },
)
