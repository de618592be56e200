"""Pictures of the report: curves over training, retrieved pictures, patch-text maps beside masks.

Gives: `Line`, `curves`, `retrieval_grid`, `map_grid` (each writes X.png and X-dark.png), `dark_twin`, `LIGHT`, `DARK`.
Used by: app/report, quickstart.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

DPI = 180
CELL = 1.15
"""Side of a thumbnail in inches."""
GAP = 0.09
FONTS = ("Inter", "Helvetica Neue", "Arial", "Liberation Sans")


@dataclass(frozen=True)
class Theme:
    """Colours of one colour scheme; `runs` has one slot a run, told apart also without full colour vision."""

    page: str
    card: str
    ink: str
    muted: str
    rule: str
    good: str
    runs: tuple[str, ...]


# Okabe and Ito's palette, order chosen for the contrast of the first two; the dark one is the same hues, lighter.
LIGHT = Theme("#fafaf9", "#ffffff", "#16191d", "#636b76", "#e5e7eb", "#00805d",
              ("#0072b2", "#d55e00", "#009e73", "#a8558a", "#b8860b", "#2b9fd9"))
DARK = Theme("#0d1015", "#14181f", "#e8ebef", "#98a2af", "#28303b", "#35d0a5",
             ("#56b0ee", "#ff9055", "#35d0a5", "#e79cc8", "#f0c04f", "#9adcff"))
MASKS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#6a4c93")
VOID = (0.62, 0.62, 0.62)
SCALE = "viridis"


@dataclass(frozen=True)
class Line:
    """One curve: `x` pairs seen, `y` values (NaN leaves a gap), `slot` the colour of its run."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    slot: int = 0


class MapRow(TypedDict):
    """A row of `map_grid`: image [H,W,3] or [3,H,W], maps of cosines [h,w] by text, masks [H,W] of class indices."""

    image: Any
    maps: list[tuple[str, Any]]
    truth: Any
    prediction: Any
    names: list[str]
    palette: Sequence[Sequence[int]] | None


def dark_twin(path: Path) -> Path:
    """Where the same picture for dark pages lies."""
    return path.with_name(f"{path.stem}-dark{path.suffix}")


def _save(path: Path, width: float, height: float, draw: Callable[[Any, Theme], None]) -> Path:
    """Draw a figure of `width` x `height` inches in both colour schemes. ValueError if matplotlib is missing."""
    try:
        import matplotlib
        from matplotlib import font_manager
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('pictures need matplotlib: pip install "silc[quickstart]".') from None
    known = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [name for name in FONTS if name in known][:1] + ["DejaVu Sans"]
    path.parent.mkdir(parents=True, exist_ok=True)
    for theme, file in ((LIGHT, path), (DARK, dark_twin(path))):
        # Captions are data: a dollar sign in one must not start a formula.
        style: dict[Any, Any] = {
            "text.parse_math": False, "font.family": fonts, "font.size": 9.0, "text.color": theme.ink,
            "axes.labelcolor": theme.muted, "xtick.color": theme.muted, "ytick.color": theme.muted,
            "axes.edgecolor": theme.rule, "axes.facecolor": theme.card}
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.card)
            FigureCanvasAgg(figure)
            draw(figure, theme)
            figure.savefig(file, facecolor=theme.card, metadata={"Software": None})
    return path


# ---------------------------------------------------------------- curves


def short_count(value: float, _: Any = None) -> str:
    """1234567 -> `1.23M`, for axes and sentences."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Running mean over `window` neighbours, of as many as there are at the ends; non-finite values are left out."""
    known = np.isfinite(y)
    kernel = np.ones(window)
    total = np.convolve(np.where(known, y, 0.0), kernel)[(window - 1) // 2 :][: len(y)]
    count = np.convolve(known.astype(float), kernel)[(window - 1) // 2 :][: len(y)]
    return np.where(known, total / np.maximum(count, 1.0), np.nan)


def curves(lines: Sequence[Line], path: Path, *, title: str, unit: str = "", percent: bool = False,
           zero: bool = False, kind: Literal["noisy", "exact", "points"] = "noisy",
           references: Sequence[tuple[str, float]] = ()) -> Path:
    """Draw values over the pairs seen.

    `percent` shows shares of one as percent; `zero` starts the axis there; `references` are dashed levels with a
    name, such as chance. A `noisy` line is drawn thin with its running mean, an `exact` one (a schedule) as it is,
    dashed from the second on since equal ones hide each other; `points` marks every value (evaluations).
    """
    factor = 100.0 if percent else 1.0

    def draw(figure: Any, theme: Theme) -> None:
        axes = figure.add_axes((0.115, 0.155, 0.865, 0.66))
        _frame(axes, theme)
        for line in lines:
            x, y = np.asarray(line.x, float), np.asarray(line.y, float) * factor
            y[~np.isfinite(y)] = np.nan
            colour = theme.runs[line.slot % len(theme.runs)]
            style: dict[str, Any] = {"color": colour, "lw": 1.8, "label": line.label, "solid_capstyle": "round"}
            window = max(1, len(y) // 40) if kind == "noisy" else 1
            if kind == "points":
                style |= {"marker": "osD^vP"[line.slot % 6], "ms": 4, "mec": theme.card, "mew": 0.6, "zorder": 3}
            elif kind == "exact" and line is not lines[0]:
                style["ls"] = (0, (5, 2.5))
            elif window > 1:
                axes.plot(x, y, color=colour, lw=0.8, alpha=0.28)
            axes.plot(x, smooth(y, window), **style)
        axes.margins(x=0.02, y=0.08)
        if zero:
            axes.set_ylim(0, max(1.08 * axes.dataLim.y1, 1e-9))
        _references(axes, theme, [(name, level * factor) for name, level in references], percent)
        axes.set_xlabel("image–text pairs seen", fontsize=8.5)
        axes.xaxis.set_major_formatter(short_count)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}%")
        figure.text(0.018, 0.965, title, va="top", fontsize=10.5, fontweight="bold")
        if unit:
            figure.text(0.018, 0.895, unit, va="top", fontsize=8.5, color=theme.muted)
        if len(lines) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(0.99, 0.985),
                          ncols=min(3, len(lines)), frameon=False, fontsize=8.5, handlelength=1.3, columnspacing=1.2)

    return _save(path, 4.7, 2.9, draw)


def _frame(axes: Any, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=theme.rule, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _references(axes: Any, theme: Theme, levels: Sequence[tuple[str, float]], percent: bool) -> None:
    for name, level in levels:
        low, high = axes.get_ylim()
        axes.axhline(level, color=theme.muted, lw=1.1, ls=(0, (4, 3)), zorder=1)
        room = 0.09 * (max(high, level) - min(low, level))
        axes.set_ylim(min(low, level - 0.5 * room), max(high, level + 1.4 * room))
        label = f"{name} {level:.3g}%" if percent else f"{name} {level:.4g}"
        axes.annotate(label, (1.0, level), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                      textcoords="offset points", ha="right", color=theme.muted, fontsize=8)


# ---------------------------------------------------------------- grids of pictures


def _picture(image: Any) -> np.ndarray:
    """[H,W,3] for drawing, from [H,W,3] or [3,H,W], uint8 or float in [0,1], array or tensor."""
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture must be [H,W,3] or [3,H,W], not {list(array.shape)}.")
    return array if array.dtype == np.uint8 else np.clip(array.astype(float), 0.0, 1.0)


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


def retrieval_grid(queries: Sequence[str], rows: Sequence[Sequence[tuple[Any, bool, float]]], path: Path) -> Path:
    """Draw, under each query, the pictures found for it, best first.

    rows: for each query a list of (picture [H,W,3] or [3,H,W], correct, score). Right ones have a frame and a tick.
    Raises ValueError if there is nothing to draw or the counts differ.
    """
    if not queries or len(queries) != len(rows) or not all(rows):
        raise ValueError(f"retrieval_grid: {len(queries)} queries and {len(rows)} rows; each query needs its pictures.")
    columns = max(len(row) for row in rows)
    pitch = CELL + 0.66
    width = columns * (CELL + GAP) + 0.24

    def draw(figure: Any, theme: Theme) -> None:
        for i, (query, row) in enumerate(zip(queries, rows)):
            top = 0.12 + i * pitch
            letters = int((width - 0.3) / 0.082)
            _text(figure, 0.12, top + 0.14, f"“{textwrap.shorten(query, max(8, letters), placeholder='…')}”",
                  va="center", fontsize=9.5, fontweight="bold")
            for j, (image, correct, score) in enumerate(row):
                left = 0.12 + j * (CELL + GAP)
                axes = _cell(figure, left, top + 0.3, CELL, CELL)
                axes.imshow(_picture(image))
                _ring(axes, theme.good if correct else theme.rule, 2.6 if correct else 0.8)
                _text(figure, left + CELL / 2, top + 0.3 + CELL + 0.1, f"✓ {score:.3f}" if correct else f"{score:.3f}",
                      ha="center", va="center", fontsize=8, color=theme.good if correct else theme.muted,
                      fontweight="bold" if correct else "normal")

    return _save(path, width, 0.12 + len(rows) * pitch, draw)


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


def _legend(row: MapRow, width: float) -> list[list[tuple[str, np.ndarray, float]]]:
    """Lines of (name, colour, left) for the classes in either mask, wrapped to `width` inches."""
    count = len(row["names"])
    present = np.unique(np.concatenate([np.ravel(row["truth"]), np.ravel(row["prediction"])])).astype(int)
    colours = mask_colours(count, row["palette"])
    entries = [(row["names"][c], colours[c]) for c in present if 0 <= c < count]
    if any(c < 0 or c >= count for c in present):
        entries.append(("not labelled", np.array(VOID)))
    lines: list[list[tuple[str, np.ndarray, float]]] = [[]]
    left = 0.0
    for name, colour in entries:
        name = textwrap.shorten(name, 28, placeholder="…") or name[:27] + "…"
        need = 0.36 + 0.068 * len(name)
        if left + need > width and lines[-1]:
            lines.append([])
            left = 0.0
        lines[-1].append((name, colour, left))
        left += need
    return lines


def _paint(mask: Any, row: MapRow) -> np.ndarray:
    """[H,W] class indices -> [H,W,3]; indices without a name are grey."""
    colours = np.vstack([mask_colours(len(row["names"]), row["palette"]), VOID])
    index = np.asarray(mask).astype(int)
    return colours[np.where((index < 0) | (index >= len(colours) - 1), len(colours) - 1, index)]


def map_grid(rows: Sequence[MapRow], path: Path) -> Path:
    """Draw a row a picture: the picture, a patch-text map per text, the predicted mask, the true mask, a legend below.

    The maps of one row share one colour scale, whose ends are written out, so that they can be compared with each
    other. Raises ValueError if there are no rows or a picture has the wrong shape.
    """
    if not rows:
        raise ValueError("map_grid: there are no pictures to draw.")
    columns = max(len(row["maps"]) for row in rows) + 3
    width = columns * (CELL + GAP) + 0.24
    shapes = [_picture(row["image"]).shape for row in rows]
    heights = [CELL * min(1.5, max(0.5, h / w)) for h, w, _ in shapes]
    legends = [_legend(row, width - 0.24 - 2 * (CELL + GAP)) for row in rows]
    pitches = [0.38 + h + 0.16 + 0.19 * len(legend) + 0.14 for h, legend in zip(heights, legends)]

    def draw(figure: Any, theme: Theme) -> None:
        top = 0.1
        for row, height, legend, pitch in zip(rows, heights, legends, pitches):
            _map_row(figure, theme, row, top, height, columns)
            _map_legend(figure, theme, row, legend, top + 0.38 + height + 0.18, 0.12 + 2 * (CELL + GAP))
            top += pitch

    return _save(path, width, 0.1 + math.fsum(pitches), draw)


def _map_row(figure: Any, theme: Theme, row: MapRow, top: float, height: float, columns: int) -> None:
    image = _picture(row["image"])
    low, high = _span(row)
    cells: list[tuple[str, Any, dict[str, Any]]] = [("picture", image, {})]
    scale = {"cmap": SCALE, "vmin": low, "vmax": high}
    cells += [(f"“{text}”", np.asarray(values, float), scale) for text, values in row["maps"]]
    masks: list[tuple[str, Any, dict[str, Any]]] = [
        ("predicted", _paint(row["prediction"], row), {"interpolation": "nearest"}),
        ("truth", _paint(row["truth"], row), {"interpolation": "nearest"})]
    places = [*range(len(cells)), columns - 2, columns - 1]
    for place, (title, pixels, style) in zip(places, cells + masks):
        left = 0.12 + place * (CELL + GAP)
        axes = _cell(figure, left, top + 0.38, CELL, height)
        axes.imshow(pixels, extent=(0, image.shape[1], image.shape[0], 0), **style)
        _ring(axes, theme.rule, 0.8)
        lines = textwrap.wrap(title, 19, max_lines=2, placeholder="…") or [title]
        quoted = title.startswith("“")
        _text(figure, left + CELL / 2, top + 0.33, "\n".join(lines), ha="center", va="bottom", fontsize=8,
              color=theme.ink if quoted else theme.muted, linespacing=1.05)


def _span(row: MapRow) -> tuple[float, float]:
    values = [np.asarray(m, float) for _, m in row["maps"]]
    return (min(float(v.min()) for v in values), max(float(v.max()) for v in values)) if values else (0.0, 1.0)


def _map_legend(figure: Any, theme: Theme, row: MapRow, legend: list[list[tuple[str, np.ndarray, float]]],
                top: float, left: float) -> None:
    style = {"va": "center", "fontsize": 8, "color": theme.muted}
    if row["maps"]:
        low, high = _span(row)
        _text(figure, 0.12, top, f"cosine {low:.2f}".replace("-", "−"), **style)
        bar = _cell(figure, 0.12 + 0.82, top - 0.045, 0.72, 0.09)
        bar.imshow(np.linspace(0, 1, 64)[None], cmap=SCALE, aspect="auto")
        _ring(bar, theme.rule, 0.0)
        _text(figure, 0.12 + 1.6, top, f"{high:.2f}".replace("-", "−"), **style)
    for i, line in enumerate(legend):
        for name, colour, offset in line:
            patch = _cell(figure, left + offset, top + 0.19 * i - 0.055, 0.11, 0.11)
            patch.set_facecolor(tuple(colour))
            _ring(patch, theme.rule, 0.6)
            _text(figure, left + offset + 0.17, top + 0.19 * i, name, **style)
