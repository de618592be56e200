"""What all readers of labelled sets do: choose a split, list folders, read tables, JSON and templates.

Gives: `Reader` (one published layout), `pick` and `unsplit` (splits), `check_classes`, and small readers of files.
Used by: the readers beside this file, data/labelled.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from PIL import Image, UnidentifiedImageError

from silc.data.images import FORMATS
from silc.plain import nearest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
ORIENTATION = 0x0112
"""EXIF tag; values from 5 on swap width and height."""
TEST_FIRST = ("test", "val", "train")
VAL_FIRST = ("val", "test", "train")
"""For sets whose test labels are kept secret or are blank."""

T = TypeVar("T")


class Reader(NamedTuple, Generic[T]):
    """One published layout."""

    kinds: tuple[str, ...]
    """Names a user may ask for; the reader takes the first that the folder allows if none is asked for."""
    layout: str
    """In words, for messages."""
    mine: Callable[[Path], bool]
    """Cheap: looks at names, not into files."""
    open: Callable[[Path, str | None, str | None], T]
    """(folder or file, split, kind)"""


def canonical_split(name: str) -> str:
    stem = re.sub(r"\d+$", "", name.lower())
    return {"validation": "val", "valid": "val", "training": "train", "testing": "test"}.get(stem, stem)


def is_split(name: str) -> bool:
    return canonical_split(name) in TEST_FIRST


def pick(where: Path, found: Iterable[str], wanted: str | None, order: tuple[str, ...] = TEST_FIRST) -> str:
    """The split that is meant: `val` finds `val2017` and `validation`; None takes the first of `order` that is there.

    ValueError names the splits found.
    """
    have = sorted(set(found), reverse=True)
    listed = ", ".join(sorted(have)) or "none"
    if wanted in have:
        return str(wanted)
    if wanted is not None:
        same = [name for name in have if canonical_split(name) == canonical_split(wanted)]
        if len(same) == 1:
            return same[0]
        if len(same) > 1:
            raise ValueError(f"{where} has the splits {listed}; say which {wanted!r} is meant.")
        raise ValueError(f"{where} has no split {wanted!r}; it has: {listed}." + nearest(wanted, have))
    for name in order:
        for split in have:
            if canonical_split(split) == name:
                return split
    if len(have) == 1:
        return have[0]
    raise ValueError(f"{where} has the splits {listed}; say which one is meant.")


def unsplit(folder: Path, wanted: str | None) -> tuple[str, str]:
    """(name, split) of a folder that is not divided; one that lies in a folder named `test` is called by its parent."""
    whole = folder.resolve()
    split = whole.name if is_split(whole.name) else ""
    if wanted is not None and canonical_split(wanted) != canonical_split(split):
        raise ValueError(f"{folder} is not divided into splits, so it has no {wanted!r}; leave the split out.")
    return (whole.parent.name if split else whole.name), split


# ---------------------------------------------------------------- folders and files


def check_classes(classes: list[list[str]], where: Path) -> None:
    if not classes:
        raise ValueError(f"{where} names no class.")
    seen: set[str] = set()
    for names in classes:
        if not names or not names[0].strip():
            raise ValueError(f"{where}: a class has no name.")
        if names[0].casefold() in seen:
            raise ValueError(f"{where}: two classes are named {names[0]!r}; give each its own first name.")
        seen.add(names[0].casefold())


def subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def pictures_of(masks: list[Path], picture: Callable[[Path], Path], where: Path) -> tuple[list[Path], list[Path]]:
    """(pictures, masks) where the masks of `where` say which pictures there are; ValueError for a missing picture."""
    if not masks:
        raise ValueError(f"{where} holds no masks.")
    paths = [picture(mask) for mask in masks]
    for path, mask in zip(paths, masks):
        if not path.is_file():
            raise ValueError(f"{mask} has no picture: {path} does not exist.")
    return paths, masks


def first_existing(*places: Path) -> Path | None:
    return next((place for place in places if place.exists()), None)


def same_size(image: Path, mask: Path, mask_size: tuple[int, int]) -> None:
    """ValueError unless a mask of (width, height) covers its picture."""
    width, height = size(image)
    if (width, height) != mask_size:
        w, h = mask_size
        raise ValueError(f"{mask} is {w} x {h} pixels, but its image is {width} x {height}.")


def size(path: Path, formats: tuple[str, ...] = FORMATS) -> tuple[int, int]:
    """Width and height as decoded, from the header alone."""
    try:
        with Image.open(path, formats=formats) as picture:
            width, height = picture.size
            return (height, width) if picture.getexif().get(ORIENTATION, 1) >= 5 else (width, height)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}).") from None


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or type(error).__name__}).") from None


def lines_of(path: Path) -> list[str]:
    return [line.strip() for line in text_of(path).splitlines() if line.strip()]


def json_object(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error}).") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold a JSON object, not {type(data).__name__}.")
    return data


def rows_of(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a .jsonl or .csv table; ValueError if a CSV lacks one of `columns`."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(text_of(path).split("\n"), 1):
            if line.strip():
                yield f"{path}, line {number}", json_object(line, f"{path}, line {number}")
        return
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""))
    for column in columns:
        if reader.fieldnames and column not in reader.fieldnames:
            raise ValueError(f"{path} has no column {column!r}." + nearest(column, reader.fieldnames))
    try:
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not readable CSV ({error}).") from None


def templates_of(path: Path) -> list[str] | None:
    """Prompts of a templates.txt, one a line; `{c}`, as CLIP_benchmark writes it, counts as `{}`."""
    if not path.exists():
        return None
    lines = [line.replace("{c}", "{}") for line in lines_of(path)]
    for line in lines:
        if line.count("{}") != 1:
            raise ValueError(f"{path}: the template {line!r} needs exactly one {{}} for the class name.")
    return lines or None
