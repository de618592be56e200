"""Prototypes and their loss beside lightly's and DINOv2's, forward and backward: `python benchmarks/prototypes.py`.

Gives: benchmarks/results/prototypes.json: seconds (one thread on one core, in turns) and added memory (a process each)
from bottleneck features (256 numbers, 2 global and 8 local views a picture) to the gradient of features and raw
prototypes, K = 65,536, fp32; the pairs of views of lightly and DINOv2, and those of the SILC paper (locals only), which
lightly's loss does not have. Each side normalises features and prototypes itself and moves its centre. DINOv2's
weight_g is frozen, as lightly's is and as silc has none. Values and gradients are compared in the same run.
Used by: pages.py.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import Measured, alone, arguments, check, have, interleave, matmul_peak, pin, ratio, target, timed, write
from torch import Tensor, nn

from silc import losses
from silc.config import PrototypeConfig
from silc.model.prototypes import PrototypeHead

WHY: dict[str, str] = {}
GLOBALS, LOCALS, WIDTH = 2, 8, 256
TEACHER_TEMP, STUDENT_TEMP, CENTRE_MOMENTUM = 0.04, 0.1, 0.9
CASES = ("silc", "lightly", "dinov2", "silc, locals only", "dinov2, locals only")
BOUNDS = {"lightly": 1 / 5, "dinov2": 1 / 2.5}
"""Added memory at most this share of theirs."""
EQUAL = 2e-5
SUMMED = 1e-3
"""For the value of lightly's loss, one fp32 dot product over all pictures and prototypes: 16.8 million terms, whose sum
loses digits (3e-4). Its gradients do not, and DINOv2's value is held to EQUAL."""


class Given:
    """The same raw numbers for everybody: features of student and teacher, and both sides' prototypes."""

    def __init__(self, pictures: int, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pictures, self.count = pictures, count
        self.student = torch.randn(GLOBALS + LOCALS, pictures, WIDTH, generator=generator)
        # the teacher sees the same pictures: its features are near the mean of the student's
        noise = torch.randn(GLOBALS, pictures, WIDTH, generator=generator)
        self.teacher = self.student.mean(0) + 0.3 * noise
        self.prototypes = torch.randn(count, WIDTH, generator=generator)
        self.of_teacher = self.prototypes + 0.1 * torch.randn(count, WIDTH, generator=generator)


class Ours:
    def __init__(self, given: Given, global_to_global: bool) -> None:
        self.given, self.first = given, 0 if global_to_global else GLOBALS
        self.student, self.teacher = (PrototypeHead(WIDTH, PrototypeConfig(given.count)) for _ in range(2))
        for head, raw in ((self.student, given.prototypes), (self.teacher, given.of_teacher)):
            head.layers = nn.ModuleList()  # what is before the bottleneck is not measured
            head.prototypes.data.copy_(raw)
        self.centre = torch.zeros(given.count)
        self.weight = self.student.prototypes

    def loss(self, features: Tensor) -> Tensor:
        student = self.student(features[self.first :])
        with torch.no_grad():
            seen = self.teacher(self.given.teacher)
            aim = losses.Target(seen.features, seen.prototypes, self.centre.clone(), TEACHER_TEMP)
            same = 0 if self.first else GLOBALS
        loss = losses.distill(student.features, student.prototypes, aim, STUDENT_TEMP, same).loss
        with torch.no_grad():
            self.centre.lerp_(seen.prototypes @ seen.features.mean((0, 1)), 1 - CENTRE_MOMENTUM)
        return loss


def last_layer(head: Any, raw: Tensor) -> nn.Module:
    layer: Any = head.last_layer
    layer.weight_v.data.copy_(raw)
    layer.weight_g.requires_grad_(False)
    return layer


class Lightly:
    def __init__(self, given: Given) -> None:
        heads, loss = have("lightly.models.modules.heads", "lightly.loss") or (None, None)
        assert heads is not None and loss is not None
        make = heads.DINOProjectionHead
        sizes = {"input_dim": WIDTH, "hidden_dim": 8, "bottleneck_dim": WIDTH, "output_dim": given.count}
        self.given, self.student = given, last_layer(make(**sizes), given.prototypes)
        self.teacher = last_layer(make(**sizes), given.of_teacher)
        self.criterion = loss.DINOLoss(given.count, teacher_temp=TEACHER_TEMP, student_temp=STUDENT_TEMP)
        self.weight = self.student.weight_v

    def loss(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            seen = list(self.teacher(F.normalize(self.given.teacher, dim=-1)))
        return self.criterion(seen, list(self.student(F.normalize(features, dim=-1))))


class Dinov2:
    """As its training calls it: locals against both teacher views, then each global against the other."""

    def __init__(self, given: Given, global_to_global: bool) -> None:
        head, loss = have("dinov2.layers.dino_head", "dinov2.loss") or (None, None)
        assert head is not None and loss is not None
        self.given, self.both = given, global_to_global
        self.student, self.teacher = (
            last_layer(head.DINOHead(WIDTH, given.count, hidden_dim=8), raw)
            for raw in (given.prototypes, given.of_teacher)
        )
        self.criterion = loss.DINOLoss(given.count, STUDENT_TEMP, CENTRE_MOMENTUM)
        self.weight = self.student.weight_v

    def loss(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.teacher(F.normalize(self.given.teacher, dim=-1).flatten(0, 1))
            seen = self.criterion.softmax_center_teacher(logits, TEACHER_TEMP)
            self.criterion.update_center(logits)
            first, second = seen.chunk(2)
        learned = F.normalize(features if self.both else features[GLOBALS:], dim=-1).flatten(0, 1)
        views = self.student(learned).split(self.given.pictures)
        small = views[-LOCALS:]
        pairs, total = LOCALS * GLOBALS, self.criterion(small, (first, second))
        if self.both:
            crossed = self.criterion([torch.cat(views[:GLOBALS])], [torch.cat([second, first])])
            pairs, total = pairs + GLOBALS, total + GLOBALS * crossed
        return total / pairs


def make(case: str, given: Given) -> Any:
    name, both = case.split(",")[0], "locals only" not in case
    if name == "lightly":
        return Lightly(given)
    return Ours(given, both) if name == "silc" else Dinov2(given, both)


def step(side: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient of the features, gradient of the raw prototypes."""
    features = side.given.student.clone().requires_grad_()
    value = side.loss(features)
    value.backward()
    gradient, side.weight.grad = side.weight.grad, None
    return value.detach(), features.grad, gradient


def here() -> list[str]:
    absent = [n for n, room in (("lightly", "lightly.loss"), ("dinov2", "dinov2.loss")) if have(room) is None]
    return [case for case in CASES if case.split(",")[0] not in absent]


def memory(case: str, pictures: int, count: int) -> dict[str, float]:
    step(make(case, Given(1, 64)))
    side = make(case, Given(pictures, count))
    with Measured() as measured:
        step(side)
    return {"above_bytes": measured.above, "once_seconds": measured.seconds}


def compare(cases: list[str], given: Given) -> list[dict[str, Any]]:
    checks = []
    for ours in ("silc", "silc, locals only"):
        mine = step(make(ours, given))
        for name in cases:
            if not name.startswith("silc") and ("locals" in name) == ("locals" in ours):
                told = f"{name}, K = {given.count:,}, {given.pictures} images"
                for what, a, b in zip(
                    ("value", "gradient of features", "gradient of prototypes"), mine, step(make(name, given))
                ):
                    summed = name == "lightly" and what == "value"
                    checks.append(check(f"{told}: {what}", a, b, SUMMED if summed else EQUAL))
    return checks


def main() -> None:
    args = arguments(__doc__, pictures=256, count=65536)
    pin(1, args.quick)
    pictures, count = (16, 4096) if args.quick else (args.pictures, args.count)
    if args.case:
        print(json.dumps(memory(args.case, pictures, count)))
        return
    cases, peak = here(), matmul_peak(torch.float32)["best"]
    checks = [] if args.quick else compare(cases, Given(16, 4096))
    given = Given(pictures, count)
    checks += compare(cases, given)
    runs = {name: partial(step, make(name, given)) for name in cases}
    seconds = interleave(runs, args.rounds)
    words = ("--pictures", str(pictures), "--count", str(count))
    above = {name: alone(__file__, name, args.quick, *words)["above_bytes"] for name in cases}
    rows = []
    for name, s in seconds.items():
        views = LOCALS + (0 if "locals" in name else GLOBALS)
        work = 2.0 * (3 * views + GLOBALS) * pictures * WIDTH * count
        mine = "silc, locals only" if "locals" in name else "silc"
        against = {"silc_speedup": ratio(s, seconds[mine]), "silc_memory_share": above[mine] / above[name]}
        rows.append({**timed(name, s, work, peak), "above_bytes": above[name], **against})
    told, targets = f"prototypes and loss, {pictures} images, K = {count:,}", []
    for name in (n for n in BOUNDS if n in cases):
        targets.append(target(f"{told}: added memory", name, above["silc"] / above[name], most=BOUNDS[name]))
    if others := [n for n in BOUNDS if n in cases]:
        faster = min(others, key=lambda n: sorted(seconds[n])[len(seconds[n]) // 2])
        targets.append(
            target(f"{told}: speed, the faster of them", faster, ratio(seconds[faster], seconds["silc"]), least=1.0)
        )
    write(args.out, "prototypes", rows, targets, checks, rounds=args.rounds, pictures=pictures, prototypes=count)


if __name__ == "__main__":
    main()
