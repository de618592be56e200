"""Small pictures for a page that is one file: cut, painted with masks, and written into the page itself.

Gives: thumb, view, painted, data_uri, read_picture.
Used by: app/card, app/search_command.
"""

from __future__ import annotations

import base64
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from silc.config import DataConfig
from silc.data.images import BadSample, decode

SIDE, WIDE = 176, 420
"""Of a thumbnail, and of the long side of a picture with a mask, in pixels: about twice what the page shows."""
QUALITY = 80
VOID = (128, 128, 128)


def read_picture(path: str) -> Tensor | None:
    """uint8 [3, H, W] of a file, or of `TAR/member` without the member's suffix; None where it is not to be had."""
    try:
        return decode(_bytes(Path(path)), DataConfig().max_pixels)
    except (OSError, BadSample, tarfile.TarError):
        return None


def _bytes(path: Path) -> bytes:
    if path.is_file():
        return path.read_bytes()
    tar = next((place for place in path.parents if place.suffix == ".tar" and place.is_file()), None)
    if tar is None:
        raise FileNotFoundError(path)
    wanted = str(path.relative_to(tar))
    with tarfile.open(tar, mode="r:") as opened:
        for member in opened:
            stem, _, kind = member.name.rpartition("/")[2].partition(".")
            folder = member.name.rpartition("/")[0]
            if (f"{folder}/{stem}" if folder else stem) == wanted and kind not in ("cls", "txt", "json"):
                content = opened.extractfile(member)
                return content.read() if content else b""
    raise FileNotFoundError(path)


def data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumb(path: str) -> str:
    """A square from the middle, as a data URI; empty where the picture is not to be had."""
    pixels = read_picture(path)
    if pixels is None:
        return ""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return data_uri(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def view(pixels: Tensor) -> Image.Image:
    """uint8 [3, H, W] with its aspect kept, the long side `WIDE`."""
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scale = WIDE / max(picture.size)
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))),
                          Image.Resampling.LANCZOS)


def painted(pixels: Tensor, mask: Tensor, colours: np.ndarray) -> Image.Image:
    """The picture in grey under the colours [C, 3] of 0 to 1 of its mask [H, W]; what is no class stays grey."""
    base = view(pixels)
    table = np.vstack([255 * colours, VOID])
    index = mask.numpy()
    index = np.where((index < 0) | (index >= len(colours)), len(colours), index)
    flat = Image.fromarray(table[index].astype(np.uint8)).resize(base.size, Image.Resampling.NEAREST)
    grey = np.asarray(base.convert("L"), float)[..., None]
    return Image.fromarray((0.35 * grey + 0.65 * np.asarray(flat, float)).astype(np.uint8))
