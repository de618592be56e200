"""Contrastive losses beside open_clip's, forward and backward: `python benchmarks/contrastive.py`.

Gives: benchmarks/results/contrastive.json: seconds (one thread on one core, in turns) and added memory (a process each)
of silc's softmax and sigmoid losses, open_clip's ClipLoss and SigLipLoss, and its newest chunked SigLipLoss from a git
checkout; dim 512, fp32. Values and gradients are compared in the same run.
Used by: pages.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Measured, alone, arguments, check, have, interleave, matmul_peak, pin, ratio, target, timed, write
from torch import Tensor

from silc import losses

WHY: dict[str, str] = {}
CHUNKED = "open_clip_git/src/open_clip/loss.py"
PRODUCTS = {
    "softmax silc": 4,
    "softmax open_clip": 6,
    "sigmoid silc": 3,
    "sigmoid open_clip": 3,
    "sigmoid open_clip chunked": 3,
}
"""Matrix products of B x B x dim in each: silc makes softmax's logits twice, open_clip once for either direction."""
BOUNDS = {
    "softmax open_clip": (1 / 15, 1.5),
    "sigmoid open_clip": (1 / 12, 1.4),
    "sigmoid open_clip chunked": (1 / 3, 1.0),
}
"""Memory at most this share, speed at least this ratio."""
EQUAL = 2e-5

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def loss_of(case: str) -> Loss | None:
    """The loss as a function of image, text, scale [1] and bias [1]; None when its owner is not here."""
    if case == "softmax silc":
        return lambda i, t, s, b: losses.softmax_contrastive(i, t, s)
    if case == "sigmoid silc":
        return losses.sigmoid_contrastive
    found = have(CHUNKED if case.endswith("chunked") else "open_clip.loss")
    if found is None:
        return None
    if case == "softmax open_clip":
        clip = found[0].ClipLoss()
        return lambda i, t, s, b: clip(i, t, s[0])
    siglip = found[0].SigLipLoss(chunk_size=1024) if case.endswith("chunked") else found[0].SigLipLoss()
    return lambda i, t, s, b: siglip(i, t, s[0], b[0])


def given(batch: int, dim: int, sigmoid: bool) -> list[Tensor]:
    """Image and text embeddings, scale and bias at their initial values, all asking for gradients."""
    generator = torch.Generator().manual_seed(0)
    pair = [F.normalize(torch.randn(batch, dim, generator=generator), dim=-1) for _ in range(2)]
    inputs = [*pair, torch.tensor([10.0 if sigmoid else 1 / 0.07]), torch.tensor([-10.0])]
    return [x.requires_grad_() for x in inputs]


def step(loss: Loss, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients; the gradients are taken off the inputs again."""
    value = loss(inputs[0], inputs[1], inputs[2], inputs[3])
    value.backward()
    gradients = [x.grad for x in inputs if x.grad is not None]
    for x in inputs:
        x.grad = None
    return value.detach(), gradients


def memory(case: str, batch: int, dim: int) -> dict[str, float]:
    loss = loss_of(case)
    assert loss is not None
    step(loss, given(64, dim, "sigmoid" in case))
    inputs = given(batch, dim, "sigmoid" in case)
    with Measured() as measured:
        step(loss, inputs)
    return {"above_bytes": measured.above, "once_seconds": measured.seconds}


def compare(cases: dict[str, Loss], batch: int, dim: int) -> list[dict[str, object]]:
    checks = []
    for kind in ("softmax", "sigmoid"):
        value, gradients = step(cases[f"{kind} silc"], given(batch, dim, kind == "sigmoid"))
        for name in (n for n in cases if n.startswith(kind) and not n.endswith("silc")):
            other, expected = step(cases[name], given(batch, dim, kind == "sigmoid"))
            checks.append(check(f"{name}, batch {batch}: value", value, other, EQUAL))
            for what, mine, theirs in zip(("image", "text", "scale", "bias"), gradients, expected):
                checks.append(check(f"{name}, batch {batch}: gradient of {what}", mine, theirs, EQUAL))
    return checks


def main() -> None:
    args = arguments(__doc__, batch=[4096, 16384], dim=512)
    pin(1, args.quick)
    if args.case:
        name, _, batch = args.case.rpartition(" ")
        print(json.dumps(memory(name, int(batch), args.dim)))
        return
    batches = [1024] if args.quick else args.batch
    cases = {name: loss for name in PRODUCTS if (loss := loss_of(name)) is not None}
    peak = matmul_peak(torch.float32)["best"]
    rows, targets, checks = [], [], []
    for batch in batches:
        checks += compare(cases, batch, args.dim)
        runs = {}
        for name, loss in cases.items():
            inputs = given(batch, args.dim, "sigmoid" in name)
            runs[name] = lambda loss=loss, inputs=inputs: step(loss, inputs)
        seconds = interleave(runs, args.rounds, warm=0)  # the comparison has warmed them
        above = {}
        for name, s in seconds.items():
            above[name] = alone(__file__, f"{name} {batch}", args.quick, "--dim", str(args.dim))["above_bytes"]
            work = PRODUCTS[name] * 2.0 * batch**2 * args.dim
            mine = f"{name.split()[0]} silc"
            against = {"silc_speedup": ratio(s, seconds[mine]), "silc_memory_share": above[mine] / above[name]}
            rows.append({**timed(name, s, work, peak, batch=batch), "above_bytes": above[name], **against})
            if name in BOUNDS and batch == max(batches):
                share, speed = BOUNDS[name]
                what = f"{name.split()[0]} contrastive, batch {batch:,}"
                targets.append(target(f"{what}: speed", name, against["silc_speedup"], least=speed))
                targets.append(target(f"{what}: added memory", name, against["silc_memory_share"], most=share))
    write(args.out, "contrastive", rows, targets, checks, rounds=args.rounds, dim=args.dim)


if __name__ == "__main__":
    main()
