"""Features of pictures and texts, in batches, on the model's device.

Gives: evaluating (eval mode for a while), Progress, image_batches, embed_images, embed_texts.
Used by: every evaluation task, prompts, predict.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from silc.config import PreprocessConfig
from silc.data.images import normalise, preprocess
from silc.model.silc import Silc


class Pictures(Protocol):
    """Anything that counts its pictures and gives each as uint8 [3, H, W]."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Tensor: ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in, also when something failed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class Progress:
    """A line on stderr once a job takes longer than two seconds: done, speed, time left."""

    def __init__(self, label: str, total: int, unit: str = "images", patience: float = 2.0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.started = time.monotonic()
        self.live = sys.stderr.isatty()
        self.next = self.started + patience
        self.shown = False

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now < self.next and not (self.shown and self.done >= self.total):
            return
        # a log file gets few lines, a terminal one that moves
        self.next = now + (0.5 if self.live else 30.0)
        self.shown = True
        speed = self.done / max(now - self.started, 1e-9)
        left = (self.total - self.done) / speed
        text = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, {speed:,.0f} {self.unit}/s, {left:.0f} s left"
        end = "\n" if not self.live or self.done >= self.total else ""
        print(f"\r{text:<78}" if self.live else text, end=end, file=sys.stderr, flush=True)


def image_batches(pictures: Pictures, cfg: PreprocessConfig, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels uint8 [batch, 3, size, size], mask bool [batch]) over all pictures, in order.

    All batches have one shape: the last is padded with zeros, and the mask says what is real. Pictures are decoded by
    threads, a batch ahead. Raises what reading a picture raises.
    """
    def read(index: int) -> Tensor:
        return preprocess(pictures.image(index), cfg)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        starts = range(0, len(pictures), batch)
        coming = [pool.submit(read, i) for i in range(min(batch, len(pictures)))]
        for start in starts:
            ready = coming
            stop = start + batch
            coming = [pool.submit(read, i) for i in range(stop, min(stop + batch, len(pictures)))]
            pixels = torch.zeros(batch, 3, cfg.size, cfg.size, dtype=torch.uint8)
            for row, job in enumerate(ready):
                pixels[row] = job.result()
            yield pixels, torch.arange(batch) < len(ready)


def embed_images(model: Silc, pictures: Pictures, batch: int, label: str = "images") -> Tensor:
    """Features float32 [N, D] on the CPU, in the order of `pictures`; the model's mode is left as it was."""
    cfg = model.config.preprocess
    found: list[Tensor] = []
    progress = Progress(label, len(pictures))
    with evaluating(model):
        for pixels, mask in image_batches(pictures, cfg, batch):
            features = model.encode_image(normalise(pixels.to(model.device), cfg.mean, cfg.std))
            found.append(features.float().cpu()[mask])
            progress.add(int(mask.sum()))
    return torch.cat(found)


def embed_texts(model: Silc, texts: Sequence[str], batch: int, label: str = "texts") -> Tensor:
    """Features float32 [T, D] on the CPU, in the order of `texts`."""
    found: list[Tensor] = []
    progress = Progress(label, len(texts), "texts")
    with evaluating(model):
        for start in range(0, len(texts), batch):
            found.append(model.encode_text(list(texts[start : start + batch])).float().cpu())
            progress.add(len(found[-1]))
    return torch.cat(found)
