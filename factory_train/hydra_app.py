"""Hydra's own flags, handed to a real Hydra application over the same configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from factory_train.compose import CONFIG_DIR, groups, register_schema
from factory_train.errors import ConfigError, ExitCode
from factory_train.overrides import parse, quoted

# Flags whose whole meaning is Hydra's. Those that change what is run (--multirun, --config-dir) are ours.
HYDRA_FLAGS = ("--cfg", "-c", "--resolve", "--package", "-p", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
_REFUSED = {
    "--config-name": "recipe=NAME chooses what is run",
    "-cn": "recipe=NAME chooses what is run",
    "--config-path": "--config-dir DIR adds a folder",
    "-cp": "--config-dir DIR adds a folder",
    "--experimental-rerun": "resume RUN continues a run from its own files",
}


def is_for_hydra(argv: Sequence[str]) -> bool:
    """Returns whether the command asks Hydra something rather than for a run.

    Raises:
        ConfigError: a flag of Hydra that has no meaning here.
    """
    flags = [word.partition("=")[0] for word in argv if word.startswith("-")]
    for flag in flags:
        if flag in _REFUSED:
            raise ConfigError(f"{flag} is not for this program", fix=_REFUSED[flag])
    return any(flag in HYDRA_FLAGS for flag in flags)


def run(argv: Sequence[str]) -> int:
    """Answers what Hydra's flags ask and returns the exit code; nothing is composed for a run and nothing written.

    Raises:
        ConfigError: an override that cannot be right.
    """
    import hydra

    words = [word for word in argv if "=" in word and not word.startswith("-")]
    if "--shell-completion" not in argv and "-sc" not in argv:
        parse(words, groups(_config_dir(argv)))
    register_schema()

    @hydra.main(version_base=None, config_path=str(CONFIG_DIR.resolve()), config_name="config")
    def application(_: Any) -> None:
        """Hydra answers by itself; there is nothing to run."""

    # Hydra reads the arguments of the process.
    before = sys.argv
    sys.argv = ["factory_train", *[quoted([word])[0] if word in words else word for word in argv]]
    try:
        application()
    except SystemExit as end:
        return int(end.code) if isinstance(end.code, int) else ExitCode.FAILED if end.code else ExitCode.OK
    finally:
        sys.argv = before
    return ExitCode.OK


def _config_dir(argv: Sequence[str]) -> str | None:
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            return value if equals else following
    return None
