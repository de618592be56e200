"""What a study found, as plots.

Gives: plot (a score by samples, FLOPs and time), health_plot (the teacher's entropy).
Used by: study/page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from silc.app import plots
from silc.app.runs import short_count
from silc.study.analysis import Row, Series, series
from silc.study.declared import Study
from silc.study.tables import Records, score_name

AXES: tuple[tuple[str, Callable[[Series, int], float]], ...] = (
    ("pairs seen", lambda one, n: float(n)),
    ("training FLOPs", lambda one, n: one.flops[n]),
    ("seconds of training, one process", lambda one, n: one.seconds[n]),
)


def plot(study: Study, found: Sequence[Row], score: str, out: Path) -> Path:
    """Three panels: the score against samples, FLOPs and time; a line an arm, whiskers from lowest to highest seed.
    With one duration alone: a dot a seed."""
    known = series(found, score)
    chance = next((row.chance for row in found if f"{row.set} {row.metric}" == score), None)
    path = out / f"{score.replace('/', '-').replace(' ', '-')}.png"
    if len({row.samples for row in found}) == 1:
        return _dots(study, known, score, chance, path)

    def draw(figure: Any, theme: plots.Theme) -> None:
        from matplotlib.ticker import NullLocator

        for number, (label, of) in enumerate(AXES):
            axes = figure.add_axes((0.055 + number * 0.325, 0.25, 0.275, 0.62))
            for slot, arm in enumerate(a for a in study.arms if a in known):
                one = known[arm]
                x = [of(one, n) for n in one.durations]
                y = [100 * one.mean(n) for n in one.durations]
                ends = [one.ends(n) for n in one.durations]
                below, above = zip(*((m - 100 * low, 100 * high - m) for m, (low, high) in zip(y, ends)))
                whiskers = [below, above]
                main = arm == study.baseline
                colour = theme.ink if main else theme.runs[slot % len(theme.runs)]
                dashes: Any = "-" if slot < len(theme.runs) else (0, (4, 2))
                axes.errorbar(x, y, whiskers, label=arm, color=colour, lw=2.2 if main else 1.3, ls=dashes, ms=4,
                              marker="osD^vPX*hd"[slot % 10], elinewidth=0.8)  # fmt: skip
            if chance is not None:
                axes.axhline(100 * chance, color=theme.muted, lw=0.9, ls=(0, (4, 3)))
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: _count(value))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label, fontsize=8.5)
            axes.grid(color=theme.rule, lw=0.6)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.text(0.012, 0.96, f"{score_name(score)}, %", va="top", fontsize=10.5, fontweight="bold")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=min(9, len(labels)), frameon=False, fontsize=8)

    return plots.save(path, 11.0, 3.7, draw)


def _dots(study: Study, known: Mapping[str, Series], score: str, chance: float | None, path: Path) -> Path:
    """Where there is one duration: a row an arm, a dot a seed, the baseline's mean as a line."""
    arms = [arm for arm in study.arms if arm in known][::-1]

    def draw(figure: Any, theme: plots.Theme) -> None:
        axes = figure.add_axes((0.2, 0.55 / height, 0.77, 1 - 1.05 / height))
        for row, arm in enumerate(arms):
            values = [100 * value for of in known[arm].values.values() for value in of.values()]
            colour = theme.ink if arm == study.baseline else theme.runs[0]
            axes.plot(values, [row] * len(values), "o", ms=5, color=colour)
        base = known.get(study.baseline)
        if base is not None:
            axes.axvline(100 * base.mean(base.durations[0]), color=theme.ink, lw=0.9)
        if chance is not None:
            axes.axvline(100 * chance, color=theme.muted, lw=0.9, ls=(0, (4, 3)))
        axes.set_yticks(range(len(arms)), arms, fontsize=8.5)
        axes.set_xlim(left=0)
        axes.grid(color=theme.rule, lw=0.6)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)
        figure.text(0.012, 1 - 0.13 / height, f"{score_name(score)}, %", va="top", fontsize=10.5, fontweight="bold")

    height = 1.1 + 0.24 * len(arms)
    return plots.save(path, 7.0, height, draw)


def _count(value: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return short_count(value)


def health_plot(study: Study, records: Records, out: Path) -> Path | None:
    """Entropy of the teacher's targets over each run, an arm a panel."""
    arms = [arm for arm in study.arms if any(r["arm"] == arm and r["health"] for r in records)]
    if not arms:
        return None

    columns = min(6, len(arms))
    lines = -(-len(arms) // columns)
    # logged at equal distances up to the end; a term that starts late has fewer
    most = {n: max(len(r["health"]["entropy"]) for r in records if r["samples"] == n and r["health"])
            for n in {r["samples"] for r in records if r["health"]}}  # fmt: skip

    def draw(figure: Any, theme: plots.Theme) -> None:
        for number, arm in enumerate(arms):
            column, line = number % columns, number // columns
            axes = figure.add_axes((0.045 + column * 0.95 / columns, 1 - (0.85 + 1.6 * line + 1.05) / height,
                                    0.95 / columns * 0.86, 1.05 / height))  # fmt: skip
            for r in (r for r in records if r["arm"] == arm and r["health"]):
                y, gap = r["health"]["entropy"], 0.9 / most[r["samples"]]
                slot = sorted(most).index(r["samples"])
                x = [1 - gap * (len(y) - 1 - i) for i in range(len(y))]
                axes.plot(x, y, lw=0.9, color=theme.runs[slot % len(theme.runs)])
            axes.set_xlim(0, 1.02)
            axes.set_ylim(0, 1)
            axes.axhspan(0.1, 0.9, color=theme.good, alpha=0.06, lw=0)
            axes.set_title(arm, fontsize=8.5, loc="left")
            axes.tick_params(labelsize=7.5, labelleft=column == 0, labelbottom=number + columns >= len(arms))
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        figure.text(0.012, 1 - 0.12 / height, "Entropy of the teacher's targets / ln K by share of the run; a line a "
                    "run, a colour a duration", va="top", fontsize=10.5, fontweight="bold")  # fmt: skip

    height = 0.75 + 1.6 * lines
    return plots.save(out / "teacher-entropy.png", 11.0, height, draw)
