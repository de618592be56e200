"""Processes: who am I, gather with gradient, mean, and how a module is compiled, replicated or sharded.

Gives: World, start, gather, logsumexp, mean, all_agree, shared_number, Anyone, distribute, average_gradients, whole,
gathered.
Used by: train/*; the only file that knows how many processes there are.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group exists: its defaults would keep that one alive past `stop`
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others: the longest that one may work alone (an index of shards, an export). A
process that died is noticed at once, by its closed connection or by torchrun; this ends a run whose process hangs."""
READOUTS = ("value_path", "value_beside", "correlative", "attention_alone")
"""Methods of a block by which dense read-outs call it."""
BUCKET = 64 * 2**20
"""Bytes of gradients averaged in one call: few enough calls that their latency vanishes, little enough extra memory."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of malloc's settings in glibc's malloc.h."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """replicate x shard; None where every process holds whole weights, in plain modules."""

    @property
    def leads(self) -> bool:
        return self.rank == 0


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one. ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name}: PyTorch sees no GPU here; take auto or cpu.")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"there is no device {name!r}: take auto, cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here, counted from 0.")
    return device


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
        gpu = place.type == "cuda"  # gloo stands beside NCCL for what must not wait for the device (`Anyone`)
        backend, own = ("cpu:gloo,cuda:nccl", place) if gpu else ("gloo", None)
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        store = dist.PrefixStore(f"start-{_round(store, rank, size)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE, device_id=own)
    mesh = None
    if shard > 1:
        mesh = init_device_mesh(place.type, (size // shard, shard), mesh_dim_names=("replicate", "shard"))
    return World(dist.get_rank(), size, place, mesh)


def _round(store: dist.Store, rank: int, size: int) -> int:
    """A number that these processes share and no earlier ones did.

    torchrun keeps one store over its restarts, in which the addresses of dead processes still lie. Rank 0 answers
    each greeting until its sender is heard: a greeting from an earlier start never is.
    """
    me = store.add("arrivals", 1)
    if rank:
        store.set(f"greeting-{rank}", str(me))
        while (answer := store.get(f"answer-{rank}").decode().split())[0] != str(me):
            time.sleep(0.02)
        store.set("heard-{}-{}".format(*answer), "")
        return int(answer[1])
    silent = set(range(1, size))
    while silent:
        for other in [r for r in silent if store.check([f"greeting-{r}"])]:
            greeting = store.get(f"greeting-{other}").decode()
            store.set(f"answer-{other}", f"{greeting} {me}")
            if store.check([f"heard-{greeting}-{me}"]):
                silent.remove(other)
        time.sleep(0.02)
    return me


def stop() -> None:
    """Leave the group. One of its threads freeing a tensor while the interpreter shuts down would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()  # joins the threads of a group that nothing else holds
        time.sleep(0.1)  # PyTorch's caches hold a mesh and its groups: their threads need the interpreter once more


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


def shared_number(number: int, world: World) -> int:
    """The leader's number, on every process."""
    held = torch.tensor(number, device=world.device)
    if world.size > 1:
        dist.broadcast(held, 0)
    return int(held)


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


class Anyone:
    """Has any process said yes? All must ask at every step, and all hear the same answer: that of the step before.

    Being one step late, it is there when it is asked for, and neither host nor device waits.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.coming: tuple[Tensor, dist.Work] | None = None

    def __call__(self, mine: bool) -> bool:
        if self.world.size == 1:
            return mine
        before, flag = self.coming, torch.tensor(float(mine))
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self.coming = (flag, work)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])


def distribute(
    module: nn.Module, blocks: Iterable[nn.Module], world: World, compile_blocks: bool = False, graphs: bool = False
) -> None:
    """Compile each block, then shard blocks and root, in place (that order; recomputation wraps inside the towers).

    Without sharding the weights stay plain tensors, made equal here and kept so by `average_gradients`: FSDP2 with
    shards of one process would copy every weight once more per use, and average once per micro-batch.
    """
    blocks = list(blocks)
    if compile_blocks:
        for block in blocks:
            block.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
    if world.mesh is None:
        if world.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)  # machines of different kinds may round the initial weights differently
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    # the root reshards too: a forward-only module (the teacher) would otherwise keep stale whole weights
    for part in [*blocks, module]:
        fully_shard(part, mesh=world.mesh, reshard_after_forward=True)
    for part in blocks:
        for name in READOUTS:  # a block that is called by another name must gather its weights, too
            if isinstance(part, FSDPModule) and hasattr(part, name):
                register_fsdp_forward_method(part, name)


@torch.no_grad()
def average_gradients(module: nn.Module, world: World) -> None:
    """Mean over processes of a module's gradients, in place, once all micro-batches are done. All must call.

    Sharded ones are left alone: FSDP2 averaged them in the backward pass.
    """
    if world.size == 1 or world.mesh is not None:
        return
    bucket: list[Tensor] = []
    for grad in [p.grad for p in module.parameters() if p.grad is not None]:
        if bucket and sum(g.nbytes for g in (*bucket, grad)) > BUCKET:
            _average(bucket, world)
            bucket = []
        bucket.append(grad)
    if bucket:
        _average(bucket, world)


def _average(bucket: list[Tensor], world: World) -> None:
    flat = torch.cat([grad.flatten() for grad in bucket]).div_(world.size)
    dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in bucket])
    torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket)])


def whole(x: Tensor) -> Tensor:
    """The full tensor behind a sharded one (every process must call); a plain tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the leader's CPU, none on the others; one at a time is whole elsewhere. All must call."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if world.leads:
            kept[name] = full.cpu().contiguous()
    return kept
