"""What a labelled set is: pictures with classes, with captions, or with masks, read when they are asked for.

Gives: `Labelled`, `Captioned`, `Masked`, `read_indices` and `read_colours` (of masks), `lookup`, `void_for`.
Used by: data/labelled, which re-exports the three sets, and every reader beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from silc.config import DataConfig
from silc.data.images import BadSample, decode
from silc.data.sets.files import same_size
from silc.data.store import read_range

INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
"""Pillow modes of a picture with one channel: class indices (a palette PNG's indices, too)."""
UNKNOWN = -1


class Span(NamedTuple):
    """Bytes [start, end) of a tar."""

    tar: Path
    start: int
    end: int


class _Pictures:
    """What the three kinds of set have in common. Reading is lazy and may be done by many threads at once."""

    paths: list[Path]
    spans: list[Span] | None

    def __len__(self) -> int:
        return len(self.paths)

    def ident(self, index: int) -> str:
        """A name for reports: the file, or `TAR/member` for a picture in a tar."""
        return str(self.paths[index])

    def image(self, index: int) -> Tensor:
        """uint8 [3,H,W]; ValueError names an unreadable file."""
        path = self.paths[index]
        try:
            if self.spans:
                span = self.spans[index]
                data = read_range(str(span.tar), span.start, span.end)
            else:
                data = path.read_bytes()
            return decode(data, DataConfig().max_pixels)
        except BadSample as error:
            raise ValueError(f"{path} cannot be read as a picture ({error.cause}).") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or type(error).__name__}).") from None


@dataclass(frozen=True)
class Labelled(_Pictures):
    """Pictures of classes. `classes[c]` holds the names of class c, the canonical one first; a label is such a c."""

    name: str
    classes: list[list[str]]
    paths: list[Path]
    labels: list[int]
    templates: list[str] | None
    """Prompts with one `{}` that came with the set."""
    split: str = ""
    """As the set calls it; empty where it has none."""
    spans: list[Span] | None = None
    """Where the pictures lie if they lie in tars; `paths` are then names only."""


@dataclass(frozen=True)
class Captioned(_Pictures):
    """Pictures with one or more captions each."""

    name: str
    paths: list[Path]
    captions: list[list[str]]
    split: str = ""
    spans: list[Span] | None = None


def read_indices(path: Path) -> np.ndarray:
    """int64 [H,W] of a PNG or TIFF with one channel, upright as stored."""
    mode, values = _decoded(path)
    if mode not in INDEX_MODES:
        raise ValueError(f"{path} is a {mode} picture; a mask needs one channel of class indices.")
    return values


def read_colours(path: Path) -> np.ndarray:
    """int64 [H,W,3] of an RGB PNG."""
    mode, values = _decoded(path)
    if mode not in ("RGB", "RGBA"):
        raise ValueError(f"{path} is a {mode} picture; this set codes its labels in the colours of an RGB one.")
    return values[..., :3]


def _decoded(path: Path) -> tuple[str, np.ndarray]:
    try:
        with Image.open(path, formats=["PNG", "TIFF"]) as picture:
            return picture.mode, np.asarray(picture).astype(np.int64)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a mask ({error}).") from None


@dataclass(frozen=True)
class Masked(_Pictures):
    """Pictures with a class index per pixel. `background`: class 0 is everything else; `void` is not counted."""

    name: str
    classes: list[list[str]]
    background: bool
    void: int | None
    paths: list[Path]
    mask_paths: list[Path]
    palette: list[list[int]] | None
    split: str = ""
    ids: Mapping[int, int] | None = None
    """From values in the files to class indices and `void`; None where the files hold those already."""
    read: Callable[[Path], np.ndarray] = read_indices
    """int64 [H,W] of values from one of `mask_paths`."""
    spans: list[Span] | None = None

    def mask(self, index: int) -> Tensor:
        """int64 [H,W] of class indices and `void`.

        ValueError names the file, and the value that is neither, or its size if it is not that of the picture.
        """
        path = self.mask_paths[index]
        values = self.read(path)
        same_size(self.paths[index], path, (values.shape[1], values.shape[0]))
        made = values if self.ids is None else lookup(values, self.ids)
        known = (made >= 0) & (made < len(self.classes))
        if self.void is not None:
            known |= made == self.void
        if not known.all():
            void = "no void value" if self.void is None else f"void {self.void}"
            has = f"classes 0 to {len(self.classes) - 1} and {void}; fix the mask or classes.json"
            if self.ids is not None:
                has = f"{len(self.classes)} classes with other values ({self.name})"
            raise ValueError(f"{path} holds the value {int(values[~known][0])}, but the set has {has}.")
        return torch.from_numpy(made)


def lookup(values: np.ndarray, ids: Mapping[int, int]) -> np.ndarray:
    """`values` with every number that `ids` knows replaced, all others by -1."""
    table = np.full(max(ids, default=0) + 2, UNKNOWN, np.int64)
    table[list(ids)] = list(ids.values())
    inside = (values >= 0) & (values < len(table))
    return table[np.where(inside, values, len(table) - 1)]


def void_for(classes: int) -> int:
    """The usual value of unlabelled pixels: 255, or 65535 where that is a class."""
    return 255 if classes <= 255 else 65535
