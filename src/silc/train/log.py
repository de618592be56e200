"""What a run writes down: metrics.jsonl (the truth), a progress line, and optional mirrors of it.

Gives: Log, environment, forget.
Used by: train/loop.py; app/runs.py reads the files.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from silc.config import Config, LogConfig
from silc.eval.metrics import Result
from silc.plain import to_dict


def environment(command: list[str]) -> dict[str, Any]:
    """Versions, machine and command of a run; no environment variables, so no secret can end up in a file."""
    git = subprocess.run(  # no shell; fails quietly outside a checkout
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": command,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": git.stdout.strip() or None,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class Log:
    """The leader's notebook; on other processes every call is a no-op."""

    def __init__(self, config: Config, folder: Path, leads: bool, step: int) -> None:
        self.leads, self.steps, self.config = leads, config.steps, config
        self.file: TextIO | None = None
        self.mirrors: list[Any] = []
        self.live = sys.stderr.isatty()
        self.started = self.last = time.monotonic()
        self.first_step = self.last_step = step
        self.waited = 0.0
        if leads:
            forget(folder / "metrics.jsonl", lambda row: row["step"] <= step)
            self.file = open(folder / "metrics.jsonl", "a")  # noqa: SIM115  open for the whole run
            self.mirrors = _mirrors(config.log, config, folder)

    def train(self, step: int, metrics: dict[str, float], lr: float, bad: int, ids: list[str]) -> None:
        """One logged step, counted from 1: rates since the last one, the file, the mirrors, the progress line.

        `ids` of the batch are kept as a checksum, by which two runs can be seen to have met the same samples."""
        now = time.monotonic()
        seconds, done = max(now - self.last, 1e-9), step - self.last_step
        batch = self.config.train.batch
        row: dict[str, Any] = {"kind": "train", "step": step, "samples": step * batch, "time": time.time()}
        row |= metrics
        row |= {"lr": lr, "images_per_s": round(done * batch / seconds, 1), "wait": round(self.waited / seconds, 4)}
        row |= {"memory_mb": round(memory_mb()), "bad": bad, "seconds": round(now - self.started, 3)}
        row["ids_crc"] = f"{zlib.crc32(chr(10).join(ids).encode()):08x}"
        self.last, self.last_step, self.waited = now, step, 0.0
        self.write(row)
        left = (self.steps - step) * (now - self.started) / max(1, step - self.first_step)
        parts = [f"{k} {metrics[k]:.3f}" for k in ("loss", "contrast", "distill", "masked") if k in metrics]
        parts += [f"{row['images_per_s']:.0f} img/s", f"wait {row['wait']:.0%}", f"{row['memory_mb']:.0f} MB"]
        parts += [f"{bad} bad"] if bad else []
        self.say(f"step {step}/{self.steps}  " + "  ".join(parts) + f"  ETA {clock(left)}", passing=step < self.steps)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in which the run does not train (an evaluation): it counts neither in rates nor in the time left."""
        began = time.monotonic()
        yield
        spent = time.monotonic() - began
        self.started, self.last = self.started + spent, self.last + spent

    def evaluation(self, step: int, name: str, result: Result, before: dict[str, float]) -> None:
        """One set's scores, beside their chance levels and what they were `before`, where that says something."""
        samples, metrics, chance = step * self.config.train.batch, result.metrics, result.chance
        row = {"kind": "eval", "step": step, "samples": samples, "set": name, "metrics": metrics, "chance": chance}
        row |= {"before": before} if before else {}
        self.write(row | {"interval": result.details.get("interval", {})})
        shown = []
        for metric, value in metrics.items():
            beside = [f"chance {chance[metric]:.1%}"] if metric in chance else []
            if metric in before:
                beside.append(f"at step 0 {before[metric]:.1%}, {100 * (value - before[metric]):+.1f}")
            shown.append(f"{metric} {value:.1%}" + (f" ({'; '.join(beside)})" if beside else ""))
        self.say(f"  eval at step {step}  {name}: " + ", ".join(shown[:3]))

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        flat = row.get("metrics") or row
        prefix = f"{row['set']}/" if row["kind"] == "eval" else "train/"
        for mirror in self.mirrors:
            mirror({prefix + k: v for k, v in flat.items() if isinstance(v, float)}, row["step"])

    def say(self, line: str, passing: bool = False) -> None:
        """A line for people, on stderr. A `passing` one is overwritten by the next where stderr is a terminal."""
        if not self.leads:
            return
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r\033[K" + line[:width] + ("" if passing else "\n"))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def memory_mb() -> float:
    """Peak memory of this process: on the GPU where it trains there, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)


def forget(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop rows of a .jsonl that a resumed run lives again, and a half-written last line; atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if keep(row):
            kept.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    os.replace(part, path)


def _mirrors(log: LogConfig, config: Config, folder: Path) -> list[Any]:
    """Functions (scalars, step) that copy each row to a dashboard."""
    found: list[Any] = []
    if log.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError('--log.tensorboard needs its package: pip install "silc[tensorboard]"') from None
        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(row: dict[str, float], step: int) -> None:
            for key, value in row.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        found.append(to_tensorboard)
    if log.wandb:
        try:
            import wandb
        except ImportError:
            raise ValueError('--log.wandb needs its package: pip install "silc[wandb]"') from None
        run = wandb.init(project="silc", id=f"{folder.name}", resume="allow", dir=str(folder), config=to_dict(config))
        found.append(lambda row, step: run.log(row, step=step))
    return found
