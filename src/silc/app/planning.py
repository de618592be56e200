"""A plan in words and tables: what a run needs, what it takes, and what to change.

Gives: Asked (what `silc plan` takes), show (a plan for the terminal), table, sizes and errors (in Markdown).
Used by: cli.py; docs/planning.md between its markers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from silc import recipes
from silc.config import Config
from silc.plan import machines
from silc.plan.estimate import SIZES, Change, Plan, Site, changes, estimate, sized
from silc.plan.flops import as_clip, flops_per_sample
from silc.train.prepare import begun_with, decided

ERRORS = {
    "FLOPs": (0.007, 0.062),
    "weights, moments and teacher": (0.0, 0.0),
    "stored activations": (0.01, 0.094),
    "peak memory": (0.017, 0.255),
    "CPU time of a picture": (0.175, 0.25),
}
"""Median and largest error that benchmarks/plan_check.py found on small models on a CPU; a test holds them against its
raw file."""
TABLE_GPUS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Asked:
    """What a run needs before it runs: memory of a GPU by part, FLOPs, traffic, time and cost, and the settings to
    change where it does not fit. Nothing is trained, and no GPU is needed.

    Activations, FLOPs and traffic are counted from the recipe's shapes; speed is the card's data sheet times the share
    of its peak that you assume. Every setting of the recipe can be changed as in `silc train`."""

    site: Annotated[Site, tyro.conf.arg(name="")] = field(default_factory=Site)
    samples: float = 0.0
    """Pairs of the whole run (20e9); 0 takes the recipe's --train.samples."""
    size: str = ""
    """Towers of a known size in the recipe's place: B/16, L/16, So400m/14 or g/16."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def plan(self) -> Plan:
        """ValueError for settings under which the run would not start."""
        t = self.config.train
        if self.samples and self.samples < t.batch:
            raise ValueError(f"--samples {self.samples:g} is less than one batch of {t.batch}.")
        train = replace(t, samples=round(self.samples) or t.samples)
        return estimate(decided(replace(self.config, train=train), begun_with(self.config)), self.site)


def show(plan: Plan) -> str:
    """The whole plan, some sixty lines."""
    return "\n\n".join([_head(plan), _memory(plan), _flops(plan), _traffic(plan), _time(plan), _trust()])


def _head(plan: Plan) -> str:
    t, site = plan.config.train, plan.site
    each = t.batch // site.gpus
    micro = f" in {t.accumulate} micro-batches" if t.accumulate > 1 else ""
    return (
        f"{plan.config.recipe} on {site.gpus} x {site.card.name}: {plan.weights.student / 1e6:,.1f}M parameters that "
        f"learn, {plan.weights.teacher / 1e6:,.1f}M of the teacher\n"
        f"batch {t.batch:,} = {each:,} pairs a GPU{micro}, {plan.config.steps:,} steps = "
        f"{plan.config.steps * t.batch:.3g} pairs"
    )


def _memory(plan: Plan) -> str:
    rows = [(name, _gib(size)) for name, size in plan.memory.items()]
    share = plan.bytes / plan.site.card.memory
    rows.append(("total", f"{_gib(plan.bytes)}   {share:.0%} of {plan.site.card.memory / machines.GIB:.0f} GiB"))
    text = "memory of a GPU, GiB\n" + _rows(rows) + "\n"
    if plan.fits:
        return text + f"  It fits: up to {machines.USABLE:.0%} may be filled."
    return text + f"  It does not fit: more than {machines.USABLE:.0%} would be filled. " + _changes(changes(plan))


def _changes(found: list[Change]) -> str:
    if not found:
        return "No setting helps: take more GPUs, cards with more memory, or a smaller model."
    rows = [
        (c.flags, f"{_gib(c.plan.bytes)}   {c.plan.days:,.1f} days{'   fits' if c.plan.fits else ''}") for c in found
    ]
    return "Change these, each beside those before it:\n" + _rows(rows)


def _flops(plan: Plan) -> str:
    total = sum(p.flops for p in plan.parts)
    rows = []
    for p in plan.parts:
        late = f"   in {p.share:.0%} of the run" if p.share < 1 else ""
        rows.append((p.name, f"{p.flops / 1e9:9.2f}  {p.flops / total:4.0%}{late}"))
    rows.append(("total", f"{total / 1e9:9.2f}"))
    if plan.executed > total:
        rows.append(("carried out, with what is computed again", f"{plan.executed / 1e9:9.2f}"))
    kind = "CLIP" if plan.config.objective.kind == "softmax" else "SigLIP"
    return (
        "GFLOP of a pair, forward and backward\n" + _rows(rows) + "\n"
        f"  {plan.over_clip:.2f} times {kind} with the same towers; the run: {plan.run_flops:.3g} FLOP"
    )


def _traffic(plan: Plan) -> str:
    if not plan.traffic:
        return "one GPU exchanges nothing"
    rows = [
        (k, f"{v.bytes / 1e6:10,.1f} MB {v.seconds * 1e3:9.2f} ms   {'behind the arithmetic' if v.hides else 'waits'}")
        for k, v in plan.traffic.items()
    ]
    card = plan.site.card
    return (
        "exchange, received by each GPU in a step (and as much sent)\n" + _rows(rows) + "\n"
        f"  At {machines.LINK:.0%} of {card.inside / 1e9:g} GB/s within a node of {plan.site.per_node} and "
        f"{card.outside / 1e9:g} GB/s a GPU between nodes, one way. Weights and gradients\n"
        f"  are assumed to hide behind up to {machines.OVERLAP:.0%} of the arithmetic. "
        "No matrix of all pairs is exchanged, or made."
    )


def _time(plan: Plan) -> str:
    rate, site = plan.pictures_per_second, plan.site
    step = plan.step_seconds
    kinds = {"arithmetic": plan.computing, "update": plan.updating, "waiting": plan.exposed}
    rows = [
        ("step", f"{step:.3g} s: " + ", ".join(f"{k} {v / step:.0%}" for k, v in kinds.items())),
        ("pictures", f"{rate:,.0f} /s, {rate / site.gpus:,.1f} /s a GPU"),
        ("run", f"{plan.days:,.2f} days, {plan.days * 24 * site.gpus:,.0f} GPU hours"),
    ]
    if site.price:
        rows.append(("cost", f"{plan.cost:,.0f} at {site.price:g} a GPU hour"))
    read = f"{plan.read_rate / 1e9:.3g} GB/s read at {machines.PICTURE_BYTES / 1e3:.0f} kB a pair"
    rows.append(("input", f"{plan.cores:.2g} CPU cores a GPU to decode and crop, {read}"))
    fitted = "" if plan.fits else " and it fitted"
    return f"time, if all arithmetic reached {site.mfu:.0%} of the card's peak (--mfu){fitted}\n" + _rows(rows)


def _trust() -> str:
    errors = ", ".join(f"{name} {middle:.1%} / {most:.0%}" for name, (middle, most) in ERRORS.items())
    return (
        f"Calibrated on a CPU at small size; median / largest error: {errors}.\n"
        "Not yet run on a GPU: speeds are assumptions, of the data sheets' peaks and of the shares named above."
    )


def _rows(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def _gib(size: float) -> str:
    return f"{size / machines.GIB:8.2f}"


# ---------------------------------------------------------------- on paper


def table() -> str:
    """SILC at four sizes on 8 to 1,024 H100: the settings with which each fits, and what it then takes."""
    lines = [
        "| towers | GPUs | settings | GiB a GPU | pictures/s | days | GPU hours | exchange | waiting |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for size in SIZES:
        config = sized(recipes.get("silc"), size)
        for gpus in TABLE_GPUS:
            plan = estimate(config, Site(gpus=gpus))
            for change in changes(plan):
                plan = change.plan
            t = plan.config.train
            flags = [
                *["checkpoint-blocks"] * t.checkpoint_blocks,
                *[f"shard {t.shard}"] * (t.shard > 1),
                *[f"accumulate {t.accumulate}"] * (t.accumulate > 1),
                *[f"batch {t.batch}"] * (t.batch != config.train.batch),
            ]
            settings = ", ".join(flags) or "as it is"
            lines.append(
                f"| {size} | {gpus:,} | {settings if plan.fits else 'does not fit'} | {plan.bytes / machines.GIB:.0f} "
                f"| {plan.pictures_per_second:,.0f} | {plan.days:,.1f} | {plan.days * 24 * gpus:,.0f} "
                f"| {plan.exchanging / plan.step_seconds:.1%} | {plan.exposed / plan.step_seconds:.1%} |"
            )
    return "\n".join(lines)


def sizes() -> str:
    """Each size: its side, parameters and FLOPs of a pair beside CLIP's, in Markdown."""
    lines = ["| towers | side | parameters | teacher | TFLOP a pair | over CLIP |", "|---|---:|---:|---:|---:|---:|"]
    for size in SIZES:
        config = sized(recipes.get("silc"), size)
        plan = estimate(replace(config, train=replace(config.train, batch=1024)), Site(gpus=1))
        clip = flops_per_sample(as_clip(config)).total
        total = flops_per_sample(config).total
        lines.append(
            f"| {size} | {config.views.global_size} | {plan.weights.student / 1e6:,.0f}M "
            f"| {plan.weights.teacher / 1e6:,.0f}M | {total / 1e12:.2f} | {total / clip:.2f} |"
        )
    return "\n".join(lines)


def errors() -> str:
    """What `ERRORS` says, in Markdown."""
    lines = ["| predicted | median error | largest error |", "|---|---:|---:|"]
    return "\n".join(lines + [f"| {name} | {middle:.1%} | {most:.0%} |" for name, (middle, most) in ERRORS.items()])
