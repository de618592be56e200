"""Small real things for the tests: drawn pictures with captions, where real photographs lie if they are here, and
open_clip and timm where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image, ImageDraw

from silc import recipes
from silc.config import Config

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "triangle")
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def make_torchvision_importable() -> None:
    """The registry's torchvision is built for CUDA: beside a CPU torch its operators are missing, and it, and with it
    transformers, cannot be imported because it describes two of them. Declare those; nothing here calls them."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


make_torchvision_importable()


def draw(colour: str, shape: str, shade: int, size: tuple[int, int] = (56, 48)) -> Image.Image:
    image = Image.new("RGB", size, (shade, shade, 255 - shade))
    pen, box = ImageDraw.Draw(image), (12, 8, 44, 40)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(12, 40), (44, 40), (28, 8)], fill=COLOURS[colour])
    return image


def write_pairs(folder: Path, copies: int = 5) -> Path:
    """12 * copies drawings and captions.jsonl with two captions each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
        for copy in range(copies):
            name = f"{colour}-{shape}-{copy}.png"
            draw(colour, shape, (i * 37 + copy * 53) % 200).save(folder / name)
            rows.append({"image": name, "caption": [f"a {colour} {shape}", f"drawing of a {shape} in {colour}"]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def at_mu_size(name: str, global_size: int, local_size: int) -> Config:
    """A recipe with the towers and prototypes of `mu`, small views, and every term on from the first step."""
    recipe, small = recipes.get(name), recipes.mu()
    o = replace(recipe.objective, prototypes=small.objective.prototypes)
    o = replace(o, distill=replace(o.distill, start=0.0), masked=replace(o.masked, start=0.0))
    model = replace(small.model, scale_init=recipe.model.scale_init, bias_init=recipe.model.bias_init)
    model = replace(model, preprocess=replace(model.preprocess, size=global_size))
    views = replace(recipe.views, global_size=global_size, local_size=local_size, photometric="none")
    return replace(small, model=model, objective=o, views=views, train=replace(small.train, batch=4))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The folder of real photographs, from SILC_TEST_DATA; skips where it is missing."""
    folder = Path(os.environ.get("SILC_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real photographs at {folder}: set SILC_TEST_DATA to a folder with caltech101, camvid, coco128")
    return folder


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    return peer("open_clip")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return peer("timm")


def peer(name: str) -> ModuleType:
    module: ModuleType = pytest.importorskip(name, reason=f"{name} is not installed: pip install 'silc[dev]'")
    return module
