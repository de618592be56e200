"""Segmentation sets of one's own: pictures and masks in parallel folders, an index file, CamVid's SegNet folders.

Gives: `READERS`.
Used by: data/labelled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from silc.data.sets.common import Masked, void_for
from silc.data.sets.files import (
    SUFFIXES,
    Reader,
    canonical_split,
    check_classes,
    is_split,
    json_object,
    pick,
    pictures,
    pictures_of,
    rows_of,
    same_size,
    size,
    subfolders,
    text_of,
    unsplit,
)
from silc.data.sets.names import class_list, colours
from silc.plain import nearest

CLASSES = "classes.json"
INDEX = "index.jsonl"
KEYS = ("classes", "background", "void", "palette")
NOT_CLASSES = ("unlabelled", "unlabeled", "void", "ignore", "ignored")
"""Names that say that a number means no class."""


# ---------------------------------------------------------------- classes.json


class _Classes:
    """What a classes.json says."""

    def __init__(self, path: Path) -> None:
        """Either `classes` with `background`, `void` and `palette`, or an object from numbers in the masks to names.

        In the second form numbers may leave gaps, and one that is named `unlabelled` or `void` is not counted.
        """
        data = json_object(text_of(path), str(path))
        self.background, self.void = False, data.get("void")
        self.ids: dict[int, int] | None = None
        self.palette: list[list[int]] | None = None
        if data and all(key.isdecimal() for key in data):
            self._numbered(data, path)
            return
        for key in data:
            if key not in KEYS:
                raise ValueError(f"{path}: unknown key {key!r}." + nearest(key, KEYS))
        raw = data.get("classes")
        if not isinstance(raw, list):
            raise ValueError(f"{path}: `classes` must be a list of names, or of lists of a name and its synonyms.")
        self.classes = [_names(each, path) for each in raw]
        check_classes(self.classes, path)
        count = len(self.classes)
        self.background, self.palette = data.get("background", False), data.get("palette")
        if not isinstance(self.background, bool):
            raise ValueError(f"{path}: `background` must be true or false, not {self.background!r}.")
        if self.void is not None and (type(self.void) is not int or 0 <= self.void < count):
            raise ValueError(f"{path}: `void` must be null or a whole number that is no class index, not {self.void}.")
        if self.palette is not None and not _is_palette(self.palette, count):
            raise ValueError(f"{path}: `palette` must be null or one colour [r, g, b] of 0 to 255 for each class.")

    def _numbered(self, data: dict[str, Any], path: Path) -> None:
        named = {int(key): _names(value, path) for key, value in sorted(data.items(), key=lambda item: int(item[0]))}
        counted = {key: names for key, names in named.items() if names[0].casefold() not in NOT_CLASSES}
        self.classes = list(counted.values())
        check_classes(self.classes, path)
        self.void = void_for(len(self.classes))
        self.ids = {**dict.fromkeys(named, self.void), **{key: i for i, key in enumerate(counted)}}
        self.palette = colours(len(self.classes), 1)


def _names(value: Any, path: Path) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: `classes` must be a list of names, or of lists of a name and its synonyms.")
    return names


def _is_palette(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(c, list) and len(c) == 3 and all(v in range(256) for v in c) for c in value)
    )


def _classes_near(folder: Path) -> Path:
    """classes.json in a folder or, for the folder of a split, in the one above."""
    above = folder.parent / CLASSES
    return above if not (folder / CLASSES).exists() and is_split(folder.name) and above.exists() else folder / CLASSES


# ---------------------------------------------------------------- parallel folders


def _divisions(path: Path) -> dict[str, tuple[Path, Path]]:
    """Folders of pictures and of masks of each split; the split of an undivided set is the empty string."""
    images, masks = path / "images", path / "masks"
    if images.is_dir() and masks.is_dir():
        inside = [name for name in subfolders(images) if (masks / name).is_dir() and is_split(name)]
        if inside and not pictures(images):
            return {name: (images / name, masks / name) for name in inside}
        return {"": (images, masks)}
    parts = {name: (path / name / "images", path / name / "masks") for name in subfolders(path)}
    return {name: both for name, both in parts.items() if both[0].is_dir() and both[1].is_dir()}


def _is_pairs(path: Path) -> bool:
    return path.is_dir() and not (path / INDEX).exists() and bool(_divisions(path))


def open_pairs(location: Path, split: str | None, kind: str | None) -> Masked:
    """`images/` and `masks/` (a PNG of class indices with the image's stem) with `classes.json`.

    A divided set has them in the folder of each split, or the splits in each of them. All sizes are compared on
    opening: these sets are made by hand.
    """
    found = _divisions(location)
    if "" in found:
        name, chosen = unsplit(location, split)
        images, masks = found[""]
    else:
        name, chosen = location.resolve().name, pick(location, found, split)
        images, masks = found[chosen]
    listing = next((p for p in (images.parent / CLASSES, _classes_near(location)) if p.exists()), None)
    if listing is None:
        raise ValueError(f"{location} has no {CLASSES}; a masked set is images/, masks/ and {CLASSES}.")
    said = _Classes(listing)
    paths = pictures(images)
    if not paths:
        raise ValueError(f"{images} holds no pictures ({', '.join(SUFFIXES)}).")
    mask_paths = [masks / f"{path.stem}.png" for path in paths]
    for path, mask in zip(paths, mask_paths):
        if not mask.is_file():
            raise ValueError(f"{path} has no mask: {mask} does not exist.")
        same_size(path, mask, size(mask))
    return Masked(name, said.classes, said.background, said.void, paths, mask_paths, said.palette, chosen, said.ids)


# ---------------------------------------------------------------- index file


def _index(path: Path) -> Path | None:
    index = path / INDEX if path.is_dir() else path
    return index if index.name == INDEX and index.exists() and (index.parent / CLASSES).exists() else None


def open_index(location: Path, split: str | None, kind: str | None) -> Masked:
    """`index.jsonl`, a row an image with `image`, `mask` and `split`, and `classes.json`.

    Rows without a mask, or whose mask was not shipped, are for other tasks.
    """
    index = _index(location)
    assert index is not None
    folder, said = index.parent, _Classes(index.parent / CLASSES)
    rows = [(place, row) for place, row in rows_of(index, ()) if row.get("mask")]
    rows = [(place, row) for place, row in rows if (folder / str(row["mask"])).is_file()]
    if not rows:
        raise ValueError(f"{index} has no row whose `mask` exists.")
    chosen = pick(index, {str(row.get("split", "")) for _, row in rows}, split)
    rows = [(place, row) for place, row in rows if str(row.get("split", "")) == chosen]
    for place, row in rows:
        if not (folder / str(row.get("image"))).is_file():
            raise ValueError(f"{place}: the image {folder / str(row.get('image'))} does not exist.")
    return Masked(
        folder.resolve().name, said.classes, said.background, said.void,
        [folder / row["image"] for _, row in rows], [folder / row["mask"] for _, row in rows],
        said.palette, chosen, said.ids,
    )  # fmt: skip


# ---------------------------------------------------------------- CamVid as SegNet's tutorial has it


def _camvid_splits(path: Path) -> list[str]:
    return [name for name in subfolders(path) if is_split(name) and (path / f"{name}annot").is_dir()]


def open_camvid(location: Path, split: str | None, kind: str | None) -> Masked:
    """`test/*.png` and `testannot/*.png` of 0 to 10, where 11 is unlabelled."""
    chosen = pick(location, _camvid_splits(location), split)
    shipped = class_list("camvid")
    folder = location / f"{chosen}annot"
    paths, masks = pictures_of(sorted(folder.glob("*.png")), lambda mask: location / chosen / mask.name, folder)
    void = void_for(len(shipped.classes))
    ids = {**{i: i for i in range(len(shipped.classes))}, len(shipped.classes): void}
    return Masked("camvid", shipped.classes, False, void, paths, masks, shipped.palette,
                  canonical_split(chosen), ids)  # fmt: skip


READERS = (
    Reader(("pairs",), "images/, masks/ and classes.json, with or without splits", _is_pairs, open_pairs),
    Reader(("index",), "index.jsonl with image, mask and split, and classes.json", lambda p: bool(_index(p)),
           open_index),
    Reader(("camvid",), "SPLIT/ and SPLITannot/", lambda p: bool(_camvid_splits(p)), open_camvid),
)  # fmt: skip
