"""`prepare PATH...`: a corpus of any size to token shards, in several processes; what was interrupted goes on."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.progress_bar import ProgressBar
from factory_train.errors import ConfigError, did_you_mean
from factory_train.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from factory_train.data.manifest import DataManifest

_LOG_EVERY_S = 30.0
_KEYS = {
    "out": "folder to make; PATH-tokens here if left out",
    "tokenizer": "bpe (trained, the default), byte, a tokenizer.json, or a Hugging Face folder that has one",
    "vocab_size": "of a trained tokenizer, 32768 if left out",
    "eos": "token that ends a document: auto (its tokenizer_config.json says, or a usual name), none, or a token",
    "format": "auto (by the ending), text, jsonl or parquet",
    "field": "of JSON lines, and column of parquet: text if left out; dots lead inwards (meta.body)",
    "document": "of text files: file (one document each, the default) or line",
    "validation_fraction": "held out: 0.05 if left out, less of more than 1 GB",
    "on_error": "of malformed documents: stop (the default), or skip, which counts them",
    "workers": "processes; one for each core if left out",
}
_CHOICES = {"format": ("auto", "text", "jsonl", "parquet"), "document": ("file", "line"), "on_error": ("stop", "skip")}
_EPILOG = """examples:
  prepare corpus/ out=corpus-tokens
  prepare 'data/*.jsonl.gz' field=body tokenizer=Llama-3.2-1B/ out=web
  prepare web/*.parquet tokenizer=tokenizer.json eos='<|endoftext|>' on_error=skip
  prepare --verify web

Then: python -m factory_train recipe=llama_fsdp data.path=web. Ended in any way, the same command goes on."""


def main(argv: list[str]) -> int:
    """Makes a dataset, or verifies one with --verify, and returns 0.

    Raises:
        ConfigError: a word or a value that cannot be right, or something else is at `out`.
        DataError: files or a tokenizer that cannot be used.
        IntegrityError: --verify found damage.
    """
    parser = ArgumentParser("prepare", "Makes token shards of text, JSON lines or parquet.", _EPILOG)
    parser.add_argument("--verify", action="store_true", help="compare every file of a prepared folder with its sha256")
    keys = "; ".join(f"{key}= {what}" for key, what in _KEYS.items())
    parser.add_argument("words", nargs="*", metavar="PATH ... key=value", help=f"files, folders and 'globs'; keys: {keys}")
    arguments = parser.parse(argv)
    paths, values = _split(arguments.words)
    if not paths:
        raise ConfigError("which files?", where="prepare", fix="python -m factory_train prepare FILE, FOLDER or 'GLOB'")
    return _verify(paths, values) if arguments.verify else _prepare(paths, values)


def _verify(paths: list[str], values: dict[str, str]) -> int:
    from factory_train.data.corpus.build import verify

    if values:
        raise ConfigError("--verify takes folders only", where="prepare", fix=f"leave out {next(iter(values))}=")
    for path in paths:
        folder = Path(path).expanduser().absolute()
        manifest = verify(folder)
        print(f"{folder}: every file is as it was made, {manifest.id}")
    return 0


def _prepare(paths: list[str], values: dict[str, str]) -> int:
    from factory_train.data.corpus.build import TokenizerRequest, build
    from factory_train.data.corpus.inputs import find_inputs
    from factory_train.data.corpus.request import Request, default_validation_fraction

    settings = {key: _choice(values, key) for key in _CHOICES}
    vocab_size = _whole(values, "vocab_size", 32768, at_least=257)
    workers = _whole(values, "workers", len(os.sched_getaffinity(0)), at_least=1)
    asked_fraction = _fraction(values)
    out = Path(values.get("out") or _default_out(paths[0])).expanduser().absolute()
    inputs = find_inputs(paths, settings["format"])
    if any(Path(file.path).is_relative_to(out) for file in inputs.files):
        raise ConfigError("the result would be among the files it is made from", where=f"out={out}", fix="out=FOLDER elsewhere")
    found = "1 file" if len(inputs.files) == 1 else f"{len(inputs.files):,} files"
    _say(f"{found}, {format_bytes(inputs.num_bytes)}{_left_out(inputs.ignored)}")
    request = Request(
        field=values.get("field", "text"),
        by_line=settings["document"] == "line",
        validation_fraction=asked_fraction or default_validation_fraction(inputs.num_bytes),
        skip_malformed=settings["on_error"] == "skip",
    )
    tokenizer = TokenizerRequest(values.get("tokenizer", "bpe"), vocab_size, values.get("eos", "auto"))
    started = time.monotonic()
    result = build(inputs, out, request, tokenizer, workers=workers, report=_say, progress=_bar)
    if not result.encoded_tokens:
        _say(f"{out} was prepared before")
    else:
        rate = format_count(result.encoded_tokens / max(result.seconds, 1e-9))
        whole = format_duration(time.monotonic() - started)
        _say(f"{format_count(result.encoded_tokens)} tokens in {format_duration(result.seconds)}, {rate} tokens/s; in all {whole}")
    _show(result.manifest, out)
    return 0


def _show(manifest: DataManifest, out: Path) -> None:
    from factory_train.data.corpus.statistics import Statistics

    assert manifest.statistics is not None
    for line in Statistics.from_json(manifest.statistics).lines():
        print(line)
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    print(f"train      {train.num_tokens:,} tokens in {len(train.shards):,} shards")
    print(f"validation {validation.num_tokens:,} tokens")
    name = "none" if manifest.eos_id is None else str(manifest.eos_id)
    print(f"tokenizer  {manifest.tokenizer}, {manifest.vocab_size:,} tokens, end of text: {name}")
    print(f"made       {out}")
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    print(f"train on it: python -m factory_train recipe=llama_fsdp data.path={shown}")


def _say(line: str) -> None:
    print(f"prepare: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(num_bytes: int) -> Iterator[Callable[[int], None]]:
    with ProgressBar("prepare", num_bytes, log_every_s=_LOG_EVERY_S) as bar:
        yield bar.add


def _left_out(ignored: dict[str, int]) -> str:
    if not ignored:
        return ""
    endings = ", ".join(f"{count:,} of {ending}" for ending, count in sorted(ignored.items(), key=lambda item: -item[1])[:5])
    return f"; left out by their endings: {endings} (format=text takes all)"


def _default_out(path: str) -> str:
    name = Path(path).expanduser().absolute().name.split("*")[0].split("?")[0].split("[")[0]
    for suffix in (".gz", ".jsonl", ".ndjson", ".parquet", ".txt"):
        name = name.removesuffix(suffix)
    return f"{name.rstrip('-_.') or 'data'}-tokens"


def _split(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Returns paths and settings; a path may have an '=' in it."""
    paths: list[str] = []
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in _KEYS:
            values[key] = value
        elif equals and key.isidentifier() and not os.path.exists(word):
            guess = did_you_mean(key, _KEYS)
            fix = f"did you mean {guess}={value}?" if guess else f"keys: {' '.join(_KEYS)}"
            raise ConfigError(f"prepare does not take '{key}'", where="prepare", fix=fix)
        else:
            paths.append(word)
    return paths, values


def _choice(values: dict[str, str], key: str) -> str:
    choices = _CHOICES[key]
    value = values.get(key, choices[0])
    if value not in choices:
        raise ConfigError(f"'{value}' is not one of {', '.join(choices)}", where=f"prepare {key}", fix=f"{key}={choices[0]}")
    return value


def _whole(values: dict[str, str], key: str, default: int, *, at_least: int) -> int:
    text = values.get(key, str(default))
    if not (text.isdecimal() and int(text) >= at_least):
        raise ConfigError(f"'{text}' is not a whole number of at least {at_least}", where=f"prepare {key}", fix=f"{key}={default}")
    return int(text)


def _fraction(values: dict[str, str]) -> float | None:
    text = values.get("validation_fraction")
    if text is None:
        return None
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < 1:
        raise ConfigError(f"'{text}' is not between 0 and 1", where="prepare validation_fraction", fix="validation_fraction=0.05")
    return fraction
