"""From the bytes of a picture file to pixels.

Gives: `decode`, `resize`, `preprocess`, `normalise`, and `BadSample`, which says why a picture is unusable.
Used by: data/pairs, data/labelled, data/views, predict, eval.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor

from silc.config import PreprocessConfig

Interpolation = Literal["bilinear", "bicubic"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
LONGEST = 16  # aspect ratio up to which the whole picture is resized before its centre is cut out
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadSample(Exception):
    """A sample that cannot be used. `cause` is short and stable, so that causes can be counted."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def decode(data: bytes, max_pixels: int, at_least: int = 0) -> Tensor:
    """Decode a JPEG, PNG, WebP, GIF (first frame) or BMP file to uint8 [3, H, W] RGB, upright, alpha over white.

    The format is told by content, never by name. `max_pixels` bounds width x height as the header states them and is
    checked before anything is decoded (Pillow's own limit, about 179 million, stays in force as well).
    `at_least` > 0: the caller needs no more than this many pixels on the short side, so a JPEG may be decoded at a
    half, quarter or eighth of its size, which is several times quicker; the short side stays >= `at_least` if it was.
    The result lies channels-last in memory.

    Raises BadSample: `empty`, `not an image`, `too large`, `truncated` (the file ends early), `damaged`. A picture is
    whole or refused: what was decoded of a truncated one is never returned.
    """
    if not data:
        raise BadSample("empty")
    image = _open(data)
    pixels = image.width * image.height
    if not 0 < pixels <= max_pixels:
        raise BadSample("too large" if pixels else "damaged")
    if at_least > 0:
        image.draft(None, (at_least, at_least))
    # Decoders of damaged files raise nearly anything: OSError, SyntaxError, ValueError, struct.error, IndexError ...
    try:
        image.load()
        image = _to_rgb(_upright(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadSample("too large") from None
    except Exception as error:
        early = END_MARKS.get(image.format or "", b"") not in data or "truncated" in str(error).lower()
        raise BadSample("truncated" if early or isinstance(error, EOFError) else "damaged") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """Antialiased resize of uint8 [3, H, W] to uint8 [3, height, width]; what Pillow computes, to rounding."""
    if image.shape[-2:] == (height, width):
        return image
    # uint8 with channels last is the one layout for which PyTorch has a vectorised kernel
    pixels = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(pixels, (height, width), mode=interpolation, antialias=True)[0]


def preprocess(image: Tensor, cfg: PreprocessConfig) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, size, size], contiguous, not normalised.

    `squash` ignores the aspect ratio; `crop` brings the short side to `size` and keeps the centre square.
    """
    size = cfg.size
    if cfg.resize == "squash":
        return resize(image, size, size, cfg.interpolation).contiguous()
    short = min(image.shape[-2:])
    image = _centre(image, LONGEST * short)  # a strip of 1 x 10,000 pixels would grow to gigabytes
    height, width = image.shape[-2:]
    # Truncation of the long side and Python's rounding of the offset are those of the transform CLIP was trained with
    image = resize(image, int(size * height / short), int(size * width / short), cfg.interpolation)
    return _centre(image, size).contiguous()


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std as float32, on the device of `images` [..., 3, H, W]: uint8, or float in [0, 1]."""
    pixels = images.float() if images.is_floating_point() else images.float().div_(255)
    shift, scale = (torch.tensor(tuple(v), dtype=torch.float32, device=images.device) for v in (mean, std))
    return (pixels - shift[:, None, None]) / scale[:, None, None]


def _centre(image: Tensor, side: int) -> Tensor:
    top, left = (max(0, round((length - side) / 2)) for length in image.shape[-2:])
    return image[:, top : top + side, left : left + side]


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadSample("too large") from None
    except Exception:
        # The header itself is broken. With a known signature it was an image once: most often a download cut short
        webp = data.startswith(b"RIFF") and b"WEBP".startswith(data[8:12])
        raise BadSample("truncated" if webp or data.startswith(SIGNATURES) else "not an image") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF in a sound picture: show it as it lies
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion to 8 bits clips everything above 255 to white
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
