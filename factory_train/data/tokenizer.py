"""Tokenizers, all of them `tokenizers` objects, so that each exports as a Hugging Face tokenizer.json: three kinds that
are made here, and any that a user brings (`prepare tokenizer=FILE`).

- bpe: byte-level byte-pair encoding, trained on the training split. Radford et al., "Language Models are Unsupervised
  Multitask Learners", 2019, section 2.2.
- byte: one token a byte of UTF-8; token b is byte b.
- char: one token a character of the whole text, in code point order, and nothing else: no end-of-text token, so that
  the vocabulary is exactly the characters (`eos_id` is None).

Text is never interpreted: the characters `<|endoftext|>` in a document are characters, not the special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

from factory_train import storage
from factory_train.errors import DataError, IntegrityError

END_OF_TEXT = "<|endoftext|>"
# Text is encoded in pieces of about this many characters: enough to share among threads, little enough memory.
PIECE_CHARACTERS = 2**16
_CUT = re.compile(r"(?<=\S)\n")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """Text to token ids and back; `decode(encode(text)) == text` for those made here, and for most others.

    Args:
        inner: of any kind; what it says about truncation and padding is for inference, and switched off.
        eos_id: the end-of-text token, which no text is ever encoded to; None if there is none.
    """

    def __init__(self, inner: HfTokenizer, eos_id: int | None) -> None:
        self._inner = inner
        # Not part of tokenizer.json: by default `tokenizers` would turn the characters into the special token.
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        vocabulary = inner.get_vocab(with_added_tokens=True)
        # Ids may have holes between them.
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.eos_id = eos_id
        self._kind = _kind(inner)
        self._characters = frozenset(vocabulary) if self._kind == "char" else None

    @property
    def cuts_at_line_ends(self) -> bool:
        """Whether a long text may be encoded in the `pieces` of it: true of byte-level tokens, which know no start of a text."""
        return self._kind in ("bytes", "char")

    @staticmethod
    def train(kind: str, train: Iterable[str], everything: Iterable[str], vocab_size: int) -> Tokenizer:
        """Makes the tokenizer of a source; the same texts give the same tokenizer.

        Args:
            kind: "bpe", "byte" or "char".
            train: texts of the training split, which bpe learns from.
            everything: all texts, whose characters are the vocabulary of char.
            vocab_size: of bpe, at most, end-of-text included.
        """
        if kind == "char":
            return Tokenizer(_char(everything), None)
        inner = _bpe(train, vocab_size) if kind == "bpe" else _byte()
        return Tokenizer(inner, inner.token_to_id(END_OF_TEXT))

    @staticmethod
    def load(path: Path, eos_id: int | None) -> Tokenizer:
        """Reads a tokenizer.json.

        Args:
            path: written by `save`, or anybody's.
            eos_id: its end-of-text token, which the file itself does not tell.
        Raises:
            IntegrityError: it is missing or damaged.
        """
        try:
            return Tokenizer(HfTokenizer.from_file(str(path)), eos_id)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise IntegrityError(f"not a tokenizer: {error}", where=str(path)) from None

    def save(self, path: Path) -> None:
        """Writes tokenizer.json."""
        storage.write_atomic(path, self.to_json())

    def to_json(self) -> str:
        return self._inner.to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, with no end-of-text.

        Raises:
            DataError: a character the char vocabulary does not have.
        """
        return [token for ids in self.encode_batch(list(pieces(text))) for token in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, using all cores; see `encode`."""
        if self._characters is not None:
            for text in texts:
                unknown = set(text) - self._characters
                if unknown:
                    what = f"character {min(unknown)!r} is not in the vocabulary of this char tokenizer"
                    raise DataError(what, fix="leave it out, or train with data.tokenizer=bpe or byte")
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, end-of-text left out; bytes that are no UTF-8 become U+FFFD, as a sample may end midway."""
        return self._inner.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its name; None if there is no such token."""
        index: int | None = self._inner.token_to_id(token)
        return index

    def token_name(self, token_id: int) -> str | None:
        """Returns a token as the vocabulary spells it; None for an id that is not in use."""
        name: str | None = self._inner.id_to_token(token_id)
        return name

    def special_tokens(self) -> list[str]:
        """Returns the names of the tokens that stand for no text, by id."""
        return [token.content for _, token in sorted(self._inner.get_added_tokens_decoder().items()) if token.special]

    def token_num_bytes(self) -> list[int]:
        """Returns how many bytes of text each token stands for; 0 for special tokens and ids that are not in use.

        Exact for byte-level and char vocabularies; of others, which may add a space in front of a text, within a byte or two a text.
        """
        sizes = [0] * self.vocab_size
        for token, index in self._inner.get_vocab(with_added_tokens=False).items():
            sizes[index] = _num_bytes(token, self._kind)
        for index, added in self._inner.get_added_tokens_decoder().items():
            sizes[index] = 0 if added.special else len(added.content.encode())
        return sizes


def _kind(inner: HfTokenizer) -> str:
    """Returns what the tokens of a vocabulary are: "bytes" in disguise, "char"acters, or "pieces" of words of other kinds."""
    definition = json.loads(inner.to_str())
    decoder = definition["decoder"] or {}
    kinds = {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", ()))}
    if "ByteLevel" in kinds:
        return "bytes"
    return "char" if kinds == {"Fuse"} and definition["pre_tokenizer"] is None and definition["normalizer"] is None else "pieces"


def _num_bytes(token: str, kind: str) -> int:
    if kind == "bytes":
        return len(token)
    if kind == "pieces":
        if _BYTE_TOKEN.fullmatch(token):
            return 1
        # A space of SentencePiece, and the mark of WordPiece that goes on with a word.
        token = token.replace("\u2581", " ").removeprefix("##")
    return len(token.encode())


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yields consecutive pieces of a text, each about `size` characters, cut where no token can span the cut.

    Byte-level BPE never joins a line end with what is before it unless that is white space too, so a piece ends before
    such a line end. Only a line longer than `size` is cut elsewhere.
    """
    start = 0
    while len(text) - start > size:
        found = _CUT.search(text, start + size, start + 2 * size)
        end = found.start() if found else min(start + 2 * size, len(text))
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _byte_level(model: models.BPE, *, use_regex: bool) -> HfTokenizer:
    inner = HfTokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()
    return inner


def _bpe(texts: Iterable[str], vocab_size: int) -> HfTokenizer:
    inner = _byte_level(models.BPE(), use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # A pair seen once is no regularity.
        min_frequency=2,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return inner


def _byte() -> HfTokenizer:
    inner = _byte_level(models.BPE(vocab=_byte_vocabulary(), merges=[]), use_regex=False)
    inner.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return inner


def _byte_vocabulary() -> dict[str, int]:
    """Returns the characters that stand for the bytes in a byte-level vocabulary.

    Printable Latin-1 stands for itself; the other bytes, in order, for the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}


def _char(texts: Iterable[str]) -> HfTokenizer:
    characters = sorted(set().union(*map(set, texts)))
    inner = HfTokenizer(models.BPE(vocab={character: index for index, character in enumerate(characters)}, merges=[]))
    inner.decoder = decoders.Fuse()
    return inner
