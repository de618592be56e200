"""Named protocols of zero-shot segmentation, and the dense inference they describe.

Gives: Protocol, PROTOCOLS, protocol, fit, Dense, encode, label_map, cosine_maps.
Used by: eval/segment, predict.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from silc.config import ModelConfig, nearest
from silc.data.images import resize
from silc.eval.prompts import ClassEmbeddings
from silc.model.silc import Silc
from silc.model.towers import Readout

# Shapes: B pictures, T names, D features, H x W model input, h x w label map, gh x gw patches of a window.

PIXELS_AT_ONCE = 2**25
"""Scores (names x pixels) that exist at a time: 128 MiB of float32."""


@dataclass(frozen=True)
class Protocol:
    """How a picture becomes a label map. Results of different protocols cannot be compared."""

    name: str
    short: int = 0
    """Short side of the resized picture in pixels; 0: the model's own size. The aspect is kept."""
    aspect: float = 4.0
    """A longer picture is shrunk until long side = aspect x short."""
    window: int = 0
    """Side of the sliding window in pixels; 0: the whole picture in one view."""
    stride: int = 0
    templates: tuple[str, ...] = ()
    """Empty: the default list."""
    background: float | None = None
    """For a set with a background class: None compares it by its names like any class; a number leaves its names out
    and gives it every pixel whose best foreground probability (softmax over names at the model's scale) is lower."""
    readout: Readout = "auto"


TCL_TEMPLATES = (
    "itap of a {}.", "a bad photo of a {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.", "a photo of many {}.", "a photo of {}s.",
)

PROTOCOLS = (
    Protocol("whole-image"),
    # Sizes, window and templates of TCL (arXiv 2212.00785), whose background rule is a constant score, too; no PAMR
    Protocol("tcl", short=448, aspect=2048 / 448, window=448, stride=224, templates=TCL_TEMPLATES, background=0.5),
)


def protocol(name: str) -> Protocol:
    """The protocol of that name. ValueError names the nearest one."""
    for known in PROTOCOLS:
        if known.name == name:
            return known
    raise ValueError(f"there is no segmentation protocol {name!r}." + nearest(name, [p.name for p in PROTOCOLS]))


# ---------------------------------------------------------------- the picture


def fit_size(height: int, width: int, how: Protocol, config: ModelConfig) -> tuple[int, int]:
    """Size at which the model sees a picture: short side and aspect limit of the protocol, each side that is no longer
    than the window rounded to a multiple of the patch."""
    patch, short = config.image.patch, how.short or config.preprocess.size
    scale = min(short / min(height, width), how.aspect * short / max(height, width))
    sides = [max(1, round(side * scale)) for side in (height, width)]
    whole = [not how.window or side < how.window for side in sides]
    new_height, new_width = (max(1, round(s / patch)) * patch if w else s for s, w in zip(sides, whole))
    return new_height, new_width


def fit(image: Tensor, how: Protocol, config: ModelConfig) -> Tensor:
    """uint8 [3, h, w] -> uint8 [3, H, W] for `encode`."""
    height, width = fit_size(image.shape[-2], image.shape[-1], how, config)
    return resize(image, height, width, config.preprocess.interpolation)


def windows(height: int, width: int, how: Protocol) -> list[tuple[int, int, int, int]]:
    """(top, left, height, width) of every window; the last of a row or column is moved back to end at the border."""
    def starts(side: int) -> tuple[list[int], int]:
        size = min(how.window or side, side)
        return [min(i * how.stride, side - size) for i in range(-(-(side - size) // max(1, how.stride)) + 1)], size

    (tops, h), (lefts, w) = starts(height), starts(width)
    return [(top, left, h, w) for top in tops for left in lefts]


# ---------------------------------------------------------------- features


@dataclass(frozen=True)
class Dense:
    """Patch features of one picture [windows, D, gh, gw], the windows' boxes, and the size they lie in."""

    features: Tensor
    boxes: list[tuple[int, int, int, int]]
    size: tuple[int, int]


def encode(model: Silc, pixels: Tensor, how: Protocol, batch: int = 8) -> list[Dense]:
    """Normalised pixels [B, 3, H, W] of one size -> a Dense for each; `batch` windows go through the model at a time.

    Raises ValueError if the protocol's window is no multiple of the model's patch.
    """
    patch = model.config.image.patch
    if how.window % patch:
        raise ValueError(f"protocol {how.name}: its window of {how.window} px is no multiple of the patch, {patch} px.")
    size = (pixels.shape[-2], pixels.shape[-1])
    boxes = windows(*size, how)
    crops = torch.stack([pixels[:, :, t : t + h, x : x + w] for t, x, h, w in boxes], dim=1).flatten(0, 1)
    dense = torch.cat([model.encode_dense(part, how.readout).float() for part in crops.split(batch)])
    return [Dense(part, boxes, size) for part in dense.unflatten(0, (len(pixels), len(boxes)))]


# ---------------------------------------------------------------- scores


def cosine_maps(dense: Dense, vectors: Tensor, height: int, width: int) -> Tensor:
    """Cosine of every pixel with every vector: vectors [T, D] -> [T, height, width].

    Each window is brought to its pixels (bilinear), overlapping windows are averaged, the whole is brought to the
    picture's size; a single window takes one step.
    """
    maps = torch.einsum("ndhw,td->nthw", dense.features, vectors)
    if len(dense.boxes) > 1:
        canvas = maps.new_zeros(len(vectors), *dense.size)
        seen = maps.new_zeros(dense.size)
        for one, (top, left, h, w) in zip(maps, dense.boxes):
            canvas[:, top : top + h, left : left + w] += _bilinear(one, h, w)
            seen[top : top + h, left : left + w] += 1
        maps = (canvas / seen)[None]
    return _bilinear(maps[0], height, width)


def _bilinear(maps: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]


def label_map(
    dense: Dense, names: ClassEmbeddings, height: int, width: int, threshold: float | None = None, scale: float = 1.0
) -> Tensor:
    """The class of the most similar name at every pixel: int64 [height, width].

    With a `threshold`, `names` leave class 0 out, and pixels whose best softmax(scale x cosine) over the names is lower
    become 0. A few names at a time, with a running best and log-sum: T x height x width scores never exist at once.
    """
    best = dense.features.new_full((height, width), -torch.inf)
    label = names.owner.new_zeros((height, width))
    total = torch.full_like(best, -torch.inf)
    for maps, owner in _parts(dense, names, height, width):
        values, index = maps.max(0)
        better = values > best
        best = torch.where(better, values, best)
        label = torch.where(better, owner[index], label)
        if threshold is not None:
            total = torch.logaddexp(total, (maps * scale).logsumexp(0))
    if threshold is not None:
        label[(best * scale - total).exp() < threshold] = 0
    return label


def _parts(dense: Dense, names: ClassEmbeddings, height: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, PIXELS_AT_ONCE // max(height * width, dense.size[0] * dense.size[1]))
    for start in range(0, len(names.vectors), step):
        yield cosine_maps(dense, names.vectors[start : start + step], height, width), names.owner[start : start + step]


def foreground(classes: Sequence[Sequence[str]], background: bool, how: Protocol) -> list[list[str]]:
    """Names to embed, by class: without class 0 if the protocol has its own rule for the background.

    Raises ValueError if the rule has a single foreground class left: its probability is 1 everywhere.
    """
    ruled = background and how.background is not None
    kept = [list(names) for names in (classes[1:] if ruled else classes)]
    if ruled and len(kept) < 2:
        raise ValueError(
            f"protocol {how.name}: its background threshold needs two foreground classes; use whole-image for this set."
        )
    return kept
