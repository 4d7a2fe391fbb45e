"""Islands of a run on disk: each is a run directory of its own below `gangs/`, with its attempts and its own checkpoints."""

from __future__ import annotations

from pathlib import Path

from factory_train.config import Config
from factory_train.run_dir import Attempt, RunDir

_FOLDER = "gangs"
_KIND = "island"


def island_names(count: int) -> tuple[str, ...]:
    """Returns the names of all islands of a run, in order."""
    return tuple(f"{_KIND}-{index}" for index in range(count))


def island_run(run: RunDir, island: str) -> RunDir:
    """Returns the directory of an island, which need not exist."""
    return RunDir(run.path / _FOLDER / island)


def has_islands(run: RunDir) -> bool:
    """Returns whether islands of the run were ever started."""
    return (run.path / _FOLDER).is_dir()


def run_of_island(run: RunDir) -> RunDir:
    """Returns the run that an island's directory belongs to."""
    assert run.path.parent.name == _FOLDER, run.path
    return RunDir(run.path.parent.parent)


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
