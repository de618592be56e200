"""Named protocols of zero-shot segmentation, and the dense inference they describe.

Gives: Protocol, PROTOCOLS, VARIANTS, protocol, fit, Dense, encode, label_map, cosine_maps, probability_maps.
Used by: eval/segment, predict.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from silc.config import ModelConfig
from silc.data.images import resize
from silc.data.sets.names import class_list
from silc.eval.prompts import ClassEmbeddings, resolve_templates
from silc.model.silc import Silc
from silc.model.towers import Readout
from silc.plain import nearest

# Shapes: B pictures, T names, D features, H x W model input, h x w label map, gh x gw patches of a window.

PIXELS_AT_ONCE = 2**24
"""Scores (names x pixels) that exist at a time: 64 MiB of float32, of which about five copies live at once."""

Merge = Literal["none", "cosine", "probability", "sigmoid"]


@dataclass(frozen=True)
class Protocol:
    """How a picture becomes a label map. Results of different protocols cannot be compared.

    Always: pixels are normalised as the model wants it; prompts are embedded, normalised, averaged over the templates
    and normalised again; a class scores as its best name; all interpolation of scores is bilinear (half-pixel centres);
    no test-time augmentation, no refinement (PAMR, CRF).
    """

    name: str
    short: int = 0
    """Short side of the resized picture in pixels; 0: the model's own size. The aspect is kept."""
    long: int = 0
    """A picture whose long side would be longer is shrunk until it is not; 0: four times the short side."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Of the picture, antialiased; None: the model's own."""
    window: int = 0
    """Side of the sliding window in pixels; 0: the whole picture in one view. The last window of a row or column is
    moved back to end at the border. A side of the picture that is shorter than the window (any side, without window) is
    rounded to a multiple of the patch."""
    stride: int = 0
    square: bool = False
    """Both sides are made `short` pixels long, the aspect is not kept."""
    templates: tuple[str, ...] = ()
    """Empty: the default list."""
    readout: Readout = "auto"
    """Which patch features; see `ImageTower.dense`."""
    merge: Merge = "cosine"
    """What is averaged over overlapping windows: patch cosines brought to the window's pixels, or their softmax over
    all names there; the average is brought to the size of the mask. `none`: a single view, whose cosines are brought to
    the size of the mask at once. `sigmoid`: scores of a trained head, see eval/trained."""
    scale: float | None = None
    """Factor on cosines in every softmax; None: the model's exp(logit_scale)."""
    background_names: tuple[str, ...] = ()
    """What the background class of a set is called instead of its own names."""
    background: float | None = None
    """For a set with a background class: None compares it by its names like any class; a number leaves its names out
    and gives it every pixel whose best foreground probability (softmax over names) is lower."""
    floor: float = 0.0
    """For a set with a background class compared by names: pixels whose best probability is lower become background."""
    area: float = 0.0
    """For such a set: a class with at most this share of the foreground pixels is taken out of the picture."""


TCL9 = tuple(resolve_templates(["tcl9"]))
CLIP80 = tuple(resolve_templates(["clip80"]))
SCENE = tuple(f"{start} {{}} in the scene." for start in ("there is a", "there is the", "this is a", "this is the",
                                                           "this is one"))

# Of Pascal Context's classes those that are none of VOC's twenty (its table is VOC's dining table): what VOC-20b calls
# background.
OTHERS = tuple(
    group[0] for group in class_list("context59").classes
    if group[0] != "table" and group[0] not in {name for known in class_list("voc20").classes for name in known}
)

PROTOCOLS = (
    # Ours: the cheapest, and what training runs are watched by.
    Protocol("whole-image", merge="none"),
    # Unified evaluation of TCL (arXiv 2212.00785; code khanrc/tcl). Its threshold applies to masks that TCL learned
    # (a sigmoid with its own slope and shift, window scores averaged after it); a contrastive model has none, so here
    # it applies to the softmax over foreground names, windows averaged as cosines. 0.5 is the code's default, its
    # eval.yml says 0.4. PAMR and TCL's image-level correction are left out; sides shorter than the window are rounded,
    # not padded; the picture is resized with antialiasing.
    Protocol("tcl", 448, 2048, "bilinear", 448, 224, False, TCL9, background=0.5),
    # Notebook of TIPSv2 (google-deepmind/tips, TIPS_zeroshot_segmentation), which scores ADE20K only: how its paper
    # treats a background class is not written down, here by names. The long side has no limit there, a generous one
    # here; sides are rounded here, cut off there.
    Protocol("tips", 448, 16 * 448, "bicubic", 448, 336, False, TCL9, "value", "probability", 1.0),
    # MaskCLIP (arXiv 2112.01071; code chongzhou96/MaskCLIP), without key smoothing and prompt denoising, which are off
    # by default. It has no rule for a background class, here by names. CLIP's 80 templates and five of scenes.
    Protocol("maskclip", 512, 2048, "bilinear", templates=CLIP80 + SCENE, readout="value", scale=100.0),
    # SCLIP (arXiv 2312.01597; code wangf3014/SCLIP). Its background is a class of many names (sky, wall, tree, ...)
    # that the set must bring; with the name `background` alone, scores are lower than in print.
    Protocol("sclip", 336, 2048, "bilinear", 224, 112, False, CLIP80, "sclip", scale=40.0),
    # ClearCLIP (arXiv 2407.12442; code mc-lan/ClearCLIP). Background as in SCLIP.
    Protocol("clearclip", 448, 2048, "bilinear", 448, 224, False, CLIP80, "clearclip", scale=50.0),
    # CAT-Seg (arXiv 2303.11797, CVPR 2024; code cvlab-kaist/CAT-Seg), for a model with a trained head: four windows and
    # the whole picture, half of the score each; a class goes by its first name. The picture is resized with
    # antialiasing, straight to 640 px. For models smaller than 336 px all sizes shrink with the model's.
    Protocol("catseg", 640, 640, "bilinear", 384, 256, True, ("A photo of a {} in the scene",), "catseg", "sigmoid"),
)

VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    ("maskclip", "context59"): {"short": 520, "long": 520},
    ("sclip", "cityscapes"): {"short": 560},
    ("sclip", "cocostuff"): {"short": 448},
    ("sclip", "voc21"): {"scale": 65.0, "floor": 0.1, "area": 0.1},
    ("sclip", "context60"): {"scale": 50.0, "floor": 0.1},
    ("sclip", "cocoobject"): {"scale": 50.0, "floor": 0.1},
    ("clearclip", "cityscapes"): {"window": 224},
    ("clearclip", "voc21"): {"floor": 0.5},
    ("clearclip", "context60"): {"floor": 0.15},
    ("clearclip", "cocoobject"): {"floor": 0.4},
    ("catseg", "voc21"): {"background_names": OTHERS},
}
"""What the code of a protocol's authors changes for one set, which is known by its name (letters and digits of it)."""


def protocol(name: str, of: str = "", model: Silc | None = None) -> Protocol:
    """The protocol of that name, as it is for the set `of`; `auto`: catseg for a model with such a head, else
    whole-image. ValueError names the nearest one, and says so where a model lacks the head."""
    headed = getattr(model, "catseg", None) is not None
    if name == "auto":
        name = "catseg" if headed else "whole-image"
    if name == "catseg" and model is not None and not headed:
        raise ValueError("protocol catseg needs a model with a trained head: train one with `silc train catseg`.")
    for known in PROTOCOLS:
        if known.name == name:
            return dataclasses.replace(known, **VARIANTS.get((name, re.sub(r"[^a-z0-9]", "", of.lower())), {}))
    raise ValueError(f"there is no segmentation protocol {name!r}." + nearest(name, [p.name for p in PROTOCOLS]))


def probability_scale(how: Protocol, model: Silc) -> float:
    return float(model.scale.detach()) if how.scale is None else how.scale


# ---------------------------------------------------------------- the picture


def fit_size(height: int, width: int, how: Protocol, config: ModelConfig) -> tuple[int, int]:
    """Size at which the model sees a picture: short side and limit of the protocol, each side that is no longer than
    the window rounded to a multiple of the patch."""
    if how.square:
        return how.short, how.short
    patch, short = config.image.patch, how.short or config.preprocess.size
    scale = min(short / min(height, width), (how.long or 4 * short) / max(height, width))
    sides = [max(1, round(side * scale)) for side in (height, width)]
    whole = [not how.window or side < how.window for side in sides]
    new_height, new_width = (max(1, round(s / patch)) * patch if w else s for s, w in zip(sides, whole))
    return new_height, new_width


def fit(image: Tensor, how: Protocol, config: ModelConfig) -> Tensor:
    """uint8 [3, h, w] -> uint8 [3, H, W] for `encode`."""
    height, width = fit_size(image.shape[-2], image.shape[-1], how, config)
    return resize(image, height, width, how.interpolation or config.preprocess.interpolation)


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
    """Patch features of one picture [windows, D, gh, gw], the windows' boxes, the size they lie in, and how the scores
    of windows are merged: for `probability`, after a softmax of scale x cosine."""

    features: Tensor
    boxes: list[tuple[int, int, int, int]]
    size: tuple[int, int]
    merge: Merge = "cosine"
    scale: float = 1.0


def encode(model: Silc, pixels: Tensor, how: Protocol, batch: int = 8) -> list[Dense]:
    """Normalised pixels [B, 3, H, W] of one size -> a Dense for each; `batch` windows go through the model at a time.

    Raises ValueError if the protocol's window is no multiple of the model's patch, or if it has windows but does not
    merge them.
    """
    patch = model.config.image.patch
    if how.window % patch:
        raise ValueError(
            f"protocol {how.name}: its window of {how.window} px is no multiple of the model's patch, {patch} px; "
            "take whole-image or maskclip, which fit any patch."
        )
    if how.window and how.merge == "none":
        raise ValueError(f"protocol {how.name}: it has windows, so `merge` must be cosine or probability, not none.")
    size = (pixels.shape[-2], pixels.shape[-1])
    boxes = windows(*size, how)
    crops = torch.stack([pixels[:, :, t : t + h, x : x + w] for t, x, h, w in boxes], dim=1).flatten(0, 1)
    dense = torch.cat([model.encode_dense(part, how.readout).float() for part in crops.split(batch)])
    scale = probability_scale(how, model)
    return [Dense(part, boxes, size, how.merge, scale) for part in dense.unflatten(0, (len(pixels), len(boxes)))]


# ---------------------------------------------------------------- scores


def cosine_maps(dense: Dense, vectors: Tensor, height: int, width: int) -> Tensor:
    """Cosine of every pixel with every vector, windows averaged: vectors [T, D] -> [T, height, width]."""
    maps = torch.einsum("ndhw,td->nthw", dense.features, vectors)
    if dense.merge == "none":
        return _bilinear(maps[0], height, width)
    canvas = maps.new_zeros(len(vectors), *dense.size)
    for one, (top, left, h, w) in zip(maps, dense.boxes):
        canvas[:, top : top + h, left : left + w] += _bilinear(one, h, w)
    return _bilinear(canvas.div_(_covered(dense)), height, width)


def probability_maps(dense: Dense, vectors: Tensor, height: int, width: int, totals: Sequence[Tensor]) -> Tensor:
    """Probability of every vector at every pixel, windows averaged: [T, height, width].

    `totals` of `softmax_totals` over *all* vectors; these may be some of them, so that T stays small.
    """
    maps = torch.einsum("ndhw,td->nthw", dense.features * dense.scale, vectors)
    canvas = maps.new_zeros(len(vectors), *dense.size)
    for one, total, (top, left, h, w) in zip(maps, totals, dense.boxes):
        canvas[:, top : top + h, left : left + w] += _bilinear(one, h, w).sub_(total).exp_()
    return _bilinear(canvas.div_(_covered(dense)), height, width)


def softmax_totals(dense: Dense, vectors: Tensor) -> list[Tensor]:
    """log sum exp over all vectors [T, D] of scale x cosine at the pixels of each window: [h, w] each.

    The first of two passes: softmax does not commute with interpolation, so it must be taken at the pixels, where all
    T scores of a picture would not fit into memory.
    """
    totals = [dense.features.new_full((h, w), -torch.inf) for _, _, h, w in dense.boxes]
    step = max(1, PIXELS_AT_ONCE // max(total.numel() for total in totals))
    for part in vectors.split(step):
        maps = torch.einsum("ndhw,td->nthw", dense.features * dense.scale, part)
        for i, (one, (_, _, h, w)) in enumerate(zip(maps, dense.boxes)):
            totals[i] = torch.logaddexp(totals[i], _bilinear(one, h, w).logsumexp(0))
    return totals


def _covered(dense: Dense) -> Tensor:
    """How many windows lie over each pixel: [H, W]."""
    seen = dense.features.new_zeros(dense.size)
    for top, left, h, w in dense.boxes:
        seen[top : top + h, left : left + w] += 1
    return seen


def _bilinear(maps: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]


def label_map(
    dense: Dense, names: ClassEmbeddings, height: int, width: int, threshold: float | None = None, scale: float = 1.0,
    area: float = 0.0,
) -> Tensor:
    """The class of the best name at every pixel: int64 [height, width]; the first of equals.

    With a `threshold`, pixels whose best probability is lower become 0; `names` may leave class 0 out. The probability
    is softmax(scale x cosine) over the names; where windows are merged as probabilities, it is the merged one. With an
    `area`, classes from 1 on with at most this share of the pixels not 0 are taken out first, for the next best ones.
    A few names at a time, with a running best and log-sum: T x height x width scores never exist at once.
    """
    totals = softmax_totals(dense, names.vectors) if dense.merge == "probability" else None
    summed = threshold is not None and totals is None
    best, label, total = _best(dense, names, height, width, totals, scale if summed else None)
    if area:
        sizes = torch.bincount(label.flatten(), minlength=names.classes)
        sizes[0] = 0
        stays = sizes > area * sizes.sum()
        stays[0] = True
        kept = stays[names.owner]
        if not kept.all():
            fewer = dataclasses.replace(names, vectors=names.vectors[kept], owner=names.owner[kept])
            best, label, _ = _best(dense, fewer, height, width, totals, None)
    if threshold is not None:
        label[((best * scale - total).exp() if summed else best) < threshold] = 0
    return label


def _best(
    dense: Dense, names: ClassEmbeddings, height: int, width: int, totals: Sequence[Tensor] | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Best score, its class, and with a `scale` the log sum exp of scale x cosine over all names: [height, width]."""
    best = dense.features.new_full((height, width), -torch.inf)
    label = names.owner.new_zeros((height, width))
    total = torch.full_like(best, -torch.inf)
    for vectors, owner in _parts(dense, names, height, width):
        if totals is None:
            maps = cosine_maps(dense, vectors, height, width)
        else:
            maps = probability_maps(dense, vectors, height, width, totals)
        values, index = maps.max(0)
        better = values > best
        best = torch.where(better, values, best)
        label = torch.where(better, owner[index], label)
        if scale is not None:
            total = torch.logaddexp(total, maps.mul_(scale).logsumexp(0))
    return best, label, total


def _parts(dense: Dense, names: ClassEmbeddings, height: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, PIXELS_AT_ONCE // max(height * width, dense.size[0] * dense.size[1]))
    yield from zip(names.vectors.split(step), names.owner.split(step))


def foreground(classes: Sequence[Sequence[str]], background: bool, how: Protocol) -> list[list[str]]:
    """Names to embed, by class: without class 0 if the protocol has its own rule for the background.

    Raises ValueError if the rule has a single foreground class left: its probability is 1 everywhere.
    """
    if how.merge == "sigmoid":
        firsts = [list(names[:1]) for names in classes]
        return [list(how.background_names or classes[0]), *firsts[1:]] if background else firsts
    ruled = background and how.background is not None
    kept = [list(names) for names in (classes[1:] if ruled else classes)]
    if ruled and len(kept) < 2:
        raise ValueError(
            f"protocol {how.name}: its background threshold needs two foreground classes; use whole-image for this set."
        )
    return kept
