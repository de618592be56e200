"""Processes: who am I, gather with gradient, mean, and how a module is recomputed, compiled and sharded.

Gives: World, start, gather, mean, distribute, whole.
Used by: train/*; the only file that knows how many processes there are.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of malloc's settings in glibc's malloc.h."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """replicate x shard; None in a single process, which runs plain modules."""

    @property
    def leads(self) -> bool:
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--train.device cuda: PyTorch sees no GPU here. Use --train.device auto or cpu.")
    return torch.device(name)


def keep_memory() -> None:
    """Let the C library keep the memory that a step frees for the next one. Giving it back and asking again costs a
    page fault per 4 KiB, a tenth to a fifth of a step on a CPU. Does nothing where the C library is not glibc."""
    if sys.platform == "linux":
        adjust = getattr(ctypes.CDLL(None), "mallopt", None)
        if adjust is not None:
            adjust(M_MMAP_MAX, 0)
            adjust(M_TRIM_THRESHOLD, 2**31 - 1)


def start(device: str = "auto", shard: int = 1) -> World:
    """Join the processes that torchrun started, if it did. `shard` of them share one copy of the weights."""
    place, size = pick_device(device), int(os.environ.get("WORLD_SIZE", "1"))
    if place.type == "cpu":
        keep_memory()
    if size == 1:
        if shard != 1:
            raise ValueError(f"--train.shard {shard} needs that many processes: start with torchrun, or use 1.")
        return World(0, 1, place)
    if size % shard:
        raise ValueError(f"--train.shard {shard} does not divide the {size} processes.")
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    mesh = init_device_mesh(place.type, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    return World(dist.get_rank(), size, place, mesh)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Gather(torch.autograd.Function):
    """All-gather along the first axis whose backward sums what every process found for my rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        everybody = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(everybody, x.contiguous())
        return everybody

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mine = grad.new_empty(ctx.rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, grad.contiguous())
        return mine


def gather(x: Tensor, world: World) -> Tensor:
    """[B, ...] of every process, in rank order -> [size * B, ...]; gradients flow back to their owners."""
    return x if world.size == 1 else cast(Tensor, Gather.apply(x))


def logsumexp(x: Tensor, world: World) -> Tensor:
    """Element by element, of every process's x; without gradient."""
    if world.size == 1:
        return x
    top = x.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX)
    total = (x - top).exp_()
    dist.all_reduce(total)
    return top + total.log_()


def mean(x: Tensor, world: World) -> Tensor:
    """Mean over processes, without gradient."""
    if world.size == 1:
        return x.detach()
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / world.size


def all_agree(yes: bool, world: World) -> bool:
    """Does every process say yes? All must call."""
    return bool(mean(torch.tensor(float(yes), device=world.device), world) == 1)


def barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


@contextmanager
def leader_first(world: World) -> Iterator[None]:
    """The body runs in the leader, then in everybody else: for work that leaves a cache behind."""
    if not world.leads:
        barrier(world)
    yield
    if world.leads:
        barrier(world)


def distribute(module: nn.Module, blocks: Iterable[nn.Module], world: World, compile_blocks: bool = False) -> None:
    """Compile each block, then shard blocks and root, in place (that order; recomputation wraps inside the towers)."""
    blocks = list(blocks)
    if compile_blocks:
        for block in blocks:
            block.compile(dynamic=False)
    if world.mesh is None:
        return
    from torch.distributed.fsdp import fully_shard

    # the root reshards too: a forward-only module (the teacher) would otherwise keep stale whole weights
    for part in [*blocks, module]:
        fully_shard(part, mesh=world.mesh, reshard_after_forward=True)


def whole(x: Tensor) -> Tensor:
    """The full tensor behind a sharded one (every process must call); a plain tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
