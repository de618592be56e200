"""A model as transformers has it: CLIP or SigLIP, with its image processor and tokenizer.

Gives: write (the folder), peer (that folder as transformers opens it).
Used by: app/exporting.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, normalizers, processors
from tokenizers import Tokenizer as Pieces
from torch import Tensor

from silc.config import ImageTowerConfig, PreprocessConfig, TextTowerConfig
from silc.data.tokenizer import SentencePieces, Tokenizer
from silc.export.check import Peer, unusable
from silc.model.families import ACTIVATIONS, RESIZE
from silc.model.silc import Silc
from silc.model.weights import to_transformers
from silc.tensors import save_tensors

NAMES = {"clip": "CLIP", "siglip": "Siglip"}
RESAMPLE = {"bilinear": 2, "bicubic": 3}


def write(model: Silc, folder: Path) -> None:
    """config.json, model.safetensors, preprocessor_config.json, the tokenizer's files. ValueError names the setting
    that the family does not have."""
    family = "clip" if model.config.image.pool == "cls" else "siglip"
    tensors = to_transformers(model)
    if family == "clip" and model.config.text.eos_id == 2:
        raise ValueError("transformers' CLIP takes an end token of id 2 for another one: train with another tokenizer.")
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder / "config.json", _config(model, family))
    _json(folder / "preprocessor_config.json", _preprocessor(model.config.preprocess, family))
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    if isinstance(model.tokenizer, Tokenizer):
        write_tokenizer(model.tokenizer, folder, f"{NAMES[family]}Processor")


def _json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _config(model: Silc, family: str) -> dict[str, Any]:
    c = model.config
    image = _tower(c.image) | {"image_size": c.image.image_size, "patch_size": c.image.patch, "num_channels": 3}
    text = _tower(c.text) | {"vocab_size": c.text.vocab, "max_position_embeddings": c.text.length}
    text |= {"eos_token_id": c.text.eos_id, "pad_token_id": c.text.pad_id, "bos_token_id": None}
    whole = {"architectures": [f"{NAMES[family]}Model"], "model_type": family, "dtype": "float32"}
    if family == "clip":
        return whole | {"projection_dim": c.embed_dim, "vision_config": image, "text_config": text}
    text["projection_size"] = c.embed_dim
    return whole | {"vision_config": image | {"vision_use_head": True}, "text_config": text}


def _tower(tower: ImageTowerConfig | TextTowerConfig) -> dict[str, Any]:
    act = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == tower.act)
    return {"hidden_size": tower.width, "intermediate_size": tower.mlp, "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.heads, "hidden_act": act, "layer_norm_eps": tower.norm_eps,
            "attention_dropout": 0.0}  # fmt: skip


def _preprocessor(seen: PreprocessConfig, family: str) -> dict[str, Any]:
    crops = seen.resize == "crop"
    sizes: dict[str, Any] = {"size": {"height": seen.size, "width": seen.size}}
    if crops:
        sizes = {"size": {"shortest_edge": seen.size}, "crop_size": {"height": seen.size, "width": seen.size}}
    return {
        "image_processor_type": "CLIPImageProcessor" if crops else "SiglipImageProcessor",
        "processor_class": f"{NAMES[family]}Processor",
        "do_resize": True, **sizes, "resample": RESAMPLE[seen.interpolation], "do_center_crop": crops,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
        "do_normalize": True, "image_mean": list(seen.mean), "image_std": list(seen.std),
    }  # fmt: skip


# ---------------------------------------------------------------- tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, processor: str) -> None:
    """The tokenizer as transformers reads it, with everything that silc does to a text: case, begin, end, length."""
    rules = tokenizer.rules
    said = {"model_max_length": rules.length, "padding_side": "right", "processor_class": processor,
            "clean_up_tokenization_spaces": False}  # fmt: skip
    if isinstance(tokenizer.pieces, SentencePieces):
        if rules.punctuation or not rules.lowercase:
            raise ValueError("transformers' SiglipTokenizer takes punctuation away and lowers the case, this model's "
                             "tokenizer does not.")  # fmt: skip
        (folder / "spiece.model").write_bytes(tokenizer.pieces.data)
        named = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "do_lower_case": True}
        _json(folder / "tokenizer_config.json", said | named | {"tokenizer_class": "SiglipTokenizer"})
        return
    pieces = Pieces.from_str(tokenizer.pieces.to_str())
    special = {"eos": rules.eos_id, "pad": rules.pad_id, "bos": rules.bos_id}
    ends = {name: None if i is None else pieces.id_to_token(i) for name, i in special.items()}
    steps: list[Any] = [] if rules.punctuation else [normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
    steps += [normalizers.Lowercase()] if rules.lowercase else []
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    pieces.normalizer = normalizers.Sequence([*steps, *([pieces.normalizer] if pieces.normalizer else [])])
    begin = [] if rules.bos_id is None else [ends["bos"]]
    named_ids = [(token, i) for token, i in ((ends["bos"], rules.bos_id), (ends["eos"], rules.eos_id)) if i is not None]
    pieces.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", ends["eos"]], special_tokens=list(dict.fromkeys(named_ids)))
    (folder / "tokenizer.json").write_text(pieces.to_str(), encoding="utf-8")
    tokens = {f"{name}_token": token for name, token in ends.items() if token is not None}
    _json(folder / "tokenizer_config.json", said | tokens | {"tokenizer_class": "PreTrainedTokenizerFast"})


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files of a model that came from transformers, as they are."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model", "vocab.json",
                 "merges.txt", "tokenizer.model"):  # fmt: skip
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


# ---------------------------------------------------------------- as transformers opens it


def peer(folder: Path) -> Peer:
    """The model in `folder` by transformers' own classes. ValueError if transformers is missing."""
    try:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    except (ImportError, RuntimeError) as error:
        raise unusable("transformers", 'pip install "silc[hf]"', error) from None
    model: Any = AutoModel.from_pretrained(folder, dtype="float32", local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    length = model.config.text_config.max_position_embeddings

    def ids(texts: list[str]) -> Tensor:
        found: Tensor = tokenizer(texts, padding="max_length", truncation=True, max_length=length,
                                  return_tensors="pt")["input_ids"]  # fmt: skip
        return found

    patch, family = model.config.vision_config.patch_size, model.config.model_type

    def grown(pixels: Tensor) -> dict[str, Any]:
        if family == "siglip2":
            return _patches(pixels, patch)
        size = model.config.vision_config.image_size
        return {"pixel_values": pixels, "interpolate_pos_encoding": pixels.shape[-2:] != (size, size)}

    def seen(picture: Image.Image) -> Tensor:
        made: Tensor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)(
            picture, return_tensors="pt")["pixel_values"][0]  # fmt: skip
        return made

    return Peer(
        "transformers",
        image=lambda pixels: _pooled(model.get_image_features(**grown(pixels))),
        text=lambda texts: _pooled(model.get_text_features(input_ids=ids(texts))),
        logits=lambda pixels, texts: model(input_ids=ids(texts), **grown(pixels)).logits_per_image,
        dense=lambda pixels: _dense(model, grown(pixels)).unflatten(2, [side // patch for side in pixels.shape[-2:]]),
        pixels=None if family == "siglip2" else seen,  # which keeps the aspect, and silc does not
        position_resize=RESIZE[family],
    )


def _patches(pixels: Tensor, patch: int) -> dict[str, Tensor]:
    """Pixels [B, 3, H, W] as Siglip2Model takes them: patches in rows, and how many rows and columns there are."""
    cells = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 3, 5, 1)
    rows = cells.flatten(3).flatten(1, 2)
    return {"pixel_values": rows, "pixel_attention_mask": torch.ones(rows.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([cells.shape[1:3]] * len(pixels))}  # fmt: skip


def _pooled(found: Any) -> Tensor:
    """Up to version 4 the features themselves, since 5 an output that holds them."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


def _dense(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Every patch in the space of the text, [B, D, N], by transformers' layers: of SigLIP the pooling head with its
    attention on one patch, of CLIP the last block with each token's value alone, then the projection."""
    vision = model.vision_model
    out = vision(**inputs, output_hidden_states=True)
    if hasattr(vision, "head"):
        head, x = vision.head, out.last_hidden_state
        values = slice(2 * x.shape[-1], None)
        x = F.linear(x, head.attention.in_proj_weight[values], head.attention.in_proj_bias[values])
        x = head.attention.out_proj(x)
        x = x + head.mlp(head.layernorm(x))
    else:
        last, x = vision.encoder.layers[-1], out.hidden_states[-2][:, 1:]
        x = x + last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(x)))
        x = model.visual_projection(vision.post_layernorm(x + last.mlp(last.layer_norm2(x))))
    return x.transpose(1, 2)
