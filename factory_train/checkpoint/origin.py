"""Starting a run from another's weights: `init_from=RUN[@STEP]`. Finding them needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from factory_train.checkpoint import reference
from factory_train.config import Config, ModelConfig
from factory_train.errors import ConfigError, FactoryTrainError
from factory_train.run_dir import RunDir

if TYPE_CHECKING:
    from factory_train.checkpoint.agreement import Ranks
    from factory_train.checkpoint.entries import TensorEntry

# Keys of the model section that decide names and shapes of its weights.
_SHAPES = ("architecture", "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "tie_embeddings")


@dataclass(frozen=True)
class Origin:
    """A checkpoint of another run, as `init_from` names it once it is resolved: `FOLDER@CHECKPOINT`."""

    run: RunDir
    checkpoint: str

    def __str__(self) -> str:
        return f"{self.run.path}@{self.checkpoint}"

    @property
    def title(self) -> str:
        """For people, and for `parent_run` in run.json."""
        return f"{self.run.name}@{self.checkpoint}"

    @staticmethod
    def parse(text: str) -> Origin:
        """Reads what `str` wrote."""
        folder, _, checkpoint = text.rpartition("@")
        return Origin(RunDir(Path(folder)), checkpoint)


def resolve(text: str, root: Path) -> Origin:
    """Returns the checkpoint that `RUN[@STEP]` means now: the newest where no step is given.

    Raises:
        ConfigError: it names a file, or several runs.
        NotFoundError: there is no such run or checkpoint.
    """
    try:
        found = reference.find(text, root)
    except FactoryTrainError as error:
        error.where = f"init_from={text}"
        raise
    if found.run is None:
        raise ConfigError("this checkpoint is in no run directory", where=f"init_from={text}", fix="init_from=RUN or RUN@STEP")
    return Origin(found.run, found.path.name)


def means(text: str, origin: Origin) -> bool:
    """Returns whether `RUN[@STEP]`, typed again, can mean a checkpoint that was resolved earlier; nothing is looked up."""
    if text == str(origin):
        return True
    word, step = reference.split(text)
    of_step = int(origin.checkpoint.removeprefix("step-").partition(".")[0])
    is_checkpoint = step in (None, origin.checkpoint, str(of_step))
    return is_checkpoint and bool(word) and origin.run.name.endswith(Path(word).name)


def check_fits(origin: Origin, cfg: Config) -> None:
    """Checks, before anything runs, that the weights are those of the model that is asked for.

    Raises:
        ConfigError: they are not, and `init_strict` wants them to be.
    """
    attempt = origin.run.last_attempt()
    if attempt is None or not cfg.init_strict:
        return
    theirs, ours = attempt.config().model, cfg.model
    other = [key for key in _SHAPES if getattr(theirs, key) != getattr(ours, key)]
    if other:
        listed = ", ".join(f"model.{key} is {getattr(theirs, key)} there and {getattr(ours, key)} here" for key in other)
        raise ConfigError(
            f"the weights are of another model ({listed})",
            where="init_from",
            fix=" ".join(_override(theirs, key) for key in other) + ", or init_strict=false to take what fits",
        )


def _override(model: ModelConfig, key: str) -> str:
    value = getattr(model, key)
    return f"model.{key}={str(value).lower() if isinstance(value, bool) else value}"


def load_origin(origin: Origin, entries: Sequence[TensorEntry], ranks: Ranks, *, strict: bool) -> tuple[str, ...]:
    """Fills the weights of a new run from its origin; returns the tensors that kept their initial values.

    Args:
        strict: whether every tensor must be there in the same shape.

    Raises:
        NotFoundError: the checkpoint has gone.
        IntegrityError: it is damaged.
        ConfigError: it holds another model.
    """
    from factory_train.checkpoint.load import load_checkpoint
    from factory_train.checkpoint.reader import CheckpointReader

    opened: list[CheckpointReader] = []
    try:
        ranks.agree("opening a checkpoint", lambda: opened.append(CheckpointReader(origin.run.checkpoints / origin.checkpoint)))
        loaded = load_checkpoint(opened[0], entries, sections=("weights",), strict=strict, ranks=ranks)
    finally:
        for reader in opened:
            reader.close()
    if not strict and len(loaded.left_alone) == sum(entry.section == "weights" for entry in entries):
        raise ConfigError("none of the weights fit this model", where=f"init_from={origin.title}", fix="leave init_from out")
    return loaded.left_alone
