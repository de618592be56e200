"""Evaluation tasks with models whose score is known: one that is perfect by construction, one that says nothing.

Gives: tests of silc.eval (all but metrics).
Used by: pytest.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from known import COLOURS, NAMES, Arbitrary, Mute, Oracle, save, solid
from PIL import Image
from torch import nn

from silc.data.images import preprocess
from silc.eval import prompts, protocols, retrieval, run, segment, zeroshot


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Three pictures of each of six colours: 18, two more than two batches of eight."""
    for i in range(6):
        for j in range(3):
            save(tmp_path / "set" / NAMES[i] / f"{j}.png", solid(i, 20 + j, 30 - j))
    (tmp_path / "set" / "classes.txt").write_text("".join(f"{name}\n" for name in NAMES[:6]))
    return tmp_path / "set"


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Nine pictures, five captions each; the last two pictures are of one colour and share a caption."""
    rows = []
    for i in range(9):
        colour = min(i, 7)
        save(tmp_path / "set" / f"{i}.png", solid(colour))
        words = [f"{NAMES[colour]} number {j} of {i}" for j in range(4)] + [f"all {NAMES[colour]}"]
        rows.append(json.dumps({"image": f"{i}.png", "caption": words}))
    (tmp_path / "set" / "captions.jsonl").write_text("\n".join(rows))
    return tmp_path / "set"


STRIPES = [(0, 1, 0, 2, 0, 0), (3, 0, 0, 4, 4, 0), (0, 0, 5, 5, 0, 0)]


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Three pictures of vertical stripes, 16 px each, one of them upright, with a void corner."""
    for i, stripes in enumerate(STRIPES):
        labels = np.repeat(np.repeat(np.array(stripes)[None], 64, 0), 16, 1)
        labels = np.repeat(labels[:48, :64], 2, 0) if i == 2 else labels
        pixels = COLOURS[labels].copy()
        labels = labels.copy()
        labels[:9, :9] = 255
        pixels[:9, :9] = COLOURS[labels[10, 0]]
        save(tmp_path / "set/images" / f"p{i}.png", pixels)
        save(tmp_path / "set/masks" / f"p{i}.png", labels)
    about = {"classes": [["black", "dark"], *[[n] for n in NAMES[1:7]]], "background": True, "void": 255}
    (tmp_path / "set/classes.json").write_text(json.dumps(about))
    return tmp_path / "set"


# ---------------------------------------------------------------- oracle and mute


@pytest.mark.parametrize("batch", [17, 8, 64])
def test_oracle_classifies_all_and_no_padding_counts(coloured, batch):
    model = Oracle()
    result = zeroshot.run(model, coloured, zeroshot.Config(batch=batch))
    assert result.metrics == {"top1": 1.0, "top5": 1.0, "mean_class_accuracy": 1.0}
    assert result.details["count"] == 18 and result.details["interval"]["top1"] == (1.0, 1.0)
    assert set(model.shapes) == {(batch, 3, 32, 32)}, "every batch has one shape"
    first = result.details["predictions"][4]
    assert first["path"].endswith("red/1.png") and first["label"] == 1
    assert first["top"] == [1, 0, 2, 3, 4] and first["cosine"] == [1, 0, 0, 0, 0]


def test_mute_classifies_at_chance(coloured):
    result = zeroshot.run(Mute(), coloured, zeroshot.Config(batch=17))
    assert result.metrics == pytest.approx(result.chance)
    assert result.chance["top1"] == pytest.approx(1 / 6) and result.chance["top5"] == pytest.approx(5 / 6)


def test_the_sets_templates_are_used_unless_the_caller_has_some(coloured):
    (coloured / "templates.txt").write_text("a drawing of {}\n")
    assert zeroshot.run(Oracle(), coloured, zeroshot.Config()).details["templates"] == ["a drawing of {}"]
    mine = zeroshot.Config(templates=("my {}",))
    assert zeroshot.run(Oracle(), coloured, mine).details["templates"] == ["my {}"]


def test_one_name_a_class_if_the_settings_say_so(coloured):
    (coloured / "classes.txt").write_text("".join(f"{n}\tx{n}, {n}\n" for n in NAMES[:6]))
    both, first = (zeroshot.run(Oracle(), coloured, zeroshot.Config(first_name=only)) for only in (False, True))
    assert both.metrics["top1"] == 1 and first.metrics["top1"] == pytest.approx(1 / 6)
    assert first.details["protocol"] == {"name": "plain", "first_name": True, "canonical": False}


CLASSES = "black\tJet_Black, dark\nred\tfire-engine Red\ngreen\nblue\tblue (navy), azure\nyellow\nmagenta\n"


@pytest.mark.parametrize(("cfg", "templates"), [
    (zeroshot.Config(protocol="openai"), "clip80"),
    (zeroshot.Config(protocol="big_vision"), "clip_paper"),
    (zeroshot.Config(protocol="big_vision", templates=("tcl9",)), "tcl9"),
    (zeroshot.Config(), "simple"),
])
def test_zeroshot_against_a_second_implementation(coloured, cfg, templates):
    (coloured / "classes.txt").write_text(CLASSES)
    model, canonical = Arbitrary(), cfg.protocol == "big_vision"
    result = zeroshot.run(model, coloured, cfg)
    names = [["Jet_Black", "dark"], ["fire-engine Red"], ["green"], ["blue (navy)", "azure"], ["yellow"], ["magenta"]]
    lines = (Path(zeroshot.__file__).parent / "templates" / f"{templates}.txt").read_text().splitlines()
    if canonical:
        names = [["jet black"], ["fireengine red"], ["green"], ["blue navy"], ["yellow"], ["magenta"]]
        lines = [line.lower().replace(".", "").replace("-", "") for line in lines]
    correct, best_two = [], []
    for label in range(6):
        for path in sorted((coloured / NAMES[label]).iterdir()):
            picture = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
            picture = preprocess(picture, model.config.preprocess).float() / 127.5 - 1
            feature = model.encode_image(picture[None])[0].double().numpy()
            scores = []
            for group in names:
                cosines = []
                for name in group:
                    rows = model.encode_text([line.replace("{}", name) for line in lines]).double().numpy()
                    mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
                    cosines.append(feature @ mean / np.linalg.norm(mean))
                scores.append(max(cosines))
            correct.append(int(np.argmax(scores) == label))
            best_two.append(sorted(scores)[-2:])
    assert min(b - a for a, b in best_two) > 1e-5, "no tie that rounding decides"
    assert result.details["items"]["top1"] == correct
    assert result.metrics["top1"] == pytest.approx(np.mean(correct))
    assert result.details["protocol"]["name"] == cfg.protocol and templates in result.details["templates_from"]
    assert result.details["templates"] == lines and result.details["classes"] == [group[0] for group in names]


def test_whose_templates_count(coloured):
    (coloured / "templates.txt").write_text("a drawing of {}\n")
    for cfg, source in [(zeroshot.Config(protocol="openai"), "the set"),
                        (zeroshot.Config(protocol="big_vision"), "protocol: clip_paper"),
                        (zeroshot.Config(protocol="openai", templates=("simple", "{}!")), "settings: simple, {}!")]:
        assert zeroshot.run(Oracle(), coloured, cfg).details["templates_from"] == source


def test_what_zeroshot_refuses(coloured):
    with pytest.raises(ValueError, match=r"no classification protocol 'opnai'.*'openai'"):
        zeroshot.run(Oracle(), coloured, zeroshot.Config(protocol="opnai"))
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        zeroshot.run(Oracle(), coloured, zeroshot.Config(templates=("a photo",)))
    (coloured / "classes.txt").write_text("".join(f"{n}\t{n if n != 'red' else '?!'}\n" for n in NAMES[:6]))
    with pytest.raises(ValueError, match=r"nothing is left of '\?!'"):
        zeroshot.run(Oracle(), coloured, zeroshot.Config(protocol="big_vision"))


def test_oracle_retrieves_all_also_where_pictures_share_a_caption(captioned):
    result = retrieval.run(Oracle(), captioned, retrieval.Config(batch=8, chunk=2, examples=100))
    # pictures 7 and 8 cannot be told apart: their own captions tie with each other's, the shared one is right for both
    assert result.metrics["image_to_text_r1"] == pytest.approx(7 / 9)
    assert result.metrics["text_to_image_r1"] == pytest.approx((35 + 2) / 45)
    assert result.metrics["text_to_image_r5"] == 1.0
    assert result.details["captions"] == 45 and result.details["distinct_captions"] == 44
    shown = {q["text"]: q["found"] for q in result.details["neighbours"]["text_to_image"]}
    assert len(shown) == 44 and [f["right"] for f in shown["all white"]].count(True) == 2
    assert all(q["found"][0]["right"] for q in result.details["neighbours"]["image_to_text"][:7])


def test_mute_retrieves_at_chance_or_below(captioned):
    result = retrieval.run(Mute(), captioned, retrieval.Config(batch=8))
    assert result.chance["text_to_image_r1"] == pytest.approx((43 * 1 / 9 + 2 * 2 / 9) / 45)
    assert all(result.metrics[key] <= result.chance[key] for key in result.chance)
    assert set(result.metrics) == set(result.chance)


@pytest.mark.parametrize("protocol", ["whole-image", "tcl"])
def test_oracle_segments_all(masked, protocol, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "PIXELS_AT_ONCE", 20_000)
    about = json.loads((masked / "classes.json").read_text())
    (masked / "classes.json").write_text(json.dumps({**about, "background": False}))
    cfg = segment.Config(protocol=protocol, batch=2, pictures=tmp_path / "out", examples=2)
    result = segment.run(Oracle(), masked, cfg)
    assert result.metrics == {"miou": 1.0, "pixel_accuracy": 1.0}
    assert 0 < result.chance["miou"] < result.chance["pixel_accuracy"] < 1
    assert [c["iou"] for c in result.details["per_class"]] == [1.0] * 6 + [None]
    kept = result.details["pictures"]
    assert [p["index"] for p in kept] == [0, 1]
    written, truth = np.asarray(Image.open(kept[1]["prediction"])), np.asarray(Image.open(kept[1]["mask"]))
    assert written.dtype == np.uint8 and (written == truth)[truth != 255].all()


def test_tcl_gives_the_background_what_nothing_fits(masked):
    result = segment.run(Oracle(), masked, segment.Config(protocol="tcl"))
    # between object and background the object's probability outweighs: its edge grows by half a patch, 0.6 px of 16
    assert result.metrics["pixel_accuracy"] > 0.96 and result.details["per_class"][0]["iou"] > 0.94
    assert result.details["background"] == "best foreground probability below 0.5"
    mute = segment.run(Mute(), masked, segment.Config(protocol="tcl"))
    assert mute.metrics == pytest.approx(mute.chance), "six equal probabilities are below 0.5: all background"


@pytest.mark.parametrize("at_once", [1, 2**25])
def test_mute_segments_as_the_best_constant(masked, monkeypatch, at_once):
    monkeypatch.setattr(protocols, "PIXELS_AT_ONCE", at_once)
    result = segment.run(Mute(), masked, segment.Config())
    assert result.metrics == pytest.approx(result.chance), "black is class 0, the first among equals, and the largest"
    assert result.details["background"] == "by its names"


def test_pictures_of_one_size_share_a_batch(masked):
    model = Oracle()
    segment.run(model, masked, segment.Config(batch=2))
    assert sorted(model.shapes) == [(1, 3, 48, 32), (2, 3, 32, 48)]


# ---------------------------------------------------------------- dense inference


def test_windows_cover_everything_and_end_at_the_border():
    how = protocols.Protocol("t", window=32, stride=16)
    assert protocols.windows(32, 70, how) == [(0, 0, 32, 32), (0, 16, 32, 32), (0, 32, 32, 32), (0, 38, 32, 32)]
    assert protocols.windows(24, 32, how) == [(0, 0, 24, 32)]
    seen = np.zeros((71, 53), int)
    for top, left, height, width in protocols.windows(71, 53, how):
        seen[top : top + height, left : left + width] += 1
    assert seen.min() >= 1
    assert protocols.windows(40, 56, protocols.Protocol("whole")) == [(0, 0, 40, 56)]


def test_fit_keeps_the_aspect_and_suits_the_patch():
    config = Oracle().config
    whole, tcl = protocols.protocol("whole-image"), protocols.protocol("tcl")
    assert protocols.fit_size(100, 200, whole, config) == (32, 64)
    assert protocols.fit_size(300, 100, whole, config) == (96, 32)
    assert protocols.fit_size(10, 10_000, whole, config) == (8, 128), "a strip is bounded by the aspect limit"
    assert protocols.fit_size(375, 500, tcl, config) == (448, 597), "windows, not the picture, must suit the patch"
    with pytest.raises(ValueError, match="multiple of the model's patch, 8 px"):
        protocols.encode(Oracle(), torch.zeros(1, 3, 40, 40), dataclasses.replace(tcl, window=36))


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_label_map_in_parts_is_the_whole(threshold, monkeypatch):
    torch.manual_seed(0)
    how = protocols.Protocol("t", window=16, stride=8)
    boxes = protocols.windows(24, 35, how)
    dense = protocols.Dense(F.normalize(torch.randn(len(boxes), 5, 2, 2), dim=1), boxes, (24, 35))
    names = prompts.ClassEmbeddings(F.normalize(torch.randn(7, 5), dim=1), torch.tensor([1, 1, 2, 3, 3, 3, 4]), 5)
    maps = torch.zeros(7, 24, 35)
    for c in range(7):
        total, count = torch.zeros(24, 35), torch.zeros(24, 35)
        for one, (y, x, h, w) in zip(dense.features, boxes):
            low = (one * names.vectors[c][:, None, None]).sum(0)
            total[y : y + h, x : x + w] += F.interpolate(low[None, None], (h, w), mode="bilinear")[0, 0]
            count[y : y + h, x : x + w] += 1
        maps[c] = F.interpolate((total / count)[None, None], (24, 35), mode="bilinear")[0, 0]
    expected = names.owner[maps.argmax(0)]
    if threshold:
        expected[(maps * 3).softmax(0).amax(0) < threshold] = 0
        assert 0.1 < (expected == 0).float().mean() < 0.9
    largest, original = [], protocols.cosine_maps

    def spy(*args):
        largest.append(original(*args))
        return largest[-1]

    monkeypatch.setattr(protocols, "cosine_maps", spy)
    for parts in (1, 2, 7):
        monkeypatch.setattr(protocols, "PIXELS_AT_ONCE", 24 * 35 * -(-7 // parts))
        largest.clear()
        assert (protocols.label_map(dense, names, 24, 35, threshold, 3.0) == expected).float().mean() > 0.999
        assert len(largest) == parts and max(m.shape[0] for m in largest) == -(-7 // parts)


def test_a_threshold_needs_two_foreground_classes():
    with pytest.raises(ValueError, match="two foreground"):
        protocols.foreground([["background"], ["cat"]], True, protocols.protocol("tcl"))
    assert protocols.foreground([["sky"], ["cat"]], False, protocols.protocol("tcl")) == [["sky"], ["cat"]]


# ---------------------------------------------------------------- run


def test_evaluate_write_and_table(coloured, tmp_path, request):
    coloured = coloured.rename(tmp_path / "colours")
    masked = request.getfixturevalue("masked")
    assert {"zeroshot", "retrieval", "segment"} <= set(run.find_tasks()) and "run" not in run.find_tasks()
    model = Oracle()
    model.train()
    results = run.evaluate(model, {"zeroshot/colours": coloured, "segment": str(masked)}, tmp_path / "pictures",
                           {"zeroshot": zeroshot.Config(batch=5), "segment": segment.Config(examples=1)})
    assert model.part.training
    assert [r.metrics["top1" if "top1" in r.metrics else "miou"] for r in results.values()] == [1.0, 1.0]
    assert len(list((tmp_path / "pictures/segment").glob("*.png"))) == 1
    assert model.shapes[0][0] == 5
    text = run.table(results)
    assert "| zeroshot/colours | top1 | 100.00 | 100.00 – 100.00 | 16.67 | 18 |" in text
    paths = run.write(results, tmp_path / "json", {"model": "oracle"})
    assert [p.name for p in paths] == ["zeroshot-colours.json", "segment.json"]
    data = json.loads(paths[1].read_text())
    assert data["metrics"]["miou"] == 1.0 and data["about"] == {"model": "oracle"} and data["versions"]["torch"]
    assert data["details"]["protocol"]["name"] == "whole-image" and data["details"]["preprocess"]["size"] == 32
    with pytest.raises(ValueError, match="one file"):
        run.write({"a/b": results["segment"], "a-b": results["segment"]}, tmp_path, {})


def test_an_unknown_task_names_the_nearest_before_anything_runs(coloured):
    model = Oracle()
    with pytest.raises(ValueError, match="'zeroshot'"):
        run.evaluate(model, {"zeroshot": coloured, "zerosho/x": coloured})
    with pytest.raises(ValueError, match="'whole-image'"):
        protocols.protocol("whole-imge")
    assert not model.shapes


def test_fingerprint_knows_a_changed_weight():
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    assert run.fingerprint(one) == run.fingerprint(two)
    with torch.no_grad():
        two.weight[0, 0] += 1e-3
    assert run.fingerprint(one) != run.fingerprint(two)
