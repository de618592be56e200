"""Models whose score is known: one that is perfect by construction, one that says nothing, one that is arbitrary.

Gives: COLOURS, NAMES, Oracle, Headed, Mute, Arbitrary, save, solid, write_splits.
Used by: the tests of evaluation.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from silc.config import ImageTowerConfig, ModelConfig, PreprocessConfig

COLOURS = np.array([(20, 20, 20), (230, 30, 30), (30, 230, 30), (30, 30, 230), (230, 230, 30), (230, 30, 230),
                    (30, 230, 230), (240, 240, 240)], dtype=np.uint8)
NAMES = ["black", "red", "green", "blue", "yellow", "magenta", "cyan", "white"]


class Oracle(nn.Module):
    """Knows the eight colours and their names: one axis each. Remembers the batch shapes it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig(image=ImageTowerConfig(image_size=32, patch=8), preprocess=PreprocessConfig(size=32))
        self.part = nn.Dropout(0.5)
        self.device, self.scale, self.bias = torch.device("cpu"), torch.tensor([100.0]), None
        self.shapes: list[tuple[int, ...]] = []

    def axes(self, colours: Tensor) -> Tensor:
        """Normalised [..., 3] -> [..., 8]."""
        known = torch.from_numpy(COLOURS).float() / 127.5 - 1
        return F.one_hot(torch.cdist(colours, known).argmin(-1), len(COLOURS)).float()

    def encode_image(self, pixels: Tensor) -> Tensor:
        assert not self.part.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(pixels.shape))
        return self.axes(pixels.mean((2, 3)))

    def encode_dense(self, pixels: Tensor, readout: str = "auto") -> Tensor:
        self.shapes.append(tuple(pixels.shape))
        return self.axes(F.avg_pool2d(pixels, 8).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def encode_text(self, texts: list[str]) -> Tensor:
        found = [[i for i, name in enumerate(NAMES) if name in text.replace(".", "").split()] for text in texts]
        blank = torch.full((8,), 8**-0.5)
        return torch.stack([F.one_hot(torch.tensor(f[0]), 8).float() if f else blank for f in found])


class Headed(Oracle):
    """With a head for segmentation, which is sure of what it sees."""

    catseg = True

    def segment(self, pixels: Tensor, text: Tensor) -> Tensor:
        cosines = torch.einsum("bdhw,td->bthw", self.encode_dense(pixels, "catseg"), text)
        return F.interpolate(20 * cosines - 10, scale_factor=4)


class Mute(Oracle):
    def axes(self, colours: Tensor) -> Tensor:
        return torch.full((*colours.shape[:-1], 8), 8**-0.5)

    def encode_text(self, texts: list[str]) -> Tensor:
        return torch.full((len(texts), 8), 8**-0.5)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def solid(index: int, height: int = 20, width: int = 26) -> np.ndarray:
    return np.broadcast_to(COLOURS[index], (height, width, 3))


class Arbitrary(Oracle):
    """Some smooth function of the picture and some function of the text, the same every time, right by luck only."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.shapes.append(tuple(pixels.shape))
        mix = torch.randn(3 * 16, 8, generator=torch.Generator().manual_seed(0))
        return F.normalize((F.adaptive_avg_pool2d(pixels, 4).flatten(1) @ mix).sin(), dim=1)

    def encode_text(self, texts: list[str]) -> Tensor:
        rows = [np.random.default_rng(list(text.encode())).normal(size=8) for text in texts]
        return F.normalize(torch.from_numpy(np.array(rows)).float(), dim=1)


def write_splits(folder: Path, classes: int = 6, train: int = 4, test: int = 3, noise: int = 0) -> Path:
    """train/ and test/ of the first colours, `noise` grey levels around them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for c in range(classes):
            for i in range(count):
                pixels = solid(c, 20 + i, 30 - i).astype(int)
                pixels = pixels + rng.integers(-noise, noise + 1, pixels.shape)
                save(folder / split / NAMES[c] / f"{i:02d}.png", pixels.clip(0, 255))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES[:classes]))
    return folder
