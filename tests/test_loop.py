"""A run as its user sees it: it learns, says what it does, survives being killed, and refuses what cannot work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COLOURS, draw
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import silc
from silc.cli import main

QUICK = ("--train.samples", "640", "--train.save-every", "10", "--train.log-every", "1", "--train.threads", "1")


def command(pairs: Path, out: Path, *more: str) -> list[str]:
    return ["train", "mu", "--data.sources", str(pairs), "--out", str(out), *QUICK, *more]


def rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def story(out: Path) -> list[tuple[Any, ...]]:
    """What must not depend on an interruption: step, every loss term, norm, samples met."""
    keys = ("step", "loss", "contrast", "distill", "masked", "grad_norm", "teacher_entropy", "logit_scale", "ids_crc")
    return [tuple(row[k] for k in keys) for row in rows(out)]


def refused(capsys: pytest.CaptureFixture[str], args: list[str], *words: str, status: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    said = capsys.readouterr().err
    assert stop.value.code == status, said
    assert "Traceback" not in said
    for word in words:
        assert word in said, said
    return said


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run of 40 steps."""
    out = tmp_path_factory.mktemp("run") / "whole"
    main(command(pairs, out, "--eval.sets", "retrieval", str(pairs), "--eval.every", "15"))
    return out


def test_a_run_leaves_everything_behind(finished: Path) -> None:
    told = rows(finished)
    assert [row["step"] for row in told] == list(range(1, 41))
    assert told[-1]["contrast"] < told[0]["contrast"]
    for key in ("images_per_s", "wait", "memory_mb", "lr", "prototype_use", "seconds"):
        assert key in told[-1]
    evals = rows(finished, "eval")
    assert [row["step"] for row in evals] == [0, 15, 30, 40]
    assert evals[0]["set"] == "retrieval" and "text_to_image_r1" in evals[0]["chance"]
    config = json.loads((finished / "config.json").read_text())
    assert config["recipe"] == "mu" and config["train"]["samples"] == 640
    assert json.loads((finished / "env.json").read_text())["torch"] == torch.__version__
    assert len(list((finished / "checkpoints").iterdir())) == 2
    exported = {p.name for p in (finished / "export").iterdir()}
    assert {"config.json", "model.safetensors", "training.safetensors"} <= exported


def test_the_export_loads_and_knows_its_texts(finished: Path) -> None:
    model = silc.load(finished)
    with torch.no_grad():
        text = model.encode_text(["a red circle", "a blue square"])
        image = model.encode_image(torch.zeros(1, 3, 32, 48))
        maps = model.patch_text_map(torch.zeros(1, 3, 32, 48), ["a red circle"])
    assert text.shape == (2, 32) and image.shape == (1, 32) and maps.shape == (1, 1, 32, 48)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))
    assert not torch.equal(text[0], text[1])


def test_the_same_command_again_changes_nothing(finished: Path, pairs: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    main(command(pairs, finished, "--eval.sets", "retrieval", str(pairs), "--eval.every", "15"))
    assert (finished / "metrics.jsonl").read_text() == before


def test_killed_before_its_export_a_run_still_makes_it(finished: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "export")
    main(command(pairs, out))
    again, before = (folder / "export" / "model.safetensors" for folder in (out, finished))
    assert again.read_bytes() == before.read_bytes()
    assert not (out / ".export.part").exists()


def launch(args: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "silc", *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ}
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"kind": "train"') >= step:
            return
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.01)
    raise AssertionError("the run did not get there in two minutes")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_in_mid_run_it_goes_on_bit_for_bit(finished: Path, pairs: Path, tmp_path: Path, workers: str) -> None:
    args = command(pairs, tmp_path / "run", "--data.workers", workers)
    process = launch(args)
    wait_for_step(tmp_path / "run", 14, process)
    process.kill()
    process.wait()
    assert 10 <= len(rows(tmp_path / "run")) < 40
    assert launch(args).wait() == 0
    assert story(tmp_path / "run") == story(finished)
    a, b = (folder / "export" / "model.safetensors" for folder in (finished, tmp_path / "run"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_goes_on(finished: Path, pairs: Path, tmp_path: Path) -> None:
    args = command(pairs, tmp_path / "run", "--train.save-every", "1000", "--data.workers", "1")
    process = launch(args)
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0].decode()
    assert process.returncode == 75 and "stopped by SIGTERM" in said and "Traceback" not in said
    assert launch(args).wait() == 0
    assert story(tmp_path / "run") == story(finished)
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert [again["step"] for again in env["resumed"]] == [int(said.split("at step ")[1].split(",")[0])]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    finished: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    main(command(pairs, out, "--train.save-every", "15", "--train.keep", "3"))
    newest = sorted((out / "checkpoints").iterdir())[-1]
    with open(newest / "state-00000-of-00001.safetensors", "r+b") as file:
        file.truncate(1000)
    main(command(pairs, out, "--train.save-every", "15", "--train.keep", "3"))
    said = capsys.readouterr().err
    assert "damaged" in said and "Falling back" in said and "resuming at step 30" in said
    assert story(out) == story(finished)


def test_an_evaluation_that_fails_does_not_end_the_run(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = command(pairs, tmp_path / "run", "--eval.sets", "retrieval", str(tmp_path / "nowhere"))
    main([*args, "--train.samples", "64"])
    assert "retrieval skipped: a process does not find" in capsys.readouterr().err
    assert len(rows(tmp_path / "run")) == 4


def test_the_teacher_and_centre_are_in_the_checkpoint(finished: Path) -> None:
    newest = sorted((finished / "checkpoints").iterdir())[-1]
    facts, tensors = json.loads((newest / "state.json").read_text()), load_file(next(newest.glob("*.safetensors")))
    assert facts["step"] == 40 and facts["position"] == 640
    assert tensors["task.view_centre@0"].abs().sum() > 0
    teacher = tensors["task.teacher.image.patch.weight@0"]
    assert not torch.equal(teacher, tensors["task.student.model.image.patch.weight@0"])
    assert any(k.startswith("optimizer.") for k in tensors)


def test_tensorboard_mirrors_the_numbers(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    main(command(pairs, tmp_path / "run", "--log.tensorboard", "--train.samples", "64"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [round(e.value, 4) for e in events.Scalars("train/loss")] == [
        round(r["loss"], 4) for r in rows(tmp_path / "run")
    ]


# ---------------------------------------------------------------- what is refused


def test_unknown_words_name_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refused(capsys, ["trian"], "'train'")
    refused(capsys, ["train", "silk"], "no recipe 'silk'", "'silc'")
    refused(capsys, ["train", "mu", "--optim.lrr", "1"], "--optim.lr")
    refused(capsys, ["train", "mu", "--objective.kind", "sofmax"], "softmax")
    bad = tmp_path / "c.json"
    bad.write_text('{"optim": {"learning_rate": 1}}')
    refused(capsys, ["train", str(bad)], "unknown key 'optim.learning_rate'")


def test_folders_that_are_not_this_run_are_left_alone(
    finished: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(capsys, command(pairs, tmp_path), "not empty")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    said = refused(capsys, command(pairs, finished, "--optim.lr", "0.5"), "other settings", "optim.lr")
    assert "0.002 -> 0.5" in said


def test_settings_that_cannot_work(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["train", "mu", "--out", str(tmp_path / "a")], "no training data")
    refused(capsys, command(pairs, tmp_path / "b", "--train.accumulate", "3"), "not a multiple")
    refused(capsys, command(pairs, tmp_path / "b", "--train.cuda-graphs"), "needs a GPU")
    refused(capsys, command(pairs, tmp_path / "c", "--objective.kind", "sigmoid"), "needs a bias")
    refused(
        capsys, command(pairs, tmp_path / "d", "--train.device", "cuda"), "no GPU"
    ) if not torch.cuda.is_available() else None
    refused(capsys, command(tmp_path / "nowhere", tmp_path / "e"), "nowhere")


def test_too_many_bad_pictures_stop_the_run(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "data"
    shutil.copytree(pairs, bad)
    for victim in sorted(bad.glob("red-*.png")):
        victim.write_bytes(b"<html>not found</html>")
    said = refused(capsys, command(bad, tmp_path / "run"), "samples are bad", "not an image", "bad_samples.jsonl")
    assert "red-" in said
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert listed and all(item["cause"] == "not an image" and "red-" in item["id"] for item in listed)


def test_a_few_bad_pictures_are_skipped_and_counted(pairs: Path, tmp_path: Path) -> None:
    bad = tmp_path / "data"
    shutil.copytree(pairs, bad)
    (bad / "red-circle-0.png").write_bytes(b"")
    main(command(bad, tmp_path / "run"))
    assert rows(tmp_path / "run")[-1]["bad"] > 0 and len(rows(tmp_path / "run")) == 40


def test_each_kind_of_bad_sample_is_counted_by_its_cause(pairs: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(pairs, data)
    Image.effect_noise((400, 300), 60).convert("RGB").save(data / "whole.jpg")
    jpeg = (data / "whole.jpg").read_bytes()
    (data / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (data / "page.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (data / "empty.png").write_bytes(b"")
    (data / "vast.png").write_bytes(png_header(30_000, 30_000))
    names = ("truncated.jpg", "page.jpg", "empty.png", "vast.png", "nowhere.png", "whole.jpg")
    with open(data / "captions.jsonl", "a") as file:
        for name in names:
            file.write(json.dumps({"image": name, "caption": "" if name == "whole.jpg" else "a thing"}) + "\n")
    main(command(data, out, "--data.max-bad-fraction", "0.5"))
    told = map(json.loads, (out / "bad_samples.jsonl").read_text().splitlines())
    listed = {Path(row["id"]).name: row["cause"] for row in told}
    assert set(listed) == set(names)
    causes = [listed[name] for name in names]
    assert causes == ["truncated", "not an image", "empty", "too large", "missing file", "no caption"]
    assert len(rows(out)) == 40


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_an_empty_folder_and_a_table_without_captions_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    refused(capsys, command(tmp_path / "empty", tmp_path / "a"), str(tmp_path / "empty"))
    (tmp_path / "t.csv").write_text("file,words\na.png,hello\n")
    refused(capsys, command(tmp_path / "t.csv", tmp_path / "b"), "words", "--data.text-key")
    refused(capsys, command("pipe:touch x", tmp_path / "c"), "pipe:")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists() and not Path("x").exists()


@pytest.mark.slow
def test_torchrun_trains_the_same_run_and_resumes_on_another_number_of_processes(
    finished: Path, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "silc"]
    half = subprocess.Popen(
        [*launcher, *command(pairs, out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    wait_for_step(out, 22, half)
    os.killpg(half.pid, signal.SIGKILL)
    half.wait()
    assert launch(command(pairs, out)).wait() == 0
    for key in ("loss", "contrast", "distill", "masked"):
        found, expected = ([row[key] for row in rows(folder)] for folder in (out, finished))
        assert found == pytest.approx(expected, rel=5e-3)


def test_a_task_that_raises_does_not_end_the_run(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*command(pairs, tmp_path / "run", "--eval.sets", "segment", str(pairs)), "--train.samples", "64"])
    assert "segment failed" in capsys.readouterr().err
    assert len(rows(tmp_path / "run")) == 4


@pytest.mark.slow
def test_several_processes_share_an_evaluation_and_agree(finished: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = command(pairs, out, "--train.samples", "240", "--eval.sets", "retrieval", str(pairs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "silc"]
    assert subprocess.run([*launcher, *args], check=False, capture_output=True).returncode == 0
    told = rows(out, "eval")
    assert [row["step"] for row in told] == [0, 15]
    assert told[0]["metrics"] == pytest.approx(rows(finished, "eval")[0]["metrics"])


def segment_worker(rank: int, port: int, model: str, folder: str, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    from silc import parallel
    from silc.eval.run import evaluate

    world = parallel.start("cpu")
    result = evaluate(silc.load(model), {"segment": folder}, world=world)["segment"]
    details = {k: result.details[k] for k in ("interval", "per_class", "confusion", "picture_miou")}
    Path(out, f"{rank}.json").write_text(json.dumps([result.metrics, result.chance, details]))
    parallel.stop()


@pytest.mark.slow
def test_two_processes_segment_half_each_and_find_the_same(finished: Path, tmp_path: Path) -> None:
    import torch.multiprocessing as mp

    from silc.eval.run import evaluate

    folder = tmp_path / "set"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    classes = [f"a {colour} circle" for colour in COLOURS]
    (folder / "classes.json").write_text(json.dumps({"classes": classes, "background": False, "void": 255}))
    for i in range(7):
        picture, mask = draw(list(COLOURS)[i % 4], "circle", i * 20), Image.new("L", (56, 48), 255)
        ImageDraw.Draw(mask).ellipse((12, 8, 44, 40), fill=i % 4)
        picture.save(folder / "images" / f"{i}.png")
        mask.save(folder / "masks" / f"{i}.png")
    alone = evaluate(silc.load(finished), {"segment": folder})["segment"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    mp.spawn(segment_worker, (port, str(finished), str(folder), str(tmp_path)), nprocs=2)
    details = {k: alone.details[k] for k in ("interval", "per_class", "confusion", "picture_miou")}
    expected = json.loads(json.dumps([alone.metrics, alone.chance, details]))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
