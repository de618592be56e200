"""One page that shows what one or several training runs learned: report.html with its pictures beside it.

Gives: `build`, `Section`, `Run`, `read_run`, and the number formats `score`, `times`, `duration`, `metric_name`.
Used by: cli, quickstart.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from silc.app import plots
from silc.config import Config, load_json, to_dict

TERMS = ("contrast", "distill", "masked")
NAMES = {"cpu": "CPU", "cpus": "CPU cores", "gpu": "GPU", "git": "Commit", "torch": "PyTorch"}
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
    """A part of the page after the standard ones: paragraphs (parted by blank lines), PNG files, one table."""

    title: str
    text: str = ""
    pictures: Sequence[tuple[Path, str]] = ()
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None


@dataclass(frozen=True)
class Run:
    """What a run folder tells: settings, machine, training lines by step, evaluation lines by set, unreadable lines."""

    name: str
    config: Config
    env: dict[str, Any]
    train: list[dict[str, Any]]
    evals: dict[str, list[dict[str, Any]]]
    unreadable: int = 0

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Pairs seen and value (NaN stays), for the training lines that have `key`."""
        lines = [line for line in self.train if isinstance(line.get(key), (int, float))]
        return [line["samples"] for line in lines], [float(line[key]) for line in lines]

    @property
    def seconds(self) -> float:
        """Training time; the clock of the log starts anew at each resume, so every fall closes a part."""
        told = [*self.series("seconds")[1], -math.inf]
        return math.fsum(now for now, then in itertools.pairwise(told) if then < now)


@dataclass(frozen=True)
class Figure:
    """A picture on the page; `src` relative to it, `dark` its twin for dark pages or empty, size in CSS pixels."""

    src: str
    dark: str
    caption: str
    alt: str
    width: int
    height: int


# ---------------------------------------------------------------- reading a run


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else that a log may hold."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def read_run(name: str, folder: Path) -> Run:
    """Read config.json, env.json (may lack) and metrics.jsonl of a run folder.

    A line cut short by a kill is left out and counted; after a resume the later line of a step counts.
    Raises ValueError if the folder or one of its files is missing.
    """
    for path in (folder, folder / "config.json", folder / "metrics.jsonl"):
        if not path.exists():
            raise ValueError(f"{path} does not exist, so there is no run {name!r} to report: give a folder that "
                             "`silc train` wrote.")
    train: dict[int, dict[str, Any]] = {}
    evals: dict[str, dict[int, dict[str, Any]]] = {}
    unreadable = 0
    for text in (folder / "metrics.jsonl").read_bytes().decode("utf-8", "replace").splitlines():
        try:
            line = json.loads(text)
            if line["kind"] == "train":
                train[int(line["step"])] = {**line, "samples": int(line["samples"])}
            elif line["kind"] == "eval":
                evals.setdefault(str(line["set"]), {})[int(line["step"])] = {
                    "samples": int(line["samples"]), "metrics": dict(line["metrics"]),
                    "chance": dict(line.get("chance") or {})}
        except (ValueError, KeyError, TypeError):
            unreadable += bool(text.strip())
    if not train and not evals:
        raise ValueError(f"{folder / 'metrics.jsonl'} holds no finished step: train longer before reporting {name!r}.")
    try:
        env = dict(json.loads((folder / "env.json").read_text()))
    except (OSError, ValueError, TypeError):
        env = {}
    return Run(name, load_json(folder / "config.json", Config), env, [train[s] for s in sorted(train)],
               {key: [lines[s] for s in sorted(lines)] for key, lines in evals.items()}, unreadable)


# ---------------------------------------------------------------- numbers and names


def score(value: float | None, percent: bool) -> str:
    """0.4123 -> `41.2%`; below one percent two digits stay; other quantities with four."""
    if value is None:
        return "–"
    if not percent:
        return f"{value:.4g}"
    shown = 100 * value
    return f"{shown:.2g}%" if 0 < shown < 0.995 else f"{shown:.1f}%"


def times(value: float | None, chance: float | None) -> str:
    """How many times chance: `10.3×`, or a dash where there is no chance level."""
    if value is None or not chance or chance < 0:
        return "–"
    ratio = value / chance
    return f"{ratio:.0f}×" if ratio >= 99.5 else f"{ratio:.1f}×" if ratio >= 9.95 else f"{ratio:.2f}×"


def duration(seconds: float) -> str:
    """8054 -> `2 h 14 min`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    for size, unit, small, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        whole = round(seconds / small)
        if whole * small >= size:
            big, rest = divmod(whole * small, size)
            return f"{big} {unit} {rest // small} {part}" if rest else f"{big} {unit}"
    return f"{seconds:.0f} s"


def metric_name(key: str) -> str:
    """text_to_image_r1 -> `text → image R@1`."""
    words = re.sub(r"(?:^|_)r(?:ecall)?_?(?:at_?)?(\d+)$", r" R@\1", key.replace("_to_", " → "))
    words = re.sub(r"(?:^|_)top_?(\d+)$", r" top-\1", words)
    return re.sub(r"\bmiou\b", "mIoU", words.replace("_", " ")).strip()


def _is_share(key: str, values: Iterable[float | None]) -> bool:
    """Whether a metric reads as percent: all its values lie in [0,1] and it is not a rank, loss or the like."""
    return not re.search(r"rank|loss|error|count|entropy", key) and all(v is None or 0 <= v <= 1 for v in values)


# ---------------------------------------------------------------- headline


def _headline(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a set and metric: the last score of every run, chance and times chance, ready to print."""
    rows = []
    for order, name in enumerate(dict.fromkeys(key for run in runs for key in run.evals)):
        last = [run.evals[name][-1] if name in run.evals else {"metrics": {}, "chance": {}} for run in runs]
        keys = list(dict.fromkeys(key for line in last for key in line["metrics"]))
        first = _primary(keys, last)
        for key in keys:
            values = [_number(line["metrics"].get(key)) for line in last]
            chances = [_number(line["chance"].get(key)) for line in last]
            percent = _is_share(key, values + chances)
            known = {v for v in values if v is not None}
            best = max(known) if percent and len(known) > 1 else None
            levels = list(dict.fromkeys(score(c, percent) for c in chances if c is not None))
            task, _, label = name.partition("/")
            rows.append({
                "order": order, "task": task, "label": label or task, "metric": metric_name(key),
                "primary": key in first, "percent": percent, "constant": task.startswith("seg"),
                "chance": " / ".join(levels) or "–",
                "chance_at": next((100 * c for c in chances if c is not None and percent), None),
                "scores": [{"run": run.name, "slot": slot, "text": score(v, percent), "times": times(v, c),
                            "best": v is not None and v == best, "at": 100 * v if v is not None and percent else None}
                           for slot, (run, v, c) in enumerate(zip(runs, values, chances))]})
    return rows


def _primary(keys: list[str], lines: list[dict[str, Any]]) -> list[str]:
    """The metrics that stand for a set: recall at one, or the first that has a chance level, or the first."""
    recalls = [key for key in keys if key.endswith(("_r1", "_r_1", "recall_1"))]
    return recalls or [key for key in keys if any(key in line["chance"] for line in lines)][:1] or keys[:1]


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


def _progress(runs: Sequence[Run], out: Path) -> dict[str, Any]:
    """Chapter of the evaluations over the pairs seen, for the metrics that stand for each set."""
    figures: list[Figure] = []
    for name in dict.fromkeys(key for run in runs for key in run.evals):
        lines = [line for run in runs for line in run.evals.get(name, [])]
        task, _, label = name.partition("/")
        for key in _primary(list(dict.fromkeys(key for line in lines for key in line["metrics"])), lines):
            chances = [c for line in lines if (c := _number(line["chance"].get(key))) is not None]
            found = []
            for slot, run in enumerate(runs):
                points = [(line["samples"], v) for line in run.evals.get(name, [])
                          if (v := _number(line["metrics"].get(key))) is not None]
                if len(points) > 1:
                    found.append(plots.Line(run.name, [x for x, _ in points], [y for _, y in points], slot))
            if found:
                head = f"{label or task} · {metric_name(key)}"
                word = "best constant" if task.startswith("seg") else "chance"
                path = out / "pictures" / f"eval-{len(figures):02d}.png"
                plots.curves(found, path, title=head, unit=task if label else "",
                             percent=_is_share(key, [*chances, *(y for line in found for y in line.y)]), kind="points",
                             references=[(word, level) for level in chances[-1:]])
                figures.append(_figure(out, path, "", alt=f"{head} over the pairs seen"))
    return {"id": "learning", "title": "Scores during training", "figures": figures,
            "text": "Dashed: chance, or for segmentation the best constant answer."}


# ---------------------------------------------------------------- facts


def _about(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows about the runs: label and one text a run."""
    count = plots.short_count

    def describe(run: Run) -> dict[str, str]:
        cfg, last = run.config, run.train[-1] if run.train else {}
        objective, views = cfg.objective, cfg.views
        terms = [objective.kind] + [f"{getattr(objective, t).weight:g} × {t}" for t in ("distill", "masked")
                                    if getattr(objective, t).weight]
        crops = [f"{views.globals} global × {views.global_size} px"]
        crops += [f"{views.locals} local × {views.local_size} px"] if views.locals else []
        rates, waits, memory = (run.series(k)[1] for k in ("images_per_s", "wait", "memory_mb"))
        seen, planned = last.get("samples", 0), cfg.steps * cfg.train.batch
        return {"Recipe": cfg.recipe, "Loss": " + ".join(terms), "Views": ", ".join(crops),
                "Batch": f"{cfg.train.batch:,}", "Steps": f"{last.get('step', 0):,} of {cfg.steps:,}",
                "Pairs seen": count(seen) + ("" if seen >= planned else f" of {count(planned)} (unfinished)"),
                "Training time": duration(run.seconds),
                "Throughput": f"{sorted(rates)[len(rates) // 2]:,.0f} pairs / s" if rates else "–",
                "Waiting for data": score(sum(waits) / len(waits), True) if waits else "–",
                "Peak memory": f"{max(memory) / 1024:.1f} GB" if memory else "–",
                "Seed": str(cfg.seed), "Unreadable log lines": str(run.unreadable or "")}
    told = [describe(run) for run in runs]
    return [(key, [one[key] for one in told]) for key in told[0] if any(one[key] for one in told)]


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs."""
    def flat(data: dict[str, Any], where: str = "") -> dict[str, str]:
        found: dict[str, str] = {}
        for key, value in data.items():
            deeper = isinstance(value, dict) and bool(value)
            found |= flat(value, f"{where}{key}.") if deeper else {where + key: json.dumps(value)}
        return found

    settings = [flat(to_dict(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one if key not in ("out", "recipe")))
    return [(key, [one.get(key, "–") for one in settings]) for key in keys
            if len({one.get(key) for one in settings}) > 1]


def _facts(runs: Sequence[Run], given: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The caller's facts, then what env.json adds; per run where the runs differ."""
    facts, taken = list(given), {key.lower() for key, _ in given}
    for key in dict.fromkeys(key for run in runs for key in run.env if key.lower() not in taken):
        texts = {run.name: _plain(run.env[key]) for run in runs if run.env.get(key)}
        label = NAMES.get(key, key.replace("_", " ").capitalize())
        if len(set(texts.values())) == 1:
            facts.append((label, next(iter(texts.values()))))
        else:
            facts += [(f"{label} ({name})", text) for name, text in texts.items()]
    return facts


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items() if one)
    return " ".join(map(_plain, value)) if isinstance(value, list) else str(value)


# ---------------------------------------------------------------- the page


def build(runs: dict[str, Path], out: Path, sections: Sequence[Section], phases: Sequence[tuple[str, float]],
          title: str, facts: Sequence[tuple[str, str]]) -> Path:
    """Write out/report.html with its pictures in out/pictures and return its path.

    runs: run folders by the name they bear on the page, the one it is about first; phases: name and wall time in
    seconds, in order; facts: label and text. The page needs neither network nor scripts.
    Raises ValueError for a missing run or picture, or if jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ValueError('the report needs jinja2: pip install "silc[quickstart]".') from None
    if not runs:
        raise ValueError("the report needs at least one run folder.")
    told = [read_run(name, Path(folder)) for name, folder in runs.items()]
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    total = math.fsum(seconds for _, seconds in phases)
    rows, chapters = _headline(told), [_progress(told, out), *_training(told, out)]
    extra = [_section(section, i, out) for i, section in enumerate(sections, 1)]
    contents = [("results", "Results")] * bool(rows) + [(c["id"], c["title"]) for c in chapters if c["figures"]]
    contents += [("time", "Time")] * bool(phases) + [("facts", "Facts")] + [(s["id"], s["title"]) for s in extra]
    page = jinja2.Environment(loader=jinja2.PackageLoader("silc.app"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    html = page.get_template("report.html").render(
        title=title, runs=told, rows=rows, chapters=chapters, contents=contents, sections=extra, total=duration(total),
        phases=_phases(phases, total, list(runs)), about=_about(told), differences=_differences(told),
        facts=_facts(told, facts), configs=[json.dumps(to_dict(run.config), indent=2) for run in told],
        light=plots.LIGHT, dark=plots.DARK)
    path = out / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _phases(phases: Sequence[tuple[str, float]], total: float, runs: Sequence[str]) -> list[dict[str, Any]]:
    """Parts of the time bar. Beside several runs, a colour stands for the run that a phase names; others are grey."""
    told = []
    for i, (name, seconds) in enumerate(phases):
        slots = [i] if len(runs) == 1 else [slot for slot, run in enumerate(runs) if run in name]
        colour = (f"var(--run{slots[0] % len(plots.LIGHT.runs)})" if slots
                  else f"color-mix(in srgb,var(--muted) {(80, 50, 25)[i % 3]}%,var(--card))")
        share = 100 * seconds / (total or 1.0)
        told.append({"name": name, "time": duration(seconds), "share": share, "colour": colour})
    return told


def _section(section: Section, number: int, out: Path) -> dict[str, Any]:
    figures = [_figure(out, Path(file), caption, f"section-{number}-{i}.png")
               for i, (file, caption) in enumerate(section.pictures, 1)]
    return {"id": f"section-{number}", "title": section.title, "table": section.table, "figures": figures,
            "paragraphs": [text.strip() for text in section.text.split("\n\n") if text.strip()]}
