"""Checkpoints of a whole run: sharded, written behind the training's back, atomic, free of pickle and bit-exact.

    checkpoints/step-00001000/state-00000-of-00002.safetensors    rows of student, teacher, heads, centres, moments, ...
                              state-00001-of-00002.safetensors    each row once; whoever holds copies shares the work
                              state.json                          step, position, counters, files with their sizes
Every process writes and reads its own rows; none ever holds a whole run, and any number of processes can go on from
what any other number wrote. A tensor's piece is kept as `name@first row`. The file system is where processes meet.

Gives: Saver, Saved, latest, restore.  Used by: train/loop.py.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from silc.parallel import World, all_agree, shared_number
from silc.tensors import save_tensors
from silc.train.guard import Halt

FACTS, FORMAT = "state.json", 2
PIECE = 4 * 2**20
"""Bytes of the largest piece of a tensor that copies share among them; smaller ones would only be more names."""
PATIENCE = 600.0
"""Seconds that the leader waits for the files of the others."""
GRACE = 10.0
"""The same when the run is ending with an error, most likely because another process died."""


# ---------------------------------------------------------------- what a process holds, and what of it it writes


class Rows(NamedTuple):
    """The rows of a tensor that this process holds; a scalar is one row."""

    local: Tensor
    first: int
    copy: int
    """Which of the `copies` that hold these same rows this process is."""
    copies: int


def rows_of(tensor: Tensor, world: World) -> Rows:
    """FSDP2 cuts the first axis as torch.chunk does; a plain tensor is the same on every process."""
    if not isinstance(tensor, DTensor):
        return Rows(tensor.detach(), 0, world.rank, world.size)
    replicate, shard = tensor.device_mesh.get_coordinate() or (0, 0)
    copies, shards = tensor.device_mesh.shape
    first = min(len(tensor), shard * math.ceil(len(tensor) / shards))
    return Rows(tensor.to_local().detach(), first, replicate, copies)


def state_of(task: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the run by name, as it lies: sharded ones sharded."""
    tensors = {f"task.{name}": tensor for name, tensor in task.state_dict().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in task.named_parameters()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{key}": moment for key, moment in moments.items()}
    return tensors | {"random.cpu": torch.get_rng_state()}


def my_part(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Views of the pieces that this process writes: its rows, shared out among their copies, largest first."""
    pieces: list[tuple[str, Tensor, Rows]] = []
    for name, tensor in tensors.items():
        rows = rows_of(tensor, world)
        count = math.ceil(rows.local.nbytes / PIECE) if rows.copies > 1 and rows.local.ndim else 1
        first = rows.first
        for piece in rows.local.chunk(count) if count > 1 else [rows.local]:
            if piece.numel():
                pieces.append((f"{name}@{first}", piece, rows))
            first += len(piece) if piece.ndim else 1
    mine: dict[str, Tensor] = {}
    load: dict[int, list[int]] = {}  # bytes dealt to each of so many copies; who holds copies deals alike
    for key, piece, rows in sorted(pieces, key=lambda p: (-p[1].nbytes, p[0])):
        dealt = load.setdefault(rows.copies, [0] * rows.copies)
        least = dealt.index(min(dealt))
        dealt[least] += piece.nbytes
        if least == rows.copy:
            mine[key] = piece
    return mine


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory; from a GPU through pinned memory, side by side, waiting once."""
    copies = {k: torch.empty(v.shape, dtype=v.dtype, pin_memory=v.is_cuda) for k, v in tensors.items()}
    for key, copy in copies.items():
        copy.copy_(tensors[key], non_blocking=True)
    if any(v.is_cuda for v in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return copies


# ---------------------------------------------------------------- writing


class Saver:
    """Saves a run while it goes on: a step waits only for the copy to host memory.

    A failed write ends the run with Halt on every process, at the next `check`, `save` or `finish`; what was there
    before stays. All processes call each of these together.
    """

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        self.folder, self.keep, self.world = folder, keep, world
        # parts of one start of the run never mix with what a killed or a still dying one left behind
        self.start = f"{shared_number(time.time_ns() // 1000, world):x}"
        self.thread: threading.Thread | None = None
        self.error = ""
        self.patience = PATIENCE
        if world.leads:
            for part in folder.glob(".step-*.part"):
                shutil.rmtree(part, ignore_errors=True)

    def save(self, task: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
        """Copy this process's part and write it in the background, after what is still being written."""
        self.finish()
        tensors = to_host(my_part(state_of(task, optimizer), self.world))
        self.thread = threading.Thread(target=self._write, args=(tensors, facts), daemon=True)
        self.thread.start()

    def check(self) -> None:
        """Halt, everywhere, if a write has failed anywhere."""
        if not all_agree(not self.error, self.world):
            raise Halt(self.error or "another process could not write its part of a checkpoint; it says why.")

    def finish(self) -> None:
        """Wait for the write under way; afterwards it is whole on disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def close(self) -> None:
        """The run ends, perhaps with an error: let a write under way end, but wait only briefly for the others."""
        self.patience = GRACE
        if self.thread is not None:
            self.thread.join()

    def _write(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        final = self.folder / f"step-{facts['step']:08d}"
        part = self.folder / f".{final.name}.{self.start}.part"
        try:
            part.mkdir(parents=True, exist_ok=True)
            target = part / file_name(self.world.rank, self.world.size)
            unfinished = target.with_suffix(".part")
            save_tensors(tensors, unfinished)
            flush(unfinished)
            os.replace(unfinished, target)
            if self.world.leads:
                self._commit(part, final, facts)
        except BaseException as error:  # whatever it is, the training thread must hear of it
            self.error = (
                f"the checkpoint of step {facts['step']} could not be written ({error}). Those before it in "
                f"{self.folder} are whole: see to the disk, and the same command goes on from the newest."
            )

    def _commit(self, part: Path, final: Path, facts: dict[str, Any]) -> None:
        """Once every file is there, state.json says so, and the folder gets its name."""
        names = [file_name(rank, self.world.size) for rank in range(self.world.size)]
        began, pause = time.monotonic(), 0.01
        while missing := [name for name in names if not (part / name).exists()]:
            if time.monotonic() - began > self.patience:
                raise TimeoutError(f"no {missing[0]} from its process after {self.patience:.0f} seconds")
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        described = facts | {"format": FORMAT, "files": {name: (part / name).stat().st_size for name in names}}
        (part / FACTS).write_text(json.dumps(described, indent=2) + "\n")
        flush(part / FACTS)
        flush(part)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        flush(self.folder)
        for old in steps(self.folder)[: -max(1, self.keep)]:
            shutil.rmtree(old, ignore_errors=True)


def file_name(rank: int, size: int) -> str:
    return f"state-{rank:05d}-of-{size:05d}.safetensors"


def flush(path: Path) -> None:
    """To the disk itself, so that the order of writes outlives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- reading


class Damaged(ValueError):
    """A checkpoint that cannot be read; the one before it may do."""


class Saved:
    """An opened checkpoint: its facts, and any rows of any tensor. Raises Damaged, and ValueError for an old format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        """Of each tensor: first row, end, file."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
            for name, size in self.facts.get("files", {}).items():
                if (folder / name).stat().st_size != size:
                    raise ValueError(f"{name} is cut short")
                self._index(name)
        except (OSError, SafetensorError, ValueError) as error:
            raise Damaged(f"{folder} is damaged: {error}.") from None
        if self.facts.get("format") != FORMAT:
            raise ValueError(
                f"{folder} was written by another version of silc (checkpoint format {self.facts.get('format', 1)}, "
                f"here {FORMAT}): go on with that version, or choose another --out."
            )

    def _index(self, file: str) -> None:
        with safe_open(self.folder / file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  not a dict
                name, first = key.rsplit("@", 1)
                shape = opened.get_slice(key).get_shape()
                rows = shape[0] if shape else 1
                self.pieces[name].append((int(first), int(first) + rows, file))
                total = sum(end - start for start, end, _ in self.pieces[name])
                self.shapes[name] = (total, *shape[1:]) if shape else ()

    def fill(self, wanted: dict[str, Rows]) -> None:
        """Copy this process's rows of tensors into place, reading no others; each file is opened once."""
        by_file: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
        for name in wanted:
            for start, end, file in self.pieces[name]:
                by_file[file].append((name, start, end))
        for file, pieces in by_file.items():
            with safe_open(self.folder / file, "pt") as opened:
                for name, start, end in pieces:
                    local, first, key = wanted[name].local, wanted[name].first, f"{name}@{start}"
                    if local.ndim == 0:
                        local.copy_(opened.get_tensor(key))
                        continue
                    low, high = max(first, start), min(first + len(local), end)
                    if low < high:
                        local[low - first : high - first] = opened.get_slice(key)[low - start : high - start]


def steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def latest(folder: Path, world: World) -> Saved | None:
    """The newest whole checkpoint, saying so where a newer one is damaged; None where there is none.

    The leader chooses, so that all go on from the same."""
    found = _newest(folder) if world.leads else None
    step = shared_number(found.facts["step"] if found else -1, world)
    if step < 0 or found:
        return found
    return Saved(folder / f"step-{step:08d}")


def _newest(folder: Path) -> Saved | None:
    for step_folder in reversed(steps(folder)):
        try:
            return Saved(step_folder)
        except Damaged as error:
            print(f"{error} Falling back to the one before it.", file=sys.stderr)
    return None


@torch.no_grad()
def restore(task: nn.Module, optimizer: torch.optim.Optimizer, saved: Saved, world: World) -> None:
    """Put a checkpoint into modules of any sharding. ValueError when the run is of another architecture."""
    state = {f"task.{name}": tensor for name, tensor in task.state_dict().items() if tensor.numel()}
    held = {name: shape for name, shape in saved.shapes.items() if name.startswith("task.")}
    differ = [n for n in sorted(state.keys() | held.keys()) if n not in state or held.get(n) != tuple(state[n].shape)]
    if differ:
        raise ValueError(f"the checkpoint does not fit the model of this config: {', '.join(differ[:3])} ...")
    for name, parameter in task.named_parameters():
        prefix = f"optimizer.{name}."
        for key in [k for k in saved.shapes if k.startswith(prefix)]:
            # the count of steps is a scalar on the parameter's device, where the fused kernel reads it
            scalar = torch.zeros((), device=parameter.device)
            state[key] = torch.zeros_like(parameter) if saved.shapes[key] else scalar
            optimizer.state[parameter][key.removeprefix(prefix)] = state[key]
    state["random.cpu"] = torch.get_rng_state()
    saved.fill({name: rows_of(tensor, world) for name, tensor in state.items()})
    torch.set_rng_state(state["random.cpu"])
