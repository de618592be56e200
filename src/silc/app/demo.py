"""A page in the browser on which a model answers about pictures: maps of texts, patches that look alike, classes.

Gives: serve, which is `silc demo`; Demo, its answers, without the web.
Used by: the command line. All numbers are the Predictor's. A picture goes through the model once, however many
questions follow; what leaves is small: cosines a patch, features in 8 bits, class and score a pixel of a small map.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import re
import signal
import sys
import threading
import time
import webbrowser
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from silc.app.demo_examples import EXAMPLES, draw
from silc.app.demo_server import LARGEST, LOCAL, Refusal, Reply, Routes, Server, as_json
from silc.app.overlays import HEAT, palette
from silc.app.pages import template
from silc.app.searching import Index
from silc.app.thumbs import QUALITY, WIDE, view
from silc.config import DataConfig
from silc.data.images import FORMATS, BadSample, decode
from silc.eval.protocols import Dense, Protocol, cosine_maps, fit_size
from silc.model.silc import Silc
from silc.opening import SMALL, load
from silc.parallel import pick_device
from silc.predict import Answer, Predictor

DETAILS = (1, 2, 4)
"""How many times the model's own size a picture may be looked at: more and smaller patches."""
ENOUGH = 8
"""Patches along the short side with which the page begins, if a detail has them."""
PATCHES = 4096
"""Of a picture at most, which bounds the time and what is sent: so many bytes a feature."""
TEXTS, CHARACTERS = 32, 200
PICTURES, LOOKS = 8, 8
"""Files, and pictures' features, that are kept for the next question."""
SIDE = 512
"""Long side in pixels of the label map that is sent."""
HITS, SHOWN = 24, 6
"""Pictures that a search finds, and of a folder are offered as examples."""
LIMITS = {
    SMALL.name: "A toy of drawings and simple photographs: it knows single things, large and in the middle, and often "
    "it is wrong. Give silc demo a model of your own to see more.",
}
ANY = "Cosines show what fits a text better, not whether it is there: compare texts, and places."

V = TypeVar("V")


class Demo:
    """A model's answers to what the page asks, as plain data. One question at a time; others wait."""

    def __init__(self, model: Silc, name: str, index: Index | None = None) -> None:
        self.predictor, self.name, self.index = Predictor(model), name, index
        self.lock = threading.Lock()
        self.files: OrderedDict[str, bytes] = OrderedDict()
        self.looks: OrderedDict[tuple[str, int], Answer] = OrderedDict()
        self.number = {path: i for i, path in enumerate(index.paths)} if index else {}

    def routes(self) -> Routes:
        questions = {"/heat": self.heat, "/patches": self.patches, "/segment": self.segment, "/classify": self.classify}
        numbered = {"/examples": example}
        if self.index:
            questions["/search"] = self.search
            numbered |= {"/pictures": self.picture, "/thumbs": self.thumb}
        pages = {"/": lambda: page(self.name), "/about": lambda: as_json(self.about())}
        return Routes(pages, numbered, {"/picture": self.receive}, questions)

    # ---------------------------------------------------------------- what there is

    def about(self) -> dict[str, Any]:
        config, names = self.predictor.model.config, self.index.paths[:SHOWN] if self.index else ()
        grids = {detail: detail * config.preprocess.size // config.image.patch for detail in DETAILS}
        details = [detail for detail in DETAILS if detail == 1 or grids[detail] ** 2 <= PATCHES]
        own = [
            {"name": e.name, "texts": e.texts, "labels": e.labels, "url": f"/examples/{i}", "thumb": f"/examples/{i}"}
            for i, e in enumerate(EXAMPLES)
        ]
        theirs = [{"name": name, "url": f"/pictures/{i}", "thumb": f"/thumbs/{i}"} for i, name in enumerate(names)]
        return {
            "model": self.name,
            "limits": LIMITS.get(self.name, ANY),
            "size": config.preprocess.size,
            "patch": config.image.patch,
            "details": details,
            "detail": next((detail for detail in details if grids[detail] >= ENOUGH), details[-1]),
            "head": self._headed,
            "sigmoid": self.predictor.model.bias is not None,
            "examples": [*own, *theirs],
            "pictures": len(self.index.paths) if self.index else 0,
            "heat": HEAT.tolist(),
            "largest": LARGEST,
        }

    def picture(self, number: int) -> Reply:
        """A file of the folder, as it is."""
        data = self._read(number)
        try:
            kind = Image.MIME[Image.open(io.BytesIO(data), formats=FORMATS).format or ""]
        except Exception:  # it was a picture when the folder was indexed
            raise Refusal(404, "this file is no picture any more.") from None
        return Reply(data, kind)

    def thumb(self, number: int) -> Reply:
        buffer = io.BytesIO()
        view(_decoded(self._read(number), WIDE)).save(buffer, "WEBP", quality=QUALITY)
        return Reply(buffer.getvalue(), "image/webp")

    def _read(self, number: int) -> bytes:
        assert self.index
        if number >= len(self.index.paths):
            raise Refusal(404, "there is no picture of this number.")
        path = self.index.root / self.index.paths[number]
        try:
            if path.stat().st_size <= LARGEST:
                return path.read_bytes()
        except OSError:
            raise Refusal(404, "this picture is not there any more.") from None
        raise Refusal(413, f"this picture is too large: at most {LARGEST >> 20} MB.")

    # ---------------------------------------------------------------- questions

    def receive(self, data: bytes) -> dict[str, Any]:
        """Keep a picture's file; the name by which questions call it."""
        key = hashlib.sha256(data).hexdigest()
        with self.lock:
            height, width = _decoded(data).shape[1:]
            _keep(self.files, key, data, PICTURES)
        return {"picture": key, "width": width, "height": height}

    def heat(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Cosine of every patch with every text: Predictor.heatmap before it is brought to the size of the picture."""
        texts = _texts(asked)
        with self.lock:
            start = time.perf_counter()
            answer, seen = self._look(asked, texts, ("{}",))
            maps = cosine_maps(seen, answer.question.classes.vectors, *seen.features.shape[-2:])
            return {"maps": packed(maps.cpu().numpy()), "texts": texts, **_told(seen, start)}

    def patches(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Every patch's feature in 8 bits, of which the length does not count, and its colour by the three main
        directions among them."""
        with self.lock:
            start = time.perf_counter()
            _, seen = self._look(asked, ["picture"], ("{}",))  # any text will do: what is read are the patches
            features = seen.features[0].flatten(1).T.cpu()
            eighths = (127 * features / features.abs().amax(1, keepdim=True).clamp_min(1e-12)).round().to(torch.int8)
            colours, shares = main_directions(features)
            return {"features": packed(eighths.numpy()), "colours": packed(colours.numpy()), "shares": shares,
                    **_told(seen, start)}  # fmt: skip

    def segment(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Best label and its score at every pixel of the picture with a long side of at most `SIDE`: Predictor.segment
        and scores. The page applies the rule for the background itself: pixels whose best score is lower."""
        labels = _texts(asked)
        seen: Dense | None = None
        with self.lock:
            start = time.perf_counter()
            if self._headed:  # a head reads the picture together with the words, at its own size
                answer = self.predictor.answer(_decoded(self._file(asked)), self.predictor.question(labels))
            else:
                answer, seen = self._look(asked, labels, None)
            scale = min(1.0, SIDE / max(answer.size))
            size = (max(1, round(answer.size[0] * scale)), max(1, round(answer.size[1] * scale)))
            answer = dataclasses.replace(answer, size=size)
            label, score = answer.labels().to(torch.uint8), (255 * answer.scores().amax(0)).round().to(torch.uint8)
            about = {"texts": labels, "colours": palette(len(labels)), "ruled": self._headed or len(labels) > 1}
            return {"label": packed(label.numpy()), "score": packed(score.numpy()), **about, **_told(seen, start)}

    def classify(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Predictor.classify, the best first."""
        labels = _texts(asked)
        with self.lock:
            start = time.perf_counter()
            scores = self.predictor.classify(_decoded(self._file(asked)), labels)[0]
            rows = [{"text": text, **score} for text, score in scores.items()]
            return {"scores": rows, "seconds": time.perf_counter() - start}

    def search(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The pictures of the folder that fit a text best, by number."""
        assert self.index
        text = _texts(asked)[0]
        with self.lock:
            start = time.perf_counter()
            hits = self.index.find(text, top=HITS)
            rows = [{"number": self.number[hit.path], "name": hit.path, "cosine": hit.cosine} for hit in hits]
            return {"hits": rows, "seconds": time.perf_counter() - start}

    # ---------------------------------------------------------------- one look at a picture

    @property
    def _headed(self) -> bool:
        return self.predictor.protocol("auto").merge == "sigmoid"

    def _file(self, asked: dict[str, Any]) -> bytes:
        key = asked.get("picture")
        if not isinstance(key, str) or key not in self.files:
            raise Refusal(410, "the demo does not hold this picture: send it again.")
        self.files.move_to_end(key)
        return self.files[key]

    def _look(self, asked: dict[str, Any], texts: list[str], templates: tuple[str, ...] | None) -> tuple[Answer, Dense]:
        """The picture's answer to the texts, and its patches, which are kept for the next question."""
        data, detail = self._file(asked), asked.get("detail", 1)
        if detail not in DETAILS or isinstance(detail, bool):
            raise Refusal(400, f"the detail is one of {', '.join(map(str, DETAILS))}.")
        question = self.predictor.question(texts, templates, self._protocol(detail))
        key = (asked["picture"], detail)
        if key not in self.looks:
            pixels = _decoded(data)
            self._check_grid(pixels, question.how)
            _keep(self.looks, key, self.predictor.answer(pixels, question), LOOKS)
        self.looks.move_to_end(key)
        answer = dataclasses.replace(self.looks[key], question=question)
        assert isinstance(answer.seen, Dense)
        return answer, answer.seen

    def _protocol(self, detail: int) -> Protocol:
        """The whole picture in one view, at so many times the model's own size."""
        size = self.predictor.model.config.preprocess.size
        return dataclasses.replace(self.predictor.protocol("whole-image"), short=detail * size)

    def _check_grid(self, pixels: Tensor, how: Protocol) -> None:
        config = self.predictor.model.config
        height, width = (side // config.image.patch for side in fit_size(pixels.shape[1], pixels.shape[2], how, config))
        if height * width > PATCHES:
            raise Refusal(
                400, f"at this detail the picture has {height} x {width} patches, more than {PATCHES:,}: take fewer."
            )


# ---------------------------------------------------------------- parts


def _texts(asked: dict[str, Any]) -> list[str]:
    texts = asked.get("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "the texts must be a list of texts.")
    texts = [text.strip() for text in texts]
    if not texts or not all(texts):
        raise Refusal(400, "write at least one text, and none that is empty.")
    if len(texts) > TEXTS or max(map(len, texts)) > CHARACTERS:
        raise Refusal(400, f"at most {TEXTS} texts at a time, of at most {CHARACTERS} characters each.")
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise Refusal(400, "a text holds half a character.")
    return texts


def _decoded(data: bytes, at_least: int = 0) -> Tensor:
    try:
        return decode(data, DataConfig().max_pixels, at_least)
    except BadSample as error:
        raise Refusal(400, f"this file cannot be read as a picture ({error.cause}).") from None


def _keep(held: OrderedDict[Any, V], key: Any, value: V, most: int) -> None:
    """Put it in as the newest, and let the oldest go."""
    held[key] = value
    held.move_to_end(key)
    while len(held) > most:
        held.popitem(last=False)


def _told(seen: Dense | None, start: float) -> dict[str, Any]:
    grid = list(seen.features.shape[-2:]) if seen else None
    return {"grid": grid, "seconds": time.perf_counter() - start}


def packed(array: np.ndarray) -> dict[str, Any]:
    """Any little array for the page: float32, uint8 or int8."""
    return {"shape": list(array.shape), "type": array.dtype.name, "data": base64.b64encode(array.tobytes()).decode()}


def main_directions(features: Tensor) -> tuple[Tensor, list[float]]:
    """Features [N, D] -> their place along the three directions in which they differ most, as colours uint8 [N, 3], and
    the share of the variance of each. A colour spans all but the outermost percent of the patches."""
    with torch.random.fork_rng(devices=[]):  # the search begins at random directions: the same each time
        torch.manual_seed(0)
        _, lengths, directions = torch.pca_lowrank(features, min(8, *features.shape), niter=10)
    centred = features - features.mean(0)
    along = F.pad(centred @ directions[:, :3], (0, max(0, 3 - len(lengths))))
    # a direction may point either way: the patch that is farthest out is bright
    farthest = along.gather(0, along.abs().argmax(0, keepdim=True))
    along = along * torch.where(farthest < 0, -1.0, 1.0)
    low, high = along.quantile(0.01, 0), along.quantile(0.99, 0)
    colours = (255 * (along - low) / (high - low).clamp_min(1e-12)).clamp(0, 255).round().to(torch.uint8)
    return colours, (along.square().sum(0) / centred.square().sum().clamp_min(1e-12)).tolist()


@cache
def _drawn(number: int) -> bytes:
    buffer = io.BytesIO()
    draw(EXAMPLES[number]).save(buffer, "PNG")
    return buffer.getvalue()


def example(number: int) -> Reply:
    if number >= len(EXAMPLES):
        raise Refusal(404, "there is no example of this number.")
    return Reply(_drawn(number), "image/png")


@cache
def page(name: str) -> Reply:
    """The page, which allows itself its own script and style, known by their sums, and nothing from elsewhere."""
    text = template("demo.html").render(model=name)

    def sums(tag: str) -> str:
        inner = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in inner)

    policy = (
        f"default-src 'none'; script-src {sums('script')}; style-src {sums('style')}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Reply(text.encode(), "text/html; charset=utf-8", policy)


# ---------------------------------------------------------------- the command


def serve(
    target: str, host: str = "127.0.0.1", port: int = 7860, pictures: Path | None = None, show: bool = False,
    device: str = "auto",
) -> None:  # fmt: skip
    """Answer in the browser until SIGINT or SIGTERM. ValueError for a model, folder, address or device that is none."""
    with Server(host, port) as server:
        model = load(target).to(pick_device(device))
        demo = Demo(model, target, Index.of(model, pictures) if pictures else None)
        server.routes = demo.routes()
        if host.lower() not in LOCAL:
            may = "use the demo and see the pictures of the folder" if pictures else "use the demo"
            print(f"Warning: whoever reaches {host} can {may}; there is no password.", file=sys.stderr)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # how containers and service managers end it
        print(f"{server.url}   shows what {target} sees; Ctrl-C ends it", flush=True)
        try:
            if show:
                webbrowser.open(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nThe demo has ended.")
        finally:
            signal.signal(signal.SIGTERM, before)
    # a thread in the middle of an answer would be cut off by the end of the interpreter, which PyTorch takes badly
    demo.lock.acquire(timeout=10)
