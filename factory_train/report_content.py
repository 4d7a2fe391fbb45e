"""The parts a report is made of, and what one run's report says; how it looks is up to `report_markdown` and `report_html`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from factory_train.curves import Curves
from factory_train.exchange_figures import measure_exchange
from factory_train.plots import Plot
from factory_train.plots_figures import PHASE_LABELS, seconds_of_steps
from factory_train.report_history import attempts_section, checkpoints_section, events_section
from factory_train.report_parts import Block, Code, Headline, Mono, Paragraph, Picture, Samples, Section, Strong, Table, shown_outcome
from factory_train.run_dir import Attempt
from factory_train.storage import read_json
from factory_train.tracking.facts import RunFacts
from factory_train.tracking.lineage import baseline_label, change_tags, command_line, result_rows
from factory_train.tracking.store import without_credentials
from factory_train.units import format_bytes, format_count, format_duration, format_wait

# Samples shown: the first, the last, and some between; all of them are in metrics.jsonl.
_MAX_SAMPLES = 10


@dataclass(frozen=True)
class ReportContent:
    """Everything one report says.

    Args:
        title: name of the run.
        written: seconds since the epoch.
        headline: how it stands.
        sections: in the order in which a person asks.
    """

    title: str
    written: float
    headline: Headline
    sections: list[Section]


def make_content(facts: RunFacts, curves: Curves, plots: list[Plot]) -> ReportContent:
    """Returns the report of a run in whatever state it is."""
    sections = [
        Section("Result", list(_result(facts, curves))),
        Section("What was trained", list(_trained(facts))),
        *_differences(facts),
        *(_plot(plot, curves) for plot in plots if plot.name != "timeline"),
        *_no_breakdown(plots, curves),
        *_samples(facts, curves),
        attempts_section(facts, [plot for plot in plots if plot.name == "timeline"]),
        *events_section(facts),
        *checkpoints_section(facts, curves),
        *_data(facts),
        Section("Where everything is", [_places(facts)]),
        Section("How to do it again", list(_again(facts))),
        Section("Configuration", [Code(_config_text(facts), "yaml", folded=True)]),
    ]
    return ReportContent(facts.run.name, time.time(), _headline(facts, curves), sections)


def _headline(facts: RunFacts, curves: Curves) -> Headline:
    progress, quotes = f"{curves.last_step} of {facts.config.train.steps} steps", []
    if error := facts.attempt.error():
        where = f" on rank {error['rank']}" if error.get("rank") is not None else ""
        quotes.append(str(error.get("message") or "no message").strip().splitlines()[0] + where)
        quotes += [str(error["hint"])] if error.get("hint") else []
    return Headline(shown_outcome(facts), progress, tuple(quotes), tuple(_key_figures(facts, curves)))


def _key_figures(facts: RunFacts, curves: Curves) -> Iterator[tuple[str, str]]:
    """Yields the few numbers to see at first glance."""
    if evaluation := facts.evaluation:
        yield "validation loss (nats/token)", f"{evaluation['loss']:.4f}"
        yield "bits per byte", f"{evaluation['bits_per_byte']:.4f}"
        if best := min(facts.baselines.items(), key=lambda item: item[1], default=None):
            yield f"against the {baseline_label(best[0])} baseline", f"{evaluation['loss'] - best[1]:+.4f}"
    elif curves.validations and curves.validations[-1].get("loss") is not None:
        last = curves.validations[-1]
        yield f"validation loss at step {last['step']:,} (nats/token)", f"{last['loss']:.4f}"
        if last.get("bits_per_byte") is not None:
            yield "bits per byte", f"{last['bits_per_byte']:.4f}"
    if tokens := curves.last("tokens_seen"):
        yield "tokens trained on", format_count(tokens)
    if speed := curves.median("tokens_per_s"):
        yield "tokens/s, median", format_count(speed)
    if mfu := curves.median("mfu"):
        yield "MFU, median", f"{100 * mfu:.1f} %"
    if len(curves):
        training_s = curves.total("step_time_s")
        yield "time in steps", format_duration(training_s)
        waited = curves.total("ckpt_stall_s")
        yield "waited for checkpoints", format_wait(waited)
    if exchange := measure_exchange(facts.run):
        yield "not waiting for other islands, least", f"{100 * exchange.not_waiting:.1f} %"


def _result(facts: RunFacts, curves: Curves) -> Iterator[Block]:
    if evaluation := facts.evaluation:
        rows = [(Strong(label) if ours else label, *figures) for label, ours, *figures in result_rows(facts)]
        yield Table(("validation", "loss (nats/token)", "perplexity", "bits per byte"), rows, numbers=(1, 2, 3))
        tokens, size = evaluation["num_tokens"], evaluation["num_bytes"]
        yield Paragraph(f"{tokens:,} validation tokens, {size:,} bytes of text; the baselines are measured on the same validation split.")
    elif curves.validations:
        last = curves.validations[-1]
        loss = "not finite" if last.get("loss") is None else f"{last['loss']:.4f}"
        yield Paragraph(f"Not evaluated yet; last validation at step {last['step']}: {loss} nats/token.")
    else:
        yield Paragraph("Nothing was measured yet.")
    yield Table(("figure", "value"), list(_summary(facts, curves)))


def _summary(facts: RunFacts, curves: Curves) -> Iterator[tuple[str, ...]]:
    if tokens := curves.last("tokens_seen"):
        ratio = f", {tokens / facts.num_parameters:.3g} a parameter" if facts.num_parameters else ""
        yield "tokens trained on", format_count(tokens) + ratio
    if speed := curves.median("tokens_per_s"):
        mfu = curves.median("mfu")
        yield "speed", f"{format_count(speed)} tokens/s (median)" + (f", MFU {100 * mfu:.1f} %" if mfu else "")
    if memory := curves.finite("memory_bytes")[1].tolist():
        yield "peak memory of rank 0", format_bytes(max(memory))
    if skipped := int(curves.total("skipped")):
        yield "steps skipped (not finite)", str(skipped)
    if len(curves):
        training_s = format_duration(curves.total("step_time_s"))
        yield "duration", f"{training_s} in optimizer steps, {format_duration(_elapsed_s(facts))} from creation to this report"
    yield "attempts", str(facts.attempt.number)
    user, host = facts.info.get("user", "?"), facts.job.get("host")
    yield "began", f"{_date(facts.info['created'])} by {user}" + (f" on {host}" if host else "")


def _elapsed_s(facts: RunFacts) -> float:
    verdict = facts.attempt.verdict()
    return (verdict.time if verdict else time.time()) - facts.info["created"]


def _trained(facts: RunFacts) -> Iterator[Block]:
    config, plan, model = facts.config, facts.plan, facts.config.model
    rows: list[tuple[str, ...]] = [("recipe", f"{config.recipe} (program {config.program})")]
    rows.append(("model", model.name + (f", {format_count(facts.num_parameters)} parameters" if facts.num_parameters else "")))
    heads = f"{model.num_heads} heads, {model.num_kv_heads} of keys and values"
    shape = f"{model.num_layers} layers, width {model.dim}, {heads}"
    rows.append(("architecture", f"{model.architecture}: {shape}"))
    if parent := facts.info.get("parent_run") or config.init_from:
        rows.append(("started from", str(parent)))
    rows.append(("data", str(facts.manifest.get("description") or config.data.path or config.data.name)))
    rows += [(name, str(facts.manifest[name])) for name in ("packing", "mixture") if facts.manifest.get(name)]
    mesh = f", dp_replicate {plan['dp_replicate']} x dp_shard {plan['dp_shard']}" if "dp_shard" in plan else ""
    rows.append(("parallel", f"{config.parallel.strategy}, {facts.world_size or '?'} ranks{mesh}, {config.precision.compute} compute"))
    rows.append(("batch", f"{config.train.global_batch_tokens:,} tokens a step, rows of {config.train.seq_len}"))
    rows.append(("optimizer", f"{config.optim.name}, learning rate {config.optim.lr:g}, {config.optim.schedule} schedule"))
    if sha := facts.code.get("git_sha"):
        changed = ", with uncommitted changes" if facts.code.get("git_dirty") else ""
        rows.append(("code", f"git {sha[:12]}{changed}"))
    yield Table(("part", "what"), rows)


def _differences(facts: RunFacts) -> Iterator[Section]:
    """Yields what was asked for beside the recipe, and what later attempts changed."""
    words = [word.partition("=") for word in _words(facts.run.attempts()[0])]
    rows = [
        (Mono(key), Mono(without_credentials(value)))
        for key, equals, value in words
        if equals and key not in ("recipe", "run", "runs_root")
    ]
    blocks: list[Block] = [Table(("key", "value"), rows)] if rows else [Paragraph("None: the recipe as it stands.")]
    for name, lines in change_tags(facts).items():
        blocks.append(Paragraph(f"Attempt {name.rpartition('.')[2]} changed:"))
        blocks.append(Code(lines))
    yield Section("What differs from the recipe", blocks)


def _words(attempt: Attempt) -> list[str]:
    """Returns the words of the command that started an attempt."""
    code = read_json(attempt.path / "code.json")
    return [str(word) for word in (code or {}).get("argv") or []]


def _plot(plot: Plot, curves: Curves) -> Section:
    blocks: list[Block] = [Picture(plot)]
    if plot.name == "breakdown":
        blocks.append(_breakdown_table(curves))
    return Section(plot.title, blocks)


def _breakdown_table(curves: Curves) -> Table:
    parts = {name: float(values.sum()) for name, values in seconds_of_steps(curves).items()}
    whole, count = sum(parts.values()) or 1.0, max(1, len(curves))
    rows = [
        (PHASE_LABELS[name], format_wait(seconds), f"{1000 * seconds / count:.2f}", f"{100 * seconds / whole:.1f}")
        for name, seconds in parts.items()
    ]
    return Table(("part of the step", "in all", "mean of a step (ms)", "share (%)"), rows, numbers=(1, 2, 3))


def _no_breakdown(plots: list[Plot], curves: Curves) -> Iterator[Section]:
    if len(curves) and not any(plot.name == "breakdown" for plot in plots):
        text = "Not known: this run was made by a version that did not log the parts of a step."
        yield Section("Where a step's time goes", [Paragraph(text)])


def _samples(facts: RunFacts, curves: Curves) -> Iterator[Section]:
    samples: list[dict[str, Any]] = list(curves.samples)
    if facts.evaluation and facts.evaluation.get("sample"):
        samples = [row for row in samples if row["step"] < facts.evaluation["step"]]
        samples.append({"step": facts.evaluation["step"], **facts.evaluation["sample"]})
    if not samples:
        return
    count = len(samples)
    if count > _MAX_SAMPLES:
        samples = [samples[round(index * (count - 1) / (_MAX_SAMPLES - 1))] for index in range(_MAX_SAMPLES)]
    rows = [(int(row["step"]), str(row["prompt"]), str(row["text"])) for row in samples]
    note = f"{len(samples)} of {count} samples. " if count > len(samples) else ""
    yield Section("What it writes", [Paragraph(f"{note}The prompt, then », then the model's continuation."), Samples(rows)])


def _data(facts: RunFacts) -> Iterator[Section]:
    if not facts.manifest:
        return
    manifest = facts.manifest
    rows: list[tuple[str, ...]] = [("source", str(manifest.get("description") or facts.config.data.path or facts.config.data.name))]
    rows.append(("identity", Mono(facts.data_id or "")))
    rows.append(("tokenizer", f"{manifest.get('tokenizer')}, {manifest.get('vocab_size')} tokens, sha256 {facts.tokenizer_sha256}"))
    for name, split in (manifest.get("splits") or {}).items():
        tokens, size, documents = split.get("num_tokens", 0), split.get("num_bytes", 0), split.get("num_documents", 0)
        rows.append((name, f"{tokens:,} tokens, {format_bytes(size)}, {documents:,} documents"))
    yield Section("Data", [Table(("part", "what"), rows)])


def _places(facts: RunFacts) -> Table:
    run, uri = facts.run, facts.config.tracking.uri
    places = [("run directory", run.path), ("metrics, logs, events", run.path / "attempts"), ("checkpoints", run.checkpoints)]
    places += [("evaluation", run.evaluation), ("export (Hugging Face layout)", run.export), ("plots", run.path / "report")]
    rows: list[tuple[str, ...]] = [(what, Mono(path)) for what, path in places if path.is_dir()]
    state = read_json(run.path / "tracking.json") or {}
    if state:
        rows.append(("MLflow", Mono(f"{without_credentials(state['uri'])}, run {state['mlflow_run_id']}")))
        if state.get("registered_model"):
            rows.append(("registered model", f"{state['registered_model']}, version {state['registered_version']}"))
    elif uri:
        rows.append(("MLflow", Mono(without_credentials(uri))))
    return Table(("what", "where"), rows)


def _again(facts: RunFacts) -> Iterator[Block]:
    name, lines, said = facts.run.name, [], ""
    if (sha := facts.code.get("git_sha")) and not facts.code.get("git_dirty"):
        lines.append(f"git checkout {sha}")
    elif sha:
        said = f" The code was git {sha[:12]} with uncommitted changes, which attempts/{facts.attempt.path.name}/code holds."
    for attempt in facts.run.attempts():
        words = [word for word in _words(attempt) if not word.startswith("run=")]
        line = command_line(words)
        if words and line not in lines:
            lines.append(line)
    yield Paragraph(f"The command that made this run, as a new run.{said}" if lines else "The command was not recorded.")
    if lines:
        yield Code("\n".join(lines), "sh")
    yield Paragraph("To go on from here:")
    verbs = ["evaluate", "generate", "export", "sync", "report"]
    if shown_outcome(facts) not in ("done", "running", "pending"):
        verbs.insert(0, "resume")
    more = {"generate": ' "Once upon a time"'}
    yield Code("\n".join(f"python -m factory_train {verb} {name}{more.get(verb, '')}" for verb in verbs), "sh")


def _config_text(facts: RunFacts) -> str:
    text, uri = facts.attempt.config_path.read_text().rstrip(), facts.config.tracking.uri
    return text.replace(uri, without_credentials(uri)) if uri else text


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
