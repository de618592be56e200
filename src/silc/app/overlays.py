"""Pictures of answers: heat maps and label maps over the picture they are about.

Gives: overlay_heatmap, overlay_labels, palette.
Used by: the command line, app/segmenting.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from silc.predict import Picture, as_image

HEAT = np.array(
    [(12, 10, 40), (74, 22, 106), (148, 42, 98), (214, 74, 64), (246, 140, 40), (252, 214, 92), (255, 255, 220)]
)
"""Dark to bright, evenly rising in lightness."""


def overlay_heatmap(image: Picture, maps: Tensor, texts: Sequence[str], columns: int = 4) -> Image.Image:
    """The picture, then one panel a text with its map [T, H, W] over it and the range of its cosines.

    All panels share one colour scale: a text that is nowhere in the picture stays dark beside one that is.
    """
    pixels = as_image(image).permute(1, 2, 0).numpy()
    values = maps.float().numpy()
    low, high = float(values.min()), float(values.max())
    stops = np.linspace(0, 1, len(HEAT))
    panels = [("picture", pixels)]
    for text, one in zip(texts, values):
        level = (one - low) / max(high - low, 1e-12)
        heat = np.stack([np.interp(level, stops, HEAT[:, c]) for c in range(3)], -1)
        grey = pixels.mean(-1, keepdims=True)
        panels.append((f"{one.min():.2f}…{one.max():.2f}  {text}", (0.3 * grey + 0.7 * heat).astype(np.uint8)))
    return _grid(panels, columns)


def overlay_labels(
    image: Picture, label: Tensor, names: Sequence[str], colours: Sequence[Sequence[int]] | None = None
) -> Image.Image:
    """The picture beside its label map [H, W] in colours, with a legend of the labels that occur and their share."""
    pixels, found = as_image(image).permute(1, 2, 0).numpy(), label.numpy()
    colours_of = np.array(colours if colours is not None else palette(len(names)))
    painted = (0.35 * pixels + 0.65 * colours_of[found]).astype(np.uint8)
    sheet = _grid([("picture", pixels), ("labels", painted)], 2)
    share = np.bincount(found.ravel(), minlength=len(names)) / found.size
    seen = [i for i in np.argsort(-share, kind="stable") if share[i] > 0]
    font, line = _font(15), 24
    wide = 60 + max(int(font.getlength(f"{names[i]}  100.0%")) for i in seen)
    legend = Image.new("RGB", (sheet.width + wide, max(sheet.height, line * len(seen) + 40)), "white")
    legend.paste(sheet)
    draw = ImageDraw.Draw(legend)
    for row, i in enumerate(seen):
        top = 34 + row * line
        draw.rectangle((sheet.width + 8, top, sheet.width + 24, top + 16), fill=tuple(int(v) for v in colours_of[i]))
        draw.text((sheet.width + 32, top - 1), f"{names[i]}  {100 * share[i]:.1f}%", fill="black", font=font)
    return legend


def _grid(panels: Sequence[tuple[str, np.ndarray]], columns: int, side: int = 320) -> Image.Image:
    """Titled panels in rows, each picture's long side `side` pixels."""
    height, width = panels[0][1].shape[:2]
    w, h = (max(1, round(v * side / max(height, width))) for v in (width, height))
    gap, title, font = 10, 24, _font(15)
    # a title needs room also over a narrow picture
    cell = max(w, 160)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (h + title + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (text, pixels) in enumerate(panels):
        left, top = gap + i % columns * (cell + gap), gap + i // columns * (h + title + gap)
        while font.getlength(text) > cell and len(text) > 4:
            text = text[: max(1, len(text) * 9 // 10 - 1)].rstrip("…") + "…"
        draw.text((left, top), text, fill="black", font=font)
        sheet.paste(Image.fromarray(pixels).resize((w, h), Image.Resampling.BICUBIC), (left, top + title))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours of so many labels."""
    return [_colour(i) for i in range(count)]


def _colour(index: int) -> tuple[int, int, int]:
    """Colours far apart for neighbouring indices: hues by the golden ratio, lightness in turns."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, (0.85, 0.55)[index % 2], (0.95, 0.75, 0.6)[index % 3])
    return round(255 * red), round(255 * green), round(255 * blue)
