"""What the runs of a study say, as pure functions of its records.

Gives: Row, rows (a score a row), Series, series, apart, gain (equal samples), gain_at_equal_flops, slope, student_t.
Used by: study/page. A record is what study/running leaves of a cell, as plain data.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

T975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip
"""Student's t at 97.5% for 1 to 20 degrees of freedom; above, the last of them, which is too wide by 0.13 at most."""


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
    factor = T975[min(n, len(T975)) - 1]
    return Interval(mean(values), factor * stdev(values) / math.sqrt(n))


def apart(arm: Series, base: Series) -> Series:
    """arm - base at equal samples, seed by seed: runs of one seed see the same pairs in the same order."""
    both = {n: sorted(arm.values[n].keys() & base.values[n].keys()) for n in arm.durations if n in base.values}
    values = {n: {seed: arm.values[n][seed] - base.values[n][seed] for seed in seeds} for n, seeds in both.items()}
    return Series({n: found for n, found in values.items() if found}, arm.flops, arm.seconds)


def gain(arm: Series, base: Series, samples: int) -> Interval | None:
    """Mean of `apart` at a duration; None where no seed has both."""
    found = apart(arm, base).values.get(samples)
    return student_t(list(found.values())) if found else None


def together(arm: Series, base: Series, within: Collection[int]) -> tuple[list[int], Interval] | None:
    """Gain over several durations at once: those of `within` at which three seeds or more have both, and for each seed
    that has all of these the mean of `apart` over them. None where there are not two such durations and three seeds."""
    found = apart(arm, base).values
    durations = [n for n in sorted(found) if n in within and len(found[n]) > 2]
    shared = sorted(set.intersection(*(set(found[n]) for n in durations))) if durations else []
    if len(durations) < 2 or len(shared) < 3:
        return None
    return durations, student_t([mean(found[n][seed] for n in durations) for seed in shared])


def _around(base: Series, flops: float) -> tuple[int, int, float] | None:
    """The base's durations that cost at most and at least as much, and how far to go from one to the other in log
    FLOPs; None outside."""
    for n0, n1 in itertools.pairwise(base.durations):
        x0, x1 = base.flops[n0], base.flops[n1]
        if x0 * (1 - 1e-9) <= flops <= x1 * (1 + 1e-9):
            return n0, n1, math.log(flops / x0) / math.log(x1 / x0)
    return None


def gain_at_equal_flops(arm: Series, base: Series, samples: int) -> Interval | None:
    """arm - base were the base trained longer, at the arm's cost; linear in log FLOPs between the base's durations.
    None where the base never cost as much.

    Seed by seed, so that the scatter of both counts, where three seeds or more have both of these durations of the
    base; else against the base's means, and the interval tells how the arm's seeds scatter alone."""
    found = _around(base, arm.flops[samples])
    if found is None:
        return None
    n0, n1, share = found
    ours, (low, high) = arm.values[samples], (base.values[n0], base.values[n1])
    shared = sorted(ours.keys() & low.keys() & high.keys())
    if len(shared) > 2:
        return student_t([ours[s] - (low[s] + share * (high[s] - low[s])) for s in shared])
    level = base.mean(n0) + share * (base.mean(n1) - base.mean(n0))
    return student_t([value - level for value in ours.values()])


def slope(one: Series, within: Collection[int]) -> Interval | None:
    """Rise for each doubling of the duration: least squares over all runs of these durations, with its 95% interval.
    None for one duration."""
    points = [(math.log2(n), v) for n in one.durations if n in within for v in one.values[n].values()]
    if not points:
        return None
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
    factor = T975[min(free, len(T975) - 1)]
    return Interval(rise, factor * math.sqrt(left / free / spread))
