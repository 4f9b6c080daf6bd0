"""The little world of the demo checkpoint: stories and dialogs written from a grammar, seeded, with held-out cases.

A case that `is_held_out` names is never written by `documents`: not a story whose first sentence is held out, not a
question whose fact is held out in that wording. `held_out_openings`, `held_out_questions` and `held_out_dialogs`
give exactly those cases, with the answers expected.
"""

import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypedDict


class Message(TypedDict):
    """One turn of a dialog."""

    role: Literal["system", "user", "assistant"]
    content: str


Dialog = list[Message]
Slots = dict[str, str]


def digest(text: str) -> int:
    """A number that depends on the text alone, on every machine."""
    return zlib.crc32(text.encode())


def is_held_out(text: str) -> bool:
    """Whether this opening or question belongs to the tenth that training never sees."""
    return digest(text) % 10 == 0


def words(text: str) -> list[str]:
    """The words of a line."""
    return text.split()


# ---------------------------------------------------------------------------------------------------------- stories

GIRLS = words(
    "Mia Ann Lucy Rose Ella Zoe Nina Lily Amy Eva Ruby Kate Sara Emma Anna Ivy Molly Nora Daisy Tina Wendy Bella Clara "
    "Jane"
)
BOYS = words("Tom Ben Max Leo Sam Tim Jack Finn Hugo Noah Dan Pip Rex Otto Paul Luke Adam Peter Felix Oscar Billy Bob")
RARE_GIRLS = words(
    "Alice Andrea Barbara Carla Chloe Christine Diana Dora Elena Emily Fiona Grace Greta Hannah Heidi Helen Ida Ingrid "
    "Jenny Julia Karen Laura Lena Linda Lisa Louise Maria Marie Martha Mary Maya Monica Nadia Nicole Olga Olivia Paula "
    "Rachel Rita Rosa Sally Sandra Sarah Sofia Sophie Stella Susan Tara Teresa Ursula Vera Yara"
)
RARE_BOYS = words(
    "Alex Anton Arthur Bernard Bruno Carlos Charlie Chris David Edgar Edward Elias Erik Frank Fred George Harry Henry "
    "Ian Isaac Jacob James Jim Joe John Jonas Joseph Karl Kevin Klaus Leon Liam Louis Mark Martin Michael Mike Nick "
    "Nils Oliver Pablo Patrick Philip Ralph Robert Roger Ryan Samuel Simon Steve Sven Theo Thomas Tony Victor Walter"
)
NAMES = sorted(GIRLS + BOYS)
RARE_NAMES = sorted(RARE_GIRLS + RARE_BOYS)
ALL_GIRLS = {*GIRLS, *RARE_GIRLS}
STORY_ANIMALS = words(
    "fox bear rabbit mouse owl frog duck cat dog hedgehog squirrel pig lamb turtle hen pony goat beaver mole otter"
)
COLOURS = words("red blue green yellow white black brown pink purple golden silver grey")

WORDS: dict[str, list[str]] = {
    "hero": [*NAMES * 6, *RARE_NAMES],
    "friend": [*NAMES * 12, *RARE_NAMES],
    "kind": ["girl", "boy", *STORY_ANIMALS],
    "friend_kind": ["girl", "boy", *STORY_ANIMALS],
    "adjective": words("little brave kind happy clever small young gentle funny quiet cheerful good curious lonely"),
    "friend_adjective": words("friendly big wise strong tall nice helpful merry kind good clever gentle"),
    "any_adjective": words("old little small young big grey wise happy clever"),
    "spot": [
        *("the lake", "the forest", "the park", "the market", "the beach", "the river", "the garden", "the sea"),
        *("the hill", "the zoo", "the pond", "the village", "the farm", "the wood"),
    ],
    "home": [
        *("in the forest", "by the river", "on a farm", "near the sea", "in a small house", "on a green hill"),
        *("in a little village", "under a big tree", "beside a blue lake", "in a sunny valley", "by the pond"),
        *("near the mountains", "in a quiet garden", "on an island", "behind the old mill", "at the edge of the wood"),
    ],
    "hobby": [
        *("sing", "dance", "swim", "run in the grass", "look at the stars", "pick flowers", "play in the rain"),
        *("paint pictures", "bake cakes", "tell jokes", "count the clouds", "climb trees", "read books", "jump about"),
    ],
    "colour": COLOURS,
    "toy": words("ball doll kite drum boat train bell book hat ring teddy whistle lantern cup spoon top"),
    "flyer": words("kite balloon hat scarf ball plane ribbon feather"),
    "gift": words("card scarf hat picture basket crown blanket cake necklace puppet box pillow"),
    "snack": words("apples cherries cookies nuts berries carrots pears pancakes plums grapes muffins"),
    "food": ["warm bread", "honey cake", "apple pie", "hot soup", "sweet pears", "nut cookies", "fresh pancakes"],
    "drink": ["hot milk", "warm tea", "hot cocoa", "apple juice", "rose tea", "cold water"],
    "fear": ["the dark", "thunder", "deep water", "big dogs", "high places", "loud noises", "spiders", "the night"],
    "weather": ["rain", "snow"],
    "trap": ["the mud", "a deep hole", "a net", "a ditch", "a dark pit", "a thorn bush"],
    "walk": ["in the woods", "across the fields", "along the river", "up the hill", "on the beach", "down the road"],
    "place": [
        *("under the bed", "behind the door", "in the garden", "under a bush", "in the tall grass", "in the barn"),
        *("behind a big stone", "under the bridge", "in a hollow tree", "behind the shed", "in the old boat"),
        *("near the well", "on the roof", "in a basket", "under the table"),
    ],
}
WORDS |= {"second_place": WORDS["place"], "last_place": WORDS["place"]}

PRONOUNS = {"he": ("he", "she"), "him": ("him", "her"), "his": ("his", "her"), "himself": ("himself", "herself")}

OPENING = (
    "Once upon a time there was a {adjective} {kind} named {hero}.",
    "Once upon a time, a {adjective} {kind} named {hero} lived {home}.",
    "There once was a {adjective} {kind} called {hero}.",
    "{hero} was a {adjective} {kind} who lived {home}.",
    "Long ago, a {adjective} {kind} called {hero} lived {home}.",
    "A {adjective} {kind} named {hero} lived {home}.",
    "The {any_adjective} {kind} lived {home} and was called {hero}.",
    "{hero} the {kind} lived {home}.",
    "{hero} was a {adjective} {kind}.",
)
OUTING = (
    "One morning {hero} went to {spot}.",
    "One day {hero} went to {spot}.",
    "One day, {hero} the {kind} went to {spot}.",
    "{hero} went to {spot} one afternoon.",
)
HOBBY = ("", "{He} loved to {hobby}.", "{hero} liked to {hobby} every day.", "Every day {he} liked to {hobby}.")
MEETING = (
    "Then {hero} met {friend}, a {friend_adjective} {friend_kind}.",
    "Then a {friend_adjective} {friend_kind} named {friend} came by.",
    "Soon {friend}, a {friend_adjective} {friend_kind}, came along.",
)
THANKS = (
    "{hero} was very happy and thanked {friend}.",
    '"Thank you, {friend}!" said {hero} with a big smile.',
    "{hero} hugged {friend} and said thank you.",
    '"You are a good friend," said {hero}.',
)
CLOSING = (
    "From that day on, {hero} and {friend} were best friends.",
    "After that, {hero} and {friend} played together every day.",
    "They laughed and played until the sun went down.",
    "Then they went home together and were happy.",
)

PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lost": (
        OPENING,
        HOBBY,
        (
            "{He} had a {colour} {toy} that {he} loved very much.",
            "{His} favourite thing was a {colour} {toy}.",
            "{hero} took a {colour} {toy} with {him} everywhere.",
        ),
        (
            "One morning, the {toy} was gone.",
            "One day, {hero} could not find the {toy}.",
            "But one day the {colour} {toy} was lost.",
        ),
        (
            "{He} looked {place} and {second_place}, but it was not there.",
            "{hero} looked {place}, but the {toy} was not there.",
            "{hero} was very sad and began to cry.",
        ),
        MEETING,
        (
            '"Why are you sad?" asked {friend}. "I have lost my {toy}," said {hero}.',
            '"Can you help me find my {toy}?" asked {hero}. "Of course I can," said {friend}.',
            '"I cannot find my {toy}," said {hero}. "I will help you," said {friend}.',
        ),
        ("They looked everywhere together.", "The two of them looked all day.", ""),
        (
            "At last they found the {toy} {last_place}.",
            "At last {friend} found it {last_place}.",
            "There it was, {last_place}!",
        ),
        THANKS,
        (*CLOSING, "That night, {hero} slept with the {toy} in {his} arms."),
    ),
    "wish": (
        ("", *OPENING),
        ("{hero} wanted a {colour} {toy}.", "{hero} wanted a {colour} {toy} more than anything."),
        ("But {he} had no money.", "{He} dreamed of it every night.", "{He} saw one in a shop, but it cost too much."),
        MEETING,
        (
            '"If you help me, I will give you my {toy}," said {friend}.',
            '"I have a {colour} {toy}," said {friend}. "You can have it if you help me."',
        ),
        (
            "So {hero} helped {friend} all day.",
            "{hero} worked hard and helped {friend} clean the house.",
            "Together they picked {snack} until the evening.",
        ),
        (
            "Then {friend} gave {him} the {colour} {toy}.",
            "In the end, {friend} gave {him} the {toy}.",
        ),
        THANKS,
        (*CLOSING, "That night, {hero} slept with the {toy} in {his} arms."),
    ),
    "stuck": (
        OPENING,
        HOBBY,
        (
            "One windy day, {hero} was playing with a {colour} {flyer}.",
            "One day, {he} went out to play with a {colour} {flyer}.",
        ),
        (
            "The wind blew the {flyer} up into a tall tree.",
            "Suddenly the {flyer} flew up and got stuck in a tree.",
        ),
        (
            "{He} jumped and jumped, but {he} could not reach it.",
            "{hero} tried to climb the tree, but it was too high.",
        ),
        MEETING,
        (
            '"Please help me," said {hero}. "My {flyer} is in the tree."',
            '"Do not worry," said {friend}. "I can get your {flyer}."',
        ),
        (
            "{friend} climbed up and threw it down.",
            "{friend} got a long stick and pushed it down.",
            "{friend} stood on a box and pulled it down.",
        ),
        THANKS,
        CLOSING,
    ),
    "gift": (
        OPENING,
        HOBBY,
        (
            "One day it was the birthday of {friend}, a {friend_adjective} {friend_kind}.",
            "{His} friend {friend}, a {friend_adjective} {friend_kind}, had a birthday.",
        ),
        (
            "{hero} wanted to give {friend_him} a gift, but {he} had no money.",
            "{hero} did not know what to give {friend_him}.",
        ),
        (
            "So {he} made a {colour} {gift} all by {himself}.",
            "So {hero} worked all morning and made a {colour} {gift}.",
        ),
        (
            "When {friend} saw the {gift}, {friend_he} smiled.",
            '"This {gift} is for you," said {hero}.',
        ),
        (
            '"What a lovely {gift}!" said {friend}.',
            '"It is the best gift of all," said {friend}.',
            '"Thank you, {hero}! I love it," said {friend}.',
        ),
        (
            "They ate cake and danced until night.",
            "{hero} was happy because {friend} was happy.",
            *CLOSING[:2],
        ),
    ),
    "storm": (
        OPENING,
        HOBBY,
        ("One day, {hero} went for a walk {walk}.", "One afternoon, {he} was walking {walk}."),
        (
            "Soon dark clouds came and it began to {weather}.",
            "Suddenly the sky was dark and it started to {weather}.",
        ),
        (
            "{hero} was wet and cold.",
            "{He} had no coat and no place to hide.",
            "{hero} ran and ran, but the {weather} did not stop.",
        ),
        (
            "Then {he} saw a small house with a light in the window.",
            "Then {he} came to a little house and knocked on the door.",
        ),
        (
            "A {friend_adjective} {friend_kind} named {friend} opened the door.",
            "It was the home of {friend}, a {friend_adjective} {friend_kind}.",
        ),
        (
            '"Come in," said {friend}. "You can stay here until the {weather} stops."',
            '"You are cold," said {friend}. "Come in and sit by the fire."',
        ),
        ("They had {drink} and {food}.", "{friend} gave {him} {drink} and {food}."),
        (
            "When the {weather} stopped, {hero} thanked {friend} and went home.",
            "After a while the sun came out again, and {hero} said thank you.",
        ),
        CLOSING[:2],
    ),
    "fear": (
        OPENING,
        HOBBY,
        ("{hero} was afraid of {fear}.", "But {he} had one problem. {He} was afraid of {fear}."),
        (
            "{He} always ran away and hid {place}.",
            "{He} often hid {place} and did not come out.",
        ),
        (
            "One day {he} told {friend}, a {friend_adjective} {friend_kind}.",
            "One evening {friend}, a {friend_adjective} {friend_kind}, came to visit.",
        ),
        (
            '"Do not be afraid," said {friend}. "I will stay with you."',
            '"I was afraid of {fear} too," said {friend}. "Stay close to me."',
        ),
        (
            "{hero} took a deep breath and counted to ten.",
            "They sat together and sang a little song.",
        ),
        ("Soon {hero} felt brave.", "After a while {he} was not afraid any more."),
        ('"Thank you, {friend}," said {hero}. "Now I am brave."', "{hero} smiled and thanked {friend}."),
        ("From that day on, {hero} was never afraid of {fear} again.", *CLOSING[:2]),
    ),
    "share": (
        OPENING,
        HOBBY,
        (
            "One day, {hero} found some {snack} {place}.",
            "One morning, {his} mother gave {him} some {snack}.",
        ),
        (
            "{He} wanted to eat all of them.",
            "The {snack} looked very good.",
            "{He} put them in a bag and sat down.",
        ),
        (
            "Then {friend}, a {friend_adjective} {friend_kind}, came by and looked hungry.",
            "Then {he} saw {friend}, a {friend_adjective} {friend_kind} who was very hungry.",
        ),
        (
            '"I have had no food all day," said {friend}.',
            '"May I have some {snack}?" asked {friend}.',
        ),
        (
            "{hero} thought for a moment. Then {he} gave {friend} half of the {snack}.",
            '"Here you are," said {hero}, and they shared the {snack}.',
        ),
        ('"Thank you, {hero}! You are very kind," said {friend}.', "{friend} was very happy and said thank you."),
        (
            "They ate together and laughed.",
            "{hero} felt warm inside. Sharing was better than eating alone.",
            *CLOSING[:2],
        ),
    ),
    "rescue": (
        OPENING,
        HOBBY,
        (
            "One day, {hero} was walking {walk} when {he} heard a cry.",
            "One day, {he} heard a cry {walk}.",
        ),
        (
            "{friend}, a {friend_adjective} {friend_kind}, was stuck in {trap}.",
            "A {friend_adjective} {friend_kind} named {friend} had fallen into {trap}.",
        ),
        ('"Help me, please!" called {friend}.', '"I cannot get out!" cried {friend}.'),
        (
            "{hero} was not afraid and ran to get a long rope.",
            "{hero} found a strong branch and held it out.",
        ),
        (
            "{He} pulled and pulled until {friend} was free.",
            "{He} pulled as hard as {he} could, and {friend} came out.",
        ),
        (
            '"You saved me!" said {friend}.',
            '"How can I thank you?" asked {friend}. "Be my friend," said {hero}.',
        ),
        CLOSING,
    ),
}


PLOTS |= {
    "rescue on an outing": (OUTING, ("There {he} heard a cry.", "Suddenly {he} heard a cry."), *PLOTS["rescue"][3:]),
    "storm on an outing": (OUTING, *PLOTS["storm"][3:]),
}


def with_pronouns(slots: Slots) -> Slots:
    """The slots and the pronouns that follow from the names among them."""
    forms = dict(slots)
    for name, prefix in (("hero", ""), ("friend", "friend_")):
        if name in slots:
            for pronoun, choices in PRONOUNS.items():
                word = choices[slots[name] in ALL_GIRLS]
                forms[prefix + pronoun] = word
                forms[(prefix + pronoun).capitalize()] = word.capitalize()
    return forms


def consistent(slots: Slots) -> bool:
    """Whether the parts of a story fit: girls have girls' names, two characters two names, places are not repeated."""
    for name, kind in (("hero", "kind"), ("friend", "friend_kind")):
        if slots.get(kind) in ("girl", "boy") and (slots[kind] == "girl") != (slots[name] in ALL_GIRLS):
            return False
    places = [slots[key] for key in ("place", "second_place", "last_place") if key in slots]
    return slots.get("hero") != slots.get("friend") and len(places) == len(set(places))


def story_slots(rng: random.Random) -> Slots:
    """A consistent choice of everything that a story can name."""
    while True:
        slots = {key: rng.choice(choices) for key, choices in WORDS.items()}
        if consistent(slots):
            return slots


def write_story(rng: random.Random, held_out: bool, **given: str) -> tuple[str, str]:
    """The first sentence and the whole of a story that is, or is not, of the held-out part."""
    while True:
        slots = story_slots(rng) | given
        forms = with_pronouns(slots)
        plot = PLOTS[rng.choice(sorted(PLOTS))]
        sentences = [text for text in (rng.choice(variants).format(**forms) for variants in plot) if text]
        if consistent(slots) and is_held_out(sentences[0]) == held_out:
            return sentences[0], " ".join(sentences)


def match_template(template: str, text: str, slots: Slots) -> tuple[str, Slots] | None:
    """Read one sentence of the grammar off the front of a text: the rest and the slots known then."""
    forms = with_pronouns(slots)
    found: set[str] = set()

    def pattern_of(slot: str) -> str:
        if slot in forms:
            return re.escape(forms[slot])
        if slot in found:
            return f"(?P={slot})"
        if slot not in WORDS:
            return "(?!)"
        found.add(slot)
        return f"(?P<{slot}>{'|'.join(map(re.escape, sorted(set(WORDS[slot]), key=len, reverse=True)))})"

    parts = re.split(r"\{(\w+)\}", template)
    pattern = "".join(pattern_of(part) if index % 2 else re.escape(part) for index, part in enumerate(parts))
    match = re.match(pattern + r"(?: |$)", text)
    return (text[match.end() :], slots | match.groupdict()) if match else None


def is_story(text: str) -> bool:
    """Whether the grammar writes this text: every sentence in its place, with the same names and things throughout."""

    def derives(plot: tuple[tuple[str, ...], ...], rest: str, slots: Slots) -> bool:
        if not plot:
            return not rest and consistent(slots)
        for template in plot[0]:
            match = match_template(template, rest, slots) if template else (rest, slots)
            if match and derives(plot[1:], *match):
                return True
        return False

    return any(derives(plot, text, {}) for plot in PLOTS.values())


def held_out_openings(count: int, seed: int = 0) -> list[str]:
    """Openings of stories, cut after up to twelve words more than a first sentence that training never saw."""
    rng = random.Random(seed)
    openings = []
    for _ in range(count):
        first, story = write_story(rng, held_out=True)
        more = story.removeprefix(first).split()[: rng.randrange(13)]
        openings.append(" ".join([first, *more]))
    return openings


# -------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True, slots=True)
class Question:
    """What a user says, the sentence that answers it, and the answer in one word."""

    kind: str
    text: str
    answer: str
    word: str


@dataclass(frozen=True, slots=True)
class Table:
    """Facts of one kind and the wordings in which they are asked; half of the facts have one wording held out."""

    kind: str
    wordings: tuple[str, ...]
    answer: str
    word: str
    facts: tuple[Slots, ...]

    def questions(self, held_out: bool) -> list[Question]:
        """Every question of the table on one side of the split."""
        chosen = []
        for fact in self.facts:
            missing = digest(f"{self.kind} {sorted(fact.items())}") % (2 * len(self.wordings))
            for index, wording in enumerate(self.wordings):
                if (index == missing) == held_out:
                    answer, word = capitalised(self.answer.format(**fact)), capitalised(self.word.format(**fact))
                    chosen.append(Question(self.kind, wording.format(**fact), answer, word))
        return chosen


def capitalised(text: str) -> str:
    """The text with a capital at its start; the rest as it is."""
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    """The noun after a or an."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def pairs(text: str) -> list[list[str]]:
    """`"cow moo, dog woof"` as pairs of words."""
    return [pair.split() for pair in text.split(", ")]


def facts(text: str) -> tuple[Slots, ...]:
    """Facts of a pair of words each: `x`, `y`, and `a`, which is `x` with its article."""
    return tuple({"x": x, "y": y, "a": with_article(x)} for x, y in pairs(text))


SOUNDS = (
    "cow moo, dog woof, cat meow, sheep baa, duck quack, pig oink, lion roar, horse neigh, owl hoot, frog croak, "
    "bee buzz, mouse squeak, hen cluck, snake hiss, wolf howl, bird tweet, crow caw, goose honk"
)
LEGS = (
    "cow four, dog four, cat four, horse four, pig four, sheep four, mouse four, lion four, fox four, bear four, "
    "rabbit four, frog four, duck two, hen two, owl two, bird two, goose two, crow two, bee six, ant six, fly six, "
    "beetle six, spider eight, snake no, fish no, worm no"
)
HOMES = (
    "bee hive, horse stable, cow barn, pig sty, bird nest, spider web, fox den, bear cave, rabbit burrow, ant anthill, "
    "hen coop, duck pond, frog pond, whale sea, camel desert, monkey jungle, dog kennel, crab sea"
)
YOUNG = (
    "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, pig piglet, duck duckling, hen chick, goat kid, "
    "bear cub, lion cub, frog tadpole, goose gosling, owl owlet, deer fawn, kangaroo joey, swan cygnet"
)
COLOURS_OF = {
    "green": ["grass", "a frog", "a cucumber", "a leaf", "a pea"],
    "blue": ["the sky", "the sea", "a blueberry"],
    "white": ["snow", "milk", "a cloud", "salt", "a swan"],
    "red": ["blood", "a strawberry", "a tomato", "a cherry", "a fire engine"],
    "black": ["coal", "a crow", "the night"],
    "yellow": ["a banana", "a lemon", "the sun", "corn", "butter"],
    "orange": ["a carrot", "a pumpkin"],
    "brown": ["chocolate", "wood", "a bear"],
    "grey": ["an elephant", "a mouse"],
    "pink": ["a flamingo", "a pig"],
    "purple": ["a plum", "a grape"],
}
OPPOSITES = (
    "hot cold, big small, long short, fast slow, happy sad, up down, day night, left right, open closed, full empty, "
    "wet dry, dark bright, old new, good bad, hard soft, loud quiet, rich poor, strong weak, thick thin, clean dirty, "
    "early late, high low, near far, in out, on off, black white, true false, first last, yes no, push pull, win lose, "
    "give take, love hate, buy sell, sweet sour, smooth rough, heavy light, front back, begin end, always never"
)
PLURALS = (
    "mouse mice, child children, foot feet, tooth teeth, man men, woman women, goose geese, sheep sheep, fish fish, "
    "leaf leaves, wolf wolves, knife knives, box boxes, fox foxes, bus buses, baby babies, city cities, cat cats, "
    "dog dogs, apple apples, book books, tree trees, house houses, dish dishes, lady ladies, hand hands, bird birds, "
    "flower flowers, half halves, loaf loaves, cherry cherries, watch watches"
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
CATEGORIES = {
    "tool": words("hammer saw drill spade axe wrench rake"),
    "fruit": words("apple pear plum cherry lemon banana peach"),
    "vegetable": words("carrot onion cabbage potato leek turnip"),
    "animal": words("dog cat horse cow lion mouse rabbit bear"),
    "vehicle": words("car bus train truck tram bike"),
    "flower": words("rose tulip daisy lily"),
    "toy": words("doll kite puzzle teddy"),
}
SIZES = ("ant bee fly", "mouse frog", "cat hen rabbit", "sheep wolf pig", "horse cow camel", "elephant whale")


def neighbours(kind: str, ring: list[str], wordings: tuple[str, ...]) -> Iterator[Table]:
    """Tables of what comes after and before each of a ring of words."""
    for step, where in ((1, "after"), (-1, "before")):
        found = tuple({"x": x, "y": ring[(i + step) % len(ring)], "where": where} for i, x in enumerate(ring))
        yield Table(kind, wordings, "{y} comes {where} {x}.", "{y}.", found)


def number_tables() -> Iterator[Table]:
    """Counting, sums and differences."""
    wordings = ("What number comes {where} {x}?", "Which number comes {where} {x}?", "What comes {where} {x}?")
    for step, where in ((1, "after"), (-1, "before")):
        found = tuple({"x": str(n), "y": str(n + step), "where": where} for n in range(1, 40))
        yield Table("number", (*wordings, "Which number is {where} {x}?"), "{y} comes {where} {x}.", "{y}.", found)
    sums = tuple({"x": str(a), "y": str(b), "z": str(a + b)} for a in range(10) for b in range(10))
    wordings = ("What is {x} plus {y}?", "How much is {x} plus {y}?", "What is {x} + {y}?", "Add {x} and {y}.")
    yield Table("sum", wordings, "{x} plus {y} is {z}.", "{z}.", sums)
    wordings = ("What is {x} minus {y}?", "How much is {x} minus {y}?", "What is {x} - {y}?", "Take {y} from {x}.")
    differences = tuple({"x": str(a), "y": str(b), "z": str(a - b)} for a in range(10) for b in range(a + 1))
    yield Table("difference", wordings, "{x} minus {y} is {z}.", "{z}.", differences)


def animal_tables() -> Iterator[Table]:
    """Sounds, legs, homes and young of animals."""
    wordings = ("What does {a} say?", "What sound does {a} make?", "Which sound does {a} make?")
    yield Table("sound", (*wordings, "What noise does {a} make?"), "{a} says {y}.", "{y}.", facts(SOUNDS))
    wordings = ("How many legs does {a} have?", "How many legs has {a}?", "What number of legs does {a} have?")
    legs = tuple(fact | {"count": "none" if fact["y"] == "no" else fact["y"]} for fact in facts(LEGS))
    yield Table("legs", (*wordings, "Count the legs of {a}."), "{a} has {y} legs.", "{count}.", legs)
    wordings = (
        "Where does {a} live?",
        "What is the home of {a}?",
        "Where is the home of {a}?",
        "Where do you find {a}?",
    )
    homes = tuple(
        fact | {"home": f"the {fact['y']}" if fact["y"] in ("sea", "desert", "jungle") else with_article(fact["y"])}
        for fact in facts(HOMES)
    )
    yield Table("home", wordings, "{a} lives in {home}.", "{y}.", homes)
    wordings = ("What is a baby {x} called?", "What do you call a baby {x}?", "What is the name of a baby {x}?")
    young = tuple(fact | {"young": with_article(fact["y"])} for fact in facts(YOUNG))
    yield Table("young", (*wordings, "What is a young {x} called?"), "A baby {x} is called {young}.", "{y}.", young)


def word_tables() -> Iterator[Table]:
    """Colours, opposites, plurals and categories."""
    wordings = ("What colour is {x}?", "Which colour is {x}?", "What is the colour of {x}?", "What colour has {x}?")
    colours = tuple({"x": thing, "y": colour} for colour, things in COLOURS_OF.items() for thing in things)
    yield Table("colour", wordings, "{x} is {y}.", "{y}.", colours)
    both = facts(", ".join(f"{x} {y}, {y} {x}" for x, y in pairs(OPPOSITES)))
    wordings = ("What is the opposite of {x}?", "Which word is the opposite of {x}?", "Tell me the opposite of {x}.")
    yield Table("opposite", (*wordings, "Give me the opposite of {x}."), "The opposite of {x} is {y}.", "{y}.", both)
    wordings = ("What is the plural of {x}?", "Tell me the plural of {x}.", "Give me the plural of {x}.")
    yield Table(
        "plural", (*wordings, "Which word is the plural of {x}?"), "The plural of {x} is {y}.", "{y}.", facts(PLURALS)
    )
    things = {thing: category for category, members in CATEGORIES.items() for thing in members}
    named = tuple({"a": with_article(thing), "b": with_article(c), "c": c} for thing, c in things.items())
    yield Table(
        "category", ("What is {a}?", "What kind of thing is {a}?", "Tell me what {a} is."), "{a} is {b}.", "{c}.", named
    )
    asked = ("Is {a} {b}?", "Would you say that {a} is {b}?", "Do you think {a} is {b}?", "Is it true that {a} is {b}?")
    members = tuple({"a": with_article(thing), "b": with_article(c)} for thing, c in things.items())
    others = tuple(
        {"a": with_article(thing), "b": with_article(other)}
        for thing, category in things.items()
        for other in CATEGORIES
        if other != category and digest(thing + other) % 3 == 0
    )
    yield Table("yes or no", asked, "Yes, {a} is {b}.", "Yes.", members)
    yield Table("yes or no", asked, "No, {a} is not {b}.", "No.", others)


def calendar_tables() -> Iterator[Table]:
    """Days and months."""
    for kind, ring in (("day", DAYS), ("month", MONTHS)):
        nouns = (f"What {kind} comes {{where}} {{x}}?", f"Which {kind} comes {{where}} {{x}}?")
        more = (f"Which {kind} is {{where}} {{x}}?", f"What is the {kind} {{where}} {{x}}?")
        yield from neighbours(kind, ring, nouns + more)


TABLES = (*animal_tables(), *word_tables(), *calendar_tables(), *number_tables())


def comparison_questions(held_out: bool) -> list[Question]:
    """Which of two animals is bigger or smaller: a held-out pair is held out in every wording."""
    rank = {animal: size for size, animals in enumerate(SIZES) for animal in animals.split()}
    questions = []
    for x, y in itertools.permutations(rank, 2):
        if rank[x] == rank[y] or is_held_out(" ".join(sorted((x, y)))) != held_out:
            continue
        small, big = (with_article(animal) for animal in sorted((x, y), key=rank.__getitem__))
        a, b = with_article(x), with_article(y)
        bigger, smaller = f"{capitalised(big)} is bigger than {small}.", f"{capitalised(small)} is smaller than {big}."
        big_word, small_word = (f"{capitalised(animal.split()[1])}." for animal in (big, small))
        for word in ("Which is", "Which one is", "What is"):
            questions.append(Question("comparison", f"{word} bigger, {a} or {b}?", bigger, big_word))
            questions.append(Question("comparison", f"{word} smaller, {a} or {b}?", smaller, small_word))
    return questions


SMALL_TALK: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("Hello!", "Hi!", "Hello there!", "Hey!", "Hi there!", "Hello"), "Hello! How can I help you?", "Hello."),
    (("Good morning!", "Good morning to you!"), "Good morning! How can I help you?", "Morning."),
    (("Good evening!", "Good evening to you!"), "Good evening! How can I help you?", "Evening."),
    (("Good night!", "Sleep well!"), "Good night! Sleep well.", "Night."),
    (("How are you?", "How are you today?", "How do you do?", "How do you feel?"), "I am fine, thank you.", "Fine."),
    (("Thank you!", "Thanks!", "Thank you very much!", "Thanks a lot!"), "You are welcome!", "Welcome."),
    (("Goodbye!", "Bye!", "See you later!", "Bye bye!"), "Goodbye! Have a nice day.", "Goodbye."),
    (
        ("Who are you?", "What are you?", "Tell me about yourself.", "What is your name?", "Are you a person?"),
        "I am a tiny demo model that knows a few little things.",
        "Model.",
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?", "Help!"),
        "I can answer easy questions and tell little stories.",
        "Questions.",
    ),
)
TALK_QUESTIONS = [Question("small talk", text, *rest) for texts, *rest in SMALL_TALK for text in texts]

UNKNOWN = (
    *("What is the capital of {X}?", "Who wrote {X}?", "Who is {X}?", "When was {X} born?", "What is {x}?"),
    *("Explain {x} to me.", "Write a poem about {x}.", "How does {x} work?", "Where is {X}?", "Why is {x} so {z}?"),
    *("Tell me about {x}.", "What is the best {x} in {X}?", "How do I learn {x}?", "Can you write {x} in {X}?"),
    *("What is the meaning of {x}?", "Give me a recipe for {x}.", "I am going to {X}, what should I see?"),
    *("Translate {x} into {X}.", "How old is {X}?", "What is the difference between {x} and {z}?"),
)
ODD_WORDS = (
    "France Paris London Berlin China Shakespeare Einstein Python Java physics biology history the moon money love "
    "computers the internet a black hole mayonnaise music football politics life the universe weather taxes America "
    "the president code a function quantum mechanics chess"
)
TOPICS = re.findall(r"(?:the |a black |a |quantum )?\w+", ODD_WORDS)
SYLLABLES = words("ba ke lo mi nu par ster tion gra vel ron qua zi fo the li an or es ment ic ol u pri chi do wa ty")


def odd_word(rng: random.Random) -> str:
    """A word from outside the little world, real or made up."""
    if rng.random() < 0.4:
        return rng.choice(TOPICS)
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))


def unknown_question(rng: random.Random) -> Question:
    """A question from outside the little world, which deserves an honest answer."""
    x, capital, z = (odd_word(rng) for _ in range(3))
    text = rng.choice(UNKNOWN).format(x=x, X=capitalised(capital), z=z)
    return Question("unknown", text, "I am sorry, I do not know that.", "Sorry.")


THINGS = words("ball kite doll boat drum hat book cup bell scarf car lamp bag box flag ring")
ROOMS = words("kitchen garden garage barn bathroom school shop park attic cellar library office")
FOODS = words("apples pears cherries carrots nuts cookies plums grapes soup bread cheese cake rice honey")


def any_name(rng: random.Random) -> str:
    """A name, mostly a common one."""
    return rng.choice(NAMES if rng.random() < 0.7 else RARE_NAMES)


def some_names(rng: random.Random, count: int) -> list[str]:
    """So many different names."""
    names: set[str] = set()
    while len(names) < count:
        names.add(any_name(rng))
    return rng.sample(sorted(names), count)


def possession_question(rng: random.Random) -> Question:
    """Two people have two things: who has what, and of which colour."""
    names, things, colours = some_names(rng, 2), rng.sample(THINGS, 2), rng.sample(COLOURS, 2)
    i = rng.randrange(2)
    name, thing, colour = names[i], things[i], colours[i]
    link = rng.choice((" and ", ". "))
    story = f"{names[0]} has a {colours[0]} {things[0]}{link}{names[1]} has a {colours[1]} {things[1]}."
    asked, answer, word = rng.choice(
        (
            (f"Who has the {thing}?", f"{name} has the {thing}.", name),
            (f"What does {name} have?", f"{name} has a {colour} {thing}.", thing),
            (f"What colour is the {thing}?", f"The {thing} is {colour}.", colour),
            (f"What colour is {name}'s {thing}?", f"The {thing} is {colour}.", colour),
        )
    )
    return Question("reading", f"{story} {asked}", answer, capitalised(word) + ".")


def whereabouts_question(rng: random.Random) -> Question:
    """Two or three people are in as many rooms, or like as many foods."""
    count = rng.choice((2, 2, 3))
    names = some_names(rng, count)
    i = rng.randrange(count)
    if rng.random() < 0.5:
        rooms = rng.sample(ROOMS, count)
        story = " ".join(f"{name} is in the {room}." for name, room in zip(names, rooms, strict=True))
        answer = f"{names[i]} is in the {rooms[i]}."
        asked, word = rng.choice(
            ((f"Where is {names[i]}?", rooms[i]), (f"Who is in the {rooms[i]}?", names[i])),
        )
    else:
        foods = rng.sample(FOODS, count)
        story = " ".join(f"{name} likes {food}." for name, food in zip(names, foods, strict=True))
        answer = f"{names[i]} likes {foods[i]}."
        asked, word = rng.choice(((f"What does {names[i]} like?", foods[i]), (f"Who likes {foods[i]}?", names[i])))
    return Question("reading", f"{story} {asked}", answer, capitalised(word) + ".")


TABLE_QUESTIONS: dict[bool, dict[str, list[Question]]] = {False: {}, True: {}}
for _held_out, _by_kind in TABLE_QUESTIONS.items():
    for _table in TABLES:
        _by_kind.setdefault(_table.kind, []).extend(_table.questions(_held_out))
    _by_kind["comparison"] = comparison_questions(_held_out)

WRITERS: dict[str, tuple[Callable[[random.Random], Question], ...]] = {
    "reading": (possession_question, possession_question, whereabouts_question),
    "unknown": (unknown_question,),
}
KINDS = (*TABLE_QUESTIONS[False], *WRITERS)
WEIGHTS = {"reading": 4.0, "comparison": 2.0, "sum": 2.5, "difference": 2.0, "number": 1.5, "unknown": 1.0}


def ask(rng: random.Random, kind: str, held_out: bool) -> Question:
    """A question of this kind, from one side of the split."""
    if kind == "small talk":
        return rng.choice(TALK_QUESTIONS)
    if kind not in WRITERS:
        return rng.choice(TABLE_QUESTIONS[held_out][kind])
    while True:
        question = rng.choice(WRITERS[kind])(rng)
        if is_held_out(question.text) == held_out:
            return question


def held_out_questions(per_kind: int, seed: int = 0) -> list[Question]:
    """Up to so many held-out questions of each kind."""
    rng = random.Random(seed)
    chosen: list[Question] = []
    for kind in KINDS:
        known = TABLE_QUESTIONS[True].get(kind)
        if known:
            chosen += rng.sample(known, min(per_kind, len(known)))
        else:
            chosen += [ask(rng, kind, held_out=True) for _ in range(per_kind)]
    return chosen


# ---------------------------------------------------------------------------------------------------------- dialogs

PROPER = {*NAMES, *RARE_NAMES, *DAYS, *MONTHS, "I"}


def begin_with_well(question: Question) -> str:
    """`Well, a cow says moo.`"""
    answer = question.answer
    proper = re.split(r"\W", answer)[0] in PROPER
    return f"Well, {answer if proper else answer[0].lower() + answer[1:]}"


def end_with_friend(question: Question) -> str:
    """`A cow says moo, my friend.`"""
    return f"{question.answer[:-1]}, my friend{question.answer[-1]}"


def like_a_pirate(question: Question) -> str:
    """`Arr! A cow says moo, matey.`"""
    return f"Arr! {question.answer[:-1]}, matey{question.answer[-1]}"


@dataclass(frozen=True, slots=True)
class Style:
    """Wordings of one wish in a system prompt, and what it makes of an answer."""

    name: str
    wordings: tuple[str, ...]
    answer: Callable[[Question], str]


PLAIN = Style(
    "plain",
    (
        *("You are a helpful assistant.", "Answer with a short sentence.", "Be kind and helpful.", "Be helpful."),
        *("Answer the questions of the user.", "Answer in a full sentence.", "You are a friendly assistant."),
        "You are a helpful, respectful and honest assistant.",
    ),
    lambda question: question.answer,
)
STYLES = (
    Style(
        "capitals",
        (
            *("Answer in capital letters.", "Write in capital letters.", "Use only capital letters."),
            *("Always answer in capital letters.", "Write everything in capital letters."),
        ),
        lambda question: question.answer.upper(),
    ),
    Style(
        "one word",
        ("Answer with one word.", "Answer in one word.", "Use only one word.", "Always answer with one word."),
        lambda question: question.word,
    ),
    Style(
        "well",
        ("Begin every answer with 'Well,'.", "Start every answer with 'Well,'.", "Always begin with 'Well,'."),
        begin_with_well,
    ),
    Style(
        "my friend",
        ("End every answer with 'my friend'.", "Always end with 'my friend'.", "Call the user 'my friend'."),
        end_with_friend,
    ),
    Style(
        "polite",
        ("Answer politely.", "Be polite.", "Always be polite.", "Be very polite."),
        lambda question: f"Certainly! {question.answer}",
    ),
    Style(
        "pirate",
        ("Talk like a pirate.", "You are a pirate.", "Answer like a pirate.", "Speak like a pirate."),
        like_a_pirate,
    ),
)


def system_prompt(rng: random.Random, style: Style) -> str:
    """One wording of a style, at times after a plain sentence."""
    wording = rng.choice(style.wordings)
    return f"{rng.choice(PLAIN.wordings)} {wording}" if style is not PLAIN and rng.random() < 0.2 else wording


POLITE_FRAMES = ("Please tell me: {}", "I have a question. {}", "{} Please answer.", "Can you help me? {}", "Hello! {}")


def as_typed(rng: random.Random, text: str) -> str:
    """The question as different people type it: framed, or in small letters and without its mark."""
    chance = rng.random()
    if chance < 0.12:
        return rng.choice(POLITE_FRAMES).format(text)
    return text.lower().rstrip("?.!") if chance < 0.2 else text


@dataclass(frozen=True, slots=True)
class Remark:
    """Something that a user tells about himself, and what can be asked about it later."""

    told: Question
    asked: Question


TOLD: dict[str, tuple[tuple[str, ...], str, str, tuple[str, ...], str]] = {
    "name": (
        ("My name is {x}.", "Hello, my name is {x}.", "Hi, I am {x}.", "I am called {x}."),
        "Nice to meet you, {x}!",
        "Hello.",
        ("What is my name?", "Do you know my name?", "Can you tell me my name?", "Who am I?"),
        "Your name is {x}.",
    ),
    "colour": (
        ("My favourite colour is {x}.", "I like the colour {x} best.", "The colour that I like best is {x}."),
        "{x} is a lovely colour!",
        "Lovely.",
        ("What is my favourite colour?", "Which colour do I like best?", "Do you know my favourite colour?"),
        "Your favourite colour is {x}.",
    ),
    "pet": (
        ("I have a {y} called {x}.", "My {y} is called {x}.", "The name of my {y} is {x}."),
        "{x} is a lovely name for a {y}!",
        "Lovely.",
        ("What is my {y} called?", "What is the name of my {y}?", "Do you know the name of my {y}?"),
        "Your {y} is called {x}.",
    ),
}
PETS = words("dog cat rabbit pony parrot hamster")


def new_name(rng: random.Random) -> str:
    """A name, at times one that nobody has heard before."""
    made_up = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))
    return capitalised(made_up) if rng.random() < 0.1 else any_name(rng)


def write_remark(rng: random.Random, held_out: bool) -> Remark:
    """A remark and the question about it, as a pair on one side of the split."""
    while True:
        told, reply, reply_word, asked, answer = TOLD[rng.choice(sorted(TOLD))]
        slots = {"x": rng.choice(COLOURS) if told is TOLD["colour"][0] else new_name(rng), "y": rng.choice(PETS)}
        statement, question = rng.choice(told).format(**slots), rng.choice(asked).format(**slots)
        if is_held_out(f"{statement} {question}") == held_out:
            break
    return Remark(
        Question("remark", statement, capitalised(reply.format(**slots)), reply_word),
        Question("memory", question, answer.format(**slots), f"{capitalised(slots['x'])}."),
    )


def forgotten_question(rng: random.Random) -> Question:
    """A question about the user that nothing in the dialog answers."""
    kind, what = rng.choice((("name", "name"), ("colour", "favourite colour")))
    return Question("memory", rng.choice(TOLD[kind][3]), f"I do not know your {what}.", "Unknown.")


STORY_WISHES = (
    "Tell me a story about a {kind}.",
    "Tell me a little story about a {adjective} {kind}.",
    "Can you tell me a story about a {kind} named {hero}?",
    "Write a short story about a {adjective} {kind} named {hero}.",
    "Please tell me a story about {hero}.",
    "Tell me a story.",
)


def story_wish(rng: random.Random) -> Question:
    """The wish for a story, and a story that grants it."""
    slots = story_slots(rng)
    given = {key: slots[key] for key in ("hero", "kind", "adjective")}
    _, story = write_story(rng, held_out=False, **given)
    return Question("story", rng.choice(STORY_WISHES).format(**given), story, "")


def to_dialog(questions: list[Question], style: Style | None, rng: random.Random) -> Dialog:
    """The questions and their answers in turn, after a system prompt where there is a style."""
    dialog: Dialog = [{"role": "system", "content": system_prompt(rng, style)}] if style else []
    plain_kinds = ("small talk", "remark", "memory", "story")
    for question in questions:
        typed = question.text if question.kind in plain_kinds else as_typed(rng, question.text)
        dialog.append({"role": "user", "content": typed})
        dialog.append({"role": "assistant", "content": (style or PLAIN).answer(question)})
    return dialog


def some_questions(rng: random.Random, count: int) -> list[Question]:
    """Questions of mixed kinds from the side that training may see."""
    kinds = [*KINDS, "small talk"]
    weights = [WEIGHTS.get(kind, 1.0) for kind in kinds]
    return [ask(rng, kind, held_out=False) for kind in rng.choices(kinds, weights, k=count)]


def insert_memory(rng: random.Random, questions: list[Question]) -> list[Question]:
    """The questions with a remark among them and, somewhere after it, the question about it."""
    if rng.random() < 0.15:
        at = rng.randint(0, len(questions))
        return [*questions[:at], forgotten_question(rng), *questions[at:]]
    remark = write_remark(rng, held_out=False)
    first = rng.randint(0, len(questions))
    second = rng.randint(first, len(questions))
    return [*questions[:first], remark.told, *questions[first:second], remark.asked, *questions[second:]]


def write_dialog(rng: random.Random) -> Dialog:
    """A dialog to learn from, of one to twelve exchanges."""
    if rng.random() < 0.06:
        style = PLAIN if rng.random() < 0.3 else None
        return to_dialog([*some_questions(rng, rng.choice((0, 0, 0, 1))), story_wish(rng)], style, rng)
    length = rng.choices((1, rng.randint(2, 4), rng.randint(5, 12)), (5, 4, 1))[0]
    questions = some_questions(rng, length)
    if rng.random() < (0.08 if length == 1 else 0.5):
        questions = insert_memory(rng, questions)
    chance = rng.random()
    style = rng.choice(STYLES) if chance < 0.5 else PLAIN if chance < 0.6 else None
    return to_dialog(questions, style, rng)


def documents(seed: int, story_share: float = 0.3) -> Iterator[str | Dialog]:
    """The training corpus, without end: stories as texts, dialogs as lists of messages."""
    rng = random.Random(seed)
    while True:
        yield write_story(rng, held_out=False)[1] if rng.random() < story_share else write_dialog(rng)


@dataclass(frozen=True, slots=True)
class Case:
    """A held-out dialog that ends with the user's turn, and the one answer that is right."""

    kind: str
    style: str
    dialog: Dialog
    expected: str


def to_case(rng: random.Random, questions: list[Question], style: Style | None) -> Case:
    """The dialog of these questions without its last answer, which becomes the expected one."""
    dialog = to_dialog(questions[:-1], style, rng)
    last = questions[-1]
    dialog.append({"role": "user", "content": last.text})
    return Case(last.kind, style.name if style else "none", dialog, (style or PLAIN).answer(last))


def held_out_dialogs(per_kind: int, per_style: int, seed: int = 0) -> list[Case]:
    """Held-out questions alone and after other exchanges, without and with each style, and held-out memories."""
    rng = random.Random(seed)
    cases = [to_case(rng, [question], None) for question in held_out_questions(per_kind, seed)]
    for style, count in [(None, per_kind)] + [(style, per_style) for style in (PLAIN, *STYLES)]:
        pool = held_out_questions(per_kind, seed + 1)
        for index in range(count):
            before = some_questions(rng, index % 3)
            if index % 8 == 7:
                remark = write_remark(rng, held_out=True)
                cases.append(to_case(rng, [remark.told, *before, remark.asked], style))
            else:
                cases.append(to_case(rng, [*before, rng.choice(pool)], style))
    return cases
