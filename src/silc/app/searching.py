"""Search a folder of pictures by words or by another picture.

Gives: Index (of, find, vectors, ask), Hit, Query.
Used by: app/search_command, app/demo, anyone in Python:

    index = Index.of(model, "photos")              # embeds what is new, finds the rest in the user's cache
    index.find("a red apple", top=12)              # list[Hit], best first; a str is always words
    index.find(Path("other.jpg"))                  # a Path, Pillow picture, array or tensor is searched by its look
    index.ask(vectors, top=12)                     # [Q, D] -> a list of hits for each
    index.root / hit.path                          # the file of a hit; hit.cosine beside it
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from silc.app.index_file import File, Kept, Known, fingerprint, scan, shown
from silc.config import DataConfig
from silc.data.images import BadSample, decode, normalise, preprocess
from silc.data.store import IMAGES, MAX_BYTES
from silc.eval.embed import Progress, embed_texts, evaluating, image_batches
from silc.model.silc import Silc
from silc.predict import Picture, as_image

Query = Picture
"""Words as a str; a picture as a Path, Pillow picture, or uint8: [H, W, 3] as an array, [3, H, W] as a tensor."""

BATCH = 64
PATIENCE = 30.0
"""Seconds of work that a killed run may lose, or more if writing is slow: it takes one part in `SHARE` of the time."""
SHARE = 20
TILE = 1 << 13
"""Pictures that are compared at a time."""
GROUP = 16
"""Queries whose cosines with all pictures are held at a time."""
MARGIN = 1e-3
"""More than rounding changes a cosine: of features to float16, of their products to float32."""
FINER = 2
"""A large JPEG is decoded at half, a quarter or an eighth of its size, as long as that is so many times what the model
sees: quicker by far, and hardly another vector."""
PASSING = ("missing file", "unreadable file")
"""Causes that may go without a change of the file: such a picture is tried again each time."""


@dataclass(frozen=True)
class Hit:
    path: str
    """Relative to the index's root, with `/`."""
    cosine: float


@dataclass(frozen=True, eq=False)
class Index:
    """The N pictures of a folder in the space of one model, of D dimensions."""

    model: Silc
    fingerprint: str
    """Of all that shaped the features: weights, architecture, preprocessing."""
    root: Path
    paths: Sequence[str]
    """[N], relative to the root, with `/`, sorted."""
    features: Tensor
    """float16 [N, D], unit length, on the CPU, not to be written to."""
    bad: dict[str, str]
    """The cause by path of each picture that cannot be read."""

    @classmethod
    def of(cls, model: Silc, folder: Path | str, cache: Path | None = None, batch: int = BATCH) -> Index:
        """Every picture in the folder and below it, but for hidden files and folders and links to folders.

        What an earlier run embedded of this folder with this model is taken from the folder `cache` (None: the user's
        own, see `Kept`); what is new or changed is embedded and kept there too, what is gone is dropped. A picture is
        known by path, size and time of change. One that cannot be read is told on stderr, and the others go on.
        ValueError for a folder that is none, or that holds no picture that can be read.
        """
        root = folder_of_pictures(folder)
        files, made = scan(root), fingerprint(model)
        if not files:
            raise ValueError(f"{folder} holds no pictures ({', '.join(IMAGES)}).")
        kept = Kept(root, made, cache)
        draft = _Draft(files, kept.read())
        try:
            _embed(model, root, draft, batch, kept)
        finally:  # when interrupted, too: what was embedded is not lost
            known = draft.known()
            if draft.fresh:
                kept.write(known)
        bad = {files[row].path: draft.causes[row] for row in sorted(draft.causes)}
        if bad:
            counts = ", ".join(f"{count} {cause}" for cause, count in Counter(bad.values()).most_common())
            print(f"left out {len(bad)} of {len(files)} pictures: {counts}.", file=sys.stderr)
        if len(bad) == len(files):
            raise ValueError(f"{folder} holds no picture that can be read.")
        paths = [file.path for file, cause in zip(known.files, known.causes) if not cause]
        return cls(model, made, root, paths, known.features, bad)

    def find(self, query: Query, top: int = 10) -> list[Hit]:
        """The pictures nearest to words or to a picture, best first, as `ask`. ValueError as `vectors` and `ask`."""
        return self.ask(self.vectors([query]), top)[0]

    def vectors(self, queries: Sequence[Query]) -> Tensor:
        """float32 [Q, D], unit length, on the CPU. Words go to the model as they are. ValueError for words that are
        empty, and a picture that cannot be read."""
        words = [query for query in queries if isinstance(query, str)]
        if not queries or not all(text.strip() for text in words):
            raise ValueError("a query is empty: say what to look for.")
        texts = iter(embed_texts(self.model, words, BATCH)) if words else iter(())
        return torch.stack([next(texts) if isinstance(query, str) else self._look(query) for query in queries])

    def _look(self, picture: Picture) -> Tensor:
        cfg = self.model.config.preprocess
        try:
            # a file as those of the folder are read, so that a picture finds itself
            pixels = _read(picture, cfg.size) if isinstance(picture, Path) else as_image(picture)
        except BadSample as error:
            raise ValueError(f"{picture} cannot be read as a picture ({error.cause}).") from None
        return _encode(self.model, preprocess(pixels, cfg)[None])[0]

    def ask(self, queries: Tensor, top: int = 10) -> list[list[Hit]]:
        """For each of the vectors [Q, D], of any length, its `top` nearest pictures, best first; of fewer all.

        Equal pictures stand in the order of their paths. Beside the features there are a tile of them in float32 and
        the cosines of 16 queries in memory. ValueError for vectors of another shape, or a `top` below 1.
        """
        if top < 1:
            raise ValueError(f"top must be 1 or more, not {top}.")
        if queries.ndim != 2 or queries.shape[1] != self.features.shape[1]:
            raise ValueError(f"queries must be [Q, {self.features.shape[1]}], not {list(queries.shape)}.")
        found: list[list[Hit]] = []
        with torch.inference_mode():
            for group in F.normalize(queries.float().cpu(), dim=1).split(GROUP):
                # filled in place: small results kept between large ones that go would leave holes in the memory
                cosines = torch.empty(len(group), len(self.features))
                for part, tile in zip(cosines.split(TILE, dim=1), self.features.split(TILE)):
                    part.copy_(group @ tile.float().T)
                found += [self._best(query, row, top) for query, row in zip(group, cosines)]
        return found

    def _best(self, query: Tensor, cosines: Tensor, top: int) -> list[Hit]:
        count = min(top, len(self.paths))
        # a matrix product may round equal rows differently, and float16 leaves no length at exactly 1: all that may be
        # among the best are compared again, row by row, and sorted in a way that leaves equal ones in their order
        near = (cosines >= cosines.topk(count).values[-1] - MARGIN).nonzero()[:, 0]
        exact = torch.empty(len(near), dtype=torch.float64)
        for part, rows in zip(exact.split(TILE), near.split(TILE)):
            part.copy_((F.normalize(self.features[rows].double(), dim=1) * query.double()).sum(1))
        exact = exact.round(decimals=7).clamp(-1, 1)
        order = exact.argsort(descending=True, stable=True)[:count]
        return [Hit(self.paths[row], cosine) for row, cosine in zip(near[order].tolist(), exact[order].tolist())]


def folder_of_pictures(folder: Path | str) -> Path:
    """The folder's own place, links resolved. ValueError if it is none."""
    path = Path(folder)
    if not path.exists():
        raise ValueError(f"{folder} does not exist.")
    if not path.is_dir():
        raise ValueError(f"{folder} is a file: give the folder of the pictures.")
    return path.resolve()


# ---------------------------------------------------------------- embedding


class _Draft:
    """The files of a folder while they are embedded: for each that is done, a cause or a row of the features."""

    def __init__(self, files: list[File], known: Known | None) -> None:
        self.files = files
        self.causes: dict[int, str] = {}
        self.done = torch.zeros(len(files), dtype=torch.bool)
        self.features = torch.empty(0, 0, dtype=torch.float16)
        self.fresh = False
        """Is anything known now that was not, or no longer to be known?"""
        if known is not None:
            self._take(known)

    def _take(self, known: Known) -> None:
        """What is known of the files that are still the same."""
        if known.files == self.files and not any(known.causes):
            # not copied, and not even read before it is compared
            self.features, self.done[:] = known.features, True
            return
        row_of = {file: row for row, file in enumerate(self.files)}
        pairs, source = [], 0
        for file, cause in zip(known.files, known.causes):
            row = row_of.get(file)
            if row is None:
                self.fresh = True
            elif cause:
                self.spoil(row, cause)
            else:
                pairs.append((row, source))
            source += not cause
        if pairs:
            rows, sources = torch.tensor(pairs).unbind(1)
            self.put(rows, known.features[sources])

    def todo(self) -> Tensor:
        """int64, the rows that are not done."""
        return (~self.done).nonzero()[:, 0]

    def put(self, rows: Tensor, features: Tensor) -> None:
        if not len(self.features):
            self.features = torch.empty(len(self.files), features.shape[1], dtype=torch.float16)
        self.features[rows] = features.half()
        self.done[rows] = True

    def spoil(self, row: int, cause: str) -> None:
        self.causes[row] = cause
        self.done[row] = True

    def known(self) -> Known:
        """All that is done and will be so tomorrow."""
        sound = self.done.clone()
        sound[list(self.causes)] = False
        told = {row: cause for row, cause in self.causes.items() if cause not in PASSING}
        rows = sorted([*sound.nonzero()[:, 0].tolist(), *told])
        features = self.features if sound.all() else self.features[sound[: len(self.features)]]
        return Known([self.files[row] for row in rows], [told.get(row, "") for row in rows], features)


@dataclass(frozen=True)
class _Files:
    root: Path
    files: list[File]
    size: int

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        """uint8 [3, H, W]; raises BadSample."""
        return _read(self.root / self.files[index].path, self.size)


def _embed(model: Silc, root: Path, draft: _Draft, batch: int, kept: Kept) -> None:
    """All that is not done, written to the file from time to time."""
    todo, cfg = draft.todo(), model.config.preprocess
    if not len(todo):
        return
    progress, batch = Progress(f"embed {shown(root.name)}", len(todo)), min(batch, len(todo))
    pictures = _Files(root, [draft.files[row] for row in todo.tolist()], cfg.size)

    def bad(index: int, error: BadSample) -> None:
        row = int(todo[index])
        draft.spoil(row, error.cause)
        draft.fresh |= error.cause not in PASSING
        print(f"{shown(draft.files[row].path)} is left out: {error.cause}.", file=sys.stderr)

    due = time.monotonic() + PATIENCE
    for rows, (pixels, mask) in zip(todo.split(batch), image_batches(pictures, cfg, batch, bad)):
        mask = mask[: len(rows)]
        if mask.any():
            draft.put(rows[mask], _encode(model, pixels)[: len(rows)][mask])
            draft.fresh = True
        progress.add(len(rows))
        began = time.monotonic()
        if began >= due and draft.fresh:
            kept.write(draft.known())
            ended = time.monotonic()
            due = ended + max(PATIENCE, SHARE * (ended - began))


def _encode(model: Silc, pixels: Tensor) -> Tensor:
    """uint8 [B, 3, size, size] -> float32 [B, D] on the CPU. ValueError for a model that gives no numbers."""
    cfg = model.config.preprocess
    with evaluating(model):
        found = model.encode_image(normalise(pixels.to(model.device), cfg.mean, cfg.std)).float().cpu()
    if not found.isfinite().all():
        raise ValueError("the model's features are not finite: its weights are damaged, or it diverged in training.")
    return found


def _read(path: Path, size: int) -> Tensor:
    """A file as uint8 [3, H, W] for a model that sees pictures of `size`; raises BadSample."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadSample("too large")
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadSample(PASSING[0]) from None
    except OSError:
        raise BadSample(PASSING[1]) from None
    return decode(data, DataConfig().max_pixels, at_least=FINER * size)
