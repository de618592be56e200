"""The training step on a GPU: `python benchmarks/gpu_step.py`. Not yet run on a GPU; `--quick` runs it at toy size on
whatever is there.

Gives: benchmarks/results/gpu_step.json: ViT-B/16 at 256 px, 2 + 8 views, bf16, compiled blocks, at the largest batch
that fits: seconds, images/s, peak memory, share of the measured bf16 matmul peak (MFU: FLOPs counted from shapes); the
input path that feeds it (pinned copy, photometric, normalise) on its own; the CLIP step beside open_clip's, as it comes
and under torch.compile; the prototype loss with plain and compiled blocks.
Used by: pages.py.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from harness import arguments, have, interleave, median, ratio, target, timed, write
from prototypes import TEACHER_TEMP, WIDTH, Given
from step import Naive, Ours, Sizes, batch_of, compare, configured, flops
from torch import Tensor

from silc import losses
from silc.config import Config
from silc.data.views import draw_photometric
from silc.plan.flops import as_clip

WHY: dict[str, str] = {}
FULL = Sizes(256, 96, 16, 768, 12, 12, 512, 12, 65536, 32)
TOY = Sizes(32, 16, 8, 64, 2, 2, 32, 1, 1024, 2, vocab=500)
LARGEST = 4096


class Device:
    """Clock and memory of where it runs."""

    def __init__(self) -> None:
        self.gpu = torch.cuda.is_available()
        self.name = "cuda" if self.gpu else "cpu"

    def finished(self, work: Callable[[], object]) -> Callable[[], None]:
        """The work, returning only when the device is done with it."""

        def run() -> None:
            work()
            if self.gpu:
                torch.cuda.synchronize()

        return run

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Most memory held while it works; 0 without a GPU."""
        if not self.gpu:
            work()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.finished(work)()
        return torch.cuda.max_memory_allocated()

    def free(self) -> None:
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    def moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.to(self.name) for name, x in batch.items()}


def matmul_peak(device: Device, size: int, rounds: int) -> float:
    """FLOP/s of the quickest of several square bf16 products on the device."""
    a, b = (torch.randn(size, size, device=device.name).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    seconds = interleave({"product": device.finished(lambda: torch.mm(a, b, out=out))}, 3 * rounds, warm=3)
    return 2.0 * size**3 / min(seconds["product"])


def ours(sizes: Sizes, device: Device, clip: bool = False, compiled: bool = True) -> Ours:
    config = configured(sizes)
    batch = device.moved(batch_of(config))
    config = as_clip(config) if clip else config
    return Ours(replace(config, train=replace(config.train, compile=compiled)), batch, device.name)


def fits(sizes: Sizes, device: Device, clip: bool, compiled: bool) -> int:
    """The batch doubled for as long as two steps fit (without a GPU: as it is)."""
    best = 0
    while sizes.batch <= LARGEST:
        try:
            side = ours(sizes, device, clip, compiled)
            for _ in range(2):
                device.finished(side.step)()
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            side = None
            device.free()
        best = sizes.batch
        if not device.gpu:
            break
        sizes = sizes._replace(batch=2 * sizes.batch)
    if best == 0:
        sys.exit(f"not even a batch of {sizes.batch} fits this GPU.")
    return best


def whole_step(sizes: Sizes, device: Device, peak: float, rounds: int, compiled: bool) -> dict[str, Any]:
    sizes = sizes._replace(batch=fits(sizes, device, False, compiled))
    side = ours(sizes, device, compiled=compiled)
    seconds = interleave({"step": device.finished(side.step)}, rounds, warm=3)["step"]
    row = timed("SILC step, silc", seconds, flops("SILC, silc", sizes), peak, batch=sizes.batch)
    return row | {"images_per_second": sizes.batch / row["median_seconds"], "peak_bytes": device.peak_bytes(side.step)}


def input_path(sizes: Sizes, device: Device, rounds: int) -> list[dict[str, Any]]:
    """What a batch of uint8 crops in host memory needs to become the step's pixels."""
    config = configured(sizes)
    side = ours(sizes, device, compiled=False)
    views = replace(config.views, photometric="dino")
    drawn = [draw_photometric(views, np.random.default_rng(i)) for i in range(config.train.batch)]
    host = {name: x.pin_memory() if device.gpu else x for name, x in batch_of(config).items()}
    there: dict[str, Any] = {**device.moved(host), "photo": np.stack([np.asarray(d) for d in drawn], 1)}
    hyper = side.task.hyper(0)
    cases = {
        "input: copy to the device": lambda: [x.to(device.name, non_blocking=True, copy=True) for x in host.values()],
        "input: photometric and normalise": lambda: side.task.views(there, 0, hyper),
    }
    seconds = interleave({name: device.finished(work) for name, work in cases.items()}, rounds)
    size = sum(x.nbytes for x in host.values())
    rows = [timed(name, s, batch=sizes.batch) for name, s in seconds.items()]
    rows[0]["copied_bytes"] = size
    return [row | {"images_per_second": sizes.batch / row["median_seconds"]} for row in rows]


def clip_steps(sizes: Sizes, device: Device, peak: float, rounds: int, compiled: bool) -> tuple[list, list]:
    """silc's CLIP step beside open_clip's, same weights and batch."""
    sizes = sizes._replace(batch=max(sizes.batch, fits(sizes, device, True, compiled) // 2))
    config: Config = as_clip(configured(sizes))
    batch = device.moved(batch_of(configured(sizes)))
    sides: dict[str, Any] = {"CLIP step, silc": ours(sizes, device, True, compiled)}
    if have("open_clip"):
        like = Ours(config, batch, device.name)
        sides["CLIP step, open_clip"] = Naive(config, batch, like.task, distils=False)
        if compiled:
            sides["CLIP step, open_clip compiled"] = Naive(config, batch, like.task, distils=False)
            sides["CLIP step, open_clip compiled"].model.compile()
            sides["CLIP step, open_clip compiled"].model.visual.compile()
        del like
    seconds = interleave({name: device.finished(side.step) for name, side in sides.items()}, rounds, warm=3)
    work = flops("CLIP, silc", sizes)
    rows = [
        timed(name, s, work, peak, batch=sizes.batch) | {"images_per_second": sizes.batch / median(s)}
        for name, s in seconds.items()
    ]
    claims = [
        target("GPU: CLIP step: speed", name, ratio(s, seconds["CLIP step, silc"]), least=1.1)
        for name, s in seconds.items()
        if "open_clip" in name
    ]
    return rows, claims


def prototype_blocks(pictures: int, count: int, device: Device, rounds: int, compiled: bool) -> list[dict[str, Any]]:
    """The prototype loss alone, forward and backward, unit-length inputs, bf16 products as in training."""
    raw = Given(pictures, count)
    norm = torch.nn.functional.normalize
    student, prototypes = (norm(x, dim=-1).to(device.name).requires_grad_() for x in (raw.student, raw.prototypes))
    teacher, of_teacher = (norm(x, dim=-1).to(device.name) for x in (raw.teacher, raw.of_teacher))
    aim = losses.Target(teacher, of_teacher, torch.zeros(count, device=device.name), TEACHER_TEMP)

    def run(fused: bool) -> None:
        losses.distill(student, prototypes, aim, 0.1, 2, torch.bfloat16, compiled=fused).loss.backward()
        student.grad = prototypes.grad = None

    cases = {"prototype loss, plain": lambda: run(False)}
    if compiled:
        cases["prototype loss, compiled"] = lambda: run(True)
    seconds = interleave({name: device.finished(work) for name, work in cases.items()}, rounds, warm=2)
    rows, work = [], 2.0 * (3 * len(student) + len(teacher)) * pictures * WIDTH * count
    for name, s in seconds.items():
        held = device.peak_bytes(cases[name]) - (torch.cuda.memory_allocated() if device.gpu else 0)
        rows.append(timed(name, s, work, batch=pictures) | {"above_bytes": max(held, 0)})
    return rows


def main() -> None:
    args = arguments(__doc__)
    device = Device()
    if not device.gpu and not args.quick:
        sys.exit("no GPU here: the figures are of a GPU alone; --quick runs the code at toy size.")
    sizes, compiled = (TOY, device.gpu) if args.quick else (FULL, True)
    if device.gpu:
        torch.backends.cuda.matmul.allow_tf32 = False
    checks = compare(sizes._replace(batch=2), "GPU" if device.gpu else "CPU", device.name, ("CLIP",))
    device.free()
    peak = matmul_peak(device, 256 if args.quick else 8192, args.rounds)
    began = time.monotonic()
    rows = [whole_step(sizes, device, peak, args.rounds, compiled)]
    device.free()
    rows += input_path(sizes._replace(batch=rows[0]["batch"]), device, args.rounds)
    device.free()
    more, claims = clip_steps(sizes, device, peak, args.rounds, compiled)
    device.free()
    pictures, count = (4, 512) if args.quick else (256, 65536)
    rows += more + prototype_blocks(pictures, count, device, args.rounds, compiled)
    share = rows[0]["peak_share"]
    claims.insert(0, target("GPU: SILC step, ViT-B/16 256 px: share of the matmul peak", "measured", share, least=0.45))
    facts = {
        "rounds": args.rounds,
        "device": device.name,
        "peak_flops": peak,
        "minutes": (time.monotonic() - began) / 60,
    }
    write(args.out, "gpu_step", rows, claims if device.gpu else (), checks, **facts)


if __name__ == "__main__":
    main()
