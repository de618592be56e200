"""Batches: positions of the stream, decoded and cut by worker processes, joined and tokenised.

Gives: `batches`, `streamed`, `beside`, `BadCount`.
Used by: train/loop, data/masked, benchmarks.
"""

from __future__ import annotations

import atexit
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from silc.config import Config
from silc.data.images import Picture, preprocess, shrink_for
from silc.data.pairs import Bad, Mixture
from silc.data.views import cut, draw_crops, draw_photometric, room_for, sample_rng, spare

CHUNK = 32
"""Most samples in one task of a worker: large enough that handing over costs little, small enough to share out."""
AHEAD = 2
"""Batches in the making at any time."""
MAX_FLYING = 256
"""Chunks in the making at any time: each holds up to three file descriptors, of which a process may have 1,024."""
CROP_AXIS = {"image": 0, "globals": 1, "locals": 1, "photo": 1, "labels": 0}
"""Which axis of a chunk's arrays is the batch."""
CPU = torch.device("cpu")

Batch = dict[str, Any]


# ---------------------------------------------------------------- in a worker


class Chunks(Dataset[Batch]):
    """Stretches of the stream, each as one dict of stacked arrays.

    Its item [first, last) is: "image" uint8 [n, S, S, 3], "globals" uint8 [G, n, H, W, 3], "locals" uint8
    [L, n, h, w, 3], "photo" float32 [G+L, n, P] (NumPy), each only where the config asks for it; "captions" and
    "ids", lists of n; "bad", what was left out. Or {"error": sentence}: an exception would arrive as a traceback.
    """

    def __init__(self, config: Config, mixture: Mixture) -> None:
        self.config, self.mixture = config, mixture
        self.original = config.objective.contrast_views != "global"

    def __getitem__(self, span: tuple[int, int]) -> Batch:
        size, count = self.config.model.preprocess.size, len(range(*span))
        room = room_for(self.config.views, count)
        if self.original:
            room["image"] = torch.empty((count, size, size, 3), dtype=torch.uint8)
        try:
            made = [self.mixture.read(at, partial(self._sample, at, room, row)) for row, at in enumerate(range(*span))]
        except ValueError as error:
            return {"error": str(error)}
        samples, idents = [sample for sample, _, _ in made], [ident for _, ident, _ in made]
        chunk: Batch = dict(room)
        if self.config.views.photometric != "none":
            # small: cheaper in the message than as shared memory
            chunk["photo"] = np.stack([sample["photo"] for sample in samples], CROP_AXIS["photo"])
        bad = [item for _, _, items in made for item in items]
        return {**chunk, "captions": [s["caption"] for s in samples], "ids": idents, "bad": bad}

    @torch.inference_mode()  # spares many small operations their bookkeeping
    def _sample(
        self, position: int, room: dict[str, Tensor], row: int, data: bytes, captions: list[str], ident: str
    ) -> dict[str, Any]:
        """Draw for a picture, decode it no larger than the draw needs, and cut it into its row of `room`."""
        views, size = self.config.views, self.config.model.preprocess.size
        picture = Picture(data, self.config.data.max_pixels)
        rng = sample_rng(self.config.seed, position)
        made: dict[str, Any] = {"caption": captions[int(rng.integers(len(captions)))]}
        height, width = picture.height, picture.width
        crops = draw_crops(height, width, views, rng)
        excess = min(spare(crops), min(height, width) / size) if self.original else spare(crops)
        image = picture.pixels(shrink_for(excess))
        places = [view[row] for name in ("globals", "locals") if name in room for view in room[name]]
        cut(image, crops, height, width, places)
        if self.original:
            room["image"][row] = preprocess(image, self.config.model.preprocess).permute(1, 2, 0)
        if views.photometric != "none":
            made["photo"] = draw_photometric(views, rng)
        return made


def _start_worker(closing: Any, worker: int) -> None:
    """Let a worker outlive the signals that a launcher sends to the whole group, until its parent is closing.

    The parent still needs batches to finish its step and save; DataLoader's own watchdog ends orphans.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.value else None)
    torch.set_num_threads(1)


# ---------------------------------------------------------------- in the training process


def batches(
    config: Config,
    mixture: Mixture,
    tokenizer: Callable[[list[str]], Tensor],
    start_step: int,
    rank: int,
    world: int,
    device: torch.device = CPU,
) -> Generator[Batch, None, None]:
    """This process's part of every batch from `start_step` on, endless.

    The batch of step s is positions [s * batch, (s + 1) * batch) of the stream, and rank r takes the r-th of `world`
    equal slices: what is trained on depends neither on the number of processes nor on that of workers, and every step
    can be the first. A batch (B = batch / world, G/L global/local views, P photometric parameters) holds

    "image" uint8 [B, 3, S, S] (if the objective contrasts the original), "globals" uint8 [G, B, 3, H, W],
    "locals" uint8 [L, B, 3, h, w] (if any), "tokens" int64 [B, length], "photo" float32 [G+L, B, P] (if
    photometric; NumPy, as it stays on the host), "ids" list of B, "bad" list of dicts (position, id, source, cause).
    Pictures lie channels-last in memory. Where `device` is a GPU, tensors are pinned while the batch is made ahead, so
    that `.to(device, non_blocking=True)` overlaps with computing.

    Close the iterator (`.close()`) to end its workers. ValueError if `world` does not divide the batch, if shared
    memory is too small, or, while iterating, from the sources.
    """
    damage = mixture.damage if start_step == rank == 0 else []
    return streamed(config, Chunks(config, mixture), tokenizer, start_step, rank, world, device, damage)


def streamed(
    config: Config,
    chunks: Dataset[Batch],
    tokenizer: Callable[[list[str]], Tensor],
    start_step: int,
    rank: int,
    world: int,
    device: torch.device = CPU,
    damage: Sequence[Bad] = (),
) -> Generator[Batch, None, None]:
    """`batches` of any dataset whose items are stretches [first, last) of a stream, as those of `Chunks` are."""
    batch, workers = config.train.batch, config.data.workers
    if batch % world:
        raise ValueError(f"train: a batch of {batch} cannot be shared among {world} processes; make it a multiple.")
    share = batch // world
    chunk = min(CHUNK, math.ceil(share / max(1, workers)))
    starts = (step * batch + rank * share for step in itertools.count(start_step))
    spans = ((at, min(at + chunk, first + share)) for first in starts for at in range(first, first + share, chunk))
    pieces = math.ceil(share / chunk)
    loader, closing = _loader(config, chunks, spans, chunk, pieces)
    return _joined(loader, closing, pieces, tokenizer, list(damage), device)


def beside(pairs: Generator[Batch, None, None], pictures: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Batches of `pairs` with those of pictures without captions under "unpaired"; ids and bad samples are joined.

    Both are streams of `batches`. Close the iterator to end the workers of both."""
    try:
        for batch, alone in zip(pairs, pictures):
            unpaired = {name: alone[name] for name in ("globals", "locals", "photo") if name in alone}
            joined = {name: batch[name] + alone[name] for name in ("ids", "bad")}
            yield {**batch, **joined, "unpaired": unpaired}
    finally:
        pairs.close()
        pictures.close()


def _loader(
    config: Config, chunks: Dataset[Batch], spans: Iterable[tuple[int, int]], chunk: int, pieces: int
) -> tuple[DataLoader[Batch], Any]:
    options: dict[str, Any] = {}
    workers = config.data.workers
    # Forked workers share the packed tables of the sources, start at once, and need no guarded main module; with one
    # thread each they never enter a pool of threads that the fork did not copy, nor touch the GPU. Elsewhere than on
    # Linux forking is unsafe in the system's own libraries.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    closing = context.RawValue("b", 0)
    if workers:
        flying = min(MAX_FLYING, AHEAD * pieces, _room(config, chunk, workers))
        options = {
            "multiprocessing_context": context,
            "prefetch_factor": max(1, flying // workers),
            "worker_init_fn": partial(_start_worker, closing),
        }
    # A generator of its own: DataLoader draws from it, and training's random numbers must not depend on that.
    own = torch.Generator()
    options.update(sampler=spans, collate_fn=_as_is, num_workers=workers, generator=own)
    return DataLoader(chunks, batch_size=None, **options), closing


def _as_is(chunk: Batch) -> Batch:
    return chunk


def _room(config: Config, chunk: int, workers: int) -> int:
    """Chunks that fit into half of what shared memory is free; ValueError if that is less than one a worker."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return MAX_FLYING
    views = config.views
    original = config.model.preprocess.size if config.objective.contrast_views != "global" else 0
    squares = views.globals * views.global_size**2 + views.locals * views.local_size**2 + original**2
    free = shutil.disk_usage(shared).free
    room = free // 2 // (3 * squares * chunk)
    if room < workers:
        raise ValueError(
            f"data: {free >> 20} MiB of shared memory are too little for {workers} workers; enlarge /dev/shm "
            "(docker run --shm-size=8g), or set --data.workers 0."
        )
    return int(room)


def _joined(
    loader: DataLoader[Batch],
    closing: Any,
    pieces: int,
    tokenizer: Callable[[list[str]], Tensor],
    damage: list[Bad],
    device: torch.device,
) -> Generator[Batch, None, None]:
    iterator = _started(loader)

    def stop() -> None:
        closing.value = 1
        if loader.num_workers:
            # Also when a traceback still holds the iterator, so that its own clean-up would not run.
            iterator._shutdown_workers()

    def make() -> Batch:
        return _join([_next(iterator) for _ in range(pieces)], tokenizer, pinned)

    atexit.register(stop)
    pinned = device.type == "cuda"
    # Pinning is a thread's own GPU's affair: a new thread would wake the first one.
    ready = partial(torch.cuda.set_device, device) if pinned else None
    # Joining copies a batch at memory speed, which is time that the training thread need not wait.
    pool = ThreadPoolExecutor(1, initializer=ready) if loader.num_workers else None
    try:
        coming = pool.submit(make) if pool else None
        while True:
            batch = coming.result() if coming else make()
            coming = pool.submit(make) if pool else None
            batch["bad"] = damage + batch["bad"]
            damage = []
            yield batch
    finally:
        if pool:
            pool.shutdown()
        stop()
        atexit.unregister(stop)


def _started(loader: DataLoader[Batch]) -> Any:
    """The loader's iterator, without its SIGCHLD handler.

    That one raises wherever the training process happens to be, even amid saving a checkpoint. A dead worker is
    noticed without it when its next chunk is due.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    iterator = iter(loader)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _next(iterator: Iterator[Batch]) -> Batch:
    try:
        chunk = next(iterator)
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        # The latter three: the worker is gone before its tensors were taken over.
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            "data: a worker process died, most often because memory ran out; lower --data.workers or --train.batch."
        ) from error
    if "error" in chunk:
        raise ValueError(chunk["error"])
    return chunk


def _join(chunks: Sequence[Batch], tokenizer: Callable[[list[str]], Tensor], pinned: bool) -> Batch:
    joined: Batch = {}
    for name, axis in CROP_AXIS.items():
        if name not in chunks[0]:
            continue
        arrays = [np.asarray(chunk[name]) for chunk in chunks]
        if name == "photo":
            joined[name] = np.concatenate(arrays, axis)
            continue
        shape = list(arrays[0].shape)
        shape[axis] = sum(array.shape[axis] for array in arrays)
        whole = torch.empty(shape, dtype=torch.int16 if name == "labels" else torch.uint8, pin_memory=pinned)
        # NumPy's copy stays on one thread; PyTorch's would start a second pool of threads beside the training's.
        np.concatenate(arrays, axis, out=whole.numpy())
        joined[name] = whole if name == "labels" else whole.movedim(-1, -3)
    captions, ids, bad = (list(itertools.chain(*(c[name] for c in chunks))) for name in ("captions", "ids", "bad"))
    tokens = tokenizer(captions)
    return {**joined, "tokens": tokens.pin_memory() if pinned else tokens, "ids": ids, "bad": bad}


# ---------------------------------------------------------------- bad samples


class BadCount:
    """Counts bad samples by cause, keeps their list, and stops a run in which they are too many."""

    AT_LEAST = 200
    SHOWN = 3

    def __init__(self, max_fraction: float, path: Path | None = None) -> None:
        """`path`: a file to which each bad sample is added as a line of JSON."""
        self.max_fraction, self.path = max_fraction, path
        self.seen = 0
        self.causes: Counter[str] = Counter()
        self.first: list[str] = []

    @property
    def bad(self) -> int:
        return self.causes.total()

    def add(self, good: int, bad: Sequence[Bad]) -> None:
        """Count a batch: `good` samples used, `bad` ones left out."""
        self.seen += good + len(bad)
        self.causes.update(item["cause"] for item in bad)
        self.first = (self.first + [item["id"] for item in bad])[: self.SHOWN]
        if bad and self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(item) + "\n" for item in bad)

    def check(self) -> None:
        """ValueError if, after at least 200 samples, more than `max_fraction` of those tried were bad."""
        if self.seen < self.AT_LEAST or self.bad <= self.max_fraction * self.seen:
            return
        told = ", ".join(f"{count} {cause}" for cause, count in self.causes.most_common())
        where = f"; all are listed in {self.path}" if self.path is not None else ""
        raise ValueError(
            f"data: {self.bad} of {self.seen} samples are bad ({self.bad / self.seen:.1%}, limit "
            f"{self.max_fraction:.1%}): {told}; the first are {', '.join(self.first)}{where}. "
            "Mend the data, or raise --data.max-bad-fraction."
        )

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"seen": self.seen, "causes": dict(self.causes), "first": list(self.first)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting from what `state` gave."""
        self.seen, self.causes, self.first = int(state["seen"]), Counter(state["causes"]), list(state["first"])
