"""Every objective against the loop of its docstring, against second formulas, and against numbers worked out by hand.

Gives: values and gradients at any tile size, sharded rows, skipped views, entropy, stopped gradients, precision.
Used by: pytest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from silc import losses
from silc.losses import Distilled, Target, distill, sigmoid_contrastive, softmax_contrastive

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**20)
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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
            got.double(), want, rtol=tolerance, atol=tolerance * max(want.abs().max().item(), 0.5)
        )


# ---------------------------------------------------------------- loops, word for word as in the docstrings


def sigmoid_loop(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    loss = torch.zeros((), dtype=torch.double)
    for i in range(len(image)):
        for j in range(len(text)):
            sign = +1 if j == offset + i else -1
            loss = loss - torch.log(torch.sigmoid(sign * (scale[0] * image[i] @ text[j] + bias[0]))) / len(image)
    return loss


def softmax_loop(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    loss = torch.zeros((), dtype=torch.double)
    for i in range(len(image)):
        for row, columns in ((image[i], text), (text[i], image)):
            logits = scale[0] * columns @ row
            loss = loss + (torch.log(torch.exp(logits).sum()) - logits[i]) / (2 * len(image))
    return loss


def distill_loop(student: Tensor, teacher: Tensor, temp: float, same_view: int = 0) -> Tensor:
    """Of student logits and teacher probabilities."""
    pairs = []
    for s in range(len(student)):
        for t in range(len(teacher)):
            if not (s == t and s < same_view):
                probs = torch.exp(student[s] / temp) / torch.exp(student[s] / temp).sum(-1, keepdim=True)
                pairs.append(-(teacher[t] * torch.log(probs)).sum(-1).mean())
    return torch.stack(pairs).mean()


@pytest.fixture(params=[None, 3], ids=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as they are, and so small that every batch needs many, of uneven sizes."""
    if request.param:
        monkeypatch.setattr(losses, "SIDE", request.param)
        monkeypatch.setattr(losses, "BLOCK", 240)
        monkeypatch.setattr(losses, "CACHED", 25)


# ---------------------------------------------------------------- contrastive


@pytest.mark.usefixtures("tiles")
@given(sizes, sizes, st.integers(1, 8), st.integers(0, 9), seeds)
@quick
def test_sigmoid_is_its_loop(batch: int, others: int, width: int, before: int, seed: int) -> None:
    """With `before` texts of lower, and `others` of higher processes."""
    image, text = unit(batch, width, seed=seed), unit(before + batch + others, width, seed=seed + 1)
    scale, bias = torch.tensor([9.0], dtype=torch.double), torch.tensor([-4.0], dtype=torch.double)
    agree(lambda *a: sigmoid_contrastive(*a, before), lambda *a: sigmoid_loop(*a, before), image, text, scale, bias)


@pytest.mark.usefixtures("tiles")
@given(st.integers(1, 10), st.integers(1, 8), seeds)
@quick
def test_softmax_is_its_loop(batch: int, width: int, seed: int) -> None:
    image, text = (unit(batch, width, seed=seed + i) for i in range(2))
    agree(softmax_contrastive, softmax_loop, image, text, torch.tensor([14.0], dtype=torch.double))


@pytest.mark.usefixtures("tiles")
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
    agree(softmax_contrastive, crossed, image, text, scale)


def test_contrastive_losses_of_two_orthogonal_pairs_by_hand() -> None:
    """Logits are [[s, 0], [0, s]]."""
    eye = torch.eye(2)
    # sigmoid with s = 2, b = -1: two positives at +1, two negatives at -1, all say softplus(-1); over 2 pictures
    found = sigmoid_contrastive(eye, eye, torch.tensor([2.0]), torch.tensor([-1.0]))
    assert found.item() == pytest.approx(4 * math.log(1 + math.exp(-1)) / 2, rel=1e-6)
    # softmax with s = ln 3: the right one has probability 3 / 4 everywhere
    found = softmax_contrastive(eye, eye, torch.tensor([math.log(3)]))
    assert found.item() == pytest.approx(math.log(4 / 3), rel=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_mean_over_shares_is_the_whole_batch(kind: str, parts: int) -> None:
    """Every process has its own rows and all of the others': mean of losses and of gradients is the whole batch's."""
    image, text = unit(8, 6, seed=2).float(), unit(8, 6, seed=3).float()
    scale, bias = torch.tensor([10.0]), torch.tensor([-5.0])

    of_all = (scale * image @ text.T).logsumexp(0)

    def share(rank: int, world: int) -> Callable[..., Tensor]:
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)

        def over_processes(lse: Tensor) -> Tensor:
            torch.testing.assert_close(lse, (scale * image[rows] @ text.T).logsumexp(0))
            return of_all

        def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            if kind == "sigmoid":
                return sigmoid_contrastive(image[rows], text, scale, bias, rows.start)
            return softmax_contrastive(image[rows], text, scale, rows.start, over_processes) + 0 * bias.sum()

        return loss

    whole, gradients = with_gradients(share(0, 1), image, text, scale, bias)
    shares = [with_gradients(share(rank, parts), image, text, scale, bias) for rank in range(parts)]
    torch.testing.assert_close(torch.stack([value for value, _ in shares]).mean(), whole, rtol=1e-6, atol=0)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(torch.stack([g[i] for _, g in shares]).mean(0), gradient, rtol=1e-5, atol=1e-6)
    # a wrong offset is another loss
    rows = slice(0, 8 // parts)
    if kind == "sigmoid":
        assert abs(sigmoid_contrastive(image[rows], text, scale, bias, 1) - shares[0][0]) > 1e-3
    else:
        assert abs(softmax_contrastive(image[rows], text, scale, 1, lambda _: of_all) - shares[0][0]) > 1e-3


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
        inputs, loss = (image16, text16, scale), softmax_contrastive
    value, gradients = with_gradients(loss, *inputs)
    # the same rounded embeddings, in float64, by the stable formula of PyTorch
    logits = scale.double() * image16.double() @ text16.double().T
    if kind == "sigmoid":
        want = F.binary_cross_entropy_with_logits(logits - 10, torch.eye(64, dtype=torch.double), reduction="sum") / 64
    else:
        want = (F.cross_entropy(logits, torch.arange(64)) + F.cross_entropy(logits.T, torch.arange(64))) / 2
    assert value.dtype == torch.float32 and value.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    assert all(g.isfinite().all() for g in gradients)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*inputs), value)
    # what bf16 logits would have given is off by more than ten times as much as is allowed here
    coarse = (image16 @ text16.T).double() * 100
    assert (coarse - logits).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_pictures_like_no_text_at_the_largest_temperature_have_a_finite_loss(kind: str) -> None:
    """Every cosine is near -1: exp(100 * cosine) is zero in fp32, and so would be a sum that is not shifted."""
    image = F.normalize(torch.eye(6)[:4] * 0.01 + torch.tensor([1.0, 0, 0, 0, 0, 0]), dim=-1)
    text, scale = -image.flip(0), torch.tensor([100.0], requires_grad=True)
    found = (
        softmax_contrastive(image, text, scale)
        if kind == "softmax"
        else sigmoid_contrastive(image, text, scale, torch.tensor([-10.0]))
    )
    logits = 100 * image.double() @ text.double().T
    if kind == "softmax":
        want = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    else:
        want = F.binary_cross_entropy_with_logits(logits - 10, torch.eye(4, dtype=torch.double), reduction="sum") / 4
    assert found.item() == pytest.approx(want.item(), rel=1e-4)
    assert torch.autograd.grad(found, scale)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_no_matrix_of_logits_is_ever_held(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that PyTorch makes on the way forth and back, by its size."""
    monkeypatch.setattr(losses, "SIDE", 16)
    image, text = (unit(128, 4, seed=i).float().requires_grad_() for i in range(2))
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-5.0], requires_grad=True)
    with Largest() as seen:
        loss = (
            sigmoid_contrastive(image, text, scale, bias)
            if kind == "sigmoid"
            else softmax_contrastive(image, text, scale)
        )
        loss.backward()  # type: ignore[no-untyped-call]
    assert seen.largest == 128 * 4  # an embedding, or its gradient; a matrix of logits has 128 * 128


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


# ---------------------------------------------------------------- self-distillation


def said(probs: Tensor) -> Target:
    """A teacher that gives these distributions [T, B, K]: its features are their logarithms, prototypes the axes."""
    count = probs.shape[-1]
    return Target(probs.log().float(), torch.eye(count), torch.zeros(count), 1.0)


def distilled(logits: Tensor, probs: Tensor, temp: float, same_view: int = 0) -> Distilled:
    """With features that are the logits, and the axes for prototypes."""
    return distill(logits, torch.eye(logits.shape[-1]), said(probs), temp, same_view)


@pytest.mark.usefixtures("tiles")
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 5), seeds)
@quick
def test_distill_is_its_loop(s: int, t: int, batch: int, count: int, same: int, seed: int) -> None:
    """From unit features and prototypes on both sides, with a centre, to the student's features and prototypes."""
    student, teacher = unit(s, batch, 3, seed=seed), unit(t, batch, 3, seed=seed + 1)
    mine, theirs, centre = unit(count, 3, seed=seed + 2), unit(count, 3, seed=seed + 3), normal(count, seed=seed + 4)
    target = Target(teacher.float(), theirs.float(), centre.float(), 0.5)
    if s == t == 1 and same:
        with pytest.raises(ValueError, match="no pair of different views"):
            distill(student.float(), mine.float(), target, 0.1, same)
        return
    probs = ((teacher @ theirs.T - centre) / 0.5).softmax(-1)
    agree(
        lambda x, w: distill(x, w, target, 0.2, same).loss,
        lambda x, w: distill_loop(x @ w.T, probs, 0.2, same),
        student,
        mine,
    )
    found = distill(student.float(), mine.float(), target, 0.2, same)
    entropy = torch.distributions.Categorical(probs).entropy().mean()
    assert found.entropy.item() == pytest.approx(entropy.item(), abs=1e-5)
    assert found.use.item() == pytest.approx(len(set(probs.argmax(-1).flatten().tolist())) / min(t * batch, count))


def test_distill_of_two_views_and_two_prototypes_by_hand() -> None:
    """Student log-odds 0 and ln 3 are (1/2, 1/2) and (3/4, 1/4) at temperature 1; teacher: (1, 0) and (1/4, 3/4).

    Cross-entropies, student view by teacher view:
        s0 t0: -ln 1/2 = ln 2                          s0 t1: -(1/4 ln 1/2 + 3/4 ln 1/2) = ln 2
        s1 t0: -ln 3/4 = ln 4 - ln 3                   s1 t1: -(1/4 ln 3/4 + 3/4 ln 1/4) = ln 4 - 1/4 ln 3
    """
    ln2, ln3, ln4 = math.log(2), math.log(3), math.log(4)
    student = torch.tensor([[[0.0, 0.0]], [[ln3, 0.0]]])
    teacher = torch.tensor([[[1.0, 1e-30]], [[0.25, 0.75]]])
    s0t0, s0t1, s1t0, s1t1 = ln2, ln2, ln4 - ln3, ln4 - ln3 / 4
    for same, expected in [
        (0, (s0t0 + s0t1 + s1t0 + s1t1) / 4),
        (1, (s0t1 + s1t0 + s1t1) / 3),
        (2, (s0t1 + s1t0) / 2),
    ]:
        assert distilled(student, teacher, 1.0, same).loss.item() == pytest.approx(expected, rel=1e-6)
        # a temperature divides the logits
        assert distilled(student * 0.1, teacher, 0.1, same).loss.item() == pytest.approx(expected, rel=1e-5)
    # the mean over the batch, not the sum
    again = distilled(student.expand(2, 3, 2), teacher.expand(2, 3, 2), 1.0)
    assert again.loss.item() == pytest.approx((s0t0 + s0t1 + s1t0 + s1t1) / 4, rel=1e-6)


def test_distill_is_cross_entropy_with_soft_targets() -> None:
    student, teacher = normal(1, 5, 9, seed=0), normal(1, 5, 9, seed=1).softmax(-1)
    agree(lambda x: distilled(x, teacher, 0.1).loss, lambda x: F.cross_entropy(x[0] / 0.1, teacher[0]), student)


def test_a_views_own_teacher_does_not_reach_it() -> None:
    """With two global views that are both student's and teacher's, view 0 learns from teacher 1 only."""
    student, teacher = normal(3, 4, 6, seed=0).float(), normal(2, 4, 6, seed=1).softmax(-1).float()
    other = torch.stack([normal(4, 6, seed=2).softmax(-1).float(), teacher[1]])

    def gradient(targets: Tensor, same: int) -> Tensor:
        return with_gradients(lambda x: distilled(x, targets, 0.1, same).loss, student)[1][0]

    torch.testing.assert_close(gradient(teacher, 2)[0], gradient(other, 2)[0], rtol=0, atol=1e-7)
    assert not torch.allclose(gradient(teacher, 2)[1], gradient(other, 2)[1])
    assert not torch.allclose(gradient(teacher, 0)[0], gradient(other, 0)[0])
    assert not torch.allclose(gradient(teacher, 2)[2], gradient(other, 2)[2])  # a local view learns from both


def test_distill_is_least_where_the_student_says_what_the_teacher_says() -> None:
    teacher = normal(1, 4, 8, seed=0).softmax(-1).float()
    student = teacher.log() * 0.1
    at_best, gradient = with_gradients(lambda x: distilled(x, teacher, 0.1).loss, student)
    assert at_best.item() == pytest.approx(distilled(student, teacher, 0.1).entropy.item(), rel=1e-5)
    assert gradient[0].abs().max() < 1e-6
    assert distilled(student + 0.05 * normal(1, 4, 8, seed=1).float(), teacher, 0.1).loss > at_best


@pytest.mark.usefixtures("tiles")
def test_with_bf16_products_the_loss_and_its_gradient_are_nearly_the_same() -> None:
    """Twenty pictures, so that the gradient of the prototypes is added up over blocks."""
    student, teacher = unit(4, 20, 32, seed=0).float(), unit(2, 20, 32, seed=1).float()
    mine, theirs = unit(24, 32, seed=2).float(), unit(24, 32, seed=3).float()
    target = Target(teacher, theirs, torch.zeros(24), 0.1)

    def loss(products: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: distill(x, w, target, 0.1, 2, products).loss

    exact, wanted = with_gradients(loss(torch.float32), student, mine)
    coarse, found = with_gradients(loss(torch.bfloat16), student, mine)
    assert coarse.item() == pytest.approx(exact.item(), rel=2e-3)
    for a, b in zip(found, wanted):
        assert a.dtype == torch.float32 and 0 < (a - b).norm() / b.norm() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("same", [0, 2])
def test_the_compiled_form_is_the_same_loss(same: int) -> None:
    student, teacher = unit(4, 6, 8, seed=0).float(), unit(2, 6, 8, seed=1).float()
    mine, target = unit(40, 8, seed=2).float(), Target(teacher, unit(40, 8, seed=3).float(), torch.zeros(40), 0.04)
    plain, wanted = with_gradients(lambda x, w: distill(x, w, target, 0.1, same).loss, student, mine)
    fused, found = with_gradients(lambda x, w: distill(x, w, target, 0.1, same, compiled=True).loss, student, mine)
    torch.testing.assert_close(fused, plain)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_not_all_logits_are_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "BLOCK", 4 * 2 * 12 * 512)
    monkeypatch.setattr(losses, "CACHED", 12 * 512)
    student, teacher = unit(10, 32, 4, seed=0).float().requires_grad_(), unit(2, 32, 4, seed=1).float()
    mine = unit(512, 4, seed=2).float().requires_grad_()
    with Largest() as seen:
        target = Target(teacher, unit(512, 4, seed=3).float(), torch.zeros(512), 0.04)
        distill(student, mine, target, 0.1).loss.backward()  # type: ignore[no-untyped-call]
    assert seen.largest == 2 * 12 * 512  # of two pictures; of all 32 it would be 196,608


# ---------------------------------------------------------------- teacher


def test_the_teacher_is_centred_and_sharpened_by_hand() -> None:
    """(ln 2 + 1, 3) less its centre (1, 3) is (ln 2, 0): at temperature 1/2 it counts twice, 4 to 1; an undecided
    student pays ln 2 whatever the teacher says, one that gives the first 3/4 pays 0.8 ln 4/3 + 0.2 ln 4."""
    centre = torch.tensor([1.0, 3.0])
    target = Target(torch.tensor([[[math.log(2) + 1, 3.0]]]), torch.eye(2), centre, 0.5)
    found = distill(torch.tensor([[[math.log(3), 0.0]]]), torch.eye(2), target, 1.0)
    assert found.loss.item() == pytest.approx(0.8 * math.log(4 / 3) + 0.2 * math.log(4), rel=1e-6)
    assert found.entropy.item() == pytest.approx(0.8 * math.log(1 / 0.8) + 0.2 * math.log(5), rel=1e-6)
    target = target._replace(temp=1.0)
    found = distill(torch.tensor([[[math.log(3), 0.0]]]), torch.eye(2), target, 1.0)
    assert found.loss.item() == pytest.approx(2 / 3 * math.log(4 / 3) + math.log(4) / 3, rel=1e-6)


def test_no_gradient_reaches_the_teacher() -> None:
    mine, theirs, prototypes = (normal(2, 3, 5, seed=i).float().requires_grad_() for i in range(3))
    target = Target(theirs, prototypes[0], torch.zeros(3), 0.04)
    found = distill(mine, normal(3, 5, seed=4).float(), target, 0.1)
    assert not found.entropy.requires_grad and not found.use.requires_grad
    found.loss.backward()  # type: ignore[no-untyped-call]
    assert theirs.grad is None and prototypes.grad is None
    assert mine.grad is not None and mine.grad.abs().max() > 0


def test_teacher_and_student_compute_in_fp32_also_amid_autocast() -> None:
    student, teacher = (unit(2, 3, 64, seed=i).bfloat16() for i in range(2))
    mine, theirs = unit(512, 64, seed=2).float(), unit(512, 64, seed=3).float()
    target = Target(teacher.float(), theirs, normal(512, seed=2).float() * 0.1, 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        found = distill(student, mine, target, 0.1)
    logits = teacher.double() @ theirs.double().T - target.centre.double()
    wanted = distill_loop(student.double() @ mine.double().T, (logits / 0.04).softmax(-1), 0.1)
    assert found.loss.dtype == torch.float32 and found.loss.item() == pytest.approx(wanted.item(), rel=1e-5)


# ---------------------------------------------------------------- entropy and use


@pytest.mark.parametrize(
    ("probs", "entropy", "use"),
    [
        ([[0.25] * 4], math.log(4), 1.0),
        ([[1.0, 1e-30, 1e-30, 1e-30]], 0.0, 1.0),
        ([[0.5, 0.5, 1e-30, 1e-30], [1.0, 1e-30, 1e-30, 1e-30]], math.log(2) / 2, 0.5),
        ([[0.75, 0.25], [0.25, 0.75], [0.25, 0.75]], math.log(4) - 0.75 * math.log(3), 1.0),
    ],
)
def test_entropy_and_use_of_prototypes_by_hand(probs: list[list[float]], entropy: float, use: float) -> None:
    teacher = torch.tensor(probs)[None]
    found = distilled(torch.zeros_like(teacher), teacher, 1.0)
    assert found.entropy.item() == pytest.approx(entropy, abs=1e-6)
    assert found.use.item() == pytest.approx(use)


@given(sizes, st.integers(2, 40), seeds)
@quick
def test_entropy_lies_between_collapse_and_uniform(batch: int, count: int, seed: int) -> None:
    logits = normal(1, batch, count, seed=seed).float()
    target = Target(logits, torch.eye(count), torch.zeros(count), 0.04)
    found = distill(logits, torch.eye(count), target, 0.1).entropy.item()
    assert -1e-6 <= found <= math.log(count) + 1e-5
