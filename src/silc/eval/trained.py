"""Scores of a trained CAT-Seg head, the protocol `catseg`: windows and the whole picture, as means of sigmoids.

Gives: Seen, look, scores, best.
Used by: eval/segment, predict.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from silc.eval.prompts import ClassEmbeddings
from silc.eval.protocols import PIXELS_AT_ONCE, Protocol, windows
from silc.model.catseg import UNSEEN
from silc.model.silc import Silc

# Shapes: T names, D features, V views of a picture, g the side of the head's maps.

AT_ONCE = 512
"""Maps (views x names) that the head works on at a time."""
SMALLEST = 336
"""Side in pixels of the smallest model that the sizes of the protocol were made for."""


@dataclass(frozen=True)
class Seen:
    """What the head says of one picture."""

    logits: Tensor
    """[V, K, g, g]: of each window, and last of the whole picture."""
    kept: Tensor
    """[K]: the names that are among the likeliest in any view; the others have no score anywhere."""
    names: int
    """T, how many there were."""
    boxes: list[tuple[int, int, int, int]]
    size: tuple[int, int]


def at_size(how: Protocol, model: Silc) -> Protocol:
    """The protocol for this model: all its sizes shrunk where the model is smaller than those it was made for."""
    side = model.config.image.image_size
    if side >= SMALLEST:
        return how
    share = side / how.window
    return replace(how, short=round(how.short * share), window=side, stride=round(how.stride * share))


def look(model: Silc, pixels: Tensor, how: Protocol, vectors: Tensor) -> list[Seen]:
    """Normalised pixels [B, 3, S, S] and names [T, D] -> a Seen for each picture."""
    size, side = (pixels.shape[-2], pixels.shape[-1]), model.config.image.image_size
    boxes, found = windows(*size, how), []
    for picture in pixels:
        crops = torch.stack([picture[:, t : t + h, x : x + w] for t, x, h, w in boxes])
        views = [_bilinear(part, side, side) for part in (crops, picture[None])]
        few = torch.cat(views).split(max(1, AT_ONCE // len(vectors)))
        logits = torch.cat([model.segment(part, vectors).float() for part in few])
        kept = (logits.amax((0, 2, 3)) > UNSEEN).nonzero()[:, 0]
        found.append(Seen(logits[:, kept], kept, len(vectors), boxes, size))
    return found


def scores(seen: Seen, rows: slice, height: int, width: int) -> Tensor:
    """Of some of the kept names the score, 0 to 1, at every pixel: half the mean over windows, half the whole view."""
    part = seen.logits[:, rows]
    canvas, covered = part.new_zeros(part.shape[1], *seen.size), part.new_zeros(seen.size)
    for one, (top, left, h, w) in zip(part, seen.boxes):
        canvas[:, top : top + h, left : left + w] += _bilinear(one[None], h, w)[0].sigmoid_()
        covered[top : top + h, left : left + w] += 1
    _, _, h, w = seen.boxes[0]
    whole = _bilinear(_bilinear(part[-1:], h, w).sigmoid_(), *seen.size)[0]
    return _bilinear(canvas.div_(covered).add_(whole).div_(2)[None], height, width)[0]


def best(
    seen: Seen, names: ClassEmbeddings, height: int, width: int, threshold: float | None = None
) -> Tensor:
    """The class of the best name at every pixel, int64 [height, width]; 0 where its score is below a `threshold`.

    A few names at a time, so that T x height x width scores never exist at once."""
    top = seen.logits.new_full((height, width), -torch.inf)
    label = names.owner.new_zeros((height, width))
    step = max(1, PIXELS_AT_ONCE // max(height * width, seen.size[0] * seen.size[1]))
    for first in range(0, len(seen.kept), step):
        rows = slice(first, first + step)
        values, index = scores(seen, rows, height, width).max(0)
        better = values > top
        top = torch.where(better, values, top)
        label = torch.where(better, names.owner[seen.kept[rows]][index], label)
    if threshold is not None:
        label[top < threshold] = 0
    return label


def _bilinear(maps: Tensor, height: int, width: int) -> Tensor:
    same = maps.shape[-2:] == (height, width)
    return maps.clone() if same else F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
