"""Runs evaluation tasks by name and writes down what they found.

Gives: find_tasks, evaluate, table, write, fingerprint.
Used by: the command line, train/loop (on schedule), the quickstart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import pkgutil
import platform
import re
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import silc.eval
from silc.eval.embed import Features
from silc.eval.metrics import Result
from silc.model.silc import Silc
from silc.parallel import World
from silc.plain import nearest, to_dict


def find_tasks() -> dict[str, ModuleType]:
    """Every module of silc.eval that has a `Config` and a `run`: a new task is one new file."""
    names = sorted(found.name for found in pkgutil.iter_modules(silc.eval.__path__))
    modules = {name: importlib.import_module(f"silc.eval.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "Config") and hasattr(module, "run")}


def evaluate(
    model: Silc, sets: Mapping[str, str | Path], pictures: Path | None = None, configs: Mapping[str, Any] | None = None,
    cache: Path | None = None, world: World | None = None,
) -> dict[str, Result]:
    """Run each set (`task` or `task/label` -> folder) and return its Result under the same name.

    `pictures`: a folder for the pictures of tasks that make some. `configs`: settings by task or by set name, instances
    of the task's Config. All names are checked before the first task runs: ValueError names the nearest task.
    Pictures are embedded once for all tasks; with `cache`, a folder that any model may share, once for all runs.
    `world`: processes that share the work; all must call, and all get the results.
    """
    tasks, configs = find_tasks(), dict(configs or {})
    _check_names(sets, configs, tasks)
    features = Features(model, cache / fingerprint(model)[:32] if cache else None, world=world)
    results = {}
    for name, folder in sets.items():
        kind = name.partition("/")[0]
        cfg = configs.get(name) or configs.get(kind) or tasks[kind].Config()
        if pictures is not None and hasattr(cfg, "pictures") and cfg.pictures is None:
            cfg = dataclasses.replace(cfg, pictures=pictures / file_name(name))
        # a task that reads features of whole pictures has a fourth argument for them
        shared = {"features": features} if "features" in inspect.signature(tasks[kind].run).parameters else {}
        began = time.monotonic()
        results[name] = tasks[kind].run(model, folder, cfg, **shared)
        results[name].details["seconds"] = round(time.monotonic() - began, 3)
        results[name].details["preprocess"] = to_dict(model.config.preprocess)
        results[name].details["folder"] = str(folder)
    return results


def _check_names(sets: Mapping[str, Any], configs: Mapping[str, Any], tasks: Mapping[str, ModuleType]) -> None:
    for name in sets:
        task = name.partition("/")[0]
        if task not in tasks:
            raise ValueError(f"evaluation {name!r}: there is no task {task!r}." + nearest(task, tasks))
    for name in configs:
        if name not in tasks and name not in sets:
            raise ValueError(f"evaluation: settings for {name!r}, neither a task nor a set." + nearest(name, sets))


def table(results: Mapping[str, Result]) -> str:
    """Markdown: a row a metric, with its 95% interval where there is one, and chance. Scores in percent."""
    rows = ["| set | metric | score | 95% interval | chance | images |", "|---|---|---:|---:|---:|---:|"]
    for name, result in results.items():
        for metric, value in result.metrics.items():
            interval = result.details.get("interval", {}).get(metric)
            rows.append("| " + " | ".join([
                name.replace("|", "\\|"), metric, f"{100 * value:.2f}",
                f"{100 * interval[0]:.2f} – {100 * interval[1]:.2f}" if interval else "",
                f"{100 * result.chance[metric]:.2f}" if metric in result.chance else "",
                str(result.details.get("count", "")),
            ]) + " |")
    return "\n".join(rows) + "\n"


def write(results: Mapping[str, Result], folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """One JSON a result, `NAME.json`: scores, chance, details, versions, and `about` (which model, which step).

    A name's `/` becomes `-`. Raises ValueError if two names would share a file.
    """
    paths = [folder / f"{file_name(name)}.json" for name in results]
    if len(set(paths)) < len(paths):
        raise ValueError(f"evaluation: of {', '.join(results)}, two would be written to one file; rename a set.")
    folder.mkdir(parents=True, exist_ok=True)
    for path, (name, result) in zip(paths, results.items()):
        data = {"name": name, **dataclasses.asdict(result), "about": dict(about), "versions": versions()}
        text = json.dumps(_plain(data), indent=1, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    return paths


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers by name: the same model has the same one wherever it is stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    try:
        return {"silc": metadata.version("silc"), **found}
    except metadata.PackageNotFoundError:  # run from a source tree
        return {"silc": "unknown", **found}


def file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _plain(value: Any) -> Any:
    """The same data with what JSON cannot hold replaced: paths by text, numbers that are none by null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
