"""Optimiser and schedule: AdamW over two weight-decay groups, and the learning rate as a function of the step.

Gives: make_optimizer, learning_rate, set_learning_rate, clip_and_step.
Used by: train/loop.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from silc.config import OptimConfig
from silc.parallel import whole

# tables and single vectors that a decay would only pull to the origin
UNDECAYED = ("position", "cls", "cls_position", "probe", "mask_token", "logit_scale", "logit_bias")


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only (not on norms, biases, position tables, probes or the temperature)."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decayed = {n for n, p in named.items() if p.ndim >= 2 and n.rsplit(".", 1)[-1] not in UNDECAYED}
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named.items() if n in decayed], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Rate of step 0 .. steps-1: linear warm-up, then cosine to 0, or rsqrt / constant with a linear cooldown to 0."""
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    decayed = math.sqrt(warmup / (step + 1)) if config.schedule == "rsqrt" else 1.0
    cooldown = max(1, round(config.cooldown * steps))
    return config.lr * decayed * min(1.0, (steps - step) / cooldown)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_and_step(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    """Clip the gradient to `limit`, step, clear. Returns the norm before clipping, [].

    A NaN or infinite norm skips the step, on the device: the fused kernel reads the flag, so the host never waits.
    """
    parameters = list(parameters)
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
    # the fused kernel divides as it reads: clipping costs no pass of its own over the gradients
    optimizer.grad_scale = (norm / limit).clamp_min(1.0) if limit > 0 else torch.ones_like(norm)  # type: ignore[attr-defined]
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
