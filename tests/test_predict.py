"""Predictions: a model folder opens, pictures of every form give one answer, maps lie where the objects lie.

Gives: tests of silc.predict.
Used by: pytest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import silc
from silc import predict
from silc.app import overlays
from silc.config import ImageTowerConfig, ModelConfig, PreprocessConfig, TextTowerConfig
from silc.data.tokenizer import byte_tokenizer
from silc.eval.protocols import Protocol
from silc.model.silc import Silc


class Channels(nn.Module):
    """Sees red, green and blue as three axes, and reads these words."""

    def __init__(self, bias: Tensor | None = None) -> None:
        super().__init__()
        self.config = ModelConfig(image=ImageTowerConfig(image_size=32, patch=8), preprocess=PreprocessConfig(size=32))
        self.device, self.scale, self.bias = torch.device("cpu"), torch.tensor([10.0]), bias

    def encode_image(self, pixels: Tensor) -> Tensor:
        return F.normalize(pixels.mean((2, 3)) + 1, dim=1)

    def encode_dense(self, pixels: Tensor, readout: str = "auto") -> Tensor:
        return F.normalize(F.avg_pool2d(pixels, 8) + 1.001, dim=1)

    def encode_text(self, texts: list[str]) -> Tensor:
        words = ["red", "green", "blue"]
        return torch.stack([F.normalize(torch.tensor([float(w in t) for w in words]) + 1e-3, dim=0) for t in texts])


@pytest.fixture
def picture() -> np.ndarray:
    """[60, 100, 3]: red on the left, blue on the right."""
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[:, :50, 0], pixels[:, 50:, 2] = 250, 250
    return pixels


# ---------------------------------------------------------------- load


def tiny(folder: Path, vocab: int) -> Silc:
    model = Silc(ModelConfig(
        image=ImageTowerConfig(image_size=32, patch=8, width=16, depth=1, heads=2, mlp=16),
        text=TextTowerConfig(vocab=vocab, length=12, width=16, depth=1, heads=2, mlp=16),
        preprocess=PreprocessConfig(size=32), embed_dim=16,
    ))
    model.save(folder)
    return model


def test_load_opens_a_run_and_an_export_with_its_tokenizer(tmp_path, picture):
    tokenizer = byte_tokenizer(12)
    model = tiny(tmp_path / "run" / "export", tokenizer.vocab)
    tokenizer.save(tmp_path / "run" / "export")
    (tmp_path / "run" / "config.json").write_text("{}")
    for folder in (tmp_path / "run", str(tmp_path / "run" / "export")):
        opened = silc.load(folder)
        assert not opened.training
        model.tokenizer = tokenizer
        torch.testing.assert_close(opened.encode_text(["a cat"]), model.eval().encode_text(["a cat"]))
        heat = predict.Predictor(opened).heatmap(picture, ["a cat", "a dog"])
        assert heat.shape == (2, 60, 100) and heat.abs().max() <= 1.0001 and heat.std() > 0


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        silc.load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no config\.json"):
        silc.load(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="no `export` folder yet"):
        silc.load(tmp_path)
    tiny(tmp_path / "small", 10)
    byte_tokenizer(12).save(tmp_path / "small")
    with pytest.raises(ValueError, match="do not belong together"):
        silc.load(tmp_path / "small")


# ---------------------------------------------------------------- pictures


def test_every_form_of_a_picture_is_the_same(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "p.png")
    expected = torch.from_numpy(picture).permute(2, 0, 1)
    for form in (tmp_path / "p.png", str(tmp_path / "p.png"), Image.fromarray(picture), picture, expected):
        assert torch.equal(predict.as_image(form), expected)
    assert torch.equal(predict.as_image(picture[..., 0]), expected[:1].expand(3, -1, -1))
    clear = Image.new("RGBA", (4, 3), (255, 0, 0, 0))
    assert (predict.as_image(clear) == 255).all() and predict.as_image(clear).shape == (3, 3, 4)
    assert predict.as_image(Image.new("CMYK", (4, 3))).shape == (3, 3, 4)


@pytest.mark.parametrize("wrong", [
    np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), torch.zeros(4, 4, 3).byte(), torch.zeros(3, 4, 4),
    np.zeros((0, 4, 3), np.uint8), np.zeros(4, np.uint8),
])
def test_what_is_no_picture_is_refused(wrong):
    with pytest.raises(ValueError, match="must be uint8"):
        predict.as_image(wrong)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "p.png").write_text("hello")
    for name in ("p.png", "none.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            predict.as_image(tmp_path / name)


# ---------------------------------------------------------------- answers


def test_classify_sorts_and_gives_probabilities(picture):
    red = picture.copy()
    red[:] = (250, 0, 0)
    for answer in predict.Predictor(Channels(), batch=2).classify([red] * 3, ["blue", "red", "green"]):
        assert next(iter(answer)) == "red" and answer["red"]["cosine"] > 0.99
        logits = torch.tensor([10 * score["cosine"] for score in answer.values()])
        torch.testing.assert_close(torch.tensor([s["probability"] for s in answer.values()]), logits.softmax(0))
    alone = predict.Predictor(Channels(torch.tensor([-5.0]))).classify(red, ["red"])[0]["red"]
    assert alone["probability"] == pytest.approx(1 / (1 + np.exp(5 - 10 * alone["cosine"])), rel=1e-4)


@pytest.mark.parametrize("how", ["whole-image", Protocol("slide", short=48, window=32, stride=16)])
def test_maps_lie_where_the_objects_lie(picture, how):
    predictor = predict.Predictor(Channels())
    red, blue = predictor.heatmap(picture, ["red", "blue"], how=how)
    assert red.shape == (60, 100)
    assert red[:, :40].min() > red[:, 60:].max() and blue[:, 60:].min() > blue[:, :40].max()
    label = predictor.segment(picture, ["green", "blue", "red"], how=how)
    assert label.dtype == torch.int64 and label.shape == (60, 100)
    assert (label[:, :40] == 2).all() and (label[:, 60:] == 1).all()


def test_segment_background_takes_what_nothing_fits(picture):
    picture[:, :50] = 128
    label = predict.Predictor(Channels()).segment(picture, ["nothing", "blue", "red"], background=0.9)
    assert (label[:, :40] == 0).all() and (label[:, 60:] == 1).all()
    with pytest.raises(ValueError, match="two foreground"):
        predict.Predictor(Channels()).segment(picture, ["nothing", "blue"], background=0.9)


@pytest.mark.parametrize("how", [
    Protocol("whole", merge="none"), Protocol("slide", short=48, window=32, stride=16),
    Protocol("soft", short=48, window=32, stride=16, merge="probability", scale=3.0),
])
def test_label_map_and_scores_are_read_from_one_look(picture, how):
    model, names, calls = Channels(), ["green", "blue", "red"], []
    for name in ("encode_text", "encode_dense"):
        method = getattr(model, name)
        setattr(model, name, lambda *given, name=name, method=method: calls.append(name) or method(*given))
    predictor = predict.Predictor(model)
    question = predictor.question(names, how=how)
    answers = [predictor.answer(one, question) for one in (picture, picture[:, ::-1])]
    seen = calls.count("encode_dense")
    labels, scores = answers[0].labels(), answers[0].scores()
    answers[1].labels()
    assert calls.count("encode_text") == 1 and calls.count("encode_dense") == seen
    assert torch.equal(labels, predictor.segment(picture, names, how=how))
    assert torch.equal(scores, predictor.scores(picture, names, how=how)) and not scores.is_inference()
    torch.testing.assert_close(scores.sum(0), torch.ones(60, 100))
    assert torch.equal(scores.argmax(0), labels)
    assert answers[0].scores((6, 10)).shape == (3, 6, 10)


@pytest.mark.parametrize("texts", [[], ["a", "a"], [" "], "red"])
def test_texts_are_checked(picture, texts):
    with pytest.raises(ValueError, match="text"):
        predict.Predictor(Channels()).heatmap(picture, texts)


def test_overlays_show_what_was_found(picture):
    predictor = predict.Predictor(Channels())
    texts = ["red", "blue", "a very long text that will not fit over its picture in any case at all"]
    maps = predictor.heatmap(picture, texts)
    sheet = np.asarray(overlays.overlay_heatmap(picture, maps, texts, columns=2)).astype(int)
    assert sheet.shape[2] == 3
    # second panel, the map of `red`: brighter on its left half
    middle, half = sheet.shape[0] // 4 + 12, sheet.shape[1] // 2
    assert sheet[middle, half + 40].sum() > sheet[middle, -60].sum() + 100
    label = predictor.segment(picture, ["green", "blue", "red"])
    palette = [[0, 255, 0], [0, 0, 255], [255, 0, 0]]
    drawn = np.asarray(overlays.overlay_labels(picture, label, ["green", "blue", "red"], palette))
    found = {tuple(c) for c in drawn.reshape(-1, 3).tolist()}
    assert (0, 0, 255) in found and (255, 0, 0) in found and (0, 255, 0) not in found, "the legend has what occurs"
    assert len({overlays._colour(i) for i in range(200)}) > 190
