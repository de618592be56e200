"""Text to token ids, with everything that changes them (case, end token, length, padding) kept beside the vocabulary.

Gives: `Tokenizer`, `train_tokenizer`, `byte_tokenizer`, `clip_tokenizer`, `load_tokenizer`.
Used by: data/loader, train/checkpoint, model/weights, predict.
"""

from __future__ import annotations

import gzip
import json
import string
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Pieces
from torch import Tensor

from silc.plain import load_json, save_json

RULES = "silc_tokenizer.json"
PIECES = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"

PAD, EOS = "<pad>", "<eos>"
# Spellings by which other families' files are understood when they do not say which token is which
KNOWN_EOS = ("</s>", "<eos>", "<|endoftext|>", "[SEP]")
KNOWN_PAD = ("<pad>", "[PAD]", "<|pad|>")
CLIP_VOCAB = 49408
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class TextRules:
    """What happens to a text around the vocabulary; the contents of silc_tokenizer.json."""

    length: int
    eos_id: int
    pad_id: int
    bos_id: int | None = None
    lowercase: bool = True
    punctuation: bool = True
    """False removes ASCII punctuation, as SigLIP (the first) did in training."""


class SentencePieces:
    """A SentencePiece model behind the two calls that are used of a `tokenizers` one."""

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(f'{path} needs sentencepiece: pip install "silc[sentencepiece]".') from None
        self.data = path.read_bytes()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=self.data)
        except Exception as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error}).") from None

    def encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.processor.encode(texts)
        return ids

    def size(self) -> int:
        return int(self.processor.vocab_size())


class Tokenizer:
    """Strings -> int64 [B, length]: [begin] tokens end padding.

    Texts are lower-cased (unless the rules say otherwise) and whitespace is collapsed. One that is too long is cut
    but keeps its end token; `seen` and `truncated` count texts, for the caller to read and reset.
    """

    def __init__(self, pieces: Pieces | SentencePieces, rules: TextRules) -> None:
        self.pieces, self.rules = pieces, rules
        if isinstance(pieces, SentencePieces):
            self.vocab = pieces.size()
        else:
            self.vocab = max(pieces.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self.seen = self.truncated = 0
        for name, value in (("eos_id", rules.eos_id), ("pad_id", rules.pad_id), ("bos_id", rules.bos_id)):
            if value is not None and not 0 <= value < self.vocab:
                raise ValueError(f"tokenizer: {name} = {value} is outside its vocabulary of {self.vocab}.")
        if self._room < 1:
            raise ValueError(f"tokenizer: a length of {rules.length} leaves no room for text; use a longer one.")

    @property
    def length(self) -> int:
        return self.rules.length

    @property
    def eos_id(self) -> int:
        return self.rules.eos_id

    @property
    def pad_id(self) -> int:
        return self.rules.pad_id

    @property
    def _room(self) -> int:
        return self.rules.length - 1 - (self.rules.bos_id is not None)

    def __call__(self, texts: list[str]) -> Tensor:
        """Encode B texts to int64 [B, length]; [0, length] for none. ValueError for anything but a list of strings."""
        if not isinstance(texts, (list, tuple)):
            one = "; put a single text in a list" if isinstance(texts, str) else ""
            raise ValueError(f"texts must be a list of strings, not {type(texts).__name__}{one}.")
        rules, room = self.rules, self._room
        encoded = self._encode([clean(text, rules.lowercase, rules.punctuation) for text in texts])
        self.seen += len(encoded)
        self.truncated += sum(len(ids) > room for ids in encoded)
        head = [] if rules.bos_id is None else [rules.bos_id]
        rows = [[*head, *ids[:room], rules.eos_id, *[rules.pad_id] * (room - len(ids))] for ids in encoded]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), rules.length)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if isinstance(self.pieces, SentencePieces):
            return self.pieces.encode(texts) if texts else []
        # A caption that spells out "<eos>" must not become the end token; the switch does not survive pickling
        self.pieces.encode_special_tokens = True
        return [e.ids for e in self.pieces.encode_batch_fast(texts, add_special_tokens=False)]

    def save(self, folder: str | Path) -> None:
        """Write the vocabulary and the rules into `folder`; `load_tokenizer(folder)` gives the same tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.pieces, SentencePieces):
            (folder / SENTENCEPIECE).write_bytes(self.pieces.data)
        else:
            (folder / PIECES).write_text(self.pieces.to_str(pretty=True), encoding="utf-8")
        save_json(folder / RULES, self.rules)


def clean(text: Any, lowercase: bool = True, punctuation: bool = True) -> str:
    """Collapse whitespace and lower the case. Half a surrogate pair, which JSON can hold, becomes a question mark."""
    if not isinstance(text, str):
        raise ValueError(f"texts must be strings, but one is {type(text).__name__}: {str(text)[:40]!r}.")
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = text if punctuation else text.translate(DROP_PUNCTUATION)
    return " ".join((text.lower() if lowercase else text).split())


def train_tokenizer(captions: Iterable[str], vocab: int, length: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab` tokens (258 at least); the same captions give the same tokenizer.

    Its alphabet is all 256 bytes, so any text in any script encodes without an unknown token.
    """
    if isinstance(captions, str):
        raise ValueError("captions must be strings in a list or stream, not one string.")
    if vocab < 258:
        raise ValueError(f"a tokenizer of {vocab} tokens is too small: 256 bytes, padding and end need 258.")
    pieces = Pieces(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[PAD, EOS], initial_alphabet=_byte_letters(), show_progress=False
    )
    pieces.train_from_iterator((clean(caption) for caption in captions), trainer)
    return Tokenizer(pieces, TextRules(length, eos_id=1, pad_id=0))


def byte_tokenizer(length: int) -> Tokenizer:
    """Bytes as tokens: 0 is padding, 1 the end, 2 + b the byte b. Nothing to train, 258 tokens."""
    tokens = [PAD, EOS, *_byte_letters()]
    pieces = Pieces(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces.decoder = decoders.ByteLevel()
    return Tokenizer(pieces, TextRules(length, eos_id=1, pad_id=0))


def clip_tokenizer(merges: Path, length: int) -> Tokenizer:
    """CLIP's byte pairs from its list of merges, as open_clip ships it (`bpe_simple_vocab_16e6.txt.gz`).

    [begin] tokens end, padded with zeros. Unlike open_clip's, it neither repairs broken Unicode nor resolves HTML
    entities. ValueError for a file that is none.
    """
    try:
        lines = gzip.decompress(merges.read_bytes()).decode("utf-8").split("\n")[1 : CLIP_VOCAB - 2 * 256 - 2 + 1]
        pairs = [(first, second) for first, second in (line.split() for line in lines)]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{merges} is not CLIP's list of merges ({error}).") from None
    # bytes that print come first here, in this order
    letters = sorted(_byte_letters(), key=lambda letter: (ord(letter) > 255, ord(letter)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    vocab = {token: i for i, token in enumerate([*tokens, "<start_of_text>", "<end_of_text>"])}
    pieces = Pieces(models.BPE(vocab, pairs, end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces.pre_tokenizer = pre_tokenizers.Sequence([words, spelt])
    end = vocab["<end_of_text>"]
    return Tokenizer(pieces, TextRules(length, eos_id=end, pad_id=0, bos_id=end - 1))


def load_tokenizer(
    path: str | Path,
    length: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    lowercase: bool | None = None,
    punctuation: bool | None = None,
) -> Tokenizer:
    """Load a tokenizer: a folder, a Hugging Face tokenizer.json or a SentencePiece .model.

    With silc_tokenizer.json beside it, all rules come from there. Without, the begin, end and padding tokens are
    those the file adds or names (padding falls back to the end token), the text is lower-cased, and `length` is
    needed. Arguments that are not None override either. ValueError says what is missing or damaged.
    """
    folder, file = _locate(Path(path))
    pieces = SentencePieces(file) if file.suffix == ".model" else _read_pieces(file)
    if (folder / RULES).is_file():
        rules = _read_rules(folder / RULES)
    else:
        if length is None:
            raise ValueError(f"{path} does not say how long a text is: give the length in tokens.")
        bos, eos, pad = _specials(pieces, folder)
        eos = eos if eos_id is None else eos_id
        if eos is None:
            raise ValueError(f"{file} names no end token: give its id as eos_id.")
        rules = TextRules(length, eos_id=eos, pad_id=eos if pad is None else pad, bos_id=bos)
    given: dict[str, Any] = {"length": length, "eos_id": eos_id, "pad_id": pad_id}
    given |= {"lowercase": lowercase, "punctuation": punctuation}
    changes = {name: value for name, value in given.items() if value is not None}
    return Tokenizer(pieces, replace(rules, **changes))


def _locate(path: Path) -> tuple[Path, Path]:
    if path.is_file():
        return path.parent, path
    candidates = [path / PIECES, path / SENTENCEPIECE, *sorted(path.glob("*.model"))]
    for file in candidates:
        if file.is_file():
            return path, file
    what = f"holds no {PIECES} and no SentencePiece .model" if path.is_dir() else "does not exist"
    raise ValueError(f"tokenizer: {path} {what}.")


def _read_pieces(file: Path) -> Pieces:
    try:
        pieces = Pieces.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:
        raise ValueError(f"{file} is not a tokenizer.json ({error}).") from None
    # A file may ask for both; here the rules do it
    pieces.no_padding()
    pieces.no_truncation()
    return pieces


def _read_rules(file: Path) -> TextRules:
    try:
        return load_json(file, TextRules)
    except TypeError:
        raise ValueError(f"{file} is incomplete: it needs length, eos_id and pad_id.") from None


def _specials(pieces: Pieces | SentencePieces, folder: Path) -> tuple[int | None, int | None, int | None]:
    """Begin, end and padding ids as the files give them; None for what they do not."""
    if isinstance(pieces, SentencePieces):
        processor = pieces.processor
        eos, pad = (i if i >= 0 else None for i in (processor.eos_id(), processor.pad_id()))
        return None, eos, pad
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            named.update(_named_tokens(folder / name))
    # What the file itself puts around a text is surer than names
    bare = pieces.encode("a", add_special_tokens=False).ids
    full = pieces.encode("a", add_special_tokens=True).ids if bare else []
    before = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    added = full[before + len(bare) :]
    eos = added[0] if added else _first(pieces, (named.get("eos_token"), *KNOWN_EOS))
    return full[0] if before else None, eos, _first(pieces, (named.get("pad_token"), *KNOWN_PAD))


def _named_tokens(file: Path) -> Iterator[tuple[str, str]]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}).") from None
    for name in ("eos_token", "pad_token"):
        token = data.get(name) if isinstance(data, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            yield name, token


def _first(pieces: Pieces, tokens: Iterable[str | None]) -> int | None:
    ids = (pieces.token_to_id(token) for token in tokens if token is not None)
    return next((i for i in ids if i is not None), None)


def _byte_letters() -> list[str]:
    """The letter by which byte-level BPE writes each byte: itself if it prints, else one from 256 on in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
