"""Samples: what is trained on, numbered from 0 over the whole run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from factory_train.config import Config
from factory_train.data import mixture
from factory_train.data.mixture_order import MixtureOrder
from factory_train.data.order import SampleOrder
from factory_train.data.rows import Row, Rows, training_rows


class SampleSource(Protocol):
    """Which row each sample of a run is: a fixed function of its number, the same on every rank.

    `seq_len` and `has_positions` are those of all its rows.
    """

    seq_len: int
    has_positions: bool

    def row(self, sample: int) -> Row:
        """Returns the row of a sample."""
        ...

    def num_targets(self, samples: Sequence[int]) -> int:
        """Returns how many targets these samples have together; every rank asks it for all samples of a step."""
        ...


class ShuffledRows:
    """The rows of one split, each once an epoch, every epoch in another order.

    Args:
        rows: at least one.
        seed: fixes the order.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self.seq_len, self.has_positions = rows.seq_len, rows.has_positions
        self._rows, self._order = rows, SampleOrder(len(rows), seed)

    def row(self, sample: int) -> Row:
        return self._rows.row(self._order.row_of_sample(sample))

    def num_targets(self, samples: Sequence[int]) -> int:
        return self._rows.num_targets(self._order.rows_of_samples(np.asarray(samples, dtype=np.int64)))


class MixedSamples:
    """Samples of several sets, in the shares of a mixture; of each set every row once in each of its epochs.

    Args:
        sets: of the mixture.
        order: which set each sample comes from.
    """

    def __init__(self, sets: Sequence[SampleSource], order: MixtureOrder) -> None:
        self.seq_len, self.has_positions = sets[0].seq_len, sets[0].has_positions
        self._sets, self._order = sets, order

    def row(self, sample: int) -> Row:
        (of_set,), (number,) = self._order.locate(np.asarray([sample], dtype=np.int64))
        return self._sets[of_set].row(int(number))

    def num_targets(self, samples: Sequence[int]) -> int:
        sets, numbers = self._order.locate(np.asarray(samples, dtype=np.int64))
        return sum(self._sets[of_set].num_targets(numbers[sets == of_set].tolist()) for of_set in np.unique(sets).tolist())


def training_samples(cfg: Config, cache: Path, dataset: Path, samples_per_step: int) -> SampleSource:
    """Returns what a run trains on.

    Args:
        cfg: sections `data` and `train` are read from it.
        cache: folder of prepared data that runs share.
        dataset: folder of the data set.
        samples_per_step: rows of one optimizer step over all ranks; phases of a mixture are given in steps.
    Raises:
        ConfigError, DataError: sets that cannot be mixed, or documents that were to be packed and are not.
    """
    if not cfg.data.sets:
        return ShuffledRows(training_rows(cfg, cache, dataset), cfg.train.seed)
    mixed = mixture.load(cfg.data)
    sets = [ShuffledRows(training_rows(cfg, cache, folder), set_seed(cfg.train.seed, name)) for name, folder in mixed.folders.items()]
    return MixedSamples(sets, mixture_order(mixed, samples_per_step, cfg.train.seed))


def mixture_order(mixed: mixture.Mixture, samples_per_step: int, seed: int) -> MixtureOrder:
    """Returns the order of a mixture's samples."""
    ends = [phase.until_step * samples_per_step for phase in mixed.phases if phase.until_step is not None]
    return MixtureOrder(ends, [phase.shares for phase in mixed.phases], seed)


def set_seed(seed: int, name: str) -> int:
    """Returns the seed of a set's order: two sets of the same size must not be in the same order."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def mixture_epochs(cfg: Config, cache: Path) -> str:
    """Returns how often the run sees each set of its mixture, for people.

    Args:
        cfg: of the run; its documents are packed already if they are to be.
        cache: folder of prepared data that runs share.
    """
    mixed = mixture.load(cfg.data)
    samples_per_step = cfg.train.global_batch_tokens // cfg.train.seq_len
    counts = mixture_order(mixed, samples_per_step, cfg.train.seed).counts(cfg.train.steps * samples_per_step).tolist()
    rows = [len(training_rows(cfg, cache, folder)) for folder in mixed.folders.values()]
    total = max(1, sum(counts))
    return ", ".join(
        f"{name} {count / total:.2%} of all samples, {count / num_rows:.3g} epochs"
        for name, count, num_rows in zip(mixed.folders, counts, rows, strict=True)
    )
