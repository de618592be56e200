"""COCO's masks: COCO-Stuff 164k (171 classes) and panoptic annotations read as semantic ones.

Gives: `READERS`.
Used by: data/labelled.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from silc.data.sets.common import Masked, read_colours, void_for
from silc.data.sets.files import VAL_FIRST, Reader, first_existing, json_object, pick, pictures_of, subfolders, text_of
from silc.data.sets.names import class_list, colours

STUFF = ("stuffthingmaps", "annotations", "annotations_detectron2")
TRAIN_IDS = "_labelTrainIds.png"


def _pictures(location: Path, split: str) -> Path:
    found = first_existing(location / "images" / split, location / split)
    if found is None:
        raise ValueError(f"{location} has no pictures for {split}: neither images/{split}/ nor {split}/ exists.")
    return found


# ---------------------------------------------------------------- stuff


def _stuff_splits(path: Path) -> dict[str, Path]:
    """Folders of masks, named like `val2017`; ADE20K, else alike, has no year in the names of its splits."""
    found: dict[str, Path] = {}
    for part in STUFF:
        for name in subfolders(path / part):
            if name[:-4] in ("train", "val") and name[-4:].isdigit():
                found.setdefault(name, path / part / name)
    return found


def open_stuff(location: Path, split: str | None, kind: str | None) -> Masked:
    """`images/val2017/*.jpg` and `annotations/val2017/*.png` (or `stuffthingmaps/`).

    Masks are the published pixel maps, or where they were made the `*_labelTrainIds.png` of mmsegmentation or
    `annotations_detectron2`, both 0 to 170. 255 is void in all of them.
    """
    splits = _stuff_splits(location)
    chosen = pick(location, splits, split, VAL_FIRST)
    folder, shipped = splits[chosen], class_list("coco_stuff")
    every = sorted(folder.glob("*.png"))
    trained = [mask for mask in every if mask.name.endswith(TRAIN_IDS)]
    images = _pictures(location, chosen)
    paths, masks = pictures_of(
        trained or every, lambda m: images / f"{m.name.removesuffix(TRAIN_IDS).removesuffix('.png')}.jpg", folder
    )
    count, void = len(shipped.classes), void_for(len(shipped.classes))
    made = trained or folder.parent.name == STUFF[2]
    numbers = range(count) if made else shipped.ids
    ids = {void: void, **{number: i for i, number in enumerate(numbers)}}
    return Masked("coco-stuff", shipped.classes, False, void, paths, masks, shipped.palette, chosen, ids)


# ---------------------------------------------------------------- panoptic


def _panoptic_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.stem.removeprefix("panoptic_"): path} if path.name.startswith("panoptic_") else {}
    found = [*path.glob("panoptic_*.json"), *(path / "annotations").glob("panoptic_*.json")]
    return {file.stem.removeprefix("panoptic_"): file for file in found}


def read_panoptic(path: Path, segments: dict[str, dict[int, int]]) -> np.ndarray:
    """Categories of a PNG whose colours number segments (red + 256 green + 65536 blue)."""
    values = read_colours(path) @ np.array([1, 256, 65536])
    numbers, inverse = np.unique(values, return_inverse=True)
    known = segments[path.name]
    for stranger in (int(number) for number in numbers if int(number) not in known):
        raise ValueError(f"{path} has a segment {stranger} that its JSON does not list.")
    return np.array([known[int(number)] for number in numbers])[inverse].reshape(values.shape)


def open_panoptic(location: Path, split: str | None, kind: str | None) -> Masked:
    """`annotations/panoptic_val2017.json` beside the folder of PNGs of that name; pictures in `val2017/`.

    The classes are the categories of the JSON in its order; colour 0 is void. Every segment counts for its category,
    so that instances of one class become one region.
    """
    files = _panoptic_files(location)
    chosen = pick(location, files, split, VAL_FIRST)
    file = files[chosen]
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    folder = first_existing(file.with_suffix(""), root / file.stem)
    if folder is None:
        raise ValueError(f"{file} has no masks: the folder {file.with_suffix('')} does not exist.")
    data = json_object(text_of(file), str(file))
    try:
        categories = {int(row["id"]): str(row["name"]) for row in data["categories"]}
        images = {row["id"]: str(row["file_name"]) for row in data["images"]}
        rows = [(images[row["image_id"]], str(row["file_name"]),
                 {int(segment["id"]): int(segment["category_id"]) for segment in row["segments_info"]})
                for row in data["annotations"]]  # fmt: skip
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is no panoptic file: it needs categories, images, and annotations with image_id, "
                         "file_name and segments_info.") from None  # fmt: skip
    if not rows or not categories:
        raise ValueError(f"{file} names no {'class' if rows else 'picture'}.")
    pictures, void = _pictures(root, chosen), void_for(len(categories))
    segments = {name: {0: 0, **found} for _, name, found in rows}
    paths, masks = [pictures / image for image, _, _ in rows], [folder / name for _, name, _ in rows]
    for path in (*paths, *masks):
        if first_existing(path) is None:
            raise ValueError(f"{file} names {path}, which does not exist.")
    ids = {0: void, **{number: i for i, number in enumerate(categories)}}
    return Masked("coco-panoptic", [[name] for name in categories.values()], False, void, paths, masks,
                  colours(len(categories), 1), chosen, ids, partial(read_panoptic, segments=segments))  # fmt: skip


READERS = (
    Reader(("coco-stuff",), "images/val2017/ and annotations/val2017/ or stuffthingmaps/val2017/",
           lambda p: bool(_stuff_splits(p)), open_stuff),
    Reader(("coco-panoptic",), "annotations/panoptic_SPLIT.json", lambda p: bool(_panoptic_files(p)), open_panoptic),
)  # fmt: skip
