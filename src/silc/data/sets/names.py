"""Class names, label numbers and colours of public benchmarks, shipped as data/names/*.json.

Gives: `ClassList`, `class_list`, `colours`.
Used by: the readers beside this file.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from silc.plain import nearest

FOLDER = Path(__file__).parents[1] / "names"


@dataclass(frozen=True)
class ClassList:
    """The classes of one benchmark in the order of its labels. First names may repeat: some benchmarks do that."""

    classes: list[list[str]]
    palette: list[list[int]]
    ids: list[int]
    """What stands for each class in the set's masks; empty for ImageNet."""
    synsets: list[str]
    """ImageNet's names of the class folders; empty for all others."""


@functools.cache
def class_list(name: str) -> ClassList:
    """A shipped list by the name of its file. ValueError if there is no such file, or it is damaged."""
    path = FOLDER / f"{name}.json"
    known = sorted(p.stem for p in FOLDER.glob("*.json"))
    if name not in known:
        raise ValueError(
            f"silc has no list of class names {name!r}: {path} is missing; known are {', '.join(known) or 'none'}."
            + nearest(name, known)
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        classes = [[c] if isinstance(c, str) else c for c in data["classes"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; install silc again.") from None
    palette = [list(bytes.fromhex(c)) for c in data["palette"]] if "palette" in data else colours(len(classes), 1)
    return ClassList(classes, palette, data.get("ids", []), data.get("synsets", []))


def colours(count: int, start: int = 0) -> list[list[int]]:
    """`count` distinct colours, the ones Pascal VOC gives its labels from `start` on; 0 is black.

    The bits of a number are dealt to red, green and blue in turn, the lowest to the highest bit of each.
    """

    def colour(label: int) -> list[int]:
        return [sum((label >> (3 * place + channel) & 1) << (7 - place) for place in range(8)) for channel in range(3)]

    return [colour(label) for label in range(start, start + count)]
