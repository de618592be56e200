"""Released weights: two-tower checkpoints of big_vision, against its key list and a second implementation in NumPy.

Gives: names and shapes of SigLIP B/16; parity of image, text and dense features, at other sizes too; open_clip's own
reader of such files beside ours; the file's variants; errors.
Used by: pytest.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_transformers import off

from silc.config import ImageTowerConfig, ModelConfig, PreprocessConfig, TextTowerConfig
from silc.model.big_vision import from_big_vision, layout, to_big_vision
from silc.model.layout import pour
from silc.model.silc import Silc
from silc.opening import open_model

Arrays = Mapping[str, np.ndarray]

# ---------------------------------------------------------------- names

# What big_vision's models vit (pool map) and text_transformer, at B/16, name their parameters; blocks repeat 12 times.
ATTENTION = "MultiHeadDotProductAttention_0"
BLOCK: dict[str, tuple[int, ...]] = {
    "LayerNorm_0/scale": (768,),
    "LayerNorm_0/bias": (768,),
    f"{ATTENTION}/query/kernel": (768, 12, 64),
    f"{ATTENTION}/query/bias": (12, 64),
    f"{ATTENTION}/key/kernel": (768, 12, 64),
    f"{ATTENTION}/key/bias": (12, 64),
    f"{ATTENTION}/value/kernel": (768, 12, 64),
    f"{ATTENTION}/value/bias": (12, 64),
    f"{ATTENTION}/out/kernel": (12, 64, 768),
    f"{ATTENTION}/out/bias": (768,),
    "LayerNorm_1/scale": (768,),
    "LayerNorm_1/bias": (768,),
    "MlpBlock_0/Dense_0/kernel": (768, 3072),
    "MlpBlock_0/Dense_0/bias": (3072,),
    "MlpBlock_0/Dense_1/kernel": (3072, 768),
    "MlpBlock_0/Dense_1/bias": (768,),
}
B16: dict[str, tuple[int, ...]] = {
    "img/embedding/kernel": (16, 16, 3, 768),
    "img/embedding/bias": (768,),
    "img/pos_embedding": (1, 196, 768),
    **{f"img/Transformer/encoderblock_{i}/{name}": shape for i in range(12) for name, shape in BLOCK.items()},
    "img/Transformer/encoder_norm/scale": (768,),
    "img/Transformer/encoder_norm/bias": (768,),
    "img/MAPHead_0/probe": (1, 1, 768),
    **{f"img/MAPHead_0/{name}": shape for name, shape in BLOCK.items() if "LayerNorm_1" not in name},
    "txt/Embed_0/embedding": (32000, 768),
    "txt/pos_embedding": (1, 64, 768),
    **{f"txt/Encoder_0/encoderblock_{i}/{name}": shape for i in range(12) for name, shape in BLOCK.items()},
    "txt/Encoder_0/encoder_norm/scale": (768,),
    "txt/Encoder_0/encoder_norm/bias": (768,),
    "txt/head/kernel": (768, 768),
    "txt/head/bias": (768,),
    "t": (1,),
    "b": (1,),
}


def test_siglip_b16_has_exactly_these_names_and_shapes() -> None:
    with torch.device("meta"):
        model = Silc(ModelConfig(image=ImageTowerConfig(image_size=224)))
    assert {name: tuple(t.shape) for name, t in pour(model, layout(model.config)).items()} == B16


# ---------------------------------------------------------------- numbers


def tiny(**changes: Any) -> Silc:
    """Sides, widths, heads and depths all different, and every parameter random."""
    config = ModelConfig(
        image=ImageTowerConfig(image_size=32, patch=8, width=24, depth=2, heads=3, mlp=40),
        text=TextTowerConfig(vocab=50, length=12, width=32, depth=3, heads=4, mlp=56),
        preprocess=PreprocessConfig(size=32), embed_dim=24, **changes)
    torch.manual_seed(0)
    model = Silc(config).eval()
    for name, p in model.named_parameters():
        p.data = torch.randn_like(p) * (p[0].numel() ** -0.5 if p.dim() > 1 and "position" not in name else 0.4)
        p.data += 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return model


def under(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def norm(x: np.ndarray, w: Arrays) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w["scale"] + w["bias"]


def attend(x: np.ndarray, over: np.ndarray, w: Arrays) -> np.ndarray:
    """Tokens [N, D] over tokens [M, D], one head after the other."""
    mixed = np.zeros_like(x) + w["out/bias"]
    for h in range(w["query/bias"].shape[0]):
        q, k, v = (given @ w[f"{n}/kernel"][:, h] + w[f"{n}/bias"][h]
                   for n, given in (("query", x), ("key", over), ("value", over)))
        scores = np.exp(np.einsum("nd,md->nm", q, k) / np.sqrt(q.shape[-1]))
        mixed = mixed + scores / scores.sum(-1, keepdims=True) @ v @ w["out/kernel"][h]
    return mixed


def mlp(x: np.ndarray, w: Arrays) -> np.ndarray:
    y = x @ w["Dense_0/kernel"] + w["Dense_0/bias"]
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return y @ w["Dense_1/kernel"] + w["Dense_1/bias"]


def encode(x: np.ndarray, w: Arrays, depth: int) -> np.ndarray:
    for i in range(depth):
        block = under(w, f"encoderblock_{i}/")
        y = norm(x, under(block, "LayerNorm_0/"))
        x = x + attend(y, y, under(block, f"{ATTENTION}/"))
        x = x + mlp(norm(x, under(block, "LayerNorm_1/")), under(block, "MlpBlock_0/"))
    return norm(x, under(w, "encoder_norm/"))


def table(w: Arrays, rows: int, columns: int) -> np.ndarray:
    """The position table at another size, by Pillow's antialiased bicubic: [rows * columns, D]."""
    flat = w["pos_embedding"][0]
    side = int(len(flat) ** 0.5)
    if (rows, columns) == (side, side):
        return flat
    planes = (Image.fromarray(plane.astype(np.float32)) for plane in flat.T.reshape(-1, side, side))
    made = [np.asarray(plane.resize((columns, rows), Image.Resampling.BICUBIC)) for plane in planes]
    return np.stack(made, -1).reshape(rows * columns, -1).astype(np.float64)


def see(picture: np.ndarray, w: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """A picture [H, W, 3] -> its embedding [D], and each patch through the head with attention on it alone [N, D]."""
    kernel, rows, columns = w["embedding/kernel"], picture.shape[0] // 8, picture.shape[1] // 8
    patches = picture.reshape(rows, 8, columns, 8, 3)
    x = np.einsum("rpcqk,pqkd->rcd", patches, kernel).reshape(rows * columns, -1) + w["embedding/bias"]
    x, head = encode(x + table(w, rows, columns), under(w, "Transformer/"), 2), under(w, "MAPHead_0/")

    def after(y: np.ndarray) -> np.ndarray:
        return y + mlp(norm(y, under(head, "LayerNorm_0/")), under(head, "MlpBlock_0/"))

    attention = under(head, f"{ATTENTION}/")
    alone = np.concatenate([attend(head["probe"][0], token[None], attention) for token in x])
    return after(attend(head["probe"][0], x, attention))[0], after(alone)


def read(ids: np.ndarray, w: Arrays) -> np.ndarray:
    x = encode(w["Embed_0/embedding"][ids] + w["pos_embedding"][0], under(w, "Encoder_0/"), 3)
    return x[-1] @ w["head/kernel"] + w["head/bias"]


def unit(rows: list[np.ndarray]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.stack(rows)).float(), dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (56, 40)])
def test_image_text_logits_and_dense_features_agree_with_numpy(size: tuple[int, int]) -> None:
    arrays = {name: a.astype(np.float64) for name, a in to_big_vision(tiny()).items()}
    ours, report = from_big_vision(arrays)
    assert not report.new and not report.ignored and {p.dtype for p in ours.parameters()} == {torch.float32}
    rng = np.random.default_rng(0)
    pictures, ids = rng.normal(size=(3, *size, 3)), rng.integers(0, 50, (3, 12))
    seen = [see(picture, under(arrays, "img/")) for picture in pictures]
    image, text = unit([pooled for pooled, _ in seen]), unit([read(row, under(arrays, "txt/")) for row in ids])
    pixels = torch.from_numpy(pictures).float().permute(0, 3, 1, 2)
    assert off(ours.encode_image(pixels), image) < 1e-4
    assert off(ours.encode_text(torch.from_numpy(ids)), text) < 1e-4
    logits = image @ text.T * np.exp(arrays["t"]).item() + arrays["b"].item()
    assert off(ours.logits(ours.encode_image(pixels), ours.encode_text(torch.from_numpy(ids))), logits.float()) < 1e-4
    assert off(ours.encode_dense(pixels).flatten(2).transpose(1, 2), unit([dense for _, dense in seen])) < 1e-3
    assert torch.pdist(image).min() > 1e-2 and torch.pdist(text).min() > 1e-2


@torch.no_grad()
def test_open_clips_own_reader_of_such_files_makes_the_same_model(
    open_clip: ModuleType, timm: ModuleType, tmp_path: Path
) -> None:
    model = tiny()
    image, text = model.config.image, model.config.text
    np.savez(tmp_path / "siglip.npz", **{f"params/{name}": a for name, a in to_big_vision(model).items()})
    trunk = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=40 / 24, class_token=False,
        global_pool="map", num_classes=0, act_layer="gelu_tanh")
    words = open_clip.model._build_text_tower(24, {
        "context_length": text.length, "vocab_size": text.vocab, "width": text.width, "heads": text.heads,
        "layers": text.depth, "mlp_ratio": text.mlp / text.width, "no_causal_mask": True, "proj_bias": True,
        "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}})  # fmt: skip
    theirs = SimpleNamespace(visual=SimpleNamespace(trunk=trunk.eval()), text=words.eval(),
                             logit_scale=torch.zeros(()), logit_bias=torch.zeros(()))  # fmt: skip
    open_clip.convert.load_big_vision_weights(theirs, str(tmp_path / "siglip.npz"))
    ours = open_model(tmp_path / "siglip.npz").model
    pixels, ids = torch.randn(3, 3, 32, 32), torch.randint(0, 50, (4, 12))
    assert image == ours.config.image and (theirs.logit_scale, theirs.logit_bias) == (ours.logit_scale, ours.logit_bias)
    assert off(ours.encode_image(pixels), F.normalize(trunk(pixels), dim=-1)) < 1e-4
    assert off(ours.encode_text(ids), F.normalize(words(ids), dim=-1)) < 1e-4


@pytest.mark.parametrize("bias", [-10.0, None])
def test_out_and_in_is_bit_identical(bias: float | None) -> None:
    model = tiny(bias_init=bias)
    arrays = to_big_vision(model)
    assert ("b" in arrays) == (bias is not None) and all(a.flags.c_contiguous for a in arrays.values())
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    again, report = from_big_vision(np.load(file, allow_pickle=False))
    assert again.config == model.config and report.share == 1
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_variants_of_the_file_give_the_same_model() -> None:
    model = tiny()
    plain = to_big_vision(model)
    stacked = {name: a for name, a in plain.items() if "encoderblock_" not in name}
    for tower, depth in (("img/Transformer", 2), ("txt/Encoder_0", 3)):
        for name in BLOCK:
            parts = [plain[f"{tower}/encoderblock_{i}/{name}"] for i in range(depth)]
            stacked[f"{tower}/encoderblock/{name}"] = np.stack(parts)
    trained = {f"params/{name}": a for name, a in stacked.items()}
    trained |= {"opt/count": np.array(3), "opt/img/t": np.zeros(2)}
    ours, report = from_big_vision(trained)
    assert report.ignored == ["opt/count", "opt/img/t"] and not report.new
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), model.state_dict().values(), strict=True))
    doubled = {**plain, "txt/Encoder_0/pos_embedding": plain["txt/pos_embedding"] / 2}
    doubled["txt/pos_embedding"] = plain["txt/pos_embedding"] / 2
    assert torch.equal(from_big_vision(doubled)[0].text.position, model.text.position)


def test_bfloat16_arrays_are_read_by_their_bytes() -> None:
    model = tiny()
    rounded = {name: torch.from_numpy(a).bfloat16() for name, a in to_big_vision(model).items()}
    ours, _ = from_big_vision({name: t.view(torch.int16).numpy().view("V2") for name, t in rounded.items()})
    assert torch.equal(ours.image.patch.bias, model.image.patch.bias.bfloat16().float())
    assert torch.equal(ours.text.proj.weight, model.text.proj.weight.bfloat16().float())


@torch.no_grad()
def test_another_image_size_resizes_the_position_table() -> None:
    model = tiny()
    ours, report = from_big_vision(to_big_vision(model), image_size=48)
    assert report.resized == ["image.position 4x4 -> 6x6"] and ours.config.preprocess.size == 48
    pixels = torch.randn(2, 3, 48, 48)
    assert off(ours.encode_image(pixels), model.encode_image(pixels)) < 1e-5
    with pytest.raises(ValueError, match="image_size 50 is not a multiple"):
        from_big_vision(to_big_vision(model), image_size=50)


@pytest.mark.parametrize(("spoil", "message"), [
    ({"img/MAPHead_0/probe": None}, r"img/MAPHead_0/probe is not there"),
    ({"img/embedding/kernel": np.zeros((3, 4))}, r"img/embedding/kernel is \[3, 4\]"),
    ({"txt/head/bias": np.zeros(3, np.float32)}, r"tensor txt/head/bias is \(3,\)"),
    ({"txt/head/bias": np.array(["a"])}, "no numbers"),
    ({"img/pos_embedding": np.zeros((1, 15, 24), np.float32)}, "square grid"),
])
def test_what_does_not_fit_is_one_clear_error(spoil: dict[str, np.ndarray | None], message: str) -> None:
    arrays = {name: a for name, a in {**to_big_vision(tiny()), **spoil}.items() if a is not None}
    with pytest.raises(ValueError, match=message):
        from_big_vision(arrays)


def test_what_siglip_does_not_have_is_not_exported() -> None:
    model = Silc(ModelConfig(image=ImageTowerConfig(16, 8, 8, 1, 1, 8, act="gelu"), embed_dim=8,
                             text=TextTowerConfig(vocab=8, length=4, width=8, depth=1, heads=1, mlp=8)))
    with pytest.raises(ValueError, match=r"big_vision's SigLIP has image\.act = gelu_tanh, not gelu"):
        to_big_vision(model)
