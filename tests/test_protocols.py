"""Segmentation protocols and dense read-outs against the same thing written out plainly, whole arrays at a time.

Gives: tests of silc.eval.protocols, silc.eval.segment and ImageTower.dense.
Used by: pytest.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from known import COLOURS, NAMES, Headed, Mute, Oracle, save
from PIL import Image
from torch import Tensor

from silc.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from silc.eval import metrics, protocols, segment
from silc.eval.prompts import ClassEmbeddings
from silc.model.silc import Silc

PATCH, WIDTH, HEADS = 4, 24, 3


def tiny(pool: str) -> Silc:
    torch.manual_seed(1)
    image = ImageTowerConfig(image_size=16, patch=PATCH, width=WIDTH, depth=3, heads=HEADS, mlp=32, pool=pool,
                             pre_norm=pool == "cls", proj="none" if pool == "map" else "linear")
    text = TextTowerConfig(vocab=20, length=4, width=8, depth=1, heads=1, mlp=8)
    model = Silc(ModelConfig(image=image, text=text, embed_dim=WIDTH)).double().eval()
    for parameter in model.parameters():  # biases and norms must matter, too
        torch.nn.init.normal_(parameter, std=0.3)
    return model


# ---------------------------------------------------------------- read-outs


def weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    scores = np.exp(q @ k.T / math.sqrt(q.shape[1]))
    return scores / scores.sum(1, keepdims=True)


def linear(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + (0 if layer.bias is None else layer.bias.detach().numpy())


def module(layer: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    return layer(torch.from_numpy(x)).detach().numpy()


def attended(attention: torch.nn.Module, x: np.ndarray, kind: str) -> np.ndarray:
    """Attention of one picture's tokens [N, D] with an explicit N x N matrix for each head."""
    q, k, v = (linear(layer, x) for layer in (attention.q, attention.k, attention.v))
    size, mixed = WIDTH // HEADS, []
    for head in range(HEADS):
        part = np.s_[:, head * size : (head + 1) * size]
        matrix = {"tokens": lambda q, k: weights(q, k), "value": lambda q, k: np.eye(len(q)),
                  "sclip": lambda q, k: weights(q, q) + weights(k, k), "clearclip": lambda q, k: weights(q, q)}[kind]
        mixed.append(matrix(q[part], k[part]) @ v[part])
    return linear(attention.out, np.concatenate(mixed, 1))


def one_hot_head(head: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    """MAP head of one picture's tokens [N, D], its attention one-hot on each token in turn: a whole head each time."""
    found = []
    for i in range(len(x)):
        matrix = np.zeros((1, len(x)))
        matrix[0, i] = 1
        values, size = linear(head.attention.v, x), WIDTH // HEADS
        heads = [matrix @ values[:, h * size : (h + 1) * size] for h in range(HEADS)]
        mixed = linear(head.attention.out, np.concatenate(heads, 1))
        found.append(mixed + module(head.mlp, module(head.norm, mixed)))
    return np.concatenate(found)


def plain_dense(model: Silc, picture: Tensor, kind: str) -> np.ndarray:
    """[3, H, W] -> [E, h, w]."""
    tower = model.image
    x = tower.embed(picture[None])[0].detach().numpy()
    for number, block in enumerate(tower.blocks):
        last = number == len(tower.blocks) - 1
        mixed = attended(block.attention, module(block.norm1, x), kind if last else "tokens")
        if last and kind == "clearclip":
            x = mixed
        else:
            x = x + mixed
            x = x + module(block.mlp, module(block.norm2, x))
    x = module(tower.norm, x)
    x = x[1:] if tower.config.pool == "cls" else x
    x = one_hot_head(tower.head, x) if tower.config.pool == "map" else x
    return module(tower.proj, x).T.reshape(WIDTH, picture.shape[1] // PATCH, picture.shape[2] // PATCH)


@pytest.mark.parametrize("kind", ["tokens", "value", "sclip", "clearclip"])
@pytest.mark.parametrize("pool", ["cls", "map", "mean"])
def test_readouts_are_the_explicit_attention_matrices(pool: str, kind: str) -> None:
    model = tiny(pool)
    pixels = torch.randn(3, 3, 12, 20, dtype=torch.float64)
    expected = np.stack([plain_dense(model, picture, kind) for picture in pixels])
    found = model.image.dense(pixels, kind).detach().numpy()  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    if kind != "tokens":
        assert np.abs(found - model.image.dense(pixels, "tokens").detach().numpy()).max() > 0.1
    single = model.float().image.dense(pixels.float(), kind).detach().numpy()  # type: ignore[arg-type]
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-4)


def test_a_readout_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no dense read-out 'clear_clip'.*'clearclip'"):
        tiny("cls").encode_dense(torch.zeros(1, 3, 8, 8, dtype=torch.float64), "clear_clip")  # type: ignore[arg-type]


@torch.no_grad()
def test_windows_of_several_pictures_go_through_together_and_come_back_apart() -> None:
    model, how = tiny("cls").float(), protocols.Protocol("t", window=8, stride=4, readout="sclip", scale=3.0)
    pixels = torch.randn(2, 3, 12, 18)
    for batch in (1, 3, 100):
        for picture, dense in zip(pixels, protocols.encode(model, pixels, how, batch), strict=True):
            assert dense.boxes == protocols.windows(12, 18, how) and dense.scale == 3
            for (top, left, h, w), features in zip(dense.boxes, dense.features, strict=True):
                alone = model.encode_dense(picture[None, :, top : top + h, left : left + w], "sclip")[0]
                assert torch.allclose(features, alone, atol=1e-5)


# ---------------------------------------------------------------- label maps


def up(maps: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]


def plain_scores(dense: protocols.Dense, vectors: Tensor, height: int, width: int, softmax: float | None) -> Tensor:
    """[T, height, width] at once: every window to its pixels, softmax over all names or none, the mean, to size."""
    total, seen = torch.zeros(len(vectors), *dense.size).double(), torch.zeros(dense.size).double()
    for features, (top, left, h, w) in zip(dense.features.double(), dense.boxes):
        scores = up(torch.einsum("dij,td->tij", features, vectors.double()), h, w)
        total[:, top : top + h, left : left + w] += scores if softmax is None else (scores * softmax).softmax(0)
        seen[top : top + h, left : left + w] += 1
    return up(total / seen, height, width)


def by_class(scores: Tensor, owner: Tensor, classes: int) -> Tensor:
    """Best name of each class: [C, height, width]; 0 for a class without a name."""
    return torch.stack([scores[owner == c].amax(0) if (owner == c).any() else torch.zeros_like(scores[0])
                        for c in range(classes)])


def scene(merge: protocols.Merge, scale: float = 1.0) -> tuple[protocols.Dense, ClassEmbeddings]:
    """Random features of six overlapping windows, and nine names of six classes."""
    generator = torch.Generator().manual_seed(3)
    boxes = protocols.windows(24, 35, protocols.Protocol("t", window=16, stride=12))
    features = F.normalize(torch.randn(len(boxes), 5, 4, 4, generator=generator), dim=1)
    owner = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5])
    vectors = F.normalize(torch.randn(len(owner), 5, generator=generator), dim=1)
    return protocols.Dense(features, boxes, (24, 35), merge, scale), ClassEmbeddings(vectors, owner, 6)


def same(found: Tensor, expected: Tensor) -> bool:
    """But for ties in float32."""
    return (found == expected).double().mean().item() > 0.999


@pytest.mark.parametrize("parts", [1, 3, 9])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_probabilities_in_two_passes_are_the_softmax_over_all_names(parts, scale, monkeypatch) -> None:
    dense, names = scene("probability", scale)
    monkeypatch.setattr(protocols, "PIXELS_AT_ONCE", 40 * 50 * -(-9 // parts))
    expected = plain_scores(dense, names.vectors, 40, 50, scale)
    totals = protocols.softmax_totals(dense, names.vectors)
    maps = torch.cat([protocols.probability_maps(dense, v, 40, 50, totals) for v in names.vectors.split(2)])
    assert torch.allclose(maps.double(), expected, atol=1e-6) and torch.allclose(maps.sum(0), torch.ones(40, 50))
    label = expected.argmax(0)
    assert same(protocols.label_map(dense, names, 40, 50), names.owner[label])
    averaged = plain_scores(dense, names.vectors, 40, 50, None).argmax(0)
    assert scale < 2 or not same(names.owner[averaged], names.owner[label]), "averaging cosines is another protocol"
    threshold = expected.amax(0).median().item() + 1e-4
    floored = torch.where(expected.amax(0) < threshold, 0, names.owner[label])
    assert same(protocols.label_map(dense, names, 40, 50, threshold, 123.0), floored), "the merged probability counts"


@pytest.mark.parametrize("merge", ["cosine", "probability"])
def test_no_map_of_all_names_ever_exists(merge, monkeypatch) -> None:
    dense = scene(merge)[0]
    names = ClassEmbeddings(F.normalize(torch.randn(847, 5), dim=1), torch.arange(847), 847)
    sizes: list[int] = []
    original = F.interpolate

    def spy(maps: Tensor, size: tuple[int, int], **how: object) -> Tensor:
        sizes.append(maps.shape[1] * size[0] * size[1])
        return original(maps, size, **how)

    monkeypatch.setattr(F, "interpolate", spy)
    monkeypatch.setattr(protocols, "PIXELS_AT_ONCE", 20 * 40 * 50)
    label = protocols.label_map(dense, names, 40, 50, 0.5, 10.0, 0.01)
    assert label.shape == (40, 50) and sizes and max(sizes) <= 20 * 40 * 50


def sclip_labels(scores: Tensor, scale: float, owner: Tensor, classes: int, floor: float, area: float) -> Tensor:
    """The last steps of SCLIP's code: softmax over names, best name, small classes to zero, the floor."""
    probability = by_class((scores * scale).softmax(0), owner, classes)
    if area:
        one_hot = F.one_hot(probability.argmax(0), classes).double()
        share = one_hot[..., 1:].sum((0, 1))
        probability[1:] *= (share > area * share.sum()).double()[:, None, None]
    label = probability.argmax(0)
    label[probability.amax(0) < floor] = 0
    return label


@pytest.mark.parametrize("area", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.4])
def test_floor_and_area_are_sclips(floor: float, area: float) -> None:
    dense, names = scene("cosine")
    scores = plain_scores(dense, names.vectors, 40, 50, None)
    expected = sclip_labels(scores, 5.0, names.owner, 6, floor, area)
    assert same(protocols.label_map(dense, names, 40, 50, floor or None, 5.0, area), expected)
    left = sclip_labels(scores, 5.0, names.owner, 6, 0, area).unique().tolist()
    assert len(left) == {0.0: 6, 0.15: 4, 0.5: 1, 1.0: 1}[area] or (area == 0.15 and 1 < len(left) < 6)


def test_a_constant_score_beats_what_nothing_fits_and_synonyms_count_by_their_best() -> None:
    dense, names = scene("cosine")
    kept = names.owner > 0
    fewer = ClassEmbeddings(names.vectors[kept], names.owner[kept], 6)
    probability = (plain_scores(dense, fewer.vectors, 40, 50, None) * 4).softmax(0)
    expected = by_class(probability, fewer.owner, 6).argmax(0)
    expected[probability.amax(0) < 0.3] = 0
    assert 0.1 < (expected == 0).double().mean() < 0.9
    assert same(protocols.label_map(dense, fewer, 40, 50, 0.3, 4.0), expected)


def test_one_window_goes_through_its_pixels_and_a_whole_picture_does_not() -> None:
    features = F.normalize(torch.randn(1, 5, 4, 6), dim=1)
    vectors = F.normalize(torch.randn(3, 5), dim=1)
    low, box = torch.einsum("ndij,td->tij", features, vectors), [(0, 0, 16, 24)]
    stepped = protocols.cosine_maps(protocols.Dense(features, box, (16, 24), "cosine"), vectors, 30, 40)
    once = protocols.cosine_maps(protocols.Dense(features, box, (16, 24), "none"), vectors, 30, 40)
    assert torch.allclose(stepped, up(up(low, 16, 24), 30, 40), atol=1e-6)
    assert torch.allclose(once, up(low, 30, 40), atol=1e-6) and not torch.allclose(once, stepped, atol=1e-3)


# ---------------------------------------------------------------- the names


def test_protocols_are_what_their_papers_and_code_say() -> None:
    facts = {how.name: (how.short, how.window, how.stride, len(how.templates), how.readout, how.merge, how.scale)
             for how in protocols.PROTOCOLS}
    assert facts == {
        "whole-image": (0, 0, 0, 0, "auto", "none", None),
        "tcl": (448, 448, 224, 9, "auto", "cosine", None),
        "tips": (448, 448, 336, 9, "value", "probability", 1.0),
        "maskclip": (512, 0, 0, 85, "value", "cosine", 100.0),
        "sclip": (336, 224, 112, 80, "sclip", "cosine", 40.0),
        "clearclip": (448, 448, 224, 80, "clearclip", "cosine", 50.0),
        "catseg": (640, 384, 256, 1, "catseg", "sigmoid", None),
    }
    assert all(t.count("{}") == 1 for how in protocols.PROTOCOLS for t in how.templates)
    assert [how.name for how in protocols.PROTOCOLS if how.background is not None] == ["tcl"]


def test_a_set_changes_what_the_authors_changed_for_it() -> None:
    sclip = protocols.protocol("sclip")
    assert protocols.protocol("sclip", "ade150") == sclip and (sclip.floor, sclip.area) == (0, 0)
    assert protocols.protocol("sclip", "cityscapes") == dataclasses.replace(sclip, short=560)
    assert protocols.protocol("sclip", "coco-stuff") == dataclasses.replace(sclip, short=448)
    assert protocols.protocol("sclip", "voc21") == dataclasses.replace(sclip, scale=65.0, floor=0.1, area=0.1)
    assert protocols.protocol("clearclip", "cityscapes").window == 224
    known = {how.name for how in protocols.PROTOCOLS}
    fields = {field.name for field in dataclasses.fields(protocols.Protocol)}
    assert all(name in known and set(changed) <= fields for (name, _), changed in protocols.VARIANTS.items())
    context = protocols.protocol("maskclip", "context59")
    assert protocols.fit_size(400, 500, context, ModelConfig()) == (416, 512), "a long side of 520, on patches of 16"


def test_what_does_not_fit_is_said_in_a_sentence() -> None:
    model = tiny("cls").float()
    pixels = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="'clearclip'"):
        protocols.protocol("clear-clip")
    with pytest.raises(ValueError, match="window of 18 px is no multiple of the model's patch, 4 px; take whole-image"):
        protocols.encode(model, pixels, protocols.Protocol("odd", window=18, stride=9))
    with pytest.raises(ValueError, match="`merge` must be cosine or probability"):
        protocols.encode(model, pixels, protocols.Protocol("odd", window=8, stride=4, merge="none"))


# ---------------------------------------------------------------- the task


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Pictures whose short side is two stripes: at 336, 448 and 512 px every edge lies between patches of 8."""
    for i, stripes in enumerate([(0, 1, 0, 2, 0, 6), (3, 5, 0, 4), (0, 0, 5, 5, 0)]):
        labels = np.repeat(np.repeat(np.array(stripes)[None], 32, 0), 16, 1)
        labels = labels.T if i == 2 else labels
        save(tmp_path / f"set/images/p{i}.png", COLOURS[labels])
        save(tmp_path / f"set/masks/p{i}.png", labels)
    describe(tmp_path / "set")
    return tmp_path / "set"


def describe(folder: Path, **about: object) -> None:
    classes = [[name] for name in NAMES[:7]]
    (folder / "classes.json").write_text(json.dumps({"classes": classes, "background": False, "void": 255, **about}))


@pytest.mark.parametrize("how", [how.name for how in protocols.PROTOCOLS if how.merge != "sigmoid"])
@pytest.mark.parametrize("background", [False, True])
def test_who_knows_scores_100_and_who_knows_nothing_at_chance(halves: Path, how: str, background: bool) -> None:
    describe(halves, background=background)
    cfg = segment.Config(protocol=how)
    known, mute = segment.run(Oracle(), halves, cfg), segment.run(Mute(), halves, cfg)
    if (how, background) == ("tcl", True):  # between an object and the rest the object's probability outweighs
        assert known.metrics["miou"] > 0.9
    else:
        assert known.metrics == {"miou": 1.0, "pixel_accuracy": 1.0}
        assert known.details["worst"] == [] and known.details["interval"]["miou"] == (1.0, 1.0)
    assert mute.metrics == pytest.approx(mute.chance), "black, the most frequent, is the first of equals"
    said = known.details["protocol"]
    assert said == dataclasses.asdict(protocols.protocol(how)) | {
        "templates": tuple(known.details["templates"]), "scale": said["scale"]}
    assert said["scale"] == (protocols.protocol(how).scale or 100.0)


def test_who_has_a_head_and_knows_scores_nearly_100(halves: Path) -> None:
    for background in (False, True):
        describe(halves, background=background)
        found = segment.run(Headed(), halves, segment.Config())
        assert found.details["protocol"]["name"] == "catseg"
        # 53 px do not fall on the stripes' edges
        assert found.metrics["pixel_accuracy"] > 0.8 and found.metrics["miou"] > 0.6


def test_every_readout_reaches_the_model(halves: Path) -> None:
    class Notes(Oracle):
        def encode_dense(self, pixels: Tensor, readout: str = "auto") -> Tensor:
            asked.append(readout)
            return super().encode_dense(pixels, readout)

    for how in protocols.PROTOCOLS:
        asked: list[str] = []
        model = Notes() if how.merge != "sigmoid" else type("Both", (Notes, Headed), {})()
        segment.run(model, halves, segment.Config(protocol=how.name))
        assert set(asked) == {how.readout}


def test_scores_and_lists_against_plain_counting(halves: Path, tmp_path: Path) -> None:
    """A model that takes cyan for green: everything a result tells is counted again from the label maps it wrote."""
    class Blind(Oracle):
        def axes(self, colours: Tensor) -> Tensor:
            found = super().axes(colours)
            found[..., 2] += found[..., 6]
            found[..., 6] = 0
            return found

    masks = [np.array(Image.open(halves / f"masks/p{i}.png")) for i in range(3)]
    masks[0][:9, :40] = 255
    save(halves / "masks/p0.png", masks[0])
    result = segment.run(Blind(), halves, segment.Config(pictures=tmp_path / "out", examples=2, worst=2))
    details = result.details
    assert [p["index"] for p in details["pictures"]] == [0, 1]
    labels = [np.array(Image.open(path)) for path in sorted((tmp_path / "out").glob("*.png"))]
    assert len(labels) == 2, "the worst picture is among the examples and is written once"
    labels.append(masks[2])
    truth, said = (np.concatenate([a[m != 255] for a, m in zip(x, masks)]) for x in (masks, labels))
    union = [((truth == c) | (said == c)).sum() for c in range(7)]
    hit = [((truth == c) & (said == c)).sum() for c in range(7)]
    ious = [h / u if u else None for h, u in zip(hit, union)]
    assert [row["iou"] for row in details["per_class"]] == pytest.approx(ious) and ious[6] == 0 and 0 < ious[2] < 1
    assert result.metrics["miou"] == pytest.approx(np.mean([v for v in ious if v is not None]))
    assert [row["accuracy"] for row in details["per_class"]] == [1.0] * 6 + [0.0]
    assert [row["pixels"] for row in details["per_class"]] == [int((truth == c).sum()) for c in range(7)]
    assert [row["predicted"] for row in details["per_class"]] == [int((said == c).sum()) for c in range(7)]
    listed = {(t, p): n for t, p, n in details["confusion"]["most"]}
    assert listed == {(t, p): int(((truth == t) & (said == p)).sum()) for t in range(7) for p in range(7)
                      if ((truth == t) & (said == p)).any()} and details["confusion"]["pixels_left_out"] == 0
    truth, said = (x[0][masks[0] != 255] for x in (masks, labels))
    own = np.mean([((truth == c) & (said == c)).sum() / ((truth == c) | (said == c)).sum() for c in (0, 1, 2, 6)])
    assert details["picture_miou"] == pytest.approx([own, 1, 1], abs=1e-5)
    assert [(w["index"], w["prediction"]) for w in details["worst"]] == [(0, str(tmp_path / "out/00000-p0.png"))]
    low, high = details["interval"]["miou"]
    assert low < result.metrics["miou"] < high


def test_a_worst_picture_that_is_no_example_is_written_too(halves: Path, tmp_path: Path) -> None:
    result = segment.run(Mute(), halves, segment.Config(pictures=tmp_path / "out", examples=1, worst=2))
    scores = result.details["picture_miou"]
    expected = sorted(range(3), key=lambda i: scores[i])[:2]
    assert [w["index"] for w in result.details["worst"]] == expected
    assert [w["miou"] for w in result.details["worst"]] == [scores[i] for i in expected]
    assert {int(path.name[:5]) for path in (tmp_path / "out").glob("*.png")} == {0, *expected}
    for entry in result.details["worst"]:
        assert (np.array(Image.open(entry["prediction"])) == 0).all()


def test_intervals_are_those_of_resampled_confusions() -> None:
    rng = np.random.default_rng(5)
    pictures = [torch.from_numpy(rng.integers(0, 6, (2, 9, 7)) * (i % 3 > 0)) for i in range(11)]
    tallies = []
    for order in (range(11), reversed(range(11))):
        tally = segment.Tally(7, 5)
        for i in order:
            truth, label = pictures[i]
            tally.add(i, truth, label.clamp(max=4 + i % 2))
        tallies.append(tally)
    draws = np.random.default_rng(3).multinomial(11, [1 / 11] * 11, size=200)
    found = []
    for draw in draws:
        counts = torch.zeros(7, 7, dtype=torch.int64)
        for i, times in enumerate(draw):
            truth, label = pictures[i]
            counts += int(times) * metrics.confusion(truth, label.clamp(max=4 + i % 2), 7, 5)
        found.append((metrics.miou(counts), metrics.pixel_accuracy(counts)))
    expected = np.quantile(found, [0.05, 0.95], axis=0)
    for tally in tallies:
        for numbers in (1, 30, 2**20):
            got = segment.intervals(tally, 200, 0.9, 3, numbers)
            np.testing.assert_allclose(got["miou"], expected[:, 0])
            np.testing.assert_allclose(got["pixel_accuracy"], expected[:, 1])


def test_synonyms_help_and_void_does_not_count(halves: Path) -> None:
    describe(halves, classes=[["dark", "black"], *[[f"no{name}", name] for name in NAMES[1:7]]])
    assert segment.run(Oracle(), halves, segment.Config()).metrics["miou"] == 1
    describe(halves, classes=[["black"], ["red"], ["green", "white"], ["cyan"], ["yellow"], ["magenta"], ["blue"]])
    swapped = segment.run(Oracle(), halves, segment.Config())
    assert swapped.details["per_class"][3]["iou"] == 0 and swapped.details["per_class"][6]["iou"] == 0
    for path in (halves / "masks").glob("*.png"):
        mask = np.array(Image.open(path))
        mask[(mask == 3) | (mask == 6)] = 255
        save(path, mask)
    assert segment.run(Oracle(), halves, segment.Config()).metrics["pixel_accuracy"] == 1


def test_a_small_class_is_taken_out_for_voc21_in_sclip(halves: Path) -> None:
    voc = halves.rename(halves.parent / "voc21")
    describe(voc, background=True)
    result = segment.run(Oracle(), voc, segment.Config(protocol="sclip"))
    assert (result.details["protocol"]["scale"], result.details["protocol"]["area"]) == (65.0, 0.1)
    assert result.details["background"] == (
        "by its names, or best probability below 0.1; classes with at most 0.1 of the foreground out")


def test_what_cannot_be_scored_is_said_in_a_sentence(halves: Path) -> None:
    for bad, message in [
        (segment.Config(protocol="scl"), "'sclip'"),
        (segment.Config(templates=("a photo",)), "no {}"),
        (segment.Config(split="test"), "test"),
        (segment.Config(kind="voc"), "voc20"),
    ]:
        with pytest.raises(ValueError, match=message.replace("{", r"\{")) as caught:
            segment.run(Oracle(), halves, bad)
        assert "\n" not in str(caught.value)
    for change, message in [
        ({"classes": []}, "class"), ({"classes": ["red", "red"]}, "red"), ({"classes": [["black"]]}, "holds the value"),
    ]:
        describe(halves, **change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message) as caught:
            segment.run(Oracle(), halves, segment.Config())
        assert "\n" not in str(caught.value)
    describe(halves)
    save(halves / "masks/p1.png", np.full((32, 64), 255))
    assert segment.run(Oracle(), halves, segment.Config()).details["picture_miou"][1] is None
    for i, shape in ((0, (32, 96)), (2, (80, 32))):
        save(halves / f"masks/p{i}.png", np.full(shape, 255))
    with pytest.raises(ValueError, match="all void"):
        segment.run(Oracle(), halves, segment.Config())
    save(halves / "masks/p1.png", np.zeros((32, 63)))
    with pytest.raises(ValueError, match="63 x 32 pixels"):
        segment.run(Oracle(), halves, segment.Config())
