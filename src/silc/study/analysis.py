"""What the runs of a study say, as pure functions of its records.

Gives: Row, rows (a score a row), Series, series, gain (equal samples), gain_at_equal_flops, slope, student_t.
Used by: study/page. A record is what study/running leaves of a cell, as plain data.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

T975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5% for 1 to 10 degrees of freedom; above, the normal's 1.96 within 0.24."""


class Row(NamedTuple):
    """One score of one run."""

    arm: str
    samples: int
    seed: int
    set: str
    metric: str
    value: float
    chance: float | None
    low: float | None
    high: float | None
    flops: float
    seconds: float


def rows(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Every score of every record; `flops` and `seconds` are the run's whole cost in training."""
    found = []
    for r in records:
        for name, scores in r["scores"].items():
            for metric, s in scores.items():
                low, high = s.get("interval") or (None, None)
                found.append(Row(r["arm"], r["samples"], r["seed"], name, metric, s["value"], s.get("chance"), low,
                                 high, r["flops"], r["seconds"]))  # fmt: skip
    return found


@dataclass(frozen=True)
class Series:
    """One arm's values of one score: by duration, one a seed; and what a run of that duration costs."""

    values: dict[int, dict[int, float]]
    """Samples -> seed -> value."""
    flops: dict[int, float]
    seconds: dict[int, float]

    @property
    def durations(self) -> list[int]:
        return sorted(self.values)

    def mean(self, samples: int) -> float:
        return mean(self.values[samples].values())

    def ends(self, samples: int) -> tuple[float, float]:
        """Lowest and highest of the seeds."""
        return min(self.values[samples].values()), max(self.values[samples].values())


def series(of: Iterable[Row], score: str) -> dict[str, Series]:
    """By arm, the score called `SET METRIC`."""
    found: dict[str, Series] = {}
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in of:
        if f"{row.set} {row.metric}" != score:
            continue
        one = found.setdefault(row.arm, Series({}, {}, {}))
        one.values.setdefault(row.samples, {})[row.seed] = row.value
        one.flops[row.samples] = row.flops
        seconds[row.arm, row.samples].append(row.seconds)
        one.seconds[row.samples] = mean(seconds[row.arm, row.samples])
    return found


class Interval(NamedTuple):
    """A mean and its 95% interval, which is None for a single value."""

    mean: float
    half: float | None

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out zero, else 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def student_t(values: Sequence[float]) -> Interval:
    """Mean and half-width of the 95% interval, of values that scatter normally."""
    n = len(values)
    if n < 2:
        return Interval(values[0], None)
    factor = T975[n - 1] if n - 1 < len(T975) else 1.96
    return Interval(mean(values), factor * stdev(values) / math.sqrt(n))


def gain(arm: Series, base: Series, samples: int) -> Interval:
    """arm - base at a duration, seed by seed: runs of one seed see the same pairs in the same order."""
    ours, theirs = arm.values[samples], base.values[samples]
    return student_t([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def at_flops(base: Series, flops: float) -> float | None:
    """The base's mean score were it trained at that cost: linear in log FLOPs between its durations; None outside."""
    known = sorted((base.flops[n], base.mean(n)) for n in base.durations)
    for (x0, y0), (x1, y1) in itertools.pairwise(known):
        if x0 * (1 - 1e-9) <= flops <= x1 * (1 + 1e-9):
            return y0 + (y1 - y0) * (math.log(flops / x0) / math.log(x1 / x0))
    return None


def gain_at_equal_flops(arm: Series, base: Series, samples: int) -> Interval | None:
    """arm - base were the base trained longer, at the arm's cost. None where the base never cost as much.

    The interval tells how the arm's seeds scatter; the base enters by its means."""
    level = at_flops(base, arm.flops[samples])
    if level is None:
        return None
    return student_t([value - level for value in arm.values[samples].values()])


def slope(one: Series) -> Interval | None:
    """Rise for each doubling of the duration: least squares over all runs, with its 95% interval. None for one
    duration."""
    points = [(math.log2(n), v) for n in one.durations for v in one.values[n].values()]
    x, y = zip(*points)
    if len(set(x)) < 2:
        return None
    centre, level = mean(x), mean(y)
    spread = sum((a - centre) ** 2 for a in x)
    rise = sum((a - centre) * (b - level) for a, b in points) / spread
    free = len(points) - 2
    if free < 1:
        return Interval(rise, None)
    left = sum((b - level - rise * (a - centre)) ** 2 for a, b in points)
    factor = T975[free] if free < len(T975) else 1.96
    return Interval(rise, factor * math.sqrt(left / free / spread))
