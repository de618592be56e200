"""Evaluations side by side: how far apart they are, and whether that is more than noise.

Gives: compare, terminal, markdown, write, Row, Difference.
Used by: the command line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from silc.app.results import Outcome, items, read
from silc.app.runs import interval, number
from silc.eval.metrics import bootstrap
from silc.plain import nearest

SAME = ("set", "split", "count", "captions", "train", "classes", "protocol", "templates", "void")
"""Details in which two results must agree to be compared."""
Z = 1.959964
"""Half of a 95% interval in standard deviations."""


@dataclass(frozen=True)
class Difference:
    """Score of one run minus that of the first. `paired`: both answered the same items, so what is hard for both
    cancels out. `unpaired`: from the two intervals alone, which is wider than need be. `none`: no interval is known."""

    value: float
    low: float | None
    high: float | None
    kind: Literal["paired", "unpaired", "none"]

    def says(self, first: str, other: str) -> str:
        """In points (percent), and as a sentence."""
        if self.low is None or self.high is None:
            return "no interval is known" if self.value else "equal"
        span = f"[{100 * min(abs(self.low), abs(self.high)):.2f}, {100 * max(abs(self.low), abs(self.high)):.2f}]"
        if self.low > 0 or self.high < 0:
            return f"{other if self.value > 0 else first} better by {100 * abs(self.value):.2f} {span}"
        return f"within noise: {100 * self.value:+.2f} [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


@dataclass(frozen=True)
class Row:
    """One metric of one set: a score a run, and a difference to the first for each of the others."""

    set: str
    metric: str
    count: int | None
    scores: list[float]
    differences: list[Difference]


@dataclass(frozen=True)
class Comparison:
    names: list[str]
    rows: list[Row]
    alone: dict[str, list[str]]
    """Sets that not all runs have -> the runs that have them."""


def compare(folders: Sequence[Path], sets: Sequence[str] = ()) -> Comparison:
    """Compare folders of results, every one with the first, on the sets (or some of them) that all have.

    Differences come with 95% intervals: a paired bootstrap over pictures where both stored the outcome of every item.
    ValueError for fewer than two folders, no common set, an unknown one of `sets`, or two results of one set that do
    not agree in protocol, templates, split, classes or count: the sentence names what differs.
    """
    if len(folders) < 2:
        raise ValueError("compare needs at least two folders of results.")
    told = [read(Path(folder)) for folder in folders]
    names = _names(told)
    every = list(dict.fromkeys(name for one in told for name in one.sets))
    for name in sets:
        if name not in every:
            raise ValueError(f"no folder has results of {name!r}." + nearest(name, every))
    wanted = [name for name in every if not sets or name in sets]
    common = [name for name in wanted if all(name in one.sets for one in told)]
    if not common:
        raise ValueError(f"{' and '.join(names)} have no set in common; the first has {', '.join(told[0].sets)}.")
    rows = []
    for name in common:
        results = [one.sets[name] for one in told]
        for other, result in zip(names[1:], results[1:]):
            _check(name, names[0], results[0], other, result)
        rows += _rows(name, results)
    alone = {name: [n for n, one in zip(names, told) if name in one.sets] for name in wanted if name not in common}
    return Comparison(names, rows, alone)


def _names(told: Sequence[Outcome]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [one.folder.resolve().parts for one in told]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same folder is given twice.")


def _check(name: str, first: str, one: Mapping[str, Any], other: str, two: Mapping[str, Any]) -> None:
    a, b = one["details"], two["details"]
    for key in SAME:
        left, right = a.get(key), b.get(key)
        if key == "protocol":
            difference = _differing(left, right)
        else:
            difference = None if left == right else (key, left, right)
        if difference:
            what, left, right = difference
            raise ValueError(f"{name} cannot be compared: its {what} is {_short(left)} in {first} but {_short(right)} "
                             f"in {other}; evaluate both alike, or name the other sets with --sets.")


def _differing(left: Any, right: Any) -> tuple[str, Any, Any] | None:
    """The first entry in which two protocols differ. What was fitted to the model (a chosen l2, the model's own scale
    or size) is its result, not the protocol."""
    if not isinstance(left, dict) or not isinstance(right, dict):
        return None if left == right else ("protocol", left, right)
    for key in sorted(set(left) | set(right)):
        if key in ("scale", "size", "l2_held_out") or (key == "l2" and "l2_held_out" in left):
            continue
        found = _differing(left.get(key), right.get(key))
        if found:
            return (f"protocol {key}" if found[0] == "protocol" else found[0], found[1], found[2])
    return None


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)} ({', '.join(map(str, value[:2]))}, ...)" if len(value) > 2 else str(value)
    return str(value)


# ---------------------------------------------------------------- differences


def _rows(name: str, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    stored = [items(one["details"]) for one in results]
    values = [dict(one["metrics"]) for one in results]
    if all("picture_miou" in one for one in stored):
        for own, one in zip(values, stored):
            own["picture_miou"] = float(one["picture_miou"][0].mean())
    rows = []
    for metric in values[0]:
        scores = [number(own.get(metric)) for own in values]
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            continue
        differences = [
            _difference(known[i] - known[0], stored[0].get(metric), stored[i].get(metric),
                        interval(results[0]["details"], metric), interval(results[i]["details"], metric))
            for i in range(1, len(known))
        ]
        rows.append(Row(name, metric, results[0]["details"].get("count"), known, differences))
    return rows


Items = tuple[np.ndarray, np.ndarray]


def _difference(
    value: float, one: Items | None, two: Items | None,
    first: tuple[float, float] | None, second: tuple[float, float] | None,
) -> Difference:
    if one is not None and two is not None and np.array_equal(one[1], two[1]):
        low, high = bootstrap(torch.from_numpy(two[0] - one[0]), torch.from_numpy(one[1]), draws=2000)
        return Difference(value, low, high, "paired")
    if first is None or second is None:
        return Difference(value, None, None, "none")
    error = math.hypot(*((high - low) / 2 for low, high in (first, second))) / Z
    return Difference(value, value - Z * error, value + Z * error, "unpaired")


# ---------------------------------------------------------------- tables


def _cells(found: Comparison) -> list[list[str]]:
    many = len(found.names) > 2
    head = ["set", "metric", *found.names, *(f"{name} against {found.names[0]}" for name in found.names[1:])]
    lines = [head if many else [*head[:-1], "difference, 95% interval"]]
    for row in found.rows:
        said = [one.says(found.names[0], other) + ("" if one.kind != "unpaired" else " (unpaired)")
                for one, other in zip(row.differences, found.names[1:])]
        lines.append([row.set, row.metric, *(f"{100 * score:.2f}" for score in row.scores), *said])
    return lines


def _notes(found: Comparison) -> list[str]:
    notes = ["Scores in percent, differences in points. Intervals: bootstrap over pictures, paired unless it says not."]
    return notes + [f"{name} is only in {', '.join(of)}." for name, of in found.alone.items()]


def terminal(found: Comparison) -> str:
    """A table for a screen."""
    cells = _cells(found)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    numbers = range(2, 2 + len(found.names))
    lines = ["  ".join(f"{cell:>{w}}" if i in numbers else f"{cell:<{w}}"
                       for i, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", *_notes(found)])


def markdown(found: Comparison) -> str:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in _cells(found)]
    rule = ["---:" if 2 <= i < 2 + len(found.names) else "---" for i in range(len(cells[0]))]
    rows = ["| " + " | ".join(line) + " |" for line in (cells[0], rule, *cells[1:])]
    return "\n".join([*rows, "", *_notes(found)]) + "\n"


def write(found: Comparison, folder: Path) -> None:
    """compare.md and compare.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.md").write_text(markdown(found), encoding="utf-8")
    data = asdict(found)
    for row, one in zip(data["rows"], found.rows):
        for said, difference, other in zip(row["differences"], one.differences, found.names[1:]):
            said["says"] = difference.says(found.names[0], other)
    (folder / "compare.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
