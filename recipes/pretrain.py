"""Pretraining: text to a trained, evaluated, exported model, in the three stages of a job."""

from __future__ import annotations

from factory_train.config import Config
from factory_train.errors import ExitCode
from factory_train.launchers.job import WorkerEnv
from factory_train.preemption import StopSignal
from factory_train.run_dir import Attempt


def prepare(cfg: Config, attempt: Attempt) -> ExitCode:
    """Makes sure the tokens are there, and copies what evaluation needs into the run directory."""
    from factory_train.data.catalog import cache_root
    from factory_train.data.manifest import DataManifest, check_length, check_vocabulary
    from factory_train.data.mixture import check_set_lengths, training_sets
    from factory_train.data.packing_index import prepare_packing
    from factory_train.data.prepare import copy_for_run
    from factory_train.data.prepare import prepare as prepare_data
    from factory_train.data.samples import mixture_epochs

    def report(message: str) -> None:
        attempt.record_event("prepare", message=message)

    run, cache = attempt.run, cache_root(cfg, attempt.run.path.parent)
    dataset = prepare_data(cfg.data, cache, report)
    manifest = DataManifest.load(dataset)
    check_length(manifest, cfg.train.seq_len)
    check_set_lengths(cfg.data, cfg.train.seq_len)
    check_vocabulary(manifest, cfg.model.vocab_size)
    # Whole rows and the last target: model and baselines are then judged on the very same tokens.
    rows = min(cfg.train.validation_rows, (manifest.splits["validation"].num_tokens - 1) // cfg.train.seq_len)
    training = training_sets(cfg.data, dataset)
    packing = None
    if cfg.data.packing == "document":
        packing = "; ".join(prepare_packing(cache, folder, cfg.train.seq_len, report) for folder, _ in training)
    if cfg.data.sets:
        report(f"data: {mixture_epochs(cfg, cache)}")
    copy_for_run(dataset, run.data, rows * cfg.train.seq_len + 1, packing=packing, training=training)
    return ExitCode.OK


def train(cfg: Config, attempt: Attempt, env: WorkerEnv, stop: StopSignal) -> ExitCode:
    """Trains on this rank; rank 0 writes the verdict when training stops before its end."""
    from factory_train.data.catalog import cache_root, find_prepared
    from factory_train.data.manifest import DataManifest
    from factory_train.diagnostics.out_of_memory import explaining_out_of_memory
    from factory_train.distributed.process_group import choose_device, process_group
    from factory_train.distributed.runtime import configure_runtime
    from factory_train.errors import DataError
    from factory_train.hardware import detect
    from factory_train.island_trainer import IslandTrainer
    from factory_train.plan import make_plan
    from factory_train.trainer import Outcome, Trainer

    configure_runtime(cfg.train, env.local_world_size)
    dataset = find_prepared(cfg.data, cache_root(cfg, attempt.run.path.parent))
    if dataset is None:
        raise DataError("the prepared data has gone", fix="start again with the same run=: the prepare stage makes it anew")
    manifest = DataManifest.load(attempt.run.data)
    # What was started counts, not what this process sees: a launcher may show each rank one card only.
    cfg.launcher.nodes, cfg.launcher.tasks_per_node = env.world_size // env.local_world_size, env.local_world_size
    plan = make_plan(cfg, cfg.model.vocab_size or manifest.vocab_size, detect(cfg.hardware), vocab_exact=True)
    device = choose_device(cfg.hardware.device, env.local_rank)
    with (
        process_group(env, attempt.path / "rendezvous.json", device, allow_loopback=cfg.launcher.fabric == "loopback"),
        explaining_out_of_memory(cfg, plan, attempt, env.rank, device, stop.place),
    ):
        trainer = (IslandTrainer if cfg.diloco.islands else Trainer)(cfg, plan, attempt, env, device, stop, dataset)
        outcome = trainer.train()
    if outcome is Outcome.DONE:
        return ExitCode.OK
    code = ExitCode.INTERRUPTED if outcome is Outcome.INTERRUPTED else ExitCode.PREEMPTED
    if env.rank == 0:
        reason = "interrupted by the user" if outcome is Outcome.INTERRUPTED else stop.reason
        attempt.write_verdict(outcome.value, code, step=trainer.step, reason=f"{reason}; saved at step {trainer.step}")
    return code


def finish(cfg: Config, attempt: Attempt) -> ExitCode:
    """Evaluates the last checkpoint, exports it, and writes the report and the registration intent."""
    from factory_train.distributed.runtime import configure_runtime
    from factory_train.evaluation.evaluate import evaluate_run
    from factory_train.export import can_export, export_run, write_registration_intent
    from factory_train.report import write_report

    configure_runtime(cfg.train, 1)
    attempt.record_event("finish", message="evaluating")
    evaluation = evaluate_run(attempt.run)
    if can_export(cfg.model):
        attempt.record_event("finish", message="exporting")
        folder = export_run(attempt.run, dtype=cfg.evaluation.export_dtype)
        if cfg.tracking.register:
            write_registration_intent(attempt, folder, evaluation)
    else:
        message = f"no export and no registration: architecture '{cfg.model.architecture}' is a plugin's and has no Hugging Face layout"
        attempt.record_event("finish", message=message)
    attempt.record_event("finish", message="writing the report")
    write_report(attempt.run)
    return ExitCode.OK
