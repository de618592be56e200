"""Few-shot ridge regression against a direct solve, and the task from folders to scores.

Gives: tests of silc.eval.fewshot and of the closed form in silc.eval.linear.
Used by: pytest.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known import NAMES, Arbitrary, Mute, Oracle, save, solid, write_splits

from silc.eval import fewshot, linear
from silc.eval.embed import embed_images


def direct(x: np.ndarray, labels: np.ndarray, classes: int, tested: np.ndarray, l2: float = 1024.0) -> np.ndarray:
    """Scores [M, C] by the normal equations in float64, always in the space of the features."""
    mean, std = x.mean(0), x.std(0) + 1e-5
    z, t = ((np.hstack([(a - mean) / std, np.full((len(a), 1), 100.0)])) for a in (x, tested))
    y = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
    return t @ np.linalg.solve(z.T @ z + l2 * np.eye(z.shape[1]), z.T @ y)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 40), d=st.integers(1, 40), classes=st.integers(2, 6), l2=st.sampled_from([1.0, 1024.0]),
       seed=st.integers(0, 2**16))
def test_ridge_against_a_direct_solve(n, d, classes, l2, seed):
    rng = np.random.default_rng(seed)
    x, tested = rng.normal(3, 2, (n, d)), rng.normal(3, 2, (9, d))
    labels = rng.integers(classes, size=n)
    found = linear.ridge(torch.from_numpy(x), torch.from_numpy(labels), classes, l2)(torch.from_numpy(tested))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, direct(x, labels, classes, tested, l2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (21, 20), (20, 20), (30, 200)])
def test_both_forms_take_the_smaller_matrix(n, d, monkeypatch):
    sizes, original = [], torch.linalg.eigh

    def spy(matrix):
        sizes.append(tuple(matrix.shape))
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", spy)
    rng = np.random.default_rng(0)
    x, labels, tested = rng.normal(size=(n, d)).astype(np.float32), rng.integers(5, size=n), rng.normal(size=(50, d))
    found = linear.ridge(torch.from_numpy(x), torch.from_numpy(labels), 5)(torch.from_numpy(tested))
    np.testing.assert_allclose(found, direct(x.astype(float), labels, 5, tested), rtol=1e-6, atol=1e-8)
    assert sizes == [(min(n, d + 1),) * 2]


@pytest.mark.parametrize(("shots", "train", "embedded"), [((1, 5, 10), 12, 72), ((2, 1), 30, None)])
def test_the_task_equals_a_second_implementation(tmp_path, shots, train, embedded):
    folder, model = write_splits(tmp_path / "set", train=train, test=5, noise=255), Arbitrary()
    cfg, most = fewshot.Config(shots=shots, seeds=3, batch=1), max(shots)
    result = fewshot.run(model, folder, cfg)
    seen = len(model.shapes) - 30
    assert seen == embedded if embedded else 6 * 2 < seen <= 3 * 6 * 2, "only what is drawn, if that is little"
    learned, test = linear.open_splits(fewshot.open_classification, folder, None, None)
    x, tested = (embed_images(model, part, 100).double().numpy() for part in (learned, test))
    labels, truth = np.array(learned.labels), np.array(test.labels)
    for k in cfg.shots:
        accuracies = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            order = [rng.permutation(np.where(labels == c)[0]) for c in range(6)]
            support = np.concatenate([own[:k] for own in order])
            scores = direct(x[support], labels[support], 6, tested)
            accuracies.append(float((scores.argmax(1) == truth).mean()))
        assert result.details["seeds"][f"shot{k}"] == pytest.approx(accuracies)
        assert result.metrics[f"shot{k}"] == pytest.approx(np.mean(accuracies))
        assert result.details["spread"][f"shot{k}"] == pytest.approx(np.std(accuracies))
        assert np.mean(result.details["items"][f"shot{k}"]) == pytest.approx(np.mean(accuracies))
        assert result.details["support"][f"shot{k}"] == 6 * k
    assert 1 / 6 < result.metrics[f"shot{most}"] < 1 and len(set(result.details["seeds"]["shot1"])) > 1
    low, high = result.details["interval"]["shot1"]
    assert low < result.metrics["shot1"] < high
    assert result.details["count"] == 30 and result.details["train"] == 6 * train and result.details["split"] == "test"


def test_fewer_shots_are_among_more_and_seeds_differ():
    labels = torch.tensor([0, 1, 2] * 20)
    first, other = fewshot.permuted(labels, 3, 0), fewshot.permuted(labels, 3, 1)
    assert [sorted(own.tolist()) for own in first] == [list(range(c, 60, 3)) for c in range(3)]
    assert any(a.tolist() != b.tolist() for a, b in zip(first, other))
    assert [own.tolist() for own in first] == [own.tolist() for own in fewshot.permuted(labels, 3, 0)]


@pytest.mark.parametrize("noise", [0, 20])
def test_oracle_learns_all_from_one_picture(tmp_path, noise):
    result = fewshot.run(Oracle(), write_splits(tmp_path / "set", noise=noise), fewshot.Config(shots=(1, 4, 10)))
    assert result.metrics == {"shot1": 1.0, "shot4": 1.0, "shot10": 1.0}
    assert result.details["support"] == {"shot1": 6, "shot4": 24, "shot10": 24}, "no class has ten"
    assert result.details["features"] == "embedding"


@pytest.mark.parametrize("classes", [2, 6, 8])
def test_mute_scores_chance(tmp_path, classes):
    folder = write_splits(tmp_path / "set", classes, train=12, test=5)
    result = fewshot.run(Mute(), folder, fewshot.Config())
    assert result.metrics == pytest.approx(result.chance) == dict.fromkeys(result.metrics, 1 / classes)


def test_sets_that_cannot_be_learned_from(tmp_path):
    folder = write_splits(tmp_path / "set")
    with pytest.raises(ValueError, match="has no split 'tset'; it has: test, train"):
        fewshot.run(Oracle(), folder, fewshot.Config(split="tset"))
    with pytest.raises(ValueError, match="train is learned from"):
        fewshot.run(Oracle(), folder, fewshot.Config(split="train"))
    (folder / "classes.txt").unlink()
    (folder / "test" / "zebra").mkdir()
    with pytest.raises(ValueError, match="train has 6 classes and test 7"):
        fewshot.run(Oracle(), folder, fewshot.Config())
    (folder / "test" / "zebra").rmdir()
    (folder / "test" / "red").rename(folder / "test" / "pink")
    with pytest.raises(ValueError, match="train has 'red' where test has 'pink'"):
        fewshot.run(Oracle(), folder, fewshot.Config())
    (folder / "test" / "pink").rename(folder / "test" / "red")
    for picture in (folder / "train" / "red").iterdir():
        picture.unlink()
    with pytest.raises(ValueError, match="'red' has no pictures in train"):
        fewshot.run(Oracle(), folder, fewshot.Config())
    for i, name in enumerate(NAMES[:6]):
        save(tmp_path / "flat" / name / "0.png", solid(i))
    with pytest.raises(ValueError, match="not divided into splits"):
        fewshot.run(Oracle(), tmp_path / "flat", fewshot.Config())
