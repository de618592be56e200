"""The pretraining task: what learns, what must not, and that neither micro-batches nor processes change the step."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import at_mu_size
from torch.utils._python_dispatch import TorchDispatchMode

from silc import losses, recipes
from silc.config import Config, InitConfig, Term
from silc.data.images import normalise
from silc.data.views import draw_photometric, sample_rng
from silc.model.prototypes import PrototypeHead
from silc.model.silc import Silc
from silc.parallel import World
from silc.train.loop import build
from silc.train.optim import clip_and_step
from silc.train.pretrain import Pretrain

ALONE = World(0, 1, torch.device("cpu"))


def config(
    batch: int = 8, accumulate: int = 1, precision: str = "fp32", continued: bool = False, **objective: object
) -> Config:
    """`continued`: a frozen first step, an anchor, pictures without captions."""
    base = recipes.mu()
    if continued:
        base = replace(base, init=InitConfig(freeze=batch / base.train.samples, image_lr=0.5))
        base = replace(base, train=replace(base.train, images=8), objective=replace(base.objective, anchor=Term(0.5)))
    return replace(
        base,
        model=replace(base.model, bias_init=-2.0 if objective.get("kind") == "sigmoid" else None),
        objective=replace(base.objective, **objective),
        views=replace(base.views, photometric="none"),
        train=replace(base.train, batch=batch, accumulate=accumulate, precision=precision),
    )


def batch_of(c: Config, step: int = 0, rows: slice = slice(None)) -> dict[str, object]:
    g = torch.Generator().manual_seed(100 + step)
    b, v = c.train.batch, c.views

    def pictures(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)

    made = {
        "image": pictures(b, 3, 32, 32)[rows],
        "globals": pictures(v.globals, b, 3, v.global_size, v.global_size)[:, rows],
        "locals": pictures(v.locals, b, 3, v.local_size, v.local_size)[:, rows],
        "tokens": torch.randint(0, 300, (b, c.model.text.length), generator=g)[rows],
    }
    if c.train.images:
        first, end, _ = (i * c.train.images // b for i in rows.indices(b))
        named = (("globals", v.globals, v.global_size), ("locals", v.locals, v.local_size))
        made["unpaired"] = {n: pictures(k, c.train.images, 3, s, s)[:, first:end] for n, k, s in named}
    return made | {"ids": [str(i) for i in range(b)][rows]}


def gradients(task: Pretrain) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in task.student.named_parameters() if p.grad is not None}


def step(task: Pretrain, optimizer: torch.optim.Optimizer, n: int) -> dict[str, torch.Tensor]:
    out = task.forward_backward(batch_of(task.config, n), n)
    clip_and_step(task.student.parameters(), optimizer, 1.0)
    task.after_step(n)
    return out


FROM_NOTHING = [n for n in recipes.names() if recipes.get(n).init == InitConfig() and n not in ("mu", "quickstart")]


@pytest.mark.parametrize("name", FROM_NOTHING)
def test_every_recipe_takes_a_step_and_reports_its_terms(name: str) -> None:
    c = at_mu_size(name, 32, 16)
    o, views = c.objective, c.views
    task, optimizer = build(c, ALONE)
    batch = batch_of(c)
    if views.locals == 0:
        del batch["locals"]
    out = task.forward_backward(batch, 0)
    clip_and_step(task.student.parameters(), optimizer, 1.0)
    task.after_step(0)
    expected = {"contrast"} | {n for n in ("distill", "masked") if getattr(o, n).weight > 0}
    assert expected <= out.keys() and all(v.isfinite() for v in out.values())
    by_hand = sum(
        {"contrast": o.contrast, "distill": o.distill, "masked": o.masked}[n].weight * out[n] for n in expected
    )
    torch.testing.assert_close(out["loss"], by_hand)
    assert ("logit_bias" in dict(task.model.named_parameters())) == (o.kind == "sigmoid")


def logits(head: PrototypeHead, model: Silc, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] -> [B, K]: cosines of the projected embedding with every prototype, the head written out."""
    x = model.image([pixels])[0].pooled
    for i, layer in enumerate(head.layers):
        x = layer(F.gelu(x) if i else x)
    return F.normalize(x, dim=-1) @ F.normalize(head.prototypes, dim=-1).T


def test_the_step_equals_the_paper_written_out_by_hand() -> None:
    c = config(masked=Term(0.0))
    task, _ = build(c, ALONE)
    batch, p = batch_of(c), c.model.preprocess
    out = task.forward_backward(batch, 0)
    m, head = task.model, task.student.view_head
    pixels = {k: normalise(batch[k], p.mean, p.std) for k in ("globals", "locals")}
    text = m.encode_text(batch["tokens"])
    contrast = torch.stack(
        [losses.softmax_contrastive(f, text, m.scale) for f in map(m.encode_image, pixels["globals"])]
    ).mean()
    targets = [(logits(head, m, g) / c.objective.teacher_temp).softmax(-1) for g in pixels["globals"]]
    terms = [
        -(t * (logits(head, m, view) / c.objective.student_temp).log_softmax(-1)).sum(-1).mean()
        for view in pixels["locals"]
        for t in targets
    ]
    torch.testing.assert_close(out["contrast"], contrast.detach())
    torch.testing.assert_close(out["distill"], torch.stack(terms).mean().detach())


@pytest.mark.parametrize("teacher", ["full", "head"])
def test_the_teacher_follows_the_student_without_a_gradient(teacher: str) -> None:
    c = config(teacher=teacher, momentum=0.9, momentum_batch=8)
    task, optimizer = build(c, ALONE)
    expected = {n: p.clone() for n, p in task.teacher.named_parameters()}
    assert any(n.startswith("image.") for n in expected) == (teacher == "full")
    for n in range(3):
        step(task, optimizer, n)
        student = {k.removeprefix("model."): p for k, p in task.student.named_parameters()}
        expected = {k: 0.9 * v + 0.1 * student[k] for k, v in expected.items()}
    for name, p in task.teacher.named_parameters():
        assert p.grad is None and not p.requires_grad
        torch.testing.assert_close(p, expected[name])


def test_the_teacher_moves_under_bf16_at_a_high_momentum() -> None:
    c = config(precision="bf16", momentum=0.9999, momentum_batch=8)
    task, optimizer = build(c, ALONE)
    before = {n: p.clone() for n, p in task.teacher.named_parameters()}
    for n in range(3):
        step(task, optimizer, n)
    moved = [n for n, p in task.teacher.named_parameters() if not torch.equal(p, before[n])]
    assert all(p.dtype == torch.float32 for p in task.teacher.parameters())
    # keys get no gradient through softmax from their bias, so a bias may rest; every matrix must move
    assert {n for n in before if before[n].ndim > 1} <= set(moved)


def test_the_centre_follows_the_teachers_mean_logits() -> None:
    c = config(masked=Term(0.0))
    task, optimizer = build(c, ALONE)
    p = c.model.preprocess
    with torch.no_grad():
        globals_ = normalise(batch_of(c)["globals"], p.mean, p.std).flatten(0, 1)
        mean = logits(task.teacher.view_head, task.teacher, globals_).mean(0)
    step(task, optimizer, 0)
    torch.testing.assert_close(task.view_centre, (1 - c.objective.centre_momentum) * mean)


def test_a_term_starts_when_it_should_from_that_days_student() -> None:
    c = config(distill=Term(1.0, 0.5), masked=Term(0.0), momentum=0.5, momentum_batch=8)
    c = replace(c, train=replace(c.train, samples=8 * 4))
    task, optimizer = build(c, ALONE)
    assert "distill" not in step(task, optimizer, 0) and "distill" not in step(task, optimizer, 1)
    for name, p in task.teacher.named_parameters():
        torch.testing.assert_close(
            p, dict(task.student.named_parameters())[f"model.{name}" if name.startswith("image") else name]
        )
    assert "distill" in step(task, optimizer, 2)


@pytest.mark.parametrize("objective", [{}, {"teacher": "head", "masked_form": "all"}, {"contrast_views": "both"}])
def test_micro_batches_give_the_gradient_of_the_whole_batch(objective: dict[str, object]) -> None:
    whole, _ = build(config(**objective), ALONE)
    parts, _ = build(config(accumulate=4, **objective), ALONE)
    a, b = whole.forward_backward(batch_of(whole.config), 0), parts.forward_backward(batch_of(parts.config), 0)
    for name in ("loss", "contrast", "distill", "masked"):
        torch.testing.assert_close(a[name], b[name])
    expected, found = gradients(whole), gradients(parts)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-6)


def test_a_gradient_that_is_not_a_number_skips_the_step() -> None:
    task, optimizer = build(config(), ALONE)
    step(task, optimizer, 0)
    before = [p.clone() for p in task.student.parameters()]
    task.forward_backward(batch_of(task.config, 1), 1)
    next(task.student.parameters()).grad[0] = float("nan")
    norm = clip_and_step(task.student.parameters(), optimizer, 1.0)
    assert not norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, task.student.parameters()))
    step(task, optimizer, 2)
    assert not all(torch.equal(a, b) for a, b in zip(before, task.student.parameters()))


def test_forty_steps_on_one_batch_learn_it() -> None:
    task, optimizer = build(config(distill=Term(0.5)), ALONE)
    first = step(task, optimizer, 0)
    for _ in range(40):
        out = task.forward_backward(batch_of(task.config, 0), 0)
        clip_and_step(task.student.parameters(), optimizer, 1.0)
        task.after_step(0)
    assert out["contrast"] < 0.25 * first["contrast"]
    assert out["teacher_entropy"] > 0.1


def test_the_temperature_stays_under_its_clamp() -> None:
    task, optimizer = build(config(max_scale=14.0), ALONE)
    step(task, optimizer, 0)
    assert task.model.scale.item() <= 14.0001


class HostReads(TorchDispatchMode):
    """Collects the operations by which the host would wait for a GPU: a tensor's value read, or a shape that depends on
    values."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # a boolean index is a nonzero in disguise
        masks = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for a in args if isinstance(a, list) for i in a
        )
        if name in self.WAITS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_host_never_waits_for_the_device_in_an_ordinary_step(kind: str, accumulate: int) -> None:
    c = config(accumulate=accumulate, kind=kind, global_to_global=True, precision="bf16")
    c = replace(c, views=replace(c.views, photometric="dino"))
    task, optimizer = build(c, ALONE)
    photo = np.stack([draw_photometric(c.views, sample_rng(0, i)) for i in range(c.train.batch)], 1)
    step(task, optimizer, 0)
    with HostReads() as reads:
        task.forward_backward(batch_of(c, 1) | {"photo": photo}, 1)
        clip_and_step(task.student.parameters(), optimizer, 1.0)
        task.after_step(1)
    assert reads.found == []
    with HostReads() as reads:  # and such a read would be seen
        float(torch.ones(2).sum())
        _ = torch.ones(2)[torch.tensor([True, False])]
    assert len(reads.found) == 2


def worker(rank: int, world: int, port: int, shard: int, kinds: list[dict[str, object]], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    from silc import parallel

    place = parallel.start("cpu", shard)
    for i, kind in enumerate(kinds):
        c = config(**kind)
        task, optimizer = build(c, place)
        each = c.train.batch // world
        seen: dict[str, torch.Tensor] = {}
        for n in range(3):
            batch = batch_of(c, n, slice(rank * each, (rank + 1) * each))
            out = task.forward_backward(batch, n)
            if n == 0:
                seen |= {f"grad.{k}": parallel.whole(g) for k, g in gradients(task).items()}
            seen |= {
                f"{n}.{k}": parallel.mean(v, place)
                for k, v in out.items()
                if k in ("loss", "contrast", "distill", "masked", "anchor")
            }
            clip_and_step(task.student.parameters(), optimizer, 1.0)
            task.after_step(n)
        seen |= {f"after.{k}": parallel.whole(v) for k, v in task.state_dict().items()}
        if rank == 0:
            torch.save(seen, Path(folder) / f"{world}-{shard}-{i}.pt")
    dist.barrier()
    parallel.stop()
    if shard == 1 and sys.platform == "linux":  # a thread left behind may abort the process as the interpreter ends
        threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
        assert not [name for name in threads if "gloo" in name]


def run_worlds(
    folder: Path, world: int, shard: int, kinds: list[dict[str, object]], port: int
) -> list[dict[str, torch.Tensor]]:
    mp.spawn(worker, (world, port, shard, kinds, str(folder)), nprocs=world)
    return [torch.load(folder / f"{world}-{shard}-{i}.pt", weights_only=True) for i in range(len(kinds))]


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


KINDS: list[dict[str, object]] = [
    {},
    {"kind": "sigmoid", "teacher": "head", "global_to_global": True},
    {"accumulate": 2},
    {"continued": True, "accumulate": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "shard"), [(2, 1), (2, 2), (4, 2)])
def test_loss_gradient_and_weights_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, world: int, shard: int
) -> None:
    spread = run_worlds(tmp_path, world, shard, KINDS, free_port())
    for kind, found in zip(KINDS, spread):
        c = config(**{k: v for k, v in kind.items() if k != "accumulate"})
        task, optimizer = build(c, ALONE)
        for n in range(3):
            out = task.forward_backward(batch_of(c, n), n)
            if n == 0:
                for name, g in gradients(task).items():
                    slack = 1e-5 * g.abs().max().item() + 1e-6
                    torch.testing.assert_close(found[f"grad.{name}"], g, rtol=1e-4, atol=slack)
            for k in set(out) & {"loss", "contrast", "distill", "masked", "anchor"}:
                torch.testing.assert_close(found[f"{n}.{k}"], out[k], rtol=2e-4, atol=1e-4)
            clip_and_step(task.student.parameters(), optimizer, 1.0)
            task.after_step(n)
        expected = {f"after.{k}" for k in task.state_dict()}
        assert expected <= found.keys()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_give_the_same_step(recompute: bool) -> None:
    found = []
    for compiled in (False, True):
        c = config(masked=Term(0.5))
        c = replace(c, train=replace(c.train, compile=compiled, checkpoint_blocks=recompute))
        task, _ = build(c, ALONE)
        terms = task.forward_backward(batch_of(c), 0)
        found.append((terms, gradients(task)))
    for one, other in zip(*found):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)
