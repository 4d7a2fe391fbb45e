"""`generate RUN[@STEP] "prompt"`: text from a checkpoint, or from an exported folder."""

from __future__ import annotations

import math
import sys

from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.run_words import integer
from factory_train.errors import ConfigError, did_you_mean
from factory_train.runs_index import runs_root

_DEFAULTS = {"tokens": "64", "temperature": "0", "seed": "0", "top_p": "1.0"}
_KEYS = ("runs_root", *_DEFAULTS)
_EPILOG = """examples:
  generate 7k2m9x "def main("
  generate 7k2m9x@400 "def main(" tokens=200 temperature=0.8 top_p=0.95 seed=3
  generate runs/llama_fsdp-7k2m9x/export - < prompt.txt

Only what follows the prompt is written, piece by piece on a terminal. "" starts from an end-of-text, as a document does."""


def main(argv: list[str]) -> int:
    """Writes the continuation of a prompt to stdout, and returns 0.

    Raises:
        ConfigError: a word or a value that cannot be right.
        NotFoundError: no such run or checkpoint.
        IntegrityError: the checkpoint or the exported folder is damaged.
    """
    parser = ArgumentParser("generate", "Continues a prompt with a run's model, or an exported one.", _EPILOG)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN[@STEP] | FOLDER, PROMPT, key=value",
        help='the model, then the prompt in quotes, "-" for stdin (its last line end left out); '
        + f"keys: runs_root, {', '.join(f'{key}={value}' for key, value in _DEFAULTS.items())}",
    )
    where, prompt, settings = _split(parser.parse(argv).words)
    values = _DEFAULTS | settings
    num_tokens, seed = integer("generate", "tokens", values), integer("generate", "seed", values)
    temperature, top_p = _number("temperature", values, math.inf), _number("top_p", values, 1.0)
    if top_p == 0:
        raise ConfigError("top_p=0 leaves no token to choose from", where="generate top_p", fix="temperature=0 takes the most likely token")
    assert num_tokens is not None
    assert seed is not None
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")

    from factory_train.text_model import TextModel

    model = TextModel.open(where, runs_root(settings.get("runs_root")))
    for note in model.notes:
        print(note, file=sys.stderr)
    at_once = sys.stdout.isatty()
    for piece in model.continuation(prompt, num_tokens, temperature=temperature, top_p=top_p, seed=seed):
        print(piece, end="", flush=at_once)
    print()
    return 0


def _split(words: list[str]) -> tuple[str, str, dict[str, str]]:
    """Returns the model, the prompt and the settings; a prompt may have an '=' in it."""
    settings: dict[str, str] = {}
    names: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in _KEYS:
            settings[key] = value
            continue
        guess = did_you_mean(key, _KEYS) if equals and key.isidentifier() else None
        if guess:
            raise ConfigError(f"generate does not take '{key}'", where="generate", fix=f"did you mean {guess}={value}?")
        names.append(word)
    if not names:
        raise ConfigError("which run?", where="generate", fix='python -m factory_train generate RUN "prompt"; status lists the runs')
    if len(names) == 1:
        raise ConfigError("which prompt?", where="generate", fix=f'python -m factory_train generate {names[0]} "prompt", or - for stdin')
    if len(names) > 2:
        raise ConfigError(f"one prompt, not {len(names) - 1}", where="generate", fix=f'put it in quotes: "{" ".join(names[1:])}"')
    return names[0], names[1], settings


def _number(key: str, values: dict[str, str], highest: float) -> float:
    try:
        value = float(values[key])
    except ValueError:
        value = math.nan
    if not 0 <= value <= highest or math.isinf(value):
        bounds = "a number from 0 on" if math.isinf(highest) else f"a number from 0 to {highest:g}"
        raise ConfigError(f"'{values[key]}' is not {bounds}", where=f"generate {key}", fix=f"{key}={_DEFAULTS[key]}")
    return value
