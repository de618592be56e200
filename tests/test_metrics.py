"""Metrics against independent NumPy references and answers worked out by hand.

Gives: tests of silc.eval.metrics.
Used by: pytest.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silc.eval import metrics

quick = settings(max_examples=60, deadline=None)


# ---------------------------------------------------------------- classification


def test_top_k_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]])
    labels = torch.tensor([0, 0, 0, 2])
    assert metrics.label_ranks(scores, labels).tolist() == [0, 1, 2, 2]
    assert [metrics.top_k(scores, labels, k) for k in (1, 2, 3)] == [0.25, 0.5, 1.0]


@quick
@given(st.integers(1, 12), st.integers(2, 9), st.integers(1, 4), st.integers(0, 2**16))
def test_ranks_are_places_in_a_stable_sort(n, classes, levels, seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(levels, size=(n, classes)).astype(np.float32), rng.integers(classes, size=n)
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [list(row).index(label) for row, label in zip(order, labels)]
    assert metrics.label_ranks(torch.from_numpy(scores), torch.from_numpy(labels)).tolist() == expected


def test_constant_scores_are_chance_and_nan_is_never_right():
    labels = torch.arange(10).repeat(3)
    constant = torch.full((30, 10), 0.3)
    assert metrics.top_k(constant, labels, 1) == pytest.approx(0.1)
    assert metrics.top_k(constant, labels, 5) == pytest.approx(0.5)
    assert metrics.top_k(torch.full((30, 10), torch.nan), labels, 9) == 0
    one_bad = torch.eye(10)[labels]
    one_bad[:, 3] = torch.nan
    assert metrics.top_k(one_bad, labels, 1) == 0


def test_per_class_accuracy():
    correct, labels = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 2, 2])
    result = metrics.per_class_accuracy(correct, labels, 4)
    assert result[[0, 2]].tolist() == [0.5, 1.0] and result[[1, 3]].isnan().all()


# ---------------------------------------------------------------- retrieval


def recall_reference(similarity: np.ndarray, own: np.ndarray, k: int) -> tuple[float, float]:
    """(image_to_text, text_to_image) from the full matrix [images, captions]; own[c] is the image of caption c."""
    to_text = np.argsort(-similarity, axis=1)[:, :k]
    to_image = np.argsort(-similarity.T, axis=1)[:, :k]
    return (float(np.mean([(own[row] == i).any() for i, row in enumerate(to_text)])),
            float(np.mean([(row == own[c]).any() for c, row in enumerate(to_image)])))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_recall_with_five_captions_against_argsort(chunk):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(23, 6)).astype(np.float32)
    own = np.repeat(np.arange(23), 5)
    texts = (images[own] + 1.5 * rng.normal(size=(115, 6))).astype(np.float32)
    pairs = torch.from_numpy(np.stack([own, np.arange(115)], 1))
    i, t = torch.from_numpy(images), torch.from_numpy(texts)
    to_text = metrics.first_hit_ranks(i, t, pairs, chunk=chunk)
    to_image = metrics.first_hit_ranks(t, i, pairs.flip(1), chunk=chunk)
    for k in (1, 3, 5, 10):
        expected = recall_reference(images @ texts.T, own, k)
        found = ((to_text < k).double().mean().item(), (to_image < k).double().mean().item())
        assert found == pytest.approx(expected)
        assert 0 < expected[0] < 1


def test_recall_with_five_captions_by_hand():
    """Two images with five captions each on a line of directions, the scores are the cosines' order."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # first image: its best caption is third after two of the other's; second image: its own comes first
    first = torch.tensor([[0.7, 0.1], [0.1, 0.0], [0.2, 0.0], [0.3, 0.0], [0.4, 0.6]])
    second = torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.9], [0.0, 0.1], [0.1, 0.2]])
    texts = torch.cat([first, second])
    pairs = torch.tensor([(i, 5 * i + j) for i in range(2) for j in range(5)])
    assert metrics.first_hit_ranks(images, texts, pairs).tolist() == [2, 0]
    # captions: four of the first and three of the second find their image first; the others come second
    assert metrics.first_hit_ranks(texts, images, pairs.flip(1)).tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]


@quick
@given(st.data())
def test_first_hit_ranks_is_pessimistic_among_equals(data):
    """Against a loop over whole-number scores, full of ties, with several right answers and repeated candidates."""
    n, m = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    queries, candidates = rng.integers(0, 2, (n, 2)), rng.integers(0, 2, (m, 2))
    copies = rng.integers(1, 4, m)
    right = [set(rng.choice(m, rng.integers(1, m + 1), replace=False).tolist()) for _ in range(n)]
    expected = []
    for q in range(n):
        scores = candidates @ queries[q]
        best = max(scores[c] for c in right[q])
        expected.append(sum(int(copies[c]) for c in range(m) if c not in right[q] and scores[c] >= best))
    pairs = torch.tensor([(q, c) for q in reversed(range(n)) for c in right[q]])
    found = metrics.first_hit_ranks(torch.from_numpy(queries).float(), torch.from_numpy(candidates).float(), pairs,
                                    torch.from_numpy(copies), chunk=data.draw(st.integers(1, 7)))
    assert found.tolist() == expected


def test_constant_and_broken_features_find_nothing():
    pairs = torch.arange(8)[:, None].expand(-1, 2)
    for features in (torch.ones(8, 4), torch.full((8, 4), torch.nan)):
        assert (metrics.first_hit_ranks(features, features, pairs) == 7).all()
    half = torch.eye(8)
    half[3] = torch.nan  # one broken picture may not be found, and may not help others to be found
    assert (metrics.first_hit_ranks(half, torch.eye(8), pairs) == 0).tolist() == [i != 3 for i in range(8)]


def test_a_query_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="no candidate"):
        metrics.first_hit_ranks(torch.eye(3), torch.eye(3), torch.tensor([[0, 0], [2, 2]]))


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8))
def test_chance_recall_counts_every_draw(total, right, k):
    right = min(right, total)
    draws = list(itertools.combinations(range(total), min(k, total)))
    expected = sum(any(c < right for c in draw) for draw in draws) / len(draws)
    assert metrics.chance_recall(torch.tensor([right]), total, k) == pytest.approx(expected)


def test_chance_recall_of_coco_size():
    right = torch.full((5000,), 5)
    expected = 1 - math.comb(25000 - 5, 10) / math.comb(25000, 10)
    assert metrics.chance_recall(right, 25000, 10) == pytest.approx(expected)


# ---------------------------------------------------------------- segmentation


@quick
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**16))
def test_confusion_iou_and_best_constant_against_loops(classes, pixels, seed):
    rng = np.random.default_rng(seed)
    truth, guess = rng.integers(classes, size=pixels), rng.integers(classes, size=pixels)
    truth[rng.random(pixels) < 0.2] = 255
    counts = metrics.confusion(torch.from_numpy(truth), torch.from_numpy(guess), classes, 255)
    kept = truth != 255
    expected = np.zeros((classes, classes), int)
    for t, p in zip(truth[kept], guess[kept]):
        expected[t, p] += 1
    assert counts.tolist() == expected.tolist()
    if not kept.any():
        with pytest.raises(ValueError, match="labelled"):
            metrics.miou(counts)
        return

    def reference(prediction: np.ndarray) -> tuple[float, float]:
        t, p = truth[kept], prediction[kept]
        shares = [((t == c) & (p == c)).sum() / ((t == c) | (p == c)).sum() for c in {*t.tolist(), *p.tolist()}]
        return float(np.mean(shares)), float(np.mean(t == p))

    assert (metrics.miou(counts), metrics.pixel_accuracy(counts)) == pytest.approx(reference(guess))
    constants = [reference(np.full(pixels, c)) for c in range(classes)]
    assert metrics.best_constant(counts) == pytest.approx(tuple(max(column) for column in zip(*constants)))


def test_iou_by_hand():
    truth = torch.tensor([[0, 0, 1], [1, 2, 255]])
    guess = torch.tensor([[0, 1, 1], [1, 1, 3]])
    result = metrics.iou(metrics.confusion(truth, guess, 5, 255))
    assert result[:3].tolist() == [0.5, 0.5, 0.0] and result[3:].isnan().all()
    assert metrics.miou(metrics.confusion(truth, guess, 5, 255)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "truth, guess, word", [([0, 9], [0, 0], "mask"), ([0, 1], [0, -1], "prediction"), ([0], [0, 0], "size")]
)
def test_confusion_refuses_what_is_no_class(truth, guess, word):
    with pytest.raises(ValueError, match=word):
        metrics.confusion(torch.tensor(truth), torch.tensor(guess), 3)


# ---------------------------------------------------------------- intervals


def test_bootstrap_matches_the_normal_interval_and_is_deterministic():
    values = (torch.arange(400) % 4 == 0).double()
    low, high = metrics.bootstrap(values)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == pytest.approx((0.25 - half, 0.25 + half), abs=0.008)
    assert metrics.bootstrap(values) == (low, high)
    assert metrics.bootstrap(torch.ones(5)) == (1.0, 1.0)


def test_bootstrap_of_groups_knows_that_copies_add_nothing():
    values, groups = torch.tensor([0.0, 1.0] * 50), torch.arange(100)
    copied = metrics.bootstrap(values.repeat_interleave(9), groups.repeat_interleave(9))
    assert copied == pytest.approx(metrics.bootstrap(values))
    alone = metrics.bootstrap(values.repeat_interleave(9))
    assert copied[1] - copied[0] > 2 * (alone[1] - alone[0])
