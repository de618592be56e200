"""The pretraining task: a student, its EMA teacher, and the named terms of the loss.

Gives: Pretrain (forward_backward, after_step).
Used by: train/loop.py. One step, as the paper tells it (SILC section 3), is `Pretrain.terms`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from silc import losses
from silc.config import Config, ObjectiveConfig, PreprocessConfig, Term
from silc.data.images import normalise
from silc.data.views import photometric
from silc.model.prototypes import Projected
from silc.model.silc import Silc
from silc.parallel import World, average_gradients, gather, logsumexp, mean
from silc.train.optim import frozen_steps
from silc.train.student import Anchor, Hyper, Output, Student, Teacher, Views, aligned

# Shapes: B local pairs, P >= B pictures (pairs first, then those without a caption), V views aligned with the text,
# G/L global/local views, K prototypes, N patches, H hidden ones.


class Targets(NamedTuple):
    """What the teacher says of the global views and, as one view of many small pictures, of patches; and the anchor's
    embeddings of pictures [V, B, D] and texts [B, D]."""

    views: losses.Target | None
    patches: losses.Target | None
    anchor: tuple[Tensor, Tensor] | None


class Pretrain(nn.Module):
    """Student, teacher and centres; everything here is in the checkpoint."""

    def __init__(self, config: Config, model: Silc, world: World) -> None:
        super().__init__()
        o = self.objective = config.objective
        self.config = config
        if (o.kind == "sigmoid") != (model.logit_bias is not None):
            raise ValueError(
                f"--objective.kind {o.kind} with --model.bias-init {config.model.bias_init}: "
                "the sigmoid loss needs a bias (-10 fits large batches), softmax must have none."
            )
        if config.init.freeze > 0 and (o.distill.weight <= 0 or o.distill.start > 0):
            raise ValueError("--init.freeze is for new heads to learn in, but no head learns from the first step on.")
        self.student = Student(model, o)
        if o.anchor.weight > 0:
            self.anchor = Anchor(model)
        self.has_teacher = o.distill.weight > 0 or o.masked.weight > 0
        if self.has_teacher:
            self.teacher = Teacher(self.student)
        self.register_buffer("view_centre", torch.zeros(o.prototypes.count if o.distill.weight > 0 else 0))
        self.register_buffer("patch_centre", torch.zeros(o.prototypes.count if o.masked.weight > 0 else 0))
        self.world = world
        self.new_centres: dict[str, list[Tensor]] = {}

    @property
    def model(self) -> Silc:
        return self.student.model

    def parts(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """The modules that are called as one, each with its towers, whose blocks are compiled and sharded apart."""
        found: list[tuple[nn.Module, list[nn.Module]]] = [(self.student, [self.model.image, self.model.text])]
        if self.has_teacher:
            found.append((self.teacher, [self.teacher.image] if self.teacher.image else []))
        if self.objective.anchor.weight > 0:
            found.append((self.anchor, [self.anchor.image, self.anchor.text]))
        return found

    def hyper(self, step: int) -> Hyper:
        o, steps, frozen = self.objective, self.config.steps, frozen_steps(self.config)

        def weight(term: Term) -> float:
            if step / steps < term.start:
                return 0.0
            # heads that learn alone learn at full weight: the ramp spares the towers
            ramp, begun = term.ramp * steps, step - max(term.start * steps, frozen)
            return term.weight * min(1.0, (begun + 1) / ramp) if ramp and step >= frozen else term.weight

        distill, masked = weight(o.distill), weight(o.masked)
        # until a term begins the teacher is a copy of the student, so that it starts from that day's weights
        momentum = self.config.ema_momentum if distill or masked else 0.0
        return Hyper(distill, masked, momentum, weight(o.anchor), step < frozen)

    def forward_backward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Gradient of one step into the student. Returns the terms and diagnostics by name, detached scalars."""
        hyper, micro = self.hyper(step), self.config.train.accumulate
        if self.config.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # outputs of the last step's graphs may be overwritten now
        views, text = self.views(batch, step, hyper), batch["tokens"]
        if micro == 1:
            output = self.run(views, text, hyper)
            terms = self.terms(output, self.targets(views, text, output, hyper), hyper)
            terms["loss"].backward()
        else:
            terms = self.accumulate([_rows(views, len(text), i, micro) for i in range(micro)], text.chunk(micro), hyper)
        average_gradients(self.student, self.world)
        return {k: v.detach() for k, v in terms.items()}

    def terms(self, out: Output, targets: Targets, hyper: Hyper) -> dict[str, Tensor]:
        """The loss by named terms: L = w_c L_contrast + w_d L_distill + w_m L_masked + w_a L_anchor."""
        terms = {"contrast": self.contrast(out)} | self.other_terms(out, targets)
        return {"loss": self.total(terms, hyper)} | terms

    def total(self, terms: dict[str, Tensor], hyper: Hyper) -> Tensor:
        weights = {"contrast": self.objective.contrast.weight, "distill": hyper.distill, "masked": hyper.masked}
        weights["anchor"] = hyper.anchor
        return torch.stack([weights[n] * terms[n] for n in weights if n in terms]).sum()

    def contrast(self, out: Output) -> Tensor:
        """Mean over views of the image-text loss, each view against the whole batch of texts."""
        offset, text = self.world.rank * len(out.text), gather(out.text, self.world)
        if self.objective.kind == "sigmoid" and out.bias is not None:
            per_view = [losses.sigmoid_contrastive(v, text, out.scale, out.bias, offset) for v in out.image]
        else:
            over = partial(logsumexp, world=self.world)
            per_view = [losses.softmax_contrastive(v, text, out.scale, offset, over) for v in out.image]
        return torch.stack(per_view).mean()

    def other_terms(self, out: Output, targets: Targets) -> dict[str, Tensor]:
        """What the student learns from teacher and anchor, means over samples, and how the teacher fares."""
        o, terms = self.objective, {}
        if out.views is not None and targets.views is not None:
            same = len(targets.views.features) if o.global_to_global else 0
            found = self.distill(out.views, targets.views, same)
            terms = {"distill": found.loss, "teacher_entropy": found.entropy, "prototype_use": found.use}
        if out.patches is not None and targets.patches is not None:
            # patches are pictures of which there is one view on either side
            patches = out.patches._replace(features=out.patches.features.flatten(0, 1)[None])
            terms["masked"] = self.distill(patches, targets.patches).loss
        if targets.anchor is not None:
            terms["anchor"] = losses.anchor(out.image, out.text, *targets.anchor)
        return terms

    def distill(self, student: Projected, target: losses.Target, same_view: int = 0) -> losses.Distilled:
        products = torch.bfloat16 if self.in_bf16 else torch.float32
        temp, compiled = self.objective.student_temp, self.config.train.compile
        return losses.distill(student.features, student.prototypes, target, temp, same_view, products, compiled)

    @torch.no_grad()
    def targets(self, views: Views, text: Tensor, out: Output, hyper: Hyper) -> Targets:
        """What the teacher says of global views and of patches; the batch's mean logits are kept for the centres."""
        of_views = of_patches = anchor = None
        with self.autocast():
            if hyper.needs_teacher:
                of_views, of_patches = self.teacher(views, out, hyper)
            if hyper.anchor > 0 and not hyper.frozen:
                anchor = self.anchor(views, text, self.objective)
        if of_patches is not None:
            of_patches = of_patches._replace(features=of_patches.features.flatten(0, 1)[None])
        return Targets(self.target("view_centre", of_views), self.target("patch_centre", of_patches), anchor)

    def target(self, centre: str, teacher: Projected | None) -> losses.Target | None:
        if teacher is None:
            return None
        # the mean of the logits is the logit of the mean
        self.new_centres.setdefault(centre, []).append(teacher.prototypes @ teacher.features.mean((0, 1)))
        return losses.Target(*teacher, getattr(self, centre), self.objective.teacher_temp)

    def accumulate(self, views: list[Views], text: tuple[Tensor, ...], hyper: Hyper) -> dict[str, Tensor]:
        """The step in micro-batches, with the contrastive gradient of the whole batch (GradCache, arXiv 2101.06983).

        First the embeddings of all micro-batches without graph; then the loss and its gradient on them; then each
        micro-batch again with graph, driven by its share of that gradient. The teacher's terms are means over samples.
        """
        quiet = Hyper(0.0, 0.0, hyper.momentum, frozen=hyper.frozen)
        with torch.no_grad():
            outs = [self.run(_aligned_only(v, len(t), self.objective), t, quiet) for v, t in zip(views, text)]
        whole = Output(
            image=torch.cat([o.image for o in outs], 1).requires_grad_(),
            text=torch.cat([o.text for o in outs]).requires_grad_(),
            scale=outs[0].scale.detach().requires_grad_(),
            bias=None if outs[0].bias is None else outs[0].bias.detach().requires_grad_(),
            **dict.fromkeys(("views", "patches", "features", "tokens")),
        )
        contrast = self.contrast(whole)
        (self.objective.contrast.weight * contrast).backward()
        n, parts = len(views), []
        for i, (v, t) in enumerate(zip(views, text)):
            out = self.run(v, t, hyper)
            terms = self.other_terms(out, self.targets(v, t, out, hyper))
            loss = _driven(out, whole, i, n)
            if extra := {k: v for k, v in terms.items() if k in ("distill", "masked", "anchor")}:
                loss = loss + self.total(extra, hyper) / n
            loss.backward()
            parts.append(terms)
        averaged = {k: torch.stack([p[k].detach() for p in parts]).mean() for k in parts[0]}
        terms = {"contrast": contrast.detach()} | averaged
        return {"loss": self.total(terms, hyper)} | terms

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Teacher, centres and the clamp of the temperature, after the optimiser moved the student."""
        o = self.objective
        if self.has_teacher:
            student = {n.removeprefix("model."): p for n, p in self.student.named_parameters()}
            # parameters are looked up anew: sharding may have swapped the tensors behind a cached list
            mine, theirs = zip(*((p, student[n]) for n, p in self.teacher.named_parameters()))
            torch._foreach_lerp_(list(mine), list(theirs), 1 - self.hyper(step).momentum)
        for name, means in self.new_centres.items():
            fresh = mean(torch.stack(means).mean(0), self.world)
            fresh = torch.where(fresh.isfinite().all(), fresh, getattr(self, name))
            getattr(self, name).lerp_(fresh, 1 - o.centre_momentum)
        self.new_centres.clear()
        self.model.logit_scale.clamp_(max=math.log(o.max_scale))

    @property
    def in_bf16(self) -> bool:
        """Are matrices multiplied in bf16?"""
        asked = self.config.train.precision
        return asked == "bf16" or (asked == "auto" and self.world.device.type == "cuda")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.in_bf16)

    def run(self, views: Views, text: Tensor, hyper: Hyper) -> Output:
        with self.autocast():
            return self.student(views, text, hyper)

    @torch.no_grad()
    def views(self, batch: dict[str, Any], step: int, hyper: Hyper) -> Views:
        """uint8 crops -> augmented, normalised pixels; views that no active term reads are dropped here."""
        p, o = self.model.config.preprocess, self.objective
        original = normalise(batch["image"], p.mean, p.std) if o.contrast_views != "global" else None
        wants_globals = o.contrast_views != "original" or hyper.needs_teacher
        big = small = mask = judged = None
        first_local = len(batch["globals"])
        if wants_globals:
            big = self.pixels(batch, "globals", slice(0, first_local), hyper)
        if hyper.distill > 0 and "locals" in batch:
            small = self.pixels(batch, "locals", slice(first_local, None), hyper)
        if hyper.masked > 0:
            parts = [self.mask(len(batch["tokens"]), step)]
            if "unpaired" in batch:
                parts.append(self.mask(batch["unpaired"]["globals"].shape[1], step, 1))
            mask, judged = (torch.cat(part) for part in zip(*parts))
        return Views(original, big, small, mask, judged if o.masked_form == "masked" else None)

    def pixels(self, batch: dict[str, Any], name: str, rows: slice, hyper: Hyper) -> Tensor:
        """Augmented, normalised views of pairs and, where the teacher's terms are on, of pictures without captions."""
        paired = _pixels(batch, name, rows, self.model.config.preprocess)
        if "unpaired" not in batch or not hyper.needs_teacher:
            return paired
        return torch.cat([paired, _pixels(batch["unpaired"], name, rows, self.model.config.preprocess)], 1)

    def mask(self, batch: int, step: int, stream: int = 0) -> tuple[Tensor, Tensor]:
        """Hidden patches as a mask [B, N] and as indices [B, H], as many in every picture; a function of seed, step,
        stream and row."""
        n = (self.config.views.global_size // self.model.config.image.patch) ** 2
        words = (self.config.seed, step, stream) if stream else (self.config.seed, step)
        generator = torch.Generator().manual_seed(hash(words) % 2**63)
        noise = torch.rand(batch * self.world.size, n, generator=generator)
        mine = noise[self.world.rank * batch : (self.world.rank + 1) * batch]
        if self.world.device.type == "cuda":  # from pinned memory the host need not wait for the copy
            mine = mine.pin_memory().to(self.world.device, non_blocking=True)
        hidden = mine.argsort(1)[:, : round(self.objective.mask_ratio * n)]
        return torch.zeros_like(mine, dtype=torch.bool).scatter_(1, hidden, True), hidden


def _driven(out: Output, whole: Output, i: int, n: int) -> Tensor:
    """A scalar whose gradient in the i-th of n micro-batches is its share of the whole batch's contrastive gradient."""
    pairs = [(out.image, whole.image.grad, 1), (out.text, whole.text.grad, 0)]
    terms = [(mine * grad.chunk(n, axis)[i]).sum() for mine, grad, axis in pairs if grad is not None]
    shared = [(out.scale, whole.scale.grad), (out.bias, None if whole.bias is None else whole.bias.grad)]
    terms += [(mine * grad / n).sum() for mine, grad in shared if mine is not None and grad is not None]
    return torch.stack(terms).sum()


def _pixels(batch: dict[str, Any], name: str, rows: slice, preprocess: PreprocessConfig) -> Tensor:
    if "photo" in batch:
        return photometric(batch[name], batch["photo"][rows], preprocess.mean, preprocess.std)
    return normalise(batch[name], preprocess.mean, preprocess.std)


def _rows(views: Views, pairs: int, i: int, n: int) -> Views:
    """The i-th of n micro-batches, with its part of the pairs and of the pictures without captions behind them.

    The batch axis is the crop axis's neighbour where there is one."""

    def cut(x: Tensor | None, axis: int) -> Tensor | None:
        if x is None or x.shape[axis] == pairs:
            return None if x is None else x.chunk(n, axis)[i]
        parts = x.split([pairs, x.shape[axis] - pairs], axis)
        return torch.cat([part.chunk(n, axis)[i] for part in parts], axis)

    return Views(
        cut(views.original, 0), cut(views.globals, 1), cut(views.locals, 1), cut(views.mask, 0), cut(views.judged, 0)
    )


def _aligned_only(views: Views, pairs: int, config: ObjectiveConfig) -> Views:
    big = views.globals[:, :pairs] if views.globals is not None and aligned("globals", config) else None
    return Views(views.original, big, None, None, None)
