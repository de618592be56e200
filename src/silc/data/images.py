"""From the bytes of a picture file to pixels.

Gives: `Picture`, `decode`, `resize`, `preprocess`, `normalise`, and `BadSample`, which says why a picture is unusable.
Used by: data/pairs, data/labelled, data/loader, data/views, predict, train/pretrain, eval.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import simplejpeg
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
SIDEWAYS = (5, 6, 7, 8)


class BadSample(Exception):
    """A sample that cannot be used. `cause` is short and stable, so that causes can be counted."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Picture:
    """A picture file of which only the header has been read: its size is known before its pixels are decoded.

    JPEG, PNG, WebP, GIF (first frame) or BMP; the format is told by content, never by name. `height` and `width` are
    those of the upright picture. Only a JPEG's pixels can wait, since other formats may tell their orientation last.

    Raises BadSample: `empty`, `not an image`, `too large`, `truncated` (the file ends early), `damaged`.
    """

    def __init__(self, data: bytes, max_pixels: int) -> None:
        """`max_pixels` bounds width x height as the header states them and is checked before anything is decoded
        (Pillow's own limit, about 179 million, stays in force as well)."""
        if not data:
            raise BadSample("empty")
        self._data, self._image = data, _open(data)
        self.width, self.height = self._image.size
        pixels = self.width * self.height
        if not 0 < pixels <= max_pixels:
            raise BadSample("too large" if pixels else "damaged")
        self._whole = None if self._image.format == "JPEG" else self._load()
        if self._whole is not None:
            self.height, self.width = self._whole.shape[1:]
        elif _orientation(self._image) in SIDEWAYS:
            self.height, self.width = self.width, self.height

    def pixels(self, shrink: int = 1) -> Tensor:
        """Decode to uint8 [3, H, W] RGB, upright, alpha over white, channels last in memory. Call it once.

        `shrink` 2, 4 or 8: a JPEG's sides are divided by that (rounded up), which is quicker than decoding all of it;
        other formats come at full size. A picture is whole or refused: what was decoded of a truncated one is never
        returned.
        """
        if self._whole is not None:
            return self._whole
        if (quick := self._quick_jpeg(shrink)) is not None:
            return quick
        if shrink > 1:
            self._image.draft(None, (self._image.width // shrink, self._image.height // shrink))
        return self._load()

    def _quick_jpeg(self, shrink: int) -> Tensor | None:
        """An ordinary JPEG through libjpeg-turbo directly: Pillow's pixels without its copies. None: Pillow's turn."""
        if self._image.mode not in ("RGB", "L") or _orientation(self._image) in UPRIGHT:
            return None
        height, width = -(-self.height // shrink), -(-self.width // shrink)
        try:  # strict: whatever is not quite right is judged by Pillow
            found = simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width, strict=True)
        except ValueError:
            return None
        return torch.from_numpy(found).permute(2, 0, 1)

    def _load(self) -> Tensor:
        image = self._image
        # Decoders of damaged files raise nearly anything: OSError, SyntaxError, ValueError, struct.error, IndexError
        try:
            image.load()
            image = _to_rgb(_upright(image))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise BadSample("too large") from None
        except Exception as error:
            early = END_MARKS.get(image.format or "", b"") not in self._data or "truncated" in str(error).lower()
            raise BadSample("truncated" if early or isinstance(error, EOFError) else "damaged") from None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(data: bytes, max_pixels: int, at_least: int = 0) -> Tensor:
    """All of `Picture` in one call: uint8 [3, H, W]; raises BadSample.

    `at_least` > 0: the caller needs no more than this many pixels on the short side, so a JPEG may be decoded at a
    half, quarter or eighth of its size; the short side stays >= `at_least` if it was.
    """
    picture = Picture(data, max_pixels)
    return picture.pixels(shrink_for(min(picture.height, picture.width) / at_least) if at_least > 0 else 1)


def shrink_for(excess: float) -> int:
    """How many times smaller a JPEG may be decoded that has `excess` times the pixels a side that are needed."""
    return next((shrink for shrink in (8, 4, 2) if shrink <= excess), 1)


def resize(image: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """Antialiased resize of uint8 [3, H, W] to uint8 [3, height, width]; what Pillow computes, to rounding."""
    if image.shape[-2:] == (height, width):
        return image
    # uint8 with channels last is the one layout for which PyTorch has a vectorised kernel; that kernel is quicker down
    # than across, so most of the pixels go that way first
    pixels = image[None].contiguous(memory_format=torch.channels_last)
    pixels = F.interpolate(pixels, (height, image.shape[-1]), mode=interpolation, antialias=True)
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
    shift, scale = (constant(tuple(v), images.device)[:, None, None] for v in (mean, std))
    return (pixels - shift).div_(scale)


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [n] on `device`, made once: copying numbers to a GPU anew in every step makes the host wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


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


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken EXIF in a sound picture: show it as it lies
        return None


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image if orientation is None or orientation not in UPRIGHT else image.transpose(UPRIGHT[orientation])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion to 8 bits clips everything above 255 to white
        grey = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
