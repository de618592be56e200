"""Every objective of silc as a pure function of tensors; nothing here knows of modules, processes or schedules.

No matrix of logits is ever kept: each is made tile by tile, and the gradient is made from the tile while it is there.
That costs the softmax form one more product a tile, which is quicker than writing the matrix and reading it back.

Gives: sigmoid_contrastive, softmax_contrastive, anchor, distill, Target, Distilled, per_pixel.
Used by: train/pretrain.py, train/segment.py. Several processes only change the arguments (gathered rows and an
offset), never the code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Shapes: B local batch, M global batch (M = B in one process), D shared space, K prototypes, d their width,
# S/T student/teacher views.

SIDE = 1024
"""Rows and columns of a contrastive tile: 4 MiB, which stays in a core's cache."""
BLOCK = 2**26
"""Bytes of prototype logits in the making at any time: enough rows for the matrix products to run at full speed."""
PLANES = 2**23
"""Numbers of enlarged segmentation logits that exist at a time."""
CACHED = 2**20
"""Of these, how many a CPU softmaxes at once, so that they stay in its cache; a GPU takes the whole block."""


P = ParamSpec("P")
R = TypeVar("R")


def fp32(loss: Callable[P, R]) -> Callable[P, R]:
    """The loss in full precision, also when it is called amid autocast."""

    @functools.wraps(loss)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(args[0].device.type, enabled=False):  # type: ignore[attr-defined]
            return loss(*args, **kwargs)

    return run


# ---------------------------------------------------------------- image and text


@fp32
def sigmoid_contrastive(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    """SigLIP's loss (arXiv 2303.15343, eq. 1): every pair is its own yes/no question.

    image [B, D] and text [M, D] are L2-normalised; image i belongs to text offset + i. The mean over processes of the
    result, each with its own rows and all texts, is the loss of the whole batch. In plain words:

        for i in range(B):
            for j in range(M):
                sign = +1 if j == offset + i else -1
                loss += -log(sigmoid(sign * (scale * image[i] @ text[j] + bias))) / B
    """
    return _Sigmoid.apply(image.float(), text.float(), scale.float(), bias.float(), offset)  # type: ignore[no-any-return]


@fp32
def softmax_contrastive(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    offset: int = 0,
    over_processes: Callable[[Tensor], Tensor] = lambda lse: lse,
) -> Tensor:
    """CLIP's loss (SILC section 3.1): choose the right text for an image and the right image for a text.

    image [B, D] are this process's rows, text [M, D] everybody's, both L2-normalised; image i belongs to text
    offset + i. `over_processes` turns every process's log-sum-exp [M] over its own images into that over all images,
    which is all that a text needs to know of the others' images. The mean over processes of the result is the loss of
    the whole batch, and so are the gradients. In words, with I all images:

        for i in range(B):
            loss += cross_entropy(scale * image[i] @ text.T, offset + i) / (2 * B)
            loss += cross_entropy(scale * text[offset + i] @ I.T, offset + i) / (2 * B)
    """
    return _Softmax.apply(image.float(), text.float(), scale.float(), offset, over_processes)  # type: ignore[no-any-return]


@fp32
def anchor(image: Tensor, text: Tensor, image_then: Tensor, text_then: Tensor) -> Tensor:
    """How far embeddings have moved from an earlier model's: the mean of 1 - cosine of pictures, and of texts, halved.

    image, image_then [V, B, D] and text, text_then [B, D], all of unit length. Scalar between 0 and 2.
    """
    moved = (1 - (now.float() * then.float()).sum(-1) for now, then in ((image, image_then), (text, text_then)))
    return torch.stack([m.mean() for m in moved]).mean()


def _tiles(image: Tensor, text: Tensor, scale: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and the product scale * image[rows] @ text[columns].T, in one buffer that is used again."""
    scaled = image * scale
    buffer = image.new_empty(min(SIDE, len(image)) * min(SIDE, len(text)))
    for top in range(0, len(image), SIDE):
        rows = slice(top, min(top + SIDE, len(image)))
        for left in range(0, len(text), SIDE):
            columns = slice(left, min(left + SIDE, len(text)))
            shape = (rows.stop - top, columns.stop - left)
            tile = buffer[: shape[0] * shape[1]].view(shape)
            yield rows, columns, torch.mm(scaled[rows], text[columns].T, out=tile)


def _matching(tile: Tensor, rows: slice, columns: slice, offset: int) -> Tensor:
    """View of the entries of a tile in which image and text belong together; maybe empty."""
    diagonal = rows.start + offset - columns.start
    if -len(tile) < diagonal < tile.shape[1]:
        return tile.diagonal(diagonal)
    return tile[:0, 0]


class _Contrastive(torch.autograd.Function):
    """What both forms share: the gradients are ready when the loss is; backward only scales them."""

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [g.mul_(grad) for g in ctx.gradients]
        del ctx.gradients
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients)))


class _Sigmoid(_Contrastive):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
        d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
        loss, d_bias = image.new_zeros(()), image.new_zeros(())
        for rows, columns, tile in _tiles(image, text, scale):
            tile += bias
            # -log sigmoid(z) = softplus(z) - z, so the positives only subtract their logit from a sum over all pairs
            loss += F.softplus(tile).sum() - _matching(tile, rows, columns, offset).sum()
            tile.sigmoid_()
            _matching(tile, rows, columns, offset).sub_(1)
            d_bias += tile.sum()
            d_image[rows].addmm_(tile, text[columns])
            d_text[columns].addmm_(tile.T, image[rows])
        d_scale = (d_image * image).sum().view_as(scale)
        n = len(image)
        factor = scale / n
        ctx.gradients = [d_image.mul_(factor), d_text.mul_(factor), d_scale.div_(n), d_bias.view_as(bias).div_(n)]
        return loss / n


class _Softmax(_Contrastive):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, offset: int, over: Callable[[Tensor], Tensor]
    ) -> Tensor:
        n, m = len(image), len(text)
        by_row, by_column = image.new_full((n,), -torch.inf), image.new_full((m,), -torch.inf)
        matching = image.new_empty(n)
        for rows, columns, tile in _tiles(image, text, scale):
            by_row[rows] = torch.logaddexp(by_row[rows], tile.logsumexp(1))
            by_column[columns] = torch.logaddexp(by_column[columns], tile.logsumexp(0))
            own = _matching(tile, rows, columns, offset)
            first = max(rows.start, columns.start - offset)
            matching[first : first + len(own)] = own
        by_column = over(by_column)
        d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
        for rows, columns, tile in _tiles(image, text, scale) if any(ctx.needs_input_grad) else ():
            chosen_text = (tile - by_row[rows, None]).exp_()
            both = tile.sub_(by_column[columns]).exp_().add_(chosen_text)
            _matching(both, rows, columns, offset).sub_(2)
            d_image[rows].addmm_(both, text[columns])
            d_text[columns].addmm_(both.T, image[rows])
        d_scale = (d_image * image).sum().view_as(scale)
        factor = scale / (2 * n)
        ctx.gradients = [d_image.mul_(factor), d_text.mul_(factor), d_scale.div_(2 * n)]
        return (by_row + by_column[offset : offset + n] - 2 * matching).mean() / 2


# ---------------------------------------------------------------- student and teacher


class Target(NamedTuple):
    """What the teacher makes of T views, without its logits: softmax((features @ prototypes.T - centre) / temp), the
    centred and sharpened distribution over K prototypes (DINO, eq. 1)."""

    features: Tensor
    """[T, B, d], unit length."""
    prototypes: Tensor
    """[K, d], unit length."""
    centre: Tensor
    """[K]."""
    temp: float


class Distilled(NamedTuple):
    loss: Tensor
    entropy: Tensor
    """Of the teacher's distributions, mean, in nats: ln K is uniform, near 0 is a collapse to single prototypes."""
    use: Tensor
    """Share of the prototypes (of those that so many distributions could fill) that lead one."""


@fp32
def distill(
    student: Tensor,
    prototypes: Tensor,
    target: Target,
    temp: float,
    same_view: int = 0,
    products: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Distilled:
    """Prototype cross-entropy of every student view against every teacher view (SILC section 3.2); with one view of
    each and patches for pictures it is masked patch prediction (iBOT).

    student [S, B, d] and prototypes [K, d] are unit length. The first `same_view` student views are the teacher's own
    and are not compared with themselves; ValueError when that leaves nothing to compare. `products` is the precision in
    which matrices are multiplied; softmaxes, sums and gradients are fp32 all the same. `compiled` fuses what is done to
    a block of logits (torch.compile). In plain words, with p the teacher's distributions [T, B, K]:

        for s in range(S):
            for t in range(T):
                if not (s == t and s < same_view):
                    q = log_softmax(student[s] @ prototypes.T / temp)
                    loss += mean over B of -(p[t] * q).sum(-1), averaged over pairs
    """
    views, skipped = len(student), min(same_view, len(student), len(target.features))
    if views * len(target.features) == skipped:
        raise ValueError("distillation has no pair of different views: ask for a local view or a second global one.")
    loss, entropy, leading = _Distill.apply(
        student.float(), prototypes.float(), target, temp, skipped, products, compiled
    )
    fillable = min(target.features.shape[0] * target.features.shape[1], len(prototypes))
    return Distilled(loss, entropy, leading.sum() / fillable)


class _Distill(torch.autograd.Function):
    """Block by block over pictures: logits of both sides, their gradient, its share of the sums; then the next."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        prototypes: Tensor,
        target: Target,
        temp: float,
        skipped: int,
        products: torch.dtype,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        views, pictures, width = student.shape
        targets, count = len(target.features), len(prototypes)
        scale = 1 / ((views * targets - skipped) * pictures)
        # pictures lead, so that a block is one slice and one matrix product serves all its views
        rows = (student / temp).transpose(0, 1).to(products).contiguous()
        teacher = (target.features / target.temp).transpose(0, 1).to(products).contiguous()
        mine, theirs = prototypes.to(products), target.prototypes.to(products)
        centre = target.centre / target.temp
        block = max(1, BLOCK // ((views + targets) * count * rows.itemsize))
        part = max(1, CACHED // ((views + targets) * count)) if student.device.type == "cpu" else block
        aimed, learn = (_compiled(_aimed), _compiled(_learn)) if compiled else (_aimed, _learn)
        wanted = any(ctx.needs_input_grad)
        d_rows = torch.empty_like(rows)
        d_prototypes = torch.empty_like(prototypes) if wanted else prototypes.new_empty(0)
        loss, entropy = student.new_zeros(()), student.new_zeros(())
        leading = student.new_zeros(count)
        buffer = rows.new_empty(min(block, pictures) * (views + targets), count)
        for first in range(0, pictures, block):
            x, y = rows[first : first + block], teacher[first : first + block]
            logits, aims = buffer[: len(x) * (views + targets)].split([len(x) * views, len(x) * targets])
            torch.mm(x.flatten(0, 1), mine.T, out=logits)
            aims = torch.mm(y.flatten(0, 1), theirs.T, out=aims).unflatten(0, (-1, targets))
            for z, aim in zip(logits.unflatten(0, (-1, views)).split(part), aims.split(part)):
                p, each_entropy, leads = aimed(aim, centre)
                every = p.sum(1, keepdim=True)
                own, free = z[:, :skipped], z[:, skipped:]
                if skipped:
                    loss = loss + learn(own, every - p[:, :skipped], targets - 1)
                loss, entropy = loss + learn(free, every, targets), entropy + each_entropy
                leading.scatter_(0, leads, 1.0)
            if wanted:  # the logits are their own gradient by now
                torch.mm(logits, mine, out=d_rows[first : first + block].view(-1, width))
                _add_product(d_prototypes, logits.T, x.flatten(0, 1), scale, fresh=first == 0)
        if wanted:
            ctx.gradients = (d_rows.float() * (scale / temp)).transpose(0, 1), d_prototypes
        entropy = entropy / (pictures * targets)
        ctx.mark_non_differentiable(entropy, leading)
        return loss * scale, entropy, leading

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_student, d_prototypes = (g.mul_(grad) for g in ctx.gradients)
        del ctx.gradients
        return d_student, d_prototypes, None, None, None, None, None


def _aimed(logits: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher logits [n, T, K] -> their distributions, the sum of their entropies, and who leads each [n * T]."""
    log_p = (logits.float() - centre).log_softmax(-1)
    p = log_p.exp()
    return p, -(p * log_p).sum(), p.argmax(-1).flatten()


def _learn(logits: Tensor, aim: Tensor, pairs: int) -> Tensor:
    """Summed cross-entropy of student logits [n, s, K] with the sum of `pairs` distributions [n, s or 1, K]; the
    logits become its gradient in place."""
    log_q = logits.float().log_softmax(-1)
    loss = -torch.linalg.vecdot(log_q, aim).sum()
    logits.copy_(log_q.exp_().mul_(pairs).sub_(aim))
    return loss


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float, fresh: bool) -> None:
    """total = factor * a @ b, or where it is not `fresh` that much more; added up in fp32 whatever a and b are."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=factor, beta=0 if fresh else 1)
    elif fresh:
        total.copy_(a @ b).mul_(factor)  # PyTorch's mixed-precision arithmetic is 4 times slower than this copy
    else:
        total.add_((a @ b).float(), alpha=factor)


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    return torch.compile(function, dynamic=False)


# ---------------------------------------------------------------- pixels


@fp32
def per_pixel(logits: Tensor, labels: Tensor) -> Tensor:
    """CAT-Seg's loss (arXiv 2303.11797): every class at every pixel is its own yes/no question.

    logits [B, T, h, w] are enlarged to the labels [B, H, W], bilinear; a pixel without a class (a label below 0) is
    none of them, and counts. The mean over B, T, H and W of -log sigmoid(+-logit), a few classes at a time: enlarged
    logits of all classes never exist.
    """
    count = logits.shape[1] * labels.numel()
    some = max(1, PLANES // labels.numel())
    total = logits.new_zeros((), dtype=torch.float32)
    for first in range(0, logits.shape[1], some):
        part = logits[:, first : first + some].float()
        total = total + checkpoint(_yes_or_no, part, labels - first, use_reentrant=False)
    return total / count


def _yes_or_no(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the pixels of these classes; `labels` count from the first of them."""
    large = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    inside = (labels >= 0) & (labels < large.shape[1])
    own = large.gather(1, labels.clamp(0, large.shape[1] - 1)[:, None])[:, 0]
    return F.softplus(large).sum() - torch.where(inside, own, 0.0).sum()
