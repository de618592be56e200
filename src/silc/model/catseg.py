"""The CAT-Seg head (arXiv 2303.11797): from the cost of every patch with every class to masks, for any tower.

Gives: CatSeg. Written from the paper and the layers' formulas; parts that are the same for every class (what guidance
adds to queries, keys and decoder) are computed once a picture, and padding classes, which are all alike, once a layer.
Used by: open-vocabulary segmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silc.config import CatSegConfig

# Shapes: B pictures, T classes, C width of the cost embedding, G width of a guidance, D shared space, W width of the
# tower, h x w the patch grid, N = h w positions.

UNSEEN = -100.0
"""Logit of classes that were left out because there are too many."""
CLASSES, ROWS = 16, 4
"""Classes, and rows of patches, that inference works on at a time: what a core's cache holds."""


class Guided(nn.Linear):
    """A linear layer over [x, guidance] whose two parts can be computed apart, since guidance is shared."""

    def __init__(self, width: int, guidance: int, out: int) -> None:
        super().__init__(width + guidance, out)
        self.width = width

    def of_x(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, : self.width])

    def of_guidance(self, guidance: Tensor) -> Tensor:
        return F.linear(guidance, self.weight[:, self.width :], self.bias)


class WindowBlock(nn.Module):
    """A Swin block over the positions of each class alone; guidance takes part in queries and keys."""

    def __init__(self, width: int, guidance: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = Guided(width, guidance, width), Guided(width, guidance, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """x [B, T, h, w, C], guidance [B, h, w, G] -> [B, T, h, w, C]."""
        normed, shared = self.norm1(x), guidance[:, None]
        q, k = (layer.of_x(normed) + layer.of_guidance(shared) for layer in (self.q, self.k))
        q, k, v = (self.split(part) for part in (q, k, self.v(normed)))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x))
        x = x + self.out(self.join(mixed, x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def split(self, x: Tensor) -> Tensor:
        """[B, T, h, w, C] -> windows [B T, windows, heads, n, C / heads], shifted."""
        x = x.roll((-self.shift, -self.shift), (2, 3)) if self.shift else x
        cells = x.flatten(0, 1).unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
        cells = cells.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        return cells.unflatten(3, (self.heads, -1)).transpose(2, 3)

    def join(self, mixed: Tensor, like: Tensor) -> Tensor:
        """The inverse of `split`, in the shape of `like`."""
        rows, columns = (side // self.window for side in like.shape[2:4])
        cells = mixed.transpose(2, 3).flatten(3).unflatten(2, (self.window, self.window)).unflatten(1, (rows, columns))
        x = cells.transpose(2, 3).reshape(like.shape)
        return x.roll((self.shift, self.shift), (2, 3)) if self.shift else x

    def mask(self, x: Tensor) -> Tensor | None:
        """[windows, 1, n, n]: after a shift, positions of opposite borders share a window but do not see each other."""
        if not self.shift:
            return None
        sides = []
        for side in x.shape[2:4]:
            at = torch.arange(side, device=x.device)
            sides.append((at >= side - self.window).long() + (at >= side - self.shift).long())
        regions = sides[0][:, None] * 3 + sides[1]
        cells = regions.unflatten(1, (-1, self.window)).unflatten(0, (-1, self.window)).transpose(1, 2)
        flat = cells.flatten(2).flatten(0, 1)
        return torch.where(flat[:, :, None] == flat[:, None, :], 0.0, UNSEEN)[:, None].to(x.dtype)


class ClassBlock(nn.Module):
    """Linear attention over the classes of each position, padded to a fixed number of them."""

    def __init__(self, width: int, guidance: int, heads: int, classes: int, pool: int) -> None:
        super().__init__()
        self.heads, self.classes, self.pool = heads, classes, pool
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = Guided(width, guidance, width), Guided(width, guidance, width)
        self.v = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.pad, self.pad_guidance = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(guidance))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x [B, T, h, w, C], text [B, T, G] -> [B, T, h, w, C]. Positions are pooled in training alone."""
        pool = self.pool if self.training else 1
        y = _resized(x, pool, F.avg_pool2d) if pool > 1 else x
        normed, shared = self.norm1(y), text[:, :, None, None]
        q, k = (self.positive(layer.of_x(normed) + layer.of_guidance(shared)) for layer in (self.q, self.k))
        y = y + self.attend(q, k, self.v(normed).unflatten(-1, (self.heads, -1)))
        y = y + self.down(F.relu(self.up(self.norm2(y))))
        if pool > 1:
            sides = x.shape[2:4]
            y = _resized(y, sides, lambda z, size: F.interpolate(z, size, mode="bilinear", align_corners=True))
        return x + y

    def positive(self, x: Tensor) -> Tensor:
        return F.elu(x.unflatten(-1, (self.heads, -1))) + 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Linear attention (arXiv 2006.16236) of [B, T, h, w, heads, d] over T, in fp32 where it sums."""
        found = torch.einsum("bthwnd,bthwne->bhwnde", k.float(), v.float())
        total = k.float().sum(1)
        padding = max(0, self.classes - k.shape[1])
        if padding:
            # all padding classes are one token, so its share is counted, not computed so many times
            normed = self.norm1(self.pad)
            key = self.positive(self.k.of_x(normed) + self.k.of_guidance(self.pad_guidance)).float()
            value = self.v(normed).unflatten(-1, (self.heads, -1)).float()
            found = found + padding * key[:, :, None] * value[:, None]
            total = total + padding * key
        scale = torch.einsum("bthwnd,bhwnd->bthwn", q.float(), total) + 1e-6
        mixed = torch.einsum("bthwnd,bhwnde->bthwne", q.float(), found) / scale[..., None]
        return mixed.flatten(-2).to(v.dtype)


def some_at_once(how: Callable[[Tensor], Tensor], x: Tensor, axis: int, size: int) -> Tensor:
    """`how(x)`, where no gradient is wanted computed for `size` entries of an axis at a time, which must not matter."""
    if torch.is_grad_enabled() or x.shape[axis] <= size:
        return how(x)
    return torch.cat([how(part) for part in x.split(size, axis)], axis)


def _chain(blocks: list[nn.Module], x: Tensor, guidance: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, guidance)
    return x


def _resized(x: Tensor, size: object, how: object) -> Tensor:
    """A function of [rows, C, h, w] applied to [B, T, h, w, C]."""
    planes = x.flatten(0, 1).permute(0, 3, 1, 2)
    return how(planes, size).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])  # type: ignore[operator]


class Stage(nn.Module):
    """Twice as large, with a finer map of the tower beside it: transposed convolution, two convolutions."""

    def __init__(self, width: int, out: int, guidance: int) -> None:
        super().__init__()
        self.enlarge = nn.ConvTranspose2d(width, width - guidance, 2, 2)
        self.mix = nn.Conv2d(width, out, 3, padding=1, bias=False)
        self.refine = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(max(1, out // 16), out), nn.GroupNorm(max(1, out // 16), out)

    def forward(self, x: Tensor, guidance: Tensor) -> Tensor:
        """x [B T, C, h, w], guidance [B, G, 2h, 2w] -> [B T, out, 2h, 2w]."""
        x = self.enlarge(x)
        own = x.shape[1]
        shared = F.conv2d(guidance, self.mix.weight[:, own:], padding=1)  # the same for every class
        x = F.conv2d(x, self.mix.weight[:, :own], padding=1)
        x = (x.unflatten(0, (len(guidance), -1)) + shared[:, None]).flatten(0, 1)
        x = F.relu(self.norm1(x))
        return F.relu(self.norm2(self.refine(x)))


class CatSeg(nn.Module):
    """Cost volume, aggregation over space and classes, guided upsampling."""

    def __init__(self, config: CatSegConfig, embed_dim: int, tower_width: int, grid: int) -> None:
        """`embed_dim` D and `tower_width` W are the tower's, `grid` the side of its patch grid."""
        super().__init__()
        c = self.config = config
        window = next((side for side in range(min(c.window, grid), 1, -1) if grid % side == 0), grid)
        shift = window // 2 if window < grid else 0
        self.embed = nn.Conv2d(1, c.width, 7, padding=3)
        self.picture = nn.Conv2d(embed_dim, c.width, 3, padding=1)
        self.text = nn.Linear(embed_dim, c.width)
        self.finer = nn.ModuleList(nn.ConvTranspose2d(tower_width, g, 2**i, 2**i) for i, g in enumerate(c.guides, 1))
        self.guides = nn.ModuleList(nn.Conv2d(g, out, 3, padding=1) for g, out in zip(c.guides, c.guide_widths))
        self.picture_norms = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(c.layers))
        self.spatial = nn.ModuleList(
            nn.ModuleList(WindowBlock(c.width, c.width, c.heads, window, step) for step in (0, shift))
            for _ in range(c.layers)
        )
        self.over_classes = nn.ModuleList(
            ClassBlock(c.width, c.width, c.heads, c.classes, c.pool) for _ in range(c.layers))
        widths = (c.width, *c.decoder)
        self.stages = nn.ModuleList(Stage(a, b, g) for a, b, g in zip(widths, c.decoder, c.guide_widths))
        self.head = nn.Conv2d(c.decoder[-1], 1, 3, padding=1)

    def forward(self, dense: Tensor, text: Tensor, inner: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [B, T, 4h, 4w] of every class.

        dense [B, D, h, w]: patches in the space of the text. text [T, D] or [B, T, D]. inner: outputs of two blocks of
        the tower, [B, W, h, w] each, the earlier first; enlarged twice and four times, they guide the decoder.
        """
        text = F.normalize((text.expand(len(dense), -1, -1) if text.dim() == 2 else text).float(), dim=-1)
        with torch.autocast(dense.device.type, enabled=False):  # classes differ by less than bf16 can tell
            cost = torch.einsum("bdhw,btd->bthw", F.normalize(dense.float(), dim=1), text)
        kept = None
        if text.shape[1] > self.config.classes:
            kept = cost.flatten(2).amax(2).topk(self.config.classes, sorted=False).indices
            rows = torch.arange(len(cost), device=cost.device)[:, None]
            chosen, text, classes = cost[rows, kept], text[rows, kept], cost.shape[1]
            cost = chosen
        logits = self.masks(self.aggregate(cost, dense, text), inner)
        if kept is None:
            return logits
        whole = logits.new_full((len(logits), classes, *logits.shape[2:]), UNSEEN)
        return whole.scatter(1, kept[:, :, None, None].expand_as(logits), logits)

    def aggregate(self, cost: Tensor, dense: Tensor, text: Tensor) -> Tensor:
        """cost [B, T, h, w] -> [B, T, h, w, C]."""
        pooled = self.training and self.config.pool > 1
        x = self.embed(cost.flatten(0, 1)[:, None]).permute(0, 2, 3, 1).unflatten(0, cost.shape[:2])
        picture = F.relu(self.picture(dense)).permute(0, 2, 3, 1)
        words = F.relu(self.text(text))
        for norm, blocks, over_classes in zip(self.picture_norms, self.spatial, self.over_classes):
            guidance = norm(picture)
            x = some_at_once(partial(_chain, list(blocks), guidance=guidance), x, 1, CLASSES)  # type: ignore[call-overload]
            x = some_at_once(partial(over_classes, text=words), x, 2, x.shape[2] if pooled else ROWS)
        return x

    def masks(self, x: Tensor, inner: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, h, w, C] -> [B, T, 4h, 4w]."""
        guides = [F.relu(project(enlarge(found))) for enlarge, project, found in zip(self.finer, self.guides, inner)]

        def decoded(x: Tensor) -> Tensor:
            planes = x.flatten(0, 1).permute(0, 3, 1, 2)
            for stage, guide in zip(self.stages, guides):
                planes = stage(planes, guide)
            return self.head(planes)[:, 0].unflatten(0, x.shape[:2])

        return some_at_once(decoded, x, 1, CLASSES)
