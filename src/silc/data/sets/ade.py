"""ADE20K: the 150 classes of the scene parsing challenge, and the 847 of the full set.

Gives: `READERS`.
Used by: data/labelled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from silc.data.sets.common import Masked, read_colours, read_indices, void_for
from silc.data.sets.files import VAL_FIRST, Reader, first_existing, is_split, pick, pictures_of, subfolders
from silc.data.sets.names import class_list

PREPARED = "annotations_detectron2"

# ---------------------------------------------------------------- ADE20K, 150 classes


def _ade150_splits(path: Path) -> dict[str, Path]:
    if (path / "images_detectron2").is_dir():
        return {}
    images = [name for name in subfolders(path / "images") if is_split(name)]
    places = {name: first_existing(path / "annotations" / name, path / PREPARED / name) for name in images}
    # COCO's splits carry a year
    return {name: place for name, place in places.items() if place and not name[-1].isdigit()}


def open_ade150(location: Path, split: str | None, kind: str | None) -> Masked:
    """`images/validation/*.jpg` and `annotations/validation/*.png` of 1 to 150, where 0 is unlabelled.

    Where only `annotations_detectron2` is there, its values are 0 to 149 and 255.
    """
    splits = _ade150_splits(location)
    chosen = pick(location, splits, split, VAL_FIRST)
    folder, shipped = splits[chosen], class_list("ade150")
    images = location / "images" / chosen
    paths, masks = pictures_of(sorted(folder.glob("*.png")), lambda m: images / f"{m.stem}.jpg", folder)
    count, void = len(shipped.classes), void_for(len(shipped.classes))
    first = int(folder.parent.name != PREPARED)
    ids = {void: void, 0: void, **{i + first: i for i in range(count)}}
    return Masked("ade150", shipped.classes, False, void, paths, masks, shipped.palette, chosen, ids)


# ---------------------------------------------------------------- ADE20K, 847 classes


def read_objects(path: Path) -> np.ndarray:
    """Object numbers of an ADE20K *_seg.png: red // 10 * 256 + green."""
    colours = read_colours(path)
    return colours[..., 0] // 10 * 256 + colours[..., 1]


def _ade847_splits(path: Path) -> dict[str, Path]:
    prepared = path / PREPARED
    if (path / "images_detectron2").is_dir():
        return {name: prepared / name for name in subfolders(prepared) if is_split(name)}
    raw = path / "images" / "ADE"
    return {name: raw / name for name in subfolders(raw) if is_split(name)}


def open_ade847(location: Path, split: str | None, kind: str | None) -> Masked:
    """ADE20K_2021_17_01 as published (`images/ADE/validation/**/*_seg.png`), or as detectron2's scripts leave it.

    Those write `images_detectron2` and `annotations_detectron2`, TIFFs of 0 to 846 and 65535, shrunk to 512 pixels on
    the short side; scores of the two differ. Numbers that are none of the 847 are void.
    """
    splits = _ade847_splits(location)
    chosen = pick(location, splits, split, VAL_FIRST)
    folder, shipped = splits[chosen], class_list("ade847")
    count, void = len(shipped.classes), void_for(len(shipped.classes))
    if folder.parent.name == PREPARED:
        images = location / "images_detectron2" / chosen
        paths, masks = pictures_of(sorted(folder.glob("*.tif")), lambda m: images / f"{m.stem}.jpg", folder)
        ids, read = {**{i: i for i in range(count)}, void: void}, read_indices
    else:
        found = sorted(folder.rglob("*_seg.png"))
        paths, masks = pictures_of(found, lambda m: m.with_name(f"{m.name.removesuffix('_seg.png')}.jpg"), folder)
        rest = dict.fromkeys(range(26 * 256), void)
        ids, read = {**rest, **{number: i for i, number in enumerate(shipped.ids)}}, read_objects
    return Masked("ade847", shipped.classes, False, void, paths, masks, shipped.palette, chosen, ids, read)


READERS = (
    Reader(("ade150",), "images/validation/ and annotations/validation/", lambda p: bool(_ade150_splits(p)),
           open_ade150),
    Reader(("ade847",), f"images/ADE/validation/, or images_detectron2/ and {PREPARED}/",
           lambda p: bool(_ade847_splits(p)), open_ade847),
)  # fmt: skip
