"""Pascal VOC 2012 (20 or 21 classes) and Pascal Context (59, 60 or 459) in the folders of VOCdevkit.

Gives: `READERS`.
Used by: data/labelled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from silc.data.sets.common import Masked, read_indices, void_for
from silc.data.sets.files import VAL_FIRST, Reader, canonical_split, first_existing, lines_of, pick
from silc.data.sets.mat import read_matrix
from silc.data.sets.names import ClassList, class_list

IMAGES = "JPEGImages"
BLACK = [0, 0, 0]


def _with_background(shipped: ClassList) -> tuple[list[list[str]], list[list[int]]]:
    return [["background"], *shipped.classes], [BLACK, *shipped.palette]


def _listed(location: Path, names: list[str], folder: Path, suffix: str) -> tuple[list[Path], list[Path]]:
    if not names:
        raise ValueError(f"{location} lists no pictures for this split.")
    paths = [location / IMAGES / f"{name}.jpg" for name in names]
    masks = [folder / f"{name}{suffix}" for name in names]
    for path, mask in zip(paths, masks):
        if first_existing(path) is None or first_existing(mask) is None:
            missing = path if mask.exists() else mask
            raise ValueError(f"{location} lists {path.stem}, but {missing} does not exist.")
    return paths, masks


def _lists(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.txt"))} if folder.is_dir() else {}


# ---------------------------------------------------------------- VOC


def _voc_masks(path: Path) -> Path | None:
    return first_existing(path / "SegmentationClass", path / "SegmentationClassAug")


def _is_voc(path: Path) -> bool:
    return bool((path / IMAGES).is_dir() and _lists(path / "ImageSets" / "Segmentation") and _voc_masks(path))


def open_voc(location: Path, split: str | None, kind: str | None) -> Masked:
    """`JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation/SPLIT.txt`.

    `voc21` counts the background as class 0, `voc20` leaves it out; the border (255) is void in both.
    """
    shipped, folder = class_list("voc20"), _voc_masks(location)
    assert folder is not None
    lists = _lists(location / "ImageSets" / "Segmentation")
    chosen = pick(location, lists, split, VAL_FIRST)
    paths, masks = _listed(location, lines_of(lists[chosen]), folder, ".png")
    void, count = void_for(21), len(shipped.classes)
    if kind == "voc20":
        ids = {0: void, **{i + 1: i for i in range(count)}, 255: void}
        return Masked("voc20", shipped.classes, False, void, paths, masks, shipped.palette, chosen, ids)
    classes, palette = _with_background(shipped)
    ids = {**{i: i for i in range(count + 1)}, 255: void}
    return Masked("voc21", classes, True, void, paths, masks, palette, chosen, ids)


# ---------------------------------------------------------------- Context

MERGED = "SegmentationClassContext"
"""0 to 59, where 0 is everything else (mmsegmentation's conversion)."""
PC59, PC459 = "annotations_detectron2/pc59_val", "annotations_detectron2/pc459_val"
"""0 to 58 with 255, and TIFFs of 0 to 458 with 459 (detectron2's conversions)."""
RAW = "trainval"
"""MATLAB files of 1 to 459, as published."""


def _context_sources(path: Path) -> dict[str, str]:
    """From the kinds that this folder can give to where their masks lie, the preferred kind first."""
    if not (path / IMAGES).is_dir():
        return {}
    has = {place: (path / place).is_dir() for place in (MERGED, PC59, PC459)}
    has[RAW] = (path / RAW).is_dir() and any((path / RAW).glob("*.mat"))
    order = {"context60": (MERGED, RAW), "context59": (MERGED, PC59, RAW), "context459": (PC459, RAW)}
    found = {kind: next((place for place in places if has[place]), "") for kind, places in order.items()}
    return {kind: place for kind, place in found.items() if place}


def _context_lists(path: Path, masks: Path) -> dict[str, list[str]]:
    found = {name: lines_of(file) for name, file in _lists(path / "ImageSets" / "SegmentationContext").items()}
    if (path / "pascalcontext_val.txt").exists():
        found.setdefault("val", lines_of(path / "pascalcontext_val.txt"))
    if masks.name.endswith("_val"):
        present = {file.stem for file in masks.iterdir()}
        found = {"val": [name for name in found.get("val", sorted(present)) if name in present]}
    return found or {"trainval": sorted(file.stem for file in masks.iterdir() if file.suffix in (".png", ".mat"))}


def open_context(location: Path, split: str | None, kind: str | None) -> Masked:
    """`JPEGImages` with masks of any of the four usual forms (see the constants above).

    `context60` counts everything else as class 0, `context59` leaves it out, `context459` has all labels.
    """
    sources = _context_sources(location)
    kind = kind or next(iter(sources))
    if kind not in sources:
        raise ValueError(f"{location} holds no masks for {kind}; it has those for {', '.join(sources)}.")
    source = sources[kind]
    lists = _context_lists(location, location / source)
    chosen = pick(location, lists, split, (*VAL_FIRST, "trainval"))
    suffix = {RAW: ".mat", PC459: ".tif"}.get(source, ".png")
    paths, masks = _listed(location, lists[chosen], location / source, suffix)
    shipped = class_list("context459" if kind == "context459" else "context59")
    classes, palette = _with_background(shipped) if kind == "context60" else (shipped.classes, shipped.palette)
    void, first = void_for(len(classes)), int(kind == "context60")
    read: Callable[[Path], np.ndarray] = partial(read_matrix, name="LabelMap") if source == RAW else read_indices
    return Masked(kind, classes, kind == "context60", void, paths, masks, palette, canonical_split(chosen),
                  _context_ids(source, shipped, void, first), read)  # fmt: skip


def _context_ids(source: str, shipped: ClassList, void: int, first: int) -> dict[int, int]:
    """`first` is the index of the first named class: 1 behind a background, else 0."""
    count = len(shipped.classes)
    other = 0 if first else void
    if source == RAW:
        rest = dict.fromkeys(range(461), other)
        return {**rest, **{label: i + first for i, label in enumerate(shipped.ids)}}
    if source == MERGED:
        return {0: other, **{i + 1: i + first for i in range(count)}, 255: void}
    return {**{i: i + first for i in range(count)}, (count if source == PC459 else 255): void}


READERS = (
    Reader(("voc21", "voc20"), "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/", _is_voc, open_voc),
    Reader(("context60", "context59", "context459"),
           f"JPEGImages/ with {MERGED}/, {PC59}/, {PC459}/ or {RAW}/*.mat",
           lambda p: bool(_context_sources(p)), open_context),
)  # fmt: skip
