"""What the folders of training runs tell, and how its numbers and names are written.

Gives: `Run`, `read_run`, `interval`, `about`, `differences`, `all_facts`, `set_names`; formats `score`, `times` ...
Used by: app/report, app/plots, app/card, quickstart.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silc.config import Config
from silc.plain import load_json, to_dict

TASKS = {"zeroshot": "zero-shot classification", "fewshot": "few-shot classification", "segment": "segmentation",
         "knn": "nearest neighbours", "probe": "linear probe"}
"""Evaluation tasks as a page calls them; others by their own name."""
NAMES = {"cpu": "CPU", "cpus": "CPU cores", "gpu": "GPU", "git": "Commit", "torch": "PyTorch"}


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


# ---------------------------------------------------------------- reading a run


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a log may hold."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def interval(line: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The ends that an evaluation line gives for a metric, or None where it gives none or nonsense."""
    given = line.get("interval")
    ends = given.get(key) if isinstance(given, dict) else None
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        return None
    low, high = map(number, ends)
    return (low, high) if low is not None and high is not None and low <= high else None


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
                    "chance": dict(line.get("chance") or {}), "interval": line.get("interval")}
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


def span(ends: tuple[float, float] | None, percent: bool) -> str:
    """(0.381, 0.444) -> `38.1–44.4%`; empty without an interval."""
    if ends is None:
        return ""
    if not percent:
        return f"{ends[0]:.4g}–{ends[1]:.4g}"
    places = 1 if ends[1] >= 0.01 else 2
    return f"{100 * ends[0]:.{places}f}–{100 * ends[1]:.{places}f}%"


def times(value: float | None, chance: float | None) -> str:
    """How many times chance, to two digits: `41×`, `3.2×`; a dash where there is no chance level."""
    if value is None or not chance or chance < 0:
        return "–"
    ratio = float(f"{value / chance:.1e}")
    places = max(0, 1 - math.floor(math.log10(ratio))) if ratio > 0 else 0
    return f"{ratio:,.{places}f}×"


def short_count(value: float) -> str:
    """1234567 -> `1.23M`, for axes and sentences."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


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
    words = re.sub(r"^shot(\d+)$", r"\1-shot", re.sub(r"^knn(\d+)$", r"\1-NN", words))
    return re.sub(r"\bmiou\b", "mIoU", words.replace("_", " ")).strip()


def is_share(key: str, values: Iterable[float | None]) -> bool:
    """Whether a metric reads as percent: all its values lie in [0,1] and it is not a rank, loss or the like."""
    return not re.search(r"rank|loss|error|count|entropy", key) and all(v is None or 0 <= v <= 1 for v in values)


def set_names(name: str, labels: Mapping[str, str]) -> tuple[str, str]:
    """(title, task) of an evaluation set: `segment/scenes` -> `scenes`, `segmentation`, unless `labels` titles it."""
    task, _, label = name.partition("/")
    word = TASKS.get(task, task)
    return labels.get(name, label or word), word


def primary(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that stand for a set: recall at one, or the first that has a chance level, or the first."""
    keys = list(dict.fromkeys(key for line in lines for key in line["metrics"]))
    recalls = [key for key in keys if key.endswith(("_r1", "_r_1", "recall_1"))]
    return recalls or [key for key in keys if any(key in line["chance"] for line in lines)][:1] or keys[:1]


# ---------------------------------------------------------------- facts


def about(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows about the runs: label and one text a run."""
    def describe(run: Run) -> dict[str, str]:
        cfg, last = run.config, run.train[-1] if run.train else {}
        objective, views = cfg.objective, cfg.views
        terms = [objective.kind] + [f"{getattr(objective, t).weight:g} × {t}" for t in ("distill", "masked")
                                    if getattr(objective, t).weight]
        crops = [f"{views.globals} global × {views.global_size} px"]
        crops += [f"{views.locals} local × {views.local_size} px"] if views.locals else []
        rates, waits, memory = (run.series(k)[1] for k in ("images_per_s", "wait", "memory_mb"))
        seen, planned = last.get("samples", 0), cfg.steps * cfg.train.batch
        part = f" of {short_count(planned)} (unfinished)" if seen < planned else ""
        return {"Recipe": cfg.recipe, "Loss": " + ".join(terms), "Views": ", ".join(crops),
                "Batch": f"{cfg.train.batch:,}", "Steps": f"{last.get('step', 0):,} of {cfg.steps:,}",
                "Pairs seen": short_count(seen) + part,
                "Training time": duration(run.seconds),
                "Throughput": f"{sorted(rates)[len(rates) // 2]:,.0f} pairs / s" if rates else "–",
                "Waiting for data": score(sum(waits) / len(waits), True) if waits else "–",
                "Peak memory": f"{max(memory) / 1024:.1f} GB" if memory else "–",
                "Seed": str(cfg.seed), "Unreadable log lines": str(run.unreadable or "")}
    told = [describe(run) for run in runs]
    return [(key, [one[key] for one in told]) for key in told[0] if any(one[key] for one in told)]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
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


def all_facts(runs: Sequence[Run], given: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The caller's facts, then what env.json adds; per run where the runs differ."""
    told, taken = list(given), {key.lower() for key, _ in given}
    for key in dict.fromkeys(key for run in runs for key in run.env if key.lower() not in taken):
        texts = {run.name: _plain(run.env[key]) for run in runs if run.env.get(key)}
        label = NAMES.get(key, key.replace("_", " ").capitalize())
        if len(set(texts.values())) == 1:
            told.append((label, next(iter(texts.values()))))
        else:
            told += [(f"{label} ({name})", text) for name, text in texts.items()]
    return told


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items() if one)
    return " ".join(map(_plain, value)) if isinstance(value, list) else str(value)
