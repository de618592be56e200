"""Configs: strict in, exact out, and what they derive; recipes; FLOPs against a profiler."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import at_mu_size
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from silc import plan, recipes
from silc.config import Config, Term
from silc.parallel import World
from silc.plain import from_dict, load_json, nearest, save_json, to_dict
from silc.train.loop import build
from silc.train.optim import learning_rate, make_optimizer


@pytest.mark.parametrize("name", recipes.names())
def test_a_saved_config_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = recipes.get(name)
    assert config.recipe == name
    save_json(tmp_path / "config.json", config)
    assert load_json(tmp_path / "config.json", Config) == config


def test_a_stray_key_names_its_place_and_the_nearest() -> None:
    data = to_dict(recipes.mu())
    data["model"]["image"]["widht"] = data["model"]["image"].pop("width")
    with pytest.raises(ValueError, match=r"'model\.image\.widht'.*'width'"):
        from_dict(Config, data)


@pytest.mark.parametrize(
    ("path", "value"),
    [("seed", "0"), ("seed", True), ("optim.lr", "fast"), ("objective.kind", "hinge"), ("views.flip", 1), ("data", [])],
)
def test_a_value_of_the_wrong_type_is_refused(path: str, value: object) -> None:
    data = json.loads(json.dumps(to_dict(recipes.mu())))
    *way, last = path.split(".")
    part = data
    for key in way:
        part = part[key]
    part[last] = value
    with pytest.raises(ValueError, match=last):
        from_dict(Config, data)


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("lr: 3")
    with pytest.raises(ValueError, match=r"c\.json is not valid JSON"):
        load_json(tmp_path / "c.json", Config)


def test_nearest() -> None:
    assert nearest("clpi", ["clip", "siglip"]) == " Perhaps you meant 'clip'."
    assert nearest("zzz", ["b", "a"]) == " There are: a, b."


def test_the_momentum_is_scaled_to_the_batch() -> None:
    c = recipes.silc()
    assert c.ema_momentum == pytest.approx(0.966)
    quarter = replace(c, train=replace(c.train, batch=4096))
    assert quarter.ema_momentum == pytest.approx(0.966**0.25)
    assert quarter.ema_momentum**4 == pytest.approx(c.ema_momentum)


def test_recipes_are_what_they_are_called() -> None:
    get = recipes.get
    assert get("clip").objective.distill.weight == 0 and get("clip").model.bias_init is None
    assert get("siglip").objective.kind == "sigmoid" and get("siglip").model.bias_init == -10
    silc = get("silc")
    assert (silc.views.globals, silc.views.locals, silc.views.local_size) == (2, 8, 96)
    assert silc.views.global_scale == (0.4, 1.0) and silc.views.local_scale == (0.05, 0.4)
    assert silc.objective.distill == Term(1.0) and silc.objective.prototypes.count == 65536
    lean = get("silc-lean")
    assert (lean.views.globals, lean.views.locals, lean.objective.prototypes.layers) == (1, 1, 2)
    cost = plan.flops_per_sample(get("clip")).total
    assert plan.flops_per_sample(lean).total < 1.5 * cost and plan.flops_per_sample(silc).total > 3 * cost
    assert get("views-only").objective.distill.weight == 0 and get("views-only").views.globals == 2
    late = get("siglip2_style").objective
    assert (late.distill.start, late.masked.start, late.contrast_views) == (0.8, 0.8, "original")
    tips = get("tips-style").objective
    assert (tips.teacher, tips.masked_form) == ("head", "all")


@given(st.integers(1, 5000), st.sampled_from(["cosine", "rsqrt", "constant"]))
def test_the_rate_rises_to_its_peak_and_falls(steps: int, schedule: str) -> None:
    c = replace(recipes.clip().optim, schedule=schedule, lr=1.0, warmup=0.1, cooldown=0.2)
    rates = [learning_rate(s, steps, c) for s in range(steps)]
    warmup = max(1, round(0.1 * steps))
    assert all(0 <= r <= 1 for r in rates)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[warmup:]))
    if steps >= 50:
        assert rates[-1] <= 0.1 and max(rates) > 0.9


def test_every_parameter_is_in_one_group_of_its_part_and_decay() -> None:
    task, _ = build(recipes.mu(), World(0, 1, torch.device("cpu")))
    optimizer = make_optimizer(task.student, replace(recipes.mu().optim, weight_decay=0.3))
    found = {id(p): (g["part"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    named = {n: found[id(p)] for n, p in task.student.named_parameters()}
    assert len(named) == len(found) == sum(len(g["params"]) for g in optimizer.param_groups)
    assert named["model.image.position"] == named["model.image.head.probe"] == ("image", 0.0)
    assert named["model.logit_scale"] == ("text", 0.0) and named["mask_token"] == ("heads", 0.0)
    assert named["model.image.patch.weight"] == ("image", 0.3) and named["view_head.prototypes"] == ("heads", 0.3)
    assert {part for part, _ in found.values()} == {"image", "text", "heads"}


@pytest.mark.parametrize(
    "name", ["clip", "silc", "silc-lean", "silc-s", "views-only", "siglip2-style", "tips-style", "continued"]
)
def test_counted_flops_agree_with_the_profiler(name: str) -> None:
    """Shapes against torch's own counter, one whole step; attention runs as plain products so that it is counted."""
    c = at_mu_size("silc" if name == "continued" else name, 64, 32)
    if name == "continued":
        anchored = replace(c.objective, anchor=Term(1.0))
        c = replace(c, objective=anchored, train=replace(c.train, images=8))
    views = c.views
    task, _ = build(c, World(0, 1, torch.device("cpu")))
    batch = {
        "image": torch.zeros(4, 3, 64, 64, dtype=torch.uint8),
        "globals": torch.zeros(views.globals, 4, 3, 64, 64, dtype=torch.uint8),
        "tokens": torch.zeros(4, 16, dtype=torch.long),
    }
    if views.locals:
        batch["locals"] = torch.zeros(views.locals, 4, 3, 32, 32, dtype=torch.uint8)
    if name == "continued":
        sizes = {"globals": (views.globals, 64), "locals": (views.locals, 32)}
        batch["unpaired"] = {n: torch.zeros(k, 8, 3, s, s, dtype=torch.uint8) for n, (k, s) in sizes.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.forward_backward(batch, 0)
    counted = plan.flops_per_sample(c).total * 4
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.08)


def test_dataclasses_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.mu().seed = 1  # type: ignore[misc]
