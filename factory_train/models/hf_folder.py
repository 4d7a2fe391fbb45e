"""A Hugging Face model folder as it lies on disk: config.json and safetensors files, never a pickle.

Opening one reads headers only and needs no torch, so that a login node can tell what is wrong with it; `fill` reads the
weights, each rank no more than its own boxes.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory_train.config import ModelConfig
from factory_train.errors import ConfigError, IntegrityError, NotFoundError
from factory_train.models.hf_config import hf_name, model_config

if TYPE_CHECKING:
    from factory_train.distributed.box import Box
    from factory_train.distributed.encoded import Stored

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# Bytes of an element, by the name that safetensors gives the type.
_DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
# A header of more is not one; the format's own library has the same limit.
_MAX_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 16 << 20
_DOWNLOAD_AGAIN = "download the file again (a Git LFS pointer becomes the file by: git lfs pull)"


@dataclass(frozen=True)
class StoredWeight:
    """Where one weight lies: its file, its type as safetensors names it, its shape, and its first and last byte in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class HfFolder:
    """A folder whose config.json is supported and whose weights are all there.

    Args:
        path: the folder.
        model: the model section it describes, `vocab_size` and `head_dim` spelled out.
        weights: by Hugging Face name, without what a model computes itself: rotary tables, and the head where it is tied.
    """

    path: Path
    model: ModelConfig
    weights: Mapping[str, StoredWeight]

    @staticmethod
    def open(path: Path) -> HfFolder:
        """Reads config.json and the headers of the safetensors files.

        Raises:
            NotFoundError: the folder, its config.json or one of its weight files is not there.
            ConfigError: the model is not supported, the weights are pickled, or config.json does not speak of them.
            IntegrityError: a safetensors file is cut short or is none.
        """
        model = model_config(_config(path), str(path / "config.json"))
        stored = _stored(path)
        if model.tie_embeddings and stored.keys() >= {HEAD, EMBEDDING}:
            # Some write the embedding twice. A head that differs is another model than config.json says.
            if not _same_bytes(path, stored[HEAD], stored[EMBEDDING]):
                raise ConfigError(
                    f"{HEAD} differs from the embedding that it is tied to",
                    where=str(path),
                    fix='"tie_word_embeddings": false in its config.json, and model.tie_embeddings=false',
                )
            del stored[HEAD]
        # Llamas of old were saved with the tables of their rotary embeddings.
        weights = {name: weight for name, weight in stored.items() if not name.endswith("rotary_emb.inv_freq")}
        for name, weight in weights.items():
            if weight.dtype not in _DTYPES:
                raise ConfigError(
                    f"{name} is of type {weight.dtype}; supported are {', '.join(_DTYPES)}",
                    where=str(path / weight.file),
                    fix="start from a folder of weights that are not quantised",
                )
        return HfFolder(path, model, weights)

    def fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Returns whether a parameter of ours is stored here in this shape."""
        weight = self.weights.get(hf_name(name))
        return weight is not None and weight.shape == shape

    def check_holds(self, shapes: Mapping[str, tuple[int, ...]], otherwise: str = "") -> None:
        """Checks that the weights are those of a model, none more and none less.

        Args:
            shapes: of every parameter, by our name.
            otherwise: what else would help, for the message.

        Raises:
            ConfigError: they are not; it names them.
        """
        wanted = {hf_name(name): shape for name, shape in shapes.items()}
        problems = [f"not in the folder: {name}" for name in sorted(wanted.keys() - self.weights.keys())]
        problems += [f"not in the model: {name}" for name in sorted(self.weights.keys() - wanted.keys())]
        problems += [
            f"{name} is {list(self.weights[name].shape)} in the folder, {list(wanted[name])} in the model"
            for name in sorted(self.weights.keys() & wanted.keys())
            if self.weights[name].shape != wanted[name]
        ]
        if problems:
            more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise ConfigError(
                f"the folder holds other weights than its config.json describes: {'; '.join(problems[:4])}{more}",
                where=str(self.path),
                fix=f"download or export the folder again{otherwise}",
            )

    def fill(self, parts: Sequence[tuple[str, Box, Stored]]) -> None:
        """Copies boxes of parameters into tensors (shape `box.shape`, any device and floating type), reading nothing else.

        Args:
            parts: (our name, which part of the whole, where it goes).

        Raises:
            IntegrityError: a file cannot be read.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        by_file: dict[str, list[tuple[str, Box, Stored]]] = defaultdict(list)
        for name, box, target in parts:
            if box.numel:
                by_file[self.weights[hf_name(name)].file].append((hf_name(name), box, target))
        for file, wanted in by_file.items():
            try:
                with safe_open(self.path / file, framework="pt") as opened, torch.no_grad():
                    for name, box, target in wanted:
                        slices = tuple(slice(start, end) for start, end in zip(box.offset, box.end, strict=True))
                        target.copy_(opened.get_slice(name)[slices])
            except (OSError, SafetensorError) as error:
                raise IntegrityError(f"cannot be read: {error}", where=str(self.path / file), fix=_DOWNLOAD_AGAIN) from error


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise NotFoundError(
            "no such folder", where=str(path), fix="hf: takes a folder on this machine; `hf download ORG/NAME --local-dir FOLDER` makes one"
        )
    if not path.is_dir():
        raise ConfigError("this is a file, and a Hugging Face model is a folder", where=str(path), fix=f"hf:{path.parent}")
    file = path / "config.json"
    if not file.is_file():
        raise NotFoundError("not a Hugging Face model: no config.json", where=str(path), fix="a folder with a config.json and its weights")
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(file), fix="download the file again") from None
    if not isinstance(values, dict):
        raise ConfigError("not a JSON object", where=str(file), fix="download the file again")
    return values


def _stored(path: Path) -> dict[str, StoredWeight]:
    """Returns every tensor of the one file, or else those that the index lists; transformers looks in this order too."""
    if (path / WEIGHTS_NAME).is_file():
        return dict(_tensors(path, WEIGHTS_NAME))
    if not (path / INDEX_NAME).is_file():
        raise _no_weights(path)
    places = _read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ConfigError("no weight_map in it", where=str(path / INDEX_NAME), fix="download the file again")
    files = sorted(set(places.values()))
    absent = [file for file in files if not (path / file).is_file()]
    if absent:
        listed = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        raise NotFoundError(f"{len(absent)} of {len(files)} weight files are missing: {listed}", where=str(path), fix="download them too")
    found = {(file, name): weight for file in files for name, weight in _tensors(path, file)}
    lost = sorted(name for name, file in places.items() if (file, name) not in found)
    if lost:
        raise ConfigError(
            f"{len(lost)} weights are not in the files that the index names, {lost[0]} first", where=str(path), fix="download it again"
        )
    return {name: found[file, name] for name, file in places.items()}


def _no_weights(path: Path) -> ConfigError | NotFoundError:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(pattern))
    if pickled:
        return ConfigError(
            f"the weights are pickled ({pickled[0]}), and loading a pickle runs whatever is in it",
            where=str(path),
            fix="take its safetensors files; or, if you trust it, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)",
        )
    return NotFoundError(f"no weights: neither {WEIGHTS_NAME} nor {INDEX_NAME}", where=str(path), fix="download the weights too")


def _tensors(path: Path, file: str) -> Iterator[tuple[str, StoredWeight]]:
    """Yields name and place of every tensor in a safetensors file, from its header.

    The format: eight bytes, little-endian, with the length of the header; the header, in JSON; the tensors.
    """
    try:
        with open(path / file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        base, end = 8 + length, 8 + length
        for name, record in header.items():
            if name != "__metadata__":
                first, last = record["data_offsets"]
                weight = StoredWeight(file, record["dtype"], tuple(record["shape"]), base + first, base + last)
                wide = _DTYPES.get(weight.dtype)
                if wide is not None and last - first != wide * math.prod(weight.shape):
                    raise ValueError(f"{name} has {last - first} bytes")
                end = max(end, weight.end)
                yield name, weight
        if end != size:
            raise ValueError(f"it has {size} bytes, and {end} are in its header")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"not a whole safetensors file: {error}", where=str(path / file), fix=_DOWNLOAD_AGAIN) from None


def _same_bytes(path: Path, one: StoredWeight, other: StoredWeight) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(path / one.file, "rb") as first, open(path / other.file, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.end - one.start
        while left:
            block = min(left, _BLOCK_BYTES)
            if first.read(block) != second.read(block):
                return False
            left -= block
    return True
