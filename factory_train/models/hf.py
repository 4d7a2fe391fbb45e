"""Writing a Hugging Face model folder: config.json, tokenizer, safetensors; no pickle anywhere."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as HfTokenizer

from factory_train import storage
from factory_train.config import ModelConfig
from factory_train.errors import IntegrityError
from factory_train.models.build import build_model
from factory_train.models.hf_config import hf_config, hf_name


def write_hf_folder(
    folder: Path,
    cfg: ModelConfig,
    vocab_size: int,
    tensors: Iterable[tuple[str, torch.Tensor]],
    tokenizer_json: Path,
    eos_id: int | None,
    dtype: str,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, holding at most one shard in memory.

    Everything is written beside the folder and renamed into place; an older export is replaced only then.

    Args:
        folder: where the export goes.
        cfg: the model section.
        vocab_size: rows of the embedding.
        tensors: (our name, whole tensor) in any order; taken one by one.
        tokenizer_json: file of the `tokenizers` library.
        eos_id: id of the end-of-text token, if there is one.
        dtype: number format of the weights on disk.
        max_shard_bytes: a new safetensors file begins before one grows past this.

    Raises:
        ConfigError: no Hugging Face architecture is this model.
        IntegrityError: `tensors` did not hold every weight of the model exactly once, in its shape.
    """
    config = hf_config(cfg, vocab_size, eos_id, dtype)
    folder = folder.absolute()
    work = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    work.mkdir(parents=True)
    try:
        _write_weights(work, cfg, vocab_size, tensors, getattr(torch, dtype), max_shard_bytes)
        storage.write_json(work / "config.json", config)
        ids = {} if eos_id is None else {"bos_token_id": eos_id, "eos_token_id": eos_id}
        storage.write_json(work / "generation_config.json", {"do_sample": False, **ids})
        storage.write_atomic(work / "tokenizer.json", tokenizer_json.read_bytes())
        storage.write_json(work / "tokenizer_config.json", _tokenizer_config(cfg, tokenizer_json, eos_id))
        _replace_folder(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _tokenizer_config(cfg: ModelConfig, tokenizer_json: Path, eos_id: int | None) -> dict[str, Any]:
    special: dict[str, str | None] = {}
    if eos_id is not None:
        end_of_text = HfTokenizer.from_file(str(tokenizer_json)).id_to_token(eos_id)
        special = {"bos_token": end_of_text, "eos_token": end_of_text}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.max_seq_len,
        "clean_up_tokenization_spaces": False,
        **special,
    }


def _write_weights(
    work: Path, cfg: ModelConfig, vocab_size: int, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Writes the safetensors files, and their index when there are several."""
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in build_model(cfg, vocab_size).named_parameters()}
    files: list[tuple[Path, list[str]]] = []
    shard: dict[str, torch.Tensor] = {}
    total_bytes = shard_bytes = 0
    for name, tensor in tensors:
        if expected.pop(name, None) != tensor.shape:
            raise IntegrityError(f"unexpected, repeated or misshapen weight {name} {tuple(tensor.shape)}", where=str(work))
        # A clone where nothing else copies: safetensors refuses views that share memory.
        weight = tensor.detach().to(device="cpu", dtype=dtype, memory_format=torch.contiguous_format, copy=True)
        if shard and shard_bytes + weight.nbytes > max_shard_bytes:
            files.append(_write_shard(work, len(files), shard))
            shard, shard_bytes = {}, 0
        shard[hf_name(name)] = weight
        shard_bytes += weight.nbytes
        total_bytes += weight.nbytes
    if expected:
        raise IntegrityError(f"{len(expected)} weights are missing from the export, {next(iter(expected))} first", where=str(work))
    files.append(_write_shard(work, len(files), shard))

    if len(files) == 1:
        os.rename(files[0][0], work / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        os.rename(path, work / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    storage.write_json(work / "model.safetensors.index.json", index)


def _write_shard(work: Path, index: int, shard: dict[str, torch.Tensor]) -> tuple[Path, list[str]]:
    """Writes one durable safetensors file under a temporary name: how many there will be is known at the end only."""
    from safetensors.torch import save_file

    path = work / f"shard-{index}"
    # transformers 4 refuses files without this mark.
    save_file(shard, path, metadata={"format": "pt"})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path, list(shard)


def _replace_folder(work: Path, folder: Path) -> None:
    """Renames `work` to `folder`; what was there is moved out of the way first, so no reader sees a mixture."""
    storage.fsync_directory(work)
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    if folder.exists():
        os.rename(folder, old)
    os.rename(work, folder)
    storage.fsync_directory(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
