"""The two towers: a ViT over several resolutions at once, and a text transformer.

Gives: ImageTower (pooled and patch tokens of every crop size in one call, dense read-outs, inner maps), TextTower.
Used by: silc.py, which puts them in one space; train/pretrain.py calls them through it.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from silc.config import ImageTowerConfig, TextTowerConfig
from silc.model.layers import Block, MapHead, Shapes, pack, resize_grid, unpack
from silc.plain import nearest

Readout = Literal["auto", "tokens", "value", "sclip", "clearclip", "catseg"]
"""Ways to read patches; see `ImageTower.dense`."""


class Encoded(NamedTuple):
    """One group of pictures: pooled [B, E] in the shared space, not normalised; tokens [B, N, D] after the norm."""

    pooled: Tensor
    tokens: Tensor


def projection(kind: Literal["none", "linear", "affine"], width: int, embed_dim: int) -> nn.Module:
    if kind == "none":
        if width != embed_dim:
            raise ValueError(f"a tower of width {width} without projection cannot reach embed_dim {embed_dim}.")
        return nn.Identity()
    return nn.Linear(width, embed_dim, bias=kind == "affine")


def initialise(tower: nn.Module) -> None:
    """Glorot for matrices, zero for biases, one and zero for norms; tables are set by the towers themselves."""
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ImageTower(nn.Module):
    def __init__(self, config: ImageTowerConfig, embed_dim: int) -> None:
        super().__init__()
        c = self.config = config
        if c.image_size % c.patch:
            raise ValueError(f"image_size {c.image_size} is not a multiple of the patch {c.patch}.")
        if c.width % c.heads:
            raise ValueError(f"width {c.width} is not a multiple of heads {c.heads}.")
        self.patch = nn.Conv2d(3, c.width, c.patch, c.patch, bias=c.patch_bias)
        self.position = nn.Parameter(torch.empty(c.grid, c.grid, c.width))
        if c.pool == "cls":
            self.cls, self.cls_position = (nn.Parameter(torch.empty(1, c.width)) for _ in range(2))
        self.pre_norm = nn.LayerNorm(c.width, eps=c.norm_eps) if c.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp, c.act, c.norm_eps) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        if c.pool == "map":
            self.head = MapHead(c.width, c.heads, c.mlp, c.act, c.norm_eps)
        self.proj = projection(c.proj, c.width, embed_dim)
        self.recompute = False
        initialise(self)
        for name, table in self.named_parameters():
            if name in ("position", "cls", "cls_position", "head.probe"):
                nn.init.normal_(table, std=c.width**-0.5)

    def embed(self, pixels: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, N(+1), D]; where mask [B, N] is True the patch is replaced by mask_token [D]."""
        p = self.config.patch
        if pixels.shape[-2] % p or pixels.shape[-1] % p:
            raise ValueError(
                f"a picture of {pixels.shape[-2]} x {pixels.shape[-1]} px does not fit patches of {p} px: "
                "resize both sides to multiples of the patch."
            )
        # a convolution whose stride is its kernel is one product; written as that its backward is 3-7 times faster
        cells = pixels.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)
        height, width = cells.shape[1:3]
        x = F.linear(cells.flatten(3).flatten(1, 2), self.patch.weight.flatten(1), self.patch.bias)
        if mask is not None and mask_token is not None:
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        x = x + resize_grid(self.position, height, width, self.config.position_resize).flatten(0, 1)
        if self.config.pool == "cls":
            x = torch.cat([(self.cls + self.cls_position).expand(x.shape[0], 1, -1), x], dim=1)
        return self.pre_norm(x)

    def transform(self, x: Tensor, shapes: Shapes, blocks: list[nn.Module]) -> Tensor:
        for block in blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, shapes, use_reentrant=False)
            else:
                x = block(x, shapes)
        return x

    def forward(
        self,
        groups: list[Tensor],
        masks: list[Tensor | None] | None = None,
        mask_token: Tensor | None = None,
        project: bool = True,
    ) -> list[Encoded]:
        """groups: [B_i, 3, H_i, W_i] each, of any sizes; masks: [B_i, N_i] or None each. One pass over all tokens.

        Without `project` the pooled vectors stay in the width of the tower, before the projection."""
        x, shapes = pack([self.embed(g, m, mask_token) for g, m in zip(groups, masks or [None] * len(groups))])
        x = self.norm(self.transform(x, shapes, list(self.blocks)))
        tokens = unpack(x, shapes)
        if self.config.pool == "map":
            pooled = self.head(x, shapes)
        elif self.config.pool == "cls":
            pooled, tokens = [t[:, 0] for t in tokens], [t[:, 1:] for t in tokens]
        else:
            pooled = [t.mean(1) for t in tokens]
        if project:
            pooled = list(self.proj(torch.cat(pooled)).split([len(p) for p in pooled]))
        return [Encoded(p, t) for p, t in zip(pooled, tokens)]

    def dense(self, pixels: Tensor, readout: Readout = "auto") -> Tensor:
        """[B, 3, H, W] -> [B, E, h, w]: each patch in the space of the text, not normalised.

        Read-outs differ in the last block; all blocks before it are as in training:
        `tokens`     as it is.
        `value`      each token attends to itself alone, residual and MLP kept (MaskCLIP, arXiv 2112.01071; TIPS).
        `sclip`      attention softmax(q q^T) + softmax(k k^T), residual and MLP kept (arXiv 2312.01597).
        `clearclip`  attention softmax(q q^T), no residual, no MLP (arXiv 2407.12442).
        `catseg`     for CLS pooling, as `value`, but the CLS token is the residual of every patch (arXiv 2303.11797);
                     for other pooling, where there is none, `tokens`.
        `auto`       `value` for CLS pooling, whose patch tokens are not trained to be read directly, else `tokens`.
        A CLS token takes part in the attention, as in those papers. Then the last norm, and what pooling does after
        attention: for a MAP head value, output projection and MLP (the head with attention one-hot on the patch), else
        nothing; last the projection. The papers have CLS towers only: for MAP and mean pooling the same change of the
        last block is ours. ValueError for an unknown name.
        """
        return self.dense_and_inner(pixels, readout)[0]

    def dense_and_inner(self, pixels: Tensor, readout: Readout = "auto") -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `dense`, and [B, D, h, w] each: patches after a third and after two thirds of the blocks (4, 8 of 12)."""
        if readout not in get_args(Readout):
            raise ValueError(f"there is no dense read-out {readout!r}." + nearest(readout, get_args(Readout)))
        has_cls, readouts = self.config.pool == "cls", {"auto": "value", "catseg": "catseg"}
        if readout in readouts:
            readout = readouts[readout] if has_cls else "tokens"  # type: ignore[assignment]
        x, shapes = pack([self.embed(pixels)])
        blocks, inner = list(self.blocks), []
        h, w = pixels.shape[-2] // self.config.patch, pixels.shape[-1] // self.config.patch
        third, end = max(1, len(blocks) // 3), len(blocks) if readout == "tokens" else len(blocks) - 1
        for first, last in itertools.pairwise(min(stop, end) for stop in (0, third, 2 * third, end)):
            x = self.transform(x, shapes, blocks[first:last])
            inner.append(unpack(x, shapes)[0][:, int(has_cls) :].transpose(1, 2).unflatten(2, (h, w)))
        if readout == "catseg":
            x = blocks[-1].value_beside(x, shapes)  # type: ignore[operator]
        elif readout == "value":
            x = blocks[-1].value_path(x)  # type: ignore[operator]
        elif readout == "sclip":
            x = blocks[-1].correlative(x, shapes)  # type: ignore[operator]
        elif readout == "clearclip":
            x = blocks[-1].attention_alone(x, shapes)  # type: ignore[operator]
        x = unpack(self.norm(x), shapes)[0]
        x = x[:, 1:] if has_cls else x
        x = self.proj(self.head.per_patch(x) if self.config.pool == "map" else x)
        return x.transpose(1, 2).unflatten(2, (h, w)), (inner[0], inner[1])


class TextTower(nn.Module):
    def __init__(self, config: TextTowerConfig, embed_dim: int) -> None:
        super().__init__()
        c = self.config = config
        if c.width % c.heads:
            raise ValueError(f"text: width {c.width} is not a multiple of heads {c.heads}.")
        self.token = nn.Embedding(c.vocab, c.width)
        self.position = nn.Parameter(torch.empty(c.length, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp, c.act, c.norm_eps, c.causal) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
        self.proj = projection(c.proj, c.width, embed_dim)
        self.recompute = False
        initialise(self)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, length] -> [B, E] in the shared space (not normalised). Every position is attended, padding too
        (that is how SigLIP was trained; a causal tower never looks behind its end token)."""
        x, shapes = pack([self.token(tokens) + self.position[: tokens.shape[1]]])
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, shapes, use_reentrant=False)
            else:
                x = block(x, shapes)
        return self.proj(self.pool(unpack(self.norm(x), shapes)[0], tokens))

    def pool(self, x: Tensor, tokens: Tensor) -> Tensor:
        if self.config.pool == "last":
            return x[:, -1]
        if self.config.pool == "eos":  # the first end token; argmax of 0/1 finds the first
            return x[torch.arange(len(x), device=x.device), (tokens == self.config.eos_id).int().argmax(1)]
        real = (tokens != self.config.pad_id).to(x.dtype)[..., None]
        return (x * real).sum(1) / real.sum(1).clamp(min=1)
