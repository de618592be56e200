"""Every objective against the loop of its docstring, against second formulas, and against numbers worked out by hand.

Gives: values and gradients, sharded rows, skipped views, masks, entropy, stopped gradients, precision.
Used by: pytest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from silc.losses import distill, entropy, masked_patches, sigmoid_contrastive, softmax_contrastive, teacher_probs

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**20)
quick = settings(max_examples=25, deadline=None)


def unit(*shape: int, seed: int) -> Tensor:
    """Random unit vectors, in float64."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double), dim=-1)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def with_gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    assert value.shape == ()
    return value.detach(), torch.autograd.grad(value, leaves)


def agree(a: Callable[..., Tensor], b: Callable[..., Tensor], *inputs: Tensor, tolerance: float = 2e-5) -> None:
    """Values and all gradients of `a`, which computes in fp32, are those of `b`, in float64."""
    (value, gradients), (expected, wanted) = with_gradients(a, *inputs), with_gradients(b, *inputs)
    for got, want in zip((value, *gradients), (expected, *wanted), strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance * max(want.abs().max().item(), 0.1)
        )


# ---------------------------------------------------------------- loops, word for word as in the docstrings


def sigmoid_loop(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    loss = torch.zeros((), dtype=torch.double)
    for i in range(len(image)):
        for j in range(len(text)):
            sign = +1 if j == offset + i else -1
            loss = loss - torch.log(torch.sigmoid(sign * (scale[0] * image[i] @ text[j] + bias[0]))) / len(image)
    return loss


def softmax_loop(image: Tensor, text: Tensor, images: Tensor, texts: Tensor, scale: Tensor, offset: int = 0) -> Tensor:
    loss = torch.zeros((), dtype=torch.double)
    for i in range(len(image)):
        for row, columns in ((image[i], texts), (text[i], images)):
            logits = scale[0] * columns @ row
            loss = loss + (torch.log(torch.exp(logits).sum()) - logits[offset + i]) / (2 * len(image))
    return loss


def distill_loop(student: Tensor, teacher: Tensor, temp: float, same_view: int = 0) -> Tensor:
    pairs = []
    for s in range(len(student)):
        for t in range(len(teacher)):
            if not (s == t and s < same_view):
                probs = torch.exp(student[s] / temp) / torch.exp(student[s] / temp).sum(-1, keepdim=True)
                pairs.append(-(teacher[t] * torch.log(probs)).sum(-1).mean())
    return torch.stack(pairs).mean()


def masked_loop(student: Tensor, teacher: Tensor, mask: Tensor, temp: float, form: str) -> Tensor:
    pictures = []
    for b in range(len(student)):
        counted = [
            -(teacher[b, n] * (student[b, n] / temp - torch.logsumexp(student[b, n] / temp, 0))).sum()
            for n in range(student.shape[1])
            if form == "all" or mask[b, n]
        ]
        pictures.append(torch.stack(counted).mean() if counted else student[b].sum() * 0)
    return torch.stack(pictures).mean()


# ---------------------------------------------------------------- contrastive


@given(sizes, sizes, st.integers(1, 8), st.integers(0, 9), seeds)
@quick
def test_sigmoid_is_its_loop(batch: int, others: int, width: int, before: int, seed: int) -> None:
    """With `before` texts of lower, and `others` of higher processes."""
    image, text = unit(batch, width, seed=seed), unit(before + batch + others, width, seed=seed + 1)
    scale, bias = torch.tensor([9.0], dtype=torch.double), torch.tensor([-4.0], dtype=torch.double)
    agree(lambda *a: sigmoid_contrastive(*a, before), lambda *a: sigmoid_loop(*a, before), image, text, scale, bias)


@given(sizes, sizes, st.integers(1, 8), st.integers(0, 9), seeds)
@quick
def test_softmax_is_its_loop(batch: int, others: int, width: int, before: int, seed: int) -> None:
    images, texts = (unit(before + batch + others, width, seed=seed + i) for i in range(2))
    image, text = (unit(batch, width, seed=seed + i) for i in range(2, 4))
    scale = torch.tensor([14.0], dtype=torch.double)
    inputs = (image, text, images, texts, scale)
    agree(lambda *a: softmax_contrastive(*a, before), lambda *a: softmax_loop(*a, before), *inputs)


def test_contrastive_losses_are_pytorchs_own() -> None:
    image, text = unit(7, 5, seed=0), unit(7, 5, seed=1)
    scale, bias = torch.tensor([12.0], dtype=torch.double), torch.tensor([-3.0], dtype=torch.double)

    def binary(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * image @ text.T + bias
        return F.binary_cross_entropy_with_logits(logits, torch.eye(7, dtype=torch.double), reduction="sum") / 7

    def crossed(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T
        return (F.cross_entropy(logits, torch.arange(7)) + F.cross_entropy(logits.T, torch.arange(7))) / 2

    agree(sigmoid_contrastive, binary, image, text, scale, bias)
    agree(lambda i, t, s: softmax_contrastive(i, t, i, t, s), crossed, image, text, scale)


def test_contrastive_losses_of_two_orthogonal_pairs_by_hand() -> None:
    """Logits are [[s, 0], [0, s]]."""
    eye = torch.eye(2)
    # sigmoid with s = 2, b = -1: two positives at +1, two negatives at -1, all say softplus(-1); over 2 pictures
    found = sigmoid_contrastive(eye, eye, torch.tensor([2.0]), torch.tensor([-1.0]))
    assert found.item() == pytest.approx(4 * math.log(1 + math.exp(-1)) / 2, rel=1e-6)
    # softmax with s = ln 3: the right one has probability 3 / 4 everywhere
    found = softmax_contrastive(eye, eye, eye, eye, torch.tensor([math.log(3)]))
    assert found.item() == pytest.approx(math.log(4 / 3), rel=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_mean_over_shares_is_the_whole_batch(kind: str, parts: int) -> None:
    """Every process has its own rows and all of the others': mean of losses and of gradients is the whole batch's."""
    image, text = unit(8, 6, seed=2).float(), unit(8, 6, seed=3).float()
    scale, bias = torch.tensor([10.0]), torch.tensor([-5.0])

    def share(rank: int, world: int) -> Callable[..., Tensor]:
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)

        def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            if kind == "sigmoid":
                return sigmoid_contrastive(image[rows], text, scale, bias, rows.start)
            return softmax_contrastive(image[rows], text[rows], image, text, scale, rows.start) + 0 * bias.sum()

        return loss

    whole, gradients = with_gradients(share(0, 1), image, text, scale, bias)
    shares = [with_gradients(share(rank, parts), image, text, scale, bias) for rank in range(parts)]
    torch.testing.assert_close(torch.stack([value for value, _ in shares]).mean(), whole, rtol=1e-6, atol=0)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(torch.stack([g[i] for _, g in shares]).mean(0), gradient, rtol=1e-5, atol=1e-6)
    # a wrong offset is another loss
    wrong = torch.stack([with_gradients(share(0, parts), image, text.roll(r, 0), scale, bias)[0] for r in range(parts)])
    assert abs(wrong.mean() - whole) > 1e-3


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("aligned", [True, False])
def test_bf16_embeddings_at_the_largest_temperature_are_computed_in_fp32(kind: str, aligned: bool) -> None:
    image = unit(64, 32, seed=4)
    text = image.flip(0) if not aligned else image
    image16, text16, scale = image.bfloat16(), text.bfloat16(), torch.tensor([100.0])
    bias = torch.tensor([-10.0])
    if kind == "sigmoid":
        inputs, loss = (image16, text16, scale, bias), sigmoid_contrastive
    else:
        inputs, loss = (image16, text16, image16, text16, scale), softmax_contrastive
    value, gradients = with_gradients(loss, *inputs)
    # the same rounded embeddings, in float64, by the stable formula of PyTorch
    logits = scale.double() * image16.double() @ text16.double().T
    if kind == "sigmoid":
        want = F.binary_cross_entropy_with_logits(logits - 10, torch.eye(64, dtype=torch.double), reduction="sum") / 64
    else:
        want = (F.cross_entropy(logits, torch.arange(64)) + F.cross_entropy(logits.T, torch.arange(64))) / 2
    assert value.dtype == torch.float32 and value.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    assert all(g.isfinite().all() for g in gradients)
    # what bf16 logits would have given is off by more than ten times as much as is allowed here
    coarse = (image16 @ text16.T).double() * 100
    assert (coarse - logits).abs().max() > 0.1


# ---------------------------------------------------------------- self-distillation


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 5), seeds)
@quick
def test_distill_is_its_loop(s: int, t: int, batch: int, count: int, same: int, seed: int) -> None:
    student, teacher = normal(s, batch, count, seed=seed), normal(t, batch, count, seed=seed + 1).softmax(-1)
    if s == t == 1 and same:
        with pytest.raises(ValueError, match="no pair of different views"):
            distill(student.float(), teacher.float(), 0.1, same)
        return
    fixed = teacher.float()
    agree(lambda x: distill(x, fixed, 0.5, same), lambda x: distill_loop(x, teacher, 0.5, same), student)


def test_distill_of_two_views_and_two_prototypes_by_hand() -> None:
    """Student log-odds 0 and ln 3 are (1/2, 1/2) and (3/4, 1/4) at temperature 1; teacher: (1, 0) and (1/4, 3/4).

    Cross-entropies, student view by teacher view:
        s0 t0: -ln 1/2 = ln 2                          s0 t1: -(1/4 ln 1/2 + 3/4 ln 1/2) = ln 2
        s1 t0: -ln 3/4 = ln 4 - ln 3                   s1 t1: -(1/4 ln 3/4 + 3/4 ln 1/4) = ln 4 - 1/4 ln 3
    """
    ln2, ln3, ln4 = math.log(2), math.log(3), math.log(4)
    student = torch.tensor([[[0.0, 0.0]], [[ln3, 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0]], [[0.25, 0.75]]])
    s0t0, s0t1, s1t0, s1t1 = ln2, ln2, ln4 - ln3, ln4 - ln3 / 4
    for same, expected in [
        (0, (s0t0 + s0t1 + s1t0 + s1t1) / 4),
        (1, (s0t1 + s1t0 + s1t1) / 3),
        (2, (s0t1 + s1t0) / 2),
    ]:
        assert distill(student, teacher, 1.0, same).item() == pytest.approx(expected, rel=1e-6)
        # a temperature divides the logits
        assert distill(student * 0.1, teacher, 0.1, same).item() == pytest.approx(expected, rel=1e-5)
    # the mean over the batch, not the sum
    again = distill(student.expand(2, 3, 2), teacher.expand(2, 3, 2), 1.0)
    assert again.item() == pytest.approx((s0t0 + s0t1 + s1t0 + s1t1) / 4, rel=1e-6)


def test_distill_is_cross_entropy_with_soft_targets() -> None:
    student, teacher = normal(1, 5, 9, seed=0), normal(1, 5, 9, seed=1).softmax(-1)
    fixed = teacher.float()
    agree(lambda x: distill(x, fixed, 0.1), lambda x: F.cross_entropy(x[0] / 0.1, teacher[0]), student)


def test_a_views_own_teacher_does_not_reach_it() -> None:
    """With two global views that are both student's and teacher's, view 0 learns from teacher 1 only."""
    student, teacher = normal(3, 4, 6, seed=0).float(), normal(2, 4, 6, seed=1).softmax(-1).float()
    other = torch.stack([normal(4, 6, seed=2).softmax(-1).float(), teacher[1]])

    def gradient(targets: Tensor, same: int) -> Tensor:
        return with_gradients(lambda x: distill(x, targets, 0.1, same), student)[1][0]

    assert torch.equal(gradient(teacher, 2)[0], gradient(other, 2)[0])
    assert not torch.allclose(gradient(teacher, 2)[1], gradient(other, 2)[1])
    assert not torch.allclose(gradient(teacher, 0)[0], gradient(other, 0)[0])
    assert not torch.allclose(gradient(teacher, 2)[2], gradient(other, 2)[2])  # a local view learns from both


def test_distill_is_least_where_the_student_says_what_the_teacher_says() -> None:
    teacher = normal(1, 4, 8, seed=0).softmax(-1).float()
    student = teacher.log() * 0.1
    at_best, gradient = with_gradients(lambda x: distill(x, teacher, 0.1), student)
    assert at_best.item() == pytest.approx(entropy(teacher).item(), rel=1e-5)
    assert gradient[0].abs().max() < 1e-6
    assert distill(student + 0.05 * normal(1, 4, 8, seed=1).float(), teacher, 0.1) > at_best


# ---------------------------------------------------------------- teacher


def test_teacher_probs_centre_and_sharpen_by_hand() -> None:
    """(ln 2 + 1, 3) less its centre (1, 3) is (ln 2, 0): at temperature 1/2 it counts twice, 4 to 1."""
    logits, centre = torch.tensor([[math.log(2) + 1, 3.0]]), torch.tensor([1.0, 3.0])
    torch.testing.assert_close(teacher_probs(logits, centre, 0.5), torch.tensor([[0.8, 0.2]]))
    torch.testing.assert_close(teacher_probs(logits, centre, 1.0), torch.tensor([[2 / 3, 1 / 3]]))


def test_no_gradient_reaches_the_teacher() -> None:
    mine, theirs, centre = (normal(*shape, seed=i).float() for i, shape in enumerate([(2, 3, 5), (2, 3, 5), (5,)]))
    mine.requires_grad_(), theirs.requires_grad_()
    probs = teacher_probs(theirs, centre, 0.04)
    assert not probs.requires_grad
    mask = torch.ones(2, 3, dtype=torch.bool)
    (distill(mine, probs, 0.1) + masked_patches(mine, probs, mask, 0.1)).backward()  # type: ignore[no-untyped-call]
    assert theirs.grad is None and mine.grad is not None and mine.grad.abs().max() > 0


def test_teacher_and_student_compute_in_fp32_from_bf16() -> None:
    student, teacher = (normal(2, 3, 512, seed=i).bfloat16() for i in range(2))
    centre = normal(512, seed=2).float() * 0.1
    probs = teacher_probs(teacher, centre, 0.04)
    assert probs.dtype == torch.float32
    exact = ((teacher.double() - centre.double()) / 0.04).softmax(-1)
    torch.testing.assert_close(probs.double(), exact, rtol=1e-4, atol=1e-7)
    found, wanted = distill(student, probs, 0.1), distill_loop(student.double(), exact, 0.1)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(wanted.item(), rel=1e-5)
    patches = masked_patches(student, probs, torch.ones(2, 3, dtype=torch.bool), 0.1)
    wanted = masked_loop(student.double(), exact, torch.ones(2, 3), 0.1, "all")
    assert patches.dtype == torch.float32 and patches.item() == pytest.approx(wanted.item(), rel=1e-5)


# ---------------------------------------------------------------- masked patches


@given(sizes, st.integers(1, 9), st.integers(1, 6), st.sampled_from(["masked", "all"]), seeds)
@quick
def test_masked_patches_are_their_loop(batch: int, n: int, count: int, form: str, seed: int) -> None:
    student, teacher = normal(batch, n, count, seed=seed), normal(batch, n, count, seed=seed + 1).softmax(-1)
    mask = normal(batch, n, seed=seed + 2) > 0
    fixed = teacher.float()
    agree(
        lambda x: masked_patches(x, fixed, mask, 0.5, form),  # type: ignore[arg-type]
        lambda x: masked_loop(x, teacher, mask, 0.5, form),
        student,
    )


def test_which_patches_count_and_how_much() -> None:
    """Two pictures, three patches, two prototypes: a right answer costs ln 5 - ln 4, a wrong one ln 5."""
    right, wrong = math.log(5 / 4), math.log(5)
    log_odds = torch.tensor([[math.log(4), 0.0]])
    answers = torch.tensor([[1, 0, 0], [0, 1, 1]])  # 1: the student is right
    student = torch.where(answers[..., None].bool(), log_odds, log_odds.flip(-1))
    teacher = torch.tensor([1.0, 0.0]).expand(2, 3, 2)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    # hidden: picture 0 has one right, picture 1 a wrong and a right; each picture weighs the same
    expected = (right + (wrong + right) / 2) / 2
    assert masked_patches(student, teacher, mask, 1.0).item() == pytest.approx(expected, rel=1e-6)
    # all: 1 right and 2 wrong, 2 right and 1 wrong, whatever the mask
    for hidden in (mask, ~mask):
        found = masked_patches(student, teacher, hidden, 1.0, "all").item()
        assert found == pytest.approx((3 * right + 3 * wrong) / 6, rel=1e-6)


def test_visible_patches_get_no_gradient_and_pictures_without_hidden_ones_cost_nothing() -> None:
    student, teacher = normal(3, 4, 5, seed=0).float(), normal(3, 4, 5, seed=1).softmax(-1).float()
    mask = torch.tensor([[True, False, False, True], [False] * 4, [True] * 4])
    value, (gradient,) = with_gradients(lambda x: masked_patches(x, teacher, mask, 0.1), student)
    assert (gradient[~mask] == 0).all() and (gradient[mask].abs().sum(-1) > 0).all() and value.isfinite()
    only = masked_patches(student[[0, 2]], teacher[[0, 2]], mask[[0, 2]], 0.1)
    assert value.item() == pytest.approx(only.item() * 2 / 3, rel=1e-5)
    assert masked_patches(student, teacher, torch.zeros_like(mask), 0.1).item() == 0


# ---------------------------------------------------------------- entropy


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ([[0.25] * 4], math.log(4)),
        ([[1.0, 0.0, 0.0, 0.0]], 0.0),
        ([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], math.log(2) / 2),
        ([[0.75, 0.25]], math.log(4) - 0.75 * math.log(3)),
    ],
)
def test_entropy_by_hand(probs: Sequence[Sequence[float]], expected: float) -> None:
    assert entropy(torch.tensor(probs)).item() == pytest.approx(expected, abs=1e-6)


@given(sizes, st.integers(2, 40), seeds)
@quick
def test_entropy_lies_between_collapse_and_uniform(batch: int, count: int, seed: int) -> None:
    probs = teacher_probs(normal(batch, count, seed=seed), torch.zeros(count), 0.04)
    found = entropy(probs).item()
    assert -1e-6 <= found <= math.log(count) + 1e-5
    assert found == pytest.approx(torch.distributions.Categorical(probs.double()).entropy().mean().item(), abs=1e-4)
