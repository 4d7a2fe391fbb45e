"""Opening an MLflow tracking store, local or remote, without surprises."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from factory_train import storage
from factory_train.errors import ConfigError, FactoryTrainError, UnavailableError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# Read by MLflow when it is imported or first used. A server that is down is found out in seconds, not after MLflow's
# own seven retries; a person who wants otherwise sets the variable.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # It prints the tracking URI, password and all.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
# Tells the UI that this experiment trains models; otherwise it shows pages for agents and prompts.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_BAD_REQUEST_CODES = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST"}
_NOT_ALLOWED_CODES = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}


@dataclass(frozen=True)
class TrackingStore:
    """An open tracking store and registry, and the experiment in it.

    Args:
        uri: as configured, credentials included; print `shown_uri` instead.
    """

    client: MlflowClient
    uri: str
    experiment: str
    experiment_id: str

    @property
    def shown_uri(self) -> str:
        return without_credentials(self.uri)

    @property
    def is_local(self) -> bool:
        return sqlite_path(self.uri) is not None

    def find_run(self, run_id: str | None, identity: Mapping[str, str]) -> str | None:
        """Returns an MLflow run by its id if it is still there, else one that carries these tags (tracking.json was lost)."""
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            try:
                if self.client.get_run(run_id).info.lifecycle_stage == "active":
                    return run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        conditions = " and ".join(f"tags.`{name}` = '{value}'" for name, value in identity.items())
        found = self.client.search_runs([self.experiment_id], conditions, max_results=1)
        return found[0].info.run_id if found else None


def default_uri(runs_root: Path) -> str:
    """Returns the store of a folder of runs: an sqlite database beside them."""
    return f"sqlite:///{runs_root.absolute() / 'mlflow.db'}"


def sqlite_path(uri: str) -> Path | None:
    """Returns the database file of an sqlite URI; None for any other kind."""
    return Path(unquote(uri.removeprefix("sqlite:///"))).absolute() if uri.startswith("sqlite:///") else None


def without_credentials(uri: str) -> str:
    """Returns the URI without the `user:password@` it may carry."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def ui_command(uri: str) -> str:
    """Returns what a person does to look at a store."""
    return f"mlflow ui --backend-store-uri {uri}" if sqlite_path(uri) else f"open {without_credentials(uri)}"


def open_store(uri: str, experiment: str) -> TrackingStore:
    """Opens the store and makes sure that the experiment is there; any number of processes may do so at once.

    Args:
        uri: tracking URI; for `sqlite:///` the database is created when missing.
        experiment: name of the experiment.

    Raises:
        ConfigError: a kind of store MLflow no longer serves, or an experiment that was deleted.
        UnavailableError: the server does not answer, or does not let us in.
    """
    if urlsplit(uri).scheme in ("", "file"):
        raise ConfigError(
            f"MLflow no longer keeps runs in plain folders ('{uri}')",
            where="tracking.uri",
            fix=f"tracking.uri=sqlite:///{uri.removeprefix('file://')}/mlflow.db",
        )
    _import_quietly()
    with translated_errors(uri):
        client = _open_sqlite(uri) if sqlite_path(uri) else _new_client(uri)
        return TrackingStore(client, uri, experiment, _experiment_id(client, uri, experiment))


def _import_quietly() -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.tracking  # noqa: F401 (reads the environment set above)

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _new_client(uri: str) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _open_sqlite(uri: str) -> MlflowClient:
    """Opens a database file, one process at a time.

    Concurrent first opens run the schema migrations twice and leave a database that no version of MLflow opens again.
    So does a process that dies between two migrations: a new database is built under another name first. The journal
    stays in MLflow's default mode: write-ahead logging would be a little faster, and wrong on a network filesystem.
    """
    database = sqlite_path(uri)
    assert database is not None
    try:
        with storage.locked(database.with_name(f".{database.name}.lock")):
            if not database.exists():
                for left_over in database.parent.glob(f".{database.name}.*.tmp*"):
                    left_over.unlink(missing_ok=True)
                draft = database.with_name(f".{database.name}.{secrets.token_hex(4)}.tmp")
                _touch_tables(_new_client(f"sqlite:///{draft}"))
                os.replace(draft, database)
            client = _new_client(uri)
            _touch_tables(client)
            return client
    except OSError as error:
        raise UnavailableError(
            f"cannot use the database: {error.strerror or error}",
            where=str(database),
            fix="tracking.uri=sqlite:///<a file in a writable folder>",
        ) from error


def _touch_tables(client: MlflowClient) -> None:
    # Both stores open lazily, and either would migrate.
    client.search_experiments(max_results=1)
    client.search_registered_models(max_results=1)


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    database = sqlite_path(uri)
    # Without a place of its own an sqlite store keeps artifacts in ./mlruns of whoever happens to open it.
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".") or "experiment"
    location = str(database.parent / "mlartifacts" / folder) if database else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Another process was faster.
        found = client.get_experiment_by_name(name)
    assert found is not None
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"MLflow experiment '{name}' was deleted",
            where="tracking.experiment",
            fix=f"tracking.experiment=<another name>, or: mlflow experiments restore --experiment-id {found.experiment_id}",
        )
    return found.experiment_id


@contextlib.contextmanager
def translated_errors(uri: str) -> Iterator[None]:
    """Turns what MLflow raises inside the block into errors with an exit code and a fix.

    Raises:
        UnavailableError: no answer, a broken answer, or no permission: trying again later may help.
        FactoryTrainError: MLflow understood the request and refused it.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    shown = without_credentials(uri)
    later = "start the server or correct tracking.uri; then: python -m factory_train sync RUN (the run directory has everything)"
    try:
        yield
    except MlflowException as error:
        message = _first_line(error.message)
        if error.error_code in _NOT_ALLOWED_CODES:
            raise UnavailableError(
                f"MLflow lets us not in: {message}",
                where=shown,
                fix="set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            ) from error
        if error.error_code in _BAD_REQUEST_CODES:
            raise FactoryTrainError(f"MLflow refused: {message}", where=shown) from error
        raise UnavailableError(f"MLflow does not answer: {message}", where=shown, fix=later) from error
    except (RequestException, SQLAlchemyError) as error:
        raise UnavailableError(f"MLflow does not answer: {_first_line(str(error))}", where=shown, fix=later) from error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no message"
