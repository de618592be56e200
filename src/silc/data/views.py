"""Views: one picture, decoded once, cut into global and local crops; colours changed later, in batches, on the device.

Gives: `sample_rng`, `crop_box`, `Crop`, `draw_crops`, `spare`, `room_for`, `cut`, `draw_photometric`, `photometric`.
Used by: data/loader (draws and cuts, on the CPU), train/pretrain (applies the photometric part where the model runs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silc.config import ViewsConfig
from silc.data.images import constant, resize

Numbers = NDArray[np.float32]

RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop."""
TRIES = 10

PHOTOMETRIC = ("brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarise")
"""Columns of the photometric parameters; (1, 1, 1, 0, 0, 0, 0) changes nothing. Hue is in turns, sigma in pixels."""
JITTER = (0.4, 0.4, 0.2, 0.1)
"""Half-widths of the uniform draws of brightness, contrast, saturation (about 1) and hue (about 0)."""
SSD = (0.25, 0.5, 0.5, 0.05)
"""The same of `ssd`."""
P_JITTER, P_GREY, P_SOLARISE = 0.8, 0.2, 0.2
P_BLUR = (1.0, 0.1, 0.5)
"""Of the first global view, of the other global views, of local views (and of a global view that is the only one)."""
SIGMA = (0.1, 2.0)
RADIUS = 4
"""Of the blur's kernel, in pixels."""

LUMA = (0.299, 0.587, 0.114)
# The generator of hue rotation: an orthonormal quarter turn in the I-Q plane of YIQ, written in RGB, red towards green
QUARTER_TURN = ((-0.16774, -0.32931, 0.49705), (0.328113, -0.035467, -0.292646), (-1.249546, 1.046339, 0.203207))
SOLARISE_FROM = 127.5 / 255
"""What rounds to 128 or more."""
IN_CACHE, ON_DEVICE = 2**18, 2**25
"""Numbers that `photometric` works on at a time: what a core's cache holds, what keeps a GPU busy in little memory."""


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the sample at `position` of the stream: a function of (seed, position) and nothing else.

    Philox takes both as its key, so streams never overlap and making one costs a few microseconds.
    """
    mask = 2**64 - 1
    return np.random.Generator(np.random.Philox(key=np.array([seed & mask, position & mask], dtype=np.uint64)))


# ---------------------------------------------------------------- crops


class Crop(NamedTuple):
    """A box of a picture, in its pixels, and the view it becomes."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool
    size: int


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width), distributed as torchvision's RandomResizedCrop: area a uniform share
    in `scale`, log aspect ratio uniform in 3/4..4/3, ten tries to fit, else the largest centred box of allowed ratio.
    """
    for _ in range(TRIES):
        area, ratio, y, x = rng.random(4).tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    h = min(height, round(width / RATIO[0]))
    w = min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def draw_crops(height: int, width: int, views: ViewsConfig, rng: np.random.Generator) -> list[Crop]:
    """The crops of a picture of this size, global ones first: each an independent `crop_box`, mirrored with probability
    one half when `views.flip` (SILC section 3, after DINO's multi-crop)."""
    kinds = [(views.global_size, views.global_scale)] * views.globals + [
        (views.local_size, views.local_scale)
    ] * views.locals
    return [
        Crop(*crop_box(height, width, scale, rng), views.flip and rng.random() < 0.5, size) for size, scale in kinds
    ]


def spare(crops: Sequence[Crop]) -> float:
    """How many times smaller, a side, the picture could be with every crop still having its view's number of pixels."""
    return min((math.sqrt(c.height * c.width) / c.size for c in crops), default=math.inf)


def room_for(views: ViewsConfig, samples: int) -> dict[str, Tensor]:
    """Memory for the views of some samples: {"globals": uint8 [G, n, S, S, 3], "locals": uint8 [L, n, s, s, 3]}; a kind
    of zero views is absent."""
    kinds = {"globals": (views.globals, views.global_size), "locals": (views.locals, views.local_size)}
    return {
        name: torch.empty((count, samples, size, size, 3), dtype=torch.uint8)
        for name, (count, size) in kinds.items()
        if count > 0
    }


def cut(image: Tensor, crops: Sequence[Crop], height: int, width: int, out: Sequence[Tensor]) -> None:
    """Cut the crops drawn for a picture of `height` x `width` out of it, antialiased bicubic, each into its place.

    `image` uint8 [3, H, W] may be that picture decoded smaller: boxes are rounded to its pixels. `out`: for each crop
    uint8 [size, size, 3].
    """
    down, across = image.shape[-2] / height, image.shape[-1] / width
    for crop, view in zip(crops, out):
        h, w = max(1, round(crop.height * down)), max(1, round(crop.width * across))
        top = min(round(crop.top * down), image.shape[-2] - h)
        left = min(round(crop.left * across), image.shape[-1] - w)
        made = resize(image[:, top : top + h, left : left + w], crop.size, crop.size, "bicubic")
        view.permute(2, 0, 1).copy_(made.flip(-1) if crop.mirrored else made)


# ---------------------------------------------------------------- colours and blur


def draw_photometric(views: ViewsConfig, rng: np.random.Generator) -> Numbers:
    """Draw the parameters of one sample's views: float32 [G+L, P], columns as in `PHOTOMETRIC`, global views first.

    DINO's list with its published probabilities: jitter (0.4, 0.4, 0.2, 0.1) with p 0.8, grey 0.2, blur of sigma
    0.1-2 with p 1.0 / 0.1 / 0.5 on the first global, other global and local views, solarise 0.2 on the other global
    views. A single global view is blurred with p 0.5 and never solarised. Of `grey`, saturation, hue and solarise stay
    as they are, so that the three channels of a one-channel picture stay equal. `ssd`: contrast and saturation 0.5 to
    1.5, hue +-18 degrees and brightness +-25% (SSD adds up to 32 of 255), each with p 0.5, and nothing else.
    """
    count = views.globals + views.locals
    p_blur = np.full(count, P_BLUR[2])
    p_solarise = np.zeros(count)
    if views.globals > 1:
        p_blur[0] = P_BLUR[0]
        p_blur[1 : views.globals] = P_BLUR[1]
        p_solarise[1 : views.globals] = P_SOLARISE
    u = rng.random((count, 9))
    jitter = (u[:, :4] * 2 - 1) * JITTER * (u[:, 4:5] < P_JITTER) + (1, 1, 1, 0)
    sigma = (SIGMA[0] + (SIGMA[1] - SIGMA[0]) * u[:, 5]) * (u[:, 6] < p_blur)
    if views.photometric == "ssd":
        chosen = (u[:, :4] * 2 - 1) * SSD * (u[:, 4:8] < 0.5) + (1, 1, 1, 0)
        return np.column_stack([chosen, np.zeros((count, 3))]).astype(np.float32)
    if views.photometric == "grey":
        jitter[:, 2:] = 1, 0
        p_solarise[:] = 0
    drawn = np.column_stack([jitter, u[:, 7] < P_GREY, sigma, u[:, 8] < p_solarise])
    return drawn.astype(np.float32)


def photometric(pixels: Tensor, params: Numbers, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Apply drawn parameters and normalise: [V, B, 3, H, W] uint8 (or float in [0, 1]) with [V, B, P] -> float32.

    Colour jitter, grey, blur, solarise, in that order, then (x - mean) / std; deterministic, on the device of `pixels`.
    Parameters lie on the host, which therefore knows whom to blur and to solarise and never waits for the device.
    Jitter is one affine map of the colours per view in a fixed order (brightness, contrast about the mean luma,
    saturation, hue as a rotation of the YIQ plane) with one clamp at its end; torchvision's goes in random order,
    turns hue in HSV and clamps in between. Blur is DINOv2's: a Gaussian of 9 taps, mirrored at the border.
    """
    device, shape = pixels.device, pixels.shape
    pixels, rows = pixels.flatten(0, 1), params.reshape(-1, params.shape[-1]).astype(np.float64)
    # A blur keeps flat colours, so it commutes with normalisation, which then costs nothing as part of the affine map
    spread = np.asarray(std)[:, None]
    matrix = _colour_matrix(rows) / spread / (1.0 if pixels.is_floating_point() else 255.0)
    sigma, solarise = rows[:, PHOTOMETRIC.index("sigma")], rows[:, PHOTOMETRIC.index("solarise")]
    table = np.concatenate([matrix.reshape(-1, 9), _luma_kept(rows, pixels), _taps(sigma)], 1).astype(np.float32)
    numbers = _on(device, table)
    out = torch.empty(pixels.shape, dtype=torch.float32, device=device)
    step = max(1, (IN_CACHE if device.type == "cpu" else ON_DEVICE) // max(1, math.prod(shape[2:])))
    # inference mode spares many small operations their bookkeeping; `out` is made before it, so it can be trained on
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            _colour(pixels[part], numbers[part], mean, std, out[part])
            _on_some(out[part], sigma[part], partial(_blur, taps=numbers[part, 10:]))
            _on_some(out[part], solarise[part], partial(_solarise, mean=mean, std=std))
    return out.view(shape)


def _on(device: torch.device, numbers: NDArray[Any]) -> Tensor:
    """A copy on the device, from pinned memory where it is a GPU, so that the host need not wait. PyTorch aligns the
    copy, as NumPy does not its arrays: products of unaligned numbers may differ in the last bit from run to run."""
    copy = torch.tensor(numbers)
    return copy.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else copy.to(device)


def _on_some(x: Tensor, column: NDArray[np.float64], change: Callable[[Tensor, slice | Tensor], None]) -> None:
    """Change in place those rows of `x` whose entry in `column` is not zero; `change` is told which they are."""
    found = np.flatnonzero(column)
    if len(found) == len(column):
        change(x, slice(None))
    elif len(found):
        rows = _on(x.device, found)
        picked = x[rows]
        change(picked, rows)
        x[rows] = picked


def _colour_matrix(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, P] -> [N, 3, 3]: brightness, contrast without its shift, saturation, hue and grey of each row."""
    brightness, contrast, saturation, hue, grey = rows[:, :5].T[:, :, None, None]
    chroma, angle = saturation * (1 - grey), hue * (2 * math.pi)
    keep, turn = chroma * np.cos(angle), chroma * np.sin(angle)
    # Luma stays, chroma is scaled and turned: keep = 1, turn = 0 is the identity exactly
    luma, quarter = np.asarray(LUMA), np.asarray(QUARTER_TURN)
    return brightness * contrast * (keep * np.eye(3) + (1 - keep) * luma + turn * quarter)


def _luma_kept(rows: NDArray[np.float64], pixels: Tensor) -> NDArray[np.float64]:
    """[N, 1]: the share of a view's mean luma that contrast adds back to every pixel."""
    brightness, contrast = rows[:, :1], rows[:, 1:2]
    return (1 - contrast) * brightness / (1.0 if pixels.is_floating_point() else 255.0)


def _taps(sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sigmas [N] -> [N, 9] weights that sum to one; of a sigma of zero, the identity."""
    distance = np.arange(-RADIUS, RADIUS + 1)
    weights = np.exp(-0.5 * (distance / np.maximum(sigma, 0.01)[:, None]) ** 2)
    weights = weights * (weights > 1e-8)  # in float32 the far tail is denormal, which slows a CPU and changes nothing
    return weights / weights.sum(1, keepdims=True)


def _colour(pixels: Tensor, numbers: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    """The affine map of [n, 3, H, W] into `out`, clamped where [0, 1] lies after normalisation."""
    x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    matrix, kept = numbers[:, :9].view(-1, 3, 3), numbers[:, 9]
    shift, scale = (constant(tuple(v), x.device) for v in (mean, std))
    added = kept * (x.mean((2, 3)) * constant(LUMA, x.device)).sum(1)
    bias = (added[:, None] - shift) / scale
    torch.baddbmm(bias[:, :, None], matrix, x.flatten(2), out=out.flatten(2))
    for channel, (m, s) in enumerate(zip(mean, std)):
        out[:, channel].clamp_((0 - m) / s, (1 - m) / s)


def _blur(x: Tensor, rows: slice | Tensor, taps: Tensor) -> None:
    """Blur [n, 3, H, W] in place, down, then across, with the weights that are these rows of `taps` [N, 9]."""
    weights = taps[rows].T[:, :, None, None, None]
    for axis in (2, 3):
        padded, size = _mirrored(x, axis), x.shape[axis]
        torch.mul(padded.narrow(axis, 0, size), weights[0], out=x)
        for tap in range(1, len(weights)):
            x.addcmul_(padded.narrow(axis, tap, size), weights[tap])


def _mirrored(x: Tensor, axis: int) -> Tensor:
    """`x` with RADIUS more pixels at both ends of an axis, mirrored without repeating the border pixel."""
    size = x.shape[axis]
    if size <= RADIUS:  # mirrored more than once
        places = np.pad(np.arange(size), RADIUS, mode="reflect" if size > 1 else "edge")
        return x.index_select(axis, _on(x.device, places))
    before, after = (x.narrow(axis, at, RADIUS).flip(axis) for at in (1, size - 1 - RADIUS))
    return torch.cat([before, x, after], axis)


def _solarise(x: Tensor, rows: slice | Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """Invert in place what is 128 of 255 or more, in normalised pixels."""
    shift, scale = (constant(tuple(v), x.device)[:, None, None] for v in (mean, std))
    x.copy_(torch.where(x >= (SOLARISE_FROM - shift) / scale, (1 - 2 * shift) / scale - x, x))
