"""`silc plan`: counts against real steps, traffic and time against closed forms, and what the command says and refuses.

Gives: tests of silc.plan, silc.app.planning and the verb.
Used by: pytest.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import at_mu_size

from silc import plan, recipes
from silc.app import planning
from silc.cli import main
from silc.config import Config
from silc.parallel import World
from silc.plain import save_json
from silc.plan.estimate import SIZES, Site, changes, estimate, sized
from silc.plan.flops import as_clip, parts
from silc.plan.machines import CARDS
from silc.plan.memory import memory, weights
from silc.train.loop import build

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plan_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import plan_check

    return plan_check


def trained(config: Config, **train: object) -> Config:
    return replace(config, train=replace(config.train, **train))  # type: ignore[arg-type]


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(["plan", *args])
    return capsys.readouterr().out


# ---------------------------------------------------------------- counts


def test_parts_add_up_and_clip_at_b16_costs_what_is_known_of_it() -> None:
    """171 GFLOP a pair: twice (multiply-add) thrice (backward) 22.9 G of a ViT-B/16 at 256 px and 5.5 G of its text."""
    config = recipes.get("clip")
    assert sum(p.flops for p in parts(config)) == pytest.approx(plan.flops_per_sample(config).total)
    tokens, text = 256, 64
    by_hand = 12 * (tokens * 12 * 768**2 + 2 * tokens**2 * 768) + tokens * 768**2
    by_hand += 12 * (text * 12 * 768**2 + 2 * text**2 * 768)
    assert plan.flops_per_sample(config).total == pytest.approx(6 * by_hand, rel=0.02)
    assert plan.flops_per_sample(as_clip(recipes.get("silc"))).total == plan.flops_per_sample(config).total


def test_only_hidden_patches_are_predicted_unless_all_are() -> None:
    config = recipes.get("siglip2-style")
    cost = {p.name: p.macs for p in parts(config)}
    every = replace(config, objective=replace(config.objective, masked_form="all"))
    for name in ("prototypes, student patches", "teacher, patch prototypes"):
        assert {p.name: p.macs for p in parts(every)}[name] == 2 * cost[name]


@pytest.mark.parametrize("name", ["clip", "silc", "tips-style"])
def test_weights_are_those_of_the_real_modules(name: str) -> None:
    config = at_mu_size(name, 64, 32)
    task, _ = build(config, World(0, 1, torch.device("cpu")))
    counted = weights(config)
    assert counted.student == sum(p.numel() for p in task.student.parameters())
    assert counted.student + counted.teacher == sum(p.numel() for p in task.parameters())
    block = task.model.image.get_submodule("blocks.0")
    assert counted.rest == counted.student - 4 * sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize("more", [{}, {"checkpoint_blocks": True}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("kind", ["silc", "siglip2-style"])
def test_memory_is_what_a_real_step_takes(plan_check: ModuleType, kind: str, more: dict[str, object]) -> None:
    """Every tensor that is alive in a real step is summed up as it appears and goes."""
    row = plan_check.row(kind, (128, 4, "mean", "linear"), 8, precision="fp32", **more)
    assert row["stays"] == pytest.approx(1, rel=1e-3)
    assert row["peak"] == pytest.approx(1, rel=0.06)
    assert row.get("begins", 1) == pytest.approx(1, rel=0.12)


def test_sharding_divides_what_stays_and_gathers_what_works() -> None:
    config = recipes.get("silc")
    whole, eighth = memory(config, 8), memory(trained(config, shard=8), 8)
    for name in ("weights, fp32", "AdamW moments, fp32", "teacher, fp32", "gradients, fp32"):
        assert eighth[name] == whole[name] / 8
    assert eighth["image tower, global views"] == whole["image tower, global views"]
    assert "gathered weights and gradients" not in memory(config, 1)


def test_memory_grows_with_the_batch_and_not_with_its_square() -> None:
    """At one share per GPU: twice the GPUs and the batch only add texts."""
    config = trained(recipes.get("silc"), batch=16384)
    twice = trained(config, batch=32768)
    grown = sum(memory(twice, 128).values()) - sum(memory(config, 64).values())
    views = config.views.globals
    assert grown == pytest.approx(4 * 768 * 16384 * (2 + views), rel=0.01)


# ---------------------------------------------------------------- traffic and time


def bytes_of(config: Config, gpus: int) -> dict[str, float]:
    return {name: t.bytes for name, t in estimate(config, Site(gpus=gpus)).traffic.items()}


def test_traffic_is_that_of_rings() -> None:
    config = recipes.get("silc")
    w, batch = weights(config), config.train.batch
    replicated = bytes_of(config, 16)
    assert replicated["all-reduce gradients"] == pytest.approx(2 * 15 / 16 * 4 * w.student)
    assert replicated["gather texts"] == pytest.approx(15 / 16 * batch * 768 * 4)
    assert "gather student weights" not in replicated
    sharded = bytes_of(trained(config, shard=8), 16)
    assert sharded["gather student weights"] == pytest.approx(2 * 7 / 8 * 4 * w.student)
    assert sharded["gather teacher weights"] == pytest.approx(7 / 8 * 4 * w.teacher)
    assert sharded["reduce-scatter gradients"] == pytest.approx(7 / 8 * 4 * w.student)
    assert sharded["all-reduce gradients"] == pytest.approx(2 * 1 / 2 * 4 * w.student / 8)
    assert not bytes_of(config, 1)
    assert "log-sum-exp of every text" not in bytes_of(recipes.get("silc-s"), 16)


def test_a_ring_across_nodes_shares_the_adapters_of_each_node() -> None:
    """Eight GPUs a node on as many adapters of 50 GB/s: 400 together; one GPU of each node: 50 to itself."""
    config = trained(recipes.get("silc"), shard=8)
    plan_ = estimate(config, Site(gpus=64))
    reduced, texts, inner = (
        plan_.traffic[n] for n in ("all-reduce gradients", "gather texts", "gather student weights")
    )
    assert reduced.bytes / reduced.seconds == pytest.approx(0.8 * 50e9)
    assert texts.bytes / texts.seconds == pytest.approx(0.8 * 400e9)
    assert inner.bytes / inner.seconds == pytest.approx(0.8 * 450e9)


def test_days_and_cost_follow_from_flops_and_the_share_of_the_peak() -> None:
    config = trained(recipes.get("silc"), samples=10**9)
    found = estimate(config, Site(gpus=64, mfu=0.4, price=3.0))
    seconds = found.run_flops / (64 * 0.4 * 989e12)
    assert found.config.steps * found.computing == pytest.approx(seconds, rel=1e-6)
    assert found.days * 86400 >= seconds
    assert found.cost == pytest.approx(found.days * 24 * 64 * 3.0)
    assert found.pictures_per_second * found.days * 86400 == pytest.approx(10**9, rel=1e-3)
    again = estimate(trained(config, checkpoint_blocks=True), Site(gpus=64, mfu=0.4))
    assert again.computing / found.computing == pytest.approx(1 + (280.9 + 151.2 + 33.1) / 3 / 560.3, rel=1e-3)


# ---------------------------------------------------------------- when it does not fit


@pytest.mark.parametrize(("size", "gpus", "gpu"), [("B/16", 8, "h100"), ("g/16", 64, "4090"), ("L/16", 8, "l40s")])
def test_the_changes_fit_and_are_the_flags_to_type(
    size: str, gpus: int, gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(gpus=gpus, gpu=gpu)
    tight = estimate(sized(recipes.get("silc"), size), site)
    found = changes(tight)
    assert not tight.fits and found[-1].plan.fits
    assert found[-1].plan.config.train.batch == tight.config.train.batch, "the batch is the last thing to touch"
    flags = [word for change in found for word in change.flags.split()]
    text = said(capsys, "silc", "--size", size, "--gpus", str(gpus), "--gpu", gpu, *flags)
    assert "It fits" in text and f"{found[-1].plan.bytes / 2**30:.2f}" in text


def test_of_what_fits_the_quickest_is_proposed() -> None:
    """Of all combinations of recomputation and accumulation, tried one by one."""
    tight = estimate(sized(recipes.get("silc"), "L/16"), Site(gpus=64))
    tried = [
        estimate(trained(tight.config, checkpoint_blocks=again, accumulate=n), tight.site)
        for again in (False, True)
        for n in (1, 2, 4, 8, 16, 32)
    ]
    quickest = min(p.step_seconds for p in tried if p.fits)
    assert changes(tight)[-1].plan.step_seconds == quickest


def test_what_cannot_be_helped_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "silc", "--size", "g/16", "--gpus", "1", "--gpu", "4090")
    assert "No setting helps" in text


# ---------------------------------------------------------------- the command


def test_the_plan_tells_all_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "silc", "--gpus", "256", "--samples", "20e9", "--price", "2.5", "--train.shard", "8")
    for part in ("AdamW", "bf16 copies", "local views", "teacher, image tower", "log-sum-exp", "GPU hours", "at 2.5"):
        assert part in text
    assert "1,220,703 steps" in text and "Not yet run on a GPU" in text and "% / " in text


def test_a_setting_beside_a_size_counts_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert ": 675.7M parameters" in said(capsys, "silc", "--size", "L/16", "--gpus", "64").splitlines()[0]
    shallow = said(capsys, "silc", "--size", "L/16", "--gpus", "64", "--model.image.depth", "2")
    assert float(shallow.split("cards")[0].split(": ")[1].split("M")[0].replace(",", "")) < 450


def test_a_saved_config_is_planned_like_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_json(tmp_path / "config.json", recipes.get("mu"))
    text = said(capsys, str(tmp_path / "config.json"), "--gpus", "1", "--gpu", "cpu")
    assert text.startswith("mu on 1 x one CPU core") and "exchanges nothing" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["slic"], "Perhaps you meant 'silc'"),
        (["silc", "--gpu", "h10"], "Perhaps you meant 'h100'"),
        (["silc", "--size", "L16"], "Perhaps you meant 'L/16'"),
        (["silc", "--gpus", "100"], "--train.batch 16384 is not a multiple of 100 GPUs."),
        (["silc", "--gpus", "8", "--train.accumulate", "3"], "8 GPUs x --train.accumulate 3"),
        (["silc", "--gpus", "8", "--train.shard", "3"], "--train.shard 3 does not divide 8 GPUs"),
        (["silc", "--gpus", "0"], "--gpus"),
        (["silc", "--mfu", "45"], "--mfu 45"),
        (["silc", "--samples", "10"], "--samples 10 is less than one batch"),
        (["silc", "--views.local-size", "90"], "--views.local-size 90 is not a multiple of the patch"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *args])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and words in told and len(told.strip().splitlines()) == 1


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", ["silc", "siglip2-style", "tips-style"])
def test_every_card_and_kind_can_be_planned(card: str, name: str) -> None:
    found = estimate(recipes.get(name), Site(gpus=64, gpu=card))
    assert 0 < found.days < 1e7 and found.bytes > 0 and found.cores > 0


# ---------------------------------------------------------------- the page


def between(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end of {name} -->")[0]


def test_the_page_holds_the_tables_of_this_code() -> None:
    text = (ROOT / "docs" / "planning.md").read_text()
    for name in ("sizes", "table", "errors"):
        made = getattr(planning, name)()
        assert between(text, name) == made, "run `python benchmarks/plan_check.py --table docs/planning.md`"
    assert all(f"| {size} | 1,024 |" in text for size in SIZES)


def test_the_errors_told_are_those_of_the_raw_file() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "plan_check.json").read_text())["errors"]
    for told, what in zip(planning.ERRORS.values(), ("flops", "stays", "begins", "peak", "picture"), strict=True):
        assert told == pytest.approx((found[what]["median"], found[what]["worst"]), abs=6e-4)
