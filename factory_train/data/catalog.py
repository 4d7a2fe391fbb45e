"""How a request finds its prepared data again, without reading any text.

Everything here is cheap and needs the standard library only: a login node asks it whether data is ready.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.config import Config, DataConfig
from factory_train.data import mixture
from factory_train.data.manifest import DataManifest, digest
from factory_train.data.source import MIXTURE, PREPARED, source_kind, source_path
from factory_train.errors import IntegrityError

# What tokens are made of has not changed since the first version, and neither have the names of datasets.
_TOKENS_VERSION = 1


def cache_root(config: Config, runs_root: Path) -> Path:
    """Returns the folder of prepared data that runs share."""
    return Path(config.data.cache_dir).expanduser().absolute() if config.data.cache_dir else runs_root.absolute() / ".data"


def dataset_folder(cache: Path, dataset_id: str) -> Path:
    return cache / "datasets" / dataset_id


def settings(config: DataConfig) -> dict[str, Any]:
    """Returns all that decides what the tokens are, apart from the text."""
    return {
        "format_version": _TOKENS_VERSION,
        "kind": source_kind(config),
        "tokenizer": config.tokenizer,
        "vocab_size": config.vocab_size if config.tokenizer == "bpe" else None,
        "validation_fraction": config.validation_fraction,
    }


def request_path(config: DataConfig, cache: Path) -> Path:
    """Returns the alias file that leads from this request to its prepared data.

    The request stands for text that has not been read: a file by path, size and time; the standard library by the
    interpreter it belongs to; a plugin's data source by its name and data.path. Preparing reads the text and renews the alias.
    """
    request = settings(config)
    if request["kind"] == "text":
        path = source_path(config)
        stat = path.stat()
        request |= {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    elif request["kind"] == "builtin":
        request |= {"python": sys.version, "stdlib": sysconfig.get_paths()["stdlib"]}
    else:
        request |= {"path": config.path}
    return cache / "requests" / f"{digest(request)}.json"


def find_prepared(config: DataConfig, cache: Path) -> Path | None:
    """Returns the folder with the prepared data of this request, if it is there and of the right size.

    Raises:
        IntegrityError: data that the verb `prepare` made is damaged: no run can make it again.
    """
    if source_kind(config) == PREPARED:
        folder = source_path(config)
        DataManifest.load(folder).check_sizes(folder)
        return folder
    if source_kind(config) == MIXTURE:
        folder = dataset_folder(cache, mixture.load(config).manifest.id)
        return folder if _is_whole(folder) else None
    try:
        alias = storage.read_json(request_path(config, cache))
        if alias is None:
            return None
        folder = dataset_folder(cache, alias["id"])
    except (OSError, ValueError, KeyError, TypeError):
        # Whatever is wrong with it, preparing again is the remedy, and it says what was wrong.
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    try:
        DataManifest.load(folder).check_sizes(folder)
    except IntegrityError:
        return False
    return True


def known_manifest(config: DataConfig, cache: Path) -> DataManifest | None:
    """Returns what is known of a request's data before it is prepared: all, if it is; of a mixture, all but its validation text.

    Raises:
        ConfigError: sets that cannot be mixed.
        IntegrityError: data that the verb `prepare` made is damaged.
    """
    if source_kind(config) == MIXTURE:
        return mixture.load(config).manifest
    folder = find_prepared(config, cache)
    return None if folder is None else DataManifest.load(folder)
