"""A picture and words in; labels, similarity maps and label maps out.

Gives: Predictor (classify, heatmap, segment, scores; question and answer, of which these two are made), as_image.
Used by: the command line, app/*, anyone in Python.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from silc.config import DataConfig
from silc.data.images import BadSample, decode, normalise, preprocess
from silc.eval.embed import evaluating
from silc.eval.prompts import TEMPLATES, ClassEmbeddings, check_templates, class_embeddings
from silc.eval.protocols import (
    Dense,
    Protocol,
    cosine_maps,
    encode,
    fit,
    foreground,
    label_map,
    probability_maps,
    probability_scale,
    protocol,
    softmax_totals,
)
from silc.eval.trained import Seen, at_size, best, look, scores
from silc.model.silc import Silc

Picture = str | Path | Image.Image | np.ndarray | Tensor
"""A file, a Pillow picture, or uint8: [H, W, 3] or [H, W] as an array, [3, H, W] as a tensor."""


class Score(TypedDict):
    cosine: float
    probability: float


def as_image(picture: Picture) -> Tensor:
    """Any `Picture` as uint8 [3, H, W], upright, alpha over white. ValueError if it is none."""
    if isinstance(picture, str | Path):
        try:
            return _decode(Path(picture).read_bytes(), str(picture))
        except OSError as error:
            raise ValueError(f"{picture} cannot be read ({error.strerror}).") from None
    if isinstance(picture, Image.Image):
        upright, buffer = ImageOps.exif_transpose(picture), io.BytesIO()
        keeps = upright.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")
        # through PNG, which loses nothing, so that files and pictures in memory go the same way
        (upright if keeps else upright.convert("RGB")).save(buffer, "PNG", compress_level=0)
        return _decode(buffer.getvalue(), "the picture")
    if isinstance(picture, np.ndarray):
        array = np.repeat(picture[..., None], 3, 2) if picture.ndim == 2 else picture
        pixels = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1) if array.ndim == 3 else torch.empty(0)
    else:
        pixels = picture
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise ValueError(
            f"a picture must be uint8, [H, W, 3] as an array or [3, H, W] as a tensor, not {picture.dtype} "
            f"{list(picture.shape)}."
        )
    return pixels.cpu()


def _decode(data: bytes, name: str) -> Tensor:
    try:
        return decode(data, DataConfig().max_pixels)
    except BadSample as error:
        raise ValueError(f"{name} cannot be read as a picture ({error.cause}).") from None


@dataclass(frozen=True)
class Question:
    """Labels to look for in pictures; see `Predictor.question`."""

    how: Protocol
    """With the rule for the background, if there is one."""
    classes: ClassEmbeddings
    """Without the first label where that has a rule instead."""


@dataclass(frozen=True)
class Answer:
    """What a model saw of a picture, which label map and scores are read from; see `Predictor.answer`."""

    question: Question
    seen: Seen | Dense
    size: tuple[int, int]
    scale: float
    """Factor on cosines in a softmax."""

    def labels(self) -> Tensor:
        """As `Predictor.segment`: int64 [H, W]."""
        classes, rule = self.question.classes, self.question.how.background
        with torch.inference_mode():
            if isinstance(self.seen, Seen):
                found = best(self.seen, classes, *self.size, rule)
            else:
                found = label_map(self.seen, classes, *self.size, rule, self.scale)
        return found.cpu().clone()

    def scores(self, size: tuple[int, int] | None = None) -> Tensor:
        """As `Predictor.scores`: float32 [T, H, W], of the labels that are compared."""
        vectors, (height, width) = self.question.classes.vectors, size or self.size
        with torch.inference_mode():
            if isinstance(self.seen, Seen):
                found = vectors.new_zeros(len(vectors), height, width)
                found[self.seen.kept] = scores(self.seen, slice(None), height, width)
            elif self.seen.merge == "probability":
                found = probability_maps(self.seen, vectors, height, width, softmax_totals(self.seen, vectors))
            else:
                found = (cosine_maps(self.seen, vectors, height, width) * self.scale).softmax(0)
        return found.cpu().clone()


class Predictor:
    """Answers about pictures from one model. Texts are free; the model stays on the device it is on."""

    def __init__(self, model: Silc, batch: int = 32) -> None:
        self.model, self.batch = model, batch

    def classify(
        self, images: Picture | Sequence[Picture], labels: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> list[dict[str, Score]]:
        """For each picture, each label's cosine and probability, the best first.

        The probability is a softmax over the labels, or for a model with a logit bias (sigmoid loss) a sigmoid of each
        label alone: such probabilities need not sum to 1, and may all be low. The picture is squashed or cropped as in
        training. Raises ValueError for no or repeated labels, or a wrong template.
        """
        pictures = [images] if isinstance(images, str | Path | Image.Image | np.ndarray | Tensor) else list(images)
        cfg, names = self.model.config.preprocess, _texts(labels, "label")
        classes = class_embeddings(self.model, [[name] for name in names], templates)
        answers: list[dict[str, Score]] = []
        for start in range(0, len(pictures), self.batch):
            pixels = torch.stack([preprocess(as_image(p), cfg) for p in pictures[start : start + self.batch]])
            with evaluating(self.model):
                features = self.model.encode_image(normalise(pixels.to(self.model.device), cfg.mean, cfg.std)).float()
                cosine = classes.scores(features)
                logits, bias = cosine * self.model.scale, self.model.bias
                probability = logits.softmax(1) if bias is None else (logits + bias).sigmoid()
            for row, chances in zip(cosine.tolist(), probability.tolist()):
                order = sorted(range(len(names)), key=lambda i: -row[i])
                answers.append({names[i]: Score(cosine=row[i], probability=chances[i]) for i in order})
        return answers

    def heatmap(
        self,
        image: Picture,
        texts: Sequence[str],
        templates: Sequence[str] = ("{}",),
        how: Protocol | str = "whole-image",
    ) -> Tensor:
        """Cosine of every pixel with every text: float32 [T, H, W] at the picture's own size, aspect kept.

        `how`: a segmentation protocol, of which size, window and read-out count. ValueError for no or repeated texts.
        """
        names = _texts(texts, "text")
        vectors = class_embeddings(self.model, [[name] for name in names], templates).vectors
        pixels, how = as_image(image), self.protocol(how)
        if how.merge == "sigmoid":
            raise ValueError("a heat map shows cosines, not the scores of a head: use another protocol.")
        with evaluating(self.model):
            maps = cosine_maps(self._dense(pixels, how), vectors, pixels.shape[-2], pixels.shape[-1])
        return maps.cpu().clone()

    def segment(
        self,
        image: Picture,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        how: Protocol | str = "auto",
        background: float | None = None,
    ) -> Tensor:
        """Index of the best label at every pixel: int64 [H, W] at the picture's own size, aspect kept.

        `how`: a segmentation protocol; `auto` is catseg for a model with a trained head, else whole-image.

        With `background` (in 0..1), the first label stands for everything else: it is not compared by its name, it gets
        the pixels whose best probability among the other labels is lower. ValueError for no or repeated labels, or a
        background rule with fewer than three labels (two, with a trained head).
        """
        return self.answer(image, self.question(labels, templates, how, background)).labels()

    def scores(
        self,
        image: Picture,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        how: Protocol | str = "auto",
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """How well every label fits every pixel, 0 to 1: float32 [T, H, W] at the picture's own size, or at `size`.

        From a trained head each label's own score (a mean of sigmoids), else a softmax over the labels."""
        return self.answer(image, self.question(labels, templates, how)).scores(size)

    def question(
        self,
        labels: Sequence[str],
        templates: Sequence[str] | None = None,
        how: Protocol | str = "auto",
        background: float | None = None,
    ) -> Question:
        """The labels of `segment`, embedded: for many pictures, or for label map and scores of one, it is made once."""
        names, how = _texts(labels, "label"), self.protocol(how)
        trained, ruled = how.merge == "sigmoid", background is not None
        if ruled and not trained and len(names) < 3:
            raise ValueError("a background by rule needs two foreground labels or more: without a trained head a score "
                             "is a label's share among them, and one alone has all of it.")
        how = dataclasses.replace(how, background=background)
        named = [[name] for name in names]
        named = named[int(ruled) :] if trained else foreground(named, ruled, how)
        chosen = check_templates(templates if templates is not None else how.templates or TEMPLATES)
        classes = class_embeddings(self.model, named, chosen)
        first = len(names) - len(named)
        return Question(how, dataclasses.replace(classes, owner=classes.owner + first, classes=len(names)))

    def answer(self, image: Picture, question: Question) -> Answer:
        """The picture once through the model."""
        pixels, how = as_image(image), question.how
        with evaluating(self.model):
            if how.merge == "sigmoid":
                seen: Seen | Dense = look(self.model, self._pixels(pixels, how), how, question.classes.vectors)[0]
            else:
                seen = self._dense(pixels, how)
        scale = probability_scale(how, self.model)
        return Answer(question, seen, (pixels.shape[-2], pixels.shape[-1]), scale)

    def protocol(self, how: Protocol | str) -> Protocol:
        """The protocol that a name, such as `auto`, stands for with this model."""
        found = protocol(how, model=self.model) if isinstance(how, str) else how
        return at_size(found, self.model) if found.merge == "sigmoid" else found

    def _pixels(self, pixels: Tensor, how: Protocol) -> Tensor:
        cfg = self.model.config.preprocess
        return normalise(fit(pixels, how, self.model.config)[None].to(self.model.device), cfg.mean, cfg.std)

    def _dense(self, pixels: Tensor, how: Protocol) -> Dense:
        return encode(self.model, self._pixels(pixels, how), how, self.batch)[0]


def _texts(texts: Sequence[str], kind: str) -> list[str]:
    if isinstance(texts, str):
        raise ValueError(f"give a list of {kind}s, not one text: [{texts!r}].")
    found = [text.strip() for text in texts]
    if not found or not all(found):
        raise ValueError(f"give at least one {kind}, and none that is empty.")
    if len(set(found)) < len(found):
        raise ValueError(f"a {kind} stands twice: {next(t for t in found if found.count(t) > 1)!r}.")
    return found
