"""Export of a checkpoint as a Hugging Face model folder, and the intent to register it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from factory_train import storage
from factory_train.checkpoint.reader import CheckpointReader, open_checkpoint
from factory_train.config import ModelConfig
from factory_train.data.manifest import TOKENIZER_NAME, DataManifest
from factory_train.errors import ConfigError
from factory_train.evaluation.evaluate import Evaluation, run_config
from factory_train.models.hf import write_hf_folder
from factory_train.registries import ARCHITECTURES
from factory_train.run_dir import Attempt, RunDir

EXPORT_FORMAT_VERSION = 1


def can_export(model: ModelConfig) -> bool:
    """Returns whether transformers has a model of this architecture; those of plugins it cannot know."""
    return ARCHITECTURES.is_builtin(model.architecture)


def export_run(run: RunDir, *, step: int | None = None, out: Path | None = None, dtype: str = "float32") -> Path:
    """Writes a checkpoint's weights, config and tokenizer in the layout `transformers` loads.

    Reads the run directory and nothing else.

    Args:
        step: which checkpoint; None is the newest that verifies.
        out: target folder; None is `export/` of the run.
        dtype: number format of the weights.

    Raises:
        ConfigError: there is no such layout for the architecture.
    """
    cfg, manifest = run_config(run), DataManifest.load(run.data)
    if not can_export(cfg.model):
        raise ConfigError(
            f"architecture '{cfg.model.architecture}' is a plugin's and has no Hugging Face layout",
            where=run.name,
            fix="read the weights from the checkpoint: docs/checkpoint-format.md",
        )
    reader = open_checkpoint(run, step)
    folder = out or run.export
    write_hf_folder(
        folder,
        cfg.model,
        cfg.model.vocab_size or manifest.vocab_size,
        _weights(reader),
        run.data / TOKENIZER_NAME,
        eos_id=manifest.eos_id,
        dtype=dtype,
    )
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
    storage.write_json(
        folder / "manifest.json",
        {
            "format_version": EXPORT_FORMAT_VERSION,
            "run": run.name,
            "step": reader.manifest.step,
            "dtype": dtype,
            "data_id": manifest.id,
            "sha256": files,
        },
    )
    return folder


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights(reader: CheckpointReader) -> Iterator[tuple[str, torch.Tensor]]:
    for name in reader.names("weights"):
        yield name, reader.read("weights", name)


def write_registration_intent(attempt: Attempt, folder: Path, evaluation: Evaluation) -> None:
    """Asks for the exported model to be registered; whoever syncs the run with MLflow carries it out."""
    cfg, manifest = attempt.config(), DataManifest.load(attempt.run.data)
    attempt.check_fence("asking for a registration")
    storage.write_json(
        attempt.run.export / "registration.json",
        {
            "format_version": EXPORT_FORMAT_VERSION,
            "model_name": cfg.tracking.registered_model or cfg.recipe,
            "checkpoint": evaluation.checkpoint,
            "step": evaluation.step,
            "export_path": str(folder),
            "sha256": _sha256(folder / "manifest.json"),
            "tags": {
                "run": attempt.run.name,
                "attempt": str(attempt.number),
                "recipe": cfg.recipe,
                "model": cfg.model.name,
                "step": str(evaluation.step),
                "data_id": manifest.id,
                "tokenizer_sha256": manifest.tokenizer_sha256,
                "config_sha256": _sha256(attempt.config_path),
            },
            "metrics": {"validation/loss": evaluation.loss, "validation/bits_per_byte": evaluation.bits_per_byte},
        },
    )
