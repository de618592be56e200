"""Crops of pictures with masks: the stream that segmentation trains on.

Gives: `MaskedCrops`, `open_masks`.
Used by: train/prepare, train/loop.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from silc.config import Config
from silc.data.images import resize
from silc.data.labelled import Masked, open_masked
from silc.data.loader import CPU, CROP_AXIS, Batch, streamed
from silc.data.pairs import ATTEMPTS, Bad, keyed, shuffled
from silc.data.tokenizer import Tokenizer
from silc.data.views import draw_photometric, room_for, sample_rng

VOID = -1
"""Label of pixels without a class."""


def open_masks(config: Config) -> MaskedCrops:
    """The sets that --data.sources names, their training split where they have splits.

    ValueError for a set that `open_masked` cannot read, and for sets whose classes differ."""
    found, kind = [], config.segment.kind or None
    for location in config.data.sources:
        try:
            found.append(open_masked(location, config.segment.split, kind))
        except ValueError as error:
            whole = open_masked(location, None, kind) if "split" in str(error) else None
            if whole is None or whole.split:
                raise
            found.append(whole)  # it has no splits at all
    for other in found[1:]:
        if other.classes != found[0].classes:
            raise ValueError(f"data: {found[0].name} and {other.name} have different classes; masks of several "
                             "--data.sources must number the same ones.")
    return MaskedCrops(config, found)


class MaskedCrops(Dataset[Batch]):
    """Square crops with their label maps, an endless keyed stream. An item [first, last) is: "globals" uint8
    [1, n, S, S, 3], "labels" int16 [n, S, S] (`VOID` where nothing is known), "photo" float32 [1, n, P] where colours
    are changed, "ids" and "bad"; or {"error": sentence}."""

    def __init__(self, config: Config, sets: Sequence[Masked]) -> None:
        low, high = config.segment.zoom
        if not 1 <= low <= high:
            raise ValueError(f"--segment.zoom {low:g} {high:g}: it begins at 1, where the crop is as large as fits.")
        self.config, self.sets = config, list(sets)
        self.ends = np.cumsum([len(one) for one in sets])

    def __len__(self) -> int:
        """Pictures in all sets."""
        return int(self.ends[-1])

    @property
    def names(self) -> list[str]:
        """The first name of every class."""
        return [group[0] for group in self.sets[0].classes]

    def captions(self, limit: int) -> Iterator[str]:
        yield from self.names[:limit]

    def batches(
        self, tokenizer: Tokenizer, start_step: int, rank: int, world: int, device: torch.device = CPU
    ) -> Generator[Batch, None, None]:
        """As `silc.data.loader.batches`: "globals" [1, B, 3, S, S], "labels" [B, S, S], "photo", "ids", "bad", and
        "tokens" [T, length], the prompt of every class, the same in each batch."""
        prompts = tokenizer([self.config.segment.prompt.replace("{}", name) for name in self.names])
        return streamed(self.config, self, lambda _: prompts, start_step, rank, world, device)

    def __getitem__(self, span: tuple[int, int]) -> Batch:  # type: ignore[override]
        views, count = self.config.views, len(range(*span))
        room = {"globals": room_for(views, count)["globals"]}
        room["labels"] = torch.empty((count, views.global_size, views.global_size), dtype=torch.int16)
        photos, idents, bad = [], [], []
        try:
            for row, position in enumerate(range(*span)):
                ident, photo, left_out = self._sample(position, room, row)
                photos.append(photo)
                idents.append(ident)
                bad += left_out
        except ValueError as error:
            return {"error": str(error)}
        chunk: Batch = dict(room)
        if views.photometric != "none":
            chunk["photo"] = np.stack(photos, CROP_AXIS["photo"])
        return {**chunk, "captions": [], "ids": idents, "bad": bad}

    @torch.inference_mode()
    def _sample(self, position: int, room: dict[str, Tensor], row: int) -> tuple[str, np.ndarray, list[Bad]]:
        """Read, crop and note one place of the stream; where a picture or mask cannot be used, another stands in."""
        config, bad, at = self.config, [], position
        for attempt in range(ATTEMPTS):
            number = shuffled(at, len(self), config.seed)
            which = int(np.searchsorted(self.ends, number, side="right"))
            data, index = self.sets[which], number - int(self.ends[which - 1] if which else 0)
            try:
                image, mask = data.image(index), data.mask(index)
            except ValueError as error:
                bad.append(Bad(position=position, id=data.ident(index), source=data.name, cause=str(error)))
                at = keyed(config.seed, 3, position, attempt + 1) >> 24
                continue
            rng = sample_rng(config.seed, position)
            self._cut(image, mask, data.void, rng, room["globals"][0, row], room["labels"][row])
            return data.ident(index), draw_photometric(config.views, rng), bad
        raise ValueError(f"data: {ATTEMPTS} pictures in a row could not be used; the last: {bad[-1]['cause']}")

    def _cut(
        self, image: Tensor, mask: Tensor, void: int | None, rng: np.random.Generator, view: Tensor, label: Tensor
    ) -> None:
        """The random square [S, S, 3] and its labels [S, S], mirrored in half of the cases."""
        size, (low, high) = len(view), self.config.segment.zoom
        height, width = mask.shape
        zoom, down, across, turn = rng.random(4).tolist()
        side = max(1, round(min(height, width) / (low + (high - low) * zoom)))
        top, left = int(down * (height - side + 1)), int(across * (width - side + 1))
        made = resize(image[:, top : top + side, left : left + side], size, size, "bilinear")
        near = ((torch.arange(size) + 0.5) * side / size).long()
        classes = mask[top : top + side, left : left + side][near][:, near]
        if void is not None:
            classes = classes.masked_fill(classes == void, VOID)
        mirrored = self.config.views.flip and turn < 0.5
        view.permute(2, 0, 1).copy_(made.flip(-1) if mirrored else made)
        label.copy_(classes.flip(-1) if mirrored else classes)
