"""When memory runs out: what the plan had counted on, what was used, and which overrides would mend it."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from factory_train.config import Config
from factory_train.diagnostics.memory_history import record_memory_history, write_memory_snapshot
from factory_train.errors import OutOfMemoryError
from factory_train.hardware import Hardware
from factory_train.heartbeat import Place
from factory_train.memory import Memory
from factory_train.plan import Plan, make_plan
from factory_train.run_dir import Attempt
from factory_train.throughput import peak_memory_bytes
from factory_train.units import format_bytes

# What allocators other than the CUDA one say; they raise a plain RuntimeError.
_MESSAGES = ("can't allocate memory", "out of memory", "Cannot allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# A change that saves less of the planned need than this is not worth a person's time.
_WORTHWHILE = 0.05
# Of the device: an estimate that fills it to the brim is none that fits.
_USABLE = 0.95
_MAX_REMEDIES = 3
_PARTS = {
    "states": "weights, gradients and optimizer state, the outer one of islands included",
    "working_weights": "working weights",
    "accumulated_grads": "accumulated gradients",
    "activations": "activations",
    "mask": "the attention mask of packed documents",
    "logits": "logits",
    "snapshot": "the checkpoint's copy",
    "runtime": "the runtime",
}


@dataclass(frozen=True)
class Use:
    """Memory of this rank when it ran out, in bytes.

    Args:
        peak: the most it has held.
        requested: what the allocation asked for; None when the error does not say.
        available: what the device has; None when unknown.
    """

    peak: int
    requested: int | None
    available: int | None


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that memory ran out, on a card or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


@contextlib.contextmanager
def explaining_out_of_memory(cfg: Config, plan: Plan, attempt: Attempt, rank: int, device: torch.device, place: Place) -> Iterator[None]:
    """Turns running out of memory inside the block into an error that says what to change.

    With `profile.memory` the allocator's history is recorded from the start, so that the snapshot shows who asked for what.

    Args:
        cfg: the frozen configuration.
        plan: what was derived from it.
        attempt: gets `out-of-memory/rank-*.txt`, and on CUDA a snapshot beside it.
        rank: this rank.
        device: what it computes on.
        place: where training is.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    if cfg.profile.memory:
        record_memory_history(device)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        use = _use(error, plan, device)
        explained = explain(cfg, plan, use, place)
        with contextlib.suppress(Exception):
            # Nothing that goes wrong here may hide the error itself.
            _write(explained, error, plan, use, attempt, rank, device)
        raise explained from error


def explain(cfg: Config, plan: Plan, use: Use, place: Place) -> OutOfMemoryError:
    """Returns the error for a person: when it was, what was used, what was planned, what to change."""
    step, phase, _ = place.now
    when = "before the first step" if step < 0 else f"in step {step + 1} ({phase})"
    asked = f", asking for {format_bytes(use.requested)} more" if use.requested else ""
    of = f" of {format_bytes(use.available)}" if use.available else ""
    part, size = largest_part(plan.memory)
    what = (
        f"memory ran out {when}{asked}: this rank held {format_bytes(use.peak)}{of} at most; planned were "
        f"{format_bytes(plan.memory.total)}, {format_bytes(size)} of it {_PARTS[part]}"
    )
    if use.requested and use.requested > plan.memory.total:
        what += "; a request larger than the whole plan is not the model's: the log shows who made it"
    return OutOfMemoryError(
        what, where="memory", fix=", or ".join(remedies(cfg, plan, use)) or "a device with more memory, or a smaller model"
    )


def largest_part(memory: Memory) -> tuple[str, int]:
    """Returns name and bytes of the largest part of a plan."""
    name = max(_PARTS, key=lambda part: int(getattr(memory, part)))
    return name, getattr(memory, name)


def remedies(cfg: Config, plan: Plan, use: Use) -> list[str]:
    """Returns overrides that lower the need, each with the figure it would need; those that change the result least come first.

    The plan may have been wrong, since it did not run out: what the rank used beyond it is added to every figure.
    """
    beyond = max(0, use.peak + (use.requested or 0) - plan.memory.total)
    # What is asked for by nothing of the model says nothing about other settings.
    if beyond > plan.memory.total:
        beyond = max(0, use.peak - plan.memory.total)
    hardware = Hardware(plan.hardware, plan.device, plan.tasks_per_node, None, None)

    def need(candidate: Config) -> int:
        return make_plan(candidate, plan.vocab_size, hardware, plan.vocab_exact).memory.total

    found: list[tuple[str, int]] = []
    for text, candidate in _candidates(cfg, plan):
        planned = need(candidate)
        if planned <= (1 - _WORTHWHILE) * plan.memory.total:
            found.append((text, planned + beyond))
    if use.available and (fitting := [item for item in found if item[1] <= _USABLE * use.available]):
        found = fitting
    # One key with several values: the largest that will do.
    kept: dict[str, str] = {}
    for text, planned in found:
        kept.setdefault(text.partition("=")[0], f"{text} ({format_bytes(planned)} instead of {format_bytes(plan.memory.total + beyond)})")
    return list(kept.values())[:_MAX_REMEDIES]


def _candidates(cfg: Config, plan: Plan) -> Iterator[tuple[str, Config]]:
    """Yields overrides and what they make of the configuration; the same result by other means first."""
    train, parallel = cfg.train, cfg.parallel
    rows = train.micro_batch_size
    while rows > 1:
        # Accumulation makes up for it, so the global batch stays what it is.
        rows //= 2
        yield f"train.micro_batch_size={rows}", replace(cfg, train=replace(train, micro_batch_size=rows))
    full = replace(parallel, activation_checkpoint="full")
    if parallel.activation_checkpoint == "none":
        yield "parallel.activation_checkpoint=full", replace(cfg, parallel=full)
    if parallel.strategy != "fsdp" and plan.world_size > 1:
        sharded = replace(parallel, strategy="fsdp", dp_replicate=1, dp_shard=-1)
        yield "parallel=fsdp", replace(cfg, parallel=sharded)
    if plan.dp_replicate > 1 and parallel.strategy == "fsdp":
        yield "parallel.dp_replicate=1 parallel.dp_shard=-1", replace(cfg, parallel=replace(parallel, dp_replicate=1, dp_shard=-1))
    if not parallel.reshard_after_forward:
        yield "parallel.reshard_after_forward=true", replace(cfg, parallel=replace(parallel, reshard_after_forward=True))
    if plan.device == "cpu" and cfg.checkpoint.mode == "async":
        yield "checkpoint.mode=sync", replace(cfg, checkpoint=replace(cfg.checkpoint, mode="sync"))
    if parallel.strategy == "fsdp" and plan.device == "cuda":
        nodes = 2 * cfg.launcher.nodes
        yield f"launcher.nodes={nodes}", replace(cfg, launcher=replace(cfg.launcher, nodes=nodes), parallel=replace(parallel, dp_shard=-1))
    if plan.device == "cuda" and cfg.precision.compute == "float32":
        yield "precision=bf16", replace(cfg, precision=replace(cfg.precision, compute="bfloat16"))
    if rows == 1 and parallel.activation_checkpoint == "full" and train.seq_len % 2 == 0:
        yield f"train.seq_len={train.seq_len // 2} in a new run", replace(cfg, train=replace(train, seq_len=train.seq_len // 2))


def _use(error: Exception, plan: Plan, device: torch.device) -> Use:
    match = _REQUEST.search(str(error))
    requested = int(float(match[1]) * _UNITS[match[2]]) if match else None
    available = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else plan.device_memory_bytes
    return Use(peak_memory_bytes(device), requested, available)


def _write(
    explained: OutOfMemoryError,
    error: Exception,
    plan: Plan,
    use: Use,
    attempt: Attempt,
    rank: int,
    device: torch.device,
) -> None:
    folder = attempt.path / "out-of-memory"
    folder.mkdir(exist_ok=True)
    stem = f"rank-{rank:05d}"
    rows: dict[str, Any] = {title: getattr(plan.memory, part) for part, title in _PARTS.items()}
    rows |= {"planned in all": plan.memory.total, "held at most": use.peak, "asked for": use.requested, "of the device": use.available}
    lines = [f"{type(error).__name__}: {error}", "", explained.what, f"fix: {explained.fix}", ""]
    lines += [f"{title:<40} {'unknown' if size is None else format_bytes(size):>10}" for title, size in rows.items()]
    if device.type == "cuda":
        lines += ["", torch.cuda.memory_summary(device)]
    else:
        machine = psutil.virtual_memory()
        lines += [f"{'free on this machine':<40} {format_bytes(machine.available):>10}", f"{'of':<40} {format_bytes(machine.total):>10}"]
    (folder / f"{stem}.txt").write_text("\n".join([*lines, ""]))
    if device.type == "cuda":
        write_memory_snapshot(folder / f"{stem}.memory.pickle")
