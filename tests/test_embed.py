"""Features of pictures: computed once, kept, found again, and shared among processes.

Gives: tests of silc.eval.embed and of how eval.run shares features.
Used by: pytest.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from known import Arbitrary, Oracle, save, solid, write_splits
from torch import Tensor, nn

from silc.data.labelled import open_classification
from silc.eval import embed, fewshot, probe, run, zeroshot


def test_every_module_keeps_its_mode_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model.train()
    model[1].eval()
    with pytest.raises(RuntimeError), embed.evaluating(model):
        assert not model[0].training
        raise RuntimeError
    assert model.training and model[0].training and not model[1].training and torch.is_grad_enabled()


def test_progress_speaks_only_when_it_takes_long(capsys):
    slow, fast = embed.Progress("slow", 10, patience=0), embed.Progress("fast", 10)
    for bar in (slow, fast):
        bar.add(4)
        bar.add(6)
    said = capsys.readouterr().err
    assert "slow: 4/10 images" in said and "slow: 10/10" in said and "s left" in said and "fast" not in said


def test_texts_come_back_in_order():
    texts = [f"{name} thing" for name in ("red", "white", "black", "no", "blue")]
    for batch in (1, 2, 9):
        assert torch.equal(embed.embed_texts(Oracle(), texts, batch), Oracle().encode_text(texts))


# ---------------------------------------------------------------- computed once


class Counting(Arbitrary):
    """Knows how many pictures it saw; has weights, so that it has a fingerprint."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = 0

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        return super().encode_image(pixels)


class Pooling(Counting):
    """A model whose tower tells what it pools: the arbitrary features, three times as long, before their projection."""

    def encode_pooled(self, pixels: Tensor) -> Tensor:
        return 3 * Counting.encode_image(self, pixels)

    def project(self, pooled: Tensor) -> Tensor:
        return F.normalize(pooled.flip(1), dim=1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.project(self.encode_pooled(pixels))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_splits(tmp_path / "set", train=4, test=3, noise=100)


TASKS = ("zeroshot", "zeroshot/again", "fewshot", "probe")


@pytest.mark.parametrize("kind", [Counting, Pooling])
def test_all_tasks_share_one_pass(folder, kind):
    model, sets = kind(), dict.fromkeys(TASKS, folder)
    small = {"zeroshot": zeroshot.Config(batch=6), "fewshot": fewshot.Config(batch=6), "probe": probe.Config(batch=6)}
    together = run.evaluate(model, sets, configs=small)
    assert model.seen == 18 + 24, "each picture once"
    for name in TASKS:
        alone = run.evaluate(kind(), {name: folder}, configs={name: small[name.partition("/")[0]]})[name]
        assert alone.metrics == pytest.approx(together[name].metrics)
    assert together["fewshot"].details["features"] == ("pooled" if kind is Pooling else "embedding")
    assert together["probe"].details["seconds"] >= 0


def test_pooled_features_and_their_projection(folder):
    model, data = Pooling(), open_classification(folder)
    features = embed.Features(model)
    pooled, projected = features.images(data, 5, pooled=True), features.images(data, 5)
    torch.testing.assert_close(projected, embed.embed_images(model, data, 5))
    torch.testing.assert_close(F.normalize(pooled.flip(1), dim=1), projected)
    assert pooled.norm(dim=1).allclose(torch.tensor(3.0)) and model.seen == 40, "one pass, and one by embed_images"


def test_another_run_of_the_same_model_finds_them(folder, tmp_path):
    cache, sets = tmp_path / "cache", {"fewshot": folder}
    first = Counting()
    before = run.evaluate(first, sets, cache=cache)["fewshot"]
    again = Counting()
    assert run.evaluate(again, sets, cache=cache)["fewshot"].metrics == before.metrics and again.seen == 0
    changed = Counting()
    with torch.no_grad():
        changed.weight += 1
    run.evaluate(changed, sets, cache=cache)
    resized = Counting()
    preprocess = dataclasses.replace(resized.config.preprocess, interpolation="bicubic")
    resized.config = dataclasses.replace(resized.config, preprocess=preprocess)
    run.evaluate(resized, sets, cache=cache)
    assert changed.seen == resized.seen == first.seen > 0
    assert not list(cache.rglob("*.part"))


def test_an_edited_picture_and_a_broken_file_are_not_believed(folder, tmp_path):
    cache, model = tmp_path / "cache", Counting()
    data = open_classification(folder)
    before = embed.Features(model, cache).images(data, 6)
    path = data.paths[2]
    save(path, solid(5, 44, 44))
    after = embed.Features(model, cache).images(data, 6)
    assert model.seen == 36 and [i for i in range(18) if not torch.equal(before[i], after[i])] == [2]
    for file in cache.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:150])
    assert torch.equal(embed.Features(model, cache).images(data, 6), after) and model.seen == 54
    for file in cache.glob("*.npy"):
        np.save(file, np.zeros((3, 8), np.float32))
    assert torch.equal(embed.Features(model, cache).images(data, 6), after) and model.seen == 72
    assert torch.equal(embed.Features(model, cache).images(data, 6), after) and model.seen == 72


def test_memory_is_bounded_and_the_oldest_set_goes(folder):
    model = Counting()
    train, test = open_classification(folder, "train"), open_classification(folder, "test")
    features = embed.Features(model, limit=24 * 8 * 4)
    for data, seen in [(train, 24), (train, 24), (test, 42), (test, 42), (train, 66)]:
        features.images(data, 6)
        assert model.seen == seen and sum(t.numel() for t in features.kept.values()) <= 24 * 8


def test_pictures_without_files_are_embedded_each_time():
    class Drawn:
        def __len__(self) -> int:
            return 3

        def image(self, index: int) -> Tensor:
            return torch.full((3, 9, 9), 80 * index, dtype=torch.uint8)

    model = Counting()
    features = embed.Features(model)
    assert torch.equal(features.images(Drawn(), 3), features.images(Drawn(), 3)) and model.seen == 6


# ---------------------------------------------------------------- several processes


def worker(rank: int, port: int, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    from silc import parallel

    world, model, data = parallel.start("cpu"), Pooling(), open_classification(folder)
    whole = embed.Features(model, world=world).images(data, 4)
    assert model.seen == 12, "nine of eighteen pictures, padded to batches of four"
    alone = embed.embed_images(Pooling(), data, 4)
    torch.testing.assert_close(whole, alone)
    lonely = dataclasses.replace(data, paths=data.paths[:1], labels=[0])
    torch.testing.assert_close(embed.embed_images(model, lonely, 4, world=world), alone[:1])
    sets, cache = {"fewshot": folder, "probe": folder}, Path(out) / "cache"
    together = run.evaluate(model, sets, cache=cache, world=world)
    single = run.evaluate(Pooling(), sets)
    for name in sets:
        assert abs(together[name].metrics["shot5" if name == "fewshot" else "linear"]
                   - single[name].metrics["shot5" if name == "fewshot" else "linear"]) < 1e-9
    parallel.barrier(world)
    again = Pooling()
    run.evaluate(again, sets, cache=cache, world=world)
    assert again.seen == 0
    parallel.barrier(world)
    if rank == 1:  # only one process no longer finds the files: all embed, none waits
        embed.Features._load = lambda *args: unfound(*args)  # type: ignore[method-assign]
    run.evaluate(again, sets, cache=cache, world=world)
    assert again.seen > 0
    embed.Features._load = real_load  # type: ignore[method-assign]
    parallel.barrier(world)
    if rank == 0:
        data.paths[5].write_bytes(b"broken")  # the second process reads it
    parallel.barrier(world)
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        embed.Features(model, world=world).images(data, 4)
    Path(out, f"{rank}.done").write_text("done")
    parallel.barrier(world)
    parallel.stop()


real_load = embed.Features._load


def unfound(self: embed.Features, key: str, count: int) -> Tensor | None:
    folder, self.folder = self.folder, Path("nowhere")
    try:
        return real_load(self, key, count)
    finally:
        self.folder = folder


@pytest.mark.slow
def test_two_processes_embed_half_each_and_fail_together(folder, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, str(folder), str(tmp_path)), nprocs=2)
    assert sorted(p.name for p in tmp_path.glob("*.done")) == ["0.done", "1.done"]
