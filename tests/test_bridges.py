"""A silc model behind open_clip's interface, and in CLIP_benchmark's own evaluation.

Gives: equality with our own embeddings and scores.
Used by: pytest. CLIP_benchmark's part skips where it is not installed.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import COLOURS, SHAPES, draw
from PIL import Image
from test_loop import command
from torch.utils.data import DataLoader

import silc
from silc.bridges import as_open_clip, load_silc, register
from silc.cli import main
from silc.eval import zeroshot
from silc.eval.prompts import class_embeddings


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Path:
    out = tmp_path_factory.mktemp("bridged") / "run"
    bias = ["--model.bias-init", "-2"] if request.param == "sigmoid" else []
    main(command(pairs, out, "--objective.kind", request.param, *bias))
    return out


@torch.no_grad()
def test_a_script_for_open_clip_gets_our_numbers(run: Path) -> None:
    ours = silc.load(run)
    model, preprocess, tokenizer = load_silc("any", str(run))
    picture, texts = draw("red", "circle", 40, (90, 50)), ["a red circle", "a blue square, with many more words"]
    pixels, ids = preprocess(picture)[None], tokenizer(texts)
    assert torch.equal(ids, ours.token_ids(texts)) and torch.equal(tokenizer(texts[0], 77), ids[:1])
    image, text = ours.encode_image(pixels), ours.encode_text(texts)
    torch.testing.assert_close(F.normalize(model.encode_image(pixels), dim=-1), image)
    torch.testing.assert_close(model.encode_text(ids, normalize=True), text)
    features = model(pixels, ids)
    assert len(features) == (3 if ours.bias is None else 4)
    by_hand = features[2] * features[0] @ features[1].T + (0 if ours.bias is None else features[3])
    torch.testing.assert_close(by_hand, ours.logits(image, text))
    torch.testing.assert_close(model.get_logits(pixels, ids)[0], by_hand)
    assert model.visual.image_size == (32, 32) and model.context_length == ids.shape[1]
    scores = silc.Predictor(ours).classify(picture, texts, ("{}",))[0]
    assert scores[texts[0]]["cosine"] == pytest.approx((image @ text.T)[0, 0].item(), abs=1e-5)
    again = pickle.loads(pickle.dumps(preprocess))  # as a DataLoader's workers get it
    assert torch.equal(again(picture), preprocess(picture))


def test_registering_adds_a_type_that_the_command_line_offers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the two names of CLIP_benchmark 1.6.2 that its command line and loader read."""
    models = SimpleNamespace(TYPE2FUNC={"open_clip": None}, MODEL_TYPES=["open_clip"])
    package = ModuleType("clip_benchmark")
    package.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clip_benchmark", package)
    register()
    register()
    assert models.MODEL_TYPES == ["open_clip", "silc"]
    model, _, _ = models.TYPE2FUNC["silc"](model_name="silc", pretrained=str(run), cache_dir=None, device="cpu")
    assert not model.training


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(ValueError, match="pip install clip-benchmark"):
        register()


class Classes(list[tuple[torch.Tensor, int]]):
    classes = sorted(SHAPES)


def test_clip_benchmark_gives_our_zero_shot_score(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("clip_benchmark", reason="CLIP_benchmark is not installed", exc_type=ImportError)
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", exc_type=ImportError)
    for shape in SHAPES:
        (tmp_path / shape).mkdir()
        for i, colour in enumerate(COLOURS):
            draw(colour, shape, 40 * i).save(tmp_path / shape / f"{colour}.png")
    model, preprocess, tokenizer = as_open_clip(silc.load(run))
    files = sorted(tmp_path.rglob("*.png"))
    labels = [sorted(SHAPES).index(file.parent.name) for file in files]
    rows = [(preprocess(Image.open(file)), label) for file, label in zip(files, labels)]
    loader = DataLoader(Classes(rows), batch_size=5)
    # its `evaluate` goes on to a float() of an array that NumPy 2.4 refuses; these two are all of it before that
    classifier = theirs.zero_shot_classifier(model, tokenizer, sorted(SHAPES), ["a {c}"], "cpu", amp=False)
    logits, target = theirs.run_classification(model, classifier, loader, "cpu", amp=False)
    ours = zeroshot.run(silc.load(run), tmp_path, zeroshot.Config(templates=("a {}",)))
    assert (logits.argmax(1) == target).float().mean().item() == pytest.approx(ours.metrics["top1"], abs=1e-6)


def test_class_embeddings_agree_with_plain_means(run: Path) -> None:
    """What CLIP_benchmark does by hand for a class: mean of unit vectors, made unit again."""
    model, _, tokenizer = as_open_clip(silc.load(run))
    templates = ("a {}", "a drawing of a {}")
    each = model.encode_text(tokenizer([t.format("circle") for t in templates]), normalize=True)
    mean = F.normalize(each.mean(0), dim=-1)
    torch.testing.assert_close(class_embeddings(silc.load(run), [["circle"]], templates).vectors[0], mean)
