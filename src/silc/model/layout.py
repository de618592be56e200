"""How another library's file lies in our model: which of our tensors each of theirs holds, and in which order.

Gives: Form and its values, Place, Layout, tower, pairs; fill, pour, LoadReport, strip_prefixes; at_size, demand.
Used by: weights.py, open_clip.py, timm.py and big_vision.py, a table of names each; adapters.py; opening models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from silc.config import ModelConfig
from silc.model.layers import resize_grid
from silc.model.silc import Silc

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"}


# ---------------------------------------------------------------- names and forms


class Form(NamedTuple):
    """How a tensor of theirs differs from ours joined along the first axis: the same numbers, ordered differently."""

    out: Callable[[Tensor], Tensor]
    """Ours -> theirs."""
    back: Callable[[Tensor], Tensor]
    """Theirs -> the numbers in our order; in which shape does not matter."""


SAME = Form(lambda x: x, lambda x: x)
ROW = Form(lambda x: x[None], lambda x: x)
SCALAR = Form(lambda x: x[0], lambda x: x)
TRANSPOSED = Form(lambda x: x.T, lambda x: x.T)


class Place(NamedTuple):
    ours: list[str]
    """Our tensors, which theirs holds one after the other along its first axis."""
    form: Form = SAME


Layout = dict[str, Place]
"""Names of theirs -> places in our model."""


def tower(
    table: Mapping[str, str], depth: int, theirs: str, ours: str, forms: Mapping[str, Form] | None = None
) -> Layout:
    """A table of names (`{}` is the number of the block; several of ours stand in one string) with prefixes before."""
    return {
        theirs + name.format(i): Place([ours + one.format(i) for one in target.split()], (forms or {}).get(name, SAME))
        for name, target in table.items()
        for i in range(depth if "{}" in name else 1)
    }


def pairs(layers: Mapping[str, str], kinds: tuple[str, str] = ("weight", "bias"), dot: str = ".") -> dict[str, str]:
    """Names of layers -> names of their weights and biases, which they call `kinds`."""
    return {
        f"{theirs}{dot}{kind}": " ".join(f"{one}.{own}" for one in ours.split())
        for theirs, ours in layers.items()
        for kind, own in zip(kinds, ("weight", "bias"))
    }


# ---------------------------------------------------------------- tensors


@dataclass
class LoadReport:
    """What became of every tensor; `str()` is a table. Names are ours, except `ignored`, which are the file's."""

    source: str
    loaded: list[str] = field(default_factory=list)
    """Taken from the file, `resized` ones included."""
    new: list[str] = field(default_factory=list)
    """Not in the file: keep their initial values."""
    resized: list[str] = field(default_factory=list)
    """As `image.position 14x14 -> 16x16`."""
    ignored: list[str] = field(default_factory=list)
    """In the file, but not in the model."""

    @property
    def share(self) -> float:
        """Share of the two towers' tensors that the file had, 0 to 1."""
        found, lacking = (sum(_tower_of(n) != "other" for n in names) for names in (self.loaded, self.new))
        return found / max(found + lacking, 1)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.new)
        lines = [f"Loaded {len(self.loaded)}/{total} tensors from {self.source}.", "  part    loaded   new  resized"]
        for part in ("image", "text", "other"):
            counts = [sum(_tower_of(n) == part for n in names) for names in (self.loaded, self.new, self.resized)]
            lines.append("  {:6}  {:6}  {:4}  {:7}".format(part, *counts))
        for title, names in (("New", self.new), ("Resized", self.resized), ("Ignored", self.ignored)):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                lines.append(f"{title}: {', '.join(names[:8])}{more}.")
        return "\n".join(lines)


def _tower_of(name: str) -> str:
    part = name.split(".")[0]
    return part if part in ("image", "text") else "other"


def strip_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what DDP, torch.compile, FSDP and activation checkpointing add to names, anywhere and in any nesting.

    ValueError when two tensors end up with one name.
    """
    stripped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = ".".join(piece for piece in name.split(".") if piece not in WRAPPERS)
        if plain in stripped:
            raise ValueError(f"two tensors of the file are named {plain!r} once wrappers are stripped ({name!r}).")
        stripped[plain] = tensor
    return stripped


def fill(model: nn.Module, layout: Layout, tensors: Mapping[str, Tensor], source: str, minimum: float) -> LoadReport:
    """Copy what the layout places, in fp32, into a model with an `image` tower; the rest of it is `new`.

    A position table of another grid than the image tower's is resized as that resizes. ValueError for a tensor of
    another shape than the settings ask for, and when the file has less than `minimum` of the towers' placed tensors.
    """
    own, theirs = model.state_dict(), strip_prefixes(tensors)
    report = LoadReport(source, ignored=[name for name in theirs if name not in layout])
    for name, (ours, form) in layout.items():
        if name not in theirs:
            report.new += ours
            continue
        tensor, wanted = theirs[name], form.out(_joined([own[o].to("meta") for o in ours])).shape
        if "image.position" in ours and tensor.dim() == len(wanted) and tensor.shape != wanted:
            tensor = _resize_position(name, tensor, model, report).view(wanted)
        fits = tensor.shape == wanted or tensor.numel() == wanted.numel() == 1  # a temperature is [] or [1]
        if not fits or not tensor.is_floating_point():
            got = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            raise ValueError(f"tensor {name} is {got}, but the config asks for {tuple(wanted)} in floating point.")
        for part, target in zip(form.back(tensor).reshape(-1).split([own[o].numel() for o in ours]), ours):
            own[target].copy_(part.view(own[target].shape))
            report.loaded.append(target)
    if report.share < minimum:
        examples = f"the file has names like {next(iter(theirs), 'none')!r}, expected {next(iter(layout))!r}"
        raise ValueError(f"only {report.share:.0%} of the towers' tensors were found: {examples}.")
    report.new += [name for name in own if name not in {o for place in layout.values() for o in place.ours}]
    return report


def pour(model: Silc, layout: Layout) -> dict[str, Tensor]:
    """The inverse of `fill`: our tensors under their names and in their shapes, contiguous copies."""
    own = model.state_dict()
    return {name: form.out(_joined([own[o] for o in ours])).contiguous() for name, (ours, form) in layout.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.flatten(0, 1) if p.dim() == 3 else p for p in parts])


def _resize_position(name: str, table: Tensor, model: nn.Module, report: LoadReport) -> Tensor:
    image: Any = model.image
    rows, grid, extra = table.flatten(0, -2), image.config.grid, 1 if image.config.pool == "cls" else 0
    side = math.isqrt(max(len(rows) - extra, 0))
    if side * side + extra != len(rows) or side == 0 or rows.shape[1] != image.config.width:
        raise ValueError(f"tensor {name} is {tuple(table.shape)}, but a square grid of {image.config.width} numbers "
                         "each is needed.")
    report.resized.append(f"image.position {side}x{side} -> {grid}x{grid}")
    square = rows[extra:].float().unflatten(0, (side, side))
    resized = resize_grid(square, grid, grid, image.config.position_resize)
    return torch.cat([rows[:extra].float(), resized.flatten(0, 1)])


# ---------------------------------------------------------------- settings


def at_size(config: ModelConfig, image_size: int | None) -> ModelConfig:
    """The same model for pictures of `image_size` pixels a side; None leaves it. ValueError unless patches fit."""
    if image_size is None:
        return config
    if image_size <= 0 or image_size % config.image.patch:
        raise ValueError(f"image_size {image_size} is not a multiple of the model's patch, {config.image.patch} px.")
    image, seen = replace(config.image, image_size=image_size), replace(config.preprocess, size=image_size)
    return replace(config, image=image, preprocess=seen)


def demand(config: ModelConfig, family: str, image: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """ValueError that names the first setting of the towers which is not as the family has it."""
    for room, own, switches in (("image", config.image, image), ("text", config.text, text)):
        for key, value in switches.items():
            if getattr(own, key) != value:
                raise ValueError(f"{family} has {room}.{key} = {value}, not {getattr(own, key)}.")
