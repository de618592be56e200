"""k nearest neighbours and linear probes, of pictures and of patches, against plain loops and known answers.

Gives: tests of silc.eval.probe, silc.eval.dense_probe and the softmax regression in silc.eval.linear.
Used by: pytest.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from known import COLOURS, NAMES, Arbitrary, Mute, Oracle, save, write_splits

from silc.eval import dense_probe, linear, probe
from silc.eval.embed import embed_images

# ---------------------------------------------------------------- softmax regression


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 2e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_softmax_regression_is_at_the_optimum(l2, dtype, slack):
    """The problem is convex: where the gradient vanishes is the one answer. Checked in float64, by hand."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(2, 3, (80, 6))).to(dtype)
    labels = torch.from_numpy(rng.integers(4, size=80))
    found = linear.softmax_regression(x, labels, 4, l2, steps=500)
    z = x.double().numpy()
    z = (z - z.mean(0)) / (z.std(0) + 1e-5)
    scores = z @ found.weight.double().numpy() + found.bias.double().numpy()
    wrong = np.exp(scores) / np.exp(scores).sum(1, keepdims=True) - np.eye(4)[labels.numpy()]
    np.testing.assert_allclose(z.T @ wrong / 80 + l2 * found.weight.double().numpy(), 0, atol=slack)
    np.testing.assert_allclose(wrong.mean(0), 0, atol=slack)
    np.testing.assert_allclose(found(x), scores, rtol=1e-3, atol=1e-4)
    again = linear.softmax_regression(x, labels, 4, l2, found, steps=500)
    torch.testing.assert_close(again.weight, found.weight, atol=100 * slack, rtol=0)
    assert torch.equal(linear.softmax_regression(x, labels, 4, l2, steps=500).weight, found.weight), "deterministic"


def test_softmax_regression_learns_also_where_gradients_are_off():
    x, labels = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)
    with torch.inference_mode():
        found = linear.softmax_regression(x, labels, 3, 1e-3)
    assert (found(x).argmax(1) == labels).all() and not found.weight.requires_grad


def test_every_fifth_of_a_class_is_held_out():
    labels = torch.tensor([0, 1, 0, 0, 0, 0, 1, 1, 1, 2, 1, 1, 1, 1, 1])
    assert linear.every_fifth(labels).nonzero()[:, 0].tolist() == [5, 10]


def test_the_l2_that_generalises_is_taken():
    """One telling dimension among hundreds of noise, fewer pictures than dimensions: a weak l2 learns the noise."""
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(2, size=400))
    x = torch.from_numpy(rng.normal(size=(400, 320)))
    x[:, 0] += 3 * labels
    held = linear.every_fifth(labels)
    found, best, tried = linear.best_l2(x, labels, 2, held, (1e-6, 1.0), 300)
    assert best == 1.0 and tried["1"] > tried["1e-06"]
    whole = linear.softmax_regression(x, labels, 2, 1.0, steps=300)
    assert torch.equal(found.weight, whole.weight), "the answer is fitted to all"
    nothing = linear.best_l2(x[:4], labels[:4], 2, torch.zeros(4, dtype=torch.bool), (1e-2, 1.0), 10)
    assert nothing[1:] == (1.0, {})


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_votes_against_a_loop(chunk):
    rng = np.random.default_rng(0)
    x, tested, labels = rng.normal(size=(40, 5)), rng.normal(size=(11, 5)), rng.integers(4, size=40)
    expected = []
    for row in tested:
        cosine = x @ row / np.linalg.norm(x, axis=1) / np.linalg.norm(row)
        votes = np.zeros(4)
        for i in np.argsort(-cosine)[:7]:
            votes[labels[i]] += np.exp(cosine[i] / 0.07)
        expected.append(int(votes.argmax()))
    x, labels, tested = torch.from_numpy(x), torch.from_numpy(labels), torch.from_numpy(tested)
    assert probe.vote(x, labels, tested, 4, 7, 0.07, chunk).tolist() == expected and len(set(expected)) > 2
    assert probe.vote(x, labels, tested, 4, 10**6, 1e-4).tolist() == probe.vote(x, labels, tested, 4, 1, 1.0).tolist()


def test_oracle_and_mute(tmp_path):
    folder = write_splits(tmp_path / "set", train=6)
    result = probe.run(Oracle(), folder, probe.Config(batch=7))
    assert result.metrics == {"knn10": 1.0, "knn20": 1.0, "linear": 1.0}
    assert result.chance == dict.fromkeys(result.metrics, 1 / 6)
    mute = probe.run(Mute(), folder, probe.Config(batch=7))
    assert mute.metrics == pytest.approx(mute.chance)


def test_the_probe_scores_the_test_split(tmp_path):
    folder, model = write_splits(tmp_path / "set", train=10, test=4, noise=90), Arbitrary()
    cfg = probe.Config(neighbours=(3,))
    result = probe.run(model, folder, cfg)
    train, test = linear.open_splits(probe.open_classification, folder, None, None)
    x, tested = embed_images(model, train, 50), embed_images(model, test, 50)
    labels, truth = torch.tensor(train.labels), torch.tensor(test.labels)
    strength = result.details["protocol"]["linear"]["l2"]
    direct = linear.softmax_regression(x, labels, 6, strength)(tested).argmax(1)
    assert result.metrics["linear"] == pytest.approx((direct == truth).double().mean().item())
    assert result.details["items"]["linear"] == (direct == truth).double().tolist()
    assert 1 / 6 < result.metrics["knn3"] <= 1 and result.details["count"] == 24
    swapped = probe.run(model, folder, probe.Config(neighbours=(3,), split="test"))
    assert swapped.metrics == result.metrics, "test is what is scored if nothing is said"


# ---------------------------------------------------------------- patches


def write_masks(folder: Path, split: str, pictures: list[list[int]], classes: int = 6) -> None:
    """Pictures of 40 x 48 px in six vertical stripes of 8 px, with a void corner."""
    for i, stripes in enumerate(pictures):
        labels = np.repeat(np.repeat(np.array(stripes)[None], 40, 0), 8, 1)
        pixels = COLOURS[labels].copy()
        labels[:8, :8] = 255
        pixels[:8, :8] = COLOURS[7]
        save(folder / split / "images" / f"{i}.png", pixels)
        save(folder / split / "masks" / f"{i}.png", labels)
    about = {"classes": [[n] for n in NAMES[:classes]], "void": 255}
    (folder / split / "classes.json").write_text(json.dumps(about))


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    rows = [[0, 0, 0, 1, 2, 3], [3, 0, 0, 0, 4, 5], [0, 1, 0, 2, 0, 4], [5, 0, 0, 0, 0, 3]]
    write_masks(tmp_path / "set", "train", rows * 2)
    write_masks(tmp_path / "set", "test", [[0, 5, 0, 1, 0, 2], [0, 0, 3, 0, 4, 0], [1, 0, 0, 0, 0, 0]])
    return tmp_path / "set"


def test_oracle_labels_nearly_every_pixel(masked):
    cfg = dense_probe.Config(size=48, batch=2)
    result = dense_probe.run(Oracle(), masked, cfg)
    # 48 x 48 over stripes of 8 px: each patch sees one stripe; scores between two patches decide where the edge falls
    assert result.metrics["pixel_accuracy"] > 0.9 and result.metrics["miou"] > 0.8
    assert result.details["count"] == 3 and result.details["patches"] == 8 * 36 - 8
    truth = [c["pixels"] for c in result.details["per_class"]]
    assert sum(truth) == 3 * (40 * 48 - 64) and truth[3] == truth[5] == 320


def test_oracle_of_whole_pictures_scores_everything(tmp_path):
    for split in ("train", "test"):
        write_masks(tmp_path / "set", split, [[c] * 6 for c in range(6)] * 2)
    result = dense_probe.run(Oracle(), tmp_path / "set", dense_probe.Config(size=48))
    assert result.metrics == {"miou": 1.0, "pixel_accuracy": 1.0}


def test_mute_scores_the_best_constant(masked):
    result = dense_probe.run(Mute(), masked, dense_probe.Config(size=48))
    assert result.metrics == pytest.approx(result.chance)
    assert 0 < result.chance["miou"] < result.chance["pixel_accuracy"] < 1


def test_the_model_sees_the_wanted_size(masked):
    model = Oracle()
    dense_probe.run(model, masked, dense_probe.Config(batch=5))
    assert set(model.shapes) == {(5, 3, 32, 32)}
    with pytest.raises(ValueError, match="no multiple"):
        dense_probe.run(model, masked, dense_probe.Config(size=50))


def test_a_large_set_gives_few_patches_of_each_picture(masked):
    cfg = dense_probe.Config(size=48, patches=8 * 5, batch=3)
    train, _ = linear.open_splits(dense_probe.open_masked, masked, None, None)
    x, labels, owner = dense_probe.gather_patches(Oracle(), train, cfg)
    assert torch.bincount(owner).tolist() == [5] * 8 and len(x) == 40
    assert (x.argmax(1) == labels).all(), "a feature keeps its own label"
    again = dense_probe.gather_patches(Oracle(), train, cfg)
    assert torch.equal(x, again[0]) and torch.equal(labels, again[1])
    one = dense_probe.gather_patches(Oracle(), train, dense_probe.Config(size=48, patches=1))
    assert len(one[0]) == 8, "one of each at least"


@pytest.mark.parametrize("at_once", [1, 2 * 20 * 30, 2**25])
def test_the_map_in_parts_is_the_whole(monkeypatch, at_once):
    torch.manual_seed(0)
    monkeypatch.setattr(dense_probe, "PIXELS_AT_ONCE", at_once)
    layer = linear.Linear(torch.randn(4) / 9, torch.rand(4) + 0.5, torch.randn(4, 7), torch.randn(7) / 9)
    dense = torch.randn(4, 10, 12)
    scores = torch.einsum("dhw,dc->chw", (dense - layer.mean[:, None, None]) / layer.std[:, None, None], layer.weight)
    scores = F.interpolate((scores + layer.bias[:, None, None])[None], (20, 30), mode="bilinear")[0]
    found = dense_probe.label_map(layer, dense, 20, 30)
    assert (found == scores.argmax(0)).float().mean() > 0.999 and len(found.unique()) == 7


def test_masks_that_are_all_void(masked):
    for path in (masked / "train" / "masks").iterdir():
        save(path, np.full((40, 48), 255))
    with pytest.raises(ValueError, match="all void"):
        dense_probe.run(Oracle(), masked, dense_probe.Config())
