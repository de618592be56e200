"""One page that shows what one or several training runs learned: report.html with its pictures beside it.

Gives: `build`, `Section`.
Used by: quickstart.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from silc.app import plots
from silc.app.pages import template
from silc.app.runs import (
    Run,
    about,
    all_facts,
    differences,
    duration,
    interval,
    is_share,
    metric_name,
    number,
    primary,
    read_run,
    score,
    set_names,
    short_count,
    span,
    times,
)
from silc.plain import to_dict

TERMS = ("contrast", "distill", "masked")
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str, str, dict[str, Any]], ...]], ...] = (
    ("Loss", "Thin: every logged step. Thick: running mean.", (
        ("loss", "Loss", "The training loss.", {}),
        ("contrast", "Image–text contrast", "Each picture against the captions of its batch, and the reverse.", {}),
        ("distill", "Local-to-global distillation",
         "Cross-entropy between the teacher's global view and the student's local views.", {}),
        ("masked", "Masked patches", "Hidden patches predicted against the teacher's prototypes.", {}))),
    ("Teacher", "Whether self-distillation is alive or has collapsed.", (
        ("teacher_entropy", "Teacher entropy",
         "At ln K the teacher finds all prototypes alike; near 0 it is always sure of one.", {"unit": "nats"}),
        ("prototype_use", "Prototypes in use", "Share, of as many as a batch can fill, that lead for some view.",
         {"percent": True, "zero": True}))),
    ("Optimisation", "", (
        ("logit_scale", "Logit scale", "Inverse temperature of the contrastive loss.", {"kind": "exact"}),
        ("logit_bias", "Logit bias", "Offset of the sigmoid loss.", {"kind": "exact"}),
        ("lr", "Learning rate", "The schedule as applied.", {"kind": "exact"}),
        ("grad_norm", "Gradient norm", "Before clipping.", {}))),
    ("Speed", "", (
        ("images_per_s", "Throughput", "Image–text pairs through the whole step.",
         {"unit": "pairs per second", "zero": True}),
        ("wait", "Waiting for data", "Share of the time the model stood idle.", {"percent": True, "zero": True}),
        ("memory_mb", "Peak memory", "Of the training process.", {"unit": "MB", "zero": True, "kind": "exact"}))))


@dataclass(frozen=True)
class Section:
    """A part of the page that its caller makes: paragraphs (parted by blank lines), PNG files, one table.

    With pictures it comes right after the scores, otherwise after the curves.
    """

    title: str
    text: str = ""
    pictures: Sequence[tuple[Path, str]] = ()
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


@dataclass(frozen=True)
class Figure:
    """A picture on the page; `src` relative to it, `dark` its twin for dark pages or empty, size in CSS pixels."""

    src: str
    dark: str
    caption: str
    alt: str
    width: int
    height: int


# ---------------------------------------------------------------- headline


def _headline(runs: Sequence[Run], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row a set and metric: the last score of every run with its interval, chance and times chance, ready to print.

    A score is marked only if its interval lies wholly above those of all other runs: anything less may be noise.
    """
    rows = []
    for order, name in enumerate(dict.fromkeys(key for run in runs for key in run.evals)):
        last = [run.evals[name][-1] if name in run.evals else {"metrics": {}, "chance": {}} for run in runs]
        label, task = set_names(name, labels)
        first = primary(last)[:1]
        for key in dict.fromkeys(key for line in last for key in line["metrics"]):
            values = [number(line["metrics"].get(key)) for line in last]
            chances = [number(line["chance"].get(key)) for line in last]
            ends = [None if v is None else interval(line, key) for v, line in zip(values, last)]
            percent = is_share(key, [*values, *chances])
            levels = list(dict.fromkeys(score(c, percent) for c in chances if c is not None))
            scores = [{"run": run.name, "slot": slot, "text": score(v, percent), "times": times(v, c),
                       "span": span(e, percent), "ends": e, "at": v if percent else None,
                       "best": percent and _above(slot, ends)}
                      for slot, (run, v, c, e) in enumerate(zip(runs, values, chances, ends))]
            rows.append({
                "order": order, "task": task, "label": label, "metric": metric_name(key), "primary": key in first,
                "percent": percent, "constant": name.startswith("seg"), "chance": " / ".join(levels) or "–",
                "chance_at": next((c for c in chances if c is not None and percent), None), "scores": scores})
    return rows


def _above(slot: int, ends: Sequence[tuple[float, float] | None]) -> bool:
    """Whether one interval lies wholly above all others; False where one of them is not known."""
    mine, others = ends[slot], [e for i, e in enumerate(ends) if i != slot]
    return mine is not None and bool(others) and all(e is not None and mine[0] > e[1] for e in others)


def _tiles(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The scores that stand for the sets, the round number where their bars end, and columns that leave few holes."""
    chosen = [row for row in rows if row["primary"] and row["percent"]]
    reach = [max(s["at"], s["ends"][1] if s["ends"] else 0.0) for row in chosen for s in row["scores"]
             if s["at"] is not None]
    top = next(t for t in (0.1, 0.2, 0.5, 1.0) if t >= max([*reach, 0.0]) or t == 1.0)
    columns = min((5, 4, 3), key=lambda c: (-len(chosen) % c, -c)) if len(chosen) > 5 else max(3, len(chosen))
    return {"rows": chosen, "top": top, "columns": columns}


def _lede(runs: Sequence[Run], pictures: bool) -> str:
    """One sentence about the page."""
    seen = list(dict.fromkeys(short_count(run.train[-1]["samples"]) for run in runs if run.train))
    names = [run.name for run in runs]
    who = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    after = f" from {seen[0]} image–text pairs{' each' * (len(runs) > 1)}" if len(seen) == 1 else ""
    finds = "it finds" if len(names) == 1 else "they find"
    parts = ["scores on every evaluation set", *[f"pictures of what {finds}"] * pictures, "and how training went"]
    return f"What {who} learned{after}: {', '.join(parts) if pictures else ' '.join(parts)}."


# ---------------------------------------------------------------- pictures


def _figure(out: Path, file: Path, caption: str, name: str = "", alt: str = "") -> Figure:
    """Refer to a PNG, copying it and its dark twin to out/pictures/NAME unless it lies there. ValueError if missing."""
    if not file.is_file():
        raise ValueError(f"the picture {file} of the report does not exist.")
    head = file.read_bytes()[:24]
    if head[:8] != b"\x89PNG\r\n\x1a\n" or len(head) < 24:
        raise ValueError(f"the picture {file} of the report is not a PNG file.")
    place, twin = file, plots.dark_twin(file)
    if file.parent.resolve() != (out / "pictures").resolve():
        place = out / "pictures" / name
        shutil.copyfile(file, place)
        if twin.is_file():
            shutil.copyfile(twin, plots.dark_twin(place))
    width, height = (round(side * 100 / plots.DPI) for side in struct.unpack(">II", head[16:]))
    dark = f"pictures/{quote(plots.dark_twin(place).name)}" if twin.is_file() else ""
    return Figure(f"pictures/{quote(place.name)}", dark, caption, alt or caption, width, height)


def _levels(runs: Sequence[Run]) -> dict[str, list[tuple[str, float]]]:
    """Dashed levels by training key: the loss of a guess among the batch, and of a teacher that knows nothing."""
    batches = {run.config.train.batch for run in runs if run.config.objective.kind == "softmax"}
    counts = {run.config.objective.prototypes.count for run in runs if run.series("teacher_entropy")[0]}
    even = [("ln K =", math.log(k)) for k in sorted(counts) if k > 1]
    # Different batches have different guesses: no common level then.
    guess = [("guess: ln B =", math.log(b)) for b in batches if b > 1 and len(batches) == 1]
    return {"contrast": guess, "distill": even, "masked": even, "teacher_entropy": even}


def _training(runs: Sequence[Run], out: Path) -> list[dict[str, Any]]:
    """Chapters of the curves that at least one run has."""
    levels = _levels(runs)
    plain = not any(run.series(term)[0] for run in runs for term in TERMS)
    chapters = []
    for title, text, charts in CHARTS:
        figures = []
        for key, name, caption, style in charts:
            lines = [plots.Line(run.name, *run.series(key), slot) for slot, run in enumerate(runs)]
            lines = [line for line in lines if len(line.x)]
            if not lines or (key == "loss" and not plain):
                continue
            path = out / "pictures" / f"train-{key.replace('_', '-')}.png"
            plots.curves(lines, path, title=name, references=levels.get(key, ()), **style)
            figures.append(_figure(out, path, caption, alt=f"{name}. {caption}"))
        chapters.append({"id": title.lower(), "title": title, "text": text, "figures": figures})
    return chapters


def _progress(runs: Sequence[Run], out: Path, labels: Mapping[str, str]) -> dict[str, Any]:
    """Chapter of the evaluations over the pairs seen, for the metrics that stand for each set."""
    figures: list[Figure] = []
    banded = False
    for name in dict.fromkeys(key for run in runs for key in run.evals):
        lines = [line for run in runs for line in run.evals.get(name, [])]
        label, task = set_names(name, labels)
        for key in primary(lines):
            chances = [c for line in lines if (c := number(line["chance"].get(key))) is not None]
            found = [line for slot, run in enumerate(runs) if (line := _points(run, name, key, slot))]
            if found:
                banded |= any(line.band for line in found)
                what = metric_name(key) if task == label else f"{task} · {metric_name(key)}"
                word = "best constant" if name.startswith("seg") else "chance"
                path = out / "pictures" / f"eval-{len(figures):02d}.png"
                plots.curves(found, path, title=label, unit=what, kind="points",
                             percent=is_share(key, [*chances, *(y for line in found for y in line.y)]),
                             references=[(word, level) for level in chances[-1:]])
                figures.append(_figure(out, path, "", alt=f"{label}, {what}, over the pairs seen"))
    text = "Dashed: chance, or for segmentation the best constant answer."
    return {"id": "learning", "title": "Scores during training", "figures": figures,
            "text": text + " Shaded: 95% interval over the images of the set." * banded}


def _points(run: Run, name: str, key: str, slot: int) -> plots.Line | None:
    """The curve of one metric with its intervals where there are any, or None for fewer than two points."""
    told = [(line["samples"], v, interval(line, key)) for line in run.evals.get(name, [])
            if (v := number(line["metrics"].get(key))) is not None]
    ends = [e or (math.nan, math.nan) for _, _, e in told]
    band = ([low for low, _ in ends], [high for _, high in ends]) if any(e for _, _, e in told) else None
    return plots.Line(run.name, [x for x, _, _ in told], [y for _, y, _ in told], slot, band) if len(told) > 1 else None


# ---------------------------------------------------------------- the page


def build(runs: dict[str, Path], out: Path, sections: Sequence[Section], phases: Sequence[tuple[str, float]],
          title: str, facts: Sequence[tuple[str, str]], labels: Mapping[str, str] | None = None,
          summary: str = "") -> Path:
    """Write out/report.html with its pictures in out/pictures and return its path.

    runs: run folders by the name they bear on the page, the one it is about first; phases: name and wall time in
    seconds, in order; facts: label and text; labels: titles of evaluation sets; summary: a sentence on what
    the runs are. The page needs neither network nor scripts.
    Raises ValueError for a missing run or picture, or if jinja2 or matplotlib is not installed.
    """
    page = template("report.html")
    if not runs:
        raise ValueError("the report needs at least one run folder.")
    told = [read_run(name, Path(folder)) for name, folder in runs.items()]
    labels = labels or {}
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    rows, chapters = _headline(told, labels), [_progress(told, out, labels), *_training(told, out)]
    chapters = [chapter for chapter in chapters if chapter["figures"]]
    extra = [_section(section, i, out) for i, section in enumerate(sections, 1)]
    shown, rest = [s for s in extra if s["figures"]], [s for s in extra if not s["figures"]]
    time = _time(phases, told)
    contents = [("results", "Results")] * bool(rows) + [(c["id"], c["title"]) for c in (*shown, *chapters, *rest)]
    contents += [("time", "Time")] * bool(time["phases"]) + [("facts", "Facts"), ("settings", "Settings")]
    html = page.render(
        title=title, summary=summary, lede=_lede(told, bool(shown)), runs=told, rows=rows, tiles=_tiles(rows),
        spans=any(s["span"] for row in rows for s in row["scores"]), chapters=chapters, contents=contents, shown=shown,
        rest=rest, time=time, about=about(told), differences=differences(told), facts=all_facts(told, facts),
        configs=[json.dumps(to_dict(run.config), indent=2) for run in told])
    path = out / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _time(phases: Sequence[tuple[str, float]], runs: Sequence[Run]) -> dict[str, Any]:
    """Parts of the time bar, without those too short to see, and a sentence on the total.

    Beside several runs, a colour stands for the run that a phase names; others are grey.
    """
    total = math.fsum(seconds for _, seconds in phases)
    told = []
    for i, (name, seconds) in enumerate(phases):
        slots = [i] if len(runs) == 1 else [slot for slot, run in enumerate(runs) if run.name in name]
        colour = (f"var(--run{slots[0] % len(plots.LIGHT.runs)})" if slots
                  else f"color-mix(in srgb,var(--muted) {(80, 50, 25)[i % 3]}%,var(--card))")
        share = 100 * seconds / (total or 1.0)
        if share >= 1:
            told.append({"name": name, "time": duration(seconds), "share": share, "colour": colour})
    text = f"{duration(total)} of wall time in all"
    text += "; parts under 1% are not shown." if len(told) < len(phases) else "."
    before = math.fsum(run.seconds for run in runs)
    if before > total:
        text += f" Training took {duration(before)}, a part of it in earlier calls."
    return {"phases": told, "text": text}


def _section(section: Section, place: int, out: Path) -> dict[str, Any]:
    figures = [_figure(out, Path(file), caption, f"section-{place}-{i}.png")
               for i, (file, caption) in enumerate(section.pictures, 1)]
    return {"id": f"section-{place}", "title": section.title, "table": section.table, "figures": figures,
            "paragraphs": [text.strip() for text in section.text.split("\n\n") if text.strip()]}
