"""One evaluation from start to end: open the model, find the sets, score them, write the folder and its card.

Gives: evaluate, evaluate_model.
Used by: the command line; app/interpolating.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from silc.app import card, results
from silc.eval import run, suites
from silc.eval.metrics import Result
from silc.model.silc import Silc
from silc.opening import load
from silc.parallel import pick_device
from silc.plain import nearest, to_dict


def evaluate(
    model: str, sets: Mapping[str, str], suite: str | None = None, data: Path | None = None, out: Path | None = None,
    device: str = "auto", cache: Path | None = None,
) -> tuple[dict[str, Result], dict[str, str]]:
    """(results by set, why others failed): `sets` and those of a suite below the root `data`, by one model.

    With `out`, writes results.json, one JSON a set, results.md and card.html there. Of a suite, sets that are not there
    are skipped, and one that fails does not end the others; a set of `sets` that fails does. ValueError for a model,
    suite, task, root or device that is none.
    """
    places: dict[str, str | Path] = dict(sets)
    configs: dict[str, Any] = {}
    about: dict[str, Any] = {"model": model}
    skipped: dict[str, str] = {}
    tasks = run.find_tasks()
    if suite is not None:
        known = suites.open_suite(suite, tasks)
        if data is None:
            raise ValueError(f"the suite {suite} needs --data ROOT, the folder that holds its sets.")
        found, configs, skipped = suites.locate(known, data)
        # a set that is given by itself goes by its own folder and the task's own settings
        places, skipped = {**found, **places}, {name: where for name, where in skipped.items() if name not in sets}
        configs = {name: config for name, config in configs.items() if name not in sets}
        about |= {"suite": known.name, "suite_about": known.about, "data": str(data)}
    if not places:
        raise ValueError("nothing to evaluate: give --suite NAME --data ROOT, or --sets TASK FOLDER ...")
    for name in places:
        if (task := name.partition("/")[0]) not in tasks:
            raise ValueError(f"evaluation {name!r}: there is no task {task!r}." + nearest(task, tasks))
    opened = load(model).to(pick_device(device))
    scored, failed = _score(opened, places, configs, set(sets), out, cache)
    if not scored:
        raise ValueError("every set failed; the first: " + next(f"{name}: {why}" for name, why in failed.items()))
    if out is not None:
        _write(opened, scored, out, about, skipped, failed)
    return scored, failed


def evaluate_model(model: Silc, name: str, sets: Mapping[str, str], out: Path, device: str) -> dict[str, Result]:
    """Score a model in memory, to be called `name`, and write the folder as `evaluate` does. ValueError likewise."""
    opened = model.to(pick_device(device))
    scored, _ = _score(opened, sets, {}, set(sets), out, None)
    _write(opened, scored, out, {"model": name}, {}, {})
    return scored


def _write(
    model: Silc, scored: dict[str, Result], out: Path, about: dict[str, Any], skipped: dict[str, str],
    failed: dict[str, str],
) -> None:
    about |= {"sha256": run.fingerprint(model), "device": _name(model.device),
              "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")}
    results.save(scored, out, about, skipped, failed)
    card.build(out)


def _score(
    model: Silc, places: Mapping[str, str | Path], configs: Mapping[str, Any], strict: set[str], out: Path | None,
    cache: Path | None,
) -> tuple[dict[str, Result], dict[str, str]]:
    """Set by set, so that a failing one costs only itself; features are shared through files."""
    scored: dict[str, Result] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="silc-") as folder:
        for name, place in places.items():
            used = {name: configs[name]} if name in configs else {}
            try:
                found = run.evaluate(model, {name: place}, out / "pictures" if out else None, used,
                                     cache or Path(folder))
            except (ValueError, OSError) as error:
                if name in strict:
                    raise
                failed[name] = str(error)
                print(f"{name} failed: {error}", file=sys.stderr)
                continue
            scored |= found
            if name in configs:
                found[name].details["settings"] = to_dict(configs[name])
    return scored, failed


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
