"""Checkpoints: written behind the run's back, whole or not at all, by and for any number of processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from test_loop import command, launch, refused, rows, story, wait_for_step
from test_pretrain import batch_of, free_port

from silc import parallel, recipes
from silc.cli import main
from silc.config import Config
from silc.parallel import World
from silc.train import checkpoint
from silc.train.guard import Halt
from silc.train.loop import build
from silc.train.optim import clip_and_step
from silc.train.pretrain import Pretrain

ALONE = World(0, 1, torch.device("cpu"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run of 40 steps."""
    out = tmp_path_factory.mktemp("run") / "whole"
    main(command(pairs, out))
    return out


def config() -> Config:
    base = recipes.mu()
    views = replace(base.views, photometric="none")
    # 12 pairs and 50 prototypes: neither three nor four processes share the rows evenly
    o = replace(base.objective, prototypes=replace(base.objective.prototypes, count=50))
    return replace(base, views=views, objective=o, train=replace(base.train, batch=12))


def trained(world: World, steps: int = 2) -> tuple[Pretrain, torch.optim.AdamW]:
    c = config()
    task, optimizer = build(c, world)
    each = c.train.batch // world.size
    for n in range(steps):
        task.forward_backward(batch_of(c, n, slice(world.rank * each, (world.rank + 1) * each)), n)
        clip_and_step(task.student.parameters(), optimizer, 1.0)
        task.after_step(n)
    return task, optimizer


def everything(task: Pretrain, optimizer: torch.optim.Optimizer, world: World) -> dict[str, torch.Tensor]:
    """Whole copies of all that a run consists of, under names of this test's own making."""
    found = {f"state {k}": v for k, v in task.state_dict().items()}
    for i, p in enumerate(task.student.parameters()):
        found |= {f"moment {i} {k}": v for k, v in optimizer.state.get(p, {}).items()}
    return {k: parallel.whole(v.detach()).clone() for k, v in found.items() if v.numel()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def in_world(rank: int, size: int, shard: int, port: int, act: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    world = parallel.start("cpu", shard)
    checkpoint.PIECE = 2048  # so that the tensors of this small model are cut, too
    if act == "write":
        task, optimizer = trained(world)
        saver = checkpoint.Saver(folder / "checkpoints", 2, world)
        saver.save(task, optimizer, {"step": 2})
        saver.finish()
        truth = everything(task, optimizer, world)
        if world.leads:
            save_file(truth, folder / "truth.safetensors")
    else:
        from safetensors.torch import load_file

        task, optimizer = trained(world, 0)
        saved = checkpoint.latest(folder / "checkpoints", world)
        assert saved is not None and saved.facts["step"] == 2
        checkpoint.restore(task, optimizer, saved, world)
        assert same(everything(task, optimizer, world), load_file(folder / "truth.safetensors"))
        task.forward_backward(batch_of(config(), 2, slice(rank * 12 // size, (rank + 1) * 12 // size)), 2)
        clip_and_step(task.student.parameters(), optimizer, 1.0)  # the optimiser takes its moments as they were put
        assert {float(s["step"]) for s in optimizer.state.values()} == {3.0}
    parallel.barrier(world)
    parallel.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrote", "reads"),
    [((1, 1), (3, 3)), ((2, 1), (1, 1)), ((3, 3), (2, 1)), ((4, 2), (3, 3)), ((2, 2), (4, 2)), ((4, 1), (4, 4))],
)
def test_any_number_of_processes_goes_on_from_any_other(
    tmp_path: Path, wrote: tuple[int, int], reads: tuple[int, int]
) -> None:
    mp.spawn(in_world, (*wrote, free_port(), "write", tmp_path), nprocs=wrote[0])
    sizes = [f.stat().st_size for f in (tmp_path / "checkpoints" / "step-00000002").glob("*.safetensors")]
    assert len(sizes) == wrote[0] and max(sizes) < 1.3 * sum(sizes) / len(sizes)
    whole = sum(t.nbytes for t in everything(*trained(ALONE), ALONE).values())
    assert whole < sum(sizes) < whole + wrote[0] * 100_000  # every row once, and headers
    mp.spawn(in_world, (*reads, free_port(), "read", tmp_path), nprocs=reads[0])


def test_a_step_waits_for_the_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()

    def slow(tensors: Any, path: Path) -> None:
        assert may_write.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_tensors", slow)
    task, optimizer = trained(ALONE)
    before = everything(task, optimizer, ALONE)
    saver = checkpoint.Saver(tmp_path, 2, ALONE)
    saver.save(task, optimizer, {"step": 2})
    assert checkpoint.steps(tmp_path) == []  # back in the training, and nothing is written
    task.forward_backward(batch_of(config(), 2), 2)
    clip_and_step(task.student.parameters(), optimizer, 1.0)
    assert not same(everything(task, optimizer, ALONE), before)
    may_write.set()
    saver.finish()
    saved = checkpoint.latest(tmp_path, ALONE)
    assert saved is not None
    other, fresh = trained(ALONE, 0)
    checkpoint.restore(other, fresh, saved, ALONE)
    assert same(everything(other, fresh, ALONE), before)


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009.dead.part").mkdir()
    task, optimizer = trained(ALONE, 1)
    saver = checkpoint.Saver(tmp_path, 2, ALONE)
    for step in (1, 2, 3):
        saver.save(task, optimizer, {"step": step})
    saver.finish()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_full_disk_ends_the_run_and_takes_nothing_away(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Path] = []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        save_file(tensors, path)
        if len(calls) == 3:
            os.truncate(path, 1000)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    refused(capsys, command(pairs, tmp_path / "run"), "step 30", "No space left", "are whole", status=1)
    kept = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert [p.name for p in kept] == ["step-00000010", "step-00000020"]
    assert len(rows(tmp_path / "run")) < 40  # it did not go on to the end as if nothing had happened
    assert not (tmp_path / "run" / "export").exists()
    monkeypatch.undo()
    main(command(pairs, tmp_path / "run"))
    assert (tmp_path / "run" / "export").exists()


def test_a_process_whose_file_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "shared_number", lambda number, world: number)
    monkeypatch.setattr(checkpoint, "all_agree", lambda yes, world: yes)
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.2)
    task, optimizer = trained(ALONE, 1)
    saver = checkpoint.Saver(tmp_path, 2, World(0, 2, torch.device("cpu")))
    saver.save(task, optimizer, {"step": 1})
    with pytest.raises(Halt, match=r"no state-00001-of-00002\.safetensors from its process"):
        saver.finish()
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize("harm", ["cut", "missing", "no facts", "garbled"])
def test_damage_is_noticed_and_the_one_before_is_taken(
    tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task, optimizer = trained(ALONE, 1)
    saver = checkpoint.Saver(tmp_path, 2, ALONE)
    for step in (1, 2):
        saver.save(task, optimizer, {"step": step})
    saver.finish()
    newest = tmp_path / "step-00000002"
    file = newest / "state-00000-of-00001.safetensors"
    if harm == "cut":
        os.truncate(file, 5000)
    elif harm == "missing":
        file.unlink()
    elif harm == "no facts":
        (newest / "state.json").unlink()
    else:
        file.write_bytes(b"\xff" * file.stat().st_size)
    saved = checkpoint.latest(tmp_path, ALONE)
    assert saved is not None and saved.facts["step"] == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step-00000002 is damaged" in said and "Falling back" in said


def test_another_format_is_refused_and_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "state.json").write_text(json.dumps({"step": 5, "bytes": 10}))
    with pytest.raises(ValueError, match=r"another version of silc \(checkpoint format 1, here 2\)"):
        checkpoint.latest(tmp_path, ALONE)


SLOW_DISK = """
import sys, time
from silc.train import checkpoint
from silc.cli import main
real = checkpoint.save_tensors
def slow(tensors, path):
    real(tensors, path)
    time.sleep(0 if "00000010" in str(path) else 60)
checkpoint.save_tensors = slow
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_amid_a_write_it_goes_on_from_the_checkpoint_before_bit_for_bit(
    finished: Path, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", SLOW_DISK, *command(pairs, out)], stderr=subprocess.DEVNULL)
    wait_for_step(out, 24, process)
    process.kill()
    process.wait()
    left = sorted(p.name.split(".")[1] if p.name[0] == "." else p.name for p in (out / "checkpoints").iterdir())
    assert left == ["step-00000010", "step-00000020"]  # the second one unfinished
    assert [p.name for p in checkpoint.steps(out / "checkpoints")] == ["step-00000010"]
    assert launch(command(pairs, out)).wait() == 0
    assert story(out) == story(finished)
    a, b = (folder / "export" / "model.safetensors" for folder in (finished, out))
    assert a.read_bytes() == b.read_bytes()


# ---------------------------------------------------------------- torchrun


def torchrun(count: int, args: list[str], *more: str) -> subprocess.Popen[bytes]:
    call = [*TORCHRUN, *more, "--nproc-per-node", str(count), "-m", "silc", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def workers(agent: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"silc" in Path(f"/proc/{pid}/cmdline").read_bytes()]


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")


@pytest.mark.slow
@needs_proc
def test_torchrun_restarts_a_killed_process_and_the_run_ends_as_if_nothing_had_happened(
    pairs: Path, tmp_path: Path
) -> None:
    agent = torchrun(2, command(pairs, tmp_path / "calm"))
    said = agent.communicate(timeout=300)[0].decode()
    assert agent.returncode == 0, said
    out = tmp_path / "shaken"
    agent = torchrun(2, command(pairs, out), "--max-restarts", "2")
    wait_for_step(out, 14, agent)
    os.kill(workers(agent)[1], signal.SIGKILL)
    said = agent.communicate(timeout=300)[0].decode()
    assert agent.returncode == 0, said
    resumed = json.loads((out / "env.json").read_text())["resumed"]
    assert len(resumed) == 1 and resumed[0]["step"] in (10, 20)
    assert story(out) == story(tmp_path / "calm")
    for name in ("model.safetensors", "training.safetensors"):
        assert (out / "export" / name).read_bytes() == (tmp_path / "calm" / "export" / name).read_bytes()


@pytest.mark.slow
@needs_proc
def test_a_run_shrinks_and_grows_on_its_way(finished: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for count, shard, until in ((2, 1, 12), (1, 1, 22), (4, 2, 0)):
        agent = torchrun(count, command(pairs, out, "--train.shard", str(shard)))
        if until:
            wait_for_step(out, until, agent)
            os.kill(workers(agent)[0], signal.SIGKILL)
        agent.communicate(timeout=300)
        assert (agent.returncode == 0) == (until == 0)
    for key in ("loss", "contrast", "distill", "masked"):
        found, expected = ([row[key] for row in rows(folder)] for folder in (out, finished))
        assert found == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
@needs_proc
def test_a_signal_to_one_process_stops_all_at_one_step(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    agent = torchrun(2, command(pairs, out, "--train.save-every", "1000"))
    wait_for_step(out, 6, agent)
    os.kill(workers(agent)[1], signal.SIGUSR1)
    said = agent.communicate(timeout=120)[0].decode()
    assert "stopped by SIGUSR1 at step" in said and "stopped by a signal to another process at step" in said
    assert "exitcode  : 75" in said, said
    saved = checkpoint.latest(out / "checkpoints", ALONE)
    assert saved is not None and saved.facts["step"] == len(rows(out)) < 40
    assert len(saved.facts["files"]) == 2


@pytest.mark.slow
@needs_proc
def test_torchrun_hands_a_signal_on_and_waits_for_the_save(pairs: Path, tmp_path: Path) -> None:
    """What examples/slurm.sh relies on: USR1 to torchrun reaches every process, and is not taken for a failure."""
    out = tmp_path / "run"
    options = ("--signals-to-handle", "SIGTERM,SIGUSR1", "--max-restarts", "2")
    agent = torchrun(2, command(pairs, out, "--train.save-every", "1000"), *options)
    wait_for_step(out, 6, agent)
    agent.send_signal(signal.SIGUSR1)
    said = agent.communicate(timeout=120)[0].decode()
    assert agent.returncode != 0 and said.count("stopped by SIGUSR1 at step") == 2, said
    saved = checkpoint.latest(out / "checkpoints", ALONE)
    assert saved is not None and 6 <= saved.facts["step"] < 40
