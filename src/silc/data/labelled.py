"""Labelled sets for evaluation: pictures with classes, with captions, or with masks, in any layout that is known.

Gives: `open_classification`, `open_captioned`, `open_masked`, and what they return: `Labelled`, `Captioned`, `Masked`.
Used by: the evaluation tasks, the segmentation trainer. Every mistake in a set is a one-sentence ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from silc.data.sets import ade, captions, cityscapes, coco, folders, pairs, pascal
from silc.data.sets.common import Captioned, Labelled, Masked
from silc.data.sets.files import Reader
from silc.plain import nearest

__all__ = ["Captioned", "Labelled", "Masked", "open_captioned", "open_classification", "open_masked"]

MASKS = (*pairs.READERS, *pascal.READERS, *ade.READERS, *cityscapes.READERS, *coco.READERS)
SHOWN = 6
"""Entries of an unknown folder that a message names."""

T = TypeVar("T")


def open_classification(location: Path | str, split: str | None = None, kind: str | None = None) -> Labelled:
    """Open a set of pictures with classes; the layout is recognised.

    `split`: a name such as `test` or `val` (which also finds `validation` and `val2017`); None: the one that is
    customary for the set, else the first of test, val, train. `kind`: a layout by name where a folder could be read in
    several ways: `folders`, `imagenet`, `clip-benchmark`, `table`.
    ValueError, one sentence: unknown or ambiguous layout, a missing split (it names those found), no classes, no
    pictures, repeated names, folders and list that disagree, a label that is no class.
    """
    return _open(folders.READERS, location, split, kind, "pictures with classes")


def open_captioned(location: Path | str, split: str | None = None, kind: str | None = None) -> Captioned:
    """Open a set of pictures with captions, a folder or the file that names them; the layout is recognised.

    `split` and `kind` as in `open_classification`; kinds: `table`, `index`, `coco`, `karpathy`, `clip-benchmark`.
    ValueError for a file without rows, a row without a caption, an image that is missing, an unknown layout or split.
    """
    return _open(captions.READERS, location, split, kind, "pictures with captions")


def open_masked(location: Path | str, split: str | None = None, kind: str | None = None) -> Masked:
    """Open a segmentation set; the layout is recognised.

    `split` and `kind` as in `open_classification`. Kinds: `pairs` (a folder of one's own), `index`, `camvid`, `voc21`,
    `voc20`, `context60`, `context59`, `context459`, `ade150`, `ade847`, `cityscapes`, `coco-stuff`, `coco-panoptic`.
    One folder of VOC holds both `voc21` (background counted) and `voc20`; without `kind` the first is taken.
    ValueError for an unknown layout or split, a missing picture or mask, a wrong class list. Values and sizes of masks
    are checked when a mask is read.
    """
    return _open(MASKS, location, split, kind, "pictures with masks")


def _open(readers: Sequence[Reader[T]], location: Path | str, split: str | None, kind: str | None, what: str) -> T:
    path = Path(location)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    known = [name for reader in readers for name in reader.kinds]
    if kind is not None and kind not in known:
        raise ValueError(f"{kind!r} is no kind of {what}; known are {', '.join(known)}." + nearest(kind, known))
    able = [reader for reader in readers if reader.mine(path) and kind in (None, *reader.kinds)]
    if len(able) == 1:
        return able[0].open(path, split, kind)
    if able:
        names = " or ".join(reader.kinds[0] for reader in able)
        raise ValueError(f"{path} can be read as {names}; say which with its `kind`: in a suite of your own, or by "
                         "--segment.kind in training.")
    layouts = "; ".join(f"{'/'.join(r.kinds)}: {r.layout}" for r in readers if kind in (None, *r.kinds))
    raise ValueError(f"{path} is not laid out as {what}: it {_found(path)}, and silc knows {layouts}.")


def _found(path: Path) -> str:
    if path.is_file():
        return f"is a {path.suffix or 'file'} file"
    names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if not p.name.startswith("."))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"holds {', '.join(names[:SHOWN])}{more}" if names else "is empty"
