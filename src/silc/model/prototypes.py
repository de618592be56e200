"""The projection head and its prototypes: from an embedding to K logits.

Gives: PrototypeHead.
Used by: train/pretrain.py, for views (self-distillation) and for patches (masked prediction).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from silc.config import PrototypeConfig


class PrototypeHead(nn.Module):
    """MLP -> unit length -> cosine with K unit-length prototypes (DINO's head; SILC section 3.2 puts it on the shared
    embedding). The logits are cosines in [-1, 1], computed in fp32 whatever the compute precision."""

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

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., K]."""
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else F.gelu(x))
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float(), dim=-1, eps=1e-6), F.normalize(self.prototypes.float(), dim=-1))
