"""The loop: build or resume a run, step through it, and log, save and evaluate when due.

Gives: train (config -> run folder).
Used by: cli.py, quickstart.py. The loop knows nothing of crops, teachers or text; that is the task's business.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from silc import parallel
from silc.config import Config
from silc.data.loader import BadCount, batches, beside
from silc.data.masked import MaskedCrops
from silc.data.pairs import Mixture
from silc.data.tokenizer import Tokenizer
from silc.eval.run import evaluate
from silc.model.silc import Silc
from silc.parallel import Anyone, World
from silc.tensors import save_tensors
from silc.train import checkpoint, lora
from silc.train.guard import Guard, Halt, Retention, Stopped
from silc.train.log import Log, forget
from silc.train.optim import clip_and_step, make_optimizer, set_learning_rates
from silc.train.prepare import check_folder, note_environment, open_data, prepare
from silc.train.pretrain import Pretrain
from silc.train.segment import Segment

Data = Mixture | MaskedCrops
Task = Pretrain | Segment


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
    if config.train.cuda_graphs and not (config.train.compile and world.device.type == "cuda" and world.mesh is None):
        raise ValueError("--train.cuda-graphs needs a GPU, --train.compile and --train.shard 1.")
    folder = Path(config.out)
    check_folder(folder, config)
    pairs, pictures = open_data(config, world)
    saved = checkpoint.latest(folder / "checkpoints", world)
    config, tokenizer, weights = prepare(config, folder, pairs, world, saved is not None)
    if isinstance(pairs, MaskedCrops):
        pairs.config = config  # with the size of crops, which the model decides
    task, optimizer = build(config, world, weights)
    step, bad = 0, BadCount(config.data.max_bad_fraction, folder / "bad_samples.jsonl")
    if saved is not None:
        checkpoint.restore(task, optimizer, saved, world)
        step, facts = saved.facts["step"], saved.facts
        bad.restore(facts["bad"])
        if world.leads:
            forget(folder / "bad_samples.jsonl", lambda row: row["position"] < facts["position"])
    if world.leads and step < config.steps:
        note_environment(folder, world, step)
    retention = Retention(config, folder)
    log = Log(config, folder, world.leads, step)
    log.say(describe(config, task, pairs, world, step))
    saver = checkpoint.Saver(folder / "checkpoints", config.train.keep, world)
    run = Run(config, folder, world, task, optimizer, log, tokenizer, bad, saver, retention)
    try:
        run.steps(step, pairs, pictures)
    finally:
        saver.close()
        log.close()
    return folder


def build(
    config: Config, world: World, weights: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[Task, torch.optim.AdamW]:
    """Task and optimiser, equal on every process, sharded where there are several; `weights` to begin with."""
    torch.manual_seed(config.seed)
    model = Silc(config.model)
    # a tower that the weights lack stays new, as the load report said; so does a head
    model.load_state_dict(weights, strict=False)
    if config.init.lora:
        lora.add(model, config.init.lora)
    task = (Segment if config.model.catseg.layers else Pretrain)(config, model, world).to(world.device)
    for tower in (task.model.image, task.model.text):
        tower.recompute = config.train.checkpoint_blocks
    for part, towers in task.parts():
        blocks = [block for tower in towers for block in tower.get_submodule("blocks").children()]
        parallel.distribute(part, blocks, world, config.train.compile, config.train.cuda_graphs)
    return task, make_optimizer(task.student, config.optim)


def describe(config: Config, task: Task, data: Data, world: World, step: int) -> str:
    o, million = config.objective, sum(p.numel() for p in task.student.parameters()) / 1e6
    if isinstance(data, MaskedCrops):
        trained = sum(p.numel() for p in task.student.parameters() if p.requires_grad) / 1e6
        said = f"segmentation of {len(data.names)} classes, {trained:.1f}M parameters train"
        return _described(config, f"{million:.1f}M parameters, {said}", f"{len(data):,} pictures", world, step)
    terms = [f"contrast ({o.kind}) x{o.contrast.weight:g}"]
    terms += [f"{n} x{t.weight:g}" for n, t in (("distill", o.distill), ("masked", o.masked)) if t.weight > 0]
    teacher = f", teacher momentum {config.ema_momentum:.5f} (batch {config.train.batch})" if task.has_teacher else ""
    said = f"{million:.1f}M parameters, {' + '.join(terms)}{teacher}"
    return _described(config, said, f"{len(data):,} pairs", world, step)


def _described(config: Config, said: str, data: str, world: World, step: int) -> str:
    state = f"resuming at step {step} of {config.steps}" if step else f"{config.steps} steps"
    return (
        f"{config.recipe}: {said}\n"
        f"{data}, batch {config.train.batch} on {world.size} x {world.device.type}, {state}, "
        f"run folder {config.out}"
    )


@dataclasses.dataclass
class Run:
    """A run under way: what the loop needs at hand."""

    config: Config
    folder: Path
    world: World
    task: Task
    optimizer: torch.optim.AdamW
    log: Log
    tokenizer: Tokenizer
    bad: BadCount
    saver: checkpoint.Saver
    retention: Retention

    def steps(self, first: int, pairs: Data, pictures: Mixture | None) -> None:
        """The loop itself."""
        c, task = self.config, self.task
        guard = Guard(self.folder, c.objective.prototypes.count, c.train.max_nonfinite)
        if first == 0:
            with self.log.paused():
                self.evaluate(0)
        stream = self.stream(pairs, pictures, first)
        anyone = Anyone(self.world)
        with closing(stream), Signals() as asked:
            for step in range(first, c.steps):
                batch = self.next(stream)
                lr = set_learning_rates(self.optimizer, step, c)
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
            self.export(self.folder / "export", c.steps)

    def stream(self, pairs: Data, pictures: Mixture | None, first: int) -> Generator[dict[str, Any], None, None]:
        """Batches of pairs, each with its pictures without captions where there are any."""
        c, w = self.config, self.world
        if isinstance(pairs, MaskedCrops):
            return pairs.batches(self.tokenizer, first, w.rank, w.size, w.device)
        paired = batches(c, pairs, self.tokenizer, first, w.rank, w.size, w.device)
        if pictures is None:
            return paired
        alone = dataclasses.replace(
            c,
            seed=pictures.seed,
            train=dataclasses.replace(c.train, batch=c.train.images),
            objective=dataclasses.replace(c.objective, contrast_views="global"),
        )
        return beside(paired, batches(alone, pictures, self.tokenizer, first, w.rank, w.size, w.device))

    def next(self, stream: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch on the device; the time spent waiting for it is kept, bad samples are counted and listed."""
        began = time.monotonic()
        batch = next(stream)
        self.log.waited += time.monotonic() - began
        self.bad.add(len(batch["ids"]), batch["bad"])
        self.bad.check()
        return self.on_device(batch)

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        moved = {k: self.on_device(v) for k, v in batch.items() if isinstance(v, dict)}
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        return batch | moved | {k: v.to(self.world.device, non_blocking=True) for k, v in tensors.items()}

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
            model = _model(self.config, lora.merged({k: parallel.whole(v) for k, v in model.state_dict().items()}))
        model.tokenizer = self.tokenizer
        return model

    def export(self, target: Path, steps: int) -> None:
        """Write a folder that silc.load opens, and beside it the heads, teacher and centres for whoever goes on."""
        tensors = parallel.gathered(self.task.state_dict(), self.world)
        if self.world.leads:
            part, mine = target.with_name(f".{target.name}.part"), "student.model."
            shutil.rmtree(part, ignore_errors=True)
            own = lora.merged({k.removeprefix(mine): v for k, v in tensors.items() if k.startswith(mine)})
            _model(self.config, own).save(part, {"recipe": self.config.recipe, "steps": steps})
            self.tokenizer.save(part)
            others = {f"task.{k}": v for k, v in tensors.items() if not k.startswith((mine, "anchor."))}
            save_tensors(others, part / "training.safetensors")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part, target)
        parallel.barrier(self.world)

    def evaluate(self, done: int) -> None:
        """Score every set of the config, its pictures shared out among the processes, and see what was retained.

        A failing evaluation is reported and never ends the run; Halt when too much was forgotten."""
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
                    before = self.retention.begun_with(label, result.metrics, done)
                    self.log.evaluation(done, label, result, before)
            except Exception as error:  # whatever it is, hours of training outweigh it
                self.log.say(f"  eval at step {done}  {name} failed: {error}")
        parallel.barrier(self.world)
        self.retain(done)

    def retain(self, done: int) -> None:
        """Keep the model while it is within bounds, where that is asked for; else warn, or Halt."""
        action, kept, scored = self.config.retention.action, self.folder / "retained", bool(self.retention.now)
        lost = self.retention.lost()
        if lost:
            self.log.say(f"  {lost}")
        elif scored and action != "warn" and done:
            self.export(kept, done)
        if lost and action == "stop" and done < self.config.steps:
            self.saver.finish()
            last = f"{kept} holds the last model within bounds" if kept.exists() else "no later model was within bounds"
            raise Halt(f"{lost} Stopped at step {done}; {last}. To go on all the same: --retention.action warn.")


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
