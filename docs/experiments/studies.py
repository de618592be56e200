"""Makes the pages of the studies from their raw files: tables, plots, and the figures within the text.

    python docs/experiments/studies.py [NAME ...]      all those whose records.jsonl is here

NAME/text.md is written by hand. Where it says `{{gain ARM SAMPLES SET METRIC}}`, there stands the gain over the
baseline at equal samples; `flops` instead of `gain` is that at equal FLOPs, `wins` in how many seeds the arm is ahead,
`score` the arm's own score, `over ARM OTHER SAMPLES SET METRIC` the gain over another arm, `together ARM SET METRIC`
the gain over all durations with seeds. `cost ARM SAMPLES` is its FLOPs as a multiple of the baseline's, `slope ARM SET
METRIC` its rise for each doubling, `steeper` how much more that is than the baseline's, `corpus KEY` a fact of
NAME/corpus.json, `photographs KEY` one of NAME/photographs.json, `readouts` the table of NAME/readouts.jsonl; `runs`,
`hours` and `machine` tell how many there were, how long they trained, and on what.
NAME/README.md is that text with the figures in it and the tables behind it.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from silc.plain import read_json
from silc.study import declared
from silc.study.analysis import Interval, apart, gain, gain_at_equal_flops, rows, series, slope, together
from silc.study.declared import Study
from silc.study.page import write
from silc.study.running import read_records
from silc.study.tables import markdown, tables

HERE = Path(__file__).parent
FIGURE = re.compile(r"\{\{(.*?)\}\}")


def page(name: str, folder: Path) -> str:
    study, records = declared.get(name), read_records(folder / "records.jsonl")
    text = FIGURE.sub(lambda found: figure(study, records, found[1].split()), (folder / "text.md").read_text())
    wrapped = "\n\n".join(map(fill, text.strip().split("\n\n")))
    return f"{wrapped}\n\n{markdown(tables(study, records))}"


def fill(part: str) -> str:
    """A paragraph, or the items of a list, at the width of a page."""
    if part[:1] in "#|!`":
        return part
    items = re.split(r"\n(?=- )", part)
    width = {"width": 118, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(" ".join(one.split()), subsequent_indent="  " * one.startswith("- "), **width)
                     for one in items)  # fmt: skip


def figure(study: Study, records: Sequence[Mapping[str, Any]], words: Sequence[str]) -> str:
    what, *rest = words
    if what in ("corpus", "photographs"):
        value: Any = read_json(HERE / study.name / f"{what}.json")
        for key in rest:
            value = value[key]
        return f"{value:,}" if isinstance(value, int) else str(value)
    if what == "readouts":
        return readouts(HERE / study.name / "readouts.jsonl", study)
    if what == "pairs":
        return f"{study.samples[int(rest[0])]:,}"
    if what == "runs":
        return str(len(records))
    if what == "hours":
        return f"{sum(r['seconds'] for r in records) / 3600:.1f}"
    if what == "machine":
        return ", ".join(sorted({f"{r['machine']['device']}, PyTorch {r['machine']['torch']}" for r in records}))
    arm, *rest = rest
    if what == "cost":
        costs = {r["arm"]: r["flops"] for r in records if r["samples"] == int(rest[0])}
        return f"{costs[arm] / costs[study.baseline]:.2f}"
    other = rest.pop(0) if what == "over" else study.baseline
    samples, score = rest[0], " ".join(rest[1:])
    if what in ("slope", "steeper", "together"):
        samples, score = "0", " ".join(rest)
    known = series(rows(records), score)
    one, base, n = known[arm], known[other], int(samples)
    if what == "score":
        return f"{100 * one.mean(n):.1f}"
    if what == "wins":
        ours, theirs = one.values[n], base.values[n]
        shared = ours.keys() & theirs.keys()
        return f"{sum(ours[seed] > theirs[seed] for seed in shared)} of {len(shared)}"
    if what in ("gain", "over"):
        return told(gain(one, base, n))
    if what == "flops":
        return told(gain_at_equal_flops(one, base, n))
    if what == "together":
        found = together(one, base, study.samples)
        return told(found[1] if found else None)
    rise = one if what == "slope" else apart(one, base)
    return told(slope(rise, study.samples))


def readouts(raw: Path, study: Study) -> str:
    """Pixel accuracy (mIoU) by read-out, in percent, mean over seeds."""
    lines = [json.loads(line) for line in raw.read_text().splitlines()]
    ways = list(lines[0]["readouts"])
    table = ["| arm | pairs | seeds | " + " | ".join(ways) + " |", "|---|" + "---:|" * (len(ways) + 2)]
    for arm in study.arms:
        for samples in study.samples:
            mine = [line["readouts"] for line in lines if (line["arm"], line["samples"]) == (arm, samples)]
            if mine:
                pairs = [[100 * mean(one[way][m] for one in mine) for m in ("pixel_accuracy", "miou")] for way in ways]
                cells = [f"{accuracy:.1f} ({miou:.1f})" for accuracy, miou in pairs]
                table.append(f"| {arm} | {samples:,} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(table)


def told(found: Interval | None) -> str:
    if found is None:
        return "not known"
    return f"{100 * found.mean:+.1f}" + (f" ± {100 * found.half:.1f}" if found.half is not None else "")


def make(names: Sequence[str]) -> None:
    for name in names or [n for n in declared.names() if (HERE / n / "records.jsonl").exists()]:
        folder = HERE / name
        write(declared.get(name), read_records(folder / "records.jsonl"), folder)
        (folder / "study.html").unlink()  # its pictures are here beside it
        (folder / "results.md").unlink()  # its tables are in README.md
        (folder / "README.md").write_text(page(name, folder))
        print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    make(sys.argv[1:])
