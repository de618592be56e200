"""Segmentation trained and used: crops, loss, which weights move, the protocol, the command.

Gives: runs of `silc train catseg` and `silc segment` on drawn scenes with masks; a second build of loss and protocol.
Used by: pytest.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COLOURS, write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from test_loop import command, launch, refused, rows, wait_for_step
from test_pretrain import ALONE
from torch import Tensor

import silc
from silc import losses, recipes
from silc.app.segmenting import _video
from silc.cli import main
from silc.config import CatSegConfig, Config
from silc.data.masked import VOID, open_masks
from silc.eval import segment as task
from silc.eval.prompts import class_embeddings
from silc.eval.protocols import OTHERS, fit, protocol, windows
from silc.eval.trained import at_size, best, look, scores
from silc.plain import load_json
from silc.predict import Predictor
from silc.train.loop import build

CLASSES = ["ground", *COLOURS]
SMALL = ["--model.catseg.width", "16", "--model.catseg.heads", "2", "--model.catseg.decoder", "16", "16",
         "--model.catseg.guides", "12", "10", "--model.catseg.guide-widths", "4", "3", "--model.catseg.window", "4",
         "--model.catseg.classes", "8"]  # fmt: skip


def write_scenes(folder: Path, splits: dict[str, int]) -> Path:
    """Coloured squares on grey, with masks; a frame of void, and a corner too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES, "void": 255}))
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for i in range(count):
            image, mask = Image.new("RGB", (72, 64), (128, 128, 128)), Image.new("L", (72, 64), 0)
            for _ in range(3):
                c = int(rng.integers(len(COLOURS)))
                x, y, side = (int(v) for v in rng.integers((0, 0, 16), (50, 42, 36)))
                box = (x, y, x + side, y + side)
                ImageDraw.Draw(image).rectangle(box, fill=list(COLOURS.values())[c])
                ImageDraw.Draw(mask).rectangle(box, fill=c + 1)
            ImageDraw.Draw(mask).rectangle((0, 0, 5, 5), fill=255)
            image.save(folder / split / "images" / f"{i}.png")
            mask.save(folder / split / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), {"train": 24, "val": 8})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    main(command(write_pairs(root / "pairs"), root / "run", "--objective.distill.weight", "0",
                 "--objective.masked.weight", "0", "--model.image.depth", "3"))  # fmt: skip
    return root / "run"


def words(base: Path, scenes: Path, out: Path, *options: str) -> list[str]:
    return ["train", "recipe=catseg", "--init.model", str(base), "--init.image-size", "0",
            "--data.sources", str(scenes), "--out", str(out), *SMALL,
            "--train.samples", "48", "--train.save-every", "4", "--train.log-every", "1",
            "--eval.every", "0", "--data.workers", "0", "--train.threads", "1", *options]  # fmt: skip


@pytest.fixture(scope="module")
def run(base: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catseg") / "run"
    main(words(base, scenes, folder, "--eval.sets", "segment", str(scenes)))
    return folder


def made(run: Path) -> Config:
    return load_json(run / "config.json", Config)


# ---------------------------------------------------------------- loss


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, 5), st.integers(1, 3), st.integers(0, 10**6))
def test_the_loss_is_binary_cross_entropy_of_every_class_at_every_pixel(
    b: int, t: int, g: int, times: int, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(b, t, g, g, dtype=torch.float64).float().mul(4).requires_grad_()
    labels = torch.randint(-1, t, (b, g * times, g * times))
    large = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    target = torch.zeros_like(large)
    for i in range(b):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                if labels[i, y, x] >= 0:
                    target[i, labels[i, y, x], y, x] = 1
    wanted = F.binary_cross_entropy_with_logits(large, target)
    (gradient,) = torch.autograd.grad(wanted, logits)
    for planes in (losses.PLANES, 1):  # all classes at once, and one at a time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(losses, "PLANES", planes)
            found = losses.per_pixel(logits, labels)
            (mine,) = torch.autograd.grad(found, logits)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- crops


def test_crops_show_what_their_labels_say_whoever_reads_them(run: Path, scenes: Path) -> None:
    config = replace(made(run), views=replace(made(run).views, photometric="none"))
    crops = open_masks(config)
    assert len(crops) == 24 and crops.names == CLASSES
    whole = crops[(0, 40)]
    for first, last in ((0, 7), (7, 40)):
        part = crops[(first, last)]
        assert torch.equal(part["globals"], whole["globals"][:, first:last])
        assert torch.equal(part["labels"], whole["labels"][first:last])
    colours = torch.tensor([(128, 128, 128), *COLOURS.values()])
    image, labels = whole["globals"][0].long(), whole["labels"].long()
    nearest = (image[..., None, :] - colours).abs().sum(-1).argmin(-1)
    seen = labels != VOID
    assert seen.float().mean() > 0.9 and (~seen).any()
    assert (nearest == labels)[seen].float().mean() > 0.93  # borders mix
    assert len({tuple(sorted(set(ids))) for ids in (whole["ids"][:24], whole["ids"][24:])}) == 2


def test_coco_stuff_where_coco_has_panoptic_masks_too(run: Path, tmp_path: Path) -> None:
    """The published layout of 164k, its numbers of 171 classes as they are."""
    for part in ("images/train2017", "stuffthingmaps/train2017", "panoptic_train2017"):
        (tmp_path / part).mkdir(parents=True)
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "images" / "train2017" / "1.jpg")
    numbers = np.repeat(np.array([0, 12, 181, 255], np.uint8), 10)  # person, stop sign, wood, unlabelled
    Image.fromarray(np.tile(numbers, (40, 1))).save(tmp_path / "stuffthingmaps" / "train2017" / "1.png")
    panoptic = {"categories": [{"id": 1, "name": "person"}], "images": [{"id": 1, "file_name": "1.jpg"}]}
    panoptic["annotations"] = [{"image_id": 1, "file_name": "1.png", "segments_info": []}]
    Image.new("RGB", (40, 40)).save(tmp_path / "panoptic_train2017" / "1.png")
    (tmp_path / "panoptic_train2017.json").write_text(json.dumps(panoptic))
    config = replace(made(run), data=replace(made(run).data, sources=(str(tmp_path),)))
    with pytest.raises(ValueError, match=r"coco-stuff or coco-panoptic.*--segment\.kind"):
        open_masks(config)
    crops = open_masks(replace(config, segment=replace(config.segment, kind="coco-stuff")))
    wood, sign = crops.names.index("wood"), crops.names.index("stop sign")
    assert len(crops.names) == 171 and set(crops[(0, 2)]["labels"].unique().tolist()) == {VOID, 0, sign, wood}


def test_a_set_without_splits_a_zoom_and_sets_that_differ(run: Path, tmp_path: Path) -> None:
    plain = write_scenes(tmp_path / "a", {"train": 4})
    for kind in ("images", "masks"):
        (plain / "train" / kind).rename(plain / kind)
    (plain / "train").rmdir()
    config = made(run)
    config = replace(config, data=replace(config.data, sources=(str(plain),)))
    assert len(open_masks(config)) == 4
    zoomed = replace(config, segment=replace(config.segment, zoom=(2.0, 3.0)))
    assert not torch.equal(open_masks(zoomed)[(0, 4)]["globals"], open_masks(config)[(0, 4)]["globals"])
    with pytest.raises(ValueError, match="zoom"):
        open_masks(replace(config, segment=replace(config.segment, zoom=(0.5, 1.0))))
    other = write_scenes(tmp_path / "b", {"train": 1})
    (other / "classes.json").write_text(json.dumps({"classes": [*CLASSES, "more"], "void": 255}))
    with pytest.raises(ValueError, match="different classes"):
        open_masks(replace(config, data=replace(config.data, sources=(str(plain), str(other)))))


def test_a_broken_picture_is_left_out_and_listed(run: Path, base: Path, tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", {"train": 30})
    whole = scenes / "train" / "images" / "3.png"
    Image.open(whole).save(scenes / "train" / "images" / "3.jpg")
    whole.unlink()
    broken = scenes / "train" / "images" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])  # its header is whole, so that it is noticed when it is read
    main(words(base, scenes, tmp_path / "run", "--train.samples", "60"))
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert bad and all(row["id"].endswith("3.jpg") for row in bad)


# ---------------------------------------------------------------- training


def test_a_run_learns_and_says_how_much(run: Path) -> None:
    train = rows(run)
    assert len(train) == 12 and train[-1]["loss"] < train[0]["loss"]
    scored = rows(run, "eval")
    assert [row["step"] for row in scored] == [0, 12] and 0 <= scored[-1]["metrics"]["miou"] <= 1


@pytest.mark.parametrize("tune", ["qv", "none", "all"])
def test_gradient_flows_where_the_recipe_says(run: Path, scenes: Path, tune: str) -> None:
    config = made(run)
    config = replace(config, segment=replace(config.segment, tune=tune))  # type: ignore[arg-type]
    job, optimizer = build(config, ALONE)
    crops = open_masks(config)
    tokens = silc.load(run).tokenizer([f"A photo of a {name} in the scene" for name in CLASSES])  # type: ignore[misc]
    batch = next(crops.batches(lambda texts: tokens, 0, 0, 1))  # type: ignore[arg-type]
    job.forward_backward(batch, 0)
    moving = {n for n, p in job.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    towers = {n for n in moving if not n.startswith("catseg.")}
    attention = {n for n, _ in job.model.named_parameters() if n.endswith(("attention.q.weight", "attention.v.weight"))}
    # the last image block is read by its values alone, or, with another pooling, its patches by the head's
    last = f"image.blocks.{config.model.image.depth - 1}.attention.q.weight"
    if tune == "none":
        assert not towers
    elif tune == "qv":
        assert towers <= attention and attention - towers <= {last, "image.head.attention.q.weight"}
    else:
        assert {"image.patch.weight", "text.token.weight", "text.proj.weight"} <= towers
    assert {n for n in moving if n.startswith("catseg.")} == {n for n, _ in job.model.named_parameters()
                                                              if n.startswith("catseg.")}  # fmt: skip
    rates = {group["part"] for group in optimizer.param_groups}
    assert rates == ({"heads"} if tune == "none" else {"heads", "image", "text"})


def test_towers_move_a_hundredth_as_fast(run: Path, base: Path) -> None:
    now, then = silc.load(run), silc.load(base)
    assert now.catseg is not None and then.catseg is None
    changed = {n for n, p in now.named_parameters() if not n.startswith("catseg.")
               and not torch.equal(p, then.state_dict()[n])}  # fmt: skip
    assert changed and all(n.endswith(("attention.q.weight", "attention.v.weight")) for n in changed)
    moved = max(float((now.state_dict()[n] - then.state_dict()[n]).abs().max()) for n in changed)
    assert moved < 12 * 2e-4 * 0.01 * 1.5


def test_a_killed_run_goes_on_bit_for_bit(run: Path, base: Path, scenes: Path, tmp_path: Path) -> None:
    again = words(base, scenes, tmp_path / "run", "--eval.sets", "segment", str(scenes))
    process = launch(again)
    wait_for_step(tmp_path / "run", 5, process)
    process.kill()
    process.wait()
    main(again)
    one, other = silc.load(run).state_dict(), silc.load(tmp_path / "run").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["1", "2"])
def test_two_processes_train_the_same_model(
    run: Path, base: Path, scenes: Path, tmp_path: Path, shard: str
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "silc"]
    subprocess.run([*launcher, *words(base, scenes, tmp_path / "run", "--train.shard", shard)], check=True)
    for key in ("loss", "grad_norm"):
        found, expected = ([row[key] for row in rows(folder)] for folder in (tmp_path / "run", run))
        assert found == pytest.approx(expected, rel=5e-3)
    one, other = silc.load(run).state_dict(), silc.load(tmp_path / "run").state_dict()
    # Adam turns the sign of a gradient that is nearly nothing into a whole step
    assert all(torch.allclose(one[n], other[n], atol=2 * 2e-4) for n in one)


def test_micro_batches_give_the_gradient_of_the_whole(run: Path) -> None:
    config = made(run)
    tokens = torch.randint(0, 30, (len(CLASSES), config.model.text.length))
    batch = next(open_masks(config).batches(lambda texts: tokens, 0, 0, 1))  # type: ignore[arg-type]
    found = []
    for micro in (1, 2, 4):
        job, _ = build(replace(config, train=replace(config.train, accumulate=micro)), ALONE)
        loss = job.forward_backward(batch, 0)["loss"]
        found.append((loss, {n: p.grad for n, p in job.model.named_parameters() if p.grad is not None}))
    for loss, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("options", "said"), [
    (["--views.locals", "2"], "one crop a picture"),
    (["--init.freeze", "0.1"], "segment.tune none"),
    (["--views.global-size", "16"], "image size"),
    (["--data.sources", "nowhere"], "does not exist"),
    (["--init.model", ""], "--init.model"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(
    base: Path, scenes: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, words(base, scenes, tmp_path / "run", *options), said)


def test_the_head_stays_with_the_model_and_goes_on(run: Path, base: Path, scenes: Path, tmp_path: Path) -> None:
    main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "out")])
    one, other = silc.load(run).state_dict(), silc.load(tmp_path / "out").state_dict()
    assert all(torch.equal(one[n], other[n]) for n in one) and any(n.startswith("catseg.") for n in one)
    main(words(run, scenes, tmp_path / "more", "--train.samples", "4", "--optim.lr", "1e-9"))
    more = silc.load(tmp_path / "more").state_dict()
    assert all(torch.allclose(one[n], more[n], atol=1e-6) for n in one)
    main(command(write_pairs(tmp_path / "pairs"), tmp_path / "back", "--init.model", str(run), "--train.samples", "16"))
    assert silc.load(tmp_path / "back").catseg is None  # pretraining has no use for it


def test_the_card_of_a_model_with_a_head(
    run: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def exported(name: str, to: str, *options: str) -> str:
        main(["export", str(run), "--to", to, "--no-check", "--out", str(tmp_path / name), *options])
        return (tmp_path / name / "README.md").read_text()

    card = exported("a", "safetensors")
    assert "48 crops with masks in 12 steps of 4" in card and " pairs" not in card and "contrast" not in card
    assert "binary cross-entropy" in card and "queries and values of both towers" in card
    assert "protocol catseg, at the end of the run" in card and "Predictor(model).segment(" in card
    main(["eval", str(run), "--sets", "segment/scenes", str(scenes), "--out", str(tmp_path / "scores")])
    card = exported("b", "transformers", "--scores", str(tmp_path / "scores"))
    assert "| segment/scenes | miou |" in card and "protocol catseg, 8 pictures" in card
    assert "head is not in this form" in card and "Predictor(model)" not in card
    assert "has no CAT-Seg head: it is left out" in capsys.readouterr().err


# ---------------------------------------------------------------- protocol


def naive_scores(model: Any, pixels: Tensor, vectors: Tensor, side: int, step: int) -> Tensor:
    """One window and one pixel's coverage at a time: [T, S, S]."""
    size = pixels.shape[-1]
    total, count = torch.zeros(len(vectors), size, size), torch.zeros(size, size)
    for top in range(0, size - side + 1, step):
        for left in range(0, size - side + 1, step):
            logits = model.segment(pixels[None, :, top : top + side, left : left + side], vectors)
            large = F.interpolate(logits, (side, side), mode="bilinear")[0]
            total[:, top : top + side, left : left + side] += large.sigmoid()
            count[top : top + side, left : left + side] += 1
    small = F.interpolate(pixels[None], (side, side), mode="bilinear")
    whole = F.interpolate(model.segment(small, vectors), (side, side), mode="bilinear").sigmoid()
    return (total / count + F.interpolate(whole, (size, size), mode="bilinear")[0]) / 2


@pytest.mark.parametrize("count", [3, 20])
def test_scores_are_means_of_sigmoids_over_four_windows_and_the_whole(run: Path, count: int) -> None:
    model, how = silc.load(run), protocol("catseg")
    assert (how.short, how.window, how.stride) == (640, 384, 256) and len(windows(640, 640, how)) == 4
    how = at_size(how, model)
    side = model.config.image.image_size
    assert how.window == side and len(windows(how.short, how.short, how)) == 4
    torch.manual_seed(1)
    pixels, vectors = torch.randn(2, 3, how.short, how.short), F.normalize(torch.randn(count, model.config.embed_dim))
    with torch.inference_mode():
        for one, seen in zip(pixels, look(model, pixels, how, vectors)):
            wanted = naive_scores(model, one, vectors, side, how.stride)
            found = torch.zeros_like(wanted)
            found[seen.kept] = scores(seen, slice(None), *seen.size)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
            names = class_embeddings(model, [[str(i)] for i in range(count)], ["{}"])
            assert torch.equal(best(seen, names, *seen.size), found.argmax(0))
            label = best(seen, names, *seen.size, threshold=0.5)
            assert torch.equal(label == 0, (found.amax(0) < 0.5) | (found.argmax(0) == 0))


def test_sizes_shrink_only_for_models_smaller_than_those_of_the_protocol(run: Path) -> None:
    model, how = silc.load(run), protocol("catseg")
    for size, wanted in ((384, (640, 384, 256)), (336, (640, 384, 256)), (96, (160, 96, 64))):
        image = replace(model.config.image, image_size=size)
        model.config = replace(model.config, image=image)
        scaled = at_size(how, model)
        assert (scaled.short, scaled.window, scaled.stride) == wanted


def test_background_of_voc_is_what_context_has_besides(run: Path) -> None:
    assert len(OTHERS) == 39 and "sky" in OTHERS and not {"dog", "table", "tvmonitor"} & set(OTHERS)
    assert protocol("catseg", "voc21").background_names == OTHERS and not protocol("catseg", "ade150").background_names


def test_the_protocol_is_taken_by_itself_and_refused_without_a_head(run: Path, base: Path, scenes: Path) -> None:
    found = task.run(silc.load(run), scenes, task.Config())
    assert found.details["protocol"]["name"] == "catseg" and found.details["split"] == "val"
    assert task.run(silc.load(base), scenes, task.Config()).details["protocol"]["name"] == "whole-image"
    with pytest.raises(ValueError, match="silc train catseg"):
        task.run(silc.load(base), scenes, task.Config(protocol="catseg"))
    # the same label maps one by one
    predictor, data = Predictor(silc.load(run)), scenes / "val"
    hit = total = 0
    for file in sorted((data / "images").iterdir()):
        label = predictor.segment(file, CLASSES).numpy()
        mask = np.asarray(Image.open(data / "masks" / file.name))
        hit, total = hit + (label == mask)[mask != 255].sum(), total + (mask != 255).sum()
    assert found.metrics["pixel_accuracy"] == pytest.approx(hit / total)


# ---------------------------------------------------------------- command


@pytest.mark.parametrize("which", ["run", "base"])
def test_the_command_writes_overlay_labels_and_scores(
    which: str, scenes: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    model, picture = request.getfixturevalue(which), scenes / "val" / "images" / "0.png"
    main(["segment", str(picture), "red, green,blue", "--model", str(model), "--out", str(tmp_path / "o"), "--arrays"])
    assert "wrote 1 picture to" in capsys.readouterr().out
    labels = Image.open(tmp_path / "o" / "0.labels.png")
    assert labels.mode == "P" and labels.size == (72, 64)
    said = json.loads((tmp_path / "o" / "0.json").read_text())
    assert said["protocol"] == {"run": "catseg", "base": "whole-image"}[which]
    shares = [row["share"] for row in said["classes"]]
    assert [row["class"] for row in said["classes"]] == ["red", "green", "blue"] and sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([float((np.asarray(labels) == i).mean()) for i in range(3)])
    array = np.load(tmp_path / "o" / "0.npy")
    assert array.shape == (3, 64, 72)
    chosen = np.take_along_axis(array, np.asarray(labels).astype(int)[None], 0)[0]
    assert (chosen >= array.max(0) - 2e-3).mean() > 0.99
    assert Image.open(tmp_path / "o" / "0.png").width > 2 * 72


def test_a_folder_an_animation_and_a_background(run: Path, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "broken.png").write_bytes(b"no")
    frames = [Image.open(scenes / "val" / "images" / f"{i}.png") for i in range(5)]
    frames[0].save(folder / "deep" / "a.jpg")
    frames[0].save(tmp_path / "move.gif", save_all=True, append_images=frames[1:])
    main(["segment", str(folder), "red, blue", "--model", str(run), "--out", str(tmp_path / "o"),
          "--background", "0.9999"])  # fmt: skip
    labels = Image.open(tmp_path / "o" / "deep" / "a.jpg.labels.png")
    assert labels.getpalette()[:3] == [0, 0, 0] and (np.asarray(labels) == 0).mean() > 0.5  # type: ignore[index]
    main(["segment", str(tmp_path / "move.gif"), "red, blue", "--model", str(run), "--out", str(tmp_path / "m"),
          "--every", "2"])  # fmt: skip
    names = sorted(p.name for p in (tmp_path / "m" / "move").glob("*.json"))
    assert names == ["00000.json", "00002.json", "00004.json"]


def test_a_cut_animation_gives_the_frames_that_it_has(
    base: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.open(scenes / "val" / "images" / f"{i}.png") for i in range(6)]
    frames[0].save(tmp_path / "move.gif", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "move.gif").read_bytes()
    (tmp_path / "move.gif").write_bytes(whole[: len(whole) * 2 // 3])
    main(["segment", str(tmp_path / "move.gif"), "red, blue", "--model", str(base), "--out", str(tmp_path / "o")])
    written = len(list((tmp_path / "o" / "move").glob("*.json")))
    assert 0 < written < 6 and f"move.gif is damaged after frame {written - 1}" in capsys.readouterr().err


def test_a_second_picture_inside_a_jpeg_is_no_animation(base: Path, scenes: Path, tmp_path: Path) -> None:
    frames = [Image.open(scenes / "val" / "images" / f"{i}.png") for i in range(2)]
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(tmp_path / "phone.jpg").n_frames == 2
    main(["segment", str(tmp_path / "phone.jpg"), "red, blue", "--model", str(base), "--out", str(tmp_path / "o")])
    assert sorted(p.name for p in (tmp_path / "o").rglob("*")) == ["phone.json", "phone.labels.png", "phone.png"]


def test_what_was_written_into_the_folder_before_is_no_input(base: Path, scenes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.open(scenes / "val" / "images" / "0.png").save(folder / "a.png")
    for _ in range(2):
        main(["segment", str(folder), "red, blue", "--model", str(base), "--out", str(folder / "out")])
    assert len(list((folder / "out").rglob("*.json"))) == 1


def lying(file: Path) -> None:
    """Note in an MP4 that its frames are to be turned clockwise, as a phone that is held upright does."""
    data = bytearray(file.read_bytes())
    start = data.index(b"tkhd") + 44  # version 0: flags, two times, number, room, length, room, layer, group, volume
    data[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    file.write_bytes(data)


def test_frames_of_a_video(run: Path, scenes: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="av is not installed: pip install 'silc[video]'")
    for name in ("clip.mp4", "clip.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 72, 64, "yuv420p"
            for i in range(4):
                pixels = np.asarray(Image.open(scenes / "val" / "images" / f"{i}.png"))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        assert _video(tmp_path / name, 3)[1] == 2
    main(["segment", str(tmp_path / "clip.mp4"), "red, blue", "--model", str(run), "--out", str(tmp_path / "o")])
    assert len(list((tmp_path / "o" / "clip").glob("*.labels.png"))) == 4
    straight = np.asarray(next(_video(tmp_path / "clip.mp4", 1)[0])[1])
    lying(tmp_path / "clip.mp4")
    turned = np.asarray(next(_video(tmp_path / "clip.mp4", 1)[0])[1])
    assert turned.shape == (72, 64, 3) and np.array_equal(turned[:, ::-1].transpose(1, 0, 2), straight)


@pytest.mark.parametrize(("options", "said"), [
    (["nowhere.jpg", "a, b"], "does not exist"),
    (["pictures", ""], "at least one label"),
    (["pictures", "a, a"], "stands twice"),
    (["pictures", "a", "--how", "catsag"], "catseg"),
    (["pictures", "a, background", "--background", "0.5"], "leave it out"),
    (["pictures", "a", "--background", "7"], "between 0 and 1"),
    (["pictures", "a", "--every", "0"], "--every"),
    (["pictures", "a", "--device", "tpu9"], "no device 'tpu9'"),
    (["pictures", "a", "--how", "whole-image", "--background", "0.5"], "two foreground labels"),
    (["pictures", "a", "--out", "pictures"], "choose another"),
    (["text.mp4", "a"], "video"),
    (["text.txt", "a"], "neither a picture nor a video"),
    (["empty", "a"], "holds no pictures"),
])  # fmt: skip
def test_mistakes_of_the_command(
    run: Path, scenes: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").symlink_to(scenes / "val" / "images")
    (tmp_path / "empty").mkdir()
    for name in ("text.mp4", "text.txt"):
        (tmp_path / name).write_text("words")
    refused(capsys, ["segment", *options, "--model", str(run)], said)


def test_small_models_have_smaller_windows_and_pictures_are_squashed(run: Path) -> None:
    model = silc.load(run)
    how = at_size(protocol("catseg"), model)
    assert fit(torch.zeros(3, 40, 90, dtype=torch.uint8), how, model.config).shape == (3, how.short, how.short)


def test_the_recipe_is_the_published_one() -> None:
    c = recipes.get("catseg")
    assert c.model.catseg == CatSegConfig() and (c.steps, c.train.batch) == (80_000, 4)
    found = (c.optim.lr, c.optim.lr * c.init.image_lr, c.optim.weight_decay, c.optim.clip)
    assert found == pytest.approx((2e-4, 2e-6, 1e-4, 0.01))
