"""Grids of pictures for reports: what was found for a text, and patch-text maps beside masks.

Gives: `retrieval_grid`, `map_grid` (each writes X.png and X-dark.png), `MapRow`, `mask_colours`.
Used by: quickstart, app/card.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from silc.app.plots import Theme, save, text_width

# All lengths are inches; the page shows an inch as 100 CSS pixels.
PAGE = 10.1
MARGIN, APART, UNDER, GAP = 0.1, 0.32, 0.22, 0.09
"""Around the grid, between blocks, between lines of them, between the pictures of a block."""
CELL = 1.12
SMALL = 8.0
LEADING = 0.17
MASKS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#6a4c93")
SCALE = "viridis"
SPECK = 0.002
"""A class on a smaller share of both masks is not worth a place in the legend."""


class MapRow(TypedDict):
    """A block of `map_grid`: image [H,W,3] or [3,H,W], maps of cosines [h,w] by text, masks [H,W] of class indices."""

    image: Any
    maps: list[tuple[str, Any]]
    truth: Any
    prediction: Any
    names: list[str]
    palette: Sequence[Sequence[int]] | None


Entry = tuple[str, Any, float]
"""Of a legend: name, colour, inches from its left end."""


# ---------------------------------------------------------------- placing


def _flow(sizes: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], float, float]:
    """Set blocks of (width, height) in lines as wide as the page: their (left, top), then width and height of all."""
    places, left, top, tall, right = [], MARGIN, MARGIN, 0.0, 0.0
    for width, height in sizes:
        if left > MARGIN and left + width > PAGE - MARGIN + 1e-6:
            left, top, tall = MARGIN, top + tall + UNDER, 0.0
        places.append((left, top))
        tall, right = max(tall, height), max(right, left + width)
        left += width + APART
    return places, right + MARGIN, top + tall + MARGIN


def _shorten(text: str, size: float, width: float) -> str:
    """The text, or as much of its start as fits `width` with an ellipsis."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text
    keep = len(text)
    while keep > 1 and text_width(text[:keep].rstrip() + "…", size) > width:
        keep -= 1
    return text[:keep].rstrip() + "…"


def _wrap(text: str, size: float, width: float) -> list[str]:
    """One or two lines no wider than `width`; what does not fit ends in an ellipsis."""
    words = text.split()
    count = len(words)
    while count > 1 and text_width(" ".join(words[:count]), size) > width:
        count -= 1
    parts = [" ".join(words[:count]), " ".join(words[count:])]
    return [_shorten(part, size, width) for part in parts if part]


def _cell(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes without ticks, placed in inches from the upper left corner."""
    w, h = figure.get_size_inches()
    axes = figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def _text(figure: Any, left: float, top: float, text: str, **style: Any) -> None:
    w, h = figure.get_size_inches()
    figure.text(left / w, 1 - top / h, text, **style)


def _ring(axes: Any, colour: str, width: float) -> None:
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=width)


def _picture(image: Any) -> np.ndarray:
    """[H,W,3] for drawing, from [H,W,3] or [3,H,W], uint8 or float in [0,1], array or tensor."""
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture must be [H,W,3] or [3,H,W], not {list(array.shape)}.")
    return array if array.dtype == np.uint8 else np.clip(array.astype(float), 0.0, 1.0)


# ---------------------------------------------------------------- retrieval


def retrieval_grid(queries: Sequence[str], rows: Sequence[Sequence[tuple[Any, bool, float]]], path: Path) -> Path:
    """Draw, under each query, the pictures found for it, best first; two queries side by side where they fit.

    rows: for each query a list of (picture [H,W,3] or [3,H,W], correct, score). Right ones have a frame and a tick.
    Raises ValueError if there is nothing to draw or the counts differ.
    """
    if not queries or len(queries) != len(rows) or not all(rows):
        raise ValueError(f"retrieval_grid: {len(queries)} queries and {len(rows)} rows; each query needs its pictures.")
    columns = max(len(row) for row in rows)
    beside = 2 if len(rows) > 1 and columns <= 6 else 1
    room = (PAGE - 2 * MARGIN - (beside - 1) * APART) / beside
    side = min(CELL, (room + GAP) / columns - GAP)
    width = columns * (side + GAP) - GAP
    places, across, down = _flow([(width, side + 0.46)] * len(rows))

    def draw(figure: Any, theme: Theme) -> None:
        for query, row, (left, top) in zip(queries, rows, places):
            # Bold letters are wider than those that are measured.
            _text(figure, left, top + 0.11, _shorten(f"“{query}”", 9.5, 0.92 * width), va="center", fontsize=9.5,
                  fontweight="bold")
            for j, (image, correct, score) in enumerate(row):
                x = left + j * (side + GAP)
                axes = _cell(figure, x, top + 0.26, side, side)
                axes.imshow(_picture(image))
                _ring(axes, theme.good if correct else theme.rule, 2.6 if correct else 0.8)
                _text(figure, x + side / 2, top + 0.26 + side + 0.1, f"✓ {score:.2f}" if correct else f"{score:.2f}",
                      ha="center", va="center", fontsize=SMALL, color=theme.good if correct else theme.muted,
                      fontweight="bold" if correct else "normal")

    return save(path, across, down, draw)


# ---------------------------------------------------------------- maps and masks


def mask_colours(count: int, palette: Sequence[Sequence[int]] | None = None) -> np.ndarray:
    """[count,3] in [0,1]: the set's own palette, or one made for every colour vision, then tints and shades of it."""
    if palette is not None:
        if len(palette) < count:
            raise ValueError(f"the palette has {len(palette)} colours for {count} classes.")
        return np.asarray(palette, float)[:count] / 255.0
    base = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in MASKS])
    tint = np.array([0.0, 0.45, -0.4, 0.7])[(np.arange(count) // len(MASKS)) % 4][:, None]
    colours = base[np.arange(count) % len(MASKS)]
    return np.where(tint >= 0, colours + tint * (1 - colours), colours * (1 + tint))


def _present(row: MapRow) -> tuple[list[int], bool]:
    """Classes in either mask, those of the true one first, larger ones first; and whether pixels have no class."""
    count = len(row["names"])
    truth, guess = (np.ravel(np.asarray(mask)).astype(int) for mask in (row["truth"], row["prediction"]))
    both = np.concatenate([truth, guess])
    inside = both[(both >= 0) & (both < count)]
    areas, true = np.bincount(inside, minlength=count), np.isin(np.arange(count), truth)
    order = sorted(np.flatnonzero(areas).tolist(), key=lambda c: (not true[c], -areas[c]))
    return order, len(inside) < len(both)


def _colours(row: MapRow) -> np.ndarray:
    """[C,3]; without a palette the classes of this picture come first, since many classes share few hues."""
    count = len(row["names"])
    if row["palette"] is not None:
        return mask_colours(count, row["palette"])
    first, _ = _present(row)
    colours = np.zeros((count, 3))
    colours[first + [c for c in range(count) if c not in set(first)]] = mask_colours(count)
    return colours


def _paint(mask: Any, row: MapRow, void: Any) -> np.ndarray:
    """[H,W] class indices -> [H,W,3]; indices without a name take the colour `void` [3]."""
    colours = np.vstack([_colours(row), void])
    index = np.asarray(mask).astype(int)
    return colours[np.where((index < 0) | (index >= len(colours) - 1), len(colours) - 1, index)]


def _legend(row: MapRow, width: float) -> list[list[Entry]]:
    """Lines of entries for the classes in either mask, wrapped to `width`; a colour of None is the void's."""
    order, void = _present(row)
    colours, area = _colours(row), np.size(row["truth"])
    shares = {c: max(np.count_nonzero(np.asarray(mask) == c) for mask in (row["truth"], row["prediction"])) / area
              for c in order}
    entries: list[tuple[str, Any]] = [(row["names"][c], colours[c]) for c in order if shares[c] >= SPECK]
    entries += [("not labelled", None)] * void
    lines: list[list[Entry]] = [[]]
    left = 0.0
    for name, colour in entries:
        name = _shorten(name, SMALL, min(1.9, width - 0.2))
        need = 0.17 + text_width(name, SMALL)
        if left + need > width and lines[-1]:
            lines.append([])
            left = 0.0
        lines[-1].append((name, colour, left))
        left += need + 0.16
    return lines


def map_grid(rows: Sequence[MapRow], path: Path) -> Path:
    """Draw a block a picture: the picture, a patch-text map per text, the predicted and the true mask, a legend below.

    The maps of one block share one colour scale, whose ends are written out, so that they can be compared with each
    other. Raises ValueError if there are no rows or a picture has the wrong shape.
    """
    if not rows:
        raise ValueError("map_grid: there are no pictures to draw.")
    shapes = [_picture(row["image"]).shape for row in rows]
    heights = [CELL * min(1.5, max(0.5, h / w)) for h, w, _ in shapes]
    widths = [(len(row["maps"]) + 3) * (CELL + GAP) - GAP for row in rows]
    titles = [[_wrap(f"“{text}”", SMALL, CELL) for text, _ in row["maps"]] for row in rows]
    head = 0.07 + 0.135 * max((len(title) for block in titles for title in block), default=1)
    legends = [_legend(row, width - _legend_left(row)) for row, width in zip(rows, widths)]
    sizes = [(width, head + height + 0.08 + LEADING * len(legend))
             for width, height, legend in zip(widths, heights, legends)]
    places, across, down = _flow(sizes)

    def draw(figure: Any, theme: Theme) -> None:
        for row, titled, height, legend, (left, top) in zip(rows, titles, heights, legends, places):
            _map_row(figure, theme, row, titled, left, top + head, height)
            _map_legend(figure, theme, row, legend, left, top + head + height + 0.08 + LEADING / 2)

    return save(path, across, down, draw)


def _rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def _map_row(figure: Any, theme: Theme, row: MapRow, titles: list[list[str]], left: float, top: float,
             height: float) -> None:
    image, void = _picture(row["image"]), _rgb(theme.rule)
    low, high = _span(row)
    cells: list[tuple[list[str], Any, dict[str, Any]]] = [(["picture"], image, {})]
    cells += [(title, np.asarray(values, float), {"cmap": SCALE, "vmin": low, "vmax": high})
              for title, (_, values) in zip(titles, row["maps"])]
    cells += [([word], _paint(mask, row, void), {"interpolation": "nearest"})
              for word, mask in (("predicted", row["prediction"]), ("truth", row["truth"]))]
    for place, (title, pixels, style) in enumerate(cells):
        x = left + place * (CELL + GAP)
        axes = _cell(figure, x, top, CELL, height)
        axes.imshow(pixels, extent=(0, image.shape[1], image.shape[0], 0), **style)
        _ring(axes, theme.rule, 0.8)
        for i, line in enumerate(reversed(title)):
            _text(figure, x + CELL / 2, top - 0.07 - 0.135 * i, line, ha="center", va="baseline", fontsize=SMALL,
                  color=theme.ink if 0 < place <= len(titles) else theme.muted)


def _span(row: MapRow) -> tuple[float, float]:
    values = [np.asarray(m, float) for _, m in row["maps"]]
    return (min(float(v.min()) for v in values), max(float(v.max()) for v in values)) if values else (0.0, 1.0)


def _legend_left(row: MapRow) -> float:
    """Where the legend starts: beside the scale of the maps, if there are any."""
    return 2 * (CELL + GAP) if row["maps"] else 0.0


def _map_legend(figure: Any, theme: Theme, row: MapRow, legend: list[list[Entry]], left: float, top: float) -> None:
    style = {"va": "center_baseline", "fontsize": SMALL, "color": theme.muted}
    if row["maps"]:
        low, high = (f"{end:.2f}".replace("-", "−") for end in _span(row))
        start = left + text_width(f"cosine {low}", SMALL) + 0.09
        _text(figure, left, top, f"cosine {low}", **style)
        bar = _cell(figure, start, top - 0.045, 0.72, 0.09)
        bar.imshow(np.linspace(0, 1, 64)[None], cmap=SCALE, aspect="auto")
        _ring(bar, theme.rule, 0.0)
        _text(figure, start + 0.72 + 0.09, top, high, **style)
    for i, line in enumerate(legend):
        for name, colour, offset in line:
            x, y = left + _legend_left(row) + offset, top + LEADING * i
            patch = _cell(figure, x, y - 0.055, 0.11, 0.11)
            patch.set_facecolor(theme.rule if colour is None else tuple(colour))
            _ring(patch, theme.muted if colour is None else theme.rule, 0.5)
            _text(figure, x + 0.17, y, name, **style)
