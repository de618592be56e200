"""Label maps of a picture, a folder of pictures, an animation or a video, written as files.

Gives: segment.
Used by: the command line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from silc.app.overlays import overlay_labels, palette
from silc.data.store import IMAGES
from silc.eval.embed import Progress
from silc.opening import load
from silc.parallel import pick_device
from silc.predict import Answer, Picture, Predictor, as_image

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
BACKGROUND, BLACK = "background", (0, 0, 0)
SUMMARY = 320
"""Long side in pixels of the maps from which mean and highest scores are taken."""


def segment(
    target: str, source: Path, labels: Sequence[str], out: Path, how: str = "auto", background: float | None = None,
    arrays: bool = False, every: int = 1, device: str = "auto",
) -> int:  # fmt: skip
    """Write NAME.png, NAME.labels.png, NAME.json and, with `arrays`, NAME.npy for every picture. How many there were.

    A picture of a folder that cannot be read is told on stderr, and the others go on. ValueError if none could be."""
    if every < 1:
        raise ValueError("--every must be 1 or more.")
    if background is not None and not 0 < background < 1:
        raise ValueError("--background is a score between 0 and 1.")
    if background is not None and BACKGROUND in labels:
        raise ValueError(f"with --background, {BACKGROUND!r} is made by the rule: leave it out of the classes.")
    names = [BACKGROUND, *labels] if background is not None else list(labels)
    pictures, count = _pictures(source, every, out)
    predictor = Predictor(load(target).to(pick_device(device)))
    question = predictor.question(names, how=how, background=background)
    out.mkdir(parents=True, exist_ok=True)
    progress, done, failed = Progress(f"segment {source.name}", count), 0, []
    for name, picture in pictures:
        try:
            pixels = as_image(picture)
        except ValueError as error:
            print(error, file=sys.stderr)
            failed.append(name)
            continue
        answer = predictor.answer(pixels, question)
        label = answer.labels()
        found = _summary(answer, label, names, background is not None)
        about = {"picture": name, "model": target, "protocol": question.how.name, "background": background}
        _write(out / name, pixels, label, names, {**about, "classes": found}, background is not None)
        if arrays:
            np.save(out / f"{name}.npy", answer.scores().numpy().astype(np.float16))
        done += 1
        progress.add(1)
    if not done:
        raise ValueError(f"{source} holds no picture that can be read.")
    return done


def _summary(answer: Answer, label: Tensor, names: Sequence[str], ruled: bool) -> list[dict[str, Any]]:
    """Of each class its share of the pixels and, but for a background by rule, its mean and highest score."""
    share = np.bincount(label.numpy().ravel(), minlength=len(names)) / label.numel()
    factor = min(1.0, SUMMARY / max(label.shape))
    size = (max(1, round(label.shape[0] * factor)), max(1, round(label.shape[1] * factor)))
    scores = answer.scores(size).flatten(1)
    rows: list[dict[str, Any]] = [{"class": n, "index": i, "share": float(share[i])} for i, n in enumerate(names)]
    for row, mean, highest in zip(rows[int(ruled) :], scores.mean(1).tolist(), scores.amax(1).tolist()):
        row |= {"mean_score": mean, "highest_score": highest}
    return rows


def _write(
    stem: Path, pixels: Tensor, label: Tensor, names: Sequence[str], about: dict[str, Any], ruled: bool
) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    colours = [BLACK, *palette(len(names) - 1)] if ruled else palette(len(names))
    overlay_labels(pixels, label, names, colours).save(f"{stem}.png")
    if len(names) <= 256:
        indexed = Image.fromarray(label.numpy().astype(np.uint8), "P")
        indexed.putpalette([value for colour in colours for value in colour])
    else:  # a palette has no room for more
        indexed = Image.fromarray(label.numpy().astype(np.uint16))
    indexed.save(f"{stem}.labels.png")
    Path(f"{stem}.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- pictures


def _pictures(source: Path, every: int, out: Path) -> tuple[Iterator[tuple[str, Picture]], int]:
    """(name, picture) of each, and how many there are, as far as that is known."""
    if not source.exists():
        raise ValueError(f"{source} does not exist.")
    if source.is_dir():
        return _folder(source, out)
    if source.suffix.lower() in VIDEOS:
        return _video(source, every)
    try:
        image = Image.open(source)
        # a phone's JPEG holds a preview or a depth map as a second picture: that is no animation
        frames = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    except UnidentifiedImageError:
        raise ValueError(f"{source} is neither a picture nor a video ({', '.join(VIDEOS)}).") from None
    except Exception:  # whatever else Pillow makes of it: reading it says why
        return iter([(source.stem, source)]), 1
    if frames == 1:
        image.close()
        return iter([(source.stem, source)]), 1
    # RGBA, so that what is clear becomes white as in any picture
    numbered = (frame.convert("RGBA") for frame in ImageSequence.Iterator(image))
    return _numbered(source, numbered, every), -(-frames // every)


def _folder(source: Path, out: Path) -> tuple[Iterator[tuple[str, Picture]], int]:
    """The pictures in a folder and below it, but for what was written to `out` before."""
    place = out.resolve()
    if place == source.resolve():
        raise ValueError(f"--out {out} is the folder of the pictures: choose another, even one within it.")
    files = sorted(
        p for p in source.rglob("*")
        if p.suffix.lower().lstrip(".") in IMAGES and p.is_file() and place not in p.resolve().parents
    )
    if not files:
        raise ValueError(f"{source} holds no pictures ({', '.join(IMAGES)}).")
    return ((str(p.relative_to(source)), p) for p in files), len(files)


def _numbered(source: Path, frames: Iterator[Picture], every: int) -> Iterator[tuple[str, Picture]]:
    """Every `every`-th frame, named by its number; of a damaged file as many as can be read."""
    i = -1
    try:
        for i, frame in enumerate(frames):
            if i % every == 0:
                yield f"{source.stem}/{i:05d}", frame
    except Exception as error:  # those of Pillow, or of FFmpeg
        print(f"{source} is damaged after frame {i} ({error}).", file=sys.stderr)


def _video(source: Path, every: int) -> tuple[Iterator[tuple[str, Picture]], int]:
    try:
        import av
    except ImportError:
        raise ValueError('a video needs its package: pip install "silc[video]".') from None
    try:
        container = av.open(str(source))
        stream = container.streams.video[0]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{source} cannot be read as a video ({error}).") from None

    def frames() -> Iterator[Picture]:
        with container:
            for frame in container.decode(stream):
                # a phone that was held upright writes lying frames, and how far to turn them back
                yield np.rot90(frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90))

    # a Matroska file does not count its frames
    seconds = (container.duration or 0) / av.time_base
    count = stream.frames or round(seconds * float(stream.average_rate or 0))
    return _numbered(source, frames(), every), -(-count // every)
