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
from torch.distributed.tensor import DTensor, distribute_tensor

from silc.parallel import World, barrier, whole

TENSORS, FACTS = "state.safetensors", "state.json"


def collect(task: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Every tensor of the run by name, whole and on the CPU; without an optimiser, the task's alone.
    All processes must call."""
    tensors = {f"task.{name}": tensor for name, tensor in task.state_dict().items()}
    if optimizer is not None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in task.named_parameters()}
        for parameter, moments in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": moment for key, moment in moments.items()}
        tensors["random.cpu"] = torch.get_rng_state()
    return {name: whole(tensor).detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def restore(task: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `collect`, into modules of any sharding. ValueError when the run is of another architecture."""
    state = {f"task.{name}": tensor for name, tensor in task.state_dict().items()}
    saved = {name: tensor for name, tensor in tensors.items() if name.startswith("task.")}
    differ = state.keys() ^ saved.keys() | {n for n in state.keys() & saved.keys() if state[n].shape != saved[n].shape}
    if differ:
        raise ValueError(f"the checkpoint does not fit the model of this config: {', '.join(sorted(differ)[:3])} ...")
    for name, tensor in state.items():
        tensor.copy_(placed(saved[name], tensor))
    for name, parameter in task.named_parameters():
        prefix = f"optimizer.{name}."
        moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if moments:
            optimizer.state[parameter] = {k: placed(v, parameter) if v.ndim else v for k, v in moments.items()}
    torch.set_rng_state(tensors["random.cpu"])


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, and sharded as it is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


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
