"""Plain inference beside `transformers` and open_clip, same weights: `python benchmarks/inference.py`.

Gives: benchmarks/results/inference.json: seconds of the image tower (SigLIP B/16 and CLIP B/16 at 224 px, batch 8, fp32
and bf16), of the text tower, and of dense maps beside the pooled embedding; one thread on one core, in turns. That all
answer alike is checked in the same run.
Used by: pages.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import arguments, check, have, interleave, matmul_peak, pin, ratio, target, timed, write
from peer_towers import open_clip_model, stir
from torch import Tensor

from silc.model.silc import Silc
from silc.model.weights import describe, to_transformers
from silc.plan.flops import image_macs, text_macs

WHY: dict[str, str] = {
    "inference, text tower, siglip fp32": "A tie: both run the same products, and one library's rounds differ "
    "among themselves by more than this ratio differs from 1.",
    "inference, image tower, clip fp32": "A tie: both run the same products, and one library's rounds differ "
    "among themselves by more than this ratio differs from 1.",
    "inference, text tower, siglip bf16": "A tie: both run the same products, and one library's rounds differ "
    "among themselves by more than this ratio differs from 1.",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EQUAL = {"fp32": 1e-5, "bf16": 3e-2}
QUICK_SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCAB = 1000


def described(family: str, quick: bool) -> dict[str, Any]:
    """The config.json of transformers: B/16 at 224 px; only the vocabulary is small (a look-up costs nothing)."""
    sizes = QUICK_SIZES if quick else {}
    words = {**sizes, "vocab_size": VOCAB} | ({"eos_token_id": VOCAB - 1} if family == "clip" else {})
    vision = {**sizes, "image_size": 64 if quick else 224, "patch_size": 16}
    return {"model_type": family, "vision_config": vision, "text_config": words}


def in_transformers(transformers: Any, config: dict[str, Any], model: Silc) -> Any:
    settings = transformers.AutoConfig.for_model(**config)
    peer = transformers.AutoModel.from_config(settings, attn_implementation="sdpa")
    lacking = peer.load_state_dict(to_transformers(model), strict=False)
    assert not lacking.unexpected_keys and all("position_ids" in key for key in lacking.missing_keys), lacking
    return peer.eval()


Call = Callable[[Tensor], Tensor]


def transformers_calls(peer: Any, family: str) -> tuple[Call, Call]:
    def pooled(tower: Any, projection: str, **inputs: Tensor) -> Tensor:
        x = tower(**inputs).pooler_output
        return F.normalize((getattr(peer, projection)(x) if family == "clip" else x).float(), dim=-1)

    return (
        lambda pixels: pooled(peer.vision_model, "visual_projection", pixel_values=pixels),
        lambda ids: pooled(peer.text_model, "text_projection", input_ids=ids),
    )


def text_ids(model: Silc, batch: int) -> Tensor:
    """Texts that fill every position, their end token last."""
    c = model.config.text
    ids = torch.randint(2, c.vocab - 1, (batch, c.length), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = c.eos_id
    return ids


def family_cases(family: str, precision: str, quick: bool) -> tuple[Silc, dict[str, tuple[Call, Call]]]:
    """Image and text call of silc and of each peer that is here, all with the same weights in one precision."""
    config, dtype = described(family, quick), DTYPES[precision]
    model = Silc(describe(config)).eval()
    stir(model)
    calls: dict[str, tuple[Call, Call]] = {}
    if peers := have("transformers"):
        calls["transformers"] = transformers_calls(in_transformers(peers[0], config, model).to(dtype), family)
    if family == "clip" and (peers := have("open_clip")):
        peer: Any = open_clip_model(peers[0], model).eval().to(dtype)
        calls["open_clip"] = (
            lambda pixels: F.normalize(peer.encode_image(pixels).float(), dim=-1),
            lambda ids: F.normalize(peer.encode_text(ids).float(), dim=-1),
        )
    model.to(dtype)
    return model, {"silc": (model.encode_image, model.encode_text), **calls}


def main() -> None:
    args = arguments(__doc__)
    pin(1, args.quick)
    batch, rows, targets, checks = 2 if args.quick else 8, [], [], []
    for precision in DTYPES:
        peak = matmul_peak(DTYPES[precision], 1, 256 if args.quick else 2048)["best"]
        for family in ("siglip", "clip"):
            model, calls = family_cases(family, precision, args.quick)
            c = model.config
            generator = torch.Generator().manual_seed(2)
            pixels = torch.randn(batch, 3, c.image.image_size, c.image.image_size, generator=generator)
            pixels, ids = pixels.to(DTYPES[precision]), text_ids(model, batch)
            macs = (image_macs(c.image, c.image.image_size, c.embed_dim), text_macs(c.text, c.embed_dim))
            with torch.inference_mode():
                for i, (tower, given) in enumerate((("image", pixels), ("text", ids))):
                    cases: dict[str, Callable[[], Tensor]] = {
                        name: (lambda call=pair[i], x=given: call(x)) for name, pair in calls.items()
                    }
                    if tower == "image":
                        cases["silc dense"] = lambda m=model, x=given: m.encode_dense(x)
                    mine = cases["silc"]()
                    for name in set(calls) - {"silc"}:
                        told = f"{family} {precision} {tower}: silc = {name}"
                        checks.append(check(told, mine, cases[name](), EQUAL[precision]))
                    seconds = interleave(cases, args.rounds)
                    for name, s in seconds.items():
                        rows.append(
                            timed(name, s, 2 * batch * macs[i], peak, model=family, precision=precision, tower=tower)
                        )
                        rows[-1]["images_per_second"] = batch / rows[-1]["median_seconds"]
                        what = f"inference, {tower} tower, {family} {precision}: speed"
                        if name in ("transformers", "open_clip"):
                            targets.append(target(what, name, ratio(s, seconds["silc"]), least=1.0))
                        elif name == "silc dense":
                            figure = ratio(s, seconds["silc"])
                            what = f"dense maps, {family} {precision}: time over the pooled embedding's"
                            targets.append(target(what, "silc", figure, most=1.10))
    write(args.out, "inference", rows, targets, checks, rounds=args.rounds, batch=batch)


if __name__ == "__main__":
    main()
