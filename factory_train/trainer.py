"""The training loop: builds the parts, steps, validates, saves, and stops when all ranks agree to."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from factory_train.checkpoint import origin
from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.entries import TensorEntry, training_entries
from factory_train.checkpoint.load import load_newest
from factory_train.checkpoint.saver import Saver
from factory_train.config import Config
from factory_train.data.catalog import cache_root
from factory_train.data.loader import Cursor, Position, TokenLoader
from factory_train.data.manifest import DataManifest
from factory_train.data.samples import training_samples
from factory_train.diagnostics.steps import Diagnostics
from factory_train.distributed.mesh import ParallelDims
from factory_train.distributed.parallelize import parallelize
from factory_train.distributed.step_reduction import StepFacts, StepReduction
from factory_train.errors import CheckpointError, ConfigError, DivergenceError
from factory_train.launchers.job import WorkerEnv
from factory_train.loss import TrainingLoss
from factory_train.metrics_log import MetricsLog
from factory_train.models.build import build_model
from factory_train.optim import build_optimizer, masters_of, squares_of
from factory_train.plan import Plan
from factory_train.preemption import StopSignal
from factory_train.run_dir import Attempt
from factory_train.schedule import learning_rate
from factory_train.step_clock import StepClock
from factory_train.throughput import Throughput
from factory_train.validation import Validation

# So many steps in a row without a finite loss and gradient cannot be a passing spike.
MAX_SKIPPED_STEPS = 25
# What the heartbeat calls each phase of the clock.
_PLACES = {"data": "data", "forward": "compute", "backward": "compute", "reduce": "reduce", "checkpoint": "update", "optimizer": "update"}


class Outcome(Enum):
    """How training ended."""

    DONE = "done"
    PREEMPTED = "preempted"
    INTERRUPTED = "interrupted"


class Trainer:
    """Trains one attempt of a run; the process group is up already.

    Args:
        cfg: the frozen configuration.
        plan: what was derived from it.
        attempt: where everything is written.
        env: this process's place in the gang.
        device: this rank's device.
        stop: flags that signals set.
        dataset: folder of the prepared training tokens.
    """

    def __init__(
        self, cfg: Config, plan: Plan, attempt: Attempt, env: WorkerEnv, device: torch.device, stop: StopSignal, dataset: Path
    ) -> None:
        self.cfg, self.plan, self.attempt, self.env, self.device, self.stop = cfg, plan, attempt, env, device, stop
        self.is_main = env.rank == 0
        self.dims = ParallelDims(plan.dp_replicate, plan.dp_shard)
        self.manifest = DataManifest.load(attempt.run.data)
        with torch.device("meta"):
            model = build_model(cfg.model, cfg.model.vocab_size or self.manifest.vocab_size)
        self.model = parallelize(model, self.dims.build_mesh(device.type), cfg, device)
        self.parameters = dict(self.model.module.named_parameters())
        self.optimizer = build_optimizer(self.model.module, cfg.optim)
        self.loss = TrainingLoss(cfg.train, self.model, device)
        self.reduction = StepReduction(device, self.model.grad_copies)
        samples_per_step = plan.samples_per_step * max(1, cfg.diloco.islands)
        self.samples = training_samples(cfg, cache_root(cfg, attempt.run.path.parent), dataset, samples_per_step)
        self.validation = Validation(self.model, cfg, attempt.run, device, dp_rank=env.rank, dp_size=self.dims.dp_size)
        self.throughput = Throughput(
            tokens_per_step=plan.tokens_per_step,
            flops_per_token=plan.flops_per_token,
            world_size=env.world_size,
            peak_flops=plan.peak_flops,
            device=device,
        )
        self.metrics = MetricsLog(attempt, enabled=self.is_main)
        record = stop.deadline.noting(self.metrics.record_event)
        self.saver = Saver(attempt, cfg.checkpoint, Ranks(env.rank, env.world_size), device, record)
        self.clock = StepClock(device)
        self.diagnostics = Diagnostics(cfg, attempt, env.rank, device, self.clock, self.throughput, self.metrics.record_event)
        # Figures of validation, and the step they are of.
        self.validated: tuple[int, dict[str, float]] = (-1, {})
        self.step = 0
        self.tokens_seen = 0
        self.cursor: Position = Cursor()
        self.outcome: Outcome | None = None
        self._save_asked = False
        self._skipped_in_a_row = 0
        self._open_row: dict[str, Any] | None = None

    def train(self) -> Outcome:
        """Trains to the end, or to a stop that all ranks agreed on; a checkpoint of the last step is on disk then."""
        self._resume()
        self.metrics.write("start", self.step)
        self.saver.prepare(self._entries())
        loader = self.open_loader()
        self.diagnostics.begin()
        try:
            self.throughput.restart_clock()
            saved_step = self.step
            while self.step < self.cfg.train.steps and self.outcome is None:
                self.train_step(loader)
                if self._is_due(self.cfg.train.validate_every):
                    self.settle()
                    self._validate()
                if self._is_due(self.cfg.checkpoint.every_steps) or self._save_asked:
                    self.settle()
                    self._save()
                    saved_step, self._save_asked = self.step, False
            self.settle()
            self._make_sure_saved(saved_step)
        finally:
            self.diagnostics.close()
            loader.close()
            self.saver.close()
            self.metrics.close()
        return self.outcome or Outcome.DONE

    def _is_due(self, every: int) -> bool:
        return self.step == self.cfg.train.steps or (every > 0 and self.step % every == 0)

    def open_loader(self) -> TokenLoader:
        """Returns a loader that continues at the current position in the sample order."""
        return TokenLoader(
            self.samples,
            samples_per_step=self.plan.samples_per_step,
            micro_batch_size=self.cfg.train.micro_batch_size,
            dp_rank=self.env.rank,
            dp_size=self.dims.dp_size,
            cursor=self.cursor,
            pin_memory=self.device.type == "cuda",
        )

    def train_step(self, loader: TokenLoader) -> None:
        """Makes one optimizer step; the host learns its figures at the next one, or in `settle`."""
        self.diagnostics.before_step(self.step + 1)
        self._enter("data")
        batch = loader.next_step()
        lr = learning_rate(self.step, self.cfg.train.steps, self.cfg.optim)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        last = len(batch.micro_batches) - 1
        for index, of_host in enumerate(batch.micro_batches):
            self._enter("forward")
            micro = of_host.to(self.device)
            with self.model.gradient_sync(index == last):
                share = self.loss(micro.targets_BT, *micro.inputs) / batch.num_targets
                self._enter("backward")
                share.backward()
            loss += share.detach()
        part_written, part_failed = self.saver.progress()
        self._enter("reduce")
        verdict, previous = self.reduction.reduce(
            loss,
            squares_of(self.optimizer),
            preempt=self.stop.must_leave(),
            interrupt=self.stop.interrupt,
            data_hash=batch.data_hash,
            part_written=part_written,
            part_failed=part_failed,
            save=self.stop.take_save(),
        )
        self._enter("checkpoint")
        self.saver.before_update()
        self._enter("optimizer")
        self.optimizer.step(lr=lr, grad_norm=verdict.grad_norm, skip=verdict.skip)
        self.optimizer.zero_grad()
        self.clock.leave()
        self.step += 1
        self.tokens_seen += batch.num_targets
        self.cursor = batch.cursor_after
        if previous is not None:
            self._close_row(previous)
        self._open_row = {"step": self.step, "lr": lr, "tokens_seen": self.tokens_seen, **self.diagnostics.step_figures(self.step)}
        if stall_s := self.saver.take_stall_s():
            self._open_row["ckpt_stall_s"] = stall_s

    def _enter(self, phase: str) -> None:
        """Notes for the heartbeat and the clock that a phase of the step begins."""
        self.stop.place.enter(self.step, _PLACES[phase])
        self.clock.enter(phase)

    def settle(self) -> None:
        """Waits for the device and learns the facts of the last step."""
        facts = self.reduction.flush()
        if facts is not None:
            self._close_row(facts)

    def _close_row(self, facts: StepFacts) -> None:
        """Logs the step whose facts have just arrived and acts on them; every rank sees the same facts at the same step."""
        assert self._open_row is not None
        row, self._open_row = self._open_row | self.clock.read(), None
        self.metrics.write(
            "train", **row, loss=facts.loss, grad_norm=facts.grad_norm, skipped=int(facts.skipped), data_hash=facts.data_hash
        )
        self.saver.agreed(row["step"], facts.parts_written, facts.parts_failed)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if facts.skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_STEPS:
            raise DivergenceError(
                f"loss or gradient was not finite for {MAX_SKIPPED_STEPS} steps in a row, up to step {row['step']}",
                fix=f"lower optim.lr (now {self.cfg.optim.lr:g}), lengthen optim.warmup_steps, or use precision=fp32",
            )
        self._save_asked = self._save_asked or facts.save
        if facts.interrupt:
            self.outcome = Outcome.INTERRUPTED
        elif facts.preempt:
            self.outcome = Outcome.PREEMPTED

    def _validate(self) -> None:
        self.stop.place.enter(self.step, "validate")
        figures = self.validation.figures()
        self.metrics.write("validation", self.step, **figures)
        self.validated = self.step, {f"validation/{name}": value for name, value in figures.items()}
        sample = self.validation.sample()
        if sample is not None:
            self.metrics.write("sample", self.step, **sample)
        self.diagnostics.pause()

    def _entries(self) -> list[TensorEntry]:
        """Returns this rank's shards of weights and optimizer state, as a checkpoint addresses them."""
        copy, copies = self.env.rank // self.dims.dp_shard, self.dims.dp_replicate
        state, masters = self.optimizer.state(), masters_of(self.optimizer)
        return training_entries(self.parameters, state, replica_rank=copy, replica_count=copies, masters=masters)

    def _save(self) -> None:
        self.stop.place.enter(self.step, "save")
        validated_step, figures = self.validated
        state = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "cursor": self.cursor.to_json(),
            "optimizer_step": self.optimizer.step_count(),
            "seed": self.cfg.train.seed,
            "data_id": self.manifest.id,
            "metrics": {name: value for name, value in figures.items() if validated_step == self.step and math.isfinite(value)},
        }
        self.saver.begin(self.step, self._entries(), state)
        self.diagnostics.pause()

    def _make_sure_saved(self, saved_step: int) -> None:
        """Returns when the last step is on disk; a save that fails now is tried once more, for there is no later one."""
        if saved_step != self.step:
            self._save()
        try:
            self.saver.finish()
        except CheckpointError:
            self._save()
            self.saver.finish()

    def _resume(self) -> None:
        """Continues from the newest checkpoint that verifies; with none, begins from the weights of `init_from`, if it is set."""
        loaded = load_newest(self.attempt.run, self._entries(), rank=self.env.rank, world_size=self.env.world_size)
        if loaded is None:
            self._initialize()
            return
        if loaded.state["data_id"] != self.manifest.id:
            raise ConfigError(
                f"{loaded.path.name} was trained on data {loaded.state['data_id']}, but the data is now {self.manifest.id}",
                where="data",
                fix="start a new run (drop run=...), or bring back the data it was trained on",
            )
        self.step = loaded.state["step"]
        self.tokens_seen = loaded.state["tokens_seen"]
        self.cursor = Cursor.from_json(loaded.state["cursor"])
        self.optimizer.set_step_count(loaded.state["optimizer_step"] if loaded.has_optimizer else 0)
        for note in loaded.notes:
            self.metrics.record_event("checkpoint-skipped", message=note)
        optimizer = "loaded" if loaded.has_optimizer else "fresh: another one saved this checkpoint"
        self.metrics.record_event("resume", step=self.step, checkpoint=loaded.path.name, optimizer=optimizer)

    def _initialize(self) -> None:
        """Takes the weights of another run or of a Hugging Face folder, where the configuration names one."""
        if self.cfg.init_from is None:
            return
        source = origin.parse(self.cfg.init_from)
        kept = origin.load_origin(source, self._entries(), Ranks(self.env.rank, self.env.world_size), strict=self.cfg.init_strict)
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        rest = f"; {len(kept)} tensors keep their initial values: {', '.join(kept[:3])}{more}" if kept else ""
        self.metrics.record_event("init", message=f"weights of {source.title}{rest}", checkpoint=str(source), left_alone=list(kept))
