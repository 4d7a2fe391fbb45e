"""The MLflow run of a sweep, under which those of its points stand.

Made once by whichever process needs it first: the syncer of a point, or the sending of the whole sweep at its end.
"""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime
from pathlib import Path

from factory_train import storage
from factory_train.config import Config
from factory_train.run_dir import RunDir
from factory_train.sweep import DONE, NOT_RUN, PENDING, RUNNING, SweepDir, SweepRecord, shown_value, sweep_of
from factory_train.sweep_results import SweepResults, read_results
from factory_train.tracking.lineage import MAX_PARAM_CHARS, MAX_TAG_CHARS
from factory_train.tracking.store import TrackingStore, open_store, translated_errors, without_credentials

TRACKING_FORMAT_VERSION = 1
# What MLflow's nesting goes by.
PARENT_TAG = "mlflow.parentRunId"
_IMAGE = re.compile(r"!\[([^\]]*)\]\([^)]*\)")
_IDENTITY = ("factory_train.sweep", "factory_train.sweep_created")


def sweep_tags(store: TrackingStore, run: RunDir) -> dict[str, str]:
    """Returns the tags that put a run under its sweep; none for a run that no sweep started."""
    sweep = sweep_of(run)
    if sweep is None:
        return {}
    with storage.locked(_lock(sweep)):
        record = sweep.record()
        parent = _open_run(store, sweep, record)
        if sweep.is_running(record) and store.client.get_run(parent).info.status != "RUNNING":
            # It had ended, and goes on now.
            store.client.update_run(parent, "RUNNING")
    return {PARENT_TAG: parent, "factory_train.sweep": sweep.name, "factory_train.sweep_point": str(run.info()["sweep"]["point"])}


def first_config(sweep: SweepDir) -> Config | None:
    """Returns the configuration of the first point that was started, which says where the sweep is tracked."""
    runs = (sweep.run(point) for point in sweep.record().points)
    attempts = (run.last_attempt() for run in runs if run)
    return next((attempt.config() for attempt in attempts if attempt), None)


def send_sweep(sweep: SweepDir, uri: str, experiment: str) -> str:
    """Sends how a sweep stands: description, what varies, the best figures, table and plots. Sending twice changes nothing.

    Returns:
        The id of its MLflow run.

    Raises:
        UnavailableError: the tracker does not answer.
    """
    store = open_store(uri, experiment)
    with storage.locked(_lock(sweep)), translated_errors(uri):
        record = sweep.record()
        results = read_results(sweep, record)
        run_id = _open_run(store, sweep, record)
        _describe(store, run_id, sweep, record, results)
        _send_best(store, run_id, record, results)
        _upload(store, run_id, sweep)
        _set_status(store, run_id, sweep, record, results)
        return run_id


def _lock(sweep: SweepDir) -> Path:
    return sweep.path / ".sync.lock"


def _open_run(store: TrackingStore, sweep: SweepDir, record: SweepRecord) -> str:
    """Finds or makes the MLflow run of a sweep; the caller holds the lock, so no two processes make one each."""
    path = sweep.path / "tracking.json"
    state = storage.read_json(path) or {}
    ours = (state.get("uri"), state.get("experiment_id")) == (store.shown_uri, store.experiment_id)
    known = state.get("mlflow_run_id") if ours else None
    created = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
    identity = dict(zip(_IDENTITY, (sweep.name, created), strict=True))
    run_id = store.find_run(known, identity)
    if run_id is not None and run_id == known:
        return run_id
    if run_id is None:
        run_id = store.client.create_run(store.experiment_id, int(record.created * 1000), identity, sweep.name).info.run_id
    state = {"format_version": TRACKING_FORMAT_VERSION, "uri": store.shown_uri, "experiment": store.experiment}
    storage.write_json(path, state | {"experiment_id": store.experiment_id, "mlflow_run_id": run_id})
    return run_id


def _describe(store: TrackingStore, run_id: str, sweep: SweepDir, record: SweepRecord, results: SweepResults) -> None:
    from mlflow.entities import Param, RunTag

    known = store.client.get_run(run_id).data
    values = {axis: ", ".join(dict.fromkeys(shown_value(point.values.get(axis)) for point in record.points)) for axis in record.axes}
    # MLflow never changes a parameter: what the sweep began with stands there, and the tags have what it has now.
    params = {axis: text[:MAX_PARAM_CHARS] for axis, text in values.items() if axis not in known.params}
    best = results.best
    tags = {
        "mlflow.runName": sweep.name,
        "mlflow.user": record.user,
        "mlflow.source.name": " ".join(["python -m factory_train", *map(_without_password, record.argv)]),
        "mlflow.source.type": "JOB",
        "mlflow.note.content": _page_text(sweep, results),
        "factory_train.outcome": results.headline(),
        "factory_train.recipe": record.recipe,
        "factory_train.sweep_dir": str(sweep.path),
        "factory_train.best_run": best.point.run if best else "",
        **{f"factory_train.sweep.{axis}": text for axis, text in values.items()},
        **({f"factory_train.best.{axis}": shown_value(value) for axis, value in best.point.values.items()} if best else {}),
    }
    changed = {name: value[:MAX_TAG_CHARS] for name, value in tags.items() if known.tags.get(name, "") != value[:MAX_TAG_CHARS]}
    store.client.log_batch(
        run_id,
        params=[Param(name, value) for name, value in params.items()],
        tags=[RunTag(name, value) for name, value in changed.items()],
    )


def _without_password(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{name}{equals}{without_credentials(value)}"


def _page_text(sweep: SweepDir, results: SweepResults) -> str:
    """Returns the text on the sweep's page: the result, and the table as the report has it."""
    best = results.best
    parts = [f"**{results.headline()}** of {len(results.points)} points."]
    if best:
        parts.append(
            f"Best: `{best.point.run}` ({best.point.label}), **{best.loss:.4f} nats/token, {best.bits_per_byte or 0:.4f} bits per byte**."
        )
    report = sweep.report_path.read_text() if sweep.report_path.is_file() else ""
    table = [line for line in report.splitlines() if line.startswith("|")]
    if table:
        parts.append("\n".join(table))
    parts.append(f"Folder: `{sweep.path}`. Artifacts: report.md, plots.html, table.csv.")
    return "\n\n".join(parts)


def _send_best(store: TrackingStore, run_id: str, record: SweepRecord, results: SweepResults) -> None:
    """Gives the sweep the figures of its best point, so that it can be compared with other runs in the same columns."""
    from mlflow.entities import Metric

    counts = results.counts()
    values: dict[str, float | None] = {f"sweep/{name}": counts.get(state, 0) for name, state in (("done", DONE), ("failed", "failed"))}
    values["sweep/not_done"] = len(results.points) - counts.get(DONE, 0)
    if best := results.best:
        values |= {
            "evaluation/loss": best.loss,
            "evaluation/bits_per_byte": best.bits_per_byte,
            "perf/tokens_per_s": best.tokens_per_s,
        }
    # The end of the last point is the same at every sending, and later when the sweep goes on.
    time_ms = int(max((result.ended for result in results.points if result.ended), default=record.created) * 1000)
    metrics = [Metric(name, float(value), time_ms, 0) for name, value in values.items() if value is not None]
    store.client.log_batch(run_id, metrics=metrics)


def _upload(store: TrackingStore, run_id: str, sweep: SweepDir) -> None:
    if not sweep.report_path.is_file():
        return
    plots = sorted(sweep.plots.glob("*.png"))
    # MLflow's page shows no pictures inside Markdown, and does inside HTML.
    store.client.log_text(run_id, _IMAGE.sub(r"*\1: see plots.html*", sweep.report_path.read_text()), "report.md")
    images = (base64.b64encode(path.read_bytes()).decode() for path in plots)
    body = "\n".join(f'<p><img style="max-width: 100%" src="data:image/png;base64,{image}"></p>' for image in images)
    store.client.log_text(run_id, f"<!doctype html>\n<html>\n<body>\n{body}\n</body>\n</html>\n", "plots.html")
    store.client.log_artifact(run_id, str(sweep.table_path))
    store.client.log_artifact(run_id, str(sweep.record_path))
    for path in plots:
        store.client.log_artifact(run_id, str(path), "report")


def _set_status(store: TrackingStore, run_id: str, sweep: SweepDir, record: SweepRecord, results: SweepResults) -> None:
    counts = results.counts()
    stopped = {NOT_RUN, "preempted", "interrupted"} & counts.keys()
    if sweep.is_running(record) or {RUNNING, PENDING} & counts.keys():
        store.client.update_run(run_id, "RUNNING")
        return
    # A sweep with a failure in it has done what it was for, as long as anything can be compared.
    status = "KILLED" if stopped else "FINISHED" if counts.get(DONE) else "FAILED"
    store.client.set_terminated(run_id, status, int((record.ended or record.created) * 1000))
