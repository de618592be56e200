"""How memory grows with what a user makes large: `python benchmarks/growth.py`.

Gives: benchmarks/results/growth.json and docs/images/growth-*.png: added memory of the contrastive losses for batches
of 256 to 32,768, of the prototype loss for 4,096 to 262,144 prototypes, of zero-shot segmentation for 20 to 847 classes
(a process each), and of each process of a step for 1 to 4 processes, read from processes.json where it is. `exponent`
is the slope of log memory over log size in the upper half of the sizes: 0 is flat, 1 linear, 2 a whole matrix.
Used by: pages.py.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import RESULTS, alone, arguments, have, target, write

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
WHY: dict[str, str] = {}
MOST = 1.1
"""An exponent above this is more than linear; the rest is what a resident-set reading leaves open."""
FLOOR = 2**20
"""Readings below a MiB are pages that the process had anyway."""


@dataclass(frozen=True)
class Line:
    """One measured quantity: which case of which file, and how its size is said."""

    name: str
    axis: str
    file: str
    case: str
    sizes: Sequence[int]
    quick: Sequence[int]
    words: tuple[str, ...] = ()
    """Flags; {n} stands for the size, as in `case`."""
    small: bool = False
    """Run the file's own quick form, whose other sizes are small."""


BATCHES, COUNTS = [2**i for i in range(8, 16)], [2**i for i in range(12, 19)]
CLASSES = [20, 59, 150, 400, 847]
AXES = {"batch": "batch", "prototypes": "prototypes K", "classes": "classes", "world": "processes"}
LINES = [
    Line("softmax contrastive", "batch", "contrastive.py", "softmax silc {n}", BATCHES, [2048, 4096]),
    Line("sigmoid contrastive", "batch", "contrastive.py", "sigmoid silc {n}", BATCHES, [2048]),
    Line(
        "prototypes and loss, 32 images",
        "prototypes",
        "prototypes.py",
        "silc",
        COUNTS,
        [16384],
        ("--pictures", "32", "--count", "{n}"),
    ),
    Line(
        "zero-shot segmentation, one 512 x 256 picture",
        "classes",
        "eval_memory.py",
        "segment tcl",
        CLASSES,
        [20],
        ("--classes", "{n}"),
        small=True,
    ),
]


def measured(line: Line, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for n in line.quick if quick else line.sizes:
        words = [word.format(n=n) for word in line.words]
        found = alone(HERE / line.file, line.case.format(n=n), line.small, *words)
        rows.append({"case": line.name, "axis": line.axis, "size": n, "above_bytes": found["above_bytes"]})
    return rows


def of_processes() -> list[dict[str, Any]]:
    """Memory of a process of a step by number of processes, as processes.py measured it."""
    kept = RESULTS / "processes.json"
    rows = json.loads(kept.read_text())["rows"] if kept.is_file() else []
    return [
        {"case": f"step, {row['case']}", "axis": "world", "size": row["world"], "above_bytes": row["above_bytes"]}
        for row in rows
        if "world" in row and "above_bytes" in row
    ]


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x in the upper half (at least two points)."""
    upper = sorted(points)[-max(2, math.ceil(len(points) / 2)) :]
    x, y = ([math.log(max(v, low)) for v in axis] for axis, low in zip(zip(*upper), (1, FLOOR)))
    return statistics.linear_regression(x, y).slope


def draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """A picture an axis: memory over size, both logarithmic, beside what a linear growth would be."""
    if (found := have("matplotlib")) is None:
        return
    found[0].use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for axis, label in AXES.items():
        mine = [row for row in rows if row["axis"] == axis]
        if not mine:
            continue
        figure, plot = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
        for name in dict.fromkeys(row["case"] for row in mine):
            x, y = zip(*((r["size"], max(r["above_bytes"], FLOOR) / 2**20) for r in mine if r["case"] == name))
            plot.plot(x, y, "o-", label=name)
            plot.plot([x[-1] / 4, x[-1]], [y[-1] / 4, y[-1]], ":", color="0.5")
        plot.set(xscale="log", yscale="log", xlabel=label, ylabel="added memory, MiB")
        sizes = sorted({row["size"] for row in mine})
        plot.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=30, fontsize=8)
        plot.minorticks_off()
        low, high = plot.get_ylim()
        if high < 30 * low:  # at least a power of ten is seen, so that the axis has numbers
            plot.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
        plot.yaxis.set_major_formatter("{x:,.0f}")
        plot.grid(alpha=0.3)
        plot.legend(fontsize=8, title="dotted: linear growth", title_fontsize=8)
        figure.savefig(folder / f"growth-{axis}.png", dpi=130, facecolor="white")
        pyplot.close(figure)


def main() -> None:
    args = arguments(__doc__)
    rows = [row for line in LINES for row in measured(line, args.quick)] + of_processes()
    targets, exponents = [], {}
    for name in dict.fromkeys(row["case"] for row in rows):
        points = [(row["size"], row["above_bytes"]) for row in rows if row["case"] == name]
        if len(points) < 2:
            continue
        exponents[name] = exponent(points)
        told = f"memory of {name}, {min(points)[0]:,} to {max(points)[0]:,}: exponent"
        targets.append(target(told, "linear", exponents[name], most=MOST))
    if args.out:
        draw(rows, IMAGES if args.out == RESULTS else args.out)
    write(args.out, "growth", rows, targets, exponents=exponents)


if __name__ == "__main__":
    main()
