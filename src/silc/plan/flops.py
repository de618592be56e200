"""FLOPs of one training pair, by part, counted from shapes.

Gives: flops_per_sample, Flops, parts, Part, groups, Group, hidden_patches.
Used by: quickstart.py, estimate.py, memory.py (which counts what the same groups of views store).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from silc.config import (
    Config,
    ImageTowerConfig,
    ObjectiveConfig,
    PrototypeConfig,
    Term,
    TextTowerConfig,
    ViewsConfig,
)


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


@dataclass(frozen=True)
class Group:
    """Views of one size that pass the student's image tower together."""

    name: str
    pictures: float
    """Views for each pair; more than a picture has where pictures without captions come beside the pairs."""
    size: int
    """Side in pixels."""
    share: float
    """Share of the run in which they are read."""
    aligned: bool
    """Does the text loss read them?"""


@dataclass(frozen=True)
class Part:
    """Work that one pair causes."""

    name: str
    macs: float
    """Multiply-adds of one forward pass while the part is on."""
    passes: float
    """Forward passes that forward and backward together cost: 3 for what learns, 1 for the teacher."""
    share: float = 1.0
    """Share of the run in which it is on."""
    blocks: bool = False
    """Is it a tower, which `--train.checkpoint-blocks` runs forward once more?"""
    aligned: bool = False
    """Is it a tower whose embedding the text loss reads, which accumulation runs forward once more?"""

    @property
    def flops(self) -> float:
        """Averaged over the run."""
        return 2 * self.macs * self.passes * self.share


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


def shares(objective: ObjectiveConfig) -> tuple[float, float]:
    """Shares of the run in which distillation and masked prediction are on."""
    on_d, on_m = ((1 - t.start) if t.weight > 0 else 0.0 for t in (objective.distill, objective.masked))
    return on_d, on_m


def pictures_per_pair(config: Config) -> float:
    """Pictures that feed the teacher's terms for each pair: its own, and its part of those without captions."""
    return 1 + config.train.images / config.train.batch


def hidden_patches(config: Config) -> int:
    """Patches a picture whose prototypes are predicted: the hidden ones, or all with `--objective.masked-form all`."""
    patches = (config.views.global_size // config.model.image.patch) ** 2
    return patches if config.objective.masked_form == "all" else round(config.objective.mask_ratio * patches)


def groups(config: Config) -> tuple[Group, ...]:
    """What the student's image tower reads of each picture; only groups that some term reads."""
    o, v = config.objective, config.views
    on_d, on_m = shares(o)
    aligned = o.contrast_views != "original"
    # global views that no text reads pass the student only when it learns from them or lends its features
    lent = max(on_d, on_m) if o.teacher == "head" else on_d if o.global_to_global else 0.0
    each = pictures_per_pair(config)
    found = (
        Group("original", int(o.contrast_views != "global"), config.model.preprocess.size, 1.0, True),
        Group("global", v.globals * (each if lent else 1), v.global_size, 1.0 if aligned else lent, aligned),
        Group("local", v.locals * each, v.local_size, on_d, False),
        Group("masked", each, v.global_size, on_m, False),
    )
    return tuple(g for g in found if g.pictures > 0 and g.share > 0)


def parts(config: Config) -> tuple[Part, ...]:
    """All that one pair costs. A backward pass costs two forwards."""
    o, v, m = config.objective, config.views, config.model
    on_d, on_m = shares(o)
    reads, each = groups(config), pictures_per_pair(config)
    passes = 3 - 2 * config.init.freeze  # towers that stand still have no backward pass
    found = [
        Part(
            f"image tower, {g.name} views",
            g.pictures * image_macs(m.image, g.size, m.embed_dim),
            passes,
            g.share,
            blocks=True,
            aligned=g.aligned,
        )
        for g in reads
    ]
    found.append(Part("text tower", text_macs(m.text, m.embed_dim), passes, blocks=True, aligned=True))
    read_by_text = sum(g.pictures for g in reads if g.aligned)
    # the tiles' logits are computed once more in the backward pass of the softmax; the sigmoid's gradient needs no
    # sum over the whole row and is found in the forward pass
    products = 4 if o.kind == "softmax" else 3
    found.append(Part("contrastive loss", read_by_text * config.train.batch * m.embed_dim, products))
    view_head = each * head_macs(o.prototypes, m.embed_dim)
    patch_head = each * head_macs(o.prototypes, m.image.width) * hidden_patches(config)
    learners = v.locals + (v.globals if o.global_to_global else 0)
    found += [
        Part("prototypes, student views", learners * view_head, 3, on_d),
        Part("prototypes, student patches", patch_head, 3, on_m),
    ]
    if o.teacher == "full":
        macs = each * v.globals * image_macs(m.image, v.global_size, m.embed_dim)
        found.append(Part("teacher, image tower", macs, 1, max(on_d, on_m)))
    found += [
        Part("teacher, view prototypes", v.globals * view_head, 1, on_d),
        Part("teacher, patch prototypes", patch_head, 1, on_m),
    ]
    if o.anchor.weight > 0:
        seen = sum(g.pictures * image_macs(m.image, g.size, m.embed_dim) for g in reads if g.aligned)
        found.append(Part("anchor, both towers", seen + text_macs(m.text, m.embed_dim), 1,
                          1 - max(o.anchor.start, config.init.freeze)))
    return tuple(p for p in found if p.share > 0)


def flops_per_sample(config: Config) -> Flops:
    """Cost of one pair; terms that start late count for their share of the run."""
    found = parts(config)
    teacher = sum(p.flops for p in found if p.name.startswith("teacher"))
    return Flops(sum(p.flops for p in found) - teacher, teacher)


def as_clip(config: Config) -> Config:
    """The same towers trained as CLIP or SigLIP: one view, which the text reads, and nothing else."""
    v, o = config.views, config.objective
    size = v.global_size if o.contrast_views == "global" else config.model.preprocess.size
    plain = replace(o, contrast_views="global", distill=Term(), masked=Term(), anchor=Term(), global_to_global=False)
    alone = replace(config.train, images=0)
    return replace(config, objective=plain, views=ViewsConfig(globals=1, global_size=size), train=alone)
