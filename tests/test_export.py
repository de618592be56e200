"""Out to other libraries: what `silc export` writes is opened by them and says the same, or is not written.

Gives: every form by the command; tokenizers on hard texts; the card; failures; inspect; push.
Used by: pytest. Skips what needs a library that is not installed.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHAPES, draw
from test_loop import command, refused
from test_opening import TEXTS, model_of
from tokenizers import Tokenizer as Pieces
from tokenizers import models, normalizers, pre_tokenizers, processors

import silc
from silc import recipes
from silc.app import exporting
from silc.cli import main
from silc.data.tokenizer import load_tokenizer, train_tokenizer
from silc.export import transformers as to_hf
from silc.export.check import CAPTIONS, Row, sample
from silc.model import timm as known_timm
from silc.model.big_vision import to_big_vision
from silc.model.silc import Silc

HARD = ["", "A  Red\tCIRCLE!", "naïve café — 42nd", "日本語 🐈", "it's <eos> a trap"[:5], "x" * 400, *TEXTS]


def saved(kind: str, folder: Path) -> Silc:
    """A tiny random model with a trained tokenizer, in silc's own form."""
    model = model_of(kind)
    words = [" ".join(f"{a}{b}" for a in "abcde") for b in "xyz"] + list(CAPTIONS) + TEXTS
    tokenizer = train_tokenizer(words, 300, 16)
    text = replace(model.config.text, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, length=16)
    again = Silc(replace(model.config, text=text)).eval()
    again.load_state_dict(model.state_dict())
    again.save(folder)
    tokenizer.save(folder)
    return again


def table_of(out: str) -> dict[str, float]:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    return {row[0]: float(row[2].split()[0]) for row in cells if row[0]}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("to", ["transformers", "onnx", "safetensors"])
def test_an_export_is_read_back_and_agrees(
    to: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip({"transformers": "transformers", "onnx": "onnxruntime"}.get(to, "torch"))
    model = saved(kind, tmp_path / "model")
    main(["export", str(tmp_path / "model"), "--to", to, "--out", str(tmp_path / "out")])
    found = table_of(capsys.readouterr().out)
    assert {"image", "text", "logits", "dense"} <= found.keys()
    assert max(found[name] for name in ("image", "text", "logits")) < 1e-4 and found["dense"] < 1e-3
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n") and "Began with" in card and "None recorded" in card
    assert not list(tmp_path.glob(".*part"))
    if to != "onnx":
        again = silc.load(tmp_path / "out").state_dict()
        assert all(torch.equal(again[n], t) for n, t in model.state_dict().items())


def test_an_export_to_open_clip(open_clip: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved("clip", tmp_path / "model")
    main(["export", str(tmp_path / "model"), "--to", "open_clip", "--out", str(tmp_path / "out")])
    found = table_of(capsys.readouterr().out)
    assert max(found[name] for name in ("image", "text", "logits")) < 1e-4 and found["dense"] < 1e-3
    again = silc.load(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    texts = [text for text in HARD if text]
    assert torch.equal(again.token_ids(texts), silc.load(tmp_path / "model").token_ids(texts))


def test_a_mapped_tower_for_open_clip(
    open_clip: Any, timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A SigLIP goes out where timm has its image tower by name, here a tiny one; others are refused with the reason."""
    saved("siglip", tmp_path / "model")
    refused(capsys, ["export", str(tmp_path / "model"), "--to", "open_clip", "--out", str(tmp_path / "out")], "timm")
    assert not (tmp_path / "out").exists()
    name, image = "micro_map_tower", model_of("siglip").config.image

    def build(global_pool: str = "map", num_classes: int = 0, **_: Any) -> Any:
        tower = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0, class_token=False,
            global_pool=global_pool, num_classes=num_classes, act_layer="gelu_tanh")  # fmt: skip
        tower.default_cfg = {}
        return tower

    build.__name__ = name
    timm.models.register_model(build)
    monkeypatch.setitem(known_timm.TOWERS, name, image)
    main(["export", str(tmp_path / "model"), "--to", "open_clip", "--out", str(tmp_path / "out")])
    found = table_of(capsys.readouterr().out)
    assert max(found[name] for name in ("image", "text", "logits")) < 1e-4 and found["dense"] < 1e-3


def test_an_onnx_graph_of_another_size_and_any_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    for kind in ("clip", "siglip"):
        model, out = saved(kind, tmp_path / kind), tmp_path / f"{kind}-out"
        main(["export", str(tmp_path / kind), "--to", "onnx", "--out", str(out), "--size", "32", "56"])
        session = runtime.InferenceSession(out / "image.onnx")
        for batch in (1, 3):
            pixels = torch.randn(batch, 3, 32, 56)
            embedding, dense = session.run(None, {"pixels": pixels.numpy()})
            torch.testing.assert_close(torch.from_numpy(embedding), model.encode_image(pixels), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(torch.from_numpy(dense), model.encode_dense(pixels), atol=1e-4, rtol=1e-3)
            assert dense.shape == (batch, 32, 4, 7)
    asked = ["export", str(tmp_path / "clip"), "--to", "onnx", "--out", str(tmp_path / "x")]
    refused(capsys, [*asked, "--size", "30", "30"], "multiple of the patch")


def test_tokenizers_give_our_ids_in_transformers(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    saved("siglip", tmp_path)
    ours = load_tokenizer(tmp_path)
    for i, changes in enumerate(({}, {"bos_id": 40}, {"punctuation": False}, {"lowercase": False, "length": 9})):
        ours.rules = replace(ours.rules, **changes)
        folder = tmp_path / str(i)
        folder.mkdir()
        to_hf.write_tokenizer(ours, folder, "SiglipProcessor")
        theirs = hf.AutoTokenizer.from_pretrained(folder)
        got = theirs(HARD, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        assert torch.equal(got, ours(HARD)), changes


def test_a_difference_above_the_tolerance_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("siglip", tmp_path / "model")
    write = to_hf.write

    def wrong(model: Silc, folder: Path) -> None:
        with torch.no_grad():
            model.text.norm.bias.add_(1e-2)
        write(model, folder)
        with torch.no_grad():
            model.text.norm.bias.sub_(1e-2)

    monkeypatch.setattr(exporting.transformers, "write", wrong)
    asked = ["export", str(tmp_path / "model"), "--to", "transformers", "--out", str(tmp_path / "out")]
    said = refused(capsys, asked, "differs from silc in text, logits", "too much")
    assert "image," not in said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    main([*asked, "--tolerance", "1"])
    assert (tmp_path / "out").exists()


def test_what_cannot_go_out_says_why(tmp_path: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mean = recipes.quickstart().model
    mean = replace(mean, image=replace(mean.image, width=32, depth=1, mlp=32, heads=2), embed_dim=32,
                   text=replace(mean.text, width=32, mlp=32, heads=2, vocab=300))  # fmt: skip
    Silc(mean).save(tmp_path / "mean")
    train_tokenizer(TEXTS, 300, 24).save(tmp_path / "mean")
    out = tmp_path / "out"
    refused(capsys, ["export", str(tmp_path / "mean"), "--to", "transformers", "--out", str(out)], "image.pool = map")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("dear")
    refused(capsys, ["export", str(tmp_path / "mean"), "--to", "onnx", "--out", str(tmp_path / "full")], "is not empty")
    assert (tmp_path / "full" / "mine.txt").read_text() == "dear"
    main(["export", str(tmp_path / "mean"), "--to", "safetensors", "--out", str(out)])


def test_the_card_tells_the_run(pairs: Path, tmp_path: Path) -> None:
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    main(command(pairs, run, "--eval.sets", "retrieval", str(pairs)))
    small = ["--objective.prototypes.count", "64", "--objective.prototypes.hidden", "32", "--train.batch", "16"]
    small += ["--objective.prototypes.bottleneck", "16", "--train.samples", "64", "--data.workers", "0"]
    (run / "export" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    main(["train", "adapt-10k", "--init.model", str(run), "--data.sources", str(pairs), "--out", str(tuned), *small])
    main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "a"), "--licence", "mit"])
    main(["export", str(tuned), "--to", "safetensors", "--out", str(tmp_path / "b")])
    first, second = ((tmp_path / name / "README.md").read_text() for name in "ab")
    assert "license: mit" in first and "random weights" in first and "| retrieval | text_to_image_r1 |" in first
    assert "Recipe `mu`: softmax contrast x 1 + distill x 1 + masked x 0.5." in first and "seed 0" in first
    assert "license: cc-by-4.0" in second and "Recipe `adapt-10k`" in second and "None recorded" in second
    assert f"Began with: `{run}`" in second
    scores = str(tmp_path / "scores")
    shapes = tmp_path / "shapes"
    for shape in SHAPES:
        (shapes / shape).mkdir(parents=True)
        draw("red", shape, 40).save(shapes / shape / "0.png")
    main(["eval", str(tuned), "--sets", "retrieval", str(pairs), "zeroshot", str(shapes), "--out", scores])
    main(["export", str(tuned), "--to", "safetensors", "--out", str(tmp_path / "c"), "--scores", scores])
    third = (tmp_path / "c" / "README.md").read_text()
    assert "| retrieval | text_to_image_r1 |" in third and "| protocol plain, 3 pictures |" in third


# ---------------------------------------------------------------- inspect and push


@pytest.mark.parametrize("form", ["transformers", "big_vision", "silc"])
def test_inspect_compares_with_the_library(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    model = saved("siglip", tmp_path / "model")
    target = tmp_path / "model"
    if form == "transformers":
        main(["export", str(target), "--to", "transformers", "--out", str(tmp_path / "hf")])
        target = tmp_path / "hf"
    if form == "big_vision":
        pieces = pytest.importorskip("sentencepiece")
        (tmp_path / "npz").mkdir()
        target = tmp_path / "npz" / "siglip.npz"
        np.savez(target, **to_big_vision(model))
        pieces.SentencePieceTrainer.train(
            sentence_iterator=iter([*CAPTIONS, *TEXTS] * 9), model_prefix=str(tmp_path / "npz" / "c4"), vocab_size=60,
            hard_vocab_limit=False, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)  # fmt: skip
    capsys.readouterr()
    main(["inspect", str(target), "--check"])
    said = capsys.readouterr().out
    assert "act gelu_tanh" in said and "Beside transformers" in said and "tensors from" in said
    found = table_of(said)
    assert {"pixels", "image", "text", "logits", "dense", "dense, not square"} <= found.keys()
    assert max(found[name] for name in ("image", "text", "logits")) < 1e-4
    main(["inspect", str(tmp_path / "model")])
    assert "Beside" not in capsys.readouterr().out
    if form == "transformers":  # and a difference is seen
        spoilt = json.loads((target / "config.json").read_text())
        spoilt["text_config"]["hidden_act"] = "quick_gelu"
        seen = exporting.PEERS["transformers"]

        def other(folder: Path) -> Any:
            copy = tmp_path / "spoilt"
            shutil.copytree(folder, copy)
            (copy / "config.json").write_text(json.dumps(spoilt))
            return seen(copy)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(exporting.PEERS, "transformers", other)
            refused(capsys, ["inspect", str(target), "--check"], "differ by more", status=1)


def test_inspect_compares_with_open_clip(
    open_clip: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("clip", tmp_path / "model")
    main(["export", str(tmp_path / "model"), "--to", "open_clip", "--out", str(tmp_path / "oc"), "--no-check"])
    main(["inspect", str(tmp_path / "oc"), "--check"])
    said = capsys.readouterr().out
    assert "Beside open_clip" in said and "act quick_gelu" in said
    found = table_of(said)
    assert max(found[name] for name in ("image", "text", "logits")) < 1e-4 and found["dense"] < 1e-3


def test_inspect_compares_a_checkpoint_of_open_clip_by_its_own_settings(
    open_clip: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its training leaves one: nested, with the prefix of DDP, the settings in a file of the same name."""
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0}
    settings = {"embed_dim": 20, "vision_cfg": vision, "text_cfg": {"width": 16, "heads": 2, "layers": 2}}
    settings["quick_gelu"] = True
    theirs = open_clip.CLIP(**settings)
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "mine", "state_dict": state}, tmp_path / "epoch_3.pt")
    (tmp_path / "epoch_3.json").write_text(json.dumps(settings))
    main(["inspect", str(tmp_path / "epoch_3.pt"), "--check"])
    said = capsys.readouterr().out
    assert "Beside open_clip:" in said and max(table_of(said)[name] for name in ("image", "text", "logits")) < 1e-4


def test_inspect_compares_a_naflex_at_two_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = pytest.importorskip("transformers")
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {name: i for i, name in enumerate(names)}
    pieces = Pieces(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    # what transformers' class does whatever the file says
    pieces.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    pieces.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    pieces.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    words = hf.PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<eos>", pad_token="<pad>",
                                       unk_token="<unk>", padding_side="right")  # fmt: skip
    words.save_pretrained(tmp_path)
    size = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**size, "vocab_size": len(names), "max_position_embeddings": 20, "projection_size": 32}
    vision = {**size, "patch_size": 8, "num_patches": 16}
    hf.Siglip2Model(hf.Siglip2Config(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    main(["inspect", str(tmp_path), "--check"])
    said = capsys.readouterr().out
    found = table_of(said)
    assert "tensors from transformers siglip2" in said and "Beside transformers:" in said and "pixels" not in found
    assert max(found.values()) < 1e-4 and {"image", "text", "logits", "dense", "dense, not square"} == found.keys()
    assert "| dense, not square |" in said and said.rstrip().endswith("| 1e-03 |")  # it counts


def test_push_uploads_only_an_export_with_a_licence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            done.append(("create", (name, options["private"])))

        def upload_folder(self, **options: Any) -> None:
            done.append(("upload", (options["repo_id"], Path(options["folder_path"]))))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    saved("siglip", tmp_path / "model")
    refused(capsys, ["push", str(tmp_path / "model"), "me/mine"], "no model card")
    main(["export", str(tmp_path / "model"), "--to", "safetensors", "--out", str(tmp_path / "a")])
    refused(capsys, ["push", str(tmp_path / "a"), "me/mine"], "--licence")
    assert not done
    asked = ["export", str(tmp_path / "model"), "--to", "safetensors", "--out", str(tmp_path / "b")]
    main([*asked, "--licence", "apache-2.0"])
    main(["push", str(tmp_path / "b"), "me/mine", "--private"])
    assert done == [("create", ("me/mine", True)), ("upload", ("me/mine", tmp_path / "b"))]

    def fails(self: Any, name: str, **options: Any) -> None:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(Api, "create_repo", fails)
    refused(capsys, ["push", str(tmp_path / "b"), "me/mine"], "could not be uploaded (no route to host)")


def test_the_sample_is_not_square_and_the_captions_differ_in_length() -> None:
    picture = sample()
    assert picture.width > 1.4 * picture.height and np.asarray(picture).std() > 30
    assert max(map(len, CAPTIONS)) > 10 * min(map(len, CAPTIONS))
    assert not Row("x", 1, 1e-3, 1e-4).good and Row("x", 1, 1.0, None).good


def test_a_library_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("clip", tmp_path / "model")
    packages = {"transformers": ("transformers", "silc[hf]"), "open_clip": ("open_clip", "open_clip_torch")}
    for to, (package, words) in (packages | {"onnx": ("onnxruntime", "silc[onnx]")}).items():
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            out = tmp_path / to
            refused(capsys, ["export", str(tmp_path / "model"), "--to", to, "--out", str(out)], words)
            assert not out.exists()
