"""Released weights: tiny random models of open_clip and timm go in and out, and both libraries say the same.

Gives: parity of image, text, logits and dense features at several sizes; round trips; settings by name; errors.
Used by: pytest. Skips what needs open_clip or timm where they are not installed.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transformers import LENGTH, PATCH, SIZES, VOCAB, captions, off, randomise
from torch import Tensor, nn

from silc.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from silc.model import open_clip as ours_open_clip
from silc.model import timm as ours_timm
from silc.model.layout import pour
from silc.model.open_clip import describe, from_open_clip, to_open_clip
from silc.model.silc import Silc
from silc.model.timm import from_timm

MINI = "vit_mini_patch8_siglip_32"
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8, "mlp_ratio": 1.3}
TEXT = {"context_length": LENGTH, "vocab_size": VOCAB, "width": 24, "heads": 3, "layers": 3}
MAPPED = {"image_size": 32, "timm_model_name": MINI, "timm_pool": "map", "timm_proj": "none"}
WORDS = TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
CASES: dict[str, dict[str, Any]] = {
    "gelu": {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT},
    "quick": {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True, "custom_text": True},
    "odd": {
        "embed_dim": 20,
        "vision_cfg": VISION | {"no_ln_pre": True, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}},
        "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 9, "mlp_ratio": 3.7362, "no_causal_mask": True},
        "init_logit_bias": -10,
    },
    "siglip": {"embed_dim": 32, "vision_cfg": MAPPED, "text_cfg": WORDS, "custom_text": True, "init_logit_bias": -10},
    "siglip2": {
        "embed_dim": 20,
        "vision_cfg": MAPPED | {"timm_proj": "linear", "timm_proj_bias": True},
        "text_cfg": WORDS | {"act_kwargs": {"approximate": "tanh"}},
        "custom_text": True,
        "init_logit_bias": -10,
    },
}


@pytest.fixture(scope="module")
def mini(timm: ModuleType) -> Any:
    """A tiny SigLIP tower that timm builds by name, known to silc under that name too."""
    from timm.models.vision_transformer import VisionTransformer

    def build(global_pool: str = "map", num_classes: int = 0, **_: Any) -> nn.Module:
        model = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5, class_token=False,
            global_pool=global_pool, num_classes=num_classes, act_layer="gelu_tanh")
        model.default_cfg = {}  # open_clip asks for it
        return model

    build.__name__ = MINI
    timm.models.register_model(build)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ours_timm.TOWERS, MINI, ImageTowerConfig(32, 8, 32, 2, 4, 48))
        yield


def build(open_clip: ModuleType, case: dict[str, Any]) -> Any:
    """As open_clip's factory builds a config, with every parameter random."""
    settings = copy.deepcopy(case)
    kind = open_clip.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.CLIP
    torch.manual_seed(0)
    model = kind(**settings).eval()
    randomise(model)
    model.logit_scale.data.fill_(1.5)
    return model


def words(case: dict[str, Any]) -> Tensor:
    kinds = {"argmax": "clip", "eos": "clip_other_eos", "last": "siglip"}
    return captions(kinds[case["text_cfg"].get("pool_type", "argmax")])


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, open_clip: ModuleType, mini: None) -> tuple[dict[str, Any], Any, Silc]:
    case = CASES[request.param]
    theirs = build(open_clip, case)
    ours, report = from_open_clip({"model_cfg": case}, theirs.state_dict())
    assert not report.new and not report.ignored and not report.resized
    assert sorted(report.loaded) == sorted(ours.state_dict())
    return case, theirs, ours


@torch.no_grad()
def test_image_text_and_logits_agree(pair: tuple[dict[str, Any], Any, Silc]) -> None:
    case, theirs, ours = pair
    pixels, ids = torch.randn(3, 3, 32, 32), words(case)
    image, text = ours.encode_image(pixels), ours.encode_text(ids)
    assert off(image, theirs.encode_image(pixels, normalize=True)) < 1e-4
    assert off(text, theirs.encode_text(ids, normalize=True)) < 1e-4
    assert off(ours.logits(image, text), theirs.get_logits(pixels, ids)[0]) < 1e-4
    assert torch.pdist(image).min() > 1e-2 and torch.pdist(text).min() > 1e-2


def grow(open_clip: ModuleType, case: dict[str, Any], theirs: Any, size: tuple[int, int]) -> Any:
    """Their model for another size, as they make it from the same weights."""
    if "timm_model_name" in case["vision_cfg"]:
        grown = copy.deepcopy(theirs)
        grown.visual.set_input_size(size)
        return grown
    grown = build(open_clip, case | {"vision_cfg": case["vision_cfg"] | {"image_size": size}})
    state = dict(theirs.state_dict())
    open_clip.model.resize_pos_embed(state, grown)
    grown.load_state_dict(state)
    return grown


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_images_and_dense_features_agree_at_every_size(
    pair: tuple[dict[str, Any], Any, Silc], open_clip: ModuleType, size: tuple[int, int]
) -> None:
    case, theirs, ours = pair
    visual, pixels = grow(open_clip, case, theirs, size).visual, torch.randn(2, 3, *size)
    assert off(ours.encode_image(pixels), F.normalize(visual(pixels), dim=-1)) < 1e-4
    if hasattr(visual, "trunk"):
        x, pool = visual.trunk.forward_features(pixels), visual.trunk.attn_pool
        x = pool.proj(F.linear(x, pool.kv.weight[32:], pool.kv.bias[32:]))
        expected = {"tokens": visual.head(x + pool.mlp(pool.norm(x)))}
    else:
        *early, last = visual.transformer.resblocks
        x = visual._embeds(pixels)
        for block in early:
            x = block(x)
        value = F.linear(last.ln_1(x), last.attn.in_proj_weight[64:], last.attn.in_proj_bias[64:])
        alone = x + last.attn.out_proj(value)
        alone = alone + last.mlp(last.ln_2(alone))
        expected = {"value": visual.ln_post(alone)[:, 1:] @ visual.proj}
        expected["tokens"] = visual.ln_post(last(x))[:, 1:] @ visual.proj
    for readout, features in expected.items():
        dense = ours.encode_dense(pixels, readout)  # type: ignore[arg-type]
        assert off(dense.flatten(2).transpose(1, 2), F.normalize(features, dim=-1)) < 1e-3


@torch.no_grad()
def test_out_and_in_is_bit_identical_and_open_clip_builds_what_is_written(
    pair: tuple[dict[str, Any], Any, Silc], open_clip: ModuleType
) -> None:
    case, theirs, ours = pair
    config, tensors = to_open_clip(ours)
    config = json.loads(json.dumps(config))
    if case.get("custom_text") == config["model_cfg"]["custom_text"]:
        assert tensors.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        out = tensors.get(name, tensors.get(name.removeprefix("text.")))
        assert out is not None and out.is_contiguous() and torch.equal(out, tensor), name
    again, report = from_open_clip(config, tensors)
    assert not report.new and not report.ignored
    assert again.config == replace(ours.config, scale_init=again.config.scale_init)
    assert again.config.scale_init == pytest.approx(ours.config.scale_init)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))
    rebuilt = build(open_clip, config["model_cfg"])
    rebuilt.load_state_dict(tensors, strict=True)
    pixels, ids = torch.randn(2, 3, 32, 32), words(case)
    assert torch.equal(rebuilt.encode_image(pixels), theirs.encode_image(pixels))
    assert torch.equal(rebuilt.encode_text(ids), theirs.encode_text(ids))


@torch.no_grad()
def test_a_model_is_built_at_the_image_size_asked_for(
    pair: tuple[dict[str, Any], Any, Silc], open_clip: ModuleType
) -> None:
    case, theirs, ours = pair
    half = {f"module.{name}": tensor.half() for name, tensor in theirs.state_dict().items()}
    model, report = from_open_clip({"model_cfg": case}, half, image_size=48)
    assert report.resized == ["image.position 4x4 -> 6x6"] and model.config.preprocess.size == 48
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    pixels = torch.randn(2, 3, 48, 48)
    assert off(model.encode_image(pixels), ours.encode_image(pixels)) < 1e-2
    with pytest.raises(ValueError, match="image_size 50 is not a multiple"):
        from_open_clip({"model_cfg": case}, half, image_size=50)


# ---------------------------------------------------------------- settings


def test_timms_towers_are_as_timm_builds_them(timm: ModuleType) -> None:
    names = [name for name in timm.list_models("vit_*_siglip_*") if "_gap_" not in name and name != MINI]
    assert sorted(names) == sorted(set(ours_timm.TOWERS) - {MINI})
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        first, patch = model.blocks[0], model.patch_embed.proj
        read = ImageTowerConfig(
            model.patch_embed.grid_size[0] * patch.kernel_size[0], patch.kernel_size[0], patch.out_channels,
            len(model.blocks), first.attn.num_heads, first.mlp.fc1.out_features, norm_eps=first.norm1.eps,
            act="gelu_tanh" if "Tanh" in type(first.mlp.act).__name__ else "gelu")
        assert ours_timm.TOWERS[name] == read, name
        assert type(model.attn_pool.mlp.act) is type(first.mlp.act) and model.norm.eps == read.norm_eps


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14", "ViT-bigG-14", "ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256",
    "ViT-SO400M-14-SigLIP-384", "ViT-SO400M-16-SigLIP2-384", "ViT-gopt-16-SigLIP2-256",
])
def test_released_architectures_have_the_names_and_shapes_that_silc_expects(open_clip: ModuleType, name: str) -> None:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        theirs = build(open_clip, config).state_dict()
        ours = Silc(describe({"model_cfg": config}))
        prefix = "text." if config.get("custom_text") else ""
        wanted = pour(ours, ours_open_clip.layout(ours.config, prefix))
    assert {n: t.shape for n, t in wanted.items()} == {n: t.shape for n, t in theirs.items()}


def test_the_preprocessing_is_believed_and_defaults_to_clips() -> None:
    usual = describe({"model_cfg": CASES["gelu"]}).preprocess
    assert (usual.size, usual.resize, usual.interpolation) == (32, "crop", "bicubic")
    assert usual.mean[0] == pytest.approx(0.4814, abs=1e-4) and usual.std[0] == pytest.approx(0.2686, abs=1e-4)
    stated = {"size": 99, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    read = describe({"model_cfg": CASES["gelu"], "preprocess_cfg": stated | {"resize_mode": "squash"}}).preprocess
    assert (read.size, read.resize, read.interpolation, read.mean) == (32, "squash", "bilinear", (0.1, 0.2, 0.3))
    read_text = describe({"model_cfg": CASES["gelu"]}).text
    assert (read_text.pool, read_text.eos_id, read_text.causal, read_text.pad_id) == ("eos", VOCAB - 1, True, 0)


def changed(part: str, **changes: Any) -> dict[str, Any]:
    case = CASES["gelu"]
    return {"model_cfg": case | (changes if part == "model" else {part: case[part] | changes})}


@pytest.mark.parametrize(("config", "message"), [
    ({}, "none of open_clip's"),
    (changed("model", multimodal_cfg={"width": 8}), "multimodal_cfg"),
    (changed("vision_cfg", layers=[3, 4, 6, 3]), "a ResNet"),
    (changed("vision_cfg", attentional_pool=True), "vision_cfg.attentional_pool = True"),
    (changed("vision_cfg", pool_type="avg"), "pool_type = 'avg'"),
    (changed("vision_cfg", ls_init_value=1e-5), "ls_init_value"),
    (changed("vision_cfg", image_size=[32, 64]), "image_size"),
    (changed("vision_cfg", timm_model_name="vit_pe_core_base_patch16_224", timm_pool="map"), "does not know timm's"),
    (changed("vision_cfg", timm_model_name="vit_base_patch16_siglip_224"), "timm_pool = 'avg'"),
    (changed("vision_cfg", norm_kwargs={"bias": False}), "norm_kwargs"),
    (changed("text_cfg", hf_model_name="roberta-base"), "text_cfg.hf_model_name = 'roberta-base'"),
    (changed("text_cfg", embed_cls=True), "embed_cls"),
    (changed("text_cfg", proj_type="none"), "proj_type = 'none'"),
    (changed("text_cfg", pool_type="first"), "pool_type = 'first'"),
    (changed("text_cfg", act_kwargs={"approximate": "sigmoid"}), "act_kwargs"),
    (changed("text_cfg", qk_norm=True), "qk_norm"),
    (changed("model", embed_dim=20) | {"preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode = 'longest'"),
    (changed("model", embed_dim=20) | {"preprocess_cfg": {"interpolation": "random"}}, "interpolation"),
])
def test_a_setting_that_silc_lacks_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        from_open_clip(config, {})
    assert "\n" not in str(error.value)


def test_what_open_clip_cannot_express_is_not_exported() -> None:
    text = TextTowerConfig(vocab=8, length=4, width=8, depth=1, heads=1, mlp=8)
    image = ImageTowerConfig(16, 8, 8, 1, 1, 8, pool="cls", patch_bias=False, proj="linear")
    native = ModelConfig(image=image, text=text, embed_dim=8)
    for config, message in [
        (replace(native, image=replace(image, pool="map", patch_bias=True, proj="none")), "none is like this model's"),
        (replace(native, image=replace(image, pool="mean")), "image.pool = cls"),
        (replace(native, image=replace(image, patch_bias=True)), "image.patch_bias = False"),
        (replace(native, image=replace(image, act="quick_gelu")), "both towers or in none"),
        (replace(native, text=replace(text, pool="mean")), "mean pooling"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_open_clip(Silc(config))


# ---------------------------------------------------------------- timm alone


SMALL = {"img_size": 32, "patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_an_image_tower_of_timm_agrees_at_every_size(timm: ModuleType, tmp_path: Path, act: str) -> None:
    from timm.models import _hub as hub

    name = "vit_base_patch16_siglip_224"
    theirs = timm.create_model(name, **SMALL, act_layer=act, num_classes=0, dynamic_img_size=True).eval()
    randomise(theirs)
    hub.save_config_for_hf(theirs, tmp_path / "config.json")
    config = json.loads((tmp_path / "config.json").read_text())
    ours, report = from_timm(config, theirs.state_dict())
    assert not report.ignored and all(name.startswith(("text.", "logit_scale", "logit_bias")) for name in report.new)
    assert ours.config.image.act == act and ours.config.preprocess.resize == "crop"
    assert ours.config.preprocess.mean == (0.5, 0.5, 0.5) and ours.config.preprocess.interpolation == "bicubic"
    for size in SIZES:
        pixels = torch.randn(2, 3, *size)
        assert off(ours.encode_image(pixels), F.normalize(theirs(pixels), dim=-1)) < 1e-4
        pool = theirs.attn_pool
        x = pool.proj(F.linear(theirs.forward_features(pixels), pool.kv.weight[32:], pool.kv.bias[32:]))
        dense = ours.encode_dense(pixels).flatten(2).transpose(1, 2)
        assert off(dense, F.normalize(x + pool.mlp(pool.norm(x)), dim=-1)) < 1e-3
    larger, report = from_timm(config, theirs.state_dict(), image_size=48)
    assert report.resized == ["image.position 4x4 -> 6x6"]
    assert off(larger.encode_image(torch.ones(1, 3, 48, 48)), ours.encode_image(torch.ones(1, 3, 48, 48))) < 1e-5
    with pytest.raises(ValueError, match="only 69%"):
        from_timm(config, {n: t for n, t in theirs.state_dict().items() if not n.startswith("blocks.1")}, minimum=0.9)


@pytest.mark.parametrize(("config", "message"), [
    ({"pretrained_cfg": {}}, "no architecture"),
    ({"architecture": "vit_base_patch16_224"}, "does not know timm's 'vit_base_patch16_224'"),
    ({"architecture": "vit_base_patch16_siglip_gap_224"}, "Perhaps you meant 'vit_base_patch16_siglip_224'"),
    ({"architecture": "vit_base_patch16_siglip_224", "model_args": {"global_pool": "avg"}}, "global_pool = 'avg'"),
    ({"architecture": "vit_base_patch16_siglip_224", "model_args": {"qk_norm": True}}, "model_args qk_norm"),
    ({"architecture": "vit_base_patch16_siglip_224", "pretrained_cfg": {"crop_mode": "border"}}, "crop_mode"),
    ({"architecture": "vit_base_patch16_siglip_224", "model_args": {"img_size": [32, 48]}}, "img_size"),
])
def test_a_setting_of_timm_that_silc_lacks_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_timm(config, {})
