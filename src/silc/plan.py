"""What a run costs before it runs: FLOPs counted from shapes.

Gives: flops_per_sample, tower_flops, Flops.
Used by: quickstart.py, reports and studies that compare recipes at equal FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

from silc.config import Config, ImageTowerConfig, PrototypeConfig, TextTowerConfig


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one training pair (a multiply-add counts two), averaged over the run."""

    student: float
    """Forward and backward of everything that learns."""
    teacher: float
    """Forward of the EMA teacher."""

    @property
    def total(self) -> float:
        return self.student + self.teacher


def block_macs(tokens: int, width: int, mlp: int) -> float:
    """Multiply-adds of one transformer block over one sequence: projections and MLP per token, attention per pair."""
    return tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width


def image_macs(config: ImageTowerConfig, size: int, embed_dim: int) -> float:
    c, patches = config, (size // config.patch) ** 2
    tokens = patches + (c.pool == "cls")
    macs = patches * 3 * c.patch**2 * c.width + c.depth * block_macs(tokens, c.width, c.mlp)
    if c.pool == "map":
        macs += tokens * (2 * c.width**2 + 2 * c.width) + c.width**2 + 2 * c.width * c.mlp
    return macs + (c.width * embed_dim if c.proj != "none" else 0)


def text_macs(config: TextTowerConfig, embed_dim: int) -> float:
    return config.depth * block_macs(config.length, config.width, config.mlp) + config.width * embed_dim


def head_macs(config: PrototypeConfig, width: int) -> float:
    c = config
    return width * c.hidden + (c.layers - 2) * c.hidden**2 + c.hidden * c.bottleneck + c.bottleneck * c.count


def flops_per_sample(config: Config) -> Flops:
    """Cost of one pair. A backward pass costs two forwards; terms that start late count for their share of the run."""
    o, v, m = config.objective, config.views, config.model
    original = image_macs(m.image, m.preprocess.size, m.embed_dim)
    global_, local = (image_macs(m.image, size, m.embed_dim) for size in (v.global_size, v.local_size))
    patches = (v.global_size // m.image.patch) ** 2
    on_d, on_m = ((1 - t.start) if t.weight > 0 else 0.0 for t in (o.distill, o.masked))
    on = max(on_d, on_m)
    aligned = {"global": v.globals, "original": 0, "both": v.globals}[o.contrast_views]
    # global views that no text reads pass the student only when it learns from them or lends its features
    lent = v.globals * on if aligned == 0 and (o.global_to_global or o.teacher == "head") else 0.0
    views = int(o.contrast_views != "global")
    student = views * original + (aligned + lent) * global_ + text_macs(m.text, m.embed_dim)
    student += (aligned + views) * 2 * config.train.batch * m.embed_dim
    learners = v.locals + (v.globals if o.global_to_global else 0)
    view_head = head_macs(o.prototypes, m.embed_dim)
    patch_head = head_macs(o.prototypes, m.image.width) * patches
    student += on_d * (v.locals * local + learners * view_head) + on_m * (global_ + patch_head)
    teacher = (
        on_d * v.globals * view_head + on_m * patch_head + (on * v.globals * global_ if o.teacher == "full" else 0)
    )
    return Flops(2 * 3 * student, 2 * teacher)
