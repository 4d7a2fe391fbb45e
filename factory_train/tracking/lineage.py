"""Where a run comes from and what became of it, in MLflow's words: parameters, tags and a description."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shlex
from datetime import UTC, datetime
from typing import Any

from factory_train.config import flatten
from factory_train.run_dir import Attempt
from factory_train.tracking.facts import RunFacts
from factory_train.tracking.store import without_credentials
from factory_train.units import format_count, format_duration

# MLflow accepts 6000 characters in a parameter and, in older servers, 5000 in a tag.
MAX_PARAM_CHARS = 500
MAX_TAG_CHARS = 5000
# Numbers of plan.json that become parameters.
PLAN_KEYS = (
    "vocab_size",
    "world_size",
    "dp_replicate",
    "dp_shard",
    "grad_accum_steps",
    "tokens_per_step",
    "total_tokens",
    "tokens_per_param",
    "flops_per_token",
)


def params_of(facts: RunFacts) -> dict[str, str]:
    """Returns the parameters of a run: its configuration as it began, and what was derived from it."""
    derived = {name: facts.plan.get(name) for name in PLAN_KEYS} | {"num_parameters": facts.num_parameters}
    # What follows from the configuration is searched for as often as the configuration itself.
    values = {f"plan.{name}": _text(value) for name, value in derived.items() if value is not None}
    # MLflow never changes a parameter: the first attempt's word stands, later ones become tags.
    for attempt in facts.run.attempts():
        values = _config_params(attempt) | values
    return values


def change_tags(facts: RunFacts) -> dict[str, str]:
    """Returns, for each attempt whose configuration differs from the one before, one `key: old -> new` a line."""
    tags = {}
    for before, after in itertools.pairwise(facts.run.attempts()):
        old, new = _config_params(before), _config_params(after)
        changed = [
            f"{name}: {old.get(name)} -> {new.get(name)}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)
        ]
        if changed:
            tags[f"config.changed.{after.number}"] = "\n".join(changed)
    return tags


@functools.lru_cache(maxsize=256)
def _config_params(attempt: Attempt) -> dict[str, str]:
    """Returns a frozen configuration as parameters: dotted keys, YAML's spelling of null and booleans."""
    config = attempt.config()
    values = {name: _text(value)[:MAX_PARAM_CHARS] for name, value in flatten(config).items()}
    if config.tracking.uri:
        values["tracking.uri"] = without_credentials(config.tracking.uri)
    return values


def _text(value: Any) -> str:
    if value is None or isinstance(value, (bool, list)):
        return json.dumps(value)
    return str(value)


def identity_tags(facts: RunFacts) -> dict[str, str]:
    """Returns the two tags that identify a run directory: its name, and when it was made (names repeat on a shared server)."""
    created = datetime.fromtimestamp(facts.info["created"], UTC).isoformat(timespec="microseconds")
    return {"factory_train.run": facts.run.name, "factory_train.run_created": created}


def tags_of(facts: RunFacts) -> dict[str, str]:
    """Returns the lineage of a run. What is not known yet is left out."""
    code, job = facts.code, facts.job
    tags = {
        **identity_tags(facts),
        "mlflow.runName": facts.run.name,
        "mlflow.user": facts.info.get("user"),
        "mlflow.source.name": command_line(facts.code.get("argv") or [f"recipe={facts.config.recipe}"]),
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": code.get("git_sha"),
        "mlflow.note.content": page_text(facts),
        "factory_train.recipe": facts.config.recipe,
        "factory_train.model": facts.config.model.name,
        "factory_train.attempt": facts.attempt.number,
        "factory_train.run_dir": facts.run.path,
        "factory_train.parent_run": facts.info.get("parent_run"),
        "factory_train.launcher": job.get("launcher") or facts.config.launcher.name,
        "factory_train.host": job.get("host"),
        "factory_train.world_size": facts.world_size,
        "factory_train.git_sha": code.get("git_sha"),
        "factory_train.git_dirty": _text(code["git_dirty"]) if code.get("git_dirty") is not None else None,
        "factory_train.code_tree_sha256": code.get("tree_sha256"),
        "factory_train.config_sha256": facts.config_sha256,
        "factory_train.data_id": facts.data_id,
        "factory_train.tokenizer_sha256": facts.tokenizer_sha256,
        "factory_train.checkpoint": facts.checkpoints[-1] if facts.checkpoints else None,
        "factory_train.outcome": facts.outcome,
        **change_tags(facts),
        "factory_train.version": code.get("version"),
        "factory_train.python": code.get("python"),
        **{f"factory_train.{package}": version for package, version in (code.get("packages") or {}).items()},
    }
    return {name: str(value)[:MAX_TAG_CHARS] for name, value in tags.items() if value not in (None, "")}


def command_line(argv: list[str]) -> str:
    """Returns the command with these words as a shell takes it, without the password a tracking URI in it may carry."""
    words = [f"{name}{equals}{without_credentials(value)}" for name, equals, value in (word.partition("=") for word in argv)]
    return " ".join(["python -m factory_train", *map(shlex.quote, words)])


def description(facts: RunFacts) -> list[str]:
    """Returns what the run is and what came out, as Markdown paragraphs; the result first, since the UI folds long texts."""
    config, paragraphs = facts.config, []
    if evaluation := facts.evaluation:
        better = ", ".join(f"{baseline_label(name)} {loss:.3f}" for name, loss in sorted(facts.baselines.items(), key=lambda item: item[1]))
        result = f"**{evaluation['loss']:.3f} nats/token, {evaluation['bits_per_byte']:.3f} bits per byte** on validation text"
        paragraphs.append(f"{result} (baselines: {better})." if better else f"{result}.")
    parts = [config.model.name]
    if facts.num_parameters:
        parts.append(f"{format_count(facts.num_parameters)} parameters")
    parts.append(config.parallel.strategy.upper() + (f" over {facts.world_size} ranks" if facts.world_size else ""))
    parts.append(f"{config.train.steps} steps of {config.train.global_batch_tokens:,} tokens")
    paragraphs.append(f"{config.recipe}: " + ", ".join(parts) + ".")
    if data := facts.manifest.get("description"):
        paragraphs.append(f"Data: {data} (`{str(facts.data_id)[:16]}`).")
    if facts.evaluation:
        paragraphs.append(result_table(facts))
    return paragraphs


def page_text(facts: RunFacts) -> str:
    """Returns the text on the run's page: `description`, how it ended, and where to go on."""
    paragraphs, name = description(facts), facts.run.name
    if verdict := facts.attempt.verdict():
        after = format_duration(verdict.time - facts.info["created"])
        paragraphs.append(f"Attempt {facts.attempt.number} ended **{verdict.outcome}** {after} after the run began: {verdict.reason}.")
    paragraphs.append(f"Run directory: `{facts.run.path}`. Artifacts: report.html, report.md, samples.md, config.yaml.")
    commands = (f"`python -m factory_train {verb} {name}`" for verb in ("status", "evaluate", "export"))
    paragraphs.append("Commands: " + ", ".join(commands))
    return "\n\n".join(paragraphs)


def result_table(facts: RunFacts) -> str:
    """Returns `result_rows` as a Markdown table."""
    rows = [(f"**{label}**" if ours else label, *figures) for label, ours, *figures in result_rows(facts)]
    lines = ["| validation | loss (nats/token) | perplexity | bits per byte |", "|---|---:|---:|---:|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def result_rows(facts: RunFacts) -> list[tuple[str, bool, str, str, str]]:
    """Returns this model and the baselines, best first: label, whether it is this model, loss, perplexity and bits per byte."""
    evaluation = facts.evaluation
    assert evaluation is not None
    # Bits per byte is a fixed multiple of nats per token on the same text.
    bits_per_nat = evaluation["bits_per_byte"] / evaluation["loss"] if evaluation["loss"] else math.nan
    losses = [(f"this model, step {evaluation['step']}", True, evaluation["loss"])]
    losses += [(baseline_label(name), False, loss) for name, loss in facts.baselines.items()]
    return [
        (label, ours, f"{loss:.4f}", f"{math.exp(min(loss, 700)):,.1f}", f"{loss * bits_per_nat:.4f}")
        for label, ours, loss in sorted(losses, key=lambda row: row[2])
    ]


def baseline_label(name: str) -> str:
    """Returns `bigram_kneser_ney` as people write it."""
    return name.replace("kneser_ney", "Kneser-Ney").replace("_", " ")
