"""Optimiser and schedule: AdamW over heads and towers, and the learning rate as a function of the step.

Gives: make_optimizer, learning_rate, set_learning_rates, clip_and_step.
Used by: train/loop.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from silc.config import Config, OptimConfig
from silc.parallel import whole

# tables and single vectors that a decay would only pull to the origin
UNDECAYED = ("position", "cls", "cls_position", "probe", "mask_token", "logit_scale", "logit_bias")


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only (not on norms, biases, position tables, probes or the temperature).

    Each group says in `part` whether it is of the `image` tower, of the `text` tower (with the temperature), or of the
    `heads`."""
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            tower = name.startswith("model.") and not name.startswith("model.catseg.")
            part = "image" if name.startswith("model.image.") else "text" if tower else "heads"
            decayed = parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in UNDECAYED
            groups.setdefault((part, config.weight_decay if decayed else 0.0), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "part": part, "weight_decay": decay} for (part, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(described, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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


def frozen_steps(config: Config) -> int:
    """Steps at the beginning in which the towers stand still."""
    return round(config.init.freeze * config.steps)


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    """Set the rate of every group, a tower's as its share of the heads', warmed up anew where it was frozen first.

    Returns the rate of the heads."""
    lr, frozen = learning_rate(step, config.steps, config.optim), frozen_steps(config)
    warm = min(1.0, (step - frozen + 1) / max(1, round(config.optim.warmup * config.steps))) if frozen else 1.0
    share = {"heads": 1.0, "image": config.init.image_lr * warm, "text": config.init.text_lr * warm}
    for group in optimizer.param_groups:
        group["lr"] = lr * max(0.0, share[group["part"]])
    return lr


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
