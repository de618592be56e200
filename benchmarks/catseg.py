"""The CAT-Seg head beside the public one's own modules, same weights: `python benchmarks/catseg.py`.

Gives: benchmarks/results/catseg.json: seconds and peak memory of one picture from patch features to logits, for 20,
150 and 847 classes, one thread, in turns; memory in a process of its own each. That both answer alike is checked in the
same run.
Used by: pages.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from harness import Measured, alone, arguments, check, have, interleave, pin, ratio, target, timed, write
from torch import Tensor

from silc.config import CatSegConfig, ImageTowerConfig, ModelConfig, TextTowerConfig
from silc.model.detectron2 import HEAD, layout
from silc.model.layout import pour
from silc.model.silc import Silc

WHY: dict[str, str] = {}
CLASSES, QUICK = (20, 150, 847), (6, 20)
PUBLIC = "CAT-Seg/cat_seg/modeling/transformer/model.py"

Given = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]
Call = Callable[[Given], Tensor]


def built(quick: bool) -> Silc:
    """A model whose head is of full size (of B/16 at 384 px); its towers, which are not run, have three blocks."""
    width, dim, side = (128, 64, 96) if quick else (768, 512, 384)
    image = ImageTowerConfig(side, 16, width, 3, width // 64, 64, "cls", "quick_gelu", proj="linear", patch_bias=False)
    text = TextTowerConfig(64, 8, 64, 1, 1, 64, proj="linear")
    head = CatSegConfig(classes=16) if quick else CatSegConfig()
    torch.manual_seed(0)
    model = Silc(ModelConfig(image, text, embed_dim=dim, catseg=head)).eval()
    assert model.catseg is not None
    for name, parameter in model.catseg.named_parameters():
        if "pad" in name:
            torch.nn.init.normal_(parameter)
    return model


def public(module: ModuleType, model: Silc) -> Call:
    """The public modules with our weights; the two inner maps are enlarged as its own model does before them."""
    c, head = model.config, model.config.catseg
    grid = (c.image.grid, c.image.grid)
    theirs = module.Aggregator(
        text_guidance_dim=c.embed_dim, appearance_guidance_dim=c.embed_dim, num_layers=head.layers,
        hidden_dim=head.width, pooling_size=(1, 1), feature_resolution=grid, window_size=min(head.window, c.image.grid),
        pad_len=head.classes,
    ).eval()  # fmt: skip
    tensors = pour(model, {n: p for n, p in layout(c).items() if n.startswith((HEAD, "upsample"))})
    own = {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    lacking = theirs.load_state_dict(own, strict=False)
    assert not lacking.unexpected_keys and all("attn_mask" in name for name in lacking.missing_keys), lacking

    def run(given: Given) -> Tensor:
        dense, text, inner = given
        finer = [
            F.conv_transpose2d(x, tensors[f"upsample{j}.weight"], tensors[f"upsample{j}.bias"], stride=2**j)
            for j, x in enumerate(inner, 1)
        ]
        return theirs(dense, text[None, :, None], (dense, *finer))

    return run


def given(model: Silc, classes: int) -> Given:
    c, generator = model.config, torch.Generator().manual_seed(classes)
    grid = (c.image.grid, c.image.grid)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return (noise(1, c.embed_dim, *grid), noise(classes, c.embed_dim),
            (noise(1, c.image.width, *grid), noise(1, c.image.width, *grid)))  # fmt: skip


def calls(quick: bool) -> tuple[Silc, dict[str, Call]]:
    model = built(quick)
    assert model.catseg is not None
    found: dict[str, Call] = {"silc": lambda x: model.catseg(*x)}  # type: ignore[misc]
    if peers := have("timm", "einops", PUBLIC):
        found["CAT-Seg"] = public(peers[2], model)
    return model, found


def memory(case: str, quick: bool) -> None:
    who, classes = case.rsplit(" ", 1)
    model, found = calls(quick)
    x = given(model, int(classes))
    with torch.inference_mode(), Measured() as measured:
        found[who](x)
    print(json.dumps({"above": measured.above}))


def main() -> None:
    args = arguments(__doc__)
    pin(1, args.quick)
    if args.case:
        memory(args.case, args.quick)
        return
    rows: list[dict[str, Any]] = []
    targets, checks = [], []
    model, found = calls(args.quick)
    for classes in QUICK if args.quick else CLASSES:
        x = given(model, classes)
        with torch.inference_mode():
            answers = {name: call(x) for name, call in found.items()}
            rounds = min(args.rounds, 3) if classes > 100 else args.rounds
            seconds = interleave({name: lambda call=call, x=x: call(x) for name, call in found.items()}, rounds)
        peaks = {name: alone(__file__, f"{name} {classes}", args.quick)["above"] for name in found}
        rows += [timed(name, s, classes=classes, above_bytes=peaks[name]) for name, s in seconds.items()]
        if "CAT-Seg" in found:
            checks.append(check(f"{classes} classes: silc = CAT-Seg", answers["silc"], answers["CAT-Seg"], 1e-4))
            figure = ratio(seconds["CAT-Seg"], seconds["silc"])
            targets.append(target(f"CAT-Seg head, {classes} classes: speed", "CAT-Seg", figure, least=1.0))
            share = peaks["silc"] / peaks["CAT-Seg"]
            targets.append(target(f"CAT-Seg head, {classes} classes: peak memory", "CAT-Seg", share, most=0.5))
    write(args.out, "catseg", rows, targets, checks, rounds=args.rounds)


if __name__ == "__main__":
    main()
