"""Loader: the same global batches for every world, worker count and start; clean ends; the limit on bad samples.

Gives: tests of silc.data.loader.
Used by: pytest.
"""

import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from silc.config import Config, DataConfig, ModelConfig, ObjectiveConfig, PreprocessConfig, TrainConfig, ViewsConfig
from silc.data import loader as loader_module
from silc.data.images import decode, preprocess
from silc.data.loader import BadCount, batches
from silc.data.pairs import Bad, Mixture, open_source
from silc.data.views import cut, draw_crops, draw_photometric, room_for, sample_rng

CONFIG = Config(
    seed=5,
    model=ModelConfig(preprocess=PreprocessConfig(size=20)),
    objective=ObjectiveConfig(contrast_views="both"),
    views=ViewsConfig(globals=2, global_size=24, locals=3, local_size=16, photometric="dino"),
    data=DataConfig(workers=0),
    train=TrainConfig(batch=8),
)
BROKEN = {3: b"<html>not found</html>", 7: b"", 11: None}
COUNT = 20
ARRAYS = ("image", "tokens", "globals", "locals", "photo")


def tokenizer(texts):
    assert all(isinstance(text, str) for text in texts)
    return torch.tensor([[len(text), sum(text.encode())] for text in texts])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty noisy pictures with two captions each; one is a web page, one empty, one cut short."""
    root = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(COUNT):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (40 + i, 60, 3), np.uint8)).save(out, "JPEG")
        data = out.getvalue()
        (root / f"{i}.jpg").write_bytes(BROKEN.get(i, data) if BROKEN.get(i, data) is not None else data[:900])
        lines.append(json.dumps({"image": f"{i}.jpg", "caption": [f"first {i}", f"second caption {i}"]}))
    (root / "captions.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def mixture(folder):
    return Mixture([open_source(str(folder), CONFIG.data)], (), CONFIG.seed)


def take(config, mixture, count, start=0, rank=0, world=1, workers=0):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))
    stream = batches(config, mixture, tokenizer, start, rank, world)
    made = list(itertools.islice(stream, count))
    stream.close()
    return made


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert np.array_equal(value, b[name]) if name in ARRAYS else value == b[name], name


@pytest.fixture(scope="module")
def reference(mixture):
    return take(CONFIG, mixture, 4)


def test_batch_holds_the_views_of_its_positions(mixture, reference):
    batch = reference[2]
    shapes = {name: tuple(batch[name].shape) for name in ARRAYS}
    assert shapes == {
        "image": (8, 3, 20, 20), "globals": (2, 8, 3, 24, 24), "locals": (3, 8, 3, 16, 16),
        "photo": (5, 8, 7), "tokens": (8, 2),
    }  # fmt: skip
    assert {batch[name].dtype for name in ("image", "globals", "locals")} == {torch.uint8}
    assert batch["photo"].dtype == np.float32 and batch["tokens"].dtype == torch.int64
    source = mixture.sources[0]
    named = {source.ident(i): i for i in range(len(source))}
    for row in (0, 5):
        data, captions, _ = source.read(named[batch["ids"][row]])
        rng = sample_rng(CONFIG.seed, 2 * 8 + row)
        caption = captions[int(rng.integers(2))]
        image = decode(data, 10**6)
        height, width = image.shape[1:]
        room = room_for(CONFIG.views, 1)
        places = [view[0] for kind in room.values() for view in kind]
        cut(image, draw_crops(height, width, CONFIG.views, rng), height, width, places)
        for name, views in room.items():
            assert torch.equal(batch[name][:, row], views[:, 0].movedim(-1, -3))
        assert np.array_equal(batch["photo"][:, row], draw_photometric(CONFIG.views, rng))
        assert torch.equal(batch["image"][row], preprocess(image, CONFIG.model.preprocess))
        assert torch.equal(batch["tokens"][row], tokenizer([caption])[0])


def test_both_captions_are_drawn_and_bad_samples_reported(mixture):
    made = take(CONFIG, mixture, 10)
    lengths = {int(batch["tokens"][row, 0]) > 10 for batch in made for row in range(8)}
    assert lengths == {True, False}
    bad = {(item["id"], item["cause"]) for batch in made for item in batch["bad"]}
    assert bad == {("3.jpg", "not an image"), ("7.jpg", "empty"), ("11.jpg", "truncated")}
    for step, batch in enumerate(made):
        assert all(step * 8 <= item["position"] < step * 8 + 8 for item in batch["bad"])
        assert not {"3.jpg", "7.jpg", "11.jpg"} & set(batch["ids"])


@pytest.mark.parametrize("world", [2, 4])
def test_world_size_does_not_change_the_global_batch(mixture, reference, world):
    parts = [take(CONFIG, mixture, 2, rank=rank, world=world) for rank in range(world)]
    for step, whole in enumerate(reference[:2]):
        for name in ("ids", "bad"):
            assert list(itertools.chain(*(part[step][name] for part in parts))) == whole[name]
        for name in ARRAYS:
            axis = 0 if name in ("image", "tokens") else 1
            assert np.array_equal(np.concatenate([part[step][name] for part in parts], axis), whole[name])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches_nor_the_random_state(mixture, reference, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for got, want in zip(take(CONFIG, mixture, 4, workers=workers), reference, strict=True):
        same(got, want)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_a_step_equals_continuing_to_it(mixture, reference, workers):
    for got, want in zip(take(CONFIG, mixture, 2, start=2, workers=workers), reference[2:], strict=True):
        same(got, want)


def test_the_next_batch_is_made_while_the_caller_works(mixture):
    calls = []
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, workers=1))
    stream = batches(config, mixture, lambda texts: calls.append(1) or tokenizer(texts), 0, 0, 1)
    next(stream)
    until = time.monotonic() + 5
    while len(calls) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    stream.close()
    assert len(calls) == 2


def test_keys_follow_the_config(mixture):
    plain = dataclasses.replace(CONFIG, objective=ObjectiveConfig(), views=ViewsConfig(global_size=24))
    (batch,) = take(plain, mixture, 1)
    assert batch.keys() == {"globals", "tokens", "ids", "bad"}
    large = dataclasses.replace(plain, train=TrainConfig(batch=70))  # several chunks, the last one short
    (batch,) = take(large, mixture, 1)
    assert batch["globals"].shape == (1, 70, 3, 24, 24) and len(batch["ids"]) == 70


def test_broken_shards_are_reported_once(folder):
    source = open_source(str(folder), CONFIG.data)
    source.damage = [{"id": "x.tar", "cause": "truncated shard"}]
    mixture = Mixture([source], (), CONFIG.seed)
    told = Bad(position=-1, id="x.tar", source=source.name, cause="truncated shard")
    first, second = take(CONFIG, mixture, 2)
    assert first["bad"][0] == told and told not in second["bad"]
    assert told not in take(CONFIG, mixture, 1, start=1)[0]["bad"]
    assert told not in take(CONFIG, mixture, 1, rank=1, world=2)[0]["bad"]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_arrives_as_one_sentence(tmp_path, workers):
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{i}.jpg,x\n" for i in range(30)))
    mixture = Mixture([open_source(str(tmp_path), CONFIG.data)], (), 0)
    with pytest.raises(ValueError, match=r"^data: 16 samples .*: 16 x missing file; .*looked for in") as caught:
        take(CONFIG, mixture, 1, workers=workers)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


def test_batch_must_be_shared_evenly_and_shared_memory_suffice(mixture, monkeypatch):
    with pytest.raises(ValueError, match="batch of 8 cannot be shared among 3"):
        batches(CONFIG, mixture, tokenizer, 0, 0, 3)
    usage = type("Usage", (), {"free": 4096})
    monkeypatch.setattr(loader_module.shutil, "disk_usage", lambda path: usage)
    if Path("/dev/shm").is_dir():
        with pytest.raises(ValueError, match="shared memory are too little for 2 workers"):
            take(CONFIG, mixture, 1, workers=2)


# ---------------------------------------------------------------- processes


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_workers_outlive_signals_and_end_with_the_iterator(mixture, reference):
    torch.rand(256, 256) @ torch.rand(256, 256)  # so that threads exist before the fork
    before = set(children(os.getpid()))
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, workers=2))
    stream = batches(config, mixture, tokenizer, 0, 0, 1)
    same(next(stream), reference[0])
    workers = set(children(os.getpid())) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    for want in reference[1:]:
        same(next(stream), want)
    begun = time.monotonic()
    stream.close()
    assert not any(map(running, workers)) and time.monotonic() - begun < 4


@linux
@pytest.mark.slow
def test_a_killed_worker_is_one_sentence(mixture):
    handler = signal.getsignal(signal.SIGCHLD)
    before = set(children(os.getpid()))
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, workers=1))
    stream = batches(config, mixture, tokenizer, 0, 0, 1)
    next(stream)
    (worker,) = set(children(os.getpid())) - before
    assert signal.getsignal(signal.SIGCHLD) is handler
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"worker process died.*lower --data.workers"):
        for _ in range(100):
            next(stream)


PROGRAM = """
    import os, sys
    from test_loader import CONFIG, batches, children, dataclasses, open_source, tokenizer, Mixture

    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, workers=2))
    mixture = Mixture([open_source(sys.argv[1], config.data)], (), 0)
    stream = batches(config, mixture, tokenizer, 0, 0, 1)
    next(stream)
    print(*children(os.getpid()), flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.read()
    raise KeyError("the program fails with its iterator open")
"""


def start(folder, mode):
    tests = Path(__file__).parent
    paths = os.pathsep.join((str(tests), str(tests.parent / "src")))
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder), mode],
        env={**os.environ, "PYTHONPATH": paths}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdout is not None
    return program, [int(pid) for pid in program.stdout.readline().split()]


@linux
@pytest.mark.slow
def test_a_failing_program_ends_at_once(folder):
    program, workers = start(folder, "fail")
    _, stderr = program.communicate(timeout=20)
    assert len(workers) == 2 and "KeyError" in stderr and not any(map(running, workers))


@linux
@pytest.mark.slow
def test_workers_die_with_a_killed_parent(folder):
    program, workers = start(folder, "wait")
    assert len(workers) == 2 and all(map(running, workers))
    program.kill()
    program.communicate()
    until = time.monotonic() + 20
    while any(map(running, workers)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(map(running, workers))


# ---------------------------------------------------------------- counting bad samples


def bad(count, cause, first=0):
    return [Bad(position=i, id=f"{cause} {i}", source="s", cause=cause) for i in range(first, first + count)]


def test_too_many_bad_samples_stop_the_run(tmp_path):
    path = tmp_path / "bad.jsonl"
    count = BadCount(0.05, path)
    count.add(90, bad(10, "truncated"))
    count.check()  # a tenth is bad, but 100 samples are too few to judge
    count.add(190, bad(5, "no caption", 10))
    with pytest.raises(ValueError) as caught:
        count.check()
    assert str(caught.value) == (
        "data: 15 of 295 samples are bad (5.1%, limit 5.0%): 10 truncated, 5 no caption; the first are truncated 0, "
        f"truncated 1, truncated 2; all are listed in {path}. Mend the data, or raise --data.max-bad-fraction."
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == bad(10, "truncated") + bad(5, "no caption", 10)
    count.add(5, [])
    count.check()  # 15 of 300 are 5%: at the limit, not above it


def test_bad_count_goes_on_from_a_checkpoint():
    count, resumed = BadCount(0.5), BadCount(0.5)
    count.add(10, bad(3, "empty"))
    resumed.restore(json.loads(json.dumps(count.state())))
    for each in (count, resumed):
        each.add(7, bad(2, "truncated"))
    assert resumed.state() == count.state() == {
        "seen": 22, "causes": {"empty": 3, "truncated": 2}, "first": ["empty 0", "empty 1", "empty 2"],
    }  # fmt: skip
    assert count.bad == 5
