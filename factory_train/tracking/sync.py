"""The syncer: sends what a run directory holds to MLflow, beside the training and after it.

    python -m factory_train.tracking.sync RUN_DIR [--follow]

One MLflow run stands for one run directory, over all its attempts. Sending is idempotent: the store counts a repeated
point once, so a lost position costs time and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from factory_train import storage
from factory_train.config import Config
from factory_train.errors import ConfigError, ExitCode, FactoryTrainError, UnavailableError
from factory_train.run_dir import RunDir
from factory_train.tracking import artifacts
from factory_train.tracking.facts import RunFacts, read_facts
from factory_train.tracking.lineage import identity_tags, params_of, tags_of
from factory_train.tracking.registration import register
from factory_train.tracking.rows import Value, evaluation_values, last_valid_steps, read_chunks, values_of
from factory_train.tracking.state import TrackingState, load_state
from factory_train.tracking.store import TrackingStore, default_uri, open_store, translated_errors
from factory_train.tracking.sweeps import sweep_tags

# A run without a verdict and without a sign of life for this long will not get a verdict any more.
LOST_AFTER_S = 60.0
# Passes tried after the run has ended while the tracker stays away.
LAST_TRIES = 3
_POLL_S = 0.5
_BATCH_METRICS = 1000
_BATCH_PARAMS = 100
_STATUS = {
    "done": "FINISHED",
    "running": "RUNNING",
    "pending": "SCHEDULED",
    "lost": "FAILED",
    "failed-user": "FAILED",
    "failed-transient": "FAILED",
}

_Item = TypeVar("_Item")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncResult:
    """What one call did.

    Args:
        uri: the store as configured; may carry credentials.
        rows: rows of metrics.jsonl sent by this call.
        skipped: points left out by this call because they were not finite.
        state: where the run stands now.
    """

    uri: str
    rows: int
    skipped: int
    state: TrackingState


def tracking_uri(run: RunDir, config: Config) -> str:
    """Returns the store that a run reports to."""
    return config.tracking.uri or default_uri(run.path.parent)


def sync(run: RunDir, *, follow: bool = False, uri: str | None = None) -> SyncResult:
    """Sends to MLflow what has not been sent yet.

    Args:
        run: the run directory.
        follow: keep sending until the run has ended and everything is sent.
        uri: another store than the configured one.

    Raises:
        NotFoundError: the run was never started.
        ConfigError: tracking is off for this run and no `uri` is given.
        UnavailableError: the tracker does not answer; when following, at the end of the run still not.
    """
    config = read_facts(run).config
    if config.tracking.backend == "none" and uri is None:
        raise ConfigError(
            "tracking is off for this run",
            where=run.name,
            fix=f"python -m factory_train sync {run.name} tracking.uri={default_uri(run.path.parent)}",
        )
    syncer = Syncer(run, uri or tracking_uri(run, config), config.tracking.experiment)
    return _follow(syncer, config.tracking.sync_every_s) if follow else syncer.send()


def _follow(syncer: Syncer, every_s: float) -> SyncResult:
    watch, tries, rows, skipped, complaint = _Watch(syncer.run), 0, 0, 0, ""
    while True:
        # Asked before the pass: what a run writes before its verdict is then surely sent.
        ended = watch.has_ended()
        try:
            result = syncer.send()
            rows, skipped, complaint = rows + result.rows, skipped + result.skipped, ""
            if ended:
                return SyncResult(result.uri, rows, skipped, result.state)
        except (UnavailableError, OSError) as error:
            if str(error) != complaint:
                complaint = str(error)
                _log.warning("%s", complaint)
            tries += ended
            if tries >= LAST_TRIES:
                raise
        wake = time.monotonic() + every_s
        while time.monotonic() < wake and (ended or not watch.has_ended()):
            time.sleep(min(_POLL_S, every_s))


class _Watch:
    """Notices the end of a run: a verdict of the newest attempt, or a long silence."""

    def __init__(self, run: RunDir) -> None:
        self._run, self._last_alive = run, time.monotonic()

    def has_ended(self) -> bool:
        attempt = self._run.last_attempt()
        if attempt is not None and attempt.verdict_path.exists():
            return True
        if self._run.is_alive():
            self._last_alive = time.monotonic()
        return time.monotonic() - self._last_alive > LOST_AFTER_S


class Syncer:
    """Sends one run directory to one store. The connection is made on first use and kept."""

    def __init__(self, run: RunDir, uri: str, experiment: str) -> None:
        self.run, self._uri, self._experiment = run, uri, experiment
        self._store: TrackingStore | None = None
        # What the MLflow run is known to have, so that a quiet interval costs no request.
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._inputs: set[str] = set()
        # Found or made once: the sweep's run stays the same while its points are sent.
        self._sweep_tags: dict[str, str] | None = None
        self._status = ""
        self._run_id: str | None = None

    def send(self) -> SyncResult:
        """Makes one pass: description, curves, artifacts, status, registration."""
        if self._store is None:
            self._store = open_store(self._uri, self._experiment)
        # Two syncers of one run (the run's own, and a person's) take turns.
        with storage.locked(self.run.path / ".sync.lock"), translated_errors(self._uri):
            facts = read_facts(self.run)
            state = self._open_run(self._store, facts)
            rows, skipped = state.rows_sent, state.values_skipped
            self._describe(self._store, facts, state)
            self._send_rows(self._store, state)
            self._send_evaluations(self._store, facts, state)
            artifacts.upload(self._store, facts, state)
            self._set_status(self._store, facts, state)
            register(self._store, facts, state)
            return SyncResult(self._uri, state.rows_sent - rows, state.values_skipped - skipped, state)

    def _open_run(self, store: TrackingStore, facts: RunFacts) -> TrackingState:
        """Finds or makes the MLflow run, and writes its id down before anything is logged to it."""
        state = load_state(self.run)
        ours = state is not None and (state.uri, state.experiment_id) == (store.shown_uri, store.experiment_id)
        if state is not None and ours and state.mlflow_run_id == self._run_id:
            return state
        run_id = store.find_run(state.mlflow_run_id if state is not None and ours else None, identity_tags(facts))
        if state is None or not ours or state.mlflow_run_id != run_id:
            if run_id is None:
                created_ms = int(facts.info["created"] * 1000)
                run_id = store.client.create_run(store.experiment_id, created_ms, identity_tags(facts), self.run.name).info.run_id
            state = TrackingState(store.shown_uri, store.experiment, store.experiment_id, run_id)
            state.save(self.run)
        known = store.client.get_run(run_id)
        self._run_id, self._params, self._tags = run_id, dict(known.data.params), dict(known.data.tags)
        self._inputs = {item.dataset.digest for item in known.inputs.dataset_inputs} if known.inputs else set()
        self._status = known.info.status
        return state

    def _describe(self, store: TrackingStore, facts: RunFacts, state: TrackingState) -> None:
        from mlflow.entities import Param, RunTag

        if self._sweep_tags is None:
            self._sweep_tags = sweep_tags(store, self.run)
        params, tags = params_of(facts), tags_of(facts) | self._sweep_tags
        new = {name: value for name, value in params.items() if name not in self._params}
        for batch in _batches(list(new.items()), _BATCH_PARAMS):
            store.client.log_batch(state.mlflow_run_id, params=[Param(name, value) for name, value in batch])
        self._params |= new
        news = {name: value for name, value in tags.items() if self._tags.get(name) != value}
        if news:
            store.client.log_batch(state.mlflow_run_id, tags=[RunTag(name, value) for name, value in news.items()])
        self._tags |= news
        self._inputs |= artifacts.log_dataset(store, facts, state, self._inputs)

    def _send_rows(self, store: TrackingStore, state: TrackingState) -> None:
        # Points that were sent before a later attempt superseded them stay: MLflow has no way to take one back.
        limits = last_valid_steps(self.run)
        for attempt in self.run.attempts():
            key, limit = f"{attempt.number:04d}", limits[attempt.number]
            for chunk in read_chunks(attempt, state.offsets.get(key, 0)):
                rows = [row for row in chunk.rows if row["kind"] != "start" and row["step"] <= limit]
                self._send_values(store, state, (value for row in rows for value in values_of(row)))
                state.rows_sent += len(rows)
                state.offsets[key] = chunk.end
                if any(row["kind"] == "sample" for row in rows):
                    artifacts.upload_samples(store, self.run, state)
                state.save(self.run)

    def _send_evaluations(self, store: TrackingStore, facts: RunFacts, state: TrackingState) -> None:
        for evaluation in facts.evaluations:
            name = f"step {evaluation['step']} at {evaluation['time']}"
            if name not in state.evaluations:
                self._send_values(store, state, evaluation_values(evaluation))
                state.evaluations.append(name)
                state.save(self.run)

    def _send_values(self, store: TrackingStore, state: TrackingState, values: Iterable[Value | None]) -> None:
        from mlflow.entities import Metric

        found = list(values)
        finite = [value for value in found if value is not None]
        for batch in _batches(finite, _BATCH_METRICS):
            store.client.log_batch(
                state.mlflow_run_id, metrics=[Metric(value.name, value.value, value.time_ms, value.step) for value in batch]
            )
        state.values_sent += len(finite)
        state.values_skipped += len(found) - len(finite)

    def _set_status(self, store: TrackingStore, facts: RunFacts, state: TrackingState) -> None:
        # Preempted, interrupted and killed are one word in MLflow; the tag factory_train.outcome has the right one.
        status = _STATUS.get(facts.outcome, "KILLED")
        if status == self._status:
            return
        if status in ("RUNNING", "SCHEDULED"):
            store.client.update_run(state.mlflow_run_id, status)
        else:
            verdict = facts.attempt.verdict()
            ended = verdict.time if verdict else facts.attempt.last_heartbeat() or time.time()
            store.client.set_terminated(state.mlflow_run_id, status, int(ended * 1000))
        self._status = status


def _batches(items: Sequence[_Item], size: int) -> Iterable[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def main(argv: Sequence[str]) -> int:
    """Runs the syncer as a process of its own; returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    paths = [word for word in argv if not word.startswith("--")]
    if len(paths) != 1 or set(argv) - set(paths) - {"--follow"}:
        _log.error("usage: python -m factory_train.tracking.sync RUN_DIR [--follow]")
        return ExitCode.USAGE
    follow = "--follow" in argv
    try:
        run = RunDir.open(Path(paths[0]))
        if follow and read_facts(run).config.tracking.backend == "none":
            return ExitCode.OK
        result = sync(run, follow=follow)
    except FactoryTrainError as error:
        _log.error("%s", error)
        return error.exit_code
    except OSError as error:
        _log.error("%s", error)
        return ExitCode.FAILED
    _log.info("sent %d rows (%d in all) to MLflow run %s", result.rows, result.state.rows_sent, result.state.mlflow_run_id)
    return ExitCode.OK


def _stay_behind_training() -> None:
    """Leaves the cores to the ranks; MLflow's libraries would otherwise start a pool of threads each."""
    os.nice(10)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


if __name__ == "__main__":
    _stay_behind_training()
    sys.exit(main(sys.argv[1:]))
