"""What the tasks that learn on frozen features share: opening both splits, and linear classifiers on features.

Gives: open_splits, Linear, whiten, ridge, softmax_regression, every_fifth, best_l2.
Used by: fewshot, probe, dense_probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

# Shapes: N features of width D, C classes.

class Divided(Protocol):
    @property
    def classes(self) -> list[list[str]]: ...

    @property
    def split(self) -> str: ...


D = TypeVar("D", bound=Divided)


def open_splits(
    open_set: Callable[[Path, str | None, str | None], D], location: Path | str, split: str | None, kind: str | None
) -> tuple[D, D]:
    """(train, scored) of one set, each as `open_set(location, split, kind)` gives it; `split` is the scored one.

    ValueError says which split is missing, or that the two do not have the same classes in the same order.
    """
    folder = Path(location)
    learned, scored = open_set(folder, "train", kind), open_set(folder, split, kind)
    if learned.split == scored.split:
        raise ValueError(f"{folder}: {learned.split} is learned from and cannot be scored, too; add a test split.")
    for one, other in zip(learned.classes, scored.classes):
        if one != other:
            raise ValueError(f"{folder}: {learned.split} has {one[0]!r} where {scored.split} has {other[0]!r}.")
    if len(learned.classes) != len(scored.classes):
        raise ValueError(
            f"{folder}: {learned.split} has {len(learned.classes)} classes and {scored.split} {len(scored.classes)}; "
            "make them the same."
        )
    return learned, scored


@dataclass(frozen=True)
class Linear:
    """(x - mean) / std @ weight + bias: mean, std [D], weight [D, C], bias [C]."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Features [N, D] -> scores [N, C], in the precision of the weights."""
        return (x.to(self.weight) - self.mean) / self.std @ self.weight + self.bias


def whiten(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (over N, not N - 1) + 1e-5 of each dimension, float64 [D]."""
    x = x.double()
    return x.mean(0), x.std(0, correction=0) + 1e-5


def ridge(x: Tensor, labels: Tensor, classes: int, l2: float = 1024.0, constant: float = 100.0) -> Linear:
    """Least squares on targets -1 and 1 with l2 * |weights|^2, in closed form and float64.

    As big_vision's few-shot evaluation: whitened features, a dimension of `constant` for the bias (large, so that it is
    hardly shrunk), one eigendecomposition of the smaller Gram matrix: [D, D] if N >= D, else [N, N].
    """
    mean, std = whiten(x)
    z = F.pad((x.double() - mean) / std, (0, 1), value=constant)
    y = 2 * F.one_hot(labels, classes).double() - 1
    if len(z) >= z.shape[1]:
        values, vectors = torch.linalg.eigh(z.T @ z)
        solution = (vectors / (values + l2)) @ (vectors.T @ (z.T @ y))
    else:
        values, vectors = torch.linalg.eigh(z @ z.T)
        solution = z.T @ ((vectors / (values + l2)) @ (vectors.T @ y))
    return Linear(mean, std, solution[:-1], constant * solution[-1])


def softmax_regression(
    x: Tensor, labels: Tensor, classes: int, l2: float, start: Linear | None = None, steps: int = 200
) -> Linear:
    """Minimise mean cross-entropy + l2 / 2 * |weight|^2 on standardised features by L-BFGS: one answer, no randomness.

    In the precision of x; the bias is not shrunk. `start`: weights to begin with, of the same width.
    """
    mean, std = whiten(x)
    with torch.inference_mode(False), torch.enable_grad():
        z = ((x.double() - mean) / std).to(x.dtype)
        weight = (z.new_zeros(z.shape[1], classes) if start is None else start.weight.clone()).requires_grad_()
        bias = (z.new_zeros(classes) if start is None else start.bias.clone()).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(z @ weight + bias, labels) + l2 / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
    return Linear(mean.to(x.dtype), std.to(x.dtype), weight.detach(), bias.detach())


def every_fifth(groups: Tensor) -> Tensor:
    """bool [N]: in each group (its label, say) the fifth, tenth ... member, to choose settings on."""
    order = groups.argsort(stable=True)
    sizes = torch.bincount(groups)
    place = torch.arange(len(groups), device=groups.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    held = torch.zeros_like(groups, dtype=torch.bool)
    held[order] = place % 5 == 4
    return held


def best_l2(
    x: Tensor, labels: Tensor, classes: int, held: Tensor, strengths: Sequence[float], steps: int
) -> tuple[Linear, float, dict[str, float]]:
    """softmax_regression on all of x, with the l2 that is best on the `held` part when fitted to the rest.

    Also that l2, and the accuracy of each on the held part. From strong to weak, each starting where the last ended;
    among equals the strongest. Where nothing is held, or everything, the strongest is taken.
    """
    scores: dict[str, float] = {}
    best, last = max(strengths), None
    for l2 in sorted(strengths, reverse=True) if held.any() and not held.all() else ():
        last = softmax_regression(x[~held], labels[~held], classes, l2, last, steps)
        scores[f"{l2:g}"] = (last(x[held]).argmax(1) == labels[held]).double().mean().item()
        if scores[f"{l2:g}"] > scores[f"{best:g}"]:
            best = l2
    return softmax_regression(x, labels, classes, best, None, steps), best, scores
