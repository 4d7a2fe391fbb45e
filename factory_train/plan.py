"""What follows from a configuration before anything runs: ranks, steps, counts, memory. Arithmetic only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from factory_train.config import Config, ModelConfig, from_mapping
from factory_train.diloco_plan import DilocoPlan, plan_diloco
from factory_train.errors import PreflightError
from factory_train.hardware import Hardware
from factory_train.memory import BYTES, Memory, checkpoint_bytes, estimate_memory
from factory_train.model_size import ParameterCount, count_parameters, flops_per_token
from factory_train.registries import ARCHITECTURES
from factory_train.units import format_bytes, format_count

# Ranks of a machine without cards, unless launcher.tasks_per_node says otherwise.
CPU_RANKS = 2
# More devices than this are not proposed to anybody.
_MAX_DEVICES = 4096
# What configs/precision/bf16.yaml sets.
_BF16 = {"params": "float32", "compute": "bfloat16", "reduce": "float32"}


@dataclass(frozen=True)
class Plan:
    """Everything derived from a configuration, computed once.

    Args:
        model: name of the preset.
        vocab_size: rows of the embedding.
        vocab_exact: False while the tokenizer is not trained yet and `vocab_size` is the most it may have.
        tied: whether the head is the embedding.
        seq_len: tokens of a row.
        strategy: parallel strategy.
        compute: number format of matmuls.
        world_size, tasks_per_node: ranks in all, and of one machine.
        dp_replicate, dp_shard: resolved mesh; their product is `dp_size`.
        dp_size: ranks that process different rows.
        micro_batch_size: rows a rank processes at once.
        samples_per_step: rows of one optimizer step over all ranks of one world: an island's, where there are islands.
        grad_accum_steps: micro-batches of a rank in one step.
        padded_rows_per_step: rows processed in one step, those of weight zero that fill up the last round included.
        tokens_per_step: target tokens of one step.
        steps: optimizer steps of the run.
        total_tokens: target tokens of the run.
        params: parameter counts.
        flops_per_token: see `model_size.flops_per_token`.
        tokens_per_param: total tokens by parameters.
        checkpoint_bytes: master weights and optimizer state, as a checkpoint holds them.
        memory: peak of one rank.
        hardware: name of what it runs on.
        device: "cuda" or "cpu".
        device_memory_bytes: memory a rank may take; None when unknown.
        peak_flops: dense bf16 peak of one device in FLOP/s; None when unknown, or when FLOPs are.
        like_llama: counts are those of a Llama of the same dimensions, for the architecture is a plugin's.
        fits: whether the estimate is within the device's memory; None when that is unknown.
        remedies: overrides that would make it fit, when it does not.
        diloco: the exchange between islands, where there are any; world, batch and memory are those of one of them.
    """

    model: str
    vocab_size: int
    vocab_exact: bool
    tied: bool
    seq_len: int
    strategy: str
    compute: str
    world_size: int
    tasks_per_node: int
    dp_replicate: int
    dp_shard: int
    dp_size: int
    micro_batch_size: int
    samples_per_step: int
    grad_accum_steps: int
    padded_rows_per_step: int
    tokens_per_step: int
    steps: int
    total_tokens: int
    params: ParameterCount
    flops_per_token: float
    tokens_per_param: float
    checkpoint_bytes: int
    memory: Memory
    hardware: str
    device: str
    device_memory_bytes: int | None
    peak_flops: float | None
    like_llama: bool
    fits: bool | None
    remedies: tuple[str, ...]
    diloco: DilocoPlan | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain values, for plan.json."""
        return {"format_version": 1, **asdict(self), "remedies": list(self.remedies), "memory_total_bytes": self.memory.total}

    def lines(self) -> list[str]:
        """Returns the plan as aligned lines for a person."""
        about = "" if self.vocab_exact else "at most "
        padding = self.padded_rows_per_step - self.samples_per_step
        of_device = "" if self.device_memory_bytes is None else f" of {format_bytes(self.device_memory_bytes)}"
        peak = "" if self.peak_flops is None else f", peak {self.peak_flops / 1e12:.0f} TFLOP/s a device"
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        rows = {
            "model": f"{self.model}: {format_count(self.params.total)} parameters"
            f" ({format_count(self.params.embedding)} embedding, {'tied' if self.tied else 'untied'}), {about}{self.vocab_size} tokens",
            "batch": f"{format_count(self.tokens_per_step)} tokens = {self.samples_per_step} rows of {self.seq_len}:"
            f" {self.dp_size} x {self.micro_batch_size} rows, accumulation {self.grad_accum_steps}"
            + (f" ({padding} empty rows)" if padding else ""),
            "run": f"{self.steps} steps, {format_count(self.total_tokens)} tokens, {self.tokens_per_param:.3g} per parameter,"
            f" {self.total_tokens * self.flops_per_token:.2e} FLOPs ({self.flops_per_token:.2e} a token)",
            "parallel": f"{self.strategy}, {ranks} (dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard}),"
            f" {self.compute}, {self.hardware}{peak}",
            "memory": f"about {format_bytes(self.memory.total)} a rank{of_device} ({self._memory_parts()})",
            "checkpoint": format_bytes(self.checkpoint_bytes),
        }
        if self.diloco is not None:
            rows = {
                "diloco": self.diloco.line(),
                **rows,
                "batch": f"on each island {rows['batch']}",
                "parallel": f"on each island {rows['parallel']}",
            }
        if self.like_llama:
            rows["note"] = "parameters, FLOPs, memory and checkpoint as of a Llama of these dimensions: the architecture is a plugin's"
        width = max(map(len, rows))
        return [f"{name:<{width}}  {text}" for name, text in rows.items()]

    def _memory_parts(self) -> str:
        parts = {
            "states": self.memory.states,
            "working weights": self.memory.working_weights,
            "accumulated gradients": self.memory.accumulated_grads,
            "activations": self.memory.activations,
            "attention mask": self.memory.mask,
            "logits": self.memory.logits,
            "checkpoint copy": self.memory.snapshot,
            "runtime": self.memory.runtime + self.memory.fragmentation,
        }
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)


def resolve_tasks_per_node(cfg: Config, hardware: Hardware) -> int:
    """Returns the ranks of one machine (and island): as configured, else one a card, or `CPU_RANKS` without cards."""
    if cfg.launcher.tasks_per_node is not None:
        return cfg.launcher.tasks_per_node
    if cfg.parallel.strategy == "single":
        return 1
    sharing = cfg.launcher.islands_per_node if cfg.diloco.islands else 1
    return max(1, hardware.num_devices // sharing) if hardware.device == "cuda" else CPU_RANKS


def make_plan(cfg: Config, vocab_size: int, hardware: Hardware, vocab_exact: bool) -> Plan:
    """Derives the plan of a configuration that has passed its checks.

    Args:
        cfg: the whole configuration.
        vocab_size: rows of the embedding.
        hardware: one machine of the job.
        vocab_exact: whether `vocab_size` is final.
    """
    plan = _derive(cfg, vocab_size, hardware, vocab_exact)
    return plan if plan.fits is not False else replace(plan, remedies=tuple(_remedies(cfg, vocab_size, hardware)))


def check_fits(plan: Plan) -> None:
    """Refuses a plan that needs more memory than a rank has.

    Raises:
        PreflightError: with the parts of the need, and overrides that would make it fit.
    """
    if plan.fits is not False:
        return
    assert plan.device_memory_bytes is not None
    share = f"{plan.hardware} has {format_bytes(plan.device_memory_bytes)}"
    if plan.device == "cpu" and plan.tasks_per_node > 1:
        share += f" for each of its {plan.tasks_per_node} ranks"
    raise PreflightError(
        f"{plan.model} does not fit: a rank needs about {format_bytes(plan.memory.total)} ({plan._memory_parts()}), {share}",
        where="memory",
        fix=", or ".join(plan.remedies) or "a machine with more memory",
    )


def _derive(cfg: Config, vocab_size: int, hardware: Hardware, vocab_exact: bool) -> Plan:
    tasks_per_node = resolve_tasks_per_node(cfg, hardware)
    world_size = cfg.launcher.nodes * tasks_per_node
    dp_replicate, dp_shard = cfg.parallel.dp_replicate, cfg.parallel.dp_shard
    if cfg.parallel.strategy != "fsdp":
        dp_replicate, dp_shard = world_size, 1
    elif dp_shard == -1:
        dp_shard = world_size // dp_replicate
    assert dp_replicate * dp_shard == world_size, "check_world comes first"

    train = cfg.train
    islands = max(1, cfg.diloco.islands)
    samples = train.global_batch_tokens // train.seq_len // islands
    rows_per_round = world_size * train.micro_batch_size
    rounds = -(-samples // rows_per_round)
    tokens_per_step = samples * train.seq_len
    count = count_parameters(cfg.model, vocab_size)
    memory = estimate_memory(
        cfg, count, vocab_size, world_size=world_size, dp_shard=dp_shard, grad_accum_steps=rounds, device=hardware.device
    )
    like_llama = not ARCHITECTURES.is_builtin(cfg.model.architecture)
    available = hardware.memory_bytes
    if available is not None and hardware.device == "cpu":
        available //= tasks_per_node
    return Plan(
        model=cfg.model.name,
        vocab_size=vocab_size,
        vocab_exact=vocab_exact,
        tied=cfg.model.tie_embeddings,
        seq_len=train.seq_len,
        strategy=cfg.parallel.strategy,
        compute=cfg.precision.compute,
        world_size=world_size,
        tasks_per_node=tasks_per_node,
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        dp_size=world_size,
        micro_batch_size=train.micro_batch_size,
        samples_per_step=samples,
        grad_accum_steps=rounds,
        padded_rows_per_step=rounds * rows_per_round,
        tokens_per_step=tokens_per_step,
        steps=train.steps,
        total_tokens=train.steps * tokens_per_step * islands,
        params=count,
        flops_per_token=flops_per_token(cfg.model, vocab_size, train.seq_len),
        tokens_per_param=train.steps * tokens_per_step * islands / count.total,
        checkpoint_bytes=checkpoint_bytes(cfg, count),
        memory=memory,
        hardware=hardware.name,
        device=hardware.device,
        device_memory_bytes=available,
        # An MFU from another model's FLOPs would be a made-up number.
        peak_flops=None if like_llama else hardware.peak_flops,
        like_llama=like_llama,
        fits=None if available is None else memory.total <= available,
        remedies=(),
        diloco=plan_diloco(cfg.diloco, count.total, BYTES[cfg.precision.params]),
    )


def _remedies(cfg: Config, vocab_size: int, hardware: Hardware) -> Iterator[str]:
    """Yields overrides that make it fit, each found by computing it; those that change the result least come first."""

    def fits(candidate: Config, rows: int = vocab_size) -> bool:
        return bool(_derive(candidate, rows, hardware, False).fits)

    if cfg.checkpoint.mode == "async" and fits(_override(cfg, checkpoint={"mode": "sync"})):
        yield "checkpoint.mode=sync"
    full = _override(cfg, parallel={"activation_checkpoint": "full"})
    recompute = "parallel.activation_checkpoint=full"
    if cfg.parallel.activation_checkpoint == "none" and fits(full):
        yield recompute
    for start, prefix in ((cfg, ""), (full, recompute + " ")):
        smaller = (_override(start, train={"micro_batch_size": rows}) for rows in range(cfg.train.micro_batch_size - 1, 0, -1))
        fitting = next((candidate for candidate in smaller if fits(candidate)), None)
        if fitting is not None:
            yield f"{prefix}train.micro_batch_size={fitting.train.micro_batch_size}"
            break

    if hardware.device == "cuda" and cfg.precision.compute == "float32" and fits(_override(cfg, precision=_BF16)):
        yield "precision=bf16"
    narrow = _override(cfg, precision=_BF16, optim={"name": "adamw_fused", "state": "int8", "master": "split"})
    if hardware.device == "cuda" and cfg.optim.name in ("adamw", "adamw_fused") and fits(narrow):
        yield "optim=adamw_fused optim.state=int8 optim.master=split precision=bf16"
    least = _override(full, parallel={"strategy": "fsdp", "dp_replicate": 1, "dp_shard": -1, "reshard_after_forward": True})
    least = _override(least, train={"micro_batch_size": 1})
    sharding = f"parallel=fsdp {recompute} train.micro_batch_size=1"
    if hardware.device == "cuda" and cfg.precision.compute == "float32":
        least, sharding = _override(least, precision=_BF16), f"{sharding} precision=bf16"
    needs_mesh = cfg.parallel.strategy != "fsdp" or cfg.parallel.dp_replicate > 1 or not cfg.parallel.reshard_after_forward
    if needs_mesh and resolve_tasks_per_node(least, hardware) * cfg.launcher.nodes > 1 and fits(least):
        yield sharding
    preset = _largest_preset(cfg, vocab_size, fits)
    if preset is not None:
        yield f"model={preset}"
    if hardware.device == "cuda" and not fits(least):
        ranks = resolve_tasks_per_node(least, hardware)
        while ranks < _MAX_DEVICES:
            ranks *= 2
            if fits(_override(least, launcher={"nodes": 1, "tasks_per_node": ranks})):
                yield f"{ranks} such devices with {sharding}"
                break


def _override(cfg: Config, **sections: dict[str, Any]) -> Config:
    return replace(cfg, **{name: replace(getattr(cfg, name), **values) for name, values in sections.items()})


def _largest_preset(cfg: Config, vocab_size: int, fits: Callable[[Config, int], bool]) -> str | None:
    """Returns the name of the largest preset, smaller than the model at hand, that fits with everything else unchanged."""
    limit = count_parameters(cfg.model, vocab_size).total
    sized = []
    for path in (Path(__file__).parent / "configs" / "model").glob("*.yaml"):
        model: ModelConfig = from_mapping(yaml.safe_load(path.read_text()), ModelConfig)
        rows = model.vocab_size or cfg.model.vocab_size or vocab_size
        total = count_parameters(model, rows).total
        if total < limit and model.max_seq_len >= cfg.train.seq_len and fits(replace(cfg, model=model), rows):
            sized.append((total, path.stem))
    return max(sized)[1] if sized else None
