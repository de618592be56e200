"""Curves over training, and how every picture of the report is written: once for light pages and once for dark ones.

Gives: `Line`, `curves` (writes X.png and X-dark.png); `save`, `text_width`, `dark_twin`, `Theme`, `LIGHT`, `DARK`.
Used by: app/report, app/grids, app/card.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from silc.app.runs import score, short_count

DPI = 180
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


@dataclass(frozen=True)
class Line:
    """One curve: `x` pairs seen, `y` values (NaN leaves a gap), `slot` the colour of its run, `band` low and high."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    slot: int = 0
    band: tuple[Sequence[float], Sequence[float]] | None = None


def dark_twin(path: Path) -> Path:
    """Where the same picture for dark pages lies."""
    return path.with_name(f"{path.stem}-dark{path.suffix}")


def _matplotlib() -> Any:
    """The package with the parts that are used here. ValueError if it is missing."""
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
        import matplotlib.font_manager
    except ImportError:
        raise ValueError('pictures need matplotlib: pip install "silc[quickstart]".') from None
    return matplotlib


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    """An empty figure in inches and its canvas."""
    mpl = _matplotlib()
    figure = mpl.figure.Figure(figsize=(width, height), dpi=DPI)
    return figure, mpl.backends.backend_agg.FigureCanvasAgg(figure)


@functools.cache
def _fonts() -> list[str]:
    known = {font.name for font in _matplotlib().font_manager.fontManager.ttflist}
    return [name for name in FONTS if name in known][:1] + ["DejaVu Sans"]


@functools.lru_cache(4096)
def text_width(text: str, size: float) -> float:
    """How many inches a line of text in the page's font takes. ValueError if matplotlib is missing."""
    font = _matplotlib().font_manager.FontProperties(family=_fonts(), size=size)
    return float(_canvas(1, 1)[1].get_renderer().get_text_width_height_descent(text, font, False)[0]) / DPI


def save(path: Path, width: float, height: float, draw: Callable[[Any, Theme], None]) -> Path:
    """Draw a figure of `width` x `height` inches in both colour schemes. ValueError if matplotlib is missing."""
    mpl = _matplotlib()
    path.parent.mkdir(parents=True, exist_ok=True)
    for theme, file in ((LIGHT, path), (DARK, dark_twin(path))):
        # Captions are data: a dollar sign in one must not start a formula.
        style: dict[Any, Any] = {
            "text.parse_math": False, "font.family": _fonts(), "font.size": 9.0, "text.color": theme.ink,
            "axes.labelcolor": theme.muted, "xtick.color": theme.muted, "ytick.color": theme.muted,
            "axes.edgecolor": theme.rule, "axes.facecolor": theme.card}
        with mpl.rc_context(style):
            figure, _ = _canvas(width, height)
            draw(figure, theme)
            figure.savefig(file, facecolor=theme.card, metadata={"Software": None})
    return path


# ---------------------------------------------------------------- curves


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
            if line.band:
                low, high = (np.asarray(ends, float) * factor for ends in line.band)
                axes.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)
        axes.margins(x=0.02, y=0.08)
        if zero:
            axes.set_ylim(0, max(1.08 * axes.dataLim.y1, 1e-9))
        _references(axes, theme, [(name, level * factor) for name, level in references], percent)
        axes.set_xlabel("image–text pairs seen", fontsize=8.5)
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}%")
        figure.text(0.018, 0.965, title, va="top", fontsize=10.5, fontweight="bold")
        if unit:
            figure.text(0.018, 0.895, unit, va="top", fontsize=8.5, color=theme.muted)
        if len(lines) > 1:
            figure.legend(*axes.get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(0.99, 0.985),
                          ncols=min(3, len(lines)), frameon=False, fontsize=8.5, handlelength=1.3, columnspacing=1.2)

    return save(path, 4.7, 2.9, draw)


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
        label = f"{name} {score(level / 100 if percent else level, percent)}"
        axes.annotate(label, (1.0, level), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                      textcoords="offset points", ha="right", color=theme.muted, fontsize=8)
