"""The layers that both towers are made of, over packed tokens.

Gives: pack / unpack, Attention, Mlp, Block, MapHead, resize_grid.
Used by: towers.py; and prototypes.py for its activation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silc.config import Activation, PositionResize

# Sequences of several lengths are packed into one [T, D] tensor, so that norms, projections and MLPs run once over all
# of them; `shapes` = ((B, N), ...) remembers the parts, and only attention looks at it.
Shapes = tuple[tuple[int, int], ...]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def pack(sequences: list[Tensor]) -> tuple[Tensor, Shapes]:
    """[B_i, N_i, D] each -> one [T, D] and its shapes."""
    shapes = tuple((s.shape[0], s.shape[1]) for s in sequences)
    return torch.cat([s.flatten(0, 1) for s in sequences]), shapes


def unpack(packed: Tensor, shapes: Shapes) -> list[Tensor]:
    """The inverse of `pack`: views of [T, D] as [B_i, N_i, D]."""
    return [part.unflatten(0, shape) for part, shape in zip(packed.split([b * n for b, n in shapes]), shapes)]


def resize_grid(grid: Tensor, height: int, width: int, how: PositionResize = "bicubic-antialias") -> Tensor:
    """Position table [g, g, D] -> [height, width, D] by output size (never by scale factor).

    Without antialiasing a small crop reads, and trains, only a few cells of the table: an uneven gradient that leaves
    a visible pattern in it. So `bicubic` is for models that were trained with it.
    """
    if grid.shape[:2] == (height, width):
        return grid
    if width == 1 < height:  # PyTorch's antialiased CPU kernel repeats the first row when asked for a single column
        return resize_grid(grid.transpose(0, 1), width, height, how).transpose(0, 1)
    channels_first, mode = grid.permute(2, 0, 1)[None].float(), how.removesuffix("-antialias")
    resized = F.interpolate(channels_first, (height, width), mode=mode, align_corners=False, antialias=mode != how)
    return resized[0].permute(1, 2, 0).to(grid.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Scaled dot-product attention over [B, heads, N, d]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # the CPU kernel's backward is 2-7 times slower in bf16 than these two products
        scores = (q * q.shape[-1] ** -0.5 @ k.mT).float()
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """Multi-head self-attention; q, k, v stay separate layers so that they can be tuned, or adapted, one by one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        return x.view(*shape, self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, shapes: Shapes, causal: bool = False) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, where each of the three would do it again
        sizes = [b * n for b, n in shapes]
        parts = zip(self.q(x).split(sizes), self.k(x).split(sizes), self.v(x).split(sizes), shapes)
        mixed = [
            attend(self.split(q, s), self.split(k, s), self.split(v, s), causal).transpose(1, 2).reshape(q.shape)
            for q, k, v, s in parts
        ]
        return self.out(mixed[0] if len(mixed) == 1 else torch.cat(mixed))

    def value_path(self, x: Tensor) -> Tensor:
        """Attention one-hot on the token itself: out(v(x))."""
        return self.out(self.v(x))

    def self_similar(self, x: Tensor, shapes: Shapes, keys: bool) -> Tensor:
        """Tokens attend to those whose query is like their own: softmax(q q^T / sqrt d) v, then `out`.

        With `keys`, softmax(k k^T / sqrt d) v is added before `out`: weights then sum to 2, as in SCLIP.
        """
        mixed = []
        for part, shape in zip(unpack(x, shapes), shapes):
            v = self.split(self.v(part), shape)
            same = [self.split(layer(part), shape) for layer in ((self.q, self.k) if keys else (self.q,))]
            mixed.append(torch.stack([attend(s, s, v) for s in same]).sum(0).transpose(1, 2).flatten(2).flatten(0, 1))
        return self.out(torch.cat(mixed))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, act: Activation) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(width, hidden), nn.Linear(hidden, width), ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block over packed tokens [T, D]."""

    def __init__(self, width: int, heads: int, hidden: int, act: Activation, eps: float, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width, hidden, act)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        x = x + self.attention(self.norm1(x), shapes, self.causal)
        return x + self.mlp(self.norm2(x))

    def value_path(self, x: Tensor) -> Tensor:
        """The block with each token attending to itself alone (the MaskCLIP read-out; the residual stays per token)."""
        x = x + self.attention.value_path(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def value_beside(self, x: Tensor, shapes: Shapes) -> Tensor:
        """The same with the class token, the first of each picture, as the residual of all its tokens (CAT-Seg)."""
        values = unpack(self.attention.value_path(self.norm1(x)), shapes)
        x = torch.cat([(v + own[:, :1]).flatten(0, 1) for v, own in zip(values, unpack(x, shapes))])
        return x + self.mlp(self.norm2(x))

    def correlative(self, x: Tensor, shapes: Shapes) -> Tensor:
        """The block with attention softmax(q q^T) + softmax(k k^T), residual and MLP kept (SCLIP, arXiv 2312.01597)."""
        x = x + self.attention.self_similar(self.norm1(x), shapes, keys=True)
        return x + self.mlp(self.norm2(x))

    def attention_alone(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Attention softmax(q q^T) without residual and MLP (ClearCLIP, arXiv 2407.12442)."""
        return self.attention.self_similar(self.norm1(x), shapes, keys=False)


class MapHead(nn.Module):
    """Multi-head attention pooling: one learned probe reads all tokens (SigLIP)."""

    def __init__(self, width: int, heads: int, hidden: int, act: Activation, eps: float) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, width))
        self.attention = Attention(width, heads)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, act)

    def forward(self, x: Tensor, shapes: Shapes) -> list[Tensor]:
        """Packed tokens [T, D] -> [B_i, D] for each part."""
        a = self.attention
        q = a.split(a.q(self.probe), (1, 1))
        keys, values = unpack(a.k(x), shapes), unpack(a.v(x), shapes)
        pooled = [
            attend(q.expand(b, -1, -1, -1).to(k.dtype), a.split(k, (b, n)), a.split(v, (b, n))).reshape(b, -1)
            for k, v, (b, n) in zip(keys, values, shapes)
        ]
        mixed = a.out(torch.cat(pooled))
        return list((mixed + self.mlp(self.norm(mixed))).split([b for b, _ in shapes]))

    def per_patch(self, x: Tensor) -> Tensor:
        """What the head would return were its attention one-hot on each token in turn: [..., D] -> [..., D]."""
        mixed = self.attention.value_path(x)
        return mixed + self.mlp(self.norm(mixed))
