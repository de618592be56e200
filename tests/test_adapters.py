"""Models of other libraries: their embeddings and ours agree, in memory and from their files, with nothing downloaded.

Gives: tests of silc.adapters and of silc.load on folders in the form of transformers.
Used by: pytest. What needs transformers or open_clip is skipped where they are not; a stand-in has open_clip's shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_transformers import GRID, PATCH, VOCAB, build, off
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from silc import load
from silc.adapters import from_open_clip, from_transformers
from silc.eval.run import evaluate, fingerprint
from silc.model.silc import Silc
from silc.model.towers import Readout
from silc.opening import open_model
from silc.predict import Predictor

SIDE = PATCH * GRID
FAMILIES = ["clip_quick", "siglip", "siglip2"]
TEXTS = ["red circle", "a blue square on the left side of a very green triangle", "dog"]
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "red", "blue", "green", "circle", "square", "triangle", "dog", "of"]


def write_tokenizer(folder: Path, family: str) -> Any:
    """tokenizer.json as the family has it (CLIP: begin and end, the last ids), and transformers' object for it."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'silc[dev]'")
    words = {word: i for i, word in enumerate(dict.fromkeys(PIECES))}
    begin, end, pad = ("<start>", "<end>", "<end>") if family.startswith("clip") else ("", "<eos>", "<pad>")
    if begin:
        words |= {begin: VOCAB - 2, end: VOCAB - 1}
    pieces = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    template = f"{begin} $A {end}".strip()
    pieces.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, words[t]) for t in {begin, end} - {""}])
    slow = hf.PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token=end, pad_token=pad, unk_token="<unk>")
    slow.save_pretrained(folder)
    return slow


def write_folder(folder: Path, kind: str) -> tuple[Any, Any]:
    """A tiny random model with its files; the model and its processor."""
    theirs = build(kind)
    theirs.save_pretrained(folder)
    stated = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    images = SimpleNamespace(to_dict=lambda: stated)
    return theirs, SimpleNamespace(image_processor=images, tokenizer=write_tokenizer(folder, kind))


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Silc, Silc]:
    """(the live model adapted, the same model from its folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs, processor = write_folder(folder, request.param)
    return from_transformers(theirs, processor), load(folder)


# ---------------------------------------------------------------- transformers


@torch.no_grad()
def test_live_and_loaded_models_give_the_same(both: tuple[Silc, Silc]) -> None:
    live, loaded = both
    pixels = torch.randn(3, 3, SIDE, SIDE)
    assert live.config.preprocess == loaded.config.preprocess
    assert live.config.preprocess.mean == (0.5, 0.4, 0.3) and live.config.preprocess.size == SIDE
    assert live.tokenizer is not None and loaded.tokenizer is not None
    assert torch.equal(live.tokenizer(TEXTS), loaded.tokenizer(TEXTS))
    assert off(live.encode_text(TEXTS), loaded.encode_text(TEXTS)) < 1e-4
    assert torch.pdist(live.encode_text(TEXTS)).min() > 1e-2
    assert off(live.encode_image(pixels), loaded.encode_image(pixels)) < 1e-4
    assert off(live.encode_pooled(pixels), loaded.encode_pooled(pixels)) < 1e-4
    assert off(live.project(live.encode_pooled(pixels)), loaded.encode_image(pixels)) < 1e-4
    for readout in get_args(Readout):
        dense = live.encode_dense(pixels, readout)
        assert dense.shape[-2:] == (GRID, GRID) and off(dense, loaded.encode_dense(pixels, readout)) < 1e-4
    wide = torch.randn(1, 3, SIDE, 2 * SIDE)
    assert off(live.encode_dense(wide), loaded.encode_dense(wide)) < 1e-4
    assert live.scale.shape == (1,) and off(live.scale, loaded.scale) < 1e-5
    assert (live.bias is None) == (loaded.bias is None) and (live.bias is None or torch.equal(live.bias, loaded.bias))


def test_dense_features_follow_weights_that_change(both: tuple[Silc, Silc]) -> None:
    live, _ = both
    pixels, kept = torch.randn(1, 3, SIDE, SIDE), {k: v.clone() for k, v in live.state_dict().items()}
    with torch.inference_mode():
        before = live.encode_dense(pixels)
        assert torch.equal(before, live.encode_dense(pixels))
    name = next(n for n, _ in live.named_parameters() if n.endswith("layers.1.mlp.fc2.weight") and "vision" in n)
    with torch.no_grad():
        dict(live.named_parameters())[name].mul_(3)
    assert off(live.encode_dense(pixels), before) > 1e-2
    live.load_state_dict(kept)
    assert off(live.encode_dense(pixels), before) < 1e-6


def test_every_task_takes_an_adapted_model(both: tuple[Silc, Silc], pairs: Path) -> None:
    live, loaded = both
    live.train()
    found, expected = (evaluate(model, {"retrieval": pairs})["retrieval"].metrics for model in both)
    assert found == pytest.approx(expected) and live.training
    live.eval()
    picture = next(pairs.glob("*.png"))
    maps = [Predictor(model).heatmap(picture, ["red", "dog"]) for model in (live, loaded)]
    assert maps[0].shape == (2, 48, 56) and off(*maps) < 1e-3
    assert fingerprint(live) == fingerprint(live) != fingerprint(loaded)
    with pytest.raises(ValueError, match="another library"):
        live.save(Path("nowhere"))


def test_an_adapted_model_that_is_unlike_its_family_has_no_dense_features(tmp_path: Path) -> None:
    theirs, processor = write_folder(tmp_path, "clip_quick")
    theirs.vision_model.encoder.layers[0].mlp.register_forward_hook(lambda module, given, out: 2 * out)
    live = from_transformers(theirs, processor)
    assert live.encode_image(torch.randn(1, 3, SIDE, SIDE)).shape == (1, 20)
    with pytest.raises(ValueError, match="other embeddings"):
        live.encode_dense(torch.randn(1, 3, SIDE, SIDE))
    with pytest.raises(ValueError, match="model_type 'None'"):
        from_transformers(nn.Linear(2, 2), processor)


# ---------------------------------------------------------------- folders


def test_a_folder_says_what_was_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path, "siglip")
    opened = open_model(tmp_path)
    report = opened.report
    assert not report.new and not opened.model.training and report.share == 1
    load(tmp_path)
    assert f"Loaded {len(report.loaded)}/{len(report.loaded)} tensors" in capsys.readouterr().err


def test_shards_are_put_together(tmp_path: Path) -> None:
    write_folder(tmp_path, "clip_quick")
    whole = load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"part-{number}.safetensors")
    placed = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    assert fingerprint(load(tmp_path)) == fingerprint(whole)


def test_the_first_siglip_drops_punctuation_and_pads_with_its_end(tmp_path: Path) -> None:
    write_folder(tmp_path, "siglip")
    rules = json.loads((tmp_path / "tokenizer_config.json").read_text())
    ids = {}
    for name in ("SiglipTokenizer", "Siglip2Tokenizer"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**rules, "tokenizer_class": name}))
        tokenizer = load(tmp_path).tokenizer
        assert tokenizer is not None
        ids[name] = tokenizer(["Red, circle!"])[0].tolist()
    assert ids["SiglipTokenizer"][2:] == [1] * 10 and ids["Siglip2Tokenizer"][-1] == 0
    assert len(set(ids["Siglip2Tokenizer"])) == 5, "comma and mark are unknown words there"


@pytest.mark.parametrize(("spoil", "message"), [
    ("weights", "there is no model.safetensors in it.$"), ("pickle", "would run code"), ("damage", "is damaged"),
    ("tokenizer", "holds no tokenizer.json"), ("family", "Perhaps you meant 'siglip'"), ("json", "not valid JSON"),
    ("vocabulary", "do not belong together"),
])
def test_what_a_folder_lacks_is_one_sentence(tmp_path: Path, spoil: str, message: str) -> None:
    write_folder(tmp_path, "siglip")
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if spoil in ("weights", "pickle"):
        weights.unlink()
    if spoil == "pickle":
        (tmp_path / "pytorch_model.bin").touch()
    if spoil == "damage":
        weights.write_bytes(b"nothing")
    if spoil == "tokenizer":
        (tmp_path / "tokenizer.json").unlink()
    if spoil == "family":
        config.write_text(config.read_text().replace('"model_type": "siglip"', '"model_type": "sigclip"'))
    if spoil == "json":
        config.write_text("{")
    if spoil == "vocabulary":
        pieces = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        pieces.add_tokens([f"word{i}" for i in range(VOCAB)])
        pieces.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(error.value).count("\n") == 0


# ---------------------------------------------------------------- open_clip


class Attention(nn.Module):
    """A residual block as open_clip's ResidualAttentionBlock names its parts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Visual(nn.Module):
    """A stand-in of open_clip's VisionTransformer: its names, its computation, its shapes."""

    def __init__(self, width: int = 24, embed: int = 16) -> None:
        super().__init__()
        self.image_size, self.patch_size = (SIDE, SIDE), (PATCH, PATCH)
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(GRID**2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Attention(width, 3) for _ in range(2))
        self.proj = nn.Parameter(torch.randn(width, embed))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x)[:, 0] @ self.proj


class OpenClip(nn.Module):
    """A stand-in of open_clip's CLIP."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual, self.token = visual, nn.Embedding(300, 16)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), None
        self.context_length = 8

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        features = self.token(text).mean(1)
        return F.normalize(features, dim=-1) if normalize else features


class Compose(SimpleNamespace):
    pass


class Resize(SimpleNamespace):
    pass


class CenterCrop(SimpleNamespace):
    pass


class Normalize(SimpleNamespace):
    pass


def transform(size: Any = SIDE, crop: int | None = SIDE) -> Compose:
    """As torchvision's transforms lie in what open_clip returns."""
    parts = [Resize(size=size, interpolation=SimpleNamespace(value="bicubic"))]
    parts += [CenterCrop(size=(crop, crop))] if crop else []
    return Compose(transforms=[*parts, Normalize(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))])


def tokens(texts: list[str]) -> Tensor:
    return torch.tensor([[*text.encode()[:8], *[0] * 8][:8] for text in texts])


def test_a_model_shaped_like_open_clips_gives_its_embeddings_and_dense_features(pairs: Path) -> None:
    torch.manual_seed(0)
    theirs = OpenClip(Visual()).eval()
    model = from_open_clip(theirs, transform(), tokens)
    seen, pixels = model.config.preprocess, torch.randn(2, 3, SIDE, SIDE)
    assert (seen.size, seen.resize, seen.interpolation, seen.mean) == (SIDE, "crop", "bicubic", (0.5, 0.4, 0.3))
    with torch.no_grad():
        assert off(model.encode_image(pixels), theirs.encode_image(pixels, normalize=True)) < 1e-5
        assert off(model.encode_text(TEXTS), theirs.encode_text(tokens(TEXTS), normalize=True)) < 1e-5
        # the last block's value path, by hand
        visual = theirs.visual
        x = torch.cat([visual.class_embedding.expand(2, 1, -1), visual.conv1(pixels).flatten(2).transpose(1, 2)], 1)
        x = visual.transformer.resblocks[0](visual.ln_pre(x + visual.positional_embedding))
        last = visual.transformer.resblocks[1]
        value = F.linear(last.ln_1(x), last.attn.in_proj_weight[48:], last.attn.in_proj_bias[48:])
        x = x + last.attn.out_proj(value)
        x = visual.ln_post(x + last.mlp(last.ln_2(x)))[:, 1:] @ visual.proj
        dense = model.encode_dense(pixels, "value").flatten(2).transpose(1, 2)
        assert off(dense, F.normalize(x, dim=-1)) < 1e-4
    assert model.scale.item() == pytest.approx(torch.tensor(2.0).exp().item()) and model.bias is None
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert "text_to_image_r1" in evaluate(model, {"retrieval": pairs})["retrieval"].metrics


def test_an_unknown_image_tower_still_has_image_embeddings() -> None:
    visual = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 16))
    model = from_open_clip(OpenClip(visual), transform((SIDE, SIDE), None), tokens)
    assert model.config.preprocess.resize == "squash"
    assert model.encode_image(torch.randn(2, 3, SIDE, SIDE)).shape == (2, 16)
    with pytest.raises(ValueError, match="does not know image towers like Sequential"):
        model.encode_dense(torch.randn(2, 3, SIDE, SIDE))
    scaled = Visual()
    scaled.transformer.resblocks[0].register_parameter("ls_1", nn.Parameter(torch.ones(24)))
    with pytest.raises(ValueError, match=r"no place for transformer\.resblocks\.0\.ls_1"):
        from_open_clip(OpenClip(scaled), transform(), tokens).encode_dense(torch.randn(1, 3, SIDE, SIDE))


@pytest.mark.parametrize(("given", "message"), [
    (None, "no transforms"), (transform(256), "sides"), (transform(SIDE, None), "sides"),
    (Compose(transforms=[Normalize(mean=(0, 0, 0), std=(1, 1, 1))]), "needs a Resize"),
])
def test_a_transform_without_an_equal_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_open_clip(OpenClip(Visual()), given, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP"])
def test_models_that_open_clip_itself_builds(open_clip: ModuleType, name: str) -> None:
    torch.manual_seed(0)
    theirs, _, preprocess = open_clip.create_model_and_transforms(name, load_weights=False)
    theirs.eval()
    for key, p in theirs.visual.named_parameters():
        p.data.add_(0.02 * torch.randn_like(p)) if p.dim() < 2 or "proj" in key else None
    model = from_open_clip(theirs, preprocess, open_clip.tokenize)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert off(model.encode_image(pixels), theirs.encode_image(pixels, normalize=True)) < 1e-4
        grid, width = model.config.image.grid, theirs.encode_image(pixels).shape[1]
        assert model.encode_dense(pixels).shape == (1, width, grid, grid)
