"""Evaluation of a checkpoint: validation loss, bits per byte, baselines, and a text sample."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from factory_train import plugins, storage
from factory_train.checkpoint.reader import CheckpointReader, open_checkpoint
from factory_train.config import Config
from factory_train.data.loader import validation_batches
from factory_train.data.manifest import TOKENIZER_NAME, DataManifest
from factory_train.data.rows import IGNORE_INDEX, validation_rows
from factory_train.data.shards import TokenStream
from factory_train.data.tokenizer import Tokenizer
from factory_train.distributed.parallelize import ParallelModel
from factory_train.distributed.process_group import choose_device
from factory_train.errors import NotFoundError
from factory_train.loss import TrainingLoss
from factory_train.models.build import build_model
from factory_train.models.language_model import LanguageModel
from factory_train.run_dir import RunDir
from factory_train.sample import text_sample

EVALUATION_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one checkpoint.

    Args:
        loss: mean negative log-likelihood of the validation tokens, in nats a token.
        bits_per_byte: the same per byte of text, comparable over tokenizers.
        baselines: cross-entropy of simple models on the same tokens, in nats a token.
        sample: prompt and continuation.
    """

    format_version: int
    step: int
    checkpoint: str
    loss: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    baselines: dict[str, float]
    sample: dict[str, str]
    time: float


def run_config(run: RunDir) -> Config:
    """Returns the configuration of the newest attempt, with its plugins imported.

    Raises:
        ConfigError: a plugin cannot be imported here.
        NotFoundError: the run was never started.
    """
    attempt = run.last_attempt()
    if attempt is None:
        raise NotFoundError("the run has no attempt yet", where=run.name)
    cfg = attempt.config()
    plugins.load(cfg.plugins)
    return cfg


def load_model(cfg: Config, manifest: DataManifest, reader: CheckpointReader, device: torch.device) -> LanguageModel:
    """Builds the model of a run in one process and fills it from a checkpoint's weights."""
    with torch.device("meta"):
        model = build_model(cfg.model, cfg.model.vocab_size or manifest.vocab_size)
    model.to(getattr(torch, cfg.precision.params)).to_empty(device=device)
    model.init_buffers(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read("weights", name))
    return model.eval()


@torch.no_grad()
def evaluate_run(run: RunDir, step: int | None = None) -> Evaluation:
    """Evaluates a checkpoint on the run's own validation tokens and writes `evaluation/step-*.json`.

    Reads the run directory and nothing else.

    Args:
        step: which checkpoint; None is the newest that verifies.
    """
    cfg, manifest = run_config(run), DataManifest.load(run.data)
    reader = open_checkpoint(run, step)
    device = choose_device(cfg.hardware.device, 0)
    model = load_model(cfg, manifest, reader, device)
    tokens, tokenizer = TokenStream(run.data, "validation"), Tokenizer.load(run.data / TOKENIZER_NAME, manifest.eos_id)
    summed_loss = TrainingLoss(replace(cfg.train, loss="cross_entropy", z_loss=0.0), ParallelModel(model, model, 1, None), device)
    loss_sum, num_tokens = 0.0, 0
    rows = validation_rows(cfg, tokens)
    for batch in validation_batches(rows, micro_batch_size=cfg.train.micro_batch_size, dp_rank=0, dp_size=1):
        micro = batch.to(device)
        loss_sum += summed_loss(micro.targets_BT, *micro.inputs).item()
        num_tokens += int((micro.targets_BT != IGNORE_INDEX).sum())
    loss = loss_sum / num_tokens
    evaluation = Evaluation(
        format_version=EVALUATION_FORMAT_VERSION,
        step=reader.manifest.step,
        checkpoint=reader.path.name,
        loss=loss,
        bits_per_byte=manifest.bits_per_byte(loss),
        num_tokens=num_tokens,
        num_bytes=round(num_tokens * manifest.bytes_per_token),
        baselines=manifest.baselines,
        sample=text_sample(model, cfg.evaluation, tokenizer, tokens, seq_len=cfg.train.seq_len, device=device),
        time=time.time(),
    )
    storage.write_json(evaluation_path(run, evaluation.step), asdict(evaluation))
    return evaluation


def evaluation_path(run: RunDir, step: int) -> Path:
    return run.evaluation / f"step-{step:08d}.json"


def last_evaluation(run: RunDir) -> dict[str, Any] | None:
    """Returns the newest evaluation of a run as plain JSON, if there is one."""
    files = sorted(run.evaluation.glob("step-*.json"))
    return storage.read_json(files[-1]) if files else None
