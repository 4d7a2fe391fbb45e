"""Islands of a run on disk: each is a run directory of its own below `gangs/`, with its attempts and its own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from factory_train.config import Config, flatten, schema_keys
from factory_train.run_dir import Attempt, RunDir

_FOLDER = "gangs"
_KIND = "island"
# Names, and paths to what is compared by its content.
_OF_ONE_SIDE = {"recipe", "run", "init_from", "data.path", "data.sets"}


def island_names(count: int) -> tuple[str, ...]:
    """Returns the names of all islands of a run, in order."""
    return tuple(f"{_KIND}-{index}" for index in range(count))


def local_islands(cfg: Config) -> tuple[str, ...]:
    """Returns the names of the islands that belong to this run directory: all, unless some are started elsewhere."""
    names = island_names(cfg.diloco.islands)
    return tuple(names[index] for index in sorted(cfg.diloco.local_islands)) or names


def same_on_all_islands(cfg: Config) -> dict[str, Any]:
    """Returns the keys that islands with run directories of their own must agree on; where data and first weights lie may differ."""
    safe = {key.name for key in schema_keys() if key.safe}
    return {name: value for name, value in flatten(cfg).items() if name not in safe | _OF_ONE_SIDE} | {"train.steps": cfg.train.steps}


def island_run(run: RunDir, island: str) -> RunDir:
    """Returns the directory of an island, which need not exist."""
    return RunDir(run.path / _FOLDER / island)


def has_islands(run: RunDir) -> bool:
    """Returns whether islands of the run were ever started."""
    return (run.path / _FOLDER).is_dir()


def islands_of(run: RunDir) -> list[RunDir]:
    """Returns the directories of the islands of a run that were ever started, in the order of their names."""
    return [RunDir(path) for path in sorted((run.path / _FOLDER).glob(f"{_KIND}-*"))]


def run_of_island(run: RunDir) -> RunDir:
    """Returns the run that an island's directory belongs to."""
    assert is_island(run), run.path
    return RunDir(run.path.parent.parent)


def is_island(run: RunDir) -> bool:
    """Returns whether a directory is that of an island."""
    return run.path.parent.name == _FOLDER


def title(run: RunDir) -> str:
    """Returns the name of a run; that of an island names its run too."""
    return f"{run_of_island(run).name}-{run.name}" if is_island(run) else run.name


def exchange_folder(run: RunDir) -> Path:
    """Returns where the islands of a run tell each other who takes part."""
    return run.path / "exchange"


def new_island_attempt(run: RunDir, island: str, cfg: Config) -> Attempt:
    """Makes the next attempt of an island; one process at a time does.

    Args:
        cfg: of the whole run: what an island's share of it is follows from the number of islands.
    """
    home = island_run(run, island)
    if not (home.path / "run.json").is_file():
        RunDir.create(home.path.parent, _KIND, island.removeprefix(f"{_KIND}-"))
        # Tokens, tokenizer and manifest are the run's.
        home.data.symlink_to(Path("..", "..", run.data.name))
    return home.new_attempt(cfg)
