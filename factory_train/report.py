"""report.md: one run on one page, with plots; from the run directory alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.plots import write_plots
from factory_train.run_dir import Attempt, RunDir
from factory_train.tracking.facts import RunFacts, read_facts
from factory_train.tracking.lineage import result_table
from factory_train.tracking.store import without_credentials
from factory_train.units import format_bytes, format_count, format_duration

# Samples shown: the first, the last, and some between; all of them are in metrics.jsonl.
_MAX_SAMPLES = 6
_PLOTS = {"loss.png": "Loss", "throughput.png": "Throughput", "lr.png": "Learning rate and gradient norm"}


def write_report(run: RunDir) -> Path:
    """Writes report.md and its plots from whatever the run directory holds by now; returns the path of report.md.

    Works for a run that has not taken a step, that failed, or that had several attempts; writing it again replaces it.

    Raises:
        NotFoundError: the run was never started.
    """
    facts, rows = read_facts(run), run.metrics()
    plots = write_plots(facts, rows, run.path / "report")
    sections = [
        f"# {run.name}",
        _headline(facts, rows),
        _table(("", ""), _summary(facts, rows)),
        *_result(facts, rows),
        *_figures(plots),
        *_samples(facts, rows),
        *_attempts(facts),
        *_checkpoints(facts, rows),
        *_data(facts),
        *_commands(facts),
        "## Configuration",
        _fenced(_config_text(facts), "yaml"),
    ]
    storage.write_atomic(run.report_path, "\n\n".join(sections) + "\n")
    return run.report_path


def _last(rows: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((row for row in reversed(rows) if row["kind"] == kind), None)


def _headline(facts: RunFacts, rows: list[dict[str, Any]]) -> str:
    last = _last(rows, "train")
    done = f"{last['step'] if last else 0} of {facts.config.train.steps} steps"
    if error := facts.attempt.error():
        where = f" on rank {error['rank']}" if error.get("rank") is not None else ""
        hint = f"\n>\n> {error['hint']}" if error.get("hint") else ""
        first_line = str(error.get("message") or "no message").strip().splitlines()[0]
        return f"**{_outcome(facts)}** after {done}.\n\n> {first_line}{where}{hint}"
    return f"**{_outcome(facts)}**, {done}."


def _outcome(facts: RunFacts) -> str:
    outcome = facts.outcome
    if outcome == "running" and facts.evaluation and facts.evaluation["step"] >= facts.config.train.steps:
        # The finish stage writes the report shortly before the verdict.
        return "done"
    return outcome


def _summary(facts: RunFacts, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    config, plan, last = facts.config, facts.plan, _last(rows, "train")
    yield "recipe", f"{config.recipe} (program {config.program})"
    yield "model", config.model.name + (f", {format_count(facts.num_parameters)} parameters" if facts.num_parameters else "")
    if last and last.get("tokens_seen"):
        ratio = f", {last['tokens_seen'] / facts.num_parameters:.3g} a parameter" if facts.num_parameters else ""
        yield "tokens trained on", format_count(last["tokens_seen"]) + ratio
    mesh = f", dp_replicate {plan['dp_replicate']} x dp_shard {plan['dp_shard']}" if "dp_shard" in plan else ""
    yield "parallel", f"{config.parallel.strategy}, {facts.world_size or '?'} ranks{mesh}, {config.precision.compute} compute"
    yield "batch", f"{config.train.global_batch_tokens:,} tokens a step, rows of {config.train.seq_len}"
    steps = [row for row in rows if row["kind"] == "train"]
    if speeds := [row["tokens_per_s"] for row in steps if row.get("tokens_per_s")]:
        mfu = f", MFU {100 * last['mfu']:.1f} %" if last and last.get("mfu") else ""
        yield "speed", f"{format_count(sorted(speeds)[len(speeds) // 2])} tokens/s (median){mfu}"
    if memory := [row["memory_bytes"] for row in steps if row.get("memory_bytes")]:
        yield "peak memory of rank 0", format_bytes(max(memory))
    if skipped := sum(bool(row.get("skipped")) for row in steps):
        yield "steps skipped (not finite)", str(skipped)
    if steps:
        training_s = sum(row["step_time_s"] for row in steps if row.get("step_time_s"))
        yield (
            "duration",
            f"{format_duration(training_s)} in optimizer steps, {format_duration(_elapsed_s(facts))} from creation to this report",
        )
    yield "attempts", str(facts.attempt.number)
    yield (
        "began",
        _date(facts.info["created"]) + f" by {facts.info.get('user', '?')}" + (f" on {facts.job['host']}" if facts.job.get("host") else ""),
    )
    if sha := facts.code.get("git_sha"):
        yield "code", f"git `{sha[:12]}`" + (", with uncommitted changes" if facts.code.get("git_dirty") else "")


def _elapsed_s(facts: RunFacts) -> float:
    verdict = facts.attempt.verdict()
    return (verdict.time if verdict else time.time()) - facts.info["created"]


def _result(facts: RunFacts, rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Result"
    if facts.evaluation:
        yield result_table(facts)
        tokens, size = facts.evaluation["num_tokens"], facts.evaluation["num_bytes"]
        yield f"{tokens:,} validation tokens, {size:,} bytes of text; the baselines are measured on the same validation split."
    elif validation := _last(rows, "validation"):
        yield f"Not evaluated yet; last validation at step {validation['step']}: {_number(validation.get('loss'))} nats/token."
    else:
        yield "Nothing was measured yet."


def _figures(plots: list[Path]) -> Iterator[str]:
    for path in plots:
        yield f"## {_PLOTS[path.name]}"
        yield f"![{_PLOTS[path.name]}](report/{path.name})"


def _samples(facts: RunFacts, rows: list[dict[str, Any]]) -> Iterator[str]:
    samples = [row for row in rows if row["kind"] == "sample"]
    if facts.evaluation and facts.evaluation.get("sample"):
        samples = [row for row in samples if row["step"] < facts.evaluation["step"]]
        samples.append({"step": facts.evaluation["step"], **facts.evaluation["sample"]})
    if not samples:
        return
    if len(samples) > _MAX_SAMPLES:
        samples = [samples[round(index * (len(samples) - 1) / (_MAX_SAMPLES - 1))] for index in range(_MAX_SAMPLES)]
    yield "## What it writes"
    yield "The prompt, then `»`, then the model's continuation."
    for row in samples:
        yield f"Step {row['step']}:"
        yield _fenced(f"{row['prompt']} » {row['text']}", "text")


def _attempts(facts: RunFacts) -> Iterator[str]:
    yield "## Attempts"
    yield _table(("attempt", "outcome", "last step", "ended", "reason"), (_attempt_row(facts, attempt) for attempt in facts.run.attempts()))


def _attempt_row(facts: RunFacts, attempt: Attempt) -> tuple[str, ...]:
    verdict = attempt.verdict()
    if verdict is None:
        outcome = _outcome(facts) if attempt.number == facts.attempt.number else "lost"
        return (str(attempt.number), outcome, "", "", "")
    step = "" if verdict.step is None else str(verdict.step)
    return (str(attempt.number), verdict.outcome, step, _date(verdict.time), verdict.reason)


def _checkpoints(facts: RunFacts, rows: list[dict[str, Any]]) -> Iterator[str]:
    events = [event for attempt in facts.run.attempts() for event in attempt.events()]
    failed = [event for event in events if event["event"] == "checkpoint-failed"]
    if not facts.checkpoints and not failed:
        return
    yield "## Checkpoints"
    yield "\n".join(f"- `checkpoints/{name}`" for name in facts.checkpoints)
    saved = sum(event["event"] == "checkpoint" for event in events)
    waited = sum(row.get("ckpt_stall_s") or 0.0 for row in rows)
    yield f"{saved} saved, {len(failed)} failed; training waited {format_duration(waited)} for them in all."
    if failed:
        yield "\n".join(f"- step {event['step']}: {event['message']}" for event in failed)


def _data(facts: RunFacts) -> Iterator[str]:
    if not facts.manifest:
        return
    yield "## Data"
    manifest = facts.manifest
    rows = [("source", str(manifest.get("description") or facts.config.data.path or facts.config.data.name))]
    rows += [
        ("identity", f"`{facts.data_id}`"),
        ("tokenizer", f"{manifest.get('tokenizer')}, {manifest.get('vocab_size')} tokens, sha256 `{facts.tokenizer_sha256}`"),
    ]
    for name, split in (manifest.get("splits") or {}).items():
        tokens, size, documents = split.get("num_tokens", 0), split.get("num_bytes", 0), split.get("num_documents", 0)
        rows.append((name, f"{tokens:,} tokens, {format_bytes(size)}, {documents:,} documents"))
    yield _table(("", ""), rows)


def _commands(facts: RunFacts) -> Iterator[str]:
    name = facts.run.name
    lines = [f"python -m factory_train evaluate {name}", f"python -m factory_train export {name}", f"python -m factory_train sync {name}"]
    if _outcome(facts) not in ("done", "running", "pending"):
        lines.insert(0, f"python -m factory_train resume {name}")
    yield "## Next"
    yield _fenced("\n".join(lines), "sh")


def _config_text(facts: RunFacts) -> str:
    text, uri = facts.attempt.config_path.read_text().rstrip(), facts.config.tracking.uri
    return text.replace(uri, without_credentials(uri)) if uri else text


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows])


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
