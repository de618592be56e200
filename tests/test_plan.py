"""`silc plan`: what it prints, against PyTorch's own counters, real modules and its committed raw file.

Used by: pytest.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import at_mu_size
from test_pretrain import batch_of
from torch.utils.flop_counter import FlopCounterMode

from silc import recipes
from silc.app import planning
from silc.cli import main
from silc.parallel import World
from silc.plan import flops_per_sample
from silc.plan.memory import memory, weights
from silc.train.loop import build

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, torch.device("cpu"))


def plan(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(["plan", *args])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["clip", "silc", "siglip2-style", "tips-style"])
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    """At toy size, where constants weigh; all terms on."""
    c = at_mu_size(name, 32, 16)
    o = c.objective
    c = replace(c, objective=replace(o, distill=replace(o.distill, start=0.0), masked=replace(o.masked, start=0.0)))
    task, _ = build(c, ALONE)
    batch = batch_of(c)
    if c.views.locals == 0:
        del batch["locals"]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.forward_backward(batch, 0)
    assert flops_per_sample(c).total * c.train.batch == pytest.approx(counter.get_total_flops(), rel=0.12)


@pytest.mark.parametrize("name", ["clip", "silc", "tips-style"])
def test_weights_and_moments_are_counted_on_the_real_modules(name: str) -> None:
    c = at_mu_size(name, 32, 16)
    task, _ = build(c, ALONE)
    w = weights(c)
    assert w.student == sum(p.numel() for p in task.student.parameters())
    assert w.teacher == (sum(p.numel() for p in task.teacher.parameters()) if task.has_teacher else 0)
    found = memory(c, 1, "cpu")
    assert found["AdamW moments, fp32"] == 2 * found["weights, fp32"] == 8 * w.student


def test_sharding_divides_what_it_shards_and_recomputation_spares_activations() -> None:
    c = recipes.get("silc")
    whole = memory(c, 256)
    shared = memory(replace(c, train=replace(c.train, shard=8)), 256)
    spared = memory(replace(c, train=replace(c.train, checkpoint_blocks=True)), 256)
    for part in ("weights, fp32", "AdamW moments, fp32", "teacher, fp32"):
        assert shared[part] == pytest.approx(whole[part] / 8)
    assert spared["image tower, global views"] < 0.4 * whole["image tower, global views"]


def test_no_part_grows_with_the_square_of_the_batch() -> None:
    c = recipes.get("silc")
    sizes = [memory(replace(c, train=replace(c.train, batch=b)), b // 64) for b in (16384, 32768, 65536)]
    for part in ("contrastive tiles", "prototype tiles"):
        assert sizes[2][part] <= sizes[0][part] * 1.01
    grown = [b["gathered embeddings"] - a["gathered embeddings"] for a, b in pairwise(sizes)]
    assert grown[1] == pytest.approx(2 * grown[0], rel=0.01)


def test_the_command_prints_every_part_and_how_far_to_trust_it(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "silc", "--gpus", "256", "--samples", "20e9", "--price", "2.5")
    for word in ("memory of a GPU", "AdamW moments", "GFLOP of a pair", "exchange", "pictures", "GPU hours", "median"):
        assert word in out
    assert "It fits" in out and "Not yet run on a GPU" in out
    assert f"{flops_per_sample(recipes.get('silc')).total / 1e9:.2f}" in out
    hours = float(next(x for x in out.splitlines() if "GPU hours" in x).split(",", 1)[1].split()[0].replace(",", ""))
    assert f"{hours * 2.5:,.0f}"[:3] in out


def test_when_it_does_not_fit_it_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "silc", "--gpus", "8", "--samples", "20e9", "--gpu", "4090")
    assert "It fits" not in out and "--train.accumulate" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("silc", "--gpus", "7"), "7"),
        (("silc", "--gpus", "8", "--train.shard", "3"), "shard"),
        (("slic",), "Perhaps you meant 'silc'"),
        (("silc", "--gpu", "h1000"), "h100"),
    ],
)
def test_a_wrong_question_gets_one_sentence(
    args: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *args])
    told = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and said in told and "Traceback" not in told


def test_the_page_and_the_stated_errors_are_current() -> None:
    page = (ROOT / "docs" / "planning.md").read_text()
    for table in (planning.sizes(), planning.table(), planning.errors()):
        assert table in page, "run `python benchmarks/plan_check.py --table docs/planning.md`"
    raw = json.loads((ROOT / "benchmarks" / "results" / "plan_check.json").read_text())["errors"]
    for stated, what in zip(planning.ERRORS.values(), ("flops", "stays", "begins", "peak", "picture"), strict=True):
        assert stated == pytest.approx((raw[what]["median"], raw[what]["worst"]), abs=6e-4)
