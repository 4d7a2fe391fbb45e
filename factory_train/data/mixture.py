"""Mixtures: several prepared sets, each with a share of the samples, which may change from phase to phase.

Everything here is cheap and needs the standard library only: a login node checks a mixture in milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from factory_train.config import DataConfig
from factory_train.data.manifest import FORMAT_VERSION, MANIFEST_NAME, DataManifest, FileRecord, SplitRecord, digest
from factory_train.data.source import MIXTURE, SPLITS, too_short
from factory_train.errors import ConfigError, DataError, did_you_mean

UNTIL = "until_step"
# Of the way validation text is mixed.
_VERSION = 1


@dataclass(frozen=True)
class Phase:
    """A stretch of the run in which the shares stay the same.

    Args:
        until_step: the first step that is not of it; None for the last phase.
        shares: of each set, in the order of the sets; they sum to 1.
    """

    until_step: int | None
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """A mixture whose sets are there and fit together.

    Args:
        folders: of each set, by name.
        manifests: of each set, in the same order.
        phases: at least one.
        manifest: of the mixture as a dataset; its validation split has no files before it is prepared.
    """

    folders: dict[str, Path]
    manifests: tuple[DataManifest, ...]
    phases: tuple[Phase, ...]
    manifest: DataManifest

    @property
    def final_shares(self) -> tuple[float, ...]:
        """Shares of the last phase: what the model is to be good at in the end, and judged on."""
        return self.phases[-1].shares

    def __str__(self) -> str:
        """Returns the shares of every phase, for people."""
        parts = []
        for phase in self.phases:
            shares = ", ".join(f"{name} {share:.4g}" for name, share in zip(self.folders, phase.shares, strict=True) if share)
            parts.append(shares if phase.until_step is None else f"until step {phase.until_step:,} {shares}")
        return "; then ".join(parts)


def load(config: DataConfig) -> Mixture:
    """Reads the manifests of the sets and checks that they can be mixed.

    Raises:
        ConfigError: weights that cannot be right.
        DataError: a folder without prepared data, or sets of different tokenizers.
        IntegrityError: a set is damaged.
    """
    folders = {name: Path(folder).expanduser().absolute() for name, folder in config.sets.items()}
    manifests = tuple(_set_manifest(name, folder) for name, folder in folders.items())
    first, *others = zip(folders, manifests, strict=True)
    for name, manifest in others:
        if (manifest.tokenizer_sha256, manifest.eos_id) != (first[1].tokenizer_sha256, first[1].eos_id):
            fix = f"prepare {name} again with tokenizer={folders[first[0]]}"
            raise DataError(f"the tokens of {name} are not those of {first[0]}: another tokenizer", where=f"data.sets.{name}", fix=fix)
    phases = _phases(config, {name: manifest.splits["train"].num_tokens for name, manifest in zip(folders, manifests, strict=True)})
    return Mixture(folders, manifests, phases, _manifest(folders, manifests, phases[-1]))


def _set_manifest(name: str, folder: Path) -> DataManifest:
    if name == UNTIL or not name.isidentifier():
        raise ConfigError(f"'{name}' cannot be the name of a set", where="data.sets", fix="a name of letters, digits and _")
    if not (folder / MANIFEST_NAME).is_file():
        what = "no prepared data there" if folder.exists() else "no such folder"
        raise DataError(what, where=f"data.sets.{name}={folder}", fix=f"python -m factory_train prepare PATH out={folder}")
    manifest = DataManifest.load(folder)
    manifest.check_sizes(folder)
    return manifest


def _phases(config: DataConfig, num_tokens: Mapping[str, int]) -> tuple[Phase, ...]:
    if config.phases and config.weights:
        raise ConfigError("either data.weights or data.phases, not both", where="data.weights", fix="data.weights={}")
    if not config.phases:
        weights = config.weights or {name: float(count) for name, count in num_tokens.items()}
        phases = [_phase(weights, "data.weights", list(num_tokens), is_last=True)]
    else:
        last = len(config.phases) - 1
        phases = [
            _phase(values, f"data.phases[{number}]", list(num_tokens), is_last=number == last)
            for number, values in enumerate(config.phases)
        ]
    ends = [phase.until_step for phase in phases if phase.until_step is not None]
    if ends != sorted(set(ends)):
        shown = ", ".join(map(str, ends))
        raise ConfigError(f"phases end at steps {shown}, which do not increase", where="data.phases", fix=f"{UNTIL} in increasing order")
    for index, name in enumerate(num_tokens):
        if not any(phase.shares[index] for phase in phases):
            raise ConfigError(
                f"{name} has weight 0 throughout", where="data.sets", fix=f"leave {name} out of data.sets, or give it a weight"
            )
    return tuple(phases)


def _phase(values: Mapping[str, float], where: str, names: list[str], *, is_last: bool) -> Phase:
    weights = {name: value for name, value in values.items() if name != UNTIL}
    for name, weight in weights.items():
        if name not in names:
            guess = did_you_mean(name, names)
            fix = f"did you mean {guess}?" if guess else f"data.sets has {', '.join(names)}"
            raise ConfigError(f"there is no set '{name}'", where=where, fix=fix)
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(f"the weight of {name} is {weight}", where=where, fix="a number from 0 on")
    total = sum(weights.values())
    if not total:
        raise ConfigError("all weights are zero, so that there is nothing to train on", where=where, fix=f"{names[0]}:1")
    until = values.get(UNTIL)
    if is_last and until is not None:
        raise ConfigError("the last phase has no end: train.steps ends it", where=where, fix=f"leave out {UNTIL}, or add a phase")
    if not is_last and not (until is not None and until >= 1 and float(until).is_integer()):
        raise ConfigError("which step ends this phase?", where=where, fix=f"{UNTIL}: a whole number from 1 on")
    return Phase(None if until is None else int(until), tuple(weights.get(name, 0.0) / total for name in names))


def _manifest(folders: Mapping[str, Path], manifests: tuple[DataManifest, ...], last: Phase) -> DataManifest:
    first = manifests[0]
    shares = dict(zip(folders, last.shares, strict=True))
    names = [f"{name} ({manifest.description})" for name, manifest in zip(folders, manifests, strict=True)]
    identity = {
        "version": _VERSION,
        "sets": [[name, manifest.id] for name, manifest in zip(folders, manifests, strict=True)],
        "shares": {name: round(share, 9) for name, share in shares.items()},
    }
    return DataManifest(
        format_version=FORMAT_VERSION,
        id=digest(identity),
        kind=MIXTURE,
        description="mixture of " + ", ".join(names),
        tokenizer=first.tokenizer,
        vocab_size=first.vocab_size,
        eos_id=first.eos_id,
        dtype=first.dtype,
        tokenizer_file=first.tokenizer_file,
        source_file=first.source_file,
        splits={split: _together([manifest.splits[split] for manifest in manifests]) for split in SPLITS},
        baselines={},
    )


def _together(records: list[SplitRecord]) -> SplitRecord:
    """Returns the record of a split that has the text of several, and no files of its own."""
    counts = {name: sum(getattr(record, name) for record in records) for name in ("num_tokens", "num_bytes", "num_documents")}
    return SplitRecord(**counts, shards=[], documents=FileRecord(**asdict(records[0].documents)))


def check_set_lengths(config: DataConfig, seq_len: int) -> None:
    """Checks that each set of a mixture has a row; without sets there is nothing to check.

    Raises:
        DataError: the context is longer than one of them.
    """
    for name, manifest in zip(config.sets, load(config).manifests if config.sets else (), strict=True):
        have = manifest.splits["train"].num_tokens
        if have < seq_len + 1:
            raise too_short("train", have, "tokens", seq_len, where=f"data.sets.{name}")


def training_sets(config: DataConfig, dataset: Path) -> list[tuple[Path, float]]:
    """Returns the folders that training reads, and the share of each at the end: those of a mixture, or the dataset alone."""
    if not config.sets:
        return [(dataset, 1.0)]
    mixture = load(config)
    return list(zip(mixture.folders.values(), mixture.final_shares, strict=True))
