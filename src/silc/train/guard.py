"""Guards that stop a run which has gone wrong, naming what happened and what to change.

Gives: Guard (not-a-number steps, collapse of the teacher), Halt, Stopped.
Used by: train/loop.py, at every step (without waiting for the device) and at every logged step; cli.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

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
