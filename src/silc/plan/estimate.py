"""From shapes to days: traffic, time and cost of a run on given cards, and what to change when it does not fit.

Gives: estimate, Plan, Site, Traffic, changes, Change, SIZES, sized.
Used by: app/planning.py, which prints it; cli.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from silc.config import Config, ImageTowerConfig, ModelConfig, TextTowerConfig
from silc.plain import nearest
from silc.plan import machines
from silc.plan.flops import Part, as_clip, flops_per_sample, groups, parts
from silc.plan.machines import Card, get_card
from silc.plan.memory import FP32, Weights, compute_bytes, memory, weights

LEAST_PAIRS = 8
"""Pairs of a micro-batch below which accumulation is not proposed: the products become too small for a GPU."""


@dataclass(frozen=True)
class Site:
    """Where a run is planned, and what is assumed of it."""

    gpus: int = 8
    """Number of GPUs (processes)."""
    gpu: str = "h100"
    """h100, h200, b200, a100-80, a100-40, l40s, 4090, or cpu (a process on one core)."""
    per_node: int = 8
    """GPUs of one node; the network joins the nodes."""
    mfu: float = machines.MFU
    """Share of the card's peak that all arithmetic, recomputation included, is assumed to reach."""
    price: float = 0.0
    """Price of one GPU for one hour; 0 leaves the cost out."""

    @property
    def card(self) -> Card:
        return get_card(self.gpu)


@dataclass(frozen=True)
class Traffic:
    """One kind of exchange, per GPU and step."""

    bytes: float
    """Received, and as many sent."""
    seconds: float
    hides: bool
    """Can it run while the GPU computes?"""


@dataclass(frozen=True)
class Plan:
    """What a run costs; bytes per GPU, seconds per step, FLOPs per pair."""

    config: Config
    site: Site
    weights: Weights
    memory: dict[str, float]
    parts: tuple[Part, ...]
    traffic: dict[str, Traffic]
    executed: float
    """FLOPs of a pair that the GPU carries out: with recomputation and accumulation's extra forward pass."""
    computing: float
    """Seconds of arithmetic."""
    updating: float
    """Seconds of optimiser, teacher and casts, which memory bounds."""

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def limit(self) -> float:
        return self.site.card.memory * machines.USABLE

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit

    @property
    def exchanging(self) -> float:
        """Seconds in which the links are busy in a step."""
        return sum(t.seconds for t in self.traffic.values())

    @property
    def exposed(self) -> float:
        """Seconds of a step in which a GPU waits for others."""
        hidden = sum(t.seconds for t in self.traffic.values() if t.hides)
        seen = sum(t.seconds for t in self.traffic.values() if not t.hides)
        return seen + max(0.0, hidden - machines.OVERLAP * self.computing)

    @property
    def step_seconds(self) -> float:
        return self.computing + self.updating + self.exposed

    @property
    def pictures_per_second(self) -> float:
        """Pairs per second of all GPUs together."""
        return self.config.train.batch / self.step_seconds

    @property
    def days(self) -> float:
        return self.config.steps * self.step_seconds / 86400

    @property
    def cost(self) -> float:
        return self.days * 24 * self.site.gpus * self.site.price

    @property
    def run_flops(self) -> float:
        return flops_per_sample(self.config).total * self.config.steps * self.config.train.batch

    @property
    def over_clip(self) -> float:
        """FLOPs of a pair over those of CLIP (or SigLIP) with the same towers."""
        return flops_per_sample(self.config).total / flops_per_sample(as_clip(self.config)).total

    @property
    def cores(self) -> float:
        """CPU cores of each GPU that decode and crop as fast as it trains."""
        return self.pictures_per_second / self.site.gpus * machines.picture_seconds(self.config)

    @property
    def read_rate(self) -> float:
        """Bytes per second from storage, for all GPUs."""
        return self.pictures_per_second * machines.PICTURE_BYTES


def check(config: Config, site: Site) -> None:
    """ValueError, one sentence, for settings under which the run would not start."""
    t, v, patch = config.train, config.views, config.model.image.patch
    if site.gpus < 1 or site.per_node < 1:
        raise ValueError("--gpus and --per-node must be at least 1.")
    if not 0 < site.mfu <= 1:
        raise ValueError(f"--mfu {site.mfu:g} must be a share of the peak, above 0 and at most 1.")
    if t.shard < 1 or site.gpus % t.shard:
        raise ValueError(f"--train.shard {t.shard} does not divide {site.gpus} GPUs.")
    if t.accumulate < 1 or t.batch % (site.gpus * t.accumulate):
        each = f" x --train.accumulate {t.accumulate}" if t.accumulate != 1 else ""
        raise ValueError(f"--train.batch {t.batch} is not a multiple of {site.gpus} GPUs{each}.")
    local = v.local_size if v.locals else patch
    for name, size in (("--views.global-size", v.global_size), ("--views.local-size", local)):
        if size % patch:
            raise ValueError(f"{name} {size} is not a multiple of the patch of {patch} px.")


def estimate(config: Config, site: Site) -> Plan:
    """The plan of a run. ValueError for settings under which it would not start, and for an unknown card."""
    card = site.card
    check(config, site)
    device = "cpu" if site.gpu == "cpu" else "cuda"
    half, found, w = compute_bytes(config, device) < FP32, parts(config), weights(config)
    executed = sum(p.flops for p in found)
    if config.train.checkpoint_blocks:
        executed += sum(2 * p.macs * p.share for p in found if p.blocks)
    if config.train.accumulate > 1:
        executed += sum(2 * p.macs * p.share for p in found if p.aligned)
    rows, shard = config.train.batch // site.gpus, config.train.shard
    # AdamW reads four numbers and writes three, the gradient's norm reads one; the teacher reads two, writes one; a
    # cast reads four bytes and writes two
    moved = FP32 * (8 * w.student + 3 * w.teacher) / shard + 6 * w.cast * config.train.accumulate * half
    return Plan(
        config,
        site,
        w,
        memory(config, site.gpus, device),
        found,
        traffic(config, site, w),
        executed,
        rows * executed / (site.mfu * (card.bf16 if half else card.fp32)),
        moved / card.rate,
    )


def traffic(config: Config, site: Site, w: Weights) -> dict[str, Traffic]:
    """What each GPU receives in a step. Collectives run as rings, so that n members receive (n - 1) / n of the whole.

    Sharded weights are gathered for every forward and every backward pass and their gradient is reduce-scattered; the
    copies of a shard all-reduce theirs. Texts are all-gathered and their gradient is reduce-scattered; of a softmax the
    log-sum-exp of every text goes round besides. No process sees all pairs."""
    t, n = config.train, config.train.accumulate
    shard, copies = t.shard, site.gpus // t.shard
    inner = _rate(site, shard, 1), (shard - 1) / shard
    outer = _rate(site, copies, shard), (copies - 1) / copies
    everyone = _rate(site, site.gpus, 1), (site.gpus - 1) / site.gpus
    views = sum(g.pictures for g in groups(config) if g.aligned)
    passes = 2 if n == 1 else 3 * n  # accumulation embeds every micro-batch once more
    # a maximum and a sum, each an all-reduce
    softmax = 4 * views * FP32 * t.batch if config.objective.kind == "softmax" else 0
    found = {
        "gather student weights": (passes * FP32 * w.student, *inner, True),
        "gather teacher weights": (n * FP32 * w.teacher, *inner, True),
        "reduce-scatter gradients": (n * FP32 * w.student, *inner, True),
        "all-reduce gradients": (2 * n * FP32 * w.student / shard, *outer, True),
        "gather texts": (FP32 * t.batch * config.model.embed_dim, *everyone, False),
        "reduce-scatter gradients of texts": (FP32 * t.batch * config.model.embed_dim, *everyone, False),
        "log-sum-exp of every text": (softmax, *everyone, False),
    }
    return {k: Traffic(b * s, b * s / r, h) for k, (b, r, s, h) in found.items() if b * s}


def _rate(site: Site, members: int, apart: int) -> float:
    """Bytes/s of a ring of `members` GPUs, each `apart` from the next in rank, for each of them.

    Within a node the card's link counts; across nodes the adapters of those members that share a node work together."""
    card = site.card
    if members * apart <= site.per_node:
        return machines.LINK * card.inside
    together = max(1, site.per_node // apart)
    return machines.LINK * min(card.inside, together * card.outside)


# ---------------------------------------------------------------- when it does not fit


@dataclass(frozen=True)
class Change:
    """A setting, on top of those before it."""

    flags: str
    plan: Plan


def changes(plan: Plan) -> list[Change]:
    """Settings to change one after the other until the run fits; empty if it does, or if nothing helps.

    Of recomputation, accumulation and both, the quickest that fits; sharding, two processes at a time, when none of
    them does; a smaller batch, which changes the training, when even that is too little."""
    if plan.fits:
        return []
    site, t = plan.site, plan.config.train
    shards = [d for d in range(t.shard, site.gpus + 1) if site.gpus % d == 0 and d % t.shard == 0]
    batch = t.batch
    while True:
        for shard in shards:
            tried = [
                attempt
                for recompute in {t.checkpoint_blocks, True}
                for accumulate in _micro_batches(batch, site.gpus, t.accumulate)
                if (attempt := _with(plan, batch, shard, accumulate, recompute)).fits
            ]
            if tried:
                return _way(plan, min(tried, key=lambda p: p.step_seconds))
        if batch % (2 * site.gpus):
            return []
        batch //= 2


def _micro_batches(batch: int, gpus: int, now: int) -> list[int]:
    """Numbers of micro-batches, by doubling, that leave LEAST_PAIRS pairs to each; `now` in any case if it divides."""
    found = [now] if batch % (gpus * now) == 0 else []
    while batch % (gpus * 2 * now) == 0 and batch // (gpus * 2 * now) >= LEAST_PAIRS:
        now *= 2
        found.append(now)
    return found


def _with(plan: Plan, batch: int, shard: int, accumulate: int, recompute: bool) -> Plan:
    train = replace(plan.config.train, batch=batch, shard=shard, accumulate=accumulate, checkpoint_blocks=recompute)
    return estimate(replace(plan.config, train=train), plan.site)


def _way(plan: Plan, goal: Plan) -> list[Change]:
    """The settings in which two plans differ, one after the other."""
    found = []
    for name in ("checkpoint_blocks", "shard", "batch", "accumulate"):
        value = getattr(goal.config.train, name)
        if value != getattr(plan.config.train, name):
            train = replace(plan.config.train, **{name: value})
            plan = estimate(replace(plan.config, train=train), plan.site)
            flag = "--train." + name.replace("_", "-")
            found.append(Change(flag if value is True else f"{flag} {value}", plan))
    return found


# ---------------------------------------------------------------- named sizes


def _size(patch: int, image: tuple[int, int, int, int], text: tuple[int, int, int, int], side: int) -> ModelConfig:
    w, d, h, m = image
    tw, td, th, tm = text
    return ModelConfig(
        ImageTowerConfig(image_size=side, patch=patch, width=w, depth=d, heads=h, mlp=m),
        TextTowerConfig(width=tw, depth=td, heads=th, mlp=tm),
        embed_dim=w,
    )


_B, _L, _SO = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)
SIZES = {
    "B/16": _size(16, _B, _B, 256),
    "L/16": _size(16, _L, _L, 256),
    "So400m/14": _size(14, _SO, _SO, 224),
    "g/16": _size(16, (1536, 40, 16, 6144), _SO, 256),
}
"""Towers as SigLIP and SigLIP 2 released them (width, depth, heads, MLP), with a vocabulary of 32,000."""


def sized(config: Config, name: str) -> Config:
    """The recipe with those towers; its views keep their sizes where the patch divides them, else the next multiple.

    ValueError names the nearest size."""
    if name not in SIZES:
        raise ValueError(f"--size {name!r} is not known." + nearest(name, SIZES))
    size, m, v = SIZES[name], config.model, config.views
    side, patch = size.image.image_size, size.image.patch
    image = replace(m.image, **{k: getattr(size.image, k) for k in ("image_size", "patch", "width", "depth", "heads")})
    text = replace(m.text, **{k: getattr(size.text, k) for k in ("width", "depth", "heads", "mlp")})
    model = replace(
        m,
        image=replace(image, mlp=size.image.mlp),
        text=text,
        embed_dim=size.embed_dim,
        preprocess=replace(m.preprocess, size=side),
    )
    views = replace(v, global_size=side, local_size=math.ceil(v.local_size / patch) * patch)
    return replace(config, model=model, views=views)
