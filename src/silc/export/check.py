"""Two libraries, one model: the same picture and captions through both, and how far apart the answers are.

Gives: Peer (another library's view of a model), compare, Row, table, unusable, sample, CAPTIONS.
Used by: the exports, which are refused when they differ; `silc inspect --check`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from silc.data.images import decode, normalise, preprocess
from silc.eval.embed import evaluating
from silc.model.silc import Silc
from silc.plain import beneath

CAPTIONS = (
    "a boat",
    "a small red boat with a white sail on a calm blue lake in front of dark green hills, under a hazy evening sky "
    "with one yellow sun that stands low over the water",
)
"""Of very different length, so that padding and cutting show."""
SIZE = (420, 280)
"""Width and height of the picture: a square one could not tell squashing from cropping."""
MAX_PIXELS = 1_000_000


@dataclass(frozen=True)
class Peer:
    """What another library makes of a model. Shapes: B pictures, T texts, D shared space, h x w patches."""

    name: str
    image: Callable[[Tensor], Tensor]
    """Pixels [B, 3, H, W], normalised -> [B, D], of any length."""
    text: Callable[[list[str]], Tensor]
    """T texts, through its own tokenizer -> [T, D]."""
    logits: Callable[[Tensor, list[str]], Tensor]
    """-> [B, T]."""
    dense: Callable[[Tensor], Tensor] | None = None
    """-> [B, D, h, w], made of its own hidden states and layers."""
    pixels: Callable[[Image.Image], Tensor] | None = None
    """A picture through its own preprocessing -> [3, H, W]."""
    position_resize: str = ""
    """How it resizes the position table for pixels of another size than the model's; empty where it takes none."""
    size: tuple[int, int] | None = None
    """Height and width of the pixels that it takes, where they are not the model's."""


@dataclass(frozen=True)
class Row:
    """One comparison: largest difference, as a number and as a share of the largest value."""

    what: str
    absolute: float
    relative: float
    tolerance: float | None
    """Largest relative difference that is allowed; None where the libraries may differ."""

    @property
    def good(self) -> bool:
        return self.tolerance is None or self.relative <= self.tolerance


def sample() -> Image.Image:
    """A drawn picture of SIZE with smooth parts, edges, fine grain and colour; the same everywhere."""
    width, height = SIZE
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    sky = np.stack([200 - 90 * y, 190 - 20 * y, 150 + 70 * x], -1)
    image = Image.fromarray(sky.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    pen.ellipse((300, 40, 350, 90), fill=(250, 220, 90))
    pen.polygon([(0, 170), (110, 90), (230, 165), (330, 110), (width, 170)], fill=(40, 80, 50))
    pen.rectangle((0, 168, width, height), fill=(50, 100, 170))
    pen.polygon([(120, 220), (250, 220), (225, 250), (145, 250)], fill=(190, 40, 40))
    pen.polygon([(185, 120), (185, 212), (250, 212)], fill=(245, 245, 240))
    grain = np.random.default_rng(0).integers(-12, 13, (height, width, 1))
    return Image.fromarray((np.asarray(image).astype(int) + grain).clip(0, 255).astype(np.uint8))


def _bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def unusable(library: str, install: str, error: BaseException) -> ValueError:
    """The error for a library that cannot be imported."""
    return ValueError(f"{library} cannot be used here ({beneath(error)}): {install}, or --no-check.")


def compare(ours: Silc, peer: Peer, tolerance: float = 1e-4) -> list[Row]:
    """Both on the sample and CAPTIONS: image, text and logits within `tolerance`, dense features within ten times that.

    At another size, not square, a difference counts only where both resize the position table alike."""
    seen, texts = ours.config.preprocess, list(CAPTIONS)
    picture = sample()
    pixels = normalise(preprocess(decode(_bytes(picture), MAX_PIXELS), seen), seen.mean, seen.std)[None].to(ours.device)
    if peer.size is not None:
        pixels = F.interpolate(pixels, peer.size, mode="bilinear")
    rows = []
    with evaluating(ours):
        if peer.pixels is not None:
            rows.append(_row("pixels", pixels[0], peer.pixels(picture), None))
        text, image = ours.encode_text(texts), ours.encode_image(pixels)
        rows.append(_row("image", image, F.normalize(peer.image(pixels).float(), dim=-1), tolerance))
        rows.append(_row("text", text, F.normalize(peer.text(texts).float(), dim=-1), tolerance))
        rows.append(_row("logits", ours.logits(image, text), peer.logits(pixels, texts), tolerance))
        if peer.dense is not None:
            dense = F.normalize(peer.dense(pixels).float(), dim=1)
            rows.append(_row("dense", ours.encode_dense(pixels), dense, 10 * tolerance))
            if peer.position_resize:
                wide = F.interpolate(pixels, _wider(ours), mode="bilinear")
                dense = F.normalize(peer.dense(wide).float(), dim=1)
                alike = ours.config.image.position_resize == peer.position_resize
                allowed = 10 * tolerance if alike else None
                rows.append(_row("dense, not square", ours.encode_dense(wide), dense, allowed))
    return rows


def _wider(model: Silc) -> tuple[int, int]:
    """A size of half as many patches again across, and one more down."""
    grid, patch = model.config.image.grid, model.config.image.patch
    return (grid + 1) * patch, (grid + (grid + 1) // 2) * patch


def _row(what: str, ours: Tensor, theirs: Tensor, tolerance: float | None) -> Row:
    if ours.shape != theirs.shape:
        raise ValueError(f"{what}: silc gives {list(ours.shape)}, the other library {list(theirs.shape)}.")
    apart = (ours.cpu().float() - theirs.cpu().float()).abs().max().item()
    return Row(what, apart, apart / max(theirs.abs().max().item(), 1e-12), tolerance)


def table(rows: list[Row]) -> str:
    """Markdown: a row a comparison."""
    lines = ["| | largest difference | relative | allowed |", "|---|---:|---:|---:|"]
    for row in rows:
        allowed = "" if row.tolerance is None else f"{row.tolerance:.0e}"
        mark = "" if row.good else " **too much**"
        lines.append(f"| {row.what} | {row.absolute:.2e} | {row.relative:.2e}{mark} | {allowed} |")
    return "\n".join(lines) + "\n"
