"""The towers against plain formulas written out here, and the model's folder on disk.

Gives: packing, sizes, position tables, read-outs, pooling, text-patch maps, precision, save and open, bad input.
Used by: pytest.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from silc.config import ImageTowerConfig, ModelConfig, PrototypeConfig, TextTowerConfig
from silc.model.layers import MapHead, pack, resize_grid, unpack
from silc.model.prototypes import Projected, PrototypeHead
from silc.model.silc import Silc
from silc.model.towers import ImageTower, TextTower

POOLS = ["map", "cls", "mean"]
WIDTH, HEADS, PATCH = 24, 3, 4


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Every parameter random, biases and norms too: zeros and ones would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.3
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.data = torch.randn(p.shape, generator=generator) * scale + centre


def tiny(image_pool: str = "map", **text: Any) -> Silc:
    """A model of 16 x 16 pictures (a 4 x 4 grid), width 24, all parameters random; `text` changes the text tower."""
    pre_norm, proj = {"map": (False, "none"), "cls": (True, "linear"), "mean": (False, "affine")}[image_pool]
    sizes: dict[str, Any] = {"image_size": 16, "patch": PATCH, "width": WIDTH, "depth": 3, "heads": HEADS, "mlp": 40}
    image = ImageTowerConfig(**sizes, pool=image_pool, pre_norm=pre_norm, proj=proj)  # type: ignore[arg-type]
    words = TextTowerConfig(**{"vocab": 30, "length": 8, "width": 16, "depth": 2, "heads": 2, "mlp": 20, **text})
    model = Silc(ModelConfig(image, words, embed_dim=WIDTH if image_pool == "map" else 20)).eval()
    randomise(model)
    return model


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    assert a.shape == b.shape
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-12))


# ---------------------------------------------------------------- plain formulas


def plain_attention(attention: nn.Module, query: Tensor, x: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k / sqrt d) v for one picture [N, D], head by head."""
    q, k, v = attention.q(query), attention.k(x), attention.v(x)
    d, heads = q.shape[-1] // attention.heads, []
    for h in range(attention.heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[:, part] @ k[:, part].T / math.sqrt(d)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, part])
    return attention.out(torch.cat(heads, -1))


def plain_block(block: nn.Module, x: Tensor, causal: bool = False) -> Tensor:
    x = x + plain_attention(block.attention, block.norm1(x), block.norm1(x), causal)
    return x + block.mlp(block.norm2(x))


def plain_embed(tower: ImageTower, picture: Tensor) -> Tensor:
    """Patch by patch, row by row, of one picture [3, H, W]."""
    p, (height, width) = PATCH, picture.shape[1:]
    table = resize_grid(tower.position, height // p, width // p)
    kernel, rows = tower.patch.weight.flatten(1), []
    for i in range(height // p):
        for j in range(width // p):
            cut = picture[:, i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(-1)
            rows.append(kernel @ cut + tower.patch.bias + table[i, j])
    if tower.config.pool == "cls":
        rows.insert(0, (tower.cls + tower.cls_position)[0])
    return tower.pre_norm(torch.stack(rows))


def plain_image(tower: ImageTower, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one picture: pooled [E], and per patch [N, E] the `tokens` and the `value` read-out."""
    x = plain_embed(tower, picture)
    for block in tower.blocks[:-1]:
        x = plain_block(block, x)
    last = tower.blocks[-1]
    alone = x + last.attention.out(last.attention.v(last.norm1(x)))
    value, tokens = tower.norm(alone + last.mlp(last.norm2(alone))), tower.norm(plain_block(last, x))
    if tower.config.pool == "cls":
        return tower.proj(tokens[0]), tower.proj(tokens[1:]), tower.proj(value[1:])
    if tower.config.pool == "mean":
        return tower.proj(tokens.mean(0)), tower.proj(tokens), tower.proj(value)
    head = tower.head

    def after(mixed: Tensor) -> Tensor:
        return mixed + head.mlp(head.norm(mixed))

    one_hot = [after(head.attention.out(head.attention.v(x))) for x in (tokens, value)]
    return after(plain_attention(head.attention, head.probe, tokens))[0], one_hot[0], one_hot[1]


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_image_tower_is_the_plain_formula(pool: str) -> None:
    model = tiny(pool)
    pixels = torch.randn(2, 3, 12, 20)
    for picture, pooled, tokens, value in zip(
        pixels, model.image([pixels])[0].pooled, model.image.dense(pixels, "tokens"), model.image.dense(pixels, "value")
    ):
        expected = plain_image(model.image, picture)
        assert close(pooled, expected[0])
        assert close(tokens.flatten(1).T, expected[1])
        assert close(value.flatten(1).T, expected[2])
    auto = "value" if pool == "cls" else "tokens"
    assert torch.equal(model.image.dense(pixels), model.image.dense(pixels, auto))
    assert not close(model.image.dense(pixels, "tokens"), model.image.dense(pixels, "value"), 1e-2)


@torch.no_grad()
def test_tokens_are_the_last_hidden_states_without_the_class_token() -> None:
    for pool in POOLS:
        model = tiny(pool)
        pixels = torch.randn(2, 3, 8, 16)
        tokens = model.image([pixels])[0].tokens
        assert tokens.shape == (2, 8, WIDTH)
        if pool != "map":
            dense = model.image.dense(pixels, "tokens").flatten(2).transpose(1, 2)
            assert close(model.image.proj(tokens), dense)


@pytest.mark.parametrize("pool", ["last", "eos", "mean"])
@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_text_tower_is_the_plain_formula(pool: str, causal: bool) -> None:
    tower = tiny(causal=causal, pool=pool, eos_id=7, pad_id=1).text
    ids = torch.tensor([[3, 7, 1, 1, 1, 1], [3, 4, 5, 7, 7, 1], [7, 3, 3, 3, 3, 3], [9, 8, 6, 5, 4, 7]])
    expected = []
    for row in ids:
        x = tower.token.weight[row] + tower.position[: len(row)]
        for block in tower.blocks:
            x = plain_block(block, x, causal)
        x = tower.norm(x)
        first_end = row.tolist().index(7)
        real = [i for i, token in enumerate(row.tolist()) if token != 1]
        expected.append({"last": x[-1], "eos": x[first_end], "mean": x[real].mean(0)}[pool])
    assert close(tower(ids), tower.proj(torch.stack(expected)))


@torch.no_grad()
def test_a_causal_text_does_not_depend_on_what_follows_its_end() -> None:
    ids = torch.tensor([[3, 4, 7, 1, 1, 1, 1, 1]])
    other = torch.tensor([[3, 4, 7, 9, 7, 2, 5, 6]])
    causal, full = (tiny("cls", causal=c, pool="eos", eos_id=7) for c in (True, False))
    assert close(causal.encode_text(ids), causal.encode_text(other), 1e-6)
    assert not close(full.encode_text(ids), full.encode_text(other), 1e-3)


@torch.no_grad()
def test_a_text_of_padding_only_has_a_finite_mean() -> None:
    assert tiny(pool="mean", pad_id=1).encode_text(torch.ones(1, 8, dtype=torch.long)).isfinite().all()


# ---------------------------------------------------------------- packing


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_unpack_undoes_pack(shapes: list[tuple[int, int]], width: int) -> None:
    sequences = [torch.randn(b, n, width) for b, n in shapes]
    packed, remembered = pack(sequences)
    assert packed.shape == (sum(b * n for b, n in shapes), width) and remembered == tuple(shapes)
    assert all(torch.equal(a, b) for a, b in zip(unpack(packed, remembered), sequences, strict=True))


Group = tuple[Tensor, Tensor | None]
"""Pictures and their mask."""


def run(tower: ImageTower, calls: list[list[Group]], token: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Values of all groups, and the gradients of a fixed random reading of them, over the given calls."""
    pixels = [g.requires_grad_() for call in calls for g, _ in call]
    leaves = dict(tower.named_parameters()) | {"token": token} | {f"pixels {i}": x for i, x in enumerate(pixels)}
    encoded = [e for call in calls for e in tower([g for g, _ in call], [m for _, m in call], token)]
    values = [part for e in encoded for part in (e.pooled, e.tokens)]
    generator = torch.Generator().manual_seed(5)
    reading = torch.stack([(v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in values]).sum()
    gradients = torch.autograd.grad(reading, list(leaves.values()))
    return [v.detach() for v in values], dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_resolutions_equal_a_loop_over_them(pool: str, recompute: bool) -> None:
    tower = tiny(pool).image.double()
    tower.recompute = recompute
    token = torch.randn(WIDTH, dtype=torch.double, requires_grad=True)
    sizes = [(3, 16, 16), (5, 8, 8), (2, 12, 24), (1, 24, 8)]
    groups = [torch.randn(b, 3, h, w, dtype=torch.double) for b, h, w in sizes]
    masks = [torch.rand(3, 16) < 0.5, None, torch.rand(2, 18) < 0.3, None]
    seen: list[int] = []
    hook = tower.blocks[0].register_forward_pre_hook(lambda *_: seen.append(1))
    values, gradients = run(tower, [[(g.clone(), m) for g, m in zip(groups, masks)]], token)
    assert len(seen) == (2 if recompute else 1)
    hook.remove()
    tower.recompute = False
    expected, looped = run(tower, [[(g.clone(), m)] for g, m in zip(groups, masks)], token)
    assert all(close(a, b, 1e-10) for a, b in zip(values, expected, strict=True))
    for name, gradient in looped.items():
        if name.endswith("attention.k.bias"):  # softmax does not see what is added to all keys
            assert gradient.abs().max() < 1e-10 > gradients[name].abs().max()
        else:  # the position table is resized in fp32, so its gradient is only that exact
            assert gradient.abs().max() > 1e-3 and close(gradients[name], gradient, 1e-5), name


def test_recomputed_texts_have_the_same_gradient() -> None:
    tower, ids = tiny().text, torch.randint(0, 30, (3, 8))
    parameters = list(tower.parameters())
    plain = torch.autograd.grad(tower(ids).square().sum(), parameters)
    tower.recompute = True
    again = torch.autograd.grad(tower(ids).square().sum(), parameters)
    assert all(close(a, b) for a, b in zip(again, plain, strict=True))


@torch.no_grad()
def test_pictures_of_one_call_do_not_see_each_other() -> None:
    tower = tiny().image
    a, b = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
    before = tower([a, b])
    changed = tower([a, torch.cat([b[:1], torch.randn(1, 3, 8, 8)])])
    assert close(changed[0].pooled, before[0].pooled, 1e-6) and close(changed[1].pooled[0], before[1].pooled[0], 1e-6)
    assert not close(changed[1].pooled[1], before[1].pooled[1], 1e-2)


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_a_hidden_patch_cannot_be_seen(pool: str) -> None:
    tower, token = tiny(pool).image, torch.randn(WIDTH)
    pixels, mask = torch.randn(1, 3, 16, 16), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 6] = True  # row 1, column 2
    other = pixels.clone()
    other[:, :, 4:8, 8:12] = torch.randn(1, 3, 4, 4)
    seen, hidden = (tower([x], [m], token)[0] for x, m in ((other, None), (other, mask)))
    assert torch.equal(hidden.tokens, tower([pixels], [mask], token)[0].tokens)
    assert not close(seen.tokens, tower([pixels])[0].tokens, 1e-2)


# ---------------------------------------------------------------- sizes and positions


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_height_and_width_are_not_swapped(pool: str) -> None:
    """The mirror along the diagonal of picture, kernels and position table mirrors the features, and nothing else."""
    model, mirrored = tiny(pool), tiny(pool)
    mirrored.image.patch.weight.copy_(model.image.patch.weight.transpose(2, 3))
    mirrored.image.position.copy_(model.image.position.transpose(0, 1))
    pixels = torch.randn(2, 3, 8, 20)
    dense = model.encode_dense(pixels)
    assert dense.shape == (2, model.config.embed_dim, 2, 5)
    assert close(mirrored.encode_dense(pixels.transpose(2, 3)), dense.transpose(2, 3), 1e-4)
    assert close(mirrored.encode_image(pixels.transpose(2, 3)), model.encode_image(pixels), 1e-4)
    assert not close(model.encode_image(pixels.transpose(2, 3)), model.encode_image(pixels), 1e-2)


@pytest.mark.parametrize(("height", "width"), [(16, 18), (17, 16), (3, 16)])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(height: int, width: int) -> None:
    for encode in (tiny().encode_image, tiny().encode_dense):
        with pytest.raises(ValueError, match=f"{height} x {width} px does not fit patches of 4 px"):
            encode(torch.zeros(1, 3, height, width))


def test_the_position_table_is_untouched_at_its_own_size() -> None:
    grid = torch.randn(5, 5, 7)
    assert resize_grid(grid, 5, 5) is grid


@given(st.integers(2, 16), st.integers(1, 20), st.integers(1, 20))
@example(16, 3, 1)  # a single column: PyTorch's own kernel repeats the first row
@settings(max_examples=40, deadline=None)
def test_resizing_keeps_constants_and_the_axes_in_place(side: int, height: int, width: int) -> None:
    resized = resize_grid(torch.full((side, side, 2), 3.0), height, width)
    assert resized.shape == (height, width, 2) and close(resized, torch.full_like(resized, 3.0))
    down = torch.linspace(1, 3, side)[:, None, None].expand(side, side, 2)  # changes from row to row only
    resized = resize_grid(down, height, width)
    assert close(resized, resized[:, :1].expand_as(resized), 1e-4)
    assert height == 1 or resized[-1, 0, 0] > resized[0, 0, 0]


def test_a_small_crop_trains_the_whole_table_evenly() -> None:
    grid = torch.zeros(16, 16, 1, requires_grad=True)
    interior = slice(2, -2)

    def unevenness(resized: Tensor) -> float:
        """Largest over smallest gradient a cell of the table's interior gets from all cells of the crop's."""
        (gradient,) = torch.autograd.grad(resized.sum(), grid)
        inside = gradient[interior, interior].abs()
        return (inside.max() / inside.min().clamp(min=1e-9)).item()

    aliased = F.interpolate(grid.permute(2, 0, 1)[None], (6, 6), mode="bicubic", align_corners=False)
    even = unevenness(resize_grid(grid, 6, 6))
    assert even < 1.35
    assert unevenness(aliased) > 20 * even


# ---------------------------------------------------------------- read-outs


@torch.no_grad()
def test_per_patch_is_the_map_head_with_attention_on_one_patch() -> None:
    """Queries and keys are set so that the head's softmax is exactly one-hot on a chosen token."""
    tokens, head = torch.randn(9, WIDTH), MapHead(WIDTH, HEADS, 40, "gelu_tanh", 1e-6)
    randomise(head)
    expected = head.per_patch(tokens)
    finders = torch.linalg.pinv(tokens)  # finders[:, j] @ tokens[i] = 1 if i == j else 0
    a = head.attention
    a.q.weight.zero_()
    a.q.bias.fill_(1.0)
    a.k.bias.zero_()
    for j in range(len(tokens)):
        a.k.weight.copy_(1000 * finders[:, j].expand(WIDTH, WIDTH))
        (pooled,) = head(tokens, ((1, len(tokens)),))
        assert close(pooled[0], expected[j], 1e-5)


@torch.no_grad()
def test_the_value_path_is_the_block_on_each_token_alone() -> None:
    block = tiny().image.blocks[0]
    tokens = torch.randn(7, WIDTH)
    assert close(block.value_path(tokens), block(tokens, ((7, 1),)), 1e-5)
    assert not close(block.value_path(tokens), block(tokens, ((1, 7),)), 1e-2)


def planted(flip: bool = False) -> Silc:
    """A model set by hand: a patch's features are its mean red, green and blue; token 5 says red and 6 blue, or, with
    flip, the reverse."""
    image = ImageTowerConfig(16, PATCH, 4, 0, 1, 4, "mean", proj="linear")
    text = TextTowerConfig(vocab=8, length=3, width=4, depth=0, heads=1, mlp=4, proj="linear")
    model = Silc(ModelConfig(image, text, embed_dim=4)).eval()
    with torch.no_grad():
        for p in (model.image.patch.weight, model.image.position, model.text.position, model.text.token.weight):
            p.zero_()
        for channel in range(3):
            model.image.patch.weight[channel, channel] = 1 / PATCH**2
        red, blue = (6, 5) if flip else (5, 6)
        model.text.token.weight[red, 0] = model.text.token.weight[blue, 2] = 1.0
        for projection in (model.image.proj, model.text.proj):
            projection.weight.copy_(torch.eye(4))
    return model


@pytest.mark.parametrize("flip", [False, True])
@torch.no_grad()
def test_a_map_finds_two_planted_objects(flip: bool) -> None:
    pixels = torch.zeros(1, 3, 8, 24)
    pixels[:, 0, :, :12], pixels[:, 2, :, 12:] = 1.0, 1.0  # red on the left, blue on the right
    ids = torch.tensor([[2, 2, 5], [2, 2, 6], [2, 2, 2]])
    maps = planted(flip).patch_text_map(pixels, ids)
    assert maps.shape == (1, 3, 8, 24) and maps.abs().max() <= 1 + 1e-6
    found = maps[0, :2].argmax(0)
    assert (found[:, :12] == int(flip)).all() and (found[:, 12:] == 1 - int(flip)).all()
    assert maps[0, int(flip), :, 0].min() > 0.99  # the same direction
    down = pixels.transpose(2, 3)
    assert (planted(flip).patch_text_map(down, ids)[0, :2].argmax(0)[:12] == int(flip)).all()


# ---------------------------------------------------------------- the model


@torch.no_grad()
def test_embeddings_have_unit_length_and_logits_are_scaled_and_shifted() -> None:
    model = tiny()
    image, text = model.encode_image(torch.randn(3, 3, 16, 16)), model.encode_text(torch.randint(0, 30, (2, 8)))
    dense = model.encode_dense(torch.randn(2, 3, 8, 12))
    assert close(image.norm(dim=-1), torch.ones(3)) and close(text.norm(dim=-1), torch.ones(2))
    assert close(dense.norm(dim=1), torch.ones(2, 2, 3))
    model.logit_scale.fill_(math.log(7.0))
    model.logit_bias.fill_(-3.0)
    assert model.scale.shape == model.bias.shape == (1,)
    assert close(model.logits(image, text), 7.0 * image @ text.T - 3.0)
    softmax = Silc(dataclasses.replace(model.config, bias_init=None, scale_init=7.0))
    assert softmax.bias is None and close(softmax.logits(image, text), 7.0 * image @ text.T)


@torch.no_grad()
def test_texts_go_through_the_attached_tokenizer() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="no tokenizer"):
        model.encode_text(["a"])
    with pytest.raises(ValueError, match="list of texts"):
        model.encode_text("a")
    model.tokenizer = lambda texts: torch.tensor([[len(t)] * 8 for t in texts])
    assert torch.equal(model.encode_text(["abc", "a"]), model.encode_text(torch.tensor([[3] * 8, [1] * 8])))


def test_a_new_model_starts_as_the_formulas_say() -> None:
    torch.manual_seed(0)
    image, text = ImageTowerConfig(32, 8, 96, 2, 3, 200), TextTowerConfig(50, 16, 96, 2, 3, 200)
    model = Silc(ModelConfig(image, text, embed_dim=96))
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        if name.endswith("bias") and "logit" not in name:
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif p.dim() in (2, 4) and "token" not in name and "position" not in name and "probe" not in name:
            matrix = p.flatten(1)
            assert matrix.std().item() == pytest.approx(math.sqrt(2 / sum(matrix.shape)), rel=0.05), name
    assert model.image.position.std().item() == pytest.approx(96**-0.5, rel=0.1)
    assert model.scale.item() == pytest.approx(10.0, rel=1e-5) and model.bias.item() == -10.0  # type: ignore[union-attr]


def test_prototype_head_gives_both_sides_of_fp32_cosines_also_under_autocast() -> None:
    head = PrototypeHead(WIDTH, PrototypeConfig(count=50, hidden=16, bottleneck=8, layers=3))
    randomise(head)
    x = torch.randn(2, 4, WIDTH)
    hidden = F.gelu(head.layers[1](F.gelu(head.layers[0](x))))
    expected = F.cosine_similarity(head.layers[2](hidden)[..., None, :], head.prototypes, dim=-1)
    assert close(cosines(head(x)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rough = head(x)
    assert all(side.dtype == torch.float32 for side in rough) and close(cosines(rough), expected, 0.05)
    # both sides are unit vectors, and the gradient of the prototypes is that of PyTorch's own normalisation
    assert all(close(side.norm(dim=-1), torch.ones(side.shape[:-1])) for side in rough)
    weight = torch.randn(50, 8)
    found = torch.autograd.grad((head(x).prototypes * weight).sum(), head.prototypes)[0]
    wanted = torch.autograd.grad((F.normalize(head.prototypes, dim=-1) * weight).sum(), head.prototypes)[0]
    assert close(found, wanted)


def cosines(projected: Projected) -> torch.Tensor:
    return projected.features @ projected.prototypes.T


@pytest.mark.parametrize("pool", POOLS)
def test_bf16_autocast_stays_close_to_fp32(pool: str) -> None:
    model = tiny(pool)
    pixels, ids = torch.randn(4, 3, 16, 16), torch.randint(0, 30, (4, 8))
    parameters = [p for name, p in model.named_parameters() if "logit" not in name]

    def gradient() -> tuple[Tensor, Tensor, Tensor]:
        image, text = model.encode_image(pixels), model.encode_text(ids)
        assert image.dtype == text.dtype == torch.float32
        loss = (image[:, :16] * torch.linspace(-1, 1, 16)).sum() + text[:, 0].sum()
        return image.detach(), text.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    exact = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradient()
        dense = model.encode_dense(pixels)
    for a, b in zip(rough, exact):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.995
    assert not torch.equal(rough[0], exact[0])
    assert dense.dtype == torch.float32 and (dense * model.encode_dense(pixels)).sum(1).min() > 0.98


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("pool", POOLS)
def test_save_and_open_give_back_the_same_model(pool: str, tmp_path: Path) -> None:
    model = tiny(pool)
    model.save(tmp_path / "a" / "b", {"note": "kept"})
    opened = Silc.open(tmp_path / "a" / "b")
    assert opened.config == model.config and not opened.training
    for (name, ours), theirs in zip(model.state_dict().items(), opened.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["note"] == "kept"


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        described = json.loads((folder / "config.json").read_text())
        change(described)
        (folder / "config.json").write_text(json.dumps(described))

    return spoil


def halve(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated weights": (halve, "damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "pickled weights": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Bomb())), "damaged"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "damaged"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not written by silc"),
    "foreign config": (lambda f: (f / "config.json").write_text('{"model_type": "clip"}'), "not written by silc"),
    "config without model": (edit(lambda d: d.pop("model")), "not written by silc"),
    "unknown setting": (edit(lambda d: d["model"]["image"].update(widht=3)), "widht.*'width'"),
    "another depth": (edit(lambda d: d["model"]["image"].update(depth=2)), "do not fit"),
    "another width": (edit(lambda d: d["model"]["text"].update(mlp=21)), "do not fit"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_clear_error(case: str, tmp_path: Path) -> None:
    spoil, message = BROKEN[case]
    tiny().save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        Silc.open(tmp_path)
    assert str(tmp_path) in str(caught.value) and type(caught.value) is ValueError


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a silc model"):
        Silc.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not a silc model"):
        Silc.open(tmp_path / "file")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"image_size": 18}, "image_size 18 is not a multiple of the patch 4"),
        ({"heads": 5}, "width 24 is not a multiple of heads 5"),
        ({"width": 48, "proj": "none"}, "width 48 without projection cannot reach embed_dim 20"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(image: dict[str, Any], message: str) -> None:
    config = tiny("mean").config
    with pytest.raises(ValueError, match=message):
        Silc(dataclasses.replace(config, image=dataclasses.replace(config.image, **image)))


def test_a_text_tower_whose_heads_do_not_divide_its_width_is_refused() -> None:
    with pytest.raises(ValueError, match="width 16 is not a multiple of heads 3"):
        TextTower(TextTowerConfig(vocab=9, length=4, width=16, depth=1, heads=3, mlp=8), 16)


@pytest.mark.parametrize("pool", ["map", "cls", "mean"])
def test_pooled_features_lead_to_the_embedding(pool: str) -> None:
    image = ImageTowerConfig(32, 8, 24, 1, 2, 32, pool=pool, proj="affine")
    model = Silc(ModelConfig(image, TextTowerConfig(50, 8, 24, 1, 2, 32), embed_dim=16))
    pixels = torch.randn(3, 3, 32, 40)
    pooled = model.encode_pooled(pixels)
    assert pooled.shape == (3, 24)
    torch.testing.assert_close(model.project(pooled), model.encode_image(pixels))
