"""The pictures that the demo has of its own, drawn here from simple shapes, so that nothing has to be brought along.

Gives: Example, EXAMPLES, draw.
Used by: app/demo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

Point = tuple[float, float]

SIDE, FINE = 480, 3
"""Height of a picture in pixels; how many times larger it is drawn, so that its edges are smooth."""


@dataclass(frozen=True)
class Shape:
    """One filled shape of an object in a box of 100 x 100: an `ellipse` or `box` by two corners, or a `polygon`."""

    kind: str
    colour: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Example:
    """A picture, and texts to try on it."""

    name: str
    sky: str
    ground: str
    width: float
    """In heights of the picture."""
    placed: tuple[tuple[str, float, float, float], ...]
    """Object, centre x and y, side: in heights of the picture."""
    texts: str
    labels: str


def ellipse(colour: str, left: float, top: float, right: float, bottom: float) -> Shape:
    return Shape("ellipse", colour, ((left, top), (right, bottom)))


def box(colour: str, left: float, top: float, right: float, bottom: float) -> Shape:
    return Shape("box", colour, ((left, top), (right, bottom)))


def polygon(colour: str, *points: Point) -> Shape:
    return Shape("polygon", colour, points)


def star(colour: str, corners: int, outer: float, inner: float, x: float = 50, y: float = 50) -> Shape:
    """Corners in turns far from the centre and near it."""
    turns = [(math.pi * i / corners - math.pi / 2, (outer, inner)[i % 2]) for i in range(2 * corners)]
    return polygon(colour, *((x + r * math.cos(a), y + r * math.sin(a)) for a, r in turns))


def crescent(colour: str) -> Shape:
    outer = [(50 + 44 * math.cos(a), 50 + 44 * math.sin(a)) for a in _turns(50, 310)]
    inner = [(66 + 35 * math.cos(a), 50 + 35 * math.sin(a)) for a in _turns(285, 75)]
    return polygon(colour, *outer, *inner)


def _turns(start: float, end: float, steps: int = 40) -> list[float]:
    return [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]


def half(colour: str, x: float, y: float, radius: float, start: float = 180, end: float = 360) -> Shape:
    """A part of a disc, by default its upper half."""
    return polygon(colour, *((x + radius * math.cos(a), y + radius * math.sin(a)) for a in _turns(start, end)))


SEEDS = ((36, 52), (50, 46), (64, 52), (42, 66), (58, 66), (50, 80), (30, 40), (70, 40), (44, 34), (58, 34))
OBJECTS: dict[str, Sequence[Shape]] = {
    "sun": (star("#f9b233", 12, 48, 33), ellipse("#fdd44b", 22, 22, 78, 78)),
    "tree": (
        box("#7a4a28", 43, 58, 57, 98), ellipse("#2f8f46", 8, 30, 60, 74), ellipse("#2f8f46", 40, 30, 92, 74),
        ellipse("#3aa655", 20, 4, 80, 58),
    ),
    "house": (
        box("#b5523b", 68, 12, 80, 40), box("#f1dfc0", 14, 46, 86, 96), polygon("#c8412f", (4, 50), (50, 10), (96, 50)),
        box("#7a4a28", 42, 66, 58, 96), box("#6db7e8", 21, 58, 36, 74), box("#6db7e8", 64, 58, 79, 74),
    ),
    "panda": (
        ellipse("#26262b", 6, 4, 38, 36), ellipse("#26262b", 62, 4, 94, 36), ellipse("#f7f6f4", 8, 12, 92, 94),
        ellipse("#26262b", 22, 38, 44, 66), ellipse("#26262b", 56, 38, 78, 66), ellipse("#ffffff", 30, 46, 40, 56),
        ellipse("#ffffff", 60, 46, 70, 56), ellipse("#26262b", 42, 66, 58, 77), half("#c8566a", 50, 78, 9, 0, 180),
    ),
    "strawberry": (
        ellipse("#d92b3a", 10, 16, 56, 66), ellipse("#d92b3a", 44, 16, 90, 66),
        polygon("#d92b3a", (12, 50), (30, 24), (70, 24), (88, 50), (68, 80), (50, 97), (32, 80)),
        *(ellipse("#f6d37a", x - 2, y - 3, x + 2, y + 3) for x, y in SEEDS), star("#4f9e3c", 6, 27, 9, 50, 19),
    ),
    "sunflower": (
        box("#3a8f45", 47, 60, 53, 100), ellipse("#4cab57", 53, 76, 82, 88), ellipse("#4cab57", 18, 82, 47, 94),
        star("#f2b01e", 16, 40, 25, 50, 40), star("#fbcf3b", 13, 36, 24, 50, 40), ellipse("#5b3a1e", 33, 23, 67, 57),
        ellipse("#7a5230", 39, 29, 61, 51),
    ),
    "fish": (
        polygon("#e8772e", (68, 50), (98, 22), (92, 50), (98, 78)), polygon("#e8772e", (38, 30), (52, 8), (66, 34)),
        ellipse("#f6953b", 4, 22, 80, 78), box("#fff3e0", 36, 24, 44, 76), ellipse("#ffffff", 13, 36, 28, 51),
        ellipse("#3b2a24", 17, 40, 25, 48),
    ),
    "sailboat": (
        box("#6b4226", 48, 4, 52, 74), polygon("#ffffff", (54, 8), (54, 68), (92, 68)),
        polygon("#f3c94b", (46, 18), (46, 68), (14, 68)), polygon("#b23a2e", (6, 74), (96, 74), (80, 94), (22, 94)),
    ),
    "cloud": (
        ellipse("#ffffff", 4, 42, 44, 82), ellipse("#ffffff", 24, 22, 70, 78), ellipse("#ffffff", 56, 38, 96, 82),
        box("#ffffff", 24, 60, 76, 82),
    ),
    "star": (star("#f7c52d", 5, 48, 20, 50, 53),),
    "moon": (crescent("#f6d860"),),
    "mushroom": (
        ellipse("#f3e6d2", 34, 44, 66, 96), half("#d62f2f", 50, 56, 46), ellipse("#d62f2f", 4, 46, 96, 66),
        ellipse("#ffffff", 22, 30, 38, 44), ellipse("#ffffff", 48, 16, 64, 30), ellipse("#ffffff", 66, 36, 80, 48),
    ),
    "balloon": (
        box("#8a8a94", 49, 78, 51, 100), polygon("#1f78d1", (44, 82), (56, 82), (50, 70)),
        ellipse("#2f8ce8", 18, 2, 82, 76), ellipse("#9fd0fa", 30, 12, 44, 32),
    ),
}  # fmt: skip
"""Each from back to front."""

EXAMPLES = (
    Example("A sunflower", "#cfe9f7", "#7fb85f", 1.0, (("sunflower", 0.5, 0.5, 0.92),),
            "a sunflower, the sky, grass", "sunflower, sky, grass"),
    Example("A panda and a strawberry", "#f5e9d0", "#f5e9d0", 4 / 3,
            (("panda", 0.36, 0.5, 0.6), ("strawberry", 0.98, 0.5, 0.56)),
            "a panda, a strawberry", "panda, strawberry"),
    Example("A house by a tree", "#bfe3f5", "#8fc66b", 4 / 3,
            (("sun", 0.22, 0.24, 0.34), ("house", 0.94, 0.6, 0.62), ("tree", 0.42, 0.66, 0.5)),
            "a house, a tree, the sun", "house, tree, sun, sky"),
    Example("At sea", "#cdeafa", "#4fa3d9", 4 / 3,
            (("sailboat", 0.42, 0.42, 0.6), ("fish", 0.98, 0.84, 0.28), ("cloud", 1.0, 0.24, 0.36)),
            "a sailboat, a fish, a cloud", "sailboat, fish, cloud, sea"),
    Example("At night", "#28306b", "#28306b", 4 / 3,
            (("moon", 0.34, 0.42, 0.5), ("star", 0.98, 0.32, 0.36), ("star", 0.76, 0.76, 0.24)),
            "the moon, a star", "moon, star, sun"),
    Example("A mushroom and a balloon", "#fdf6e3", "#fdf6e3", 4 / 3,
            (("mushroom", 0.36, 0.54, 0.6), ("balloon", 0.98, 0.48, 0.66)),
            "a mushroom, a balloon", "mushroom, balloon, panda"),
)  # fmt: skip


def draw(example: Example) -> Image.Image:
    """The picture: its sky, its ground from 72% of the height on, and its objects, the last in front."""
    height = SIDE * FINE
    width = round(example.width * height)
    canvas = Image.new("RGB", (width, height), example.sky)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, round(0.72 * height), width, height), fill=example.ground)
    for name, x, y, side in example.placed:
        for shape in OBJECTS[name]:
            points = [(height * (x + side * (u / 100 - 0.5)), height * (y + side * (v / 100 - 0.5)))
                      for u, v in shape.points]  # fmt: skip
            _fill(pen, shape, points)
    return canvas.resize((width // FINE, SIDE), Image.Resampling.LANCZOS)


def _fill(pen: ImageDraw.ImageDraw, shape: Shape, points: list[Point]) -> None:
    if shape.kind == "polygon":
        pen.polygon(points, fill=shape.colour)
    elif shape.kind == "ellipse":
        pen.ellipse([*points[0], *points[1]], fill=shape.colour)
    else:
        pen.rectangle([*points[0], *points[1]], fill=shape.colour)
