"""The loop: build or resume a run, step through it, and log, save and evaluate when due.

Gives: train (config -> run folder).
Used by: cli.py, quickstart.py. The loop knows nothing of crops, teachers or text; that is the task's business.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from silc import parallel
from silc.config import Config
from silc.data.loader import BadCount, batches
from silc.data.pairs import Mixture, open_source
from silc.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_tokenizer
from silc.eval.run import evaluate
from silc.model.silc import Silc
from silc.parallel import Anyone, World
from silc.plain import save_json, to_dict
from silc.train import checkpoint
from silc.train.guard import Guard, Stopped
from silc.train.log import Log, environment, forget
from silc.train.optim import clip_and_step, learning_rate, make_optimizer, set_learning_rate
from silc.train.pretrain import Pretrain

FREE_TO_CHANGE = tuple(f"train.{name}" for name in ("threads", "shard", "save_every", "keep", "log_every"))
FREE_TO_CHANGE += ("data.workers", "log", "eval")
"""Settings under which a run may go on: they do not touch its arithmetic, but for the order of sums."""
TOKENIZER_CAPTIONS = 200_000


def train(config: Config) -> Path:
    """Train to the end, going on where the run folder left off. Returns the folder.

    Raises ValueError for settings or data that cannot work, Halt when a guard ends the run, Stopped on a signal.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    try:
        return _train(config, parallel.start(config.train.device, config.train.shard))
    finally:
        parallel.stop()


def _train(config: Config, world: World) -> Path:
    if config.train.batch % (world.size * config.train.accumulate):
        raise ValueError(
            f"--train.batch {config.train.batch} is not a multiple of {world.size} processes x "
            f"{config.train.accumulate} micro-batches."
        )
    if config.train.cuda_graphs and not (config.train.compile and world.device.type == "cuda" and world.mesh is None):
        raise ValueError("--train.cuda-graphs needs a GPU, --train.compile and --train.shard 1.")
    folder = Path(config.out)
    check_folder(folder, config)
    with parallel.leader_first(world):  # the leader indexes shards once; the others read its index
        mixture = Mixture([open_source(s, config.data) for s in _sources(config)], config.data.weights, config.seed)
    config, tokenizer = prepare(config, folder, mixture, world)
    task, optimizer = build(config, world)
    step, bad = 0, BadCount(config.data.max_bad_fraction, folder / "bad_samples.jsonl")
    saved = checkpoint.latest(folder / "checkpoints", world)
    if saved is not None:
        checkpoint.restore(task, optimizer, saved, world)
        step, facts = saved.facts["step"], saved.facts
        bad.restore(facts["bad"])
        if world.leads:
            forget(folder / "bad_samples.jsonl", lambda row: row["position"] < facts["position"])
    if world.leads and step < config.steps:
        note_environment(folder, world, step)
    log = Log(config, folder, world.leads, step)
    log.say(describe(config, task, mixture, world, step))
    saver = checkpoint.Saver(folder / "checkpoints", config.train.keep, world)
    run = Run(config, folder, world, task, optimizer, log, tokenizer, bad, saver)
    try:
        run.steps(step, mixture)
    finally:
        saver.close()
        log.close()
    return folder


def check_folder(folder: Path, config: Config) -> None:
    """A new or empty folder, or one with this very run to resume. ValueError otherwise, naming what differs."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not empty and holds no silc run: choose another --out, or empty it.")
    saved = _flat(json.loads((folder / "config.json").read_text()))
    asked = _flat(to_dict(config))
    derived = ("out", "model.text.vocab", "model.text.eos_id", "model.text.pad_id")
    differ = [
        f"{key} {saved.get(key)!r} -> {asked.get(key)!r}"
        for key in sorted(saved.keys() | asked.keys())
        if saved.get(key) != asked.get(key)
        and key not in derived
        and not any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE)
    ]
    if differ:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(differ[:4])}). "
            "To resume it repeat its settings; for a new run choose another --out."
        )


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        flat |= _flat(value, name + ".") if isinstance(value, dict) else {name: _plain(value)}
    return flat


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _sources(config: Config) -> tuple[str, ...]:
    if not config.data.sources:
        raise ValueError(
            "no training data: pass --data.sources with a folder, a .csv/.jsonl/.parquet file or tar shards "
            "(or try `silc quickstart`, which brings its own)."
        )
    return config.data.sources


def prepare(config: Config, folder: Path, mixture: Mixture, world: World) -> tuple[Config, Tokenizer]:
    """The tokenizer of the run (made once, then read), and the config with what it decides; both written down."""
    kept, length = folder / "tokenizer", config.model.text.length
    if world.leads:
        folder.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            make_tokenizer(config, mixture).save(kept)
    parallel.barrier(world)
    tokenizer = load_tokenizer(kept, length)
    text = dataclasses.replace(
        config.model.text, vocab=tokenizer.vocab, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
    if world.leads:
        save_json(folder / "config.json", config)
    return config, tokenizer


def note_environment(folder: Path, world: World, step: int) -> None:
    """Where the run was trained: env.json, to which each resumption adds itself."""
    path, facts = folder / "env.json", environment(sys.argv)
    facts |= {"processes": world.size, "device": str(world.device), "threads": torch.get_num_threads()}
    if step and path.exists():
        began = json.loads(path.read_text())
        facts = began | {"resumed": [*began.get("resumed", []), {"step": step} | facts]}
    path.write_text(json.dumps(facts, indent=2) + "\n")


def make_tokenizer(config: Config, mixture: Mixture) -> Tokenizer:
    asked, text = config.data.tokenizer, config.model.text
    if asked == "bytes":
        return byte_tokenizer(text.length)
    if asked != "train":
        return load_tokenizer(Path(asked), text.length)
    print("training a tokenizer on the captions ...", file=sys.stderr)
    return train_tokenizer(mixture.captions(TOKENIZER_CAPTIONS), text.vocab, text.length)


def build(config: Config, world: World) -> tuple[Pretrain, torch.optim.AdamW]:
    """Task and optimiser, equal on every process, sharded where there are several."""
    torch.manual_seed(config.seed)
    task = Pretrain(config, Silc(config.model), world).to(world.device)
    for tower in (task.model.image, task.model.text):
        tower.recompute = config.train.checkpoint_blocks
    for part, towers in task.parts():
        blocks = [block for tower in towers for block in tower.get_submodule("blocks").children()]
        parallel.distribute(part, blocks, world, config.train.compile, config.train.cuda_graphs)
    return task, make_optimizer(task.student, config.optim)


def describe(config: Config, task: Pretrain, mixture: Mixture, world: World, step: int) -> str:
    o, million = config.objective, sum(p.numel() for p in task.student.parameters()) / 1e6
    terms = [f"contrast ({o.kind}) x{o.contrast.weight:g}"]
    terms += [f"{n} x{t.weight:g}" for n, t in (("distill", o.distill), ("masked", o.masked)) if t.weight > 0]
    state = f"resuming at step {step} of {config.steps}" if step else f"{config.steps} steps"
    teacher = f", teacher momentum {config.ema_momentum:.5f} (batch {config.train.batch})" if task.has_teacher else ""
    return (
        f"{config.recipe}: {million:.1f}M parameters, {' + '.join(terms)}{teacher}\n"
        f"{len(mixture):,} pairs, batch {config.train.batch} on {world.size} x {world.device.type}, {state}, "
        f"run folder {config.out}"
    )


@dataclasses.dataclass
class Run:
    """A run under way: what the loop needs at hand."""

    config: Config
    folder: Path
    world: World
    task: Pretrain
    optimizer: torch.optim.AdamW
    log: Log
    tokenizer: Tokenizer
    bad: BadCount
    saver: checkpoint.Saver

    def steps(self, first: int, mixture: Mixture) -> None:
        """The loop itself."""
        c, task = self.config, self.task
        guard = Guard(self.folder, c.objective.prototypes.count, c.train.max_nonfinite)
        if first == 0:
            with self.log.paused():
                self.evaluate(0)
        stream = batches(c, mixture, self.tokenizer, first, self.world.rank, self.world.size, self.world.device)
        anyone = Anyone(self.world)
        with closing(stream), Signals() as asked:
            for step in range(first, c.steps):
                batch = self.next(stream)
                lr = learning_rate(step, c.steps, c.optim)
                set_learning_rate(self.optimizer, lr)
                metrics = task.forward_backward(batch, step)
                metrics["grad_norm"] = clip_and_step(task.student.parameters(), self.optimizer, c.optim.clip)
                task.after_step(step)
                guard.seen(step, metrics["grad_norm"], batch["ids"])
                done, asked_to = step + 1, anyone(bool(asked))
                stop = asked_to or done == c.steps
                if done % c.train.log_every == 0 or stop:
                    numbers = self.numbers(metrics)
                    self.log.train(done, numbers, lr, self.bad.bad, batch["ids"])
                    guard.check(done, numbers)
                    self.saver.check()
                if done % c.train.save_every == 0 or stop:
                    self.save(done)
                if c.eval.every and done % c.eval.every == 0 and done < c.steps:
                    with self.log.paused():
                        self.evaluate(done)
                if asked_to and done < c.steps:
                    self.saver.finish()
                    by = asked[0] if asked else "a signal to another process"
                    raise Stopped(f"stopped by {by} at step {done}, saved. The same command goes on from there.")
        self.saver.finish()
        # a run that was killed between its last checkpoint and its export still owes both
        if not parallel.all_agree((self.folder / "export").exists(), self.world):
            self.evaluate(c.steps)
            self.export()

    def next(self, stream: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch on the device; the time spent waiting for it is kept, bad samples are counted and listed."""
        began = time.monotonic()
        batch = next(stream)
        self.log.waited += time.monotonic() - began
        self.bad.add(len(batch["ids"]), batch["bad"])
        self.bad.check()
        device = self.world.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def numbers(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Means over processes as plain numbers: the one place where the host waits for the device."""
        model = self.task.model
        found = {k: parallel.mean(v, self.world) for k, v in metrics.items()}
        found["logit_scale"] = parallel.whole(model.scale.detach())
        if model.bias is not None:
            found["logit_bias"] = parallel.whole(model.bias.detach())
        return {k: float(v) for k, v in found.items()}

    def save(self, done: int) -> None:
        facts = {"step": done, "position": done * self.config.train.batch, "bad": self.bad.state()}
        self.saver.save(self.task, self.optimizer, facts)

    def whole_model(self) -> Silc:
        """The student as a plain model on every process: itself where its weights are whole, else a gathered copy."""
        model = self.task.model
        if self.world.mesh is not None:
            model = _model(self.config, {k: parallel.whole(v) for k, v in model.state_dict().items()})
        model.tokenizer = self.tokenizer
        return model

    def export(self) -> None:
        """Write export/, which silc.load opens, and beside it the heads, teacher and centres for whoever goes on."""
        tensors = parallel.gathered(self.task.state_dict(), self.world)
        if self.world.leads:
            part, mine = self.folder / ".export.part", "student.model."
            shutil.rmtree(part, ignore_errors=True)
            model = _model(self.config, {k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)})
            model.save(part, {"recipe": self.config.recipe, "steps": self.config.steps})
            self.tokenizer.save(part)
            others = {f"task.{k}": v for k, v in tensors.items() if not k.startswith(mine)}
            save_file(others, part / "training.safetensors")
            os.replace(part, self.folder / "export")
        parallel.barrier(self.world)

    def evaluate(self, done: int) -> None:
        """Score every set of the config, its pictures shared out among the processes.

        A failing evaluation is reported and never ends the run."""
        if not self.config.eval.sets:
            return
        model = self.whole_model()
        for name, folder in self.config.eval.sets.items():
            # asked first, since a process that failed alone would leave the others waiting for its share
            if not parallel.all_agree(Path(folder).exists(), self.world):
                self.log.say(f"  eval at step {done}  {name} skipped: a process does not find {folder}")
                continue
            try:
                for label, result in evaluate(model, {name: folder}, world=self.world).items():
                    self.log.evaluation(done, label, result)
            except Exception as error:  # whatever it is, hours of training outweigh it
                self.log.say(f"  eval at step {done}  {name} failed: {error}")
        parallel.barrier(self.world)


def _model(config: Config, tensors: dict[str, Tensor]) -> Silc:
    """A model around these very tensors."""
    with torch.device("meta"):
        model = Silc(config.model)
    model.load_state_dict(tensors, assign=True)
    return model


class Signals:
    """Within it SIGTERM, SIGINT and SIGUSR1 are noted instead of ending the process; a second SIGINT ends it."""

    def __enter__(self) -> list[str]:
        self.asked: list[str] = []
        self.before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.before[number] = signal.signal(number, self.note)
        return self.asked

    def note(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked.append(signal.Signals(number).name)

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
