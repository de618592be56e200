"""examples/slurm.sh, run whole with two torchrun agents on this machine; only SLURM's own commands are stand-ins.

Used by: pytest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import command, rows, wait_for_step
from test_pretrain import free_port

from silc.train import checkpoint

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm.sh"
# one task a node, and signals handed on, as srun(1) says
SRUN = """#!{python}
import os, signal, subprocess, sys
call = sys.argv[1:]
while call[0].startswith("-"):
    call.pop(0)
call = [{python!r}, "-m", "torch.distributed.run", "--local-addr", "127.0.0.1", *call[1:]]
tasks = [subprocess.Popen(call) for _ in range(int(os.environ["SLURM_NNODES"]))]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1" in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def submit(folder: Path, port: int, args: list[str]) -> subprocess.Popen[bytes]:
    commands = folder / "bin"
    commands.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "1"}
    mine = {"PATH": f"{commands}:{os.environ['PATH']}", "PORT": str(port), "REQUEUED": str(folder / "requeued")}
    env = os.environ | slurm | mine
    return subprocess.Popen(["bash", str(SCRIPT), *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="SLURM runs on Linux")
def test_a_job_saves_before_its_time_is_up_queues_itself_again_and_ends(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    args = command(pairs, out, "--train.save-every", "1000", "--train.device", "cpu")[1:]
    job = submit(tmp_path, free_port(), args)
    wait_for_step(out, 6, job)
    job.send_signal(signal.SIGUSR1)  # what `--signal=B:USR1@300` does
    said = job.communicate(timeout=120)[0].decode()
    assert job.returncode == 0 and (tmp_path / "requeued").read_text() == "7\n", said
    assert said.count("stopped by SIGUSR1 at step") == 2, said
    step = len(rows(out))
    assert [p.name for p in checkpoint.steps(out / "checkpoints")] == [f"step-{step:08d}"] and step < 40
    job = submit(tmp_path, free_port(), args)
    said = job.communicate(timeout=300)[0].decode()
    assert job.returncode == 0, said
    assert f"resuming at step {step} of 40" in said and len(rows(out)) == 40 and (out / "export").exists()
    assert (tmp_path / "requeued").read_text() == "7\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="SLURM runs on Linux")
def test_a_job_that_cannot_work_fails_and_is_not_queued_again(tmp_path: Path) -> None:
    args = ["mu", "--data.sources", str(tmp_path / "nothing"), "--out", str(tmp_path / "run"), "--train.device", "cpu"]
    job = submit(tmp_path, free_port(), args)
    said = job.communicate(timeout=300)[0].decode()
    assert job.returncode not in (0, 75) and str(tmp_path / "nothing") in said, said
    assert not (tmp_path / "requeued").exists()
