"""Cityscapes: street scenes of 19 scored classes.

Gives: `READERS`.
Used by: data/labelled.
"""

from __future__ import annotations

from pathlib import Path

from silc.data.sets.common import Masked, void_for
from silc.data.sets.files import VAL_FIRST, Reader, pick, pictures_of, subfolders
from silc.data.sets.names import class_list

TRAIN_IDS, LABEL_IDS, PICTURE = "_gtFine_labelTrainIds.png", "_gtFine_labelIds.png", "_leftImg8bit.png"


def _is_cityscapes(path: Path) -> bool:
    return (path / "leftImg8bit").is_dir() and (path / "gtFine").is_dir()


def open_cityscapes(location: Path, split: str | None, kind: str | None) -> Masked:
    """`leftImg8bit/val/CITY/*` and `gtFine/val/CITY/*`, by labelTrainIds if they were made, else by labelIds."""
    found = [name for name in subfolders(location / "gtFine") if (location / "leftImg8bit" / name).is_dir()]
    chosen = pick(location, found, split, VAL_FIRST)
    folder, shipped = location / "gtFine" / chosen, class_list("cityscapes")
    trained = sorted(folder.rglob(f"*{TRAIN_IDS}"))
    suffix = TRAIN_IDS if trained else LABEL_IDS

    def picture(mask: Path) -> Path:
        return location / "leftImg8bit" / chosen / mask.parent.name / f"{mask.name.removesuffix(suffix)}{PICTURE}"

    paths, masks = pictures_of(trained or sorted(folder.rglob(f"*{LABEL_IDS}")), picture, folder)
    count, void = len(shipped.classes), void_for(len(shipped.classes))
    numbers = range(count) if trained else shipped.ids
    # labels of the set that are not scored run to 33; the licence plate is -1, which a PNG holds as 255
    rest = {void: void} if trained else {**dict.fromkeys(range(34), void), void: void}
    ids = {**rest, **{number: i for i, number in enumerate(numbers)}}
    return Masked("cityscapes", shipped.classes, False, void, paths, masks, shipped.palette, chosen, ids)


READERS = (Reader(("cityscapes",), "leftImg8bit/ and gtFine/", _is_cityscapes, open_cityscapes),)
