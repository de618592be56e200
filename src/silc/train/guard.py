"""Guards that stop a run which has gone wrong, naming what happened and what to change.

Gives: Guard (not-a-number steps, collapse of the teacher), Retention (what a model knew before), Halt, Stopped.
Used by: train/loop.py, at every step (without waiting for the device), logged step and evaluation; cli.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from silc.config import Config
from silc.plain import nearest

if TYPE_CHECKING:
    from torch import Tensor

COLLAPSED = 0.02
"""Share of ln K under which the teacher's entropy means that nearly every picture has the same prototype."""
PATIENCE = 200
"""Steps the entropy must stay there before the run stops."""


class Halt(Exception):
    """The run must not go on; the message says what happened and what to change."""


class Stopped(Exception):
    """The run was asked to stop by a signal, and saved itself first."""


class Guard:
    def __init__(self, folder: Path, prototypes: int, max_nonfinite: int) -> None:
        self.file, self.uniform, self.max_nonfinite = folder / "nonfinite.jsonl", math.log(prototypes), max_nonfinite
        self.pending: list[tuple[int, Tensor, list[str]]] = []
        self.nonfinite, self.collapsed_since = 0, -1

    def seen(self, step: int, grad_norm: Tensor, ids: list[str]) -> None:
        """Remember a step's gradient norm; it is read only when the run logs, so that ordinary steps never wait."""
        self.pending.append((step, grad_norm, ids))

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Halt, with the way out, when the run should stop."""
        for when, norm, ids in self.pending:
            if not norm.isfinite():
                self.nonfinite += 1
                with open(self.file, "a") as file:
                    file.write(json.dumps({"step": when, "ids": ids}) + "\n")
        self.pending.clear()
        if self.nonfinite > self.max_nonfinite:
            raise Halt(
                f"{self.nonfinite} steps had a gradient that is not a number (skipped; their samples are listed in "
                f"{self.file}). Lower --optim.lr, or train with --train.precision fp32."
            )
        entropy = metrics.get("teacher_entropy", math.inf)
        if entropy > COLLAPSED * self.uniform:
            self.collapsed_since = -1
        elif self.collapsed_since < 0:
            self.collapsed_since = step
        elif step - self.collapsed_since >= PATIENCE:
            raise Halt(
                f"collapse: teacher entropy {entropy:.3f} of at most {self.uniform:.2f} for "
                f"{step - self.collapsed_since} steps: all pictures map to one prototype. "
                "Raise --objective.teacher-temp or --objective.momentum, or lower --optim.lr."
            )


class Retention:
    """Scores of the model that the run began with, and whether the guarded one has fallen too far below its own."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Those of an interrupted run are read from its metrics.jsonl. ValueError if the guarded set is not scored."""
        rule, sets = config.retention, config.eval.sets
        if rule.set and rule.set not in sets:
            raise ValueError(f"--retention.set {rule.set!r} is none of --eval.sets." + nearest(rule.set, sets))
        usual = next((name for name in sets if name.partition("/")[0] == "zeroshot"), "")
        self.rule, self.continued = rule, bool(config.init.model)
        self.set = rule.set or (usual if self.continued else "")
        self.before: dict[str, dict[str, float]] = _scores_at_start(folder / "metrics.jsonl")
        self.now: dict[str, float] = {}

    def begun_with(self, name: str, metrics: dict[str, float], step: int) -> dict[str, float]:
        """What the starting model of a continued run scored in a set; the scores of step 0 are taken as that."""
        if step == 0:
            self.before[name] = metrics
        if name == self.set:
            self.now = metrics
        return self.before.get(name, {}) if self.continued and step > 0 else {}

    def lost(self) -> str:
        """What was forgotten since step 0, by the newest score; empty when within bounds or when there is no score."""
        before, now, self.now = self.before.get(self.set, {}), self.now, {}
        if not before or not now:
            return ""
        metric = self.rule.metric or next(iter(before))
        if metric not in now:
            raise ValueError(f"--retention.metric: {self.set} has no metric {metric!r}." + nearest(metric, now))
        points = 100 * (before[metric] - now[metric])
        if points <= self.rule.max_drop:
            return ""
        return (
            f"retention: {self.set} {metric} fell from {before[metric]:.1%} to {now[metric]:.1%}, {points:.1f} points "
            f"where {self.rule.max_drop:g} are allowed (--retention.max-drop). Lower --init.image-lr and "
            "--init.text-lr, raise --objective.anchor.weight, or go part of the way back with `silc interpolate`."
        )


def _scores_at_start(file: Path) -> dict[str, dict[str, float]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["set"]: row["metrics"] for row in rows if row["kind"] == "eval" and row["step"] == 0}
