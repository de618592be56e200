"""Checkpoints of a whole run: atomic on disk, free of pickle, bit-exact, and independent of the number of processes.

    checkpoints/step-00001000/state.safetensors    student, teacher, heads, centre, optimiser moments, random states
                              state.json           step, position in the data, counters, size of the tensor file
Gives: save, load, latest, prune.  Used by: train/loop.py.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from silc.parallel import World, barrier

TENSORS, FACTS = "state.safetensors", "state.json"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
INTO = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)


def collect(task: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Every tensor of the run by name, whole and on the CPU; without an optimiser, the task's alone.
    All processes must call."""
    tensors = {f"task.{k}": v for k, v in get_model_state_dict(task, options=FULL).items()}
    if optimizer is not None:
        moments = get_optimizer_state_dict(task, optimizer, options=FULL)
        tensors |= {f"optimizer.{k}": v for k, v in moments.items() if isinstance(v, Tensor)}
        tensors["random.cpu"] = torch.get_rng_state()
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def restore(task: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `collect`, into modules of any sharding. ValueError when the run is of another architecture."""

    def part(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        set_model_state_dict(task, part("task."), options=INTO)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the model of this config: {error}") from None
    groups = {k: v for k, v in get_optimizer_state_dict(task, optimizer, options=FULL).items() if "param_groups" in k}
    set_optimizer_state_dict(task, optimizer, {**groups, **part("optimizer.")}, options=INTO)
    torch.set_rng_state(tensors["random.cpu"])


def save(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any], world: World) -> None:
    """Write `folder/step-N` whole or not at all: into a temporary folder, flushed to disk, then renamed."""
    if world.leads:
        final = folder / f"step-{facts['step']:08d}"
        part = folder / f".{final.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(tensors, part / TENSORS)
        described = {**facts, "bytes": (part / TENSORS).stat().st_size}
        (part / FACTS).write_text(json.dumps(described, indent=2) + "\n")
        for name in (TENSORS, FACTS):
            with open(part / name, "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
    barrier(world)


def load(step_folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of one checkpoint. ValueError when it is damaged."""
    try:
        facts = json.loads((step_folder / FACTS).read_text())
        if (step_folder / TENSORS).stat().st_size != facts["bytes"]:
            raise ValueError("its tensor file is cut short")
        return load_file(step_folder / TENSORS), facts
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{step_folder} is damaged: {error}.") from None


def steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def latest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint, saying so where a newer one is damaged; None where there is none."""
    for step_folder in reversed(steps(folder)):
        try:
            return load(step_folder)
        except ValueError as error:
            print(f"{error} Falling back to the one before it.", file=sys.stderr)
    return None


def prune(folder: Path, keep: int, world: World) -> None:
    if world.leads:
        for old in steps(folder)[: -max(1, keep)]:
            shutil.rmtree(old, ignore_errors=True)
