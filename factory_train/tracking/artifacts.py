"""Files of a run as MLflow artifacts, and the data it was trained on as an MLflow dataset."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from factory_train.run_dir import Attempt, RunDir
from factory_train.tracking.facts import RunFacts, html_report_path
from factory_train.tracking.rows import sample_rows
from factory_train.tracking.state import TrackingState
from factory_train.tracking.store import TrackingStore, without_credentials

# MLflow allows 36 and shows all of them in every list of runs; the whole identity is in the tags.
_DIGEST_CHARS = 16


_IMAGE = re.compile(r"!\[([^\]]*)\]\([^)]*\)")


def upload(store: TrackingStore, facts: RunFacts, state: TrackingState) -> None:
    """Uploads the files that are new or changed since they were uploaded last."""
    for name, path in _files(facts).items():
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        version = f"{stat.st_size} bytes at {stat.st_mtime_ns}"
        if state.artifacts.get(name) == version:
            continue
        folder, _, leaf = name.rpartition("/")
        if leaf == "config.yaml":
            store.client.log_text(state.mlflow_run_id, _config_text(path), name)
        elif leaf == "report.md":
            # MLflow's page shows no pictures inside Markdown, and does inside HTML.
            page = "report.html" if html_report_path(facts.run).is_file() else "plots.html"
            store.client.log_text(state.mlflow_run_id, _IMAGE.sub(rf"*\1: see {page}*", path.read_text()), name)
            if page == "plots.html":
                # A report of an older version, which had no page of its own.
                store.client.log_text(state.mlflow_run_id, _plots_page(facts.run.path / "report"), page)
        else:
            store.client.log_artifact(state.mlflow_run_id, str(path), folder or None)
        state.artifacts[name] = version
        state.save(facts.run)


def _files(facts: RunFacts) -> dict[str, Path]:
    """Returns artifact names and files: the newest attempt's at the top, earlier ones' in a folder each."""
    run = facts.run
    files = {
        "report.html": html_report_path(run),
        "report.md": run.report_path,
        "data/manifest.json": run.data / "manifest.json",
        "registration.json": run.export / "registration.json",
    }
    for attempt in run.attempts():
        folder = "" if attempt.number == facts.attempt.number else f"attempts/{attempt.number:04d}/"
        files |= {f"{folder}{name}": attempt.path / name for name in ("config.yaml", "plan.json")}
        # Never at the top: nothing takes it back when a later attempt ends well.
        files[f"attempts/{attempt.number:04d}/ERROR.json"] = attempt.error_path
    files |= {f"report/{path.name}": path for path in sorted((run.path / "report").glob("*.png"))}
    files |= {f"evaluation/{path.name}": path for path in sorted(run.evaluation.glob("*.json"))}
    return files


def _config_text(path: Path) -> str:
    """Returns a frozen configuration without the password its tracking URI may carry."""
    uri = Attempt(RunDir(path.parents[2]), int(path.parent.name)).config().tracking.uri
    text = path.read_text()
    return text.replace(uri, without_credentials(uri)) if uri else text


def _plots_page(folder: Path) -> str:
    """Returns all plots of a report on one page that needs no other file."""
    images = (base64.b64encode(path.read_bytes()).decode() for path in sorted(folder.glob("*.png")))
    body = "\n".join(f'<p><img style="max-width: 100%" src="data:image/png;base64,{image}"></p>' for image in images)
    return f"<!doctype html>\n<html>\n<body>\n{body}\n</body>\n</html>\n"


def upload_samples(store: TrackingStore, run: RunDir, state: TrackingState) -> None:
    """Uploads all text samples as one page, the newest first, so that a person sees the model learn without clicking.

    And as a table, which MLflow shows and compares across runs.
    """
    samples = sample_rows(run)
    store.client.log_text(state.mlflow_run_id, samples_page(samples), "samples.md")
    store.client.log_text(state.mlflow_run_id, samples_table(samples), "samples.json")
    # What MLflow's own log_table sets; that one adds to the rows of before, and so would repeat them.
    store.client.set_tag(state.mlflow_run_id, "mlflow.loggedArtifacts", json.dumps([{"path": "samples.json", "type": "table"}]))


def samples_table(samples: list[dict[str, Any]]) -> str:
    """Returns the samples as MLflow keeps tables: pandas' "split" layout."""
    columns = ["step", "prompt", "text"]
    return json.dumps({"columns": columns, "data": [[row[name] for name in columns] for row in samples]})


def samples_page(samples: list[dict[str, Any]]) -> str:
    """Returns the samples as Markdown, the newest first."""
    parts = ["# What the model writes"]
    for row in reversed(samples):
        # Four backquotes: the text itself may hold a fence of three.
        parts.append(f"## step {row['step']}\n\nprompt\n\n````text\n{row['prompt']}\n````\n\ncontinuation\n\n````text\n{row['text']}\n````")
    return "\n\n".join(parts) + "\n"


def log_dataset(store: TrackingStore, facts: RunFacts, state: TrackingState, known: set[str]) -> set[str]:
    """Records the training data by name and fingerprint, never its content; returns the fingerprints added."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    digest = (facts.data_id or "")[:_DIGEST_CHARS]
    if not digest or digest in known:
        return set()
    splits = facts.manifest.get("splits") or {}
    profile = {f"{name}_{key}": value for name, split in splits.items() for key, value in split.items() if isinstance(value, int)}
    profile |= {key: facts.manifest[key] for key in ("tokenizer", "vocab_size") if key in facts.manifest}
    source = json.dumps({"uri": str(facts.config.data.path or facts.manifest.get("description") or facts.config.data.name)})
    dataset = Dataset(facts.config.data.name, digest, "local", source, schema=None, profile=json.dumps(profile))
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    try:
        store.client.log_inputs(state.mlflow_run_id, inputs)
    except MlflowException:
        # Runs on the same data that begin at once both find no dataset and both make it: the slower one is refused, once.
        store.client.log_inputs(state.mlflow_run_id, inputs)
    return {digest}
