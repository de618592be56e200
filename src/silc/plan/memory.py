"""Memory of one process, by part: what stays, what a step holds, and what works for a moment.

Gives: memory, weights, Weights, stored, compute_bytes.
Used by: estimate.py. Weights are counted on the real modules, made without storage; activations by formulas that
benchmarks/plan_check.py holds against what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from silc.config import Config, ModelConfig, ObjectiveConfig
from silc.losses import BLOCK, CACHED, SIDE
from silc.model.silc import Silc
from silc.parallel import World
from silc.plan.flops import groups, hidden_patches, pictures_per_pair, shares
from silc.train.pretrain import Pretrain

FP32 = 4


@dataclass(frozen=True)
class Weights:
    """Numbers (not bytes) in the modules of a run."""

    student: int
    teacher: int
    cast: int
    """Those of the student that autocast copies to bf16 and keeps for the backward pass: its linear layers'."""
    cast_rest: int
    """Of these, the ones outside of its blocks, which recomputation leaves alone."""
    block: int
    """The largest transformer block: what sharding gathers at a time."""
    rest: int
    """The student outside of its blocks: gathered at once by its root."""
    teacher_rest: int
    anchor: int


def compute_bytes(config: Config, device: str) -> int:
    """Bytes of a number in matrix products and attention: 2 under autocast, else 4."""
    asked = config.train.precision
    return 2 if asked == "bf16" or (asked == "auto" and device != "cpu") else FP32


def weights(config: Config) -> Weights:
    return _weights(config.model, config.objective)


@lru_cache(maxsize=64)
def _weights(model: ModelConfig, objective: ObjectiveConfig) -> Weights:
    nowhere = torch.device("meta")
    with nowhere:
        task = Pretrain(Config(model=model, objective=objective), Silc(model), World(0, 1, nowhere))
    towers = [task.model.image, task.model.text]
    blocks = [_count(block) for tower in towers for block in tower.get_submodule("blocks").children()]
    linear = {n: _count(m) for n, m in task.student.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    teacher = task.teacher if task.has_teacher else nn.Module()
    image = getattr(teacher, "image", None)
    inside = 0 if image is None else _count(image.get_submodule("blocks"))
    student = _count(task.student)
    return Weights(
        student=student,
        teacher=_count(teacher),
        cast=sum(linear.values()),
        cast_rest=sum(size for name, size in linear.items() if ".blocks." not in name),
        block=max(blocks),
        rest=student - sum(blocks),
        teacher_rest=_count(teacher) - inside,
        anchor=_count(task.anchor) if objective.anchor.weight > 0 else 0,
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def block_bytes(width: int, mlp: int, heads: int, b: int, groups: int) -> float:
    """What one block keeps of each token for the backward pass.

    Both norms keep their fp32 input and two numbers; q, k, v their common input; attention q, k, v, its result and a
    number a head; `out` its input (a copy where several groups are joined); `up` its input; the activation and `down`
    theirs. Attention is the fused kernel's; a CPU in bf16 keeps its weights besides, which is not counted."""
    joined = width if groups > 1 else 0
    return 2 * (FP32 * width + 8) + FP32 * heads + b * (6 * width + joined + 2 * mlp)


def stored(config: Config, device: str = "cuda") -> dict[str, float]:
    """Bytes of activations that autograd keeps of each pair, by part, while all terms are on.

    With `--train.checkpoint-blocks` a block keeps its input alone."""
    m, b, recompute = config.model, compute_bytes(config, device), config.train.checkpoint_blocks
    i, t, found = m.image, m.text, {}
    reads = groups(config)
    per_block = FP32 * i.width if recompute else block_bytes(i.width, i.mlp, i.heads, b, len(reads))
    for g in reads:
        patches = (g.size // i.patch) ** 2
        tokens = patches + (i.pool == "cls")
        pixels = 3 * i.patch**2 * patches * b
        ends = FP32 * i.width * (1 + i.pre_norm) + 8
        pool = 0.0
        if i.pool == "map":
            ends += i.width * b * (4 if b < FP32 else 3)  # input of k and v, a cast each; k and v
            pool = i.width * (4 * b + 2 * FP32) + 2 * i.mlp * b
        if i.proj != "none":
            pool += i.width * b
        embedding = 3 * FP32 * m.embed_dim if g.aligned else 0
        each = pixels + tokens * (i.depth * per_block + ends) + pool + embedding
        found[f"image tower, {g.name} views"] = g.pictures * each
    per_block = FP32 * t.width if recompute else block_bytes(t.width, t.mlp, t.heads, b, 1)
    ends = FP32 * t.width + 8
    found["text tower"] = t.length * (t.depth * per_block + ends) + t.width * b + 3 * FP32 * m.embed_dim + 8 * t.length
    view_rows, patch_rows = head_rows(config)
    found["prototype heads"] = view_rows * head_bytes(config, m.embed_dim, b)
    found["prototype heads"] += patch_rows * head_bytes(config, i.width, b)
    return {k: v for k, v in found.items() if v}


def head_rows(config: Config) -> tuple[float, float]:
    """Rows that one pair brings to the student's view head and to its patch head."""
    on_d, on_m = shares(config.objective)
    learners = config.views.locals + (config.views.globals if config.objective.global_to_global else 0)
    each = pictures_per_pair(config)
    return (each * learners if on_d else 0), (each * hidden_patches(config) if on_m else 0)


def head_bytes(config: Config, width: int, b: int) -> float:
    """One row through the MLP (inputs of its layers and activations), and its fp32 unit vector with gradient."""
    p = config.objective.prototypes
    return b * (width + 2 * (p.layers - 1) * p.hidden) + FP32 * 4 * p.bottleneck


def losses(config: Config, gpus: int, device: str) -> dict[str, float]:
    """Tiles of logits, and what the exchange of embeddings holds; nothing here grows with the square of the batch."""
    c, p, whole, b = config, config.objective.prototypes, config.train.batch, compute_bytes(config, device)
    rows, width = whole // gpus, config.model.embed_dim
    views = sum(g.pictures for g in groups(c) if g.aligned)
    found = {
        "contrastive tiles": 3 * FP32 * min(SIDE, rows) * min(SIDE, whole),
        # all texts, their gradient for each view and in sum; my images of each view, scaled, and their gradient
        "gathered embeddings": FP32 * width * (whole * (2 + views) + rows * (2 * views + 1)),
    }
    pairs, v, tiles, held, aims = rows / c.train.accumulate, c.views, 0.0, 0.0, 0.0
    b = compute_bytes(c, device)
    view_rows, patch_rows = head_rows(c)
    for mine, taught, together in (
        (view_rows, pictures_per_pair(c) * v.globals, view_rows + pictures_per_pair(c) * v.globals),
        (patch_rows, patch_rows, 2),
    ):
        if mine:
            numbers = min(max(BLOCK / b, together * p.count), pairs * (mine + taught) * p.count)
            # logits of both sides; log-probabilities, probabilities and their products, a piece at a time on a CPU
            pieces = min(numbers, CACHED) if device == "cpu" else numbers
            tiles = max(tiles, b * numbers + 3 * FP32 * pieces)
            # the student's unit prototypes and unit vectors, each with its gradient; the teacher's without
            held += 2 * FP32 * p.bottleneck * (p.count + pairs * mine)
            aims += FP32 * p.bottleneck * (p.count + pairs * taught)
            # and those of both sides once more for the products in bf16
            aims += 2 * b * p.bottleneck * p.count * (b < FP32)
    return found | {"prototype vectors": held, "prototype tiles": tiles + aims}


def inputs(config: Config, rows: int) -> float:
    """Pixels of `rows` pairs as uint8 and as normalised fp32, and token ids."""
    v, s = config.views, config.model.preprocess.size
    pixels = 3 * (v.globals * v.global_size**2 + v.locals * v.local_size**2) * pictures_per_pair(config)
    if config.objective.contrast_views != "global":
        pixels += 3 * s**2
    return rows * ((1 + FP32) * pixels + 8 * config.model.text.length)


def peak(config: Config, pairs: float, kept: float, gradients: float, tiles: float, w: Weights, b: int) -> float:
    """The most that activations, gradients, bf16 copies and what works for a moment take together.

    Without accumulation gradients appear while activations go. With recomputation the copies of a block's weights go
    with its forward pass, and text and heads are done with when the image tower's blocks are recomputed."""
    c, i, t = config, config.model.image, config.model.text
    copies, copies_rest = (b * n * (b < FP32) for n in (w.cast, w.cast_rest))
    patches = [g.pictures * (g.size // i.patch) ** 2 for g in groups(c)]
    tokens = pairs * sum(patches)
    if c.objective.teacher == "full" and max(shares(c.objective)):
        seen = pairs * c.views.globals * (c.views.global_size // i.patch) ** 2
        tiles = max(tiles, seen * (3 * FP32 * i.width + 2 * b * i.mlp))
    before = gradients if c.train.accumulate > 1 else 0.0
    if not c.train.checkpoint_blocks:
        passing = 3 * FP32 * max(i.width * tokens, t.width * t.length * pairs)
        return copies + max(before + kept + max(tiles, passing), gradients + passing)
    image, text = (
        n * (block_bytes(tower.width, tower.mlp, tower.heads, b, parts) + FP32 * tower.width + b * tower.mlp)
        for tower, n, parts in ((i, tokens, len(patches)), (t, pairs * t.length, 1))
    )
    first = kept + max(copies, copies_rest + max(tiles, text))
    return max(before + first, before + tokens * i.depth * FP32 * i.width + image, gradients + image)


def memory(config: Config, gpus: int, device: str = "cuda") -> dict[str, float]:
    """Bytes of one process by part at the step's peak, all terms on. The last part is what must be taken off their sum,
    or put on top of it: not all of them are there at the same time, and some work for a moment only."""
    w, b, shard = weights(config), compute_bytes(config, device), config.train.shard
    rows = config.train.batch // gpus
    pairs = rows / config.train.accumulate
    gradients, copies = FP32 * w.student / shard, float(b * w.cast if b < FP32 else 0)
    found = {
        "weights, fp32": FP32 * w.student / shard,
        "AdamW moments, fp32": 2 * FP32 * w.student / shard,
        "teacher, fp32": FP32 * w.teacher / shard,
        "anchor, fp32": FP32 * w.anchor / shard,
        "gradients, fp32": gradients,
        "bf16 copies of the weights": copies,
    }
    if gpus > 1:
        # FSDP2 copies weights before use, also where a process holds them all: two blocks (one in use, one on its
        # way) and one block's gradient, beside the root's weights and gradient
        found["gathered weights and gradients"] = FP32 * (3 * w.block + 2 * w.rest)
    kept = {k: v * pairs for k, v in stored(config, device).items()}
    lost = losses(config, gpus, device)
    found |= kept | lost
    found["pixels and token ids"] = inputs(config, rows)
    tiles = max(size for name, size in lost.items() if name.endswith("tiles"))
    together = sum(kept.values()) + gradients + copies + sum(s for n, s in lost.items() if n.endswith("tiles"))
    most = peak(config, pairs, sum(kept.values()), gradients, tiles, w, b)
    found["work of a moment, less what is over by then"] = most - together
    return {k: v for k, v in found.items() if v}
