"""How far `silc plan` is from what training really does: `python benchmarks/plan_check.py`.

Gives: a row for each small model (kind x shape x precision x recomputation): FLOPs counted by PyTorch's own counter on
a real step, bytes of weights and optimiser, bytes alive when the backward pass begins, and the most alive in the step,
each as predicted over measured; seconds to make a pair ready; plan_check.json with the errors. With
`--table docs/planning.md` nothing is measured: the tables of that page are made anew.
Used by: docs/planning.md and silc.app.planning, which state these errors.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from silc import recipes
from silc.app import planning
from silc.config import Config, PrototypeConfig
from silc.data.loader import batches
from silc.data.pairs import Mixture, open_source
from silc.data.tokenizer import byte_tokenizer
from silc.model import layers
from silc.parallel import World
from silc.plan import flops_per_sample, machines
from silc.plan.memory import memory, stored, weights
from silc.train.loop import build

KINDS = ("clip", "silc", "siglip2-style", "tips-style")
SHAPES = ((64, 2, "map", "none"), (128, 4, "mean", "linear"), (192, 6, "cls", "linear"), (256, 3, "map", "none"))
"""Width, depth, pooling and projection of both towers."""
PICTURES = 32
STAYS = ("weights, fp32", "AdamW moments, fp32", "teacher, fp32")


class Alive(TorchDispatchMode):
    """Bytes of tensors that an operator made and that still live, `now` and at the `peak`."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {id_of(t): 0 for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id_of(t) not in self.sizes:
                storage = t.untyped_storage()
                self.sizes[id_of(t)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, id_of(t))
        return out

    def freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def id_of(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def small(kind: str, shape: tuple[int, int, str, str], pairs: int, **train: Any) -> Config:
    """A recipe with small towers and prototypes, and every term on from the first step."""
    recipe, (width, depth, pool, proj) = recipes.get(kind), shape
    towers: dict[str, Any] = {"width": width, "depth": depth, "heads": 4, "mlp": 4 * width}
    m, o, v = recipe.model, recipe.objective, recipe.views
    image = replace(m.image, image_size=64, patch=8, pool=pool, proj=proj, **towers)  # type: ignore[arg-type]
    model = replace(m, image=image, text=replace(m.text, vocab=384, length=32, **towers), embed_dim=width)
    objective = replace(
        o,
        distill=replace(o.distill, start=0.0),
        masked=replace(o.masked, start=0.0),
        prototypes=PrototypeConfig(count=1024, hidden=128, bottleneck=64),
    )
    return replace(
        recipe,
        model=replace(model, preprocess=replace(m.preprocess, size=64)),
        objective=objective,
        views=replace(v, global_size=64, local_size=32, photometric="none"),
        train=replace(recipe.train, batch=pairs, samples=100 * pairs, device="cpu", **train),
    )


def batch_of(config: Config) -> dict[str, Any]:
    v, n = config.views, config.train.batch
    pixels = {"globals": (v.globals, v.global_size), "locals": (v.locals, v.local_size)}
    found = {k: torch.zeros(c, n, 3, s, s, dtype=torch.uint8) for k, (c, s) in pixels.items() if c}
    if config.objective.contrast_views != "global":
        s = config.model.preprocess.size
        found["image"] = torch.zeros(n, 3, s, s, dtype=torch.uint8)
    return found | {"tokens": torch.zeros(n, config.model.text.length, dtype=torch.long)}


def counted_flops(config: Config) -> float:
    """Of a real step; attention as plain products, because the counter does not know the CPU's fused kernel."""
    task, _ = build(config, World(0, 1, torch.device("cpu")))
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        task.forward_backward(batch_of(config), 0)
    return float(counter.get_total_flops())


def measured_bytes(config: Config) -> dict[str, float]:
    """Of a real step: what stays between steps, what is alive when the backward pass begins, the most of all."""
    task, optimizer = build(config, World(0, 1, torch.device("cpu")))
    batch, starts = batch_of(config), []
    known = [*task.parameters(), *task.buffers(), *(x for x in batch.values())]
    with fused_attention(), Alive(known) as alive, noted(lambda: starts.append(alive.now)):
        task.forward_backward(batch, 0)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.numel() > 1 or x.ndim]
    stays = sum(x.numel() * x.element_size() for x in [*task.parameters(), *moments])
    pixels = sum(x.nbytes for x in batch.values())
    return {"stays": stays, "begins": starts[-1] + pixels, "peak": alive.peak + pixels}


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within it attention is the fused kernel, as on a GPU, also in bf16 on a CPU."""
    plain = layers.attend
    layers.attend = lambda q, k, v, causal=False: scaled_dot_product_attention(q, k, v, is_causal=causal)
    yield
    layers.attend = plain


class noted:
    """Within it, something is called whenever a backward pass begins."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def __enter__(self) -> None:
        self.plain = plain = Tensor.backward

        def backward(x: Tensor, *args: Any, **kwargs: Any) -> None:
            self.call()
            plain(x, *args, **kwargs)

        Tensor.backward = backward  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Tensor.backward = self.plain  # type: ignore[method-assign]


def row(kind: str, shape: tuple[int, int, str, str], pairs: int, **train: Any) -> dict[str, Any]:
    config = small(kind, shape, pairs, **train)
    parts, measured = memory(config, 1, "cpu"), measured_bytes(config)
    kept = [*stored(config, "cpu"), "gathered embeddings", "prototype vectors", "pixels and token ids"]
    begins = sum(parts.get(name, 0.0) for name in kept)
    if config.train.precision == "bf16":
        w = weights(config)  # with recomputation the copies of the blocks' weights are gone by then
        begins += 2 * (w.cast_rest if config.train.checkpoint_blocks else w.cast)
    stays = sum(parts.get(name, 0.0) for name in STAYS)
    found = {
        "case": f"{kind} {'x'.join(map(str, shape[:2]))} {shape[2]} " + " ".join(f"{k}={v}" for k, v in train.items()),
        "stays_bytes": measured["stays"],
        "begins_bytes": measured["begins"],
        "peak_bytes": measured["peak"],
        "stays": stays / measured["stays"],
        "peak": (sum(parts.values()) - stays) / measured["peak"],
    }
    if config.train.accumulate == 1:
        found["begins"] = begins / measured["begins"]
    if train == {"precision": "fp32"}:
        found["flops"] = flops_per_sample(config).total * pairs / counted_flops(config)
    return found


def pictures(rounds: int) -> list[dict[str, Any]]:
    """Seconds of one core to make a pair ready (read, decode a 500 x 375 JPEG, cut uint8 views, tokenise), beside the
    plan's formula."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(PICTURES):
            coarse = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(Path(folder, f"{i}.jpg"), quality=75)
        lines = [json.dumps({"image": f"{i}.jpg", "caption": "a picture"}) for i in range(PICTURES)]
        Path(folder, "captions.jsonl").write_text("\n".join(lines))
        return [picture_row(name, folder, rounds) for name in ("clip", "views-only", "silc", "tips-style")]


def picture_row(name: str, folder: str, rounds: int) -> dict[str, Any]:
    config = recipes.get(name)
    data = replace(config.data, sources=(folder,), workers=0)
    config = replace(config, data=data, train=replace(config.train, batch=PICTURES))
    mixture = Mixture([open_source(folder, data)], (), 0)
    stream = batches(config, mixture, byte_tokenizer(64), 0, 0, 1)
    seconds = harness.interleave({name: lambda: next(stream)}, rounds)[name]
    stream.close()
    took = statistics.median(seconds) / PICTURES
    return {"case": f"picture, {name}", "median_seconds": took, "picture": machines.picture_seconds(config) / took}


def errors(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and largest |predicted / measured - 1| of each quantity."""
    found = {}
    for what in ("flops", "stays", "begins", "peak", "picture"):
        off = [abs(r[what] - 1) for r in rows if what in r]
        if off:
            found[what] = {"median": statistics.median(off), "worst": max(off), "cases": len(off)}
    return found


def write_tables(path: Path) -> None:
    """Put the plan's tables between the markers of a page."""
    text = path.read_text()
    tables = {"sizes": planning.sizes(), "table": planning.table(), "errors": planning.errors()}
    for name, made in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        _, _, after = rest.partition(f"<!-- end of {name} -->")
        text = f"{before}<!-- {name} -->\n{made}\n<!-- end of {name} -->{after}"
    path.write_text(text)


def main() -> None:
    args = harness.arguments(__doc__, table="")
    if args.table:
        write_tables(Path(args.table))
        return
    harness.pin(1, args.quick)
    shapes = SHAPES[:1] if args.quick else SHAPES
    rows = []
    for kind in KINDS[:2] if args.quick else KINDS:
        for shape in shapes:
            for precision in ("fp32", "bf16"):
                for more in ({}, {"checkpoint_blocks": True}, {"accumulate": 2}):
                    rows.append(row(kind, shape, 8, precision=precision, **more))
                    print(rows[-1], file=sys.stderr)
    rows += pictures(args.rounds)
    harness.write(args.out, "plan_check", rows, errors=errors(rows))
    for what, error in errors(rows).items():
        print(f"{what}: median error {error['median']:.1%}, worst {error['worst']:.1%}, {error['cases']} cases")


if __name__ == "__main__":
    main()
