"""Features of pictures and texts, in batches, on the model's device; a set is embedded once however many tasks read it.

Gives: evaluating (eval mode for a while), Progress, image_batches, embed_images, embed_texts, Features, settings.
Used by: every evaluation task, prompts, predict, app/searching.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from silc.config import PreprocessConfig
from silc.data.images import BadSample, normalise, preprocess
from silc.model.silc import Silc
from silc.parallel import World, gather
from silc.plain import to_dict

MESSAGE = 500
"""Bytes of an error's text that a process tells the others."""
ROWS = 8192
"""Features that are gathered from each process at a time."""


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


def image_batches(
    pictures: Pictures, cfg: PreprocessConfig, batch: int, bad: Callable[[int, BadSample], None] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pixels uint8 [batch, 3, size, size], mask bool [batch]) over all pictures, in order.

    All batches have one shape: the last is padded with zeros, and the mask says what is real. Pictures are decoded by
    threads, a batch ahead. Raises what reading a picture raises; with `bad`, that is told of a BadSample and its index,
    the mask leaves the picture out, and the others go on.
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
            mask = torch.arange(batch) < len(ready)
            for row, job in enumerate(ready):
                try:
                    pixels[row] = job.result()
                except BadSample as error:
                    if bad is None:
                        raise
                    bad(start + row, error)
                    mask[row] = False
            yield pixels, mask


def embed_images(
    model: Silc, pictures: Pictures, batch: int, label: str = "images", world: World | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Features float32 [N, D] on the CPU, in the order of `pictures`; the model's mode is left as it was.

    With a `world` of several processes each embeds every size-th picture and all get all features: all must call. What
    fails in one is raised in all, so that none waits for ever. `encode` stands in for the model's encode_image.
    """
    encode = encode or model.encode_image
    if world is None or world.size == 1:
        return _embed(model, encode, pictures, batch, label)
    mine = Share(pictures, list(range(world.rank, len(pictures), world.size)) or [0])
    failed, part = "", torch.zeros(0)
    try:
        part = _embed(model, encode, mine, batch, label, silent=not world.leads)
    except Exception as error:
        failed = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    agree(failed, world)
    return _interleave(part, len(pictures), world)


def embed_texts(model: Silc, texts: Sequence[str], batch: int, label: str = "texts") -> Tensor:
    """Features float32 [T, D] on the CPU, in the order of `texts`."""
    found: list[Tensor] = []
    progress = Progress(label, len(texts), "texts")
    with evaluating(model):
        for start in range(0, len(texts), batch):
            found.append(model.encode_text(list(texts[start : start + batch])).float().cpu())
            progress.add(len(found[-1]))
    return torch.cat(found)


def _embed(
    model: Silc, encode: Callable[[Tensor], Tensor], pictures: Pictures, batch: int, label: str, silent: bool = False
) -> Tensor:
    cfg = model.config.preprocess
    found: list[Tensor] = []
    progress = Progress(label, len(pictures), patience=float("inf") if silent else 2.0)
    with evaluating(model):
        for pixels, mask in image_batches(pictures, cfg, batch):
            features = encode(normalise(pixels.to(model.device), cfg.mean, cfg.std))
            found.append(features.float().cpu()[mask])
            progress.add(int(mask.sum()))
    return torch.cat(found)


# ---------------------------------------------------------------- several processes


@dataclass(frozen=True)
class Share:
    """Some of the pictures of a set."""

    pictures: Pictures
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Tensor:
        return self.pictures.image(self.indices[index])


def agree(failed: str, world: World) -> None:
    """Every process tells what failed in it, if anything; all raise the first such message."""
    text = failed.encode()[:MESSAGE]
    mine = torch.zeros(1, MESSAGE, dtype=torch.uint8)
    mine[0, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    for row in gather(mine.to(world.device), world).cpu():
        told = bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore")
        if told:
            raise ValueError(told)


def _interleave(part: Tensor, total: int, world: World) -> Tensor:
    """Row i of process r -> row i * size + r of the whole [total, D]."""
    rows = -(-total // world.size)
    part = torch.cat([part, part.new_zeros(max(0, rows - len(part)), part.shape[1])])
    everybody = [gather(some.to(world.device), world).cpu().unflatten(0, (world.size, -1)) for some in part.split(ROWS)]
    return torch.cat(everybody, dim=1).transpose(0, 1).flatten(0, 1)[:total]


# ---------------------------------------------------------------- computed once


def pools(model: nn.Module) -> bool:
    """Has the model `encode_pooled` (pixels -> what its tower pools, before projection and normalisation: big_vision's
    `pre_logits`) and `project` (that -> embeddings)? Probes read the former; of another model they read embeddings."""
    return callable(getattr(model, "encode_pooled", None)) and callable(getattr(model, "project", None))


class Features:
    """Image features of one model, each set embedded once and shared by all tasks that are handed this object.

    They are kept in memory up to `limit` bytes, the set used longest ago going first, and, with a `folder`, as .npy
    files that another run of the same model finds again: the folder must belong to this model alone. A set is known by
    its pictures (path, size and time of change), so an edited set is embedded anew.
    """

    def __init__(
        self, model: Silc, folder: Path | None = None, limit: int = 2**31, world: World | None = None
    ) -> None:
        self.model, self.folder, self.limit, self.world = model, folder, limit, world
        self.kept: dict[str, Tensor] = {}

    def images(self, pictures: Pictures, batch: int, label: str = "images", pooled: bool = False) -> Tensor:
        """float32 [N, D] on the CPU, not to be written to: embeddings, or with `pooled` what probes read, see `pools`.

        Both come from one pass over the pictures: the pooled features are kept, and projected when asked for.
        """
        model: Any = self.model
        if not pools(model):
            return self._once(pictures, batch, label, model.encode_image)
        found = self._once(pictures, batch, label, model.encode_pooled)
        if pooled:
            return found
        with evaluating(model):
            parts = [model.project(part.to(model.device)).float().cpu() for part in found.split(ROWS)]
        return torch.cat(parts)

    def _once(self, pictures: Pictures, batch: int, label: str, encode: Callable[[Tensor], Tensor]) -> Tensor:
        known = identity(pictures)
        if known is None:
            return embed_images(self.model, pictures, batch, label, self.world, encode)
        key = hashlib.sha256(f"{known} {settings(self.model)} {pools(self.model)}".encode()).hexdigest()[:32]
        found = self.kept.pop(key, None)
        if found is None:
            found = self._load(key, len(pictures))
        if found is None:
            found = embed_images(self.model, pictures, batch, label, self.world, encode)
            self._save(key, found)
        self.kept[key] = found
        while len(self.kept) > 1 and sum(t.numel() * t.element_size() for t in self.kept.values()) > self.limit:
            del self.kept[next(iter(self.kept))]
        return found

    def _load(self, key: str, count: int) -> Tensor | None:
        """What an earlier run left, if every process can read it: one alone would wait for the others' pictures."""
        if self.folder is None:
            return None
        found: Tensor | None = None
        try:
            values = np.load(self.folder / f"{key}.npy", allow_pickle=False)
            if values.dtype == np.float32 and values.ndim == 2 and len(values) == count:
                found = torch.from_numpy(values)
        except (OSError, ValueError, EOFError):  # none yet, or cut short: embed anew
            pass
        if self.world is not None and self.world.size > 1:
            have = torch.tensor([float(found is not None)], device=self.world.device)
            found = found if bool(gather(have, self.world).all()) else None
        return found

    def _save(self, key: str, features: Tensor) -> None:
        if self.folder is None or not (self.world is None or self.world.leads):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{key}.{os.getpid()}.part"
        with part.open("wb") as file:
            np.save(file, features.numpy(), allow_pickle=False)
        part.replace(self.folder / f"{key}.npy")


def settings(model: Silc) -> str:
    """All that shapes a model's features beside its weights, as text."""
    return json.dumps(to_dict(model.config), sort_keys=True)


def identity(pictures: Pictures) -> str | None:
    """A hash of which pictures these are, in their order; None for a set whose pictures do not lie in files."""
    paths, spans = getattr(pictures, "paths", None), getattr(pictures, "spans", None)
    if not paths:
        return None
    digest, last, stamp = hashlib.sha256(), "", ""
    for i in range(len(paths)):
        # a picture in a tar is known by the tar and by where it lies in it
        file, *place = spans[i] if spans else (paths[i],)
        if str(file) != last:
            try:
                stat, last = os.stat(file), str(file)
            except OSError:  # not a file of this machine, or gone: reading it will say so
                return None
            stamp = f"{os.path.abspath(file)}\0{stat.st_size}\0{stat.st_mtime_ns}"
        digest.update(f"{stamp}\0{place}\0".encode())
    return digest.hexdigest()
