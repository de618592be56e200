"""A whole training step beside a SILC put together from open_clip and lightly: `python benchmarks/step.py`.

Gives: benchmarks/results/step.json: seconds of a step (one thread on one core, in turns, bf16 autocast) and its memory
(a process each), from uint8 crops to moved weights: normalise, forward, backward, clipped AdamW, EMA. ViT-Ti/16 at
96 px (locals 48) and ViT-S/16 at 128 px (locals 64), 2 + 8 views, K = 65,536. The naive SILC has open_clip's towers,
lightly's projection head, DINOLoss and EMA loop, PyTorch's AdamW as it comes, and silc's weights; loss and gradients of
the two are compared in fp32 in the same run.
Used by: pages.py, gpu_step.py.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import (
    Measured,
    alone,
    arguments,
    check,
    have,
    interleave,
    matmul_peak,
    need,
    pin,
    ratio,
    target,
    timed,
    write,
)
from peer_towers import open_clip_model, open_clip_names, stir
from torch import Tensor, nn

from silc.config import (
    Config,
    ImageTowerConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PreprocessConfig,
    PrototypeConfig,
    Term,
    TextTowerConfig,
    TrainConfig,
    ViewsConfig,
)
from silc.parallel import World, keep_memory
from silc.plan import flops_per_sample
from silc.plan.flops import as_clip
from silc.train.loop import build
from silc.train.optim import clip_and_step
from silc.train.pretrain import Pretrain

WHY: dict[str, str] = {
    "whole step, ViT-Ti/16 96 px: SILC over CLIP": "A tie at 32 pictures: the step then has 17 million prototypes to "
    "normalise, clip, move and average for few pictures, which no FLOP count shows; at width 384 it is far below.",
}


class Sizes(NamedTuple):
    image: int
    local: int
    patch: int
    width: int
    depth: int
    heads: int
    text_width: int
    text_depth: int
    prototypes: int
    batch: int
    vocab: int = 49408


SIZES = {
    "ViT-Ti/16 96 px": Sizes(96, 48, 16, 192, 12, 3, 256, 4, 65536, 32),
    "ViT-S/16 128 px": Sizes(128, 64, 16, 384, 12, 6, 384, 6, 65536, 8),
}
QUICK = {"toy": Sizes(32, 16, 8, 64, 2, 2, 32, 1, 1024, 4, vocab=500)}
CASES = ("CLIP, open_clip", "CLIP, silc", "SILC, naive", "SILC, silc", "SILC, silc, head-only EMA")
EQUAL = 1e-4


def configured(s: Sizes, precision: Any = "bf16", teacher: Any = "full") -> Config:
    """Towers that open_clip has too, and lightly's pairs of views: globals learn from each other as well."""
    shared: dict[str, Any] = {"act": "gelu", "norm_eps": 1e-5, "proj": "linear"}
    switches: dict[str, Any] = {"pool": "cls", "pre_norm": True, "patch_bias": False}
    ends: dict[str, Any] = {"causal": True, "pool": "eos", "eos_id": s.vocab - 1, "pad_id": 0}
    image = ImageTowerConfig(s.image, s.patch, s.width, s.depth, s.heads, 4 * s.width, **switches, **shared)
    heads = s.text_width // 64 or 1
    text = TextTowerConfig(s.vocab, 64, s.text_width, s.text_depth, heads, 4 * s.text_width, **ends, **shared)
    prototypes = PrototypeConfig(count=s.prototypes)
    return Config(
        "step",
        model=ModelConfig(image, text, PreprocessConfig(s.image), s.text_width, 1 / 0.07, None),
        objective=ObjectiveConfig(distill=Term(1.0), global_to_global=True, prototypes=prototypes, teacher=teacher),
        views=ViewsConfig(globals=2, global_size=s.image, locals=8, local_size=s.local),
        optim=OptimConfig(weight_decay=0.0),
        train=TrainConfig(batch=s.batch, precision=precision),
    )


def batch_of(c: Config) -> dict[str, Tensor]:
    """uint8 crops of noise, and texts that fill every position."""
    generator, v, b = torch.Generator().manual_seed(0), c.views, c.train.batch

    def crops(number: int, size: int) -> Tensor:
        return torch.randint(0, 256, (number, b, 3, size, size), generator=generator, dtype=torch.uint8)

    tokens = torch.randint(1, c.model.text.vocab - 1, (b, c.model.text.length), generator=generator)
    tokens[:, -1] = c.model.text.eos_id
    return {"globals": crops(v.globals, v.global_size), "locals": crops(v.locals, v.local_size), "tokens": tokens}


class Ours:
    """silc's own step, as its loop calls it."""

    def __init__(self, config: Config, batch: Mapping[str, Tensor], device: str = "cpu") -> None:
        self.task, self.optimizer = build(config, World(0, 1, torch.device(device)))
        stir(self.task.student)
        names = ("globals", "locals", "tokens") if config.views.locals else ("globals", "tokens")
        self.batch = {n: batch[n] for n in names} | {"globals": batch["globals"][: config.views.globals]}
        self.clip = config.optim.clip

    def forward_backward(self) -> dict[str, Tensor]:
        return self.task.forward_backward(self.batch, 0)

    def step(self) -> None:
        self.forward_backward()
        clip_and_step(self.task.student.parameters(), self.optimizer, self.clip)
        self.task.after_step(0)


def pixels(crops: Tensor, p: PreprocessConfig) -> Tensor:
    mean, std = (torch.tensor(v, device=crops.device)[:, None, None] for v in (p.mean, p.std))
    return (crops.float() / 255 - mean) / std


class Naive:
    """What one writes in an afternoon: open_clip's towers called per crop size, lightly's head, loss and EMA."""

    def __init__(self, config: Config, batch: Mapping[str, Tensor], like: Pretrain, distils: bool = True) -> None:
        (open_clip,) = need("open_clip")
        self.config, self.batch, self.distils = config, batch, distils
        self.device = batch["tokens"].device
        self.model: Any = open_clip_model(open_clip, like.model).to(self.device)
        self.contrast = open_clip.loss.ClipLoss()
        learns: list[nn.Module] = [self.model]
        if distils:
            heads, loss, self.utils = need("lightly.models.modules.heads", "lightly.loss", "lightly.models.utils")
            o = config.objective
            self.criterion = loss.DINOLoss(
                o.prototypes.count, o.teacher_temp, o.teacher_temp, student_temp=o.student_temp
            ).to(self.device)
            self.head, self.teacher_head = (heads.DINOProjectionHead(*self.widths()).to(self.device) for _ in range(2))
            self.teacher = copy.deepcopy(self.model.visual)
            self.head.load_state_dict(head_names(like.student.view_head.state_dict()), strict=False)
            self.teacher_head.load_state_dict(head_names(like.teacher.view_head.state_dict()), strict=False)
            image = {f"image.{n}": x for n, x in like.teacher.image.state_dict().items()}
            rest = {n: x for n, x in like.model.state_dict().items() if not n.startswith("image.")}
            both = open_clip_names(image | rest)
            self.teacher.load_state_dict(
                {n.removeprefix("visual."): x for n, x in both.items() if n.startswith("visual.")}
            )
            for module in (self.teacher, self.teacher_head):
                module.requires_grad_(False)
            learns.append(self.head)
        self.parameters = [p for module in learns for p in module.parameters() if p.requires_grad]
        c = config.optim
        self.optimizer = torch.optim.AdamW(self.parameters, c.lr, c.betas, c.eps, c.weight_decay)

    def widths(self) -> tuple[int, int, int, int]:
        p = self.config.objective.prototypes
        return self.config.model.embed_dim, p.hidden, p.bottleneck, p.count

    def embed(self, tower: Any, crops: Tensor) -> Tensor:
        """open_clip's tower takes one size: others get their positions resized first, as for fine-tuning at a size."""
        table, side = tower.positional_embedding, crops.shape[-1] // tower.patch_size[0]
        if side == tower.grid_size[0]:
            return tower(crops)
        old = table[1:].T.unflatten(1, tower.grid_size)[None]
        new = F.interpolate(old, (side, side), mode="bicubic", align_corners=False, antialias=True)
        x = tower.conv1(crops).flatten(2).transpose(1, 2)
        x = torch.cat([tower.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
        x = x + torch.cat([table[:1], new[0].flatten(1).T]).to(x.dtype)
        x = tower.ln_post(tower.transformer(tower.ln_pre(x)))[:, 0]
        return x @ tower.proj

    def forward_backward(self) -> dict[str, Tensor]:
        p, v = self.config.model.preprocess, self.config.views
        big = pixels(self.batch["globals"][: v.globals], p)
        device, precision = self.device.type, self.config.train.precision
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            whole = self.embed(self.model.visual, big.flatten(0, 1))
            text = F.normalize(self.model.encode_text(self.batch["tokens"]).float(), dim=-1)
            if self.distils:
                small = self.embed(self.model.visual, pixels(self.batch["locals"], p).flatten(0, 1))
                student = self.head(torch.cat([whole, small])).float().chunk(v.globals + v.locals)
                with torch.no_grad():
                    seen = self.teacher_head(self.embed(self.teacher, big.flatten(0, 1))).float().chunk(v.globals)
        images, scale = F.normalize(whole.float(), dim=-1).chunk(v.globals), self.model.logit_scale.exp()
        contrast = torch.stack([self.contrast(image, text, scale) for image in images]).mean()
        terms = {"contrast": contrast}
        if self.distils:
            terms["distill"] = self.criterion(list(seen), list(student))
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        return {"loss": loss.detach()} | {n: x.detach() for n, x in terms.items()}

    def step(self) -> None:
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.distils:
            momentum = self.config.ema_momentum
            self.utils.update_momentum(self.model.visual, self.teacher, momentum)
            self.utils.update_momentum(self.head, self.teacher_head, momentum)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(self.config.objective.max_scale))


def head_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A silc PrototypeHead by lightly's names: an activation stands between its layers."""
    out = {"last_layer.weight_v": state["prototypes"]}
    for name, x in state.items():
        if name.startswith("layers."):
            _, i, kind = name.split(".")
            out[f"layers.{2 * int(i)}.{kind}"] = x
    return out


def make(case: str, sizes: Sizes, precision: Any = "bf16", device: str = "cpu") -> Ours | Naive:
    config = configured(sizes, precision, "head" if case.endswith("head-only EMA") else "full")
    batch = {name: x.to(device) for name, x in batch_of(config).items()}
    if case.startswith("CLIP"):
        config = as_clip(config)
    ours = Ours(config, batch, device)
    if ", silc" in case:
        return ours
    return Naive(config, batch, ours.task, distils=case.startswith("SILC"))


def gradients(side: Ours | Naive) -> dict[str, Tensor]:
    """Of what learns, by the peers' names."""
    if isinstance(side, Naive):
        named = {n: p.grad for n, p in side.model.named_parameters()}
        head = side.head.named_parameters() if side.distils else ()
        return {n: g for n, g in (named | {f"head.{n}": p.grad for n, p in head}).items() if g is not None}
    student = side.task.student
    model = {n: p.grad for n, p in student.model.named_parameters() if p.grad is not None}
    found = open_clip_names(model)
    if student.view_head is not None:
        mine = {n: p.grad for n, p in student.view_head.named_parameters() if p.grad is not None}
        found |= {f"head.{n}": g for n, g in head_names(mine).items()}
    return found


def compare(
    sizes: Sizes, name: str, device: str = "cpu", kinds: Sequence[str] = ("CLIP", "SILC")
) -> list[dict[str, Any]]:
    """fp32: the terms of the loss, and the gradients of each module as one vector; of the peers that are here."""
    checks = []
    for kind, other in (("CLIP", "open_clip"), ("SILC", "naive")):
        if kind not in kinds or f"{kind}, {other}" not in here():
            continue
        ours, theirs = (make(f"{kind}, {who}", sizes, "fp32", device) for who in ("silc", other))
        terms, expected = ours.forward_backward(), theirs.forward_backward()
        for term, value in expected.items():
            checks.append(check(f"{name}, {kind}, {other}: {term}", terms[term], value, EQUAL))
        mine, reference = gradients(ours), gradients(theirs)
        assert mine.keys() == reference.keys(), mine.keys() ^ reference.keys()
        rooms: dict[str, list[str]] = {}
        for key in mine:
            room = key.split(".")[0] if key.startswith(("visual.", "head.")) else "text and scale"
            rooms.setdefault("prototypes" if key.endswith("weight_v") else room, []).append(key)
        for room, keys in rooms.items():
            a, b = (torch.cat([g[k].flatten() for k in keys]) for g in (mine, reference))
            checks.append(check(f"{name}, {kind}, {other}: gradient of {room}", a, b, EQUAL))
    return checks


def here() -> list[str]:
    absent = ["open_clip", "naive"] if have("open_clip") is None else []
    absent += ["naive"] if have("lightly.loss") is None else []
    return [case for case in CASES if not case.endswith(tuple(absent))]


def memory(case: str, sizes: Sizes) -> dict[str, float]:
    """At rest after two steps (weights, moments, teacher), and what a step adds at its peak."""
    side = make(case, sizes)
    for _ in range(2):
        side.step()
    with Measured() as measured:
        side.step()
    return {"rest_bytes": measured.before, "above_bytes": measured.above}


def flops(case: str, sizes: Sizes) -> float:
    """Of one step, counted from shapes; the peers' mathematics is the same."""
    config = configured(sizes, teacher="head" if case.endswith("head-only EMA") else "full")
    config = as_clip(config) if case.startswith("CLIP") else config
    return flops_per_sample(config).total * config.train.batch


def claims(name: str, sizes: Sizes, seconds: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    found, whole = [], f"whole step, {name}"
    if "SILC, naive" in seconds:
        naive = seconds["SILC, naive"]
        found.append(target(f"{whole}: speed", "naive SILC", ratio(naive, seconds["SILC, silc"]), least=1.4))
        figure = ratio(naive, seconds["SILC, silc, head-only EMA"])
        found.append(target(f"{whole}: speed with head-only EMA", "naive SILC", figure, least=2.0))
    work = flops("SILC, silc", sizes) / flops("CLIP, silc", sizes)
    over = ratio(seconds["SILC, silc"], seconds["CLIP, silc"]) / work
    told = f"{whole}: SILC over CLIP, as a share of their FLOP ratio {work:.2f}"
    return [*found, target(told, "CLIP, silc", over, most=1.0)]


def main() -> None:
    args = arguments(__doc__, only="")
    pin(1, args.quick)
    if args.case:
        case, _, name = args.case.partition(" @ ")
        print(json.dumps(memory(case, (SIZES | QUICK)[name])))
        return
    keep_memory()  # as `silc train` does; the peers in this process have it too
    cases, peak = here(), matmul_peak(torch.bfloat16)["best"]
    rows, targets, checks = [], [], []
    for name, sizes in (QUICK if args.quick else SIZES).items():
        if args.only not in name:
            continue
        checks += compare(sizes, name)
        sides = {case: make(case, sizes) for case in cases}
        seconds = interleave({case: side.step for case, side in sides.items()}, args.rounds)
        sides.clear()
        for case, s in seconds.items():
            held = {} if args.quick else alone(__file__, f"{case} @ {name}", args.quick)
            against = {"over_silc": ratio(s, seconds["SILC, silc"])}
            rows.append(timed(case, s, flops(case, sizes), peak, towers=name) | against | held)
        targets += claims(name, sizes, seconds)
    write(args.out, "step", rows, targets, checks, rounds=args.rounds, precision="bf16 autocast")


if __name__ == "__main__":
    main()
