"""Several processes beside one: `python benchmarks/processes.py`.

Gives: benchmarks/results/processes.json: seconds of a whole training step on the same global batch (strong scaling: a
step of two processes should take half as long) by one process on one core and by two on one core each, with their
weights replicated and sharded, in turns; beside them two processes with half the batch each that do not talk, which is
what the machine allows. ViT-Ti/16 at 96 px (locals 48), 2 + 8 views, K = 4,096, batch 64, fp32. Gradients are compared.
Then how long a step waits for a checkpoint and how long its writing takes, and the memory of each of 1, 2 and 4
processes with 8 pictures each: weights, moments, teacher and two steps (processes of their own).
Used by: pages.py, growth.py (the memory).
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Measured, arguments, check, interleave, matmul_peak, median, ratio, target, timed, write
from torch import Tensor

from silc import parallel, recipes
from silc.config import Config, ImageTowerConfig, PreprocessConfig, PrototypeConfig, TextTowerConfig
from silc.plan import flops_per_sample
from silc.train.checkpoint import Saver
from silc.train.loop import build
from silc.train.optim import clip_and_step

WHY: dict[str, str] = {}
EQUAL = 1e-4
SPEEDUP = 1.8


class Sizes(NamedTuple):
    image: int
    local: int
    width: int
    depth: int
    prototypes: int
    batch: int
    """Of the timed step, over all processes."""
    each: int
    """Of a process whose memory is measured."""
    vocab: int = 4096


FULL, QUICK = Sizes(96, 48, 192, 12, 4096, 64, 8), Sizes(32, 16, 64, 2, 256, 8, 4, vocab=300)


class Group(NamedTuple):
    """Processes that work together, or each `apart` on its own."""

    world: int
    shard: int = 1
    apart: bool = False


TIMED = {
    "1 process": Group(1),
    "2 processes": Group(2),
    "2 processes, sharded": Group(2, 2),
    "2 processes that do not talk": Group(2, apart=True),
}
REMEMBERED = {
    "weights on every process": (Group(1), Group(2), Group(4)),
    "weights sharded": (Group(1), Group(2, 2), Group(4, 4)),
}


def configured(s: Sizes, batch: int, shard: int) -> Config:
    base, heads, mlp = recipes.silc(), max(1, s.width // 64), 4 * s.width
    image = ImageTowerConfig(s.image, 16, s.width, s.depth, heads, mlp)
    text = TextTowerConfig(s.vocab, 24, s.width, s.depth // 2, heads, mlp)
    model = replace(base.model, image=image, text=text, preprocess=PreprocessConfig(s.image), embed_dim=s.width)
    objective = replace(base.objective, prototypes=PrototypeConfig(count=s.prototypes, hidden=1024))
    views = replace(base.views, global_size=s.image, local_size=s.local, photometric="none")
    train = replace(base.train, batch=batch, samples=1000 * batch, precision="fp32", shard=shard)
    return replace(base, model=model, objective=objective, views=views, train=train)


def batch_of(c: Config, rows: slice) -> dict[str, Any]:
    """uint8 crops of noise and texts: these rows of a batch that is the same for everybody."""
    g, b, v = torch.Generator().manual_seed(0), c.train.batch, c.views

    def crops(count: int, side: int) -> Tensor:
        return torch.randint(0, 256, (count, b, 3, side, side), generator=g, dtype=torch.uint8)[:, rows]

    tokens = torch.randint(0, c.model.text.vocab, (b, c.model.text.length), generator=g)[rows]
    return {"globals": crops(v.globals, v.global_size), "locals": crops(v.locals, v.local_size), "tokens": tokens}


# ---------------------------------------------------------------- in a process


class Worker:
    """One process of a group: what it is asked to do, by name."""

    def __init__(self, world: parallel.World, group: Group, sizes: Sizes, batch: int) -> None:
        self.world, self.steps, share = world, 0, batch // group.world
        self.config = configured(sizes, share if group.apart else batch, group.shard)
        with Measured() as memory:
            self.task, self.optimizer = build(self.config, world)
            self.batch = batch_of(self.config, slice(world.rank * share, (world.rank + 1) * share))
            self.first = self.gradient()
            self.update()
            self.step()
        self.memory = memory.above

    def gradient(self) -> Tensor:
        self.task.forward_backward(self.batch, self.steps)
        found = [parallel.whole(p.grad) for p in self.task.student.parameters() if p.grad is not None]
        return torch.cat([grad.flatten() for grad in found]) if self.world.leads else torch.empty(0)

    def update(self) -> None:
        clip_and_step(self.task.student.parameters(), self.optimizer, 1.0)
        self.task.after_step(self.steps)
        self.steps += 1

    def step(self) -> float:
        """Seconds for which the core worked."""
        began = time.process_time()
        self.task.forward_backward(self.batch, self.steps)
        self.update()
        return time.process_time() - began

    def save(self, folder: str) -> tuple[float, float]:
        """Seconds that training waits for a checkpoint, and seconds until it is on disk."""
        saver, began = Saver(Path(folder), 1, self.world), time.perf_counter()
        saver.save(self.task, self.optimizer, {"step": self.steps})
        waited = time.perf_counter() - began
        saver.finish()
        return waited, time.perf_counter() - began


def work(rank: int, group: Group, sizes: Sizes, batch: int, port: int, ears: Connection) -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    size = 1 if group.apart else group.world
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    worker = Worker(parallel.start("cpu", group.shard), group, sizes, batch)
    ears.send((worker.first, worker.memory))
    while (order := ears.recv()) is not None:
        ears.send(getattr(worker, order[0])(*order[1:]))
    parallel.stop()


# ---------------------------------------------------------------- in front of them


class Team:
    """A group's processes, started; `told` is what each said of its first step: gradient and memory."""

    def __init__(self, group: Group, sizes: Sizes, batch: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn, self.lines, self.processes = get_context("spawn"), [], []
        for rank in range(group.world):
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(rank, group, sizes, batch, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.lines.append(mine)
            self.processes.append(process)
        self.told = [line.recv() for line in self.lines]
        self.busy: list[float] = []

    def ask(self, *order: Any) -> list[Any]:
        for line in self.lines:
            line.send(order)
        return [line.recv() for line in self.lines]

    def step(self) -> None:
        self.busy.append(max(self.ask("step")))

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for line, process in zip(self.lines, self.processes):
            line.send(None)
            process.join(30)


def speed(sizes: Sizes, quick: bool, rounds: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Rows, targets and checks of the timed step and of its checkpoints."""
    names = list(TIMED)[: 2 if quick else None]
    peak = matmul_peak(torch.float32)["median"]
    flops = sizes.batch * flops_per_sample(configured(sizes, sizes.batch, 1)).total
    with ExitStack() as running:
        teams = {name: running.enter_context(Team(TIMED[name], sizes, sizes.batch)) for name in names}
        seconds = interleave({name: team.step for name, team in teams.items()}, rounds)
        rows = [
            timed(
                name,
                seconds[name],
                flops,
                peak * TIMED[name].world,
                pairs_per_second=sizes.batch / median(seconds[name]),
                busy_seconds=median(team.busy[-rounds:]),
            )
            for name, team in teams.items()
        ]
        rows += checkpoints(teams, rounds)
        checks = [
            check(f"gradient of {name}", teams[name].told[0][0], teams["1 process"].told[0][0], EQUAL)
            for name in names[1:]
            if not TIMED[name].apart
        ]
    one, two = seconds["1 process"], seconds["2 processes"]
    bounds = [target("pairs a second of 2 processes", "1 process, same batch", ratio(one, two), least=SPEEDUP)]
    for name in names[2:]:
        bounds.append(target(f"pairs a second of {name}", "1 process, same batch", ratio(one, seconds[name])))
    return rows, bounds, checks


def checkpoints(teams: Mapping[str, Team], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, team in teams.items():
        if TIMED[name].apart:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = [max(team.ask("save", folder)) for _ in range(rounds)]
            newest = max(Path(folder).glob("step-*"))
            size = sum(file.stat().st_size for file in newest.iterdir())
        waited, whole = zip(*found)
        rows.append(timed(f"{name}: a step waits for a checkpoint", waited, checkpoint_bytes=size))
        rows.append(timed(f"{name}: until it is on disk", whole, checkpoint_bytes=size))
    return rows


def memory(sizes: Sizes, quick: bool) -> list[dict[str, Any]]:
    """Most memory that a process of each group takes, above what it had when it had imported everything."""
    rows = []
    for case, groups in REMEMBERED.items():
        for group in groups[: 1 if quick else None]:
            with Team(group, sizes, sizes.each * group.world) as team:
                most = max(above for _, above in team.told)
            rows.append({"case": case, "world": group.world, "above_bytes": most})
    return rows


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else FULL
    rows, targets, checks = speed(sizes, args.quick, args.rounds)
    rows += memory(sizes, args.quick)
    write(args.out, "processes", rows, targets, checks, rounds=args.rounds)


if __name__ == "__main__":
    main()
