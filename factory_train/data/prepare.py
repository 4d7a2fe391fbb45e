"""Preparing data: source to tokenizer to shards to baselines, once, shared by every run that asks for the same.

A dataset is a folder named by what it was made from. It is built in a folder of its own and renamed into place when it
is complete, its manifest last: whatever is killed, whoever comes second, there is a whole dataset or none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from factory_train import storage
from factory_train.config import DataConfig
from factory_train.data import mixture
from factory_train.data.baselines import baselines
from factory_train.data.catalog import dataset_folder, request_path, settings
from factory_train.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SOURCE_NAME,
    TOKENIZER_NAME,
    DataManifest,
    FileRecord,
    SplitRecord,
    check_length,
    check_vocabulary,
    digest,
)
from factory_train.data.mixture_prepare import prepare_mixture
from factory_train.data.packing_index import check_pairs
from factory_train.data.shards import SHARD_TOKENS, ShardWriter, TokenStream, stored, token_dtype
from factory_train.data.source import MIXTURE, PREPARED, SPLITS, Document, Source, read_source, source_kind, source_path
from factory_train.data.tokenizer import PIECE_CHARACTERS, Tokenizer, pieces
from factory_train.errors import DataError, IntegrityError, PreflightError

__all__ = ["check_length", "check_vocabulary", "copy_for_run", "prepare"]

# Pieces encoded by one call: bounds memory, and keeps all cores busy.
_BATCH_PIECES = 64
# Baselines count at most this much of the training split: a minute of sorting would not make them better.
_BASELINE_TOKENS = 20_000_000
_BASELINE_STRETCHES = 100


def prepare(config: DataConfig, cache: Path, report: Callable[[str], None], *, shard_tokens: int = SHARD_TOKENS) -> Path:
    """Returns the folder of the prepared data of a request, making it if it is not there or damaged.

    Of several callers at once, one works and the others wait for its result.

    Args:
        config: section `data`.
        cache: folder of prepared data that runs share.
        report: called with one line at each stage.
        shard_tokens: most tokens of one shard file.
    Raises:
        DataError: the text is missing, not text, or too short to have both splits.
        IntegrityError: data that the verb `prepare` made is damaged.
        PreflightError: the cache cannot be written.
    """
    if source_kind(config) == PREPARED:
        folder = source_path(config)
        manifest = DataManifest.load(folder)
        manifest.check_sizes(folder)
        report(f"data: {manifest.description}, {manifest.splits['train'].num_tokens:,} training tokens in {folder}")
        return folder
    if source_kind(config) == MIXTURE:
        return prepare_mixture(mixture.load(config), cache, report)
    source = read_source(config)
    num_bytes = sum(row["bytes"] for row in source.manifest)
    documents = f"{len(source.manifest):,} documents, " if len(source.manifest) > 1 else ""
    report(f"data: {source.description}, {documents}{num_bytes / 1e6:.1f} MB")
    dataset_id = digest({**settings(config), "source": source.manifest})
    folder = dataset_folder(cache, dataset_id)
    try:
        with storage.locked(cache / "locks" / f"{dataset_id}.lock"):
            if not _is_intact(folder, report):
                with storage.replacing_folder(folder) as building:
                    _fill(config, source, dataset_id, building, report, shard_tokens)
            storage.write_json(request_path(config, cache), {"id": dataset_id})
    except OSError as error:
        what = f"prepared data cannot be written: {error.strerror or error}"
        raise PreflightError(what, where=str(cache), fix=f"data.cache_dir=FOLDER with {4 * num_bytes / 1e6:.0f} MB to write") from error
    return folder


def _is_intact(folder: Path, report: Callable[[str], None]) -> bool:
    """Returns whether the dataset is there and every byte of it is right."""
    if not folder.is_dir():
        return False
    try:
        DataManifest.load(folder).verify(folder)
    except IntegrityError as error:
        report(f"data: preparing again; {error.where}: {error.what}")
        return False
    report(f"data: {folder.name} was prepared before, verified")
    return True


def _fill(config: DataConfig, source: Source, dataset_id: str, folder: Path, report: Callable[[str], None], shard_tokens: int) -> None:
    report(f"data: making the {config.tokenizer} tokenizer")
    texts = {split: [document.text for document in source.splits[split]] for split in SPLITS}
    tokenizer = Tokenizer.train(config.tokenizer, texts["train"], itertools.chain(*texts.values()), config.vocab_size)
    tokenizer.save(folder / TOKENIZER_NAME)
    storage.write_atomic(folder / SOURCE_NAME, source.manifest_json())
    report(f"data: encoding with {tokenizer.vocab_size:,} tokens")
    manifest = DataManifest(
        format_version=FORMAT_VERSION,
        id=dataset_id,
        kind=settings(config)["kind"],
        description=source.description,
        tokenizer=config.tokenizer,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=token_dtype(tokenizer.vocab_size),
        tokenizer_file=FileRecord.of(folder / TOKENIZER_NAME),
        source_file=FileRecord.of(folder / SOURCE_NAME),
        splits={split: _write_split(tokenizer, source.splits[split], folder, split, shard_tokens) for split in SPLITS},
        baselines={},
    )
    check_length(manifest, 1)
    # A stream needs a manifest; this one lies in a folder that nobody takes for finished.
    manifest.save(folder)
    report("data: counting for the baselines")
    num_tokens = manifest.splits["validation"].num_tokens
    figures = _baselines(folder, num_tokens, training=[(folder, 1.0)], within_documents=False)
    dataclasses.replace(manifest, baselines=figures).save(folder)
    tokens = ", ".join(f"{manifest.splits[split].num_tokens:,} {split} tokens" for split in SPLITS)
    report(f"data: {dataset_id} is ready, {tokens}")


def _write_split(tokenizer: Tokenizer, documents: list[Document], folder: Path, split: str, shard_tokens: int) -> SplitRecord:
    writer = ShardWriter(folder, split, token_dtype(tokenizer.vocab_size), shard_tokens)
    for batch in _batches(documents):
        for (begins, _), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            if begins:
                if writer.num_documents and tokenizer.eos_id is not None:
                    writer.append([tokenizer.eos_id])
                writer.begin_document()
            writer.append(ids)
    shards, index = writer.close()
    num_bytes = sum(len(document.text.encode()) for document in documents)
    return SplitRecord(writer.num_tokens, num_bytes, writer.num_documents, shards, index)


def _batches(documents: Iterable[Document]) -> Iterator[list[tuple[bool, str]]]:
    """Yields lists of (begins a document, text) of about the same amount of text."""
    batch: list[tuple[bool, str]] = []
    room = _BATCH_PIECES * PIECE_CHARACTERS
    for document in documents:
        for number, piece in enumerate(pieces(document.text)):
            batch.append((number == 0, piece))
            room -= len(piece)
            if room <= 0:
                yield batch
                batch, room = [], _BATCH_PIECES * PIECE_CHARACTERS
    if batch:
        yield batch


def _baselines(
    folder: Path, num_validation_tokens: int, *, training: Sequence[tuple[Path, float]], within_documents: bool
) -> dict[str, float]:
    samples = [_sample(TokenStream(of_set, "train"), round(share * _BASELINE_TOKENS)) for of_set, share in training]
    offsets = np.cumsum([0, *(len(tokens) for tokens, _ in samples)])
    counted = np.concatenate([tokens for tokens, _ in samples])
    counted_starts = np.concatenate([starts + offset for (_, starts), offset in zip(samples, offsets, strict=False)])
    validation = TokenStream(folder, "validation")
    starts = [counted_starts, validation.document_starts()] if within_documents else []
    return baselines(counted, validation.slice(0, num_validation_tokens), validation.manifest.vocab_size, *starts)


def _sample(train: TokenStream, num_tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns training tokens and where documents begin in them: all, or stretches from all over the split if they are more."""
    starts = train.document_starts()
    if train.num_tokens <= num_tokens:
        return train.slice(0, train.num_tokens), starts
    length = -(-num_tokens // _BASELINE_STRETCHES)
    places = np.linspace(0, train.num_tokens - length, _BASELINE_STRETCHES).astype(np.int64).tolist()
    tokens, found = [], []
    for number, place in enumerate(places):
        tokens.append(train.slice(place, length))
        inner = starts[np.searchsorted(starts, place) : np.searchsorted(starts, place + length)]
        # A stretch begins something of its own, whatever was before it.
        found.append(np.union1d([0], inner - place) + number * length)
    return np.concatenate(tokens), np.concatenate(found)


def copy_for_run(
    folder: Path,
    run_data: Path,
    max_validation_tokens: int,
    *,
    packing: str | None = None,
    training: Sequence[tuple[Path, float]] | None = None,
) -> DataManifest:
    """Copies what evaluation needs into a run, so that the run directory is enough: tokenizer, manifest, validation tokens.

    Args:
        folder: prepared data.
        run_data: the run's data folder.
        max_validation_tokens: at most so many, from the start of the split; counts of tokens, bytes and documents and
            the baselines in the run's manifest are those of exactly this part. The training split is described there,
            but its files are not copied.
        packing: how documents are packed (`prepare_packing`), and judged within; None where rows know no documents.
        training: folders that training reads and the share of each, for the baselines; None is `folder` alone.
    Returns:
        The run's manifest.
    Raises:
        DataError: the run already belongs to other data.
    """
    manifest = dataclasses.replace(DataManifest.load(folder), packing=packing)
    if (run_data / MANIFEST_NAME).exists():
        _check_same_data(DataManifest.load(run_data), manifest)
    stream = TokenStream(folder, "validation")
    num_tokens = min(stream.num_tokens, max_validation_tokens)
    tokens = stream.slice(0, num_tokens)
    starts = stream.document_starts()
    starts = starts[starts < num_tokens]
    sizes = np.asarray(Tokenizer.load(folder / TOKENIZER_NAME, manifest.eos_id).token_num_bytes())

    storage.write_atomic(run_data / TOKENIZER_NAME, (folder / TOKENIZER_NAME).read_bytes())
    storage.write_atomic(run_data / "validation.bin", tokens.astype(stored(manifest.dtype)).tobytes())
    storage.write_atomic(run_data / "validation-documents.bin", np.append(starts, num_tokens).astype("<i8").tobytes())
    record = SplitRecord(
        num_tokens=num_tokens,
        num_bytes=int(sizes[tokens].sum()),
        num_documents=len(starts),
        shards=[FileRecord.of(run_data / "validation.bin")],
        documents=FileRecord.of(run_data / "validation-documents.bin"),
    )
    whole = num_tokens == stream.num_tokens
    copy = dataclasses.replace(
        manifest,
        splits={**manifest.splits, "validation": record},
        baselines=manifest.baselines
        if whole and packing is None and manifest.baselines
        else _baselines(folder, num_tokens, training=training or [(folder, 1.0)], within_documents=packing is not None),
    )
    if packing is not None:
        check_pairs(copy, "validation")
    copy.save(run_data)
    return copy


def _check_same_data(before: DataManifest, now: DataManifest) -> None:
    if before.id != now.id:
        what = f"the run was started on {before.description} ({before.id}); the data is now {now.description} ({now.id})"
        raise DataError(what, where="data", fix="continue with the data it was started on, or start a new run with another run=")
    if before.packing != now.packing:
        what = f"the run was started on other rows: {before.packing or 'not packed'}; now they are {now.packing or 'not packed'}"
        raise DataError(
            what, where="data.packing", fix="continue with the version it was started with, or start a new run with another run="
        )
