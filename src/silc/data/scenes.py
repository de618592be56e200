"""Composed scenes: named cut-outs on smooth backgrounds, with true captions and exact masks.

Gives: `Scene`, `draw_scene`, `compose`, `cutout`, `phrase` (a name with its article), the backgrounds' kinds.
Used by: data/drawings, data/emoji. Functions of a random generator, so a scene is a function of its seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]
Cutout = tuple[str, str]
"""What is drawn: the object's name and the drawing style."""
Pick = Callable[[np.random.Generator, int], list[Cutout]]
"""Chooses that many different objects."""
Placement = tuple[float, float, float]
"""Centre x, centre y and longer side of an object, as shares of the scene's side."""

COLOURS = {
    "white": (252, 252, 252), "light grey": (205, 205, 208), "grey": (140, 140, 144), "black": (24, 24, 28),
    "red": (214, 52, 52), "orange": (242, 148, 52), "yellow": (248, 216, 70), "light yellow": (252, 240, 176),
    "green": (70, 160, 78), "light green": (176, 226, 168), "dark green": (26, 92, 52), "turquoise": (70, 196, 190),
    "light blue": (168, 212, 246), "blue": (56, 112, 214), "dark blue": (28, 44, 110), "purple": (132, 72, 180),
    "pink": (248, 172, 200), "brown": (134, 90, 56), "beige": (234, 218, 190),
}  # fmt: skip
LIGHT = ("white", "light grey", "yellow", "light yellow", "light green", "turquoise", "light blue", "pink", "beige")
TRAINING = ("plain", "linear", "radial", "noise", "linear of two", "noise of two")
HELD_OUT = ("waves of two", "ripples of two")
PLACES: dict[str, Placement] = {
    "in the middle": (0.5, 0.5, 0.5), "on the left": (0.25, 0.5, 0.42), "on the right": (0.75, 0.5, 0.42),
    "at the top": (0.5, 0.25, 0.42), "at the bottom": (0.5, 0.75, 0.42),
    "in the top left corner": (0.24, 0.24, 0.38), "in the top right corner": (0.76, 0.24, 0.38),
    "in the bottom left corner": (0.24, 0.76, 0.38), "in the bottom right corner": (0.76, 0.76, 0.38),
}  # fmt: skip
ROWS = {2: ("on the left", "on the right"), 3: ("on the left", "in the middle", "on the right")}
COLUMNS = {2: ("at the top", "at the bottom"), 3: ("at the top", "in the middle", "at the bottom")}


@dataclass(frozen=True)
class Scene:
    image: Pixels
    """[S,S,3]"""
    mask: Pixels
    """[S,S]; 0 is background, i the i-th object of `objects`."""
    objects: list[Cutout]
    captions: list[str]


# ---------------------------------------------------------------- pixels


def cutout(sprite: Image.Image, side: int) -> Pixels:
    """RGBA uint8 [h,w,4] of a trimmed sprite whose longer side becomes `side` pixels."""
    scale = side / max(sprite.size)
    width, height = (max(1, round(n * scale)) for n in sprite.size)
    return np.asarray(sprite.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0))


def compose(background: Pixels, placed: Sequence[tuple[Pixels, int, int]]) -> tuple[Pixels, Pixels]:
    """Lay RGBA cut-outs (pixels, top, left) over a background [S,S,3], later ones on top.

    Returns image [S,S,3] and mask [S,S]: a pixel belongs to the last object that covers at least half of it.
    Cut-outs must lie within the background.
    """
    canvas = background.astype(np.float32)
    mask = np.zeros(background.shape[:2], np.uint8)
    for index, (rgba, top, left) in enumerate(placed, 1):
        where = np.s_[top : top + rgba.shape[0], left : left + rgba.shape[1]]
        alpha = rgba[..., 3:].astype(np.float32) / 255
        canvas[where] += alpha * (rgba[..., :3] - canvas[where])
        mask[where][rgba[..., 3] >= 128] = index
    return (canvas + 0.5).astype(np.uint8), mask


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Field, Field]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return np.broadcast_to(line, (size, size)), np.broadcast_to(line[:, None], (size, size))


def _field(kind: str, size: int, rng: np.random.Generator) -> Field:
    """[S,S] in 0 to 1: how far each pixel lies between the background's two colours."""
    x, y = _grid(size)
    angle, phase = rng.uniform(0, 2 * math.pi, 2)
    along = (x * math.cos(angle) + y * math.sin(angle)).astype(np.float32)
    if kind == "linear":
        return along / (abs(math.cos(angle)) + abs(math.sin(angle))) + np.float32(0.5)
    if kind == "noise":
        coarse = rng.uniform(-0.2, 1.2, (int(rng.integers(3, 6)),) * 2).astype(np.float32)
        fine = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        return np.clip(np.asarray(fine, np.float32), 0, 1)
    centre = rng.uniform(-0.4, 0.4, 2).astype(np.float32)
    distance = np.hypot(x - centre[0], y - centre[1])
    if kind == "radial":
        return np.minimum(distance / np.float32(0.8), 1)
    frequency = 2 * math.pi * rng.uniform(1.5, 3)
    return (0.5 + 0.5 * np.sin((along if kind == "waves" else distance) * frequency + phase)).astype(np.float32)


def draw_background(kind: str, size: int, rng: np.random.Generator) -> tuple[Pixels, str]:
    """One background [S,S,3] of a kind of `TRAINING` or `HELD_OUT`, and its colour in words (`red and grey`)."""
    shape, _, of_two = kind.partition(" ")
    names = list(rng.choice(LIGHT if kind in HELD_OUT else tuple(COLOURS), 2, replace=False))
    first, second = (np.array(COLOURS[name], np.float32) + rng.uniform(-8, 8, 3).astype(np.float32) for name in names)
    if not of_two:
        # A shade far enough to be seen, near enough to keep the colour's name.
        second = first + (np.float32(255 if first.mean() < 128 else 0) - first) * np.float32(0.22)
    field = np.zeros((size, size), np.float32) if shape == "plain" else _field(shape, size, rng)
    pixels = first + field[..., None] * (second - first)
    return np.clip(pixels, 0, 255).astype(np.uint8), " and ".join(names if of_two else names[:1])


def draw_white(size: int) -> tuple[Pixels, str]:
    return np.full((size, size, 3), 255, np.uint8), "white"


# ---------------------------------------------------------------- scenes


def draw_scene(
    rng: np.random.Generator,
    size: int,
    pick: Pick,
    sprite: Callable[[Cutout], Image.Image],
    backgrounds: Sequence[str] = TRAINING,
) -> Scene:
    """Compose one scene of `size` pixels.

    `pick(rng, n)` chooses n different objects, `sprite` gives a trimmed RGBA picture. Three in ten scenes are one big
    object; with `TRAINING` backgrounds most of those are on plain white.
    """
    layout = rng.choice(("big", "one", "two", "three"), p=(0.3, 0.15, 0.35, 0.2))
    count = {"two": 2, "three": 3}.get(str(layout), 1)
    objects = pick(rng, count)
    white = layout == "big" and tuple(backgrounds) == TRAINING and rng.random() < 0.7
    background, colour = draw_white(size) if white else draw_background(str(rng.choice(backgrounds)), size, rng)
    down = bool(rng.random() < 0.4)
    if count > 1:
        places = (COLUMNS if down else ROWS)[count]
        spots = _line(rng, count, down)
    else:
        places = ("in the middle",) if layout == "big" else (str(rng.choice(list(PLACES))),)
        x, y, side = PLACES[places[0]]
        spots = [(0.5, 0.5, rng.uniform(0.72, 0.95))] if layout == "big" else [(x, y, side * rng.uniform(0.75, 1.1))]
    placed = [_place(cutout(sprite(o), round(side * size)), x, y, size) for o, (x, y, side) in zip(objects, spots)]
    image, mask = compose(background, placed)
    names = [phrase(name) for name, _ in objects]
    return Scene(image, mask, objects, _captions(rng, names, places, colour, down, big=layout == "big"))


def _line(rng: np.random.Generator, count: int, down: bool) -> list[Placement]:
    """Objects beside (or, `down`, below) each other, each within its own band, so that none hides another."""
    spots: list[Placement] = []
    for index in range(count):
        side = rng.uniform(0.72, 0.98) / count
        along = (index + 0.5) / count + rng.uniform(-0.5, 0.5) * (1 / count - side)
        across = 0.5 + rng.uniform(-0.5, 0.5) * (0.9 - side)
        spots.append((across, along, side) if down else (along, across, side))
    return spots


def _place(rgba: Pixels, x: float, y: float, size: int) -> tuple[Pixels, int, int]:
    height, width = rgba.shape[:2]
    top = min(max(0, round(y * size - height / 2)), size - height)
    left = min(max(0, round(x * size - width / 2)), size - width)
    return rgba, top, left


# ---------------------------------------------------------------- words


def _captions(
    rng: np.random.Generator, names: list[str], places: Sequence[str], colour: str, down: bool, big: bool
) -> list[str]:
    """Three or four sentences that are all true of the scene."""
    on = f"on {_article(colour)} {colour} background"
    order = [names[i] for i in rng.permutation(len(names))]
    if len(names) == 1:
        return [names[0], f"{names[0]} {on}", f"a picture of {names[0]}" if big else f"{names[0]} {places[0]}"]
    captions = [_join(order), f"{_join(order[::-1])} {on}", _join([f"{n} {p}" for n, p in zip(names, places)])]
    first, *_, last = names
    if len(names) == 3:
        return captions + [f"{names[1]} between {first} and {last}"]
    forward, backward = ("above", "below") if down else ("to the left of", "to the right of")
    return captions + [f"{first} {forward} {last}" if rng.random() < 0.5 else f"{last} {backward} {first}"]


def _join(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1]


# How English treats the head noun of a name; anything not listed is counted and takes `a` or `an`.
SINGULAR_S = re.compile(r"(ss|us|[^k]is|os)$")
PLURALS = {"men", "women", "people", "feet", "palms"}
ONE = {"man", "woman", "person", "face"}
MASS = {
    "bacon", "badminton", "bowling", "bread", "breast-feeding", "broccoli", "butter", "camping", "construction",
    "cooking", "coral", "cream", "custard", "dna", "fire", "fog", "fondue", "food", "garlic", "hockey", "ice",
    "lacrosse", "liquid", "luggage", "milk", "oden", "polish", "pong", "popcorn", "racing", "rice", "sake",
    "salad", "salt", "soap", "spaghetti", "sushi", "tennis", "thread", "wood", "yarn", "ZZZ",
}  # fmt: skip
SIGNS = {
    "antenna bars", "Aquarius", "Aries", "baggage claim", "biohazard", "Cancer", "Capricorn", "copyright",
    "currency exchange", "customs", "divide", "Gemini", "high voltage", "hundred points", "infinity",
    "information", "left luggage", "Leo", "Libra", "minus", "multiply",
    "non-potable water", "om", "Ophiuchus", "passport control", "Pisces", "plus", "potable water", "prohibited",
    "radioactive", "registered", "Sagittarius", "Scorpio", "Taurus", "trade mark", "vibration mode", "Virgo",
    "warning", "wireless",
}  # fmt: skip
"""Names of signs that do not say so: `a warning` is drawn as a warning sign."""
AS_IS = {"Santa Claus", "Mrs. Claus", "Mx Claus", "mount fuji"}
UNIQUE = {"Statue of Liberty", "Tokyo tower", "milky way", "sun", "performing arts", "kaaba"}
CONSONANT_SOUND = re.compile(r"^(eu|ewe|uni[^nm]|one)")
VOWEL_SOUND = re.compile(r"^([aeiou]|hour|x-|ng |sos )")
HEAD_ENDS = re.compile(r" (with|of|in|on|for|at|behind|over|without|showing|tilted|pointing|curving|by|and) ")
THE = re.compile(
    r"^(United|European|Isle of|British Indian|French Southern|Turks|Cocos|U\.S\.)"
    r"|^[^&]*(Islands|Republic|Netherlands|Bahamas|Philippines|Gambia|Maldives|Seychelles|Comoros|Territories)$"
)


def phrase(name: str) -> str:
    """A name as it stands in a sentence: `an apple`, `two hearts`, `the flag of the Bahamas`, `a no smoking sign`."""
    if name.startswith("flag of "):
        country = name[len("flag of ") :]
        return f"the flag of {'the ' if THE.search(country) else ''}{country}"
    if name.endswith(("o'clock", "-thirty")):
        return f"a clock showing {name}"
    if name.startswith("no ") or name in SIGNS:
        return f"{_article(name)} {name} sign"
    if name in UNIQUE:
        return f"the {name}"
    first, head = name.split()[0], HEAD_ENDS.split(name)[0].split()[-1]
    plural = first in PLURALS or (head.endswith("s") and not SINGULAR_S.search(head))
    if first not in ONE and (plural or head in MASS or name in AS_IS):
        return name
    return f"{_article(name)} {name}"


def _article(name: str) -> str:
    lower = name.lower()
    return "an" if VOWEL_SOUND.search(lower) and not CONSONANT_SOUND.search(lower) else "a"
