"""The CAT-Seg head against a second, naive build of every stage from the same weights: loops, concatenation, padding.

Gives: parity of values and gradients; numbers of classes below, at and above the limit; grids of any side.
Used by: pytest.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silc.config import CatSegConfig
from silc.model.catseg import UNSEEN, CatSeg, ClassBlock, Stage, WindowBlock

SMALL = CatSegConfig(width=16, layers=2, heads=2, window=4, classes=6, pool=2, decoder=(16, 16), guides=(12, 10),
                     guide_widths=(4, 3))  # fmt: skip
DIM, TOWER, GRID = 10, 14, 8


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


# ---------------------------------------------------------------- the naive build


def naive_window(block: WindowBlock, x: Tensor, guidance: Tensor) -> Tensor:
    """One class, one window, one head, one query at a time."""
    b, t, h, w, c = x.shape
    out, heads, d = x.clone(), block.heads, c // block.heads
    normed = block.norm1(x)
    for i in range(b):
        for j in range(t):
            both = torch.cat([normed[i, j], guidance[i]], -1)
            q, k, v = (layer(z) for layer, z in ((block.q, both), (block.k, both), (block.v, normed[i, j])))
            mixed = torch.zeros_like(v)
            for y in range(h):
                for z in range(w):
                    places = [(a, e) for a in range(h) for e in range(w)]
                    mates = [place for place in places if together(block, place, (y, z), h, w)]
                    for n in range(heads):
                        part = slice(n * d, (n + 1) * d)
                        scores = torch.stack([q[y, z, part] @ k[a, e, part] / math.sqrt(d) for a, e in mates])
                        values = torch.stack([v[a, e, part] for a, e in mates])
                        mixed[y, z, part] = scores.softmax(0) @ values
            out[i, j] = x[i, j] + block.out(mixed)
    return out + block.down(F.gelu(block.up(block.norm2(out))))


def together(block: WindowBlock, one: tuple[int, int], other: tuple[int, int], h: int, w: int) -> bool:
    """Do two positions share a window after the shift, without reaching over the border?"""
    for a, b, side in ((one[0], other[0], h), (one[1], other[1], w)):
        moved = [(at - block.shift) % side for at in (a, b)]
        if moved[0] // block.window != moved[1] // block.window:
            return False
        if (a < block.shift) != (b < block.shift) and moved[0] >= side - block.window:
            return False
    return True


def naive_classes(block: ClassBlock, x: Tensor, text: Tensor) -> Tensor:
    """Really padded, one picture and position at a time, softmax-free attention written as its double sum."""
    b, t, h, w, c = x.shape
    pool = block.pool if block.training else 1
    pooled = F.avg_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), pool).permute(0, 2, 3, 1).unflatten(0, (b, t))
    out, d = torch.zeros_like(pooled), c // block.heads
    for i in range(b):
        missing = max(0, block.classes - t)
        guide = torch.cat([text[i], block.pad_guidance.expand(missing, -1)])
        for y in range(pooled.shape[2]):
            for z in range(pooled.shape[3]):
                tokens = torch.cat([pooled[i, :, y, z], block.pad.expand(missing, -1)])
                normed = block.norm1(tokens)
                both = torch.cat([normed, guide], -1)
                q, k, v = F.elu(block.q(both)) + 1, F.elu(block.k(both)) + 1, block.v(normed)
                mixed = torch.zeros_like(tokens)
                for n in range(block.heads):
                    part = slice(n * d, (n + 1) * d)
                    weights = q[:, part] @ k[:, part].T
                    mixed[:, part] = weights @ v[:, part] / (weights.sum(1, keepdim=True) + 1e-6)
                tokens = tokens + mixed
                out[i, :, y, z] = (tokens + block.down(F.relu(block.up(block.norm2(tokens)))))[:t]
    big = F.interpolate(out.flatten(0, 1).permute(0, 3, 1, 2), (h, w), mode="bilinear", align_corners=True)
    return x + big.permute(0, 2, 3, 1).unflatten(0, (b, t))


def naive_stage(stage: Stage, x: Tensor, guidance: Tensor) -> Tensor:
    x = stage.enlarge(x)
    repeated = guidance.repeat_interleave(len(x) // len(guidance), 0)
    x = F.relu(stage.norm1(stage.mix(torch.cat([x, repeated], 1))))
    return F.relu(stage.norm2(stage.refine(x)))


def naive(head: CatSeg, dense: Tensor, text: Tensor, inner: tuple[Tensor, Tensor]) -> Tensor:
    """One picture at a time; classes left out by hand."""
    made = []
    for i in range(len(dense)):
        words = text / text.norm(dim=1, keepdim=True)
        image = dense[i] / dense[i].norm(dim=0, keepdim=True)
        cost = torch.stack([(image * word[:, None, None]).sum(0) for word in words])
        order = sorted(range(len(cost)), key=lambda t: -cost[t].max().item())[: head.config.classes]
        kept = sorted(order)
        x = head.embed(cost[kept][:, None]).permute(0, 2, 3, 1)[None]
        picture = F.relu(head.picture(dense[i : i + 1])).permute(0, 2, 3, 1)
        guide = F.relu(head.text(words[kept]))[None]
        for norm, blocks, over_classes in zip(head.picture_norms, head.spatial, head.over_classes):
            for block in blocks:
                x = naive_window(block, x, norm(picture))
            x = naive_classes(over_classes, x, guide)
        planes = x[0].permute(0, 3, 1, 2)
        for stage, finer, guides, found in zip(head.stages, head.finer, head.guides, inner):
            planes = naive_stage(stage, planes, F.relu(guides(finer(found[i : i + 1]))))
        logits = torch.full((len(words), *planes.shape[2:]), UNSEEN)
        logits[kept] = head.head(planes)[:, 0]
        made.append(logits)
    return torch.stack(made)


# ---------------------------------------------------------------- tests


def given(classes: int, grid: int = GRID, batch: int = 2) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(classes)
    dense, text = torch.randn(batch, DIM, grid, grid, generator=g), torch.randn(classes, DIM, generator=g)
    return dense, text, tuple(torch.randn(batch, TOWER, grid, grid, generator=g) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("shift", [0, 2])
@torch.no_grad()
def test_window_attention(shift: int) -> None:
    block = randomised(WindowBlock(8, 6, 2, 4, shift))
    x, guidance = torch.randn(2, 2, 8, 8, 8), torch.randn(2, 8, 8, 6)
    torch.testing.assert_close(block(x, guidance), naive_window(block, x, guidance), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("classes", [1, 4, 6])
def test_class_attention_with_counted_padding(classes: int, training: bool) -> None:
    block = randomised(ClassBlock(8, 6, 2, 6, 2)).train(training)
    x, text = torch.randn(2, classes, 4, 4, 8, requires_grad=True), torch.randn(2, classes, 6)
    found, expected = block(x, text), naive_classes(block, x, text)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    names = dict(block.named_parameters())
    one, other = (torch.autograd.grad(out.square().sum(), [x, *names.values()], allow_unused=True)
                  for out in (found, expected))  # fmt: skip
    for a, b in zip(one, other):
        if a is None or b is None:  # of a full set of classes, padding has no gradient
            assert (a is None or not a.any()) and (b is None or not b.any())
        else:
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_a_decoder_stage() -> None:
    stage = randomised(Stage(8, 16, 3))
    x, guidance = torch.randn(6, 8, 4, 4), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(stage(x, guidance), naive_stage(stage, x, guidance), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [2, 6, 9])
@torch.no_grad()
def test_the_whole_head(classes: int) -> None:
    """Padded, full, and with classes left out."""
    head = randomised(CatSeg(SMALL, DIM, TOWER, GRID)).eval()
    dense, text, inner = given(classes)
    found, expected = head(dense, text, inner), naive(head, dense, text, inner)
    assert found.shape == (2, classes, 4 * GRID, 4 * GRID)
    assert ((found == UNSEEN).flatten(2).all(2).sum(1) == max(0, classes - SMALL.classes)).all()
    assert ((found == UNSEEN) == (expected == UNSEEN)).all()
    assert ((found - expected).abs().max() / expected[expected != UNSEEN].abs().max()).item() < 1e-5
    one = head(dense[:1], text, tuple(part[:1] for part in inner))
    torch.testing.assert_close(one, found[:1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_order_of_classes_does_not_matter() -> None:
    head = randomised(CatSeg(SMALL, DIM, TOWER, GRID)).eval()
    dense, text, inner = given(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    found, moved = head(dense, text, inner), head(dense, text[order], inner)
    torch.testing.assert_close(moved, found[:, order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("grid", "window", "shift"), [(8, 4, 2), (6, 3, 1), (7, 7, 0), (4, 4, 0), (3, 3, 0)])
@torch.no_grad()
def test_any_grid_has_its_windows(grid: int, window: int, shift: int) -> None:
    head = CatSeg(SMALL, DIM, TOWER, grid).eval()
    blocks = head.spatial[0]
    assert [(b.window, b.shift) for b in blocks] == [(window, 0), (window, shift)]  # type: ignore[attr-defined]
    assert head(*given(3, grid)).isfinite().all()


def test_training_reaches_every_parameter_but_padding_when_full() -> None:
    head = randomised(CatSeg(SMALL, DIM, TOWER, GRID)).train()
    dense, text, inner = given(3)
    head(dense, text, inner).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
