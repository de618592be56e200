"""Text to ids: training, bytes, foreign files, and the rules around them.

Gives: tests of data/tokenizer against hand-written ids, transformers and SentencePiece.
Used by: pytest.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pieces
from tokenizers import models, normalizers, pre_tokenizers, processors

from silc.data.tokenizer import Tokenizer, byte_tokenizer, clean, load_tokenizer, train_tokenizer

CAPTIONS = [
    f"a {colour} {thing} on the {place}"
    for colour in ("red", "green", "blue")
    for thing in ("dog", "cat", "house", "tree")
    for place in ("grass", "beach", "street")
]
TEXTS = [*CAPTIONS[:3], "", "Ünïcode — 日本語 😀 עברית", "a " * 100, "tab\tand\nnewline"]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(CAPTIONS, vocab=400, length=16)


def decoded(tokenizer: Tokenizer, row: torch.Tensor) -> str:
    ids = row.tolist()
    return tokenizer.pieces.decode(ids[: ids.index(tokenizer.eos_id)])


# ---------------------------------------------------------------- layout


def test_bytes_end_padding():
    out = byte_tokenizer(8)(["Ab  é", ""])
    # 2 + byte; the accent is two bytes; lower case; one space
    assert out.dtype == torch.int64
    assert out.tolist() == [[2 + 97, 2 + 98, 2 + 32, 2 + 0xC3, 2 + 0xA9, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_a_long_text_keeps_its_end_token_and_is_counted():
    tokenizer = byte_tokenizer(4)
    assert tokenizer(["abc", "abcd", "x" * 1000]).tolist() == [[99, 100, 101, 1], [99, 100, 101, 1], [122, 122, 122, 1]]
    assert (tokenizer.seen, tokenizer.truncated) == (3, 2)
    tokenizer(["a"])
    assert (tokenizer.seen, tokenizer.truncated) == (4, 2)


def test_begin_token_takes_a_place(tmp_path):
    byte_tokenizer(6).save(tmp_path)
    rules = json.loads((tmp_path / "silc_tokenizer.json").read_text()) | {"bos_id": 5}
    (tmp_path / "silc_tokenizer.json").write_text(json.dumps(rules))
    assert load_tokenizer(tmp_path)(["a", "abcdef"]).tolist() == [[5, 99, 1, 0, 0, 0], [5, 99, 100, 101, 102, 1]]


def test_no_captions_give_no_rows(trained):
    assert trained([]).shape == (0, 16) and trained([]).dtype == torch.int64


@pytest.mark.parametrize("texts", ["a dog", None, 3, {"a": 1}, b"a dog"])
def test_anything_but_a_list_is_refused(trained, texts):
    with pytest.raises(ValueError, match="list of strings"):
        trained(texts)


@pytest.mark.parametrize("item", [None, 3, b"dog", ["dog"], float("nan")])
def test_anything_but_strings_is_refused(trained, item):
    with pytest.raises(ValueError, match="must be strings"):
        trained(["a dog", item])


def test_a_special_token_written_out_is_plain_text(trained):
    for tokenizer in (trained, byte_tokenizer(64), pickle.loads(pickle.dumps(trained))):
        row = tokenizer(["<eos> dog <pad>"])[0].tolist()
        assert row.index(tokenizer.eos_id) > 3
        assert decoded(tokenizer, torch.tensor(row)).strip() == "<eos> dog <pad>"


def test_clean():
    assert clean("  Two\n\tWORDS ") == "two words"
    assert clean("Keep Case", lowercase=False) == "Keep Case"
    assert clean("It's, a dog!", punctuation=False) == "its a dog"
    assert clean("half \ud83d pair") == "half ? pair"


def test_rules_that_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no room"):
        byte_tokenizer(1)
    byte_tokenizer(8).save(tmp_path)
    with pytest.raises(ValueError, match="eos_id = 999"):
        load_tokenizer(tmp_path, eos_id=999)


# ---------------------------------------------------------------- training


def test_training_is_deterministic_and_learns_words(trained):
    again = train_tokenizer((caption for caption in CAPTIONS), vocab=400, length=16)
    assert again.pieces.to_str() == trained.pieces.to_str()
    assert trained.vocab <= 400 and (trained.pad_id, trained.eos_id) == (0, 1)
    row = trained(["a red dog on the grass"])[0]
    assert int((row != trained.pad_id).sum()) == 7  # one token a word, and the end


def test_case_and_spaces_do_not_matter(trained):
    a, b = trained(["A RED   dog ", "a red dog"])
    assert torch.equal(a, b)


def test_a_word_is_the_same_token_first_and_later(trained):
    first, later = trained(["dog", "a dog"]).tolist()
    assert first[0] == later[1]


@given(st.text(st.characters(), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_encodes_and_decodes(text):
    for tokenizer in (ANY, byte_tokenizer(400)):
        row = tokenizer([text])[0]
        assert row.shape == (400,) and int(row.min()) >= 0 and int(row.max()) < tokenizer.vocab
        assert decoded(tokenizer, row).strip() == clean(text)


ANY = train_tokenizer(CAPTIONS, vocab=300, length=400)


def test_training_input_is_checked():
    with pytest.raises(ValueError, match="258"):
        train_tokenizer(CAPTIONS, vocab=100, length=16)
    with pytest.raises(ValueError, match="not one string"):
        train_tokenizer("a dog", vocab=300, length=16)
    with pytest.raises(ValueError, match="must be strings"):
        train_tokenizer(["a dog", None], vocab=300, length=16)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("make", [lambda: train_tokenizer(CAPTIONS, 300, 16), lambda: byte_tokenizer(24)])
def test_save_and_load_round_trip(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.rules == tokenizer.rules and loaded.vocab == tokenizer.vocab
    assert torch.equal(loaded(TEXTS), tokenizer(TEXTS))
    loaded.save(tmp_path / "again")
    for file in ("tokenizer.json", "silc_tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "new" / "folder" / file).read_bytes()
    longer = load_tokenizer(tmp_path / "again" / "tokenizer.json", length=50)
    assert longer(TEXTS).shape == (len(TEXTS), 50) and longer.eos_id == tokenizer.eos_id


def foreign(folder: Path, begin: bool) -> None:
    """A small word-level Hugging Face tokenizer in the manner of CLIP (begin) or SigLIP 2 (no begin)."""
    words = ["<pad>", "</s>", "<unk>", "<s>", "a", "red", "dog", "cat", "on", "grass"]
    pieces = Pieces(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    pieces.add_special_tokens(words[:4])
    pieces.normalizer = normalizers.Lowercase()
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    around = "<s> $A </s>" if begin else "$A </s>"
    pieces.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("</s>", 1), ("<s>", 3)])
    pieces.enable_truncation(4)
    pieces.enable_padding(length=20)
    folder.mkdir(exist_ok=True)
    pieces.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


@pytest.mark.parametrize("begin", [True, False])
def test_hugging_face_file_gives_what_transformers_gives(begin, tmp_path):
    transformers = pytest.importorskip("transformers")
    foreign(tmp_path, begin)
    file = str(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="</s>", pad_token="<pad>")
    texts = ["a red dog", "a", "", "a red dog on a red cat on a dog on grass", "an unknown word"]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=8, return_tensors="pt")["input_ids"]
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        ours = load_tokenizer(place, length=8)
        assert torch.equal(ours(texts), expected)
        assert ours.truncated == 1
    ours.save(tmp_path / "saved")
    assert torch.equal(load_tokenizer(tmp_path / "saved")(texts), expected)


def test_foreign_ids_can_be_named_or_given(tmp_path):
    words = {"x": 0, "end": 1, "gap": 2, "<unk>": 3}
    pieces = Pieces(models.WordLevel(words, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="how long"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no end token"):
        load_tokenizer(tmp_path, length=4)
    assert load_tokenizer(tmp_path, 4, eos_id=1)(["x"]).tolist() == [[0, 1, 1, 1]]
    assert load_tokenizer(tmp_path, 4, eos_id=1, pad_id=2)(["x"]).tolist() == [[0, 1, 2, 2]]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "end", "pad_token": "gap"}))
    assert load_tokenizer(tmp_path, 4)(["x"]).tolist() == [[0, 1, 2, 2]]
    assert load_tokenizer(tmp_path, 4, lowercase=False, punctuation=False)(["X, x"]).tolist() == [[3, 0, 1, 2]]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path, 8)
    byte_tokenizer(8).save(tmp_path)
    (tmp_path / "silc_tokenizer.json").write_text('{"length": 8}')
    with pytest.raises(ValueError, match="incomplete"):
        load_tokenizer(tmp_path)
    (tmp_path / "silc_tokenizer.json").write_text('{"lenght": 8}')
    with pytest.raises(ValueError, match="Perhaps you meant 'length'"):
        load_tokenizer(tmp_path)


def test_sentencepiece_missing_is_said_plainly(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(b"...")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r'pip install "silc\[sentencepiece\]"'):
        load_tokenizer(tmp_path, 8)


def test_sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = str(tmp_path / "spiece")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "captions.txt"), model_prefix=prefix, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    tokenizer = load_tokenizer(tmp_path, length=24)
    ids = reference.encode("a red dog on the grass")
    # The model has no padding piece, so the end token pads, as SigLIP does it
    assert tokenizer(["A red  dog on the grass"])[0].tolist() == ids + [2] * (24 - len(ids))
    assert tokenizer([]).shape == (0, 24)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.rules == tokenizer.rules and torch.equal(loaded(TEXTS), tokenizer(TEXTS))
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(TEXTS), tokenizer(TEXTS))
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model", length=8)
