"""The words of a verb that works on one run: the run, and a few `key=value` settings."""

from __future__ import annotations

from collections.abc import Collection

from factory_train.commands.arguments import ArgumentParser
from factory_train.errors import ConfigError, did_you_mean
from factory_train.run_dir import RunDir
from factory_train.runs_index import find_run, runs_root


def split_words(verb: str, words: list[str], keys: Collection[str]) -> tuple[str | None, dict[str, str]]:
    """Returns the run's name, if one was given, and the settings.

    Raises:
        ConfigError: a key the verb does not take, or more than one run.
    """
    known = ("runs_root", *keys)
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    for key in settings:
        if key not in known:
            guess = did_you_mean(key, known)
            fix = f"did you mean {guess}={settings[key]}?" if guess else f"keys: {', '.join(known)}"
            raise ConfigError(f"{verb} does not take '{key}'", where=verb, fix=fix)
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise ConfigError(f"{verb} takes one run, not {len(names)}: {' '.join(names)}", where=verb)
    return (names[0] if names else None), settings


def add_words(parser: ArgumentParser, keys: Collection[str] = ()) -> None:
    """Adds the run and the settings to a verb's arguments."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN | key=value",
        help=f"any unique end of a run's name, or its folder; keys: {', '.join(('runs_root', *keys))}",
    )


def the_run(verb: str, words: list[str], keys: Collection[str] = ()) -> tuple[RunDir, dict[str, str]]:
    """Returns the run that the words name, and the settings.

    Raises:
        ConfigError: no run was named, or several match.
        NotFoundError: there is no such run.
    """
    name, settings = split_words(verb, words, keys)
    if name is None:
        raise ConfigError("which run?", where=verb, fix=f"python -m factory_train {verb} RUN; status lists the runs")
    return find_run(name, runs_root(settings.get("runs_root"))), settings


def integer(verb: str, key: str, settings: dict[str, str]) -> int | None:
    """Returns a setting as a whole number, None when it was not given."""
    text = settings.get(key)
    if text is None:
        return None
    if not text.isdigit():
        raise ConfigError(f"'{text}' is not a whole number", where=f"{verb} {key}", fix=f"{key}=100")
    return int(text)
