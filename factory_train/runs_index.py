"""Finding runs: the folder they live in, the folders a person has used before, and a run by part of its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.errors import ConfigError, NotFoundError, did_you_mean
from factory_train.run_dir import RunDir


def runs_root(override: str | None = None) -> Path:
    """Returns the folder of all runs: `override`, else $FACTORY_TRAIN_RUNS, else ./runs; absolute."""
    return Path(override or os.environ.get("FACTORY_TRAIN_RUNS") or "runs").expanduser().absolute()


def index_path() -> Path:
    """Returns the file that remembers this person's runs folders."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "factory_train" / "roots.json"


def known_roots() -> list[Path]:
    """Returns the runs folders this person has used that are still there, the latest first."""
    try:
        roots = storage.read_json(index_path())
    except (OSError, ValueError):
        return []
    # A file that somebody has edited must not keep a run from starting.
    return [Path(root) for root in roots if Path(root).is_dir()] if _is_list_of_text(roots) else []


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def remember_root(root: Path) -> None:
    """Puts a runs folder at the head of the index; a home that cannot be written only loses the convenience."""
    roots = [str(root), *(str(known) for known in known_roots() if known != root)]
    try:
        storage.write_json(index_path(), roots)
    except OSError:
        return


def all_runs(root: Path) -> list[RunDir]:
    """Returns the runs in a folder, oldest first."""
    if not root.is_dir():
        return []
    runs = [RunDir(entry.absolute()) for entry in root.iterdir() if (entry / "run.json").is_file()]
    return sorted(runs, key=_created)


def _created(run: RunDir) -> float:
    try:
        return float(run.info()["created"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        # One broken run.json must not hide the runs beside it.
        return 0.0


def find_run(text: str, root: Path | None = None) -> RunDir:
    """Returns the run that `text` means: a run directory's path, a run's name, its id, or any unique suffix of its name.

    Args:
        root: where to look first; the folders this person used before come next.

    Raises:
        NotFoundError: no run of that name anywhere.
        ConfigError: several runs end like that.
    """
    if (Path(text) / "run.json").is_file():
        return RunDir.open(Path(text))
    first = root or runs_root()
    names: list[str] = []
    for folder in [first, *(known for known in known_roots() if known != first)]:
        runs = all_runs(folder)
        # By the folder's name, not the id inside: a copied run directory has a name of its own.
        exact = [run for run in runs if run.name == text or run.name.endswith(f"-{text}")]
        found = exact or [run for run in runs if run.name.endswith(text)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(
                f"several runs end in '{text}': {', '.join(run.name for run in found)}", where=str(folder), fix="use a full name"
            )
        names += [run.name for run in runs]
    guess = did_you_mean(text, names)
    raise NotFoundError(
        f"no run '{text}'",
        where=str(first),
        fix=f"did you mean {guess}?" if guess else "python -m factory_train status lists the runs; runs_root=FOLDER looks elsewhere",
    )
