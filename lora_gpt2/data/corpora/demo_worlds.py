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

EATING = Domain(
    values={
        "name": (
            "The Paper Boat", "Silver Spoon", "The Blue Kettle", "Olive Corner", "The Clock House",
            "Maple Table", "The Green Door", "Little Harbour", "The Old Map", "Red Lantern",
            "The Glass Garden", "Stone Oven", "The Quiet Piano", "North Star", "The Toy Box",
            "Golden Pear", "The River Room", "Three Foxes", "The Copper Pot", "Station Gallery",
            "The Painted Plate", "White Heron", "The Coin and Cup", "Kettle Hall",
        ),
        "type": ("restaurant", "café", "tea room", "bistro", "wine bar", "pub"),
        "food": ("Italian", "Indian", "Greek", "Mexican", "Japanese", "French", "vegetarian", "English"),
        "price": ("low", "moderate", "high"),
        "area": AREAS,
        "rating": ("1 out of 5", "2 out of 5", "3 out of 5", "4 out of 5", "5 out of 5"),
        "children": ("welcome", "not welcome"),
        "extra": ("live music", "a garden", "free parking", "a toy corner", "old paintings", "printed menus"),
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
        "{name}, {np}, has {extra}.",
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
        "extra": ("offering {extra}", "that has {extra}"),
    },
    verbs={
        "food": ("serves {food} food", "offers {food} dishes", "cooks {food} meals"),
        "price": ("has {price} prices", "offers meals at {price} prices"),
        "area": ("is located in the {area}", "lies in the {area}"),
        "rating": ("is rated {rating}", "has a rating of {rating}"),
        "extra": ("offers {extra}", "has {extra}"),
        "near": ("is near {near}", "stands close to {near}"),
    },
    clauses={
        "price": ("prices are {price}", "you pay {price} prices here"),
        "area": ("you can find it in the {area}", "come and see it in the {area}"),
        "rating": (
            "guests rate it {rating}",
            "visitors give it {rating}",
            "the city guide rates it {rating}",
        ),
        "children": ("children are {children}", "families should know that children are {children}"),
        "near": ("you can find it near {near}",),
    },
)

MUSEUMS = Domain(
    values={
        "name": (
            "Heron House", "The Lantern Rooms", "Harbour Hall", "The Green Yard", "Maple Hall",
            "The Fox Rooms", "Silver Hall", "The Old Station", "Pear Garden House", "Copper Hall",
            "The Paper Rooms", "Star House", "Stone Hall", "The Painted House", "River House",
            "The Blue Rooms",
        ),
        "kind": ("museum", "gallery", "art house", "exhibition hall"),
        "shows": (
            "old clocks", "rare maps", "wooden toys", "paper boats", "river stones", "glass plates",
            "painted pianos", "Greek coins", "French paintings", "Japanese lanterns", "copper pots",
            "Indian lamps",
        ),
        "ticket": ("free", "4 euros", "8 euros", "12 euros"),
        "hours": ("in the morning", "in the afternoon", "at weekends", "every day", "from 9 to 5"),
        "area": AREAS,
        "guide": ("audio guide", "guided tour", "printed guide", "school tour"),
        "visitors": ("families", "students", "children", "art lovers"),
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
