"""The launchers a job.json can name."""

from __future__ import annotations

from factory_train.errors import ConfigError, did_you_mean
from factory_train.launchers.job import Launcher
from factory_train.launchers.local import LocalLauncher

LAUNCHERS: dict[str, type[Launcher]] = {"local": LocalLauncher}


def launcher_named(name: str) -> Launcher:
    """Returns the launcher called `name`.

    Raises:
        ConfigError: this version knows no such launcher.
    """
    if name not in LAUNCHERS:
        guess = did_you_mean(name, LAUNCHERS)
        raise ConfigError(f"unknown launcher '{name}'", where="launcher.name", fix=f"launcher.name={guess}" if guess else None)
    return LAUNCHERS[name]()
