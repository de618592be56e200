"""Views: one picture, decoded once, cut into global and local crops; colours changed later, in batches, on the device.

Gives: `sample_rng`, `crop_box`, `cut`, `least_side`, `draw_photometric`, `photometric`.
Used by: data/loader (cuts and draws, on the CPU), train/pretrain (applies the photometric part where the model runs).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from silc.config import ViewsConfig
from silc.data.images import resize

RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop."""
TRIES = 10

PHOTOMETRIC = ("brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarise")
"""Columns of the photometric parameters; (1, 1, 1, 0, 0, 0, 0) changes nothing. Hue is in turns, sigma in pixels."""
JITTER = (0.4, 0.4, 0.2, 0.1)
"""Half-widths of the uniform draws of brightness, contrast, saturation (about 1) and hue (about 0)."""
P_JITTER, P_GREY, P_SOLARISE = 0.8, 0.2, 0.2
P_BLUR = (1.0, 0.1, 0.5)
"""Of the first global view, of the other global views, of local views (and of a global view that is the only one)."""
SIGMA = (0.1, 2.0)

LUMA = (0.299, 0.587, 0.114)
# The generator of hue rotation: an orthonormal quarter turn in the I-Q plane of YIQ, written in RGB, red towards green
QUARTER_TURN = ((-0.16774, -0.32931, 0.49705), (0.328113, -0.035467, -0.292646), (-1.249546, 1.046339, 0.203207))
SOLARISE_FROM = 128 / 255


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the sample at `position` of the stream: a function of (seed, position) and nothing else.

    Philox takes both as its key, so streams never overlap and making one costs a few microseconds.
    """
    mask = 2**64 - 1
    return np.random.Generator(np.random.Philox(key=np.array([seed & mask, position & mask], dtype=np.uint64)))


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


def cut(image: Tensor, views: ViewsConfig, rng: np.random.Generator) -> dict[str, Tensor]:
    """uint8 [3, H, W] -> {"globals": uint8 [G, 3, S, S], "locals": uint8 [L, 3, s, s]}; a kind of zero views is absent.

    Each view is an independent `crop_box`, resized with antialiased bicubic, mirrored with probability one half when
    `views.flip` (SILC section 3, after DINO's multi-crop).
    """
    kinds = (
        ("globals", views.globals, views.global_size, views.global_scale),
        ("locals", views.locals, views.local_size, views.local_scale),
    )
    return {
        name: _crops(image, count, size, scale, views.flip, rng) for name, count, size, scale in kinds if count > 0
    }


def least_side(views: ViewsConfig) -> int:
    """`at_least` for `decode`: the short side, in pixels, from which no crop of a 4:3 picture has fewer pixels than its
    view. A square picture's smallest crops may be enlarged by 1.15.
    """
    sides = [views.global_size * math.sqrt(3 / 4 / views.global_scale[0])] if views.globals else [0.0]
    if views.locals:
        sides.append(views.local_size * math.sqrt(3 / 4 / views.local_scale[0]))
    return math.ceil(max(sides))


def draw_photometric(views: ViewsConfig, rng: np.random.Generator) -> Tensor:
    """Draw the parameters of one sample's views: float32 [G+L, P], columns as in `PHOTOMETRIC`, global views first.

    DINO's list with its published probabilities: jitter (0.4, 0.4, 0.2, 0.1) with p 0.8, grey 0.2, blur of sigma
    0.1-2 with p 1.0 / 0.1 / 0.5 on the first global, other global and local views, solarise 0.2 on the other global
    views. A single global view is blurred with p 0.5 and never solarised.
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
    drawn = np.column_stack([jitter, u[:, 7] < P_GREY, sigma, u[:, 8] < p_solarise])
    return torch.from_numpy(drawn.astype(np.float32))


def photometric(pixels: Tensor, params: Tensor) -> Tensor:
    """Apply drawn parameters: [V, B, 3, H, W] uint8 (or float in [0, 1]) with [V, B, P] -> float32 in [0, 1].

    Colour jitter, grey, blur, solarise, in that order; deterministic, on the device of `pixels`; parameters are moved
    there. Jitter is one affine map of the colours per view in a fixed order (brightness, contrast about the mean luma,
    saturation, hue as a rotation of the YIQ plane) with one clamp at its end; torchvision's goes in random order,
    turns hue in HSV and clamps in between. Blur is a whole Gaussian, mirrored at the border, so that any size works.
    """
    params = params.to(pixels.device, torch.float32)
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):
        for view, (x, p) in enumerate(zip(pixels, params)):  # one view at a time bounds the temporaries
            x = x.float() if x.is_floating_point() else x.float().div_(255)
            x = _blur(_colour(x, p), p[:, PHOTOMETRIC.index("sigma")])
            solarised = (p[:, PHOTOMETRIC.index("solarise"), None, None, None] > 0) & (x >= SOLARISE_FROM)
            out[view] = torch.where(solarised, 1 - x, x)
    return out


def _crops(
    image: Tensor, count: int, size: int, scale: tuple[float, float], flip: bool, rng: np.random.Generator
) -> Tensor:
    out = torch.empty((count, 3, size, size), dtype=torch.uint8)
    for view in out:
        top, left, h, w = crop_box(image.shape[-2], image.shape[-1], scale, rng)
        crop = resize(image[:, top : top + h, left : left + w], size, size, "bicubic")
        view.copy_(crop.flip(-1) if flip and rng.random() < 0.5 else crop)
    return out


def _colour(x: Tensor, params: Tensor) -> Tensor:
    """Jitter and grey of [B, 3, H, W] in [0, 1]. Written without matrix products, which a device may round to TF32."""
    brightness, contrast, saturation, hue, grey = params[:, :5].unbind(1)
    luma = x.new_tensor(LUMA)
    chroma, angle = saturation * (1 - grey), hue * (2 * math.pi)
    keep, turn = (f[:, None, None] for f in (chroma * angle.cos(), chroma * angle.sin()))
    # Luma stays, chroma is scaled and turned: keep = 1, turn = 0 is the identity exactly
    matrix = keep * torch.eye(3, device=x.device) + (1 - keep) * luma + turn * x.new_tensor(QUARTER_TURN)
    matrix = (brightness * contrast)[:, None, None] * matrix
    shift = (1 - contrast) * brightness * (x.mean((2, 3)) * luma).sum(1)
    out = torch.empty_like(x)
    for channel, weights in enumerate(matrix[..., None, None].unbind(1)):
        out[:, channel] = weights[:, 0] * x[:, 0] + weights[:, 1] * x[:, 1] + weights[:, 2] * x[:, 2]
    return out.add_(shift[:, None, None, None]).clamp_(0, 1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of [B, 3, H, W] with a sigma per sample [B]; zero leaves the sample bit for bit."""
    blurred = x
    for _ in range(2):  # across, turn, down, turn back
        batch, channels, height, width = blurred.shape
        rows = blurred.reshape(batch, channels * height, width)
        rows = torch.bmm(rows, _gaussian(sigma, width).transpose(1, 2))
        blurred = rows.view(batch, channels, height, width).transpose(2, 3)
    return torch.where(sigma[:, None, None, None] > 0, blurred, x)


def _gaussian(sigma: Tensor, size: int) -> Tensor:
    """[B, size, size]: row i holds the weights of the output pixel i, mirrored at the border, summing to one."""
    distance = torch.arange(2 * size - 1, device=sigma.device)
    weights = torch.exp(-0.5 * (distance / sigma.clamp_min(0.01)[:, None]) ** 2)
    weights = weights * (weights > 1e-8)  # the far tail is denormal, which slows a CPU tenfold and changes nothing
    i, j = distance[:size, None], distance[None, :size]
    last = size - 1
    kernel = weights[:, (i - j).abs()]
    # Mirrored without repeating the border pixel, so the border itself has no image
    kernel = kernel + weights[:, i + j] * (j > 0) + weights[:, 2 * last - i - j] * (j < last)
    return kernel / kernel.sum(-1, keepdim=True)
