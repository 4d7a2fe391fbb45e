"""tracking.json: which MLflow run a run directory feeds, and how much of it has been sent."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.errors import ConfigError
from factory_train.run_dir import RunDir

TRACKING_FORMAT_VERSION = 1


@dataclass
class TrackingState:
    """The syncer's memory, and what other readers learn about the run's place in MLflow.

    Args:
        uri: the tracking store, without credentials.
        mlflow_run_id: the one MLflow run of this run directory.
        registered_model, registered_version: the newest registered result, if any.
        offsets: bytes of each attempt's metrics.jsonl that were sent.
        values_sent, values_skipped: points of curves sent, and points left out because they were not finite.
        evaluations: those sent, by step and time.
        artifacts: size and time of the files as they were uploaded.
        registrations: model versions by registration key (`run@step@sha256`).
    """

    uri: str
    experiment: str
    experiment_id: str
    mlflow_run_id: str
    registered_model: str | None = None
    registered_version: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    rows_sent: int = 0
    values_sent: int = 0
    values_skipped: int = 0
    evaluations: list[str] = field(default_factory=list)
    artifacts: dict[str, str] = field(default_factory=dict)
    registrations: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = TRACKING_FORMAT_VERSION

    def save(self, run: RunDir) -> None:
        storage.write_json(state_path(run), asdict(self))


def state_path(run: RunDir) -> Path:
    return run.path / "tracking.json"


def load_state(run: RunDir) -> TrackingState | None:
    """Returns what tracking.json says; None when nothing was ever sent.

    Raises:
        ConfigError: a newer version of factory_train wrote it.
    """
    value = storage.read_json(state_path(run))
    if value is None:
        return None
    if value["format_version"] > TRACKING_FORMAT_VERSION:
        raise ConfigError(
            f"tracking.json has format {value['format_version']}, newer than this version reads",
            where=run.name,
            fix="upgrade factory_train",
        )
    known = {item.name for item in fields(TrackingState)}
    return TrackingState(**{name: item for name, item in value.items() if name in known})
