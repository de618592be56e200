"""The projection head and its prototypes: from an embedding to the two sides of K cosines.

Gives: PrototypeHead, Projected.
Used by: train/student.py, for views (self-distillation) and for patches (masked prediction).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from silc.config import PrototypeConfig


class Projected(NamedTuple):
    """The logits would be features @ prototypes.T, cosines in [-1, 1]; at K = 65,536 nobody should hold them, so the
    losses make and use them block by block."""

    features: Tensor
    """[..., bottleneck], unit length, fp32."""
    prototypes: Tensor
    """[K, bottleneck], likewise."""


class PrototypeHead(nn.Module):
    """MLP -> unit length, beside K unit-length prototypes (DINO's head; SILC section 3.2 puts it on the shared
    embedding). Both sides are fp32 whatever the compute precision."""

    def __init__(self, width: int, config: PrototypeConfig) -> None:
        super().__init__()
        c = config
        widths = [width] + [c.hidden] * (c.layers - 1) + [c.bottleneck]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.prototypes = nn.Parameter(torch.empty(c.count, c.bottleneck))
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.prototypes)

    def forward(self, x: Tensor) -> Projected:
        """[..., width] -> features [..., bottleneck] and the prototypes they are compared with."""
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else F.gelu(x))
        return Projected(F.normalize(x.float(), dim=-1, eps=1e-6), _Unit.apply(self.prototypes.float()))


class _Unit(torch.autograd.Function):
    """x / |x| over the rows of x. F.normalize's gradient writes four arrays of the size of x, which for 65,536
    prototypes takes longer than a picture's whole loss; this one writes one, a cached stretch at a time."""

    ROWS = 4096

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        unit = x / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        out = torch.empty_like(grad)
        parts = (t.split(_Unit.ROWS) for t in (out, grad, *ctx.saved_tensors))
        for mine, g, unit, length in zip(*parts):
            along = torch.linalg.vecdot(g, unit)[:, None]
            torch.addcmul(g, unit, along, value=-1, out=mine).div_(length)
        return out
