"""Labelled sets for evaluation: pictures with classes, with captions, or with masks, in plain folders.

Gives: `Labelled`, `Captioned`, `Masked` and `open_classification`, `open_captioned`, `open_masked`.
Used by: the evaluation tasks, the segmentation trainer. Every mistake in a set is a one-sentence ValueError.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from silc.config import DataConfig, nearest
from silc.data.images import FORMATS, BadSample, decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
MASK_KEYS = ("classes", "background", "void", "palette")
ORIENTATION = 0x0112
"""EXIF tag; values from 5 on swap width and height."""
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
"""Pillow modes of a PNG with one channel: class indices (a palette PNG's indices, too)."""


@dataclass(frozen=True)
class Labelled:
    """Pictures of classes. `classes[c]` holds the names of class c, the canonical one first; a label is such a c."""

    name: str
    classes: list[list[str]]
    paths: list[Path]
    labels: list[int]
    templates: list[str] | None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        """uint8 [3,H,W]; ValueError names an unreadable file."""
        return _read(self.paths[index])


@dataclass(frozen=True)
class Captioned:
    """Pictures with one or more captions each."""

    name: str
    paths: list[Path]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        """uint8 [3,H,W]; ValueError names an unreadable file."""
        return _read(self.paths[index])


@dataclass(frozen=True)
class Masked:
    """Pictures with a class index per pixel. `background`: class 0 is everything else; `void` is not counted."""

    name: str
    classes: list[list[str]]
    background: bool
    void: int | None
    paths: list[Path]
    mask_paths: list[Path]
    palette: list[list[int]] | None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        """uint8 [3,H,W]; ValueError names an unreadable file."""
        return _read(self.paths[index])

    def mask(self, index: int) -> Tensor:
        """int64 [H,W] of class indices and `void`. ValueError names the file and the value that is neither."""
        path = self.mask_paths[index]
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                mode, values = picture.mode, np.asarray(picture).astype(np.int64)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as a PNG mask ({error}).") from None
        if mode not in INDEX_MODES:
            raise ValueError(f"{path} is a {mode} picture; a mask needs one channel of class indices.")
        known = (values >= 0) & (values < len(self.classes))
        if self.void is not None:
            known |= values == self.void
        if not known.all():
            raise ValueError(
                f"{path} holds the value {int(values[~known][0])}, but the set has classes 0 to {len(self.classes) - 1}"
                f" and {'no void value' if self.void is None else f'void {self.void}'}; fix the mask or classes.json."
            )
        return torch.from_numpy(values)


def open_classification(folder: Path | str) -> Labelled:
    """Open `CLASS/*.png|jpg|webp`.

    `classes.txt`, if there, gives order and names: `folder<TAB>name, synonym` or just `folder` a line; without it the
    folders are sorted and named after themselves with `_` as a space. `templates.txt` holds a prompt with `{}` a line.
    Raises ValueError for a set without classes or pictures, repeated names, or folders and list that disagree.
    """
    folder = _existing(folder)
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    listing = folder / "classes.txt"
    listed = listing.exists()
    names = dict(_class_lines(listing)) if listed else {name: [name.replace("_", " ")] for name in found}
    if not names:
        raise ValueError(f"{listing if listed else folder} names no class; give each class a folder of pictures.")
    for missing in sorted(set(names) - set(found)):
        hint = nearest(missing, found) if found else ""
        raise ValueError(f"{listing} lists {missing!r}, but {folder} has no such folder.{hint}")
    for extra in sorted(set(found) - set(names)):
        raise ValueError(f"{folder / extra} is not listed in {listing.name}; add a line for it or move it away.")
    classes = list(names.values())
    _check_classes(classes, listing if listed else folder)
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        pictures = _pictures(folder / name)
        paths += pictures
        labels += [label] * len(pictures)
    if not paths:
        raise ValueError(f"{folder} holds no pictures; put them in its class folders as {', '.join(SUFFIXES)}.")
    return Labelled(folder.name, classes, paths, labels, _templates(folder / "templates.txt"))


def _class_lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    seen: set[str] = set()
    for number, line in enumerate(_text(path).splitlines(), 1):
        folder, tab, text = line.partition("\t")
        folder = folder.strip()
        if not folder:
            continue
        if folder in seen:
            raise ValueError(f"{path}, line {number}: the folder {folder!r} is listed twice.")
        seen.add(folder)
        names = [name.strip() for name in text.split(",") if name.strip()] if tab else [folder.replace("_", " ")]
        yield folder, names


def _templates(path: Path) -> list[str] | None:
    if not path.exists():
        return None
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    for line in lines:
        if line.count("{}") != 1:
            raise ValueError(f"{path}: the template {line!r} needs exactly one {{}} for the class name.")
    return lines or None


def open_captioned(location: Path | str) -> Captioned:
    """Open a folder with `captions.jsonl` or `captions.csv`, or such a file itself.

    A row has `image`, a path relative to the file, and `caption`, a text or (JSON) a list of texts; rows of the same
    image are joined. Raises ValueError for a file without rows, a row without a caption, or one whose image is missing.
    """
    path = _existing(location)
    if path.is_dir():
        found = [path / name for name in ("captions.jsonl", "captions.csv") if (path / name).exists()]
        if not found:
            raise ValueError(f"{path} has neither captions.jsonl nor captions.csv.")
        path = found[0]
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path} must be a folder, a .jsonl or a .csv file of captions.")
    captions: dict[str, list[str]] = {}
    for place, row in _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path):
        image, texts = row.get("image"), row.get("caption")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(image, str) or not image:
            raise ValueError(f"{place}: the row has no `image`.")
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"{place}: the row has no `caption`: a text or a list of texts, none of them empty.")
        if image not in captions and not (path.parent / image).is_file():
            raise ValueError(f"{place}: the image {path.parent / image} does not exist.")
        captions.setdefault(image, []).extend(texts)
    if not captions:
        raise ValueError(f"{path} has no rows; each needs `image` and `caption`.")
    name = path.parent.resolve().name if path.stem == "captions" else path.stem
    return Captioned(name, [path.parent / image for image in captions], list(captions.values()))


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _json_object(line, place)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    for column in ("image", "caption"):
        if reader.fieldnames and column not in reader.fieldnames:
            raise ValueError(f"{path} has no column {column!r}." + nearest(column, reader.fieldnames))
    for row in reader:
        yield f"{path}, line {reader.line_num}", row


def open_masked(folder: Path | str) -> Masked:
    """Open `images/`, `masks/` (a PNG of class indices with the image's stem) and `classes.json`.

    `classes.json` holds `classes` (names, or lists of a name and its synonyms) and optionally `background` (class 0 is
    everything else), `void` (a value that is not counted) and `palette` (a colour per class, for display).
    Raises ValueError for a missing mask, a mask of another size than its image, or a wrong class list. Mask values are
    checked when a mask is read.
    """
    folder = _existing(folder)
    for part in ("images", "masks", "classes.json"):
        if not (folder / part).exists():
            raise ValueError(f"{folder} has no {part}; a masked set is images/, masks/ and classes.json.")
    classes, background, void, palette = _mask_classes(folder / "classes.json")
    paths = _pictures(folder / "images")
    if not paths:
        raise ValueError(f"{folder / 'images'} holds no pictures ({', '.join(SUFFIXES)}).")
    masks = [folder / "masks" / f"{path.stem}.png" for path in paths]
    for path, mask in zip(paths, masks):
        if not mask.is_file():
            raise ValueError(f"{path} has no mask: {mask} does not exist.")
        size, mask_size = _size(path), _size(mask)
        if size != mask_size:
            (width, height), (w, h) = size, mask_size
            raise ValueError(f"{mask} is {w} x {h} pixels, but its image is {width} x {height}.")
    return Masked(folder.name, classes, background, void, paths, masks, palette)


def _mask_classes(path: Path) -> tuple[list[list[str]], bool, int | None, list[list[int]] | None]:
    data = _json_object(_text(path), str(path))
    for key in data:
        if key not in MASK_KEYS:
            raise ValueError(f"{path}: unknown key {key!r}." + nearest(key, MASK_KEYS))
    raw = data.get("classes")
    if not isinstance(raw, list) or not all(isinstance(c, str) or (isinstance(c, list) and c) for c in raw):
        raise ValueError(f"{path}: `classes` must be a list of names, or of lists of a name and its synonyms.")
    classes = [[c] if isinstance(c, str) else [str(name) for name in c] for c in raw]
    _check_classes(classes, path)
    background, void, palette = data.get("background", False), data.get("void"), data.get("palette")
    if not isinstance(background, bool):
        raise ValueError(f"{path}: `background` must be true or false, not {background!r}.")
    if void is not None and (isinstance(void, bool) or not isinstance(void, int) or 0 <= void < len(classes)):
        raise ValueError(f"{path}: `void` must be null or a whole number that is no class index, not {void!r}.")
    if palette is not None and not (
        isinstance(palette, list)
        and len(palette) == len(classes)
        and all(isinstance(c, list) and len(c) == 3 and all(v in range(256) for v in c) for c in palette)
    ):
        raise ValueError(f"{path}: `palette` must be null or one colour [r, g, b] of 0 to 255 for each class.")
    return classes, background, void, palette


# ---------------------------------------------------------------- shared


def _check_classes(classes: list[list[str]], where: Path) -> None:
    if not classes:
        raise ValueError(f"{where} names no class.")
    seen: set[str] = set()
    for names in classes:
        if not names or not names[0].strip():
            raise ValueError(f"{where}: a class has no name.")
        if names[0].casefold() in seen:
            raise ValueError(f"{where}: two classes are named {names[0]!r}; give each its own first name.")
        seen.add(names[0].casefold())


def _existing(location: Path | str) -> Path:
    path = Path(location)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    return path


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _read(path: Path) -> Tensor:
    try:
        return decode(path.read_bytes(), DataConfig().max_pixels)
    except BadSample as error:
        raise ValueError(f"{path} cannot be read as a picture ({error.cause}).") from None


def _size(path: Path) -> tuple[int, int]:
    """Width and height as decoded, from the header alone."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
            return (height, width) if picture.getexif().get(ORIENTATION, 1) >= 5 else (width, height)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}).") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error}).") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where} must hold a JSON object, not {type(data).__name__}.")
    return data
