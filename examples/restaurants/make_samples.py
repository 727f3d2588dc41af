"""Write invented descriptions of restaurants for two clients and a validation file.

Each line is `{"prompt": "name: ... | type: ...", "completion": "..."}`. The clients live in different cities and write
in different voices: client 0 chats about pubs and cafes, client 1 presents restaurants. No name occurs twice.

    python examples/restaurants/make_samples.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

VALIDATION_PAIRS = 80
OMITTED = 0.2  # how often a slot that may be missing is missing

# The two ways of putting a price: before the type of place, or after all else.
PRICES = {
    "cheap": ("cheap {place}", "{place} at low prices"),
    "fair": ("fairly priced {place}", "{place} at fair prices"),
    "moderate": ("moderately priced {place}", "{place} at moderate prices"),
    "pricey": ("pricey {place}", "{place} at high prices"),
}
FOODS = ("{place} serving {food} food", "{place} with {food} food", "{place} known for {food} dishes")


@dataclass(frozen=True)
class City:
    """What one client writes about, and how."""

    names: tuple[tuple[str, ...], ...]  # a name takes one part of each
    slots: dict[str, tuple[str, ...]]
    openings: tuple[str, ...]
    welcome: dict[str, tuple[str, ...]]
    ratings: tuple[str, ...]


PUB_CITY = City(
    names=(
        ("The Amber", "The Blue", "The Copper", "The Crooked", "The Gentle", "The Hungry", "The Idle", "The Jolly",
         "The Little", "The Lucky", "The Merry", "The Old", "The Painted", "The Quiet", "The Rusty", "The Silver",
         "The Sleepy", "The Speckled", "The Thirsty", "The Velvet", "The Wandering", "The White"),
        ("Anchor", "Badger", "Barrel", "Bramble", "Candle", "Compass", "Cuckoo", "Fiddler", "Hare", "Heron", "Kettle",
         "Lantern", "Magpie", "Otter", "Penny", "Pheasant", "Pilgrim", "Robin", "Saddle", "Shepherd", "Teapot",
         "Thistle", "Walnut", "Weaver"),
    ),
    slots={
        "type": ("pub", "pub", "cafe", "cafe", "tea room", "coffee shop"),
        "food": ("English", "Irish", "Scottish", "vegetarian", "American", "Welsh"),
        "price": ("cheap", "cheap", "moderate", "fair"),
        "rating": ("2 out of 5", "3 out of 5", "4 out of 5"),
        "area": ("riverside", "old town", "harbour", "market", "castle"),
        "near": ("Bell Tower", "Corn Market", "Ferry Steps", "Mill Bridge", "Town Hall"),
        "family friendly": ("yes", "yes", "no"),
    },
    openings=(
        "{name} is {place}{where}.",
        "Why not try {name}? It is {place}{where}.",
        "{name} is a friendly spot: {place}{where}.",
        "You will like {name}, {place}{where}.",
        "Pop into {name}, {place}{where}.",
    ),
    welcome={
        "yes": ("Bring the children along.", "The whole family is welcome.", "It is great for families."),
        "no": ("Leave the children at home.", "It is for adults only."),
    },
    ratings=("People rate it {rating}.", "Its rating is {rating}."),
)  # fmt: skip

RESTAURANT_CITY = City(
    names=(
        ("Bellini", "Castellan", "Delacroix", "Esposito", "Fontaine", "Giordano", "Hartmann", "Ishikawa", "Jasmine",
         "Kashmir", "Laurent", "Marchetti", "Narayan", "Olivier", "Pavilion", "Rosario", "Saffron", "Tamarind",
         "Valentino", "Wakana", "Yamato", "Zafferano"),
        ("Brasserie", "Corner", "Dining Room", "Garden", "Gallery", "Grill", "House", "Kitchen", "Lounge", "Palace",
         "Rooms", "Table", "Terrace", "Trattoria", "and Daughters", "and Sons", "at Number Nine", "at the Bridge",
         "by the Park", "on the Hill", "on the Square", "under the Arches"),
    ),
    slots={
        "type": ("restaurant", "restaurant", "restaurant", "bistro", "grill"),
        "food": ("Italian", "French", "Indian", "Japanese", "Thai", "Spanish"),
        "price": ("fair", "moderate", "pricey", "pricey"),
        "rating": ("3 out of 5", "4 out of 5", "5 out of 5"),
        "area": ("city centre", "theatre", "riverside", "university", "embassy"),
        "near": ("Central Station", "Grand Museum", "Royal Gallery", "Opera House", "Winter Palace"),
        "family friendly": ("yes", "no", "no"),
    },
    openings=(
        "{name} is {place}{where}.",
        "We recommend {name}, {place}{where}.",
        "For a special evening, choose {name}, {place}{where}.",
        "{name} presents itself as {place}{where}.",
        "Guests of {name} enjoy {place}{where}.",
    ),
    welcome={
        "yes": ("Families are most welcome.", "Children are welcome to dine.", "It is family friendly."),
        "no": ("It is not family friendly.", "It does not admit children."),
    },
    ratings=("Our guests rate it {rating}.", "Its customer rating is {rating}."),
)  # fmt: skip

CITIES = (PUB_CITY, RESTAURANT_CITY)  # one for each client; they have no type of place in common


def name_places(city: City, generator: random.Random) -> list[str]:
    """List every name of the city in a random order."""
    names = [" ".join(parts) for parts in itertools.product(*city.names)]
    return generator.sample(names, len(names))


def choose_slots(city: City, name: str, generator: random.Random) -> dict[str, str]:
    """Choose the facts of one place; only its name and its type are always known."""
    slots = {"name": name}
    for slot, values in city.slots.items():
        value = generator.choice(values)
        if slot == "type" or generator.random() >= OMITTED:
            slots[slot] = value
    return slots


def describe_place(slots: dict[str, str], generator: random.Random) -> str:
    """Return what kind of place it is, such as "a cheap pub with Irish food"."""
    place = slots["type"]
    if "food" in slots:
        place = generator.choice(FOODS).format(place=place, food=slots["food"])
    if "price" in slots:
        place = generator.choice(PRICES[slots["price"]]).format(place=place)
    return f"a {place}"


def describe_location(slots: dict[str, str], generator: random.Random) -> str:
    """Return where the place is, as far as that is known."""
    area = " in the {area} area" if "area" in slots else ""
    near = generator.choice((" near the {near}", " close to the {near}")) if "near" in slots else ""
    return (area + near).format(**slots)


def make_pair(city: City, name: str, generator: random.Random) -> dict[str, str]:
    """Return the facts of one place as the prompt, and its description as the completion."""
    slots = choose_slots(city, name, generator)
    place, where = describe_place(slots, generator), describe_location(slots, generator)
    sentences = [generator.choice(city.openings).format(name=name, place=place, where=where)]
    if "rating" in slots:
        sentences.append(generator.choice(city.ratings).format(**slots))
    if "family friendly" in slots:
        sentences.append(generator.choice(city.welcome[slots["family friendly"]]))
    prompt = " | ".join(f"{slot}: {value}" for slot, value in slots.items())
    return {"prompt": prompt, "completion": " ".join(sentences)}


def write_lines(path: Path, pairs: list[dict[str, str]]) -> None:
    """Write one pair a line, with the same line ends on every system."""
    path.write_bytes("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs).encode())


def facts(pair: dict[str, str]) -> str:
    """Return what a prompt says apart from the name."""
    return pair["prompt"].partition(" | ")[2]


def make_new_pair(city: City, name: str, known: set[str], generator: random.Random) -> dict[str, str]:
    """Make a pair whose combination of facts is not known yet."""
    while facts(pair := make_pair(city, name, generator)) in known:
        pass
    return pair


def make_files(output: Path, pairs: int, seed: int) -> None:
    """Write a file for each client, and one of names and combinations of facts that neither has."""
    output.mkdir(parents=True, exist_ok=True)
    held_out = VALIDATION_PAIRS // len(CITIES)
    validation = []
    for client, city in enumerate(CITIES):
        generator = random.Random(f"{seed}-{client}")
        names = name_places(city, generator)
        if pairs > len(names) - held_out:
            raise SystemExit(f"--pairs can be {len(names) - held_out} at most: client {client} runs out of names")
        made = [make_pair(city, name, generator) for name in names[:pairs]]
        known = {facts(pair) for pair in made}
        write_lines(output / f"client-{client}.jsonl", made)
        validation += [make_new_pair(city, name, known, generator) for name in names[-held_out:]]
    write_lines(output / "valid.jsonl", validation)


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description="Write invented descriptions of restaurants.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--pairs", type=int, default=400, help="pairs for each client")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_files(arguments.output, arguments.pairs, arguments.seed)


if __name__ == "__main__":
    main()
