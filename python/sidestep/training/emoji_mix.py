"""Which training pictures the bundled emoji model sees: plain, moved, coloured and collages.

The compositions make the model learn what a colour word or `on a` does to any picture, instead of
memorising one picture a caption. Captions that would give away the test prompts never occur.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sidestep.errors import UserError
from sidestep.training.emoji_data import (
    PALETTE,
    SIDE,
    Emoji,
    Example,
    HeldOut,
    features,
    mean_colour,
    moved,
    on_white,
    place,
    recolour,
    words,
)

NATURE, FOOD, TRAVEL = "Animals & Nature", "Food & Drink", "Travel & Places"
SMILEYS = "Smileys & Emotion"
THINGS = {NATURE, FOOD, TRAVEL, SMILEYS, "Activities", "Objects"}
COLOUR_WORDS = {*PALETTE, "gray", "light", "dark", "magenta", "cyan", "gold", "silver"}
RIDDEN = {"transport-ground", "transport-air", "transport-water"}
CARRIED = {"musical-instrument", "sport", "drink", "plant-flower"}
CARRIED |= {"food-fruit", "food-prepared", "food-sweet"}
FACES = {
    "grinning face",
    "smiling face with open mouth",
    "smiling face with smiling eyes",
    "slightly smiling face",
    "smiling face with sunglasses",
}
RELATIONS = {"and": 0.25, "on": 0.25, "with": 0.25, "face": 0.15, "made of": 0.10}


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How many pictures are composed, and of what.

    Attributes:
        held_out: The test prompts.
        focus: Names of the emoji that compositions use three times in four.
        coloured: Recoloured emoji, such as `blue fox face`.
        collages: Two emoji in one picture, or one with a face, such as `fox face on a bus`.
        seed: Of the random choices.
    """

    held_out: HeldOut
    focus: frozenset[str] = frozenset()
    coloured: int = 5000
    collages: int = 5000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class _Composed:
    caption: str
    picture: np.ndarray  # [64, 64, 4]
    sources: tuple[Emoji, ...]


class _Stock:
    """The emoji that compositions are made of, and the random choices among them."""

    def __init__(self, emoji: Sequence[Emoji], focus: frozenset[str], rng: np.random.Generator):
        self.things = [one for one in emoji if _is_thing(one)]
        self.objects = [one for one in self.things if one.category != SMILEYS]
        self.faces = [one for one in emoji if one.name in FACES]
        self.focus, self.rng = focus, rng

    def pick(self, pool: Sequence[Emoji]) -> Emoji:
        """A random emoji; three times in four one of the focus set, where the pool has one."""
        narrow = [one for one in pool if one.name in self.focus] if self.rng.random() < 0.75 else []
        pool = narrow or pool
        return pool[int(self.rng.integers(len(pool)))]

    def say(self, one: Emoji) -> str:
        """The name, or one of the aliases people type (`panda face`, `panda`)."""
        names = (one.name, *(alias for alias in one.aliases if not words(alias) & COLOUR_WORDS))
        plain = self.rng.random() < 0.6
        chosen = names[0] if plain else names[int(self.rng.integers(len(names)))]
        return chosen.removesuffix(" face") if self.rng.random() < 0.25 else chosen


def _is_thing(one: Emoji) -> bool:
    plain = not words(one.name) & COLOUR_WORDS and len(one.name.split()) <= 4
    return plain and one.category in THINGS and one.subcategory not in {"heart", "emotion", "time"}


def build_examples(emoji: Sequence[Emoji], mix: Mix) -> list[Example]:
    """Every emoji plain and twice moved, then the recoloured ones, then the collages.

    Raises:
        UserError: The emoji do not allow as many compositions as the mix asks for.
    """
    rng = np.random.default_rng(mix.seed)
    examples = _plain(emoji, mix, rng)
    stock = _Stock(emoji, mix.focus, rng)
    examples += _compose("coloured", mix.coloured, _coloured, stock, mix.held_out)
    examples += _compose("collage", mix.collages, _collage, stock, mix.held_out)
    if not examples:
        raise UserError("training: the data hold no emoji that is not held out")
    assert not any(mix.held_out.gives_away(example.caption) for example in examples)
    return examples


def _plain(emoji: Sequence[Emoji], mix: Mix, rng: np.random.Generator) -> list[Example]:
    examples = []
    for one in emoji:
        if mix.held_out.gives_away(one.name):
            continue
        picture, focus = on_white(one.picture), one.name in mix.focus
        examples.append(Example(caption=one.name, group="plain", picture=picture, focus=focus))
        aliases = [name for name in one.aliases if not mix.held_out.gives_away(name)]
        for name in (one.name, (aliases or [one.name])[0]):
            picture = on_white(moved(one.picture, rng))
            examples.append(Example(caption=name, group="moved", picture=picture, focus=focus))
    return examples


def _compose(
    group: str,
    count: int,
    make: Callable[[_Stock], _Composed | None],
    stock: _Stock,
    held_out: HeldOut,
) -> list[Example]:
    examples: list[Example] = []
    attempts = 20 * count if stock.objects else 0
    for _ in range(attempts):
        if len(examples) == count:
            break
        made = make(stock)
        if made is None or held_out.gives_away(made.caption, made.sources):
            continue
        picture = on_white(made.picture)
        examples.append(Example(caption=made.caption, group=group, picture=picture))
    if len(examples) < count:
        raise UserError(
            f"training: the emoji allow only {len(examples)} {group} pictures, expected {count}"
        )
    return examples


def _coloured(stock: _Stock) -> _Composed:
    one = stock.pick(stock.things)
    colour = list(PALETTE)[int(stock.rng.integers(len(PALETTE)))]
    name = one.name if stock.rng.random() < 0.7 else stock.say(one)
    picture = recolour(one.picture, colour)
    return _Composed(caption=f"{colour} {name}", picture=picture, sources=(one,))


def _collage(stock: _Stock) -> _Composed | None:
    """Two emoji in one of the relations, or one with a face; None where the draw does not fit."""
    objects, rng = stock.objects, stock.rng
    relation = rng.choice(list(RELATIONS), p=list(RELATIONS.values()))
    beings = [one for one in objects if one.category == NATURE]
    first = stock.pick(beings if rng.random() < 0.7 and beings else objects)
    if relation == "face":
        return _with_face(stock.pick(objects), stock) if stock.faces else None
    pool = {
        "and": objects,
        "on": [one for one in objects if one.subcategory in RIDDEN],
        "with": [one for one in objects if one.subcategory in CARRIED],
        "made of": [one for one in objects if one.category == TRAVEL],
    }[relation]
    second = stock.pick(pool or objects)
    if second.name == first.name:
        return None
    a, b = stock.say(first), stock.say(second)
    if relation == "made of" and first.category not in (FOOD, NATURE):
        return None
    if relation == "on":
        relation = rng.choice(["on a", "on", "in a"], p=[0.6, 0.2, 0.2])
    joined = f"{a} {b}" if relation == "made of" else f"{a} {relation} {b}"
    picture = _arrange(relation, first.picture, second.picture)
    return _Composed(caption=joined, picture=picture, sources=(first, second))


def _arrange(
    relation: str,
    first: np.ndarray,  # [64, 64, 4]
    second: np.ndarray,  # [64, 64, 4]
) -> np.ndarray:  # [64, 64, 4]
    """Side by side; the first riding the second; carrying it small; or as a badge in its colour."""
    canvas = np.zeros((SIDE, SIDE, 4), np.float32)
    if relation == "and":
        place(canvas, first, 34, -1, 10)
        place(canvas, second, 34, 31, 20)
    elif relation == "with":
        place(canvas, first, 52, 0, 0)
        place(canvas, second, 32, 31, 31)
    elif relation == "made of":
        canvas = recolour(second, mean_colour(first))
        place(canvas, first, 28, 18, 22)
    else:
        place(canvas, second, 46, 9, 18)
        place(canvas, first, 34, 15, 0)
    return canvas


def _with_face(one: Emoji, stock: _Stock) -> _Composed:
    """The thing with the eyes and mouth of a face emoji drawn over its middle."""
    face = stock.faces[int(stock.rng.integers(len(stock.faces)))]
    canvas = one.picture.copy()
    place(canvas, features(face.picture), 44, 10, 12)
    name = stock.say(one)
    if "sunglasses" in face.name:
        caption = f"{name} with sunglasses"
    else:
        caption = (f"smiling {name}", f"{name} with face")[int(stock.rng.integers(2))]
    return _Composed(caption=caption, picture=canvas, sources=(one,))
