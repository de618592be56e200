"""What only a GPU can show: that the host never waits for it, and that it computes what the CPU computes.

Gives: tests of the losses, the views and the step on CUDA; all are skipped where there is none.
Used by: pytest.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_pretrain import batch_of, config

from silc.data.views import draw_photometric, photometric, sample_rng
from silc.losses import Target, distill, sigmoid_contrastive, softmax_contrastive
from silc.parallel import World
from silc.train.loop import build
from silc.train.optim import clip_and_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")


def on_gpu(x: object) -> object:
    return x.pin_memory().to("cuda", non_blocking=True) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_ordinary_step_never_makes_the_host_wait(precision: str) -> None:
    c = config(precision=precision, global_to_global=True)
    c = replace(c, views=replace(c.views, photometric="dino"))
    task, optimizer = build(c, World(0, 1, torch.device("cuda")))
    photo = np.stack([draw_photometric(c.views, sample_rng(0, i)) for i in range(c.train.batch)], 1)
    batches = [{k: on_gpu(v) for k, v in batch_of(c, n).items()} | {"photo": photo} for n in range(3)]
    for n, batch in enumerate(batches):
        torch.cuda.set_sync_debug_mode("error" if n == 2 else "default")  # after kernels and constants were made
        try:
            task.forward_backward(batch, n)
            clip_and_step(task.student.parameters(), optimizer, 1.0)
            task.after_step(n)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", ["plain", "compiled", "graphs"])
def test_a_step_is_the_cpus(how: str) -> None:
    found = {}
    for place in ("cpu", "cuda"):
        c = config()
        if place == "cuda" and how != "plain":
            c = replace(c, train=replace(c.train, compile=True, cuda_graphs=how == "graphs"))
        task, _ = build(c, World(0, 1, torch.device(place)))
        batch = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in batch_of(c).items()}
        for _ in range(3 if how == "graphs" else 1):  # a graph is recorded at the second call
            task.student.zero_grad()
            out = task.forward_backward(batch, 0)
        found[place] = (out, {n: p.grad for n, p in task.student.named_parameters()})
    for name, value in found["cpu"][0].items():
        torch.testing.assert_close(found["cuda"][0][name].cpu(), value, rtol=1e-4, atol=1e-5)
    for name, grad in found["cpu"][1].items():
        torch.testing.assert_close(found["cuda"][1][name].cpu(), grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "distill", "compiled"])
def test_losses_and_gradients_are_the_cpus(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    made = [torch.nn.functional.normalize(torch.randn(4, 300, 32, generator=g), dim=-1) for _ in range(4)]
    results = []
    for place in ("cpu", "cuda"):
        a, b, c, d = (x.to(place).requires_grad_() for x in made)
        if kind in ("softmax", "sigmoid"):
            scale = torch.tensor([20.0], device=place)
            more = (torch.tensor([-10.0], device=place),) if kind == "sigmoid" else ()
            loss = (softmax_contrastive if kind == "softmax" else sigmoid_contrastive)(a[0], b[0], scale, *more)
        else:
            target = Target(c[:2].detach(), d[0].detach(), torch.zeros(300, device=place), 0.04)
            loss = distill(a, b[0], target, 0.1, 2, compiled=kind == "compiled").loss
        results.append([loss, *torch.autograd.grad(loss, (a, b))])
    for expected, got in zip(*results):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-5)


def test_augmented_views_are_the_cpus() -> None:
    c = config()
    photo = np.stack([draw_photometric(c.views, sample_rng(0, i)) for i in range(8)], 1)
    pixels = torch.randint(0, 256, (4, 8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected, found = (photometric(pixels.to(p), photo, mean, std).cpu() for p in ("cpu", "cuda"))
    assert (found - expected).abs().max() < 0.02 and (found - expected).abs().mean() < 1e-4
