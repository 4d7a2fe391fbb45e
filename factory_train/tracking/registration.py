"""Carrying out a registration that the finish stage asked for, exactly once."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from factory_train import storage
from factory_train.tracking.facts import RunFacts
from factory_train.tracking.lineage import MAX_TAG_CHARS, description, tags_of
from factory_train.tracking.rows import evaluation_values
from factory_train.tracking.state import TrackingState
from factory_train.tracking.store import TrackingStore

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

KEY_TAG = "factory_train.registration"

_log = logging.getLogger(__name__)


def registration_key(run_name: str, intent: dict[str, Any]) -> str:
    """Returns what makes a registration the same one: run, step and the hash of what was exported."""
    return f"{run_name}@{intent['step']}@{intent['sha256']}"


def register(store: TrackingStore, facts: RunFacts, state: TrackingState) -> bool:
    """Registers the exported model if that is asked for and not done; returns whether a version was recorded now.

    The version carries its key as a tag from the moment it exists, so one that was created just before a crash is
    found again instead of being made twice.
    """
    intent = storage.read_json(facts.run.export / "registration.json")
    if intent is None or not facts.config.tracking.register:
        return False
    key = registration_key(facts.run.name, intent)
    if key in state.registrations:
        return False
    model = _logged_model(store, facts, state, intent, key)
    _link_metrics(store, facts, state, intent, model.model_id)
    version = _find_version(store, intent["model_name"], key) or _create_version(store, facts, state, intent, key, model.model_id)
    state.registrations[key] = {"model": intent["model_name"], "version": version, "model_id": model.model_id, "step": intent["step"]}
    state.registered_model, state.registered_version = intent["model_name"], version
    state.save(facts.run)
    _log.info("registered %s version %s", intent["model_name"], version)
    return True


def _tags(facts: RunFacts, intent: dict[str, Any], key: str) -> dict[str, str]:
    """Returns the lineage of a model version: the run's, what the finish stage added, and its figures."""
    # The outcome belongs to the run: it is written after the model is exported.
    lineage = {
        name: value for name, value in tags_of(facts).items() if name.startswith("factory_train.") and name != "factory_train.outcome"
    }
    asked = {f"factory_train.{name}": str(value) for name, value in intent.get("tags", {}).items()}
    figures = {name: f"{value:.6g}" for name, value in intent.get("metrics", {}).items() if isinstance(value, (int, float))}
    figures |= {f"baseline/{name}": f"{value:.6g}" for name, value in facts.baselines.items()}
    export = {
        "factory_train.checkpoint": intent["checkpoint"],
        "factory_train.step": intent["step"],
        "factory_train.export_path": facts.run.export,
        "factory_train.export_sha256": intent["sha256"],
        KEY_TAG: key,
    }
    return {name: str(value)[:MAX_TAG_CHARS] for name, value in {**lineage, **asked, **figures, **export}.items()}


def _description(facts: RunFacts, intent: dict[str, Any]) -> str:
    files = f"Files: `{facts.run.export}` (Hugging Face layout), manifest sha256 `{intent['sha256']}`."
    return "\n\n".join([f"Step {intent['step']} of run {facts.run.name}.", *description(facts), files])


def _logged_model(store: TrackingStore, facts: RunFacts, state: TrackingState, intent: dict[str, Any], key: str) -> LoggedModel:
    """Returns the run's model entry for this export, made if need be: the run's page lists it with its metrics."""
    from mlflow.entities import LoggedModelOutput

    found = store.client.search_logged_models([state.experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    if found:
        model = found[0]
    else:
        # The weights stay where they are, so MLflow is told not to look for them among its artifacts.
        tags = {**_tags(facts, intent, key), "mlflow.model.isExternal": "true"}
        # Stricter than the registry about names.
        name = re.sub(r"[/:.%\"']+", "-", f"{intent['model_name']}-step-{intent['step']}")
        model = store.client.create_logged_model(state.experiment_id, name=name, source_run_id=state.mlflow_run_id, tags=tags)
    if str(model.status) != "READY":
        store.client.finalize_logged_model(model.model_id, "READY")
    outputs = store.client.get_run(state.mlflow_run_id).outputs
    # Saying it twice is an error in MLflow.
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        store.client.log_outputs(state.mlflow_run_id, [LoggedModelOutput(model.model_id, int(intent["step"]))])
    return model


def _link_metrics(store: TrackingStore, facts: RunFacts, state: TrackingState, intent: dict[str, Any], model_id: str) -> None:
    """Attaches the evaluation of the exported step to the model; MLflow counts a repeated point once."""
    from mlflow.entities import Metric

    values = [
        value for evaluation in facts.evaluations if evaluation.get("step") == intent["step"] for value in evaluation_values(evaluation)
    ]
    metrics = [Metric(value.name, value.value, value.time_ms, value.step, model_id=model_id) for value in values if value is not None]
    if metrics:
        store.client.log_batch(state.mlflow_run_id, metrics=metrics)


def _find_version(store: TrackingStore, model_name: str, key: str) -> str | None:
    found = store.client.search_model_versions(f"name = '{model_name}' and tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return str(found[0].version) if found else None


def _create_version(store: TrackingStore, facts: RunFacts, state: TrackingState, intent: dict[str, Any], key: str, model_id: str) -> str:
    from mlflow.exceptions import MlflowException

    name = intent["model_name"]
    try:
        store.client.create_registered_model(name, description=f"Models trained by factory_train, recipe {facts.config.recipe}.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # A server refuses a path outside its own artifacts as a source; there the version points at the model entry, and
    # a tag says where the files are. Our own database takes the folder itself, so `models:/name/1` downloads it.
    source = str(facts.run.export) if store.is_local else f"models:/{model_id}"
    version = store.client.create_model_version(
        name,
        source,
        run_id=state.mlflow_run_id,
        tags=_tags(facts, intent, key),
        description=_description(facts, intent),
        await_creation_for=0,
        model_id=model_id,
    )
    return str(version.version)
