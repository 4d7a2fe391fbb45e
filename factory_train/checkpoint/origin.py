"""Starting a run from other weights: `init_from=RUN[@STEP]` or `init_from=hf:FOLDER`. Finding them needs no torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from factory_train.checkpoint import reference
from factory_train.config import Config, ModelConfig, RopeScaling
from factory_train.errors import ConfigError, FactoryTrainError
from factory_train.models.hf_config import weight_shapes
from factory_train.models.hf_folder import HfFolder
from factory_train.run_dir import RunDir

if TYPE_CHECKING:
    from factory_train.checkpoint.agreement import Ranks
    from factory_train.checkpoint.entries import TensorEntry

HF_PREFIX = "hf:"

# Keys of the model section that decide names and shapes of its weights.
_SHAPES = ("architecture", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "qkv_bias", "qk_norm", "ffn_dim", "tie_embeddings")
# Those that decide what the model computes with them. A run's own are its owner's to change; those of a folder are as published.
_FUNCTION = (*_SHAPES, "vocab_size", "rope_theta", "rope_scaling", "norm_eps")
_NOT_STRICT = ", or init_strict=false to take what fits"


@dataclass(frozen=True)
class RunOrigin:
    """A checkpoint of another run, as `init_from` names it once it is resolved: `FOLDER@CHECKPOINT`."""

    run: RunDir
    checkpoint: str

    def __str__(self) -> str:
        return f"{self.run.path}@{self.checkpoint}"

    @property
    def title(self) -> str:
        """For people, and for `parent_run` in run.json."""
        return f"{self.run.name}@{self.checkpoint}"

    def is_meant_by(self, text: str) -> bool:
        """Returns whether `RUN[@STEP]`, typed again, can mean this checkpoint; nothing is looked up."""
        if text == str(self):
            return True
        if text.startswith(HF_PREFIX):
            return False
        word, step = reference.split(text)
        of_step = int(self.checkpoint.removeprefix("step-").partition(".")[0])
        is_checkpoint = step in (None, self.checkpoint, str(of_step))
        return is_checkpoint and bool(word) and self.run.name.endswith(Path(word).name)

    def check_fits(self, cfg: Config) -> None:
        """Checks, before anything runs, that the weights are those of the model that is asked for.

        Raises:
            ConfigError: they are not, and `init_strict` wants them to be.
        """
        attempt = self.run.last_attempt()
        if attempt is not None and cfg.init_strict:
            _check_same(attempt.config().model, cfg.model, _SHAPES, "init_from", _NOT_STRICT)

    def load(self, entries: Sequence[TensorEntry], ranks: Ranks, *, strict: bool) -> tuple[str, ...]:
        """Fills the weights of a new run; returns the tensors that kept their initial values.

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
            ranks.agree("opening a checkpoint", lambda: opened.append(CheckpointReader(self.run.checkpoints / self.checkpoint)))
            loaded = load_checkpoint(opened[0], entries, sections=("weights",), strict=strict, ranks=ranks)
        finally:
            for reader in opened:
                reader.close()
        return loaded.left_alone


@dataclass(frozen=True)
class HfOrigin:
    """A Hugging Face model folder, as `init_from` names it once it is resolved: `hf:FOLDER`, the path being absolute."""

    folder: Path

    def __str__(self) -> str:
        return f"{HF_PREFIX}{self.folder}"

    @property
    def title(self) -> str:
        """For people, and for `parent_run` in run.json."""
        return f"{HF_PREFIX}{self.folder.name}"

    @staticmethod
    def parse(text: str) -> HfOrigin:
        """Reads `hf:FOLDER`; a path that is not absolute begins at the current folder.

        Raises:
            ConfigError: there is no path.
        """
        path = text.removeprefix(HF_PREFIX)
        if not path:
            raise ConfigError("no folder after 'hf:'", where=f"init_from={text}", fix="init_from=hf:FOLDER")
        return HfOrigin(Path(os.path.abspath(Path(path).expanduser())))

    def is_meant_by(self, text: str) -> bool:
        """Returns whether `hf:FOLDER`, typed again, means this folder; nothing is looked up."""
        return text.startswith(HF_PREFIX) and HfOrigin.parse(text) == self

    def check_fits(self, cfg: Config) -> None:
        """Checks, before anything runs, that all weights are there and are those of the model that is asked for.

        Raises:
            NotFoundError: the folder or a file of it is not there.
            IntegrityError: a file of weights is cut short.
            ConfigError: the model is not supported, or is another one and `init_strict` wants it to be the same.
        """
        try:
            folder = HfFolder.open(self.folder)
            if not cfg.init_strict:
                _check_same(folder.model, cfg.model, ("architecture",), str(self))
                return
            _check_same(folder.model, cfg.model, _FUNCTION, str(self), _NOT_STRICT)
            assert folder.model.vocab_size is not None
            folder.check_holds(weight_shapes(folder.model, folder.model.vocab_size), _NOT_STRICT)
        except FactoryTrainError as error:
            inside = [Path(error.where).name] if error.where and Path(error.where).parent == self.folder else []
            error.where = ", ".join([f"init_from={self}", *inside])
            raise

    def load(self, entries: Sequence[TensorEntry], ranks: Ranks, *, strict: bool) -> tuple[str, ...]:
        """Fills the weights of a new run, each rank reading its own boxes; returns the tensors that kept their initial values.

        Args:
            strict: whether every tensor must be there in the same shape.

        Raises:
            NotFoundError: the folder has gone.
            IntegrityError: a file of weights is cut short.
            ConfigError: it holds another model.
        """
        weights = [entry for entry in entries if entry.section == "weights"]
        opened: list[HfFolder] = []
        ranks.agree("opening a Hugging Face folder", lambda: opened.append(HfFolder.open(self.folder)))
        folder = opened[0]
        if strict:
            shapes = {entry.name: entry.global_shape for entry in weights}
            ranks.agree("comparing the model with the folder", lambda: folder.check_holds(shapes, _NOT_STRICT))
        chosen = [entry for entry in weights if folder.fits(entry.name, entry.global_shape)]
        ranks.agree("reading weights", lambda: folder.fill([(entry.name, entry.box, entry.tensor) for entry in chosen]))
        filled = {entry.name for entry in chosen}
        return tuple(sorted(f"weights {entry.name}" for entry in weights if entry.name not in filled))


Origin = RunOrigin | HfOrigin


def parse(text: str) -> Origin:
    """Reads what `str` of an origin wrote."""
    if text.startswith(HF_PREFIX):
        return HfOrigin.parse(text)
    folder, _, checkpoint = text.rpartition("@")
    return RunOrigin(RunDir(Path(folder)), checkpoint)


def resolve(text: str, root: Path) -> Origin:
    """Returns what `init_from` means now: of a run the newest checkpoint where no step is given.

    Raises:
        ConfigError: it names a file, or several runs.
        NotFoundError: there is no such run or checkpoint.
    """
    if text.startswith(HF_PREFIX):
        return HfOrigin.parse(text)
    try:
        found = reference.find(text, root)
    except FactoryTrainError as error:
        error.where = f"init_from={text}"
        raise
    if found.run is None:
        raise ConfigError("this checkpoint is in no run directory", where=f"init_from={text}", fix="init_from=RUN or RUN@STEP")
    return RunOrigin(found.run, found.path.name)


def load_origin(origin: Origin, entries: Sequence[TensorEntry], ranks: Ranks, *, strict: bool) -> tuple[str, ...]:
    """Fills the weights of a new run from its origin; returns the tensors that kept their initial values.

    Args:
        strict: whether every tensor must be there in the same shape.

    Raises:
        FactoryTrainError: see the `load` of each origin; and where nothing fits.
    """
    left_alone = origin.load(entries, ranks, strict=strict)
    if not strict and len(left_alone) == sum(entry.section == "weights" for entry in entries):
        raise ConfigError("none of the weights fit this model", where=f"init_from={origin.title}", fix="leave init_from out")
    return left_alone


def _check_same(theirs: ModelConfig, ours: ModelConfig, keys: Collection[str], where: str, otherwise: str = "") -> None:
    """Refuses a model section that differs from that of the weights, with all the overrides that mend it."""
    pairs = {key: (_word(theirs, key), _word(ours, key)) for key in keys}
    other = {key: (there, here) for key, (there, here) in pairs.items() if there != here}
    if other:
        listed = ", ".join(f"model.{key} is {there} there and {here} here" for key, (there, here) in other.items())
        raise ConfigError(
            f"the weights are of another model ({listed})",
            where=where,
            # A shell would take the braces of a mapping apart.
            fix=" ".join(shlex.quote(f"model.{key}={there}") for key, (there, _) in other.items()) + otherwise,
        )


def _word(model: ModelConfig, key: str) -> str:
    """Returns a value of the model section as it is written after `model.KEY=`; a head's width even where it is left to follow."""
    value = model.head_width if key == "head_dim" else getattr(model, key)
    if isinstance(value, RopeScaling):
        return "{" + ",".join(f"{name}:{number}" for name, number in asdict(value).items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
