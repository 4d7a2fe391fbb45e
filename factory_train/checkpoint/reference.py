"""How a person names a checkpoint: `RUN`, `RUN@STEP`, or its folder. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from factory_train.checkpoint.catalog import select
from factory_train.checkpoint.format import MANIFEST_NAME
from factory_train.errors import ConfigError, NotFoundError
from factory_train.run_dir import RunDir
from factory_train.runs_index import find_run


@dataclass(frozen=True)
class Reference:
    """A checkpoint that was found.

    Args:
        path: its folder.
        run: whose it is; None for a folder outside of a run directory.
    """

    path: Path
    run: RunDir | None

    @property
    def title(self) -> str:
        return f"{self.run.name}@{self.path.name}" if self.run else str(self.path)


def split(text: str) -> tuple[str, str | None]:
    """Returns the run and the step of `RUN[@STEP]`.

    Raises:
        ConfigError: there is nothing after '@'.
    """
    word, at, step = text.rpartition("@")
    if not at:
        return text, None
    if not step:
        raise ConfigError("no step after '@'", where=text, fix=f"{word} alone takes the newest")
    return word, step


def find(text: str, root: Path) -> Reference:
    """Returns the checkpoint that `text` means: the newest of a run where no step is given.

    Raises:
        ConfigError: it names a file, or several runs.
        NotFoundError: there is no such run or checkpoint.
    """
    folder = Path(text)
    if (folder / MANIFEST_NAME).is_file():
        inside = folder.absolute().parent.parent
        return Reference(folder.absolute(), RunDir(inside) if (inside / "run.json").is_file() else None)
    word, step = split(text)
    if Path(word).is_file():
        raise ConfigError("this is a file, and a checkpoint is a folder of a run", where=word, fix="RUN or RUN@STEP; status lists the runs")
    try:
        run = find_run(word, root)
        return Reference(select(run, step).path, run)
    except NotFoundError as error:
        error.where = text
        raise
