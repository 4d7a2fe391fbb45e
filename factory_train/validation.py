"""Validation during training: the loss on held-out tokens over all ranks, and a text sample."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from factory_train.config import Config
from factory_train.data.loader import validation_batches
from factory_train.data.manifest import TOKENIZER_NAME
from factory_train.data.rows import IGNORE_INDEX, validation_rows
from factory_train.data.shards import TokenStream
from factory_train.data.tokenizer import Tokenizer
from factory_train.distributed.parallelize import ParallelModel
from factory_train.loss import TrainingLoss
from factory_train.run_dir import RunDir
from factory_train.sample import text_sample


class Validation:
    """Judges the model on the run's own validation tokens; every rank makes the same calls.

    Args:
        model: as it is trained.
        cfg: the frozen configuration.
        run: whose data folder holds the validation tokens and the tokenizer.
        device: this rank's device.
        dp_rank, dp_size: this rank and how many share the rows.
    """

    def __init__(self, model: ParallelModel, cfg: Config, run: RunDir, device: torch.device, *, dp_rank: int, dp_size: int) -> None:
        self._model, self._cfg, self._device = model, cfg, device
        self._loss = TrainingLoss(replace(cfg.train, loss="cross_entropy", z_loss=0.0), model, device)
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._tokens = TokenStream(run.data, "validation")
        self._rows = validation_rows(cfg, self._tokens)
        self._tokenizer = Tokenizer.load(run.data / TOKENIZER_NAME, self._tokens.manifest.eos_id)

    def figures(self) -> dict[str, float]:
        """Returns `loss`, in nats a token, and `bits_per_byte`."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        micro_batch_size = self._cfg.train.micro_batch_size
        batches = validation_batches(self._rows, micro_batch_size=micro_batch_size, dp_rank=self._dp_rank, dp_size=self._dp_size)
        with self._model.evaluating():
            for batch in batches:
                micro = batch.to(self._device)
                sums[0] += self._loss(micro.targets_BT, *micro.inputs)
                sums[1] += (micro.targets_BT != IGNORE_INDEX).sum()
        dist.all_reduce(sums)
        loss_sum, num_tokens = sums.tolist()
        loss = loss_sum / num_tokens
        return {"loss": loss, "bits_per_byte": self._tokens.manifest.bits_per_byte(loss)}

    def sample(self) -> dict[str, str] | None:
        """Returns prompt and text of a sample, or None where the configuration wants none."""
        if not self._cfg.evaluation.sample_tokens:
            return None
        with self._model.evaluating():
            return text_sample(
                self._model, self._cfg.evaluation, self._tokenizer, self._tokens, seq_len=self._cfg.train.seq_len, device=self._device
            )
