"""Which tokenizer a corpus is encoded with, and which of its tokens ends a document."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from factory_train.data.tokenizer import Tokenizer
from factory_train.errors import DataError, IntegrityError, did_you_mean

# Trained here; everything else is a file or folder.
TRAINED = ("bpe", "byte")
# What the well-known families call the end of a text, for a tokenizer.json with nothing beside it that says.
_USUAL_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "[SEP]")


@dataclass(frozen=True)
class ChosenTokenizer:
    """A tokenizer as it will be stored.

    Args:
        kind: "bpe", "byte" or "given".
        file: contents of tokenizer.json; of a given one, byte for byte.
        eos_id: what ends a document; None ends it with nothing.
    """

    kind: str
    file: bytes
    eos_id: int | None


def trained(kind: str, sample: Iterable[str], vocab_size: int) -> ChosenTokenizer:
    """Trains "bpe" on a sample of the training text; "byte" learns nothing."""
    tokenizer = Tokenizer.train(kind, sample, (), vocab_size)
    return ChosenTokenizer(kind, tokenizer.to_json().encode(), tokenizer.eos_id)


def given(word: str, eos: str) -> ChosenTokenizer:
    """Reads a user's tokenizer.

    Args:
        word: a tokenizer.json, or a Hugging Face folder that has one.
        eos: "auto" is the eos_token of the tokenizer_config.json beside it, else a usual name; "none"; or the name of a token.
    Raises:
        DataError: no such file, not a tokenizer, or no such token.
    """
    path = Path(word).expanduser().absolute()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        contents = path.read_bytes()
    except OSError as error:
        fix = f"tokenizer=FILE or FOLDER with a tokenizer.json, or one of {', '.join(TRAINED)}"
        raise DataError(f"no tokenizer there: {error.strerror}", where=f"tokenizer={word}", fix=fix) from None
    try:
        tokenizer = Tokenizer.load(path, None)
    except IntegrityError as error:
        fix = "a tokenizer.json of the `tokenizers` library; save_pretrained of a fast tokenizer writes one"
        raise DataError(error.what, where=str(path), fix=fix) from None
    return ChosenTokenizer("given", contents, _eos_id(tokenizer, path, eos))


def _eos_id(tokenizer: Tokenizer, path: Path, eos: str) -> int | None:
    if eos == "none":
        return None
    if eos != "auto":
        return _known(tokenizer, eos, f"eos={eos}")
    beside = path.with_name("tokenizer_config.json")
    name = _configured(beside)
    if name is not None:
        return _known(tokenizer, name, f"eos_token in {beside}")
    found = next((index for usual in _USUAL_NAMES if (index := tokenizer.token_id(usual)) is not None), None)
    if found is None:
        special = tokenizer.special_tokens()
        some = f"; its special tokens: {' '.join(special[:8])}" if special else ""
        raise DataError(
            f"which token ends a document? There is no tokenizer_config.json with an eos_token beside it, and no usual name in it{some}",
            where=str(path),
            fix="eos=TOKEN, or eos=none to let documents run into each other",
        )
    return found


def _configured(path: Path) -> str | None:
    """Returns the eos_token of a tokenizer_config.json, which may be a name or an object with one."""
    try:
        token = json.loads(path.read_text()).get("eos_token")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="eos=TOKEN") from None
    return token.get("content") if isinstance(token, dict) else token


def _known(tokenizer: Tokenizer, name: str, where: str) -> int:
    index = tokenizer.token_id(name)
    if index is None:
        special = tokenizer.special_tokens()
        guess = did_you_mean(name, special)
        known = f"eos=TOKEN, one of {' '.join(special[:8])}" if special else "eos=none"
        raise DataError(f"the tokenizer has no token {name!r}", where=where, fix=f"did you mean eos='{guess}'?" if guess else known)
    return index
