"""CAT-Seg's published checkpoint layout: read, and its logits against a second build of the same layers.

Gives: a random file in that layout; towers and head written anew, straight from the tensors of the file by their names.
SILC_CATSEG=model.pth compares a real file in the same way.
Used by: pytest.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import silc
from silc.cli import main
from silc.model.detectron2 import CLIP, HEAD
from silc.opening import open_model

Tensors = dict[str, Tensor]
WIDTH, WORDS, DIM, DEPTH, PATCH, VOCAB, LENGTH = 128, 64, 24, 6, 4, 60, 12
C, DECODER, GUIDES, PROJECTED = 32, (32, 16), (20, 12), (8, 4)
WINDOW, GRID = 3, 6


def published(seed: int = 0) -> Tensors:
    """A small file in the published layout: names, shapes, buffers and the fused biases beside split weights."""
    torch.manual_seed(seed)
    t: Tensors = {}

    def put(name: str, *shape: int, std: float = 0.2) -> None:
        t[name] = torch.randn(*shape) * std

    def linear(name: str, out: int, into: int) -> None:
        put(f"{name}.weight", out, into, std=into**-0.5)
        put(f"{name}.bias", out)

    def norm(name: str, width: int) -> None:
        t[f"{name}.weight"], t[f"{name}.bias"] = 1 + torch.randn(width) * 0.1, torch.randn(width) * 0.1

    def conv(name: str, *shape: int, bias: int = 0) -> None:
        put(f"{name}.weight", *shape, std=math.prod(shape[1:]) ** -0.5)
        if bias:
            put(f"{name}.bias", bias)

    for prefix, width, depth in ((CLIP + "visual.transformer.", WIDTH, DEPTH), (CLIP + "transformer.", WORDS, 2)):
        for i in range(depth):
            block = f"{prefix}resblocks.{i}."
            for x in "qkv":
                put(f"{block}attn.{x}_proj_weight", width, width, std=width**-0.5)
            put(f"{block}attn.in_proj_bias", 3 * width)
            linear(f"{block}attn.out_proj", width, width)
            linear(f"{block}mlp.c_fc", 4 * width, width)
            linear(f"{block}mlp.c_proj", width, 4 * width)
            norm(f"{block}ln_1", width)
            norm(f"{block}ln_2", width)
    put(CLIP + "visual.conv1.weight", WIDTH, 3, PATCH, PATCH)
    put(CLIP + "visual.class_embedding", WIDTH)
    put(CLIP + "visual.positional_embedding", 4 * 4 + 1, WIDTH)  # of another grid than the head's
    put(CLIP + "visual.proj", WIDTH, DIM)
    norm(CLIP + "visual.ln_pre", WIDTH)
    norm(CLIP + "visual.ln_post", WIDTH)
    put(CLIP + "token_embedding.weight", VOCAB, WORDS)
    put(CLIP + "positional_embedding", LENGTH, WORDS)
    norm(CLIP + "ln_final", WORDS)
    put(CLIP + "text_projection", WORDS, DIM)
    t[CLIP + "logit_scale"] = torch.tensor(4.6)
    for i in range(2):
        for j in (1, 2):
            block = f"{HEAD}layers.{i}.swin_block.block_{j}."
            for x, into in (("q", 2 * C), ("k", 2 * C), ("v", C), ("proj", C)):
                linear(f"{block}attn.{x}", C, into)
            linear(f"{block}mlp.fc1", 4 * C, C)
            linear(f"{block}mlp.fc2", C, 4 * C)
            norm(f"{block}norm1", C)
            norm(f"{block}norm2", C)
        t[f"{HEAD}layers.{i}.swin_block.block_2.attn_mask"] = torch.zeros((GRID // WINDOW) ** 2, WINDOW**2, WINDOW**2)
        norm(f"{HEAD}layers.{i}.swin_block.guidance_norm", C)
        over = f"{HEAD}layers.{i}.attention."
        for x, into in (("q", 2 * C), ("k", 2 * C), ("v", C)):
            linear(f"{over}attention.{x}", C, into)
        linear(f"{over}MLP.0", 4 * C, C)
        linear(f"{over}MLP.2", C, 4 * C)
        norm(f"{over}norm1", C)
        norm(f"{over}norm2", C)
        put(f"{over}padding_tokens", 1, 1, C)
        put(f"{over}padding_guidance", 1, 1, C)
    conv(HEAD + "conv1", C, 1, 7, 7, bias=C)
    conv(HEAD + "guidance_projection.0", C, DIM, 3, 3, bias=C)
    linear(HEAD + "text_guidance_projection.0", C, DIM)
    widths = (C, *DECODER)
    for j in range(2):
        conv(f"{HEAD}decoder_guidance_projection.{j}.0", PROJECTED[j], GUIDES[j], 3, 3, bias=PROJECTED[j])
        up = f"{HEAD}decoder{j + 1}."
        conv(f"{up}up", widths[j], widths[j] - PROJECTED[j], 2, 2, bias=widths[j] - PROJECTED[j])
        conv(f"{up}conv.double_conv.0", widths[j + 1], widths[j], 3, 3)
        conv(f"{up}conv.double_conv.3", widths[j + 1], widths[j + 1], 3, 3)
        norm(f"{up}conv.double_conv.1", widths[j + 1])
        norm(f"{up}conv.double_conv.4", widths[j + 1])
        conv(f"upsample{j + 1}", WIDTH, GUIDES[j], 2 ** (j + 1), 2 ** (j + 1), bias=GUIDES[j])
    conv(HEAD + "head", 1, DECODER[1], 3, 3, bias=1)
    t["pixel_mean"], t["clip_pixel_std"] = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    return t


# ---------------------------------------------------------------- a second build, from names


class Naive:
    def __init__(self, tensors: Tensors) -> None:
        self.t = {name: tensor.float() for name, tensor in tensors.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.t[f"{name}.weight"].T + self.t[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def block(self, name: str, x: Tensor, causal: bool = False, dense: bool = False) -> Tensor:
        """[N, D], one sequence."""
        y, bias, heads = self.norm(f"{name}ln_1", x), self.t[f"{name}attn.in_proj_bias"].chunk(3), x.shape[1] // 64
        q, k, v = (y @ self.t[f"{name}attn.{c}_proj_weight"].T + b for c, b in zip("qkv", bias))
        if dense:  # every token's own value, on top of what the class token was
            x = x[:1] + self.linear(f"{name}attn.out_proj", v)
        else:
            parts = []
            for h in range(heads):
                at = slice(64 * h, 64 * (h + 1))
                scores = torch.einsum("nd,md->nm", q[:, at], k[:, at]) / 8
                if causal:
                    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
                parts.append(torch.einsum("nm,md->nd", scores.softmax(-1), v[:, at]))
            x = x + self.linear(f"{name}attn.out_proj", torch.cat(parts, 1))
        hidden = self.linear(f"{name}mlp.c_fc", self.norm(f"{name}ln_2", x))
        return x + self.linear(f"{name}mlp.c_proj", hidden / (1 + torch.exp(-1.702 * hidden)))

    def depth(self, prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in self.t if name.startswith(prefix)})

    def image(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[3, S, S] -> dense [D, g, g], two inner maps [W, g, g]."""
        v, weight = CLIP + "visual.", self.t[CLIP + "visual.conv1.weight"]
        patches = F.conv2d(pixels[None], weight, stride=weight.shape[2])[0]
        side, width = patches.shape[1], patches.shape[0]
        table = self.t[v + "positional_embedding"]
        square = math.isqrt(len(table) - 1)
        grid = table[1:].T.reshape(1, width, square, square)
        grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False) if square != side else grid
        tokens = patches.flatten(1).T + grid[0].flatten(1).T
        x = torch.cat([(self.t[v + "class_embedding"] + table[0])[None], tokens])
        x, kept = self.norm(v + "ln_pre", x), []
        depth = self.depth(v + "transformer.resblocks.")
        for i in range(depth):
            x = self.block(f"{v}transformer.resblocks.{i}.", x, dense=i == depth - 1)
            if i in (depth // 3 - 1, 2 * (depth // 3) - 1):  # 3 and 7 of 12, 7 and 15 of 24
                kept.append(x[1:].T.unflatten(1, (side, side)))
        dense = (self.norm(v + "ln_post", x) @ self.t[v + "proj"])[1:]
        return dense.T.unflatten(1, (side, side)), kept[0], kept[1]

    def text(self, ids: Tensor) -> Tensor:
        """[length] -> [D], read where the highest id stands."""
        x = self.t[CLIP + "token_embedding.weight"][ids] + self.t[CLIP + "positional_embedding"]
        for i in range(self.depth(CLIP + "transformer.resblocks.")):
            x = self.block(f"{CLIP}transformer.resblocks.{i}.", x, causal=True)
        return self.norm(CLIP + "ln_final", x)[ids.argmax()] @ self.t[CLIP + "text_projection"]

    def swin(self, name: str, x: Tensor, guide: Tensor, shift: int, heads: int = 4) -> Tensor:
        """One class: [g, g, C]."""
        side, _, c = x.shape
        mask = self.t[name.replace("block_1", "block_2") + "attn_mask"]
        window, d = math.isqrt(mask.shape[1]), c // heads
        y = self.norm(f"{name}norm1", x)
        both = torch.cat([y, guide], -1)
        q, k, v = (self.linear(f"{name}attn.{w}", z) for w, z in (("q", both), ("k", both), ("v", y)))
        mixed = torch.zeros_like(x)
        at = [(r, s) for r in range(side) for s in range(side)]

        def cell(r: int, s: int) -> tuple[int, ...]:
            row, column = (r - shift) % side, (s - shift) % side
            wraps = (r < shift and row >= side - window, s < shift and column >= side - window)
            return row // window, column // window, *wraps

        groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for place in at:
            groups.setdefault(cell(*place), []).append(place)
        for members in groups.values():
            rows, columns = (torch.tensor(axis) for axis in zip(*members))
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                scores = q[rows, columns, part] @ k[rows, columns, part].T / d**0.5
                mixed[rows, columns, part] = scores.softmax(-1) @ v[rows, columns, part]
        x = x + self.linear(f"{name}attn.proj", mixed)
        return x + self.linear(f"{name}mlp.fc2", F.gelu(self.linear(f"{name}mlp.fc1", self.norm(f"{name}norm2", x))))

    def over_classes(self, name: str, x: Tensor, guide: Tensor, heads: int = 4) -> Tensor:
        """One position: [T, C], really padded."""
        missing, d = max(0, 256 - len(x)), x.shape[1] // heads
        y = torch.cat([x, self.t[f"{name}padding_tokens"][0].expand(missing, -1)])
        guide = torch.cat([guide, self.t[f"{name}padding_guidance"][0].expand(missing, -1)])
        normed = self.norm(f"{name}norm1", y)
        both = torch.cat([normed, guide], -1)
        q, k = (F.elu(self.linear(f"{name}attention.{w}", both)) + 1 for w in "qk")
        v, parts = self.linear(f"{name}attention.v", normed), []
        for h in range(heads):
            at = slice(h * d, (h + 1) * d)
            weights = q[:, at] @ k[:, at].T
            parts.append(weights @ v[:, at] / (weights.sum(1, keepdim=True) + 1e-6))
        y = y + torch.cat(parts, 1)
        y = y + self.linear(f"{name}MLP.2", F.relu(self.linear(f"{name}MLP.0", self.norm(f"{name}norm2", y))))
        return x + y[: len(x)]

    def conv(self, name: str, x: Tensor, pad: int) -> Tensor:
        return F.conv2d(x, self.t[f"{name}.weight"], self.t.get(f"{name}.bias"), padding=pad)

    def enlarged(self, name: str, x: Tensor) -> Tensor:
        weight = self.t[f"{name}.weight"]
        return F.conv_transpose2d(x, weight, self.t[f"{name}.bias"], stride=weight.shape[2])

    def group_norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, x.shape[1] // 16, self.t[f"{name}.weight"], self.t[f"{name}.bias"])

    def logits(self, pixels: Tensor, texts: Tensor) -> Tensor:
        """[3, S, S], ids [T, length] -> [T, 4g, 4g]; no more than 256 classes."""
        dense, *inner = self.image(pixels)
        words = F.normalize(torch.stack([self.text(ids) for ids in texts]), dim=1)
        cost = torch.einsum("dhw,td->thw", F.normalize(dense, dim=0), words)
        x = self.conv(HEAD + "conv1", cost[:, None], 3).permute(0, 2, 3, 1)
        picture = F.relu(self.conv(HEAD + "guidance_projection.0", dense[None], 1))[0].permute(1, 2, 0)
        guide = F.relu(self.linear(HEAD + "text_guidance_projection.0", words))
        for i in range(self.depth(HEAD + "layers.")):
            layer = f"{HEAD}layers.{i}."
            seen = self.norm(f"{layer}swin_block.guidance_norm", picture)
            window = math.isqrt(self.t[f"{layer}swin_block.block_2.attn_mask"].shape[1])
            for j, shift in ((1, 0), (2, window // 2)):
                x = torch.stack([self.swin(f"{layer}swin_block.block_{j}.", one, seen, shift) for one in x])
            flat = x.flatten(1, 2)
            places = [self.over_classes(f"{layer}attention.", flat[:, p], guide) for p in range(flat.shape[1])]
            x = torch.stack(places, 1)
            x = x.unflatten(1, cost.shape[1:])
        planes = x.permute(0, 3, 1, 2)
        for j, found in enumerate(inner):
            finer = self.enlarged(f"upsample{j + 1}", found[None])
            own = self.conv(f"{HEAD}decoder_guidance_projection.{j}.0", finer, 1)
            up = f"{HEAD}decoder{j + 1}."
            planes = torch.cat([self.enlarged(f"{up}up", planes), F.relu(own).expand(len(planes), -1, -1, -1)], 1)
            for k in (0, 3):
                planes = self.conv(f"{up}conv.double_conv.{k}", planes, 1)
                planes = F.relu(self.group_norm(f"{up}conv.double_conv.{k + 1}", planes))
        return self.conv(HEAD + "head", planes, 1)[:, 0]


# ---------------------------------------------------------------- tests


def compare(file: Path, classes: int, vocab: int, tolerance: float) -> None:
    model = open_model(file).model
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    naive = Naive(theirs.get("model", theirs))
    torch.manual_seed(5)
    side, length = model.config.image.image_size, model.config.text.length
    pixels = torch.randn(2, 3, side, side)
    ids = torch.randint(1, vocab - 1, (classes, length))
    ids[:, -1] = vocab - 1
    with torch.inference_mode():
        mine = model.segment(pixels, model.encode_text(ids))
        for i in range(len(pixels)):
            wanted = naive.logits(pixels[i], ids)
            error = (mine[i] - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, f"logits differ by {error:.2g} of their largest"


def test_logits_are_those_of_a_second_build_of_the_same_file(tmp_path: Path) -> None:
    torch.save({"model": published(), "iteration": 80_000}, tmp_path / "model_base.pth")
    compare(tmp_path / "model_base.pth", 7, VOCAB, 1e-4)


def test_a_real_file_agrees_too() -> None:
    file = os.environ.get("SILC_CATSEG", "")
    if not file:
        pytest.skip("no published CAT-Seg checkpoint here: set SILC_CATSEG to model_base.pth or model_large.pth")
    compare(Path(file), 20, 49408, 1e-3)


def test_settings_are_read_off_the_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(published(), tmp_path / "model.pth")
    opened = open_model(tmp_path / "model.pth")
    c, report = opened.model.config, opened.report
    assert opened.library == "catseg" and not report.new
    assert (c.image.image_size, c.image.patch, c.image.depth, c.image.act) == (GRID * PATCH, PATCH, DEPTH, "quick_gelu")
    assert (c.catseg.window, c.catseg.width, c.catseg.decoder, c.catseg.guides) == (WINDOW, C, DECODER, GUIDES)
    assert set(report.ignored) == {n for n in published() if "attn_mask" in n or "pixel" in n}
    main(["inspect", str(tmp_path / "model.pth")])
    assert "CAT-Seg" in capsys.readouterr().out
    with pytest.raises(ValueError, match="tokenizer"):
        opened.model.encode_text(["a"])


def test_an_incomplete_or_older_file_is_refused(tmp_path: Path) -> None:
    whole = published()
    for name, said in ((HEAD + "head.weight", "lacks"), (HEAD + "decoder1.up.weight", "CVPR 2024")):
        torch.save({k: v for k, v in whole.items() if k != name}, tmp_path / "model.pth")
        with pytest.raises(ValueError, match=said):
            silc.load(tmp_path / "model.pth")
