"""Continued training: what a run begins with, what stands still, what is retained, what image-only pictures add.

Gives: runs through the command on drawn pictures; the step's gradients against hand-made ones.
Used by: pytest.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import COLOURS, SHAPES, draw, write_pairs
from PIL import Image
from safetensors.torch import load_file
from test_loop import command, launch, refused, rows, wait_for_step
from test_pretrain import ALONE
from torch import Tensor

import silc
from silc import losses, recipes
from silc.cli import main
from silc.config import Config, InitConfig, Term
from silc.train.loop import build, train
from silc.train.optim import frozen_steps, set_learning_rates


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Path:
    """A run of plain CLIP on the drawings."""
    folder = tmp_path_factory.mktemp("base") / "run"
    main(command(pairs, folder, "--objective.distill.weight", "0", "--objective.masked.weight", "0"))
    return folder


@pytest.fixture(scope="module")
def zeroshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings by shape: an image folder with three classes."""
    root = tmp_path_factory.mktemp("shapes")
    for shape in SHAPES:
        (root / shape).mkdir()
        for i, colour in enumerate(COLOURS):
            draw(colour, shape, 40 * i).save(root / shape / f"{colour}.png")
    return root


def adapt(pairs: Path, base: Path | str, out: Path, *options: str) -> list[str]:
    """An adapt recipe at the size of `mu`."""
    small = ["--objective.prototypes.count", "64", "--objective.prototypes.hidden", "32"]
    small += ["--objective.prototypes.bottleneck", "16", "--train.batch", "16", "--train.samples", "320"]
    small += ["--train.log-every", "1", "--train.save-every", "5", "--views.locals", "2", "--data.workers", "0"]
    small += ["--eval.every", "0", "--train.threads", "1"]
    return ["train", "adapt-10k", "--init.model", str(base), "--data.sources", str(pairs), "--out", str(out), *small,
            *options]  # fmt: skip


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def test_a_run_begins_with_the_model_and_its_tokenizer(base: Path, pairs: Path, tmp_path: Path) -> None:
    """With every rate at zero what comes out is what went in."""
    main(adapt(pairs, base, tmp_path / "run", "--optim.lr", "0"))
    before, after = weights(base), weights(tmp_path / "run")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    one, two = silc.load(base), silc.load(tmp_path / "run")
    assert torch.equal(one.encode_text(["a red circle"]), two.encode_text(["a red circle"]))
    facts = json.loads((tmp_path / "run" / "init.json").read_text())
    assert facts["model"] == str(base)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["objective"]["kind"] == "softmax" and config["views"]["global_size"] == 32
    assert config["views"]["local_size"] == 16  # three sevenths of 32, in patches of 8


def test_towers_stand_still_while_heads_warm_up_then_move(base: Path, pairs: Path, tmp_path: Path) -> None:
    frozen = ["--init.freeze", "0.5", "--init.image-lr", "1", "--init.text-lr", "1", "--optim.warmup", "0"]
    main(adapt(pairs, base, tmp_path / "run", *frozen, "--train.keep", "9"))
    began, heads = weights(base), []
    for step, still in ((5, True), (10, True), (15, False)):
        saved = next((tmp_path / "run" / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
        tensors = {k.rsplit("@", 1)[0]: v for k, v in load_file(saved).items()}
        mine = {k.removeprefix("task.student.model."): v for k, v in tensors.items() if k.startswith("task.student.m")}
        assert all(torch.equal(mine[n], began[n]) for n in began) == still, step
        assert any(k.startswith("optimizer.student.model.image") for k in tensors) != still
        heads.append({n: v for n, v in tensors.items() if n.startswith("task.student.view_head")})
    assert any(not torch.equal(heads[0][n], heads[1][n]) for n in heads[0])


def test_a_ramp_begins_with_the_towers_and_rates_are_their_shares() -> None:
    c = replace(recipes.mu(), init=InitConfig("x", freeze=0.25, image_lr=0.1, text_lr=0.5))
    c = replace(c, objective=replace(c.objective, distill=Term(2.0, ramp=0.25)), optim=replace(c.optim, warmup=0.1))
    assert (c.steps, frozen_steps(c)) == (40, 10)
    task, optimizer = build(c, ALONE)
    at = [task.hyper(step) for step in range(40)]
    assert all(h.frozen and h.distill == 2.0 for h in at[:10]) and not any(h.frozen for h in at[10:])
    assert [h.distill for h in at[10:21]] == pytest.approx([0.2 * (i + 1) for i in range(10)] + [2.0])
    for step in (0, 9, 10, 12, 13, 30):
        lr = set_learning_rates(optimizer, step, c)
        rate = {g["part"]: g["lr"] for g in optimizer.param_groups}
        warm = min(1.0, max(0.0, (step - 9) / 4))
        assert rate["heads"] == lr > 0
        assert rate["image"] == pytest.approx(0.1 * lr * warm) and rate["text"] == pytest.approx(0.5 * lr * warm)


def test_the_anchor_is_a_mean_of_cosines_and_nothing_at_the_start() -> None:
    torch.manual_seed(0)
    shapes = ((2, 3, 8), (2, 3, 8), (3, 8), (3, 8))
    image, then, text, text_then = (F.normalize(torch.randn(*shape), dim=-1) for shape in shapes)

    def by_hand(one: Tensor, other: Tensor) -> float:
        rows = list(zip(one.flatten(0, -2).tolist(), other.flatten(0, -2).tolist()))
        return sum(1 - sum(a * b for a, b in zip(x, y)) for x, y in rows) / len(rows)

    expected = (by_hand(image, then) + by_hand(text, text_then)) / 2
    assert losses.anchor(image, text, then, text_then).item() == pytest.approx(expected, abs=1e-6)
    c = recipes.mu()
    c = replace(c, objective=replace(c.objective, distill=Term(), masked=Term(), anchor=Term(1.0)))
    task, _ = build(c, ALONE)
    terms = task.forward_backward(batch_of(c, 4, 0), 0)
    assert terms["anchor"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in task.model.image.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert task.forward_backward(batch_of(c, 4, 0), 0)["anchor"] > 1e-3
    assert all(p.grad is None for p in task.anchor.parameters())


def batch_of(c: Config, pairs: int, unpaired: int, seed: int = 0) -> dict[str, Any]:
    generator, v = torch.Generator().manual_seed(seed), c.views

    def crops(rows: int) -> dict[str, Tensor]:
        sizes = {"globals": (v.globals, v.global_size), "locals": (v.locals, v.local_size)}
        shapes = {name: (count, rows, 3, side, side) for name, (count, side) in sizes.items()}
        return {n: torch.randint(256, s, generator=generator, dtype=torch.uint8) for n, s in shapes.items()}

    tokens = torch.randint(9, (pairs, c.model.text.length), generator=generator)
    return crops(pairs) | {"tokens": tokens} | ({"unpaired": crops(unpaired)} if unpaired else {})


@pytest.mark.parametrize("micro", [1, 2])
def test_pictures_without_captions_feed_the_teacher_terms_alone(micro: int) -> None:
    """Loss and gradient are those of a hand-made step: contrast over the pairs, distillation over all pictures."""
    c = recipes.mu()
    c = replace(c, views=replace(c.views, photometric="none"), train=replace(c.train, accumulate=micro))
    c = replace(c, objective=replace(c.objective, masked=Term()))
    both, pairs_only = batch_of(c, 4, 6), batch_of(c, 4, 0)
    task, _ = build(c, ALONE)
    got = task.forward_backward(both, 1)
    grads = {n: p.grad.clone() for n, p in task.student.named_parameters() if p.grad is not None}

    every = {n: torch.cat([both[n], both["unpaired"][n]], 1) for n in ("globals", "locals")}
    every["tokens"] = torch.cat([both["tokens"], both["tokens"][[0, 1, 2, 3, 0, 1]]])
    no_text = replace(c, objective=replace(c.objective, contrast=Term(0.0)), train=replace(c.train, accumulate=1))
    distilled, _ = build(no_text, ALONE)
    distilled.load_state_dict(task.state_dict())
    terms = distilled.forward_backward(every, 1)
    no_teacher = replace(c, objective=replace(c.objective, distill=Term()), train=replace(c.train, accumulate=1))
    contrasted, _ = build(no_teacher, ALONE)
    contrasted.model.load_state_dict(task.model.state_dict())
    contrast = contrasted.forward_backward(pairs_only, 1)
    assert got["contrast"].item() == pytest.approx(contrast["contrast"].item(), rel=1e-5)
    assert got["distill"].item() == pytest.approx(terms["distill"].item(), rel=1e-5)
    expected = {n: p.grad for n, p in distilled.student.named_parameters()}
    other = {n: p.grad for n, p in contrasted.student.named_parameters() if p.grad is not None}
    for name, grad in grads.items():
        parts = [g for g in (expected.get(name), other.get(name)) if g is not None]
        torch.testing.assert_close(grad, torch.stack(parts).sum(0), atol=2e-6, rtol=2e-4)


def test_a_folder_of_pictures_trains_beside_pairs_and_resumes_bit_for_bit(
    base: Path, pairs: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    write_pairs(alone, 1)
    (alone / "captions.jsonl").unlink()
    Image.fromarray(torch.randint(2**16, (40, 50), dtype=torch.int32).numpy().astype("uint16")).save(alone / "grey.png")
    options = ["--data.images", str(alone), "--train.images", "8", "--views.photometric", "grey"]
    main(adapt(pairs, base, tmp_path / "whole", *options))
    asked = adapt(pairs, base, tmp_path / "killed", *options)
    process = launch(asked)
    wait_for_step(tmp_path / "killed", 8, process)
    process.kill()
    process.wait()
    main(asked)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(one[n], two[n]) for n in one)
    seen = [(r["step"], r["loss"], r["ids_crc"]) for r in rows(tmp_path / "whole")]
    assert seen == [(r["step"], r["loss"], r["ids_crc"]) for r in rows(tmp_path / "killed")]


def test_a_run_goes_on_when_what_it_began_with_is_gone(base: Path, pairs: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(base / "export", start)
    asked = adapt(pairs, start, tmp_path / "run", "--objective.anchor.weight", "0.5")
    process = launch(asked)
    wait_for_step(tmp_path / "run", 8, process)
    process.kill()
    process.wait()
    shutil.rmtree(start)
    main(asked)
    assert rows(tmp_path / "run")[-1]["step"] == 20


@pytest.mark.parametrize("action", ["warn", "save", "stop"])
def test_retention_speaks_when_zero_shot_falls(
    base: Path, pairs: Path, zeroshot: Path, tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reckless = ["--optim.lr", "0.3", "--optim.clip", "0", "--init.image-lr", "1", "--init.text-lr", "1"]
    options = ["--eval.sets", "zeroshot/shapes", str(zeroshot), "--eval.every", "5", "--retention.action", action]
    asked = adapt(pairs, base, tmp_path / "run", *options, *reckless, "--retention.max-drop", "0.5")
    out = tmp_path / "run"
    if action == "stop":
        with pytest.raises(SystemExit) as stop:
            main(asked)
        assert stop.value.code == 1 and not (out / "export").exists()
    else:
        main(asked)
        assert (out / "export").exists()
    said = capsys.readouterr().err
    scores = rows(out, "eval")
    assert scores[0]["step"] == 0 and "before" not in scores[0]
    assert all(r["before"] == scores[0]["metrics"] for r in scores[1:])
    assert "at step 0" in said
    first = next(iter(scores[0]["metrics"]))
    fell = [r["step"] for r in scores[1:] if scores[0]["metrics"][first] - r["metrics"][first] > 0.005]
    assert fell, "the reckless run forgot nothing, so nothing is tested"
    assert f"retention: zeroshot/shapes {first} fell" in said
    if action == "stop":
        assert scores[-1]["step"] == fell[0] and "--retention.action warn" in said
    kept = [r["step"] for r in scores[1:] if r["step"] not in fell]
    assert (out / "retained").exists() == (action != "warn" and bool(kept))


def test_the_last_model_within_bounds_is_kept(base: Path, pairs: Path, zeroshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--eval.sets", "zeroshot/shapes", str(zeroshot), "--eval.every", "10", "--retention.max-drop", "100"]
    main(adapt(pairs, base, out, *options))
    assert json.loads((out / "retained" / "config.json").read_text())["steps"] == 20
    kept, last = load_file(out / "retained" / "model.safetensors"), weights(out)
    assert all(torch.equal(kept[n], last[n]) for n in last)


def test_lora_trains_adapters_alone_and_exports_a_plain_model(base: Path, pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'silc[lora]'")
    out = tmp_path / "run"
    main(adapt(pairs, base, out, "--init.lora", "4", "--init.image-lr", "1", "--init.text-lr", "1"))
    before, after = weights(base), weights(out)
    assert before.keys() == after.keys()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved - {"logit_scale"} == {n for n in before if ".blocks." in n and n.endswith((".q.weight", ".v.weight"))}
    for name in moved - {"logit_scale"}:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 4
    silc.load(out).encode_text(["a red circle"])


def test_lora_needs_its_package(base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    refused(capsys, adapt(pairs, base, tmp_path / "run", "--init.lora", "4"), "silc[lora]")


def test_a_larger_image_size_resizes_the_position_table(base: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    main(adapt(pairs, base, out, "--init.image-size", "48"))
    model = silc.load(out)
    assert (model.config.image.image_size, model.config.preprocess.size) == (48, 48)
    assert model.image.position.shape[:2] == (6, 6)


def test_what_cannot_work_is_said(base: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    without = ["train", "adapt-10k", "--data.sources", str(pairs), "--out", str(out)]
    refused(capsys, without, "--init.model")
    refused(capsys, adapt(pairs, tmp_path / "nowhere", out), "nowhere")
    refused(capsys, adapt(pairs, base, out, "--objective.kind", "sigmoid"), "--objective.kind")
    refused(capsys, adapt(pairs, base, out, "--objective.distill.weight", "0"), "--init.freeze")
    refused(capsys, adapt(pairs, base, out, "--data.images", str(pairs)), "--train.images")
    refused(capsys, adapt(pairs, base, out, "--retention.set", "zeroshot/x"), "--retention.set")
    refused(capsys, adapt(pairs, base, out, "--init.image-size", "33"), "patch")


def test_train_can_be_called_from_python(base: Path, pairs: Path, tmp_path: Path) -> None:
    c = recipes.mu()
    c = replace(c, out=str(tmp_path / "run"), init=InitConfig(str(base)), data=replace(c.data, sources=(str(pairs),)))
    c = replace(c, train=replace(c.train, samples=32))
    assert (train(c) / "export" / "model.safetensors").exists()


def test_interpolation_is_exact_at_its_ends_and_linear_between(base: Path, pairs: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    main(adapt(pairs, base, tuned, "--init.image-lr", "1", "--init.text-lr", "1"))
    one, other = weights(base), weights(tuned)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    for alpha in ("0", "1", "0.3"):
        main(["interpolate", str(base), str(tuned), "--alpha", alpha, "--out", str(tmp_path / alpha)])
        found = load_file(tmp_path / alpha / "model.safetensors")
        for name in one:
            expected = (1 - float(alpha)) * one[name].double() + float(alpha) * other[name].double()
            assert (found[name].double() - expected).abs().max() < (1e-12 if alpha in "01" else 1e-6), name
    silc.load(tmp_path / "0.3").encode_text(["a red circle"])


def test_a_sweep_is_scored_and_drawn(base: Path, pairs: Path, zeroshot: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "sweep"
    sets = ["--sets", "zeroshot/shapes", str(zeroshot), "retrieval", str(pairs)]
    main(["interpolate", str(base), str(base), "--alpha", "0", "0.5", "1", "--out", str(out), *sets])
    rows = json.loads((out / "sweep.json").read_text())
    assert [row["alpha"] for row in rows] == [0, 0.5, 1]
    assert rows[0]["scores"] == rows[2]["scores"] and set(rows[0]["scores"]) == {"zeroshot/shapes", "retrieval"}
    assert Image.open(out / "sweep.png").width > 300 and (out / "alpha-0.5" / "card.html").exists()
    refused(capsys, ["interpolate", str(base), str(base), "--alpha", "0", "1"], "--sets")
    refused(capsys, ["interpolate", str(base), str(base), "--alpha", "5"], "--alpha")


def test_models_of_two_architectures_do_not_mix(base: Path, pairs: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    main(command(pairs, tmp_path / "wide", "--model.text.mlp", "48", "--train.samples", "16"))
    said = refused(capsys, ["interpolate", str(base), str(tmp_path / "wide"), "--alpha", "0.5"], "not of one")
    assert "text.blocks.0.mlp" in said


class Burglar:
    """Unpickling this would write a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.mark, "it ran"))


def test_a_pickle_that_would_run_code_is_refused_by_init_and_resume(
    base: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, evil = tmp_path / "ran", tmp_path / "evil.pt"
    torch.save({"state_dict": Burglar(mark)}, evil)
    (tmp_path / "evil.json").write_text((base / "export" / "config.json").read_text())
    refused(capsys, adapt(pairs, evil, tmp_path / "run"), "evil.pt")
    out = tmp_path / "whole"
    main(adapt(pairs, base, out, "--train.keep", "1"))
    shutil.rmtree(out / "export")
    state = next((out / "checkpoints").glob("step-*/*.safetensors"))
    facts = json.loads((state.parent / "state.json").read_text())
    shutil.copy(evil, state)
    facts["files"][state.name] = state.stat().st_size  # as an attacker would
    (state.parent / "state.json").write_text(json.dumps(facts))
    main(adapt(pairs, base, out, "--train.keep", "1"))
    assert "damaged" in capsys.readouterr().err  # and the run began again
    assert not mark.exists()
    torch.load(evil, weights_only=False)  # the file does what it threatens to
    assert mark.exists()


def test_the_page_tells_what_the_recipes_do() -> None:
    page = (Path(__file__).parents[1] / "docs" / "adapting.md").read_text()
    for name in ("adapt-10k", "adapt-100k", "adapt-1m", "high-resolution"):
        c = recipes.get(name)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        anchor = f"{c.objective.anchor.weight:g}" if c.objective.anchor.weight else "none"
        rate = f"{100 * c.init.image_lr:g}% of {c.optim.lr:.0e}".replace("e-0", "e-")
        assert [cell.strip() for cell in row.split("|")[3:-1]] == [
            f"{c.train.samples:,}", f"{c.train.batch:,}", anchor, rate]  # fmt: skip


def test_the_plan_knows_the_model_that_a_run_begins_with(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "adapt-10k", "--init.model", str(base), "--gpu", "cpu", "--gpus", "1", "--train.images", "64"])
    said = capsys.readouterr().out
    assert "anchor" in said and "adapt-10k on 1 x" in said
    refused(capsys, ["plan", "adapt-10k", "--gpus", "1"], "--init.model")
