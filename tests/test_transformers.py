"""Released weights: tiny random models of transformers go in and out, and both libraries say the same.

Gives: parity of image, text, logits and dense features; round trips; load reports; configs.
Used by: pytest. Skips what needs transformers where that is not installed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from silc.config import ModelConfig
from silc.model.layout import strip_prefixes
from silc.model.silc import Silc
from silc.model.weights import describe, from_transformers, to_transformers

VOCAB, LENGTH, END, PATCH, GRID = 64, 12, 63, 8, 4
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
TEXT = {"hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 3}
TEXT |= {"vocab_size": VOCAB, "max_position_embeddings": LENGTH}
KINDS = ["siglip", "siglip_gelu", "siglip2", "clip_quick", "clip_gelu", "clip_legacy_eos", "clip_other_eos"]


def build(kind: str, seed: int = 0, **vision: Any) -> Any:
    """A tiny model of transformers with *every* parameter random: a zero bias or a unit norm would hide a mistake."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'silc[dev]'")
    torch.manual_seed(seed)
    if kind.startswith("siglip"):
        act = {"hidden_act": "gelu"} if kind == "siglip_gelu" else {}
        size = {"num_patches": GRID**2} if kind == "siglip2" else {"image_size": PATCH * GRID}
        name = "Siglip2" if kind == "siglip2" else "Siglip"
        text = {**TEXT, "projection_size": VISION["hidden_size"], **act}
        config = getattr(hf, f"{name}Config")(text_config=text, vision_config={**VISION, **size, **act, **vision})
    else:
        name = "CLIP"
        act = {"hidden_act": "gelu" if kind == "clip_gelu" else "quick_gelu"}
        end = {"eos_token_id": {"clip_legacy_eos": 2, "clip_other_eos": 9}.get(kind, END)}
        sizes = {**VISION, "image_size": PATCH * GRID, **act, **vision}
        config = hf.CLIPConfig(text_config={**TEXT, **act, **end}, vision_config=sizes, projection_dim=20)
    model = getattr(hf, f"{name}Model")(config).eval()
    randomise(model)
    model.logit_scale.data.fill_(1.5)
    return model


def randomise(model: torch.nn.Module) -> None:
    for key, p in model.named_parameters():
        table = "embed" in key and "proj" not in key
        scale = p[0].numel() ** -0.5 if p.dim() > 1 and not table else 0.4
        norm = ("norm" in key or "ln_" in key) and key.endswith("weight")
        p.data = torch.randn_like(p) * scale + (1.0 if norm else 0.0)


def captions(kind: str) -> Tensor:
    """Ids of one, three, five and all positions; in CLIP's, the end token comes first and pads too, or zero pads."""
    end = {"clip_other_eos": 9}.get(kind, END) if kind.startswith("clip") else 1
    ids = torch.randint(10, VOCAB - 1, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    for row, (last, pad) in enumerate([(0, end), (2, 0), (4, end), (LENGTH - 1, end)]):
        ids[row, last], ids[row, last + 1 :] = end, pad
    return ids


def picture_inputs(kind: str, pixels: Tensor) -> dict[str, Tensor]:
    if kind != "siglip2":
        return {"pixel_values": pixels}
    b, c, h, w = pixels.shape
    patches = pixels.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 3, 5, 1)
    shape = torch.tensor([[h // PATCH, w // PATCH]] * b)
    patches = patches.reshape(b, -1, PATCH * PATCH * c)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
        "spatial_shapes": shape,
    }


def off(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[str, Any, Silc]:
    theirs = build(request.param)
    ours, report = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    assert not report.new and not report.ignored and not report.resized
    assert sorted(report.loaded) == sorted(ours.state_dict())
    return request.param, theirs, ours


@torch.no_grad()
def test_image_text_and_logits_agree(pair: tuple[str, Any, Silc]) -> None:
    kind, theirs, ours = pair
    pixels, ids = torch.randn(3, 3, PATCH * GRID, PATCH * GRID), captions(kind)
    out = theirs(input_ids=ids, **picture_inputs(kind, pixels))
    image, text = ours.encode_image(pixels), ours.encode_text(ids)
    assert off(image, out.image_embeds) < 1e-4
    assert off(text, out.text_embeds) < 1e-4
    assert off(ours.logits(image, text), out.logits_per_image) < 1e-4
    # not by accident: the pictures, and the texts, are told apart
    assert torch.pdist(image).min() > 1e-2 and torch.pdist(text).min() > 1e-2


@torch.no_grad()
def test_short_texts_agree_without_padding_to_the_table(pair: tuple[str, Any, Silc]) -> None:
    kind, theirs, ours = pair
    ids = captions(kind)[:3, :5]
    expected = theirs.get_text_features(input_ids=ids).pooler_output
    assert off(ours.encode_text(ids), F.normalize(expected, dim=-1)) < 1e-4


SIZES = [(PATCH * GRID, PATCH * GRID), (PATCH * 2, PATCH * 6), (PATCH * 7, PATCH * 5)]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES[1:])
def test_images_of_other_sizes_agree(pair: tuple[str, Any, Silc], size: tuple[int, int]) -> None:
    kind, theirs, ours = pair
    pixels = torch.randn(3, 3, *size)
    expected = theirs.get_image_features(**picture_inputs(kind, pixels), **grown(kind)).pooler_output
    assert off(ours.encode_image(pixels), F.normalize(expected, dim=-1)) < 1e-4


def grown(kind: str) -> dict[str, bool]:
    return {} if kind == "siglip2" else {"interpolate_pos_encoding": True}


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_dense_features_follow_the_formula_on_their_hidden_states(
    pair: tuple[str, Any, Silc], size: tuple[int, int]
) -> None:
    kind, theirs, ours = pair
    pixels = torch.randn(2, 3, *size)
    vision = theirs.vision_model
    out = vision(**picture_inputs(kind, pixels), output_hidden_states=True, **grown(kind))
    last = vision.encoder.layers[-1]
    if kind.startswith("clip"):
        x = out.hidden_states[-2][:, 1:]
        x = x + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
        x = x + last.mlp(last.layer_norm2(x))
        expected = {
            "value": theirs.visual_projection(vision.post_layernorm(x)),
            "tokens": theirs.visual_projection(vision.post_layernorm(out.last_hidden_state[:, 1:])),
        }
        expected["auto"] = expected["value"]
    else:
        head = vision.head
        value = slice(2 * VISION["hidden_size"], None)
        x = F.linear(out.last_hidden_state, head.attention.in_proj_weight[value], head.attention.in_proj_bias[value])
        x = head.attention.out_proj(x)
        tokens = x + head.mlp(head.layernorm(x))
        expected = {"tokens": tokens, "auto": tokens}
    for readout, features in expected.items():
        dense = ours.encode_dense(pixels, readout)  # type: ignore[arg-type]
        assert dense.shape == (2, ours.config.embed_dim, size[0] // PATCH, size[1] // PATCH)
        assert off(dense.flatten(2).transpose(1, 2), F.normalize(features, dim=-1)) < 1e-4


def test_out_and_in_is_bit_identical(pair: tuple[str, Any, Silc]) -> None:
    kind, theirs, ours = pair
    original = theirs.state_dict()
    family = "siglip2" if kind == "siglip2" else None
    out = to_transformers(ours, family)
    assert out.keys() == original.keys()
    for name, tensor in original.items():
        assert out[name].shape == tensor.shape and out[name].is_contiguous() and torch.equal(out[name], tensor), name
    theirs.load_state_dict(out, strict=True)
    again, _ = from_transformers(theirs.config.to_dict(), out)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


def test_the_export_shares_no_memory_with_the_model(pair: tuple[str, Any, Silc]) -> None:
    kind, _, ours = pair
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for tensor in to_transformers(ours, "siglip2" if kind == "siglip2" else None).values():
        tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_side_that_the_patch_does_not_divide_is_cut_as_their_convolution_cuts_it() -> None:
    theirs = build("siglip", image_size=35)  # as so400m-patch14-384: 27 patches of 14 px, 6 px unused
    ours, _ = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    assert ours.config.image.image_size == ours.config.preprocess.size == 32
    pixels = torch.randn(2, 3, 35, 35)
    with torch.no_grad():
        expected = theirs.get_image_features(pixel_values=pixels).pooler_output
        assert off(ours.encode_image(pixels[:, :, :32, :32]), F.normalize(expected, dim=-1)) < 1e-4


@pytest.mark.parametrize(
    ("kind", "name"), [("clip", "CLIPConfig"), ("siglip", "SiglipConfig"), ("siglip2", "Siglip2Config")]
)
def test_settings_left_out_of_a_config_take_their_librarys_defaults(kind: str, name: str) -> None:
    hf = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'silc[dev]'")
    assert describe({"model_type": kind}) == describe(getattr(hf, name)().to_dict())


# ---------------------------------------------------------------- without transformers


def clip_config(**changes: Any) -> dict[str, Any]:
    text = {**TEXT, "eos_token_id": END, **changes.pop("text", {})}
    vision = {**VISION, "image_size": 32, **changes.pop("vision", {})}
    return {"model_type": "clip", "text_config": text, "vision_config": vision, "projection_dim": 20, **changes}


def siglip_config(**changes: Any) -> dict[str, Any]:
    text = {**TEXT, "projection_size": 32, **changes.pop("text", {})}
    vision = {**VISION, "image_size": 32, **changes.pop("vision", {})}
    return {"model_type": "siglip", "text_config": text, "vision_config": vision, **changes}


def test_describe_reads_the_switches() -> None:
    clip = describe(clip_config(logit_scale_init_value=4.0))
    image, text = clip.image, clip.text
    assert (image.pool, image.pre_norm, image.patch_bias, image.proj) == ("cls", True, False, "linear")
    assert (image.act, image.norm_eps, image.width, image.mlp, image.grid) == ("quick_gelu", 1e-5, 32, 40, 4)
    assert (text.pool, text.causal, text.eos_id, text.proj, text.length) == ("eos", True, END, "linear", LENGTH)
    assert clip.bias_init is None and clip.scale_init == pytest.approx(54.598, abs=1e-3) and clip.embed_dim == 20
    assert clip.preprocess.resize == "crop" and clip.preprocess.mean[0] == pytest.approx(0.4814, abs=1e-3)
    siglip = describe(siglip_config(vision={"hidden_act": "gelu", "layer_norm_eps": 1e-3, "image_size": [48, 48]}))
    assert (siglip.image.act, siglip.image.norm_eps, siglip.image.grid) == ("gelu", 1e-3, 6)
    assert (siglip.image.pool, siglip.text.pool, siglip.text.causal, siglip.text.eos_id) == ("map", "last", False, 1)
    assert siglip.bias_init == -10.0 and siglip.embed_dim == 32 and siglip.text.width == 24


@pytest.mark.parametrize(("vocab", "stated", "read"), [(49408, 2, 49407), (49472, 2, 49407), (64, 2, 63), (99, 9, 9)])
def test_clips_old_end_token_means_the_highest_id(vocab: int, stated: int, read: int) -> None:
    assert describe(clip_config(text={"vocab_size": vocab, "eos_token_id": stated})).text.eos_id == read


def test_old_clip_configs_repeat_their_settings_in_a_second_dict() -> None:
    config = clip_config(text_config_dict={"hidden_size": 48, "num_attention_heads": None}, vision_config_dict=None)
    assert describe(config).text.width == 48 and describe(config).text.heads == 3


def test_the_preprocessor_config_is_believed() -> None:
    stated = {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_center_crop": True}
    read = describe(siglip_config(), stated).preprocess
    assert (read.size, read.resize, read.interpolation) == (32, "crop", "bilinear")
    assert (read.mean, read.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert describe(siglip_config(), {}).preprocess == describe(siglip_config()).preprocess
    with pytest.raises(ValueError, match="resample = 4"):
        describe(siglip_config(), {"resample": 4})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type 'None'"),
        ({"model_type": "sigclip"}, "Perhaps you meant 'siglip'"),
        (siglip_config(vision={"hidden_act": "swish"}), "hidden_act = 'swish'"),
        (siglip_config(vision={"num_channels": 1}), "RGB"),
        (siglip_config(vision={"image_size": [32, 48]}), "image_size"),
        (siglip_config(vision={"vision_use_head": False}), "vision_use_head"),
        (siglip_config(text={"projection_size": 16}), "texts of 16 but images of 32"),
        (clip_config(text={"eos_token_id": [1, 2]}), "eos_token_id"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_error(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(config)


def random_silc(config: dict[str, Any]) -> Silc:
    torch.manual_seed(3)
    model = Silc(describe(config)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_prefixes_of_wrappers_are_stripped_in_any_nesting() -> None:
    names = ["module._orig_mod.a.weight", "_orig_mod.module.b", "a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c"]
    names += ["modules.a", "_fsdp_wrapped_module._fpw_module.d"]
    stripped = strip_prefixes({name: torch.tensor(float(i)) for i, name in enumerate(names)})
    assert list(stripped) == ["a.weight", "b", "a.b.c", "modules.a", "d"]
    assert [t.item() for t in stripped.values()] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"'a\.weight'"):
        strip_prefixes({"module.a.weight": torch.zeros(1), "a.weight": torch.zeros(1)})


def test_the_report_says_what_became_of_each_tensor() -> None:
    model = random_silc(clip_config())
    tensors = to_transformers(model)
    lost = "text_model.encoder.layers.1.mlp.fc1.bias"
    del tensors[lost]
    tensors["text_model.embeddings.position_ids"] = torch.arange(LENGTH)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in tensors.items()}
    loaded, report = from_transformers(clip_config(vision={"image_size": 48}), wrapped)
    assert report.new == ["text.blocks.1.mlp.up.bias"]
    assert report.ignored == ["text_model.embeddings.position_ids"]
    assert report.resized == ["image.position 4x4 -> 6x6"]
    assert sorted(report.loaded + report.new) == sorted(loaded.state_dict())
    towers = sum(name.split(".")[0] in ("image", "text") for name in loaded.state_dict())
    assert report.share == pytest.approx(1 - 1 / towers)
    lines = str(report).splitlines()
    assert lines[0] == f"Loaded {len(report.loaded)}/{len(report.loaded) + 1} tensors from transformers clip."
    assert lines[3].split() == ["text", str(sum(n.startswith("text") for n in report.loaded)), "1", "0"]
    assert "Resized: image.position 4x4 -> 6x6." in lines and "New: text.blocks.1.mlp.up.bias." in lines
    assert torch.equal(loaded.image.cls_position, model.image.cls_position)
    # the centre of the resized table is near the mean of the middle of the old one, its size aside
    assert loaded.image.position.shape == (6, 6, 32)
    assert off(loaded.image.position.mean((0, 1)), model.image.position.mean((0, 1))) < 0.2


def test_a_file_without_the_towers_is_refused() -> None:
    tensors = to_transformers(random_silc(siglip_config()))
    with pytest.raises(ValueError, match=r"only 0% .* 'backbone"):
        from_transformers(siglip_config(), {f"backbone.{name}": t for name, t in tensors.items()})
    images = {name: t for name, t in tensors.items() if not name.startswith("text_model.encoder")}
    with pytest.raises(ValueError, match="only 5"):
        from_transformers(siglip_config(), images)
    _, report = from_transformers(siglip_config(), images, minimum=0.4)
    assert len(report.new) == 3 * 16 and all(name.startswith("text.blocks") for name in report.new)


@pytest.mark.parametrize("spoil", ["transposed", "quantised", "vocabulary", "table"])
def test_a_tensor_that_does_not_fit_is_named(spoil: str) -> None:
    tensors = to_transformers(random_silc(siglip_config()))
    name = {
        "transposed": "vision_model.encoder.layers.0.mlp.fc1.weight",
        "quantised": "vision_model.encoder.layers.0.mlp.fc1.weight",
        "vocabulary": "text_model.embeddings.token_embedding.weight",
        "table": "vision_model.embeddings.position_embedding.weight",
    }[spoil]
    spoilt = {"transposed": tensors[name].T, "quantised": tensors[name].to(torch.int8)}.get(spoil, tensors[name][:-1])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        from_transformers(siglip_config(), {**tensors, name: spoilt})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_any_precision_load_in_fp32(dtype: torch.dtype) -> None:
    tensors = to_transformers(random_silc(siglip_config()))
    model, _ = from_transformers(siglip_config(), {name: t.to(dtype) for name, t in tensors.items()}, image_size=40)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.image.norm.weight, tensors["vision_model.post_layernorm.weight"].to(dtype).float())


def test_a_model_is_built_at_the_image_size_asked_for() -> None:
    given = random_silc(siglip_config())
    model, report = from_transformers(siglip_config(), to_transformers(given), image_size=48)
    assert model.config.image.image_size == model.config.preprocess.size == 48
    assert report.resized == ["image.position 4x4 -> 6x6"] and report.share == 1
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert off(model.encode_image(pixels), given.encode_image(pixels)) < 1e-5
    for size in (50, 0, -8):
        with pytest.raises(ValueError, match=f"image_size {size} is not a multiple of the model's patch, 8 px"):
            from_transformers(siglip_config(), {}, image_size=size)


def test_a_softmax_model_with_siglip_towers_exports_a_zero_bias() -> None:
    config = dataclasses.replace(describe(siglip_config()), bias_init=None)
    assert torch.equal(to_transformers(Silc(config))["logit_bias"], torch.zeros(1))


def test_what_the_family_cannot_express_is_not_exported() -> None:
    siglip, clip = describe(siglip_config()), describe(clip_config())

    def refused(config: ModelConfig, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            to_transformers(Silc(config))

    refused(dataclasses.replace(siglip, image=dataclasses.replace(siglip.image, pool="mean")), "image.pool = map")
    refused(dataclasses.replace(siglip, text=dataclasses.replace(siglip.text, pool="mean")), "text.pool = last")
    refused(dataclasses.replace(clip, text=dataclasses.replace(clip.text, causal=False)), "text.causal = True")
    refused(dataclasses.replace(clip, bias_init=-10.0), "logit bias")
