"""What a person sees when a run has ended well: the result, where everything is, what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.exchange_figures import measure_exchange
from factory_train.run_dir import Attempt, RunDir

_BASELINE_NAMES = {"unigram": "unigram", "bigram_kneser_ney": "Kneser-Ney bigram"}
_SAMPLE_CHARACTERS = 400


def summary_lines(attempt: Attempt) -> list[str]:
    """Returns the closing summary, read from the run directory alone; what is not there is left out."""
    rows = list(_rows(attempt))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}".rstrip() for name, text in rows]


def next_commands(run: RunDir) -> list[str]:
    """Returns the commands that make sense for a run that was just started."""
    name = shlex.quote(run.name)
    return [f"python -m factory_train {words}" for words in (f"logs -f {name}", f"status {name}", f"stop {name}")]


def shown(path: Path) -> str:
    """Returns a path as short as it can be typed from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def evaluation_lines(evaluation: dict[str, Any]) -> list[str]:
    """Returns the result of one evaluation, as the closing summary shows it."""
    return [f"{name:<10}  {text}".rstrip() for name, text in _result(evaluation)]


def _rows(attempt: Attempt) -> Iterator[tuple[str, str]]:
    run, verdict = attempt.run, attempt.verdict()
    state = f"{verdict.outcome}, step {verdict.step}" if verdict and verdict.step is not None else verdict.outcome if verdict else "unknown"
    yield "run", f"{run.name}: {state}"
    exchange = measure_exchange(run)
    if exchange:
        yield "islands", exchange.line()
    evaluation = newest_evaluation(run)
    if evaluation:
        yield from _result(evaluation)
        checkpoint = run.checkpoints / evaluation["checkpoint"]
        if checkpoint.is_dir():
            yield "checkpoint", shown(checkpoint)
    if (run.export / "config.json").is_file():
        yield "export", f"{shown(run.export)} (Hugging Face layout)"
    if run.report_path.is_file():
        page = run.report_path.with_suffix(".html")
        yield "report", f"{shown(page)} (report.md says the same)" if page.is_file() else shown(run.report_path)
    yield from _tracking(attempt)
    name = shlex.quote(run.name)
    yield "next", f"python -m factory_train evaluate {name}"
    yield "", f"python -m factory_train resume {name} train.steps={2 * attempt.config().train.steps}"


def newest_evaluation(run: RunDir) -> dict[str, Any] | None:
    """Returns the evaluation of the latest step, if there is one."""
    files = sorted(run.evaluation.glob("step-*.json"))
    return storage.read_json(files[-1]) if files else None


def _result(evaluation: dict[str, Any]) -> Iterator[tuple[str, str]]:
    loss = evaluation["loss"]
    perplexity = f"perplexity {math.exp(loss):.2f}, " if loss < 700 else ""
    yield "validation", f"loss {loss:.4f} nats a token, {perplexity}{evaluation['bits_per_byte']:.4f} bits a byte"
    # Every figure is of the same tokens, so one factor turns nats a token into bits a byte for all of them.
    factor = evaluation["bits_per_byte"] / loss if loss else 0.0
    for index, (name, nats) in enumerate(evaluation.get("baselines", {}).items()):
        verdict = "beaten" if loss < nats else "not beaten"
        yield (
            "baselines" if index == 0 else "",
            f"{_BASELINE_NAMES.get(name, name)} {nats:.4f} nats, {nats * factor:.4f} bits a byte: {verdict}",
        )
    sample = evaluation.get("sample")
    if sample:
        text = (sample["prompt"] + "|" + sample["text"])[:_SAMPLE_CHARACTERS]
        for index, line in enumerate(text.splitlines()):
            yield "sample" if index == 0 else "", line


def _tracking(attempt: Attempt) -> Iterator[tuple[str, str]]:
    if attempt.config().tracking.backend == "none":
        return
    state = storage.read_json(attempt.run.path / "tracking.json")
    if not state:
        yield "mlflow", f"nothing sent yet: python -m factory_train sync {shlex.quote(attempt.run.name)}"
        return
    from factory_train.tracking.store import ui_command

    yield "mlflow", ui_command(state["uri"])
    if state.get("registered_version"):
        yield "registered", f"{state['registered_model']} version {state['registered_version']}"
