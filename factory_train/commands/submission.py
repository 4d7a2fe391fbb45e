"""From a configuration to a started attempt: everything is checked before anything is written."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from factory_train import checks, storage, switches
from factory_train.checkpoint import origin
from factory_train.commands.launcher_choice import with_launcher
from factory_train.commands.machine_check import check_devices, check_disk
from factory_train.config import Config, LauncherConfig, unsafe_changes
from factory_train.data.catalog import cache_root, known_manifest
from factory_train.data.manifest import check_length
from factory_train.data.mixture import check_set_lengths
from factory_train.data.source import check_source
from factory_train.errors import ConfigError, NotFoundError, PreflightError
from factory_train.gangs import exchange_folder, local_islands
from factory_train.hardware import Hardware, detect
from factory_train.launchers import ray_options, slurm_array
from factory_train.launchers.by_name import is_alive, launcher_named
from factory_train.launchers.job import MAIN_GANG, Gang, JobHandle, JobSpec
from factory_train.launchers.slurm import SlurmLauncher
from factory_train.plan import Plan, check_fits, make_plan, resolve_tasks_per_node
from factory_train.rendezvous.address import keep_token
from factory_train.run_dir import Attempt, RunDir
from factory_train.runs_index import remember_root, runs_root
from factory_train.snapshot import copy_code, copy_code_to, share_code, write_snapshot

# A char tokenizer knows its size only when it has seen the text; few texts use more characters.
_CHAR_VOCABULARY = 1024


@dataclass(frozen=True)
class Request:
    """A run that was checked and planned, with nothing of it written.

    Args:
        config: what will be frozen.
        root: folder of all runs.
        plan: what follows from the configuration.
        run: the existing run it continues; None starts a new one.
        launcher_reason: why this launcher, for people.
        argv: the words of the command, for the record.
        force: whether keys may change that the run was trained with.
        environ: extra environment of every process of the run.
    """

    config: Config
    root: Path
    plan: Plan
    run: RunDir | None
    launcher_reason: str
    argv: tuple[str, ...]
    force: bool
    environ: Mapping[str, str] = field(default_factory=dict)

    def job(self, attempt: Attempt, code: Path | None = None) -> JobSpec:
        """Returns what the launcher is asked to start.

        Args:
            code: folder with the snapshot of the package, where there is one.
        """
        config = self.config
        # Compute nodes never open a database file: a local one is fed by `sync`, where the person is.
        here = config.launcher.name == "local" or (config.launcher.name == "ray" and config.launcher.address == ray_options.OWN)
        tracker = config.tracking.backend != "none" and (here or "://" in (config.tracking.uri or "sqlite"))
        names = local_islands(config) or (MAIN_GANG,)
        data = [Path(config.data.path)] if config.data.path else []
        return JobSpec(
            attempt=attempt,
            gangs=tuple(Gang(name, config.launcher.nodes, self.plan.tasks_per_node) for name in names),
            environ=self.environ,
            grace_s=config.launcher.grace_s,
            tracker=tracker,
            options=self._options(),
            code=code,
            folders=(cache_root(config, self.root), *data),
        )

    def _options(self) -> LauncherConfig:
        """Returns the launcher's section; a Ray node must set the cards aside that the plan counts on."""
        options = self.config.launcher
        if options.name == "ray" and self.plan.device == "cuda" and options.gpus_per_node is None:
            return replace(options, gpus_per_node=self.plan.tasks_per_node)
        return options


@dataclass(frozen=True)
class Started:
    """An attempt that a launcher has taken."""

    attempt: Attempt
    handle: JobHandle


def check_request(config: Config, argv: Sequence[str], *, run: RunDir | None = None, force: bool = False, dry_run: bool = False) -> Request:
    """Checks and plans a run; reads much, writes nothing (a probe file in the runs root, gone at once, unless `dry_run`).

    Args:
        run: continue this one, whatever `config.run` says.

    Raises:
        FactoryTrainError: whatever stands in the way, before any process starts.
    """
    checks.check_config(config)
    check_source(config.data, config.train.seq_len)
    root = run.path.parent if run else runs_root(config.runs_root)
    run = run or (find_run(root, config.recipe, config.run) if config.run else None)
    config = _with_origin(config, root, run)
    config, reason = with_launcher(config)
    hardware = _hardware(config)
    if config.diloco.islands:
        config = _for_islands(config, cache_root(config, root))
    checks.check_world(config, config.launcher.nodes * resolve_tasks_per_node(config, hardware))
    if config.launcher.elastic.min_nodes is not None:
        checks.check_world(config, config.launcher.elastic.min_nodes * resolve_tasks_per_node(config, hardware))
    plan = _plan(config, hardware, cache_root(config, root))
    if run is not None:
        check_continues(run, config, force=force)
    check_fits(plan)
    if not dry_run and config.launcher.name == "local":
        check_devices(plan)
    check_disk(config, plan, run.path if run else root, is_new=run is None, dry_run=dry_run)
    return Request(config, root, plan, run, reason, tuple(argv), force)


def _for_islands(config: Config, cache: Path) -> Config:
    """Returns the configuration with what islands cannot find out by themselves."""
    # An island's directory lies deeper, and the default is relative to the run's.
    return replace(config, data=replace(config.data, cache_dir=str(cache.absolute())))


def _with_origin(config: Config, root: Path, run: RunDir | None) -> Config:
    """Returns the configuration with `init_from` resolved; a run that exists keeps the checkpoint it started from."""
    if config.init_from is None:
        return config
    last = run.last_attempt() if run else None
    before = last.config().init_from if last else None
    if before is not None and origin.parse(before).is_meant_by(config.init_from):
        return replace(config, init_from=before)
    if last is not None:
        raise ConfigError(
            f"run '{last.run.name}' has begun" + (f" from {origin.parse(before).title}" if before else " with weights of its own"),
            where="init_from",
            fix="leave init_from out, or take another run=NAME",
        )
    found = origin.resolve(config.init_from, root)
    found.check_fits(config)
    return replace(config, init_from=str(found))


def find_run(root: Path, recipe: str, name: str) -> RunDir | None:
    """Returns the run that `run=name` continues, if there is one; another recipe may continue it.

    Raises:
        ConfigError: several runs have that name.
    """
    exact = root / f"{recipe}-{name}"
    if (exact / "run.json").is_file():
        return RunDir.open(exact)
    found = [path.parent for path in sorted(root.glob("*/run.json")) if path.parent.name.endswith(f"-{name}")]
    found = [path for path in found if RunDir(path).id == name]
    if len(found) > 1:
        names = " ".join(path.name for path in found)
        raise ConfigError(f"run={name} may be any of: {names}", fix=f"recipe={RunDir(found[0]).info()['recipe']} run={name}")
    return RunDir.open(found[0]) if found else None


def check_continues(run: RunDir, config: Config, *, force: bool) -> None:
    """Checks that a run may go on with this configuration.

    Raises:
        PreflightError: it is running already.
        ConfigError: keys have changed that its model was trained with.
    """
    if is_alive(run):
        raise PreflightError(
            f"run '{run.name}' is already running",
            where=str(run.path),
            fix=f"python -m factory_train logs -f {run.name}, or python -m factory_train stop {run.name}",
        )
    last = run.last_attempt()
    changes = unsafe_changes(last.config(), config) if last else {}
    if changes and not force:
        listed = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())
        raise ConfigError(
            f"run '{run.name}' was trained with other values ({listed})",
            where=str(run.path),
            fix="leave these keys as they were, take another run=NAME, or --force",
        )


def is_finished(request: Request) -> bool:
    """Returns whether the run has done all the steps that are asked for."""
    last = request.run.last_attempt() if request.run else None
    verdict = last.verdict() if last else None
    if last is None or verdict is None or verdict.outcome != "done":
        return False
    before = last.config()
    changed = unsafe_changes(before, request.config)
    return request.config.train.steps <= before.train.steps and not changed


def start(request: Request) -> Started | None:
    """Takes an attempt and hands it to the launcher; None when the run turns out to have nothing left to do.

    Raises:
        PreflightError: another command was faster, or nothing could be started; no trace of it is left then.
    """
    with _taken(request) as attempt:
        if attempt is None:
            return None
        launcher = launcher_named(request.config.launcher.name)
        code = None if launcher.name == "local" else copy_code(attempt, request.config.plugins)
        started = Started(attempt, launcher.submit(request.job(attempt, code), detach=not request.config.wait))
    remember_root(request.root)
    return started


def start_array(requests: Mapping[int, Request], name: str, folder: Path) -> dict[int, Started | None]:
    """Takes an attempt of each run and hands all of them to Slurm as an array; None for runs with nothing left to do.

    Args:
        requests: by the number of the point.
        name: of the job.
        folder: a new one, for the script, logs and the code that the points share.

    Raises:
        PreflightError: another command was faster, or sbatch refuses; no trace of any point is left then.
    """
    with contextlib.ExitStack() as stack:
        taken = {number: stack.enter_context(_taken(request)) for number, request in requests.items()}
        started: dict[int, Started | None] = dict.fromkeys(taken)
        begun = {number: attempt for number, attempt in taken.items() if attempt is not None}
        if begun:
            try:
                plugins = dict.fromkeys(name for number in begun for name in requests[number].config.plugins)
                code = copy_code_to(folder / "code" / "tree", list(plugins))
                for attempt in begun.values():
                    share_code(attempt, code)
                handles = slurm_array.submit(SlurmLauncher(), _arrays({number: requests[number] for number in begun}, begun, name, folder))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            started |= {number: Started(attempt, handles[number]) for number, attempt in begun.items()}
    remember_root(next(iter(requests.values())).root)
    return started


def describe_array(requests: Mapping[int, Request], name: str, folder: Path) -> str:
    """Returns the script that `start_array` would submit, for --dry-run."""
    return slurm_array.describe(_arrays(requests, {number: _next_attempt(request) for number, request in requests.items()}, name, folder))


def _arrays(requests: Mapping[int, Request], attempts: Mapping[int, Attempt], name: str, folder: Path) -> list[slurm_array.Array]:
    code, parallel = folder / "code" / "tree", next(iter(requests.values())).config.launcher.sweep_parallel
    jobs = {number: request.job(attempts[number], code) for number, request in requests.items()}
    return slurm_array.arrays(jobs, name, folder, parallel, code)


@contextlib.contextmanager
def _taken(request: Request) -> Iterator[Attempt | None]:
    """Holds a run's lock with a new attempt of it, which goes again if it cannot be started; None when nothing is left to do."""
    run, is_new = request.run, False
    parent = origin.parse(request.config.init_from).title if request.config.init_from else None
    if run is None:
        try:
            run, is_new = RunDir.create(request.root, request.config.recipe, request.config.run, parent), True
        except ConfigError:
            # Made between our look and now, by the same command elsewhere.
            run = find_run(request.root, request.config.recipe, request.config.run) if request.config.run else None
            if run is None:
                raise
    with storage.locked(run.lock_path):
        before = run.attempt_numbers()
        try:
            check_continues(run, request.config, force=request.force)
            yield None if is_finished(request) else _new_attempt(request, run)
        except BaseException:
            _remove_unstarted(run, before, is_new=is_new)
            raise


def _new_attempt(request: Request, run: RunDir) -> Attempt:
    last = run.last_attempt()
    forced = unsafe_changes(last.config(), request.config) if last else {}
    # Whoever starts a run again does not want it stopped any more.
    for name in (switches.STOP, switches.PREEMPT):
        switches.turn_off(run, name)
    if request.config.diloco.islands and request.config.diloco.rendezvous is not None:
        keep_token(exchange_folder(run))
    attempt = run.new_attempt(request.config)
    storage.write_json(attempt.path / "plan.json", request.plan.to_json())
    write_snapshot(attempt, request.argv, request.config.plugins)
    attempt.record_launch_event("submit", argv=list(request.argv), launcher=request.launcher_reason)
    if forced:
        attempt.record_launch_event("forced", changes={key: list(values) for key, values in forced.items()})
    return attempt


def _remove_unstarted(run: RunDir, before: list[int], *, is_new: bool) -> None:
    """Removes what this submission, which holds the run's lock, left behind without starting anything."""
    for number in set(run.attempt_numbers()) - set(before):
        shutil.rmtree(Attempt(run, number).path, ignore_errors=True)
    if is_new and not before:
        shutil.rmtree(run.path, ignore_errors=True)


def describe(request: Request) -> str:
    """Returns what would be started, for --dry-run."""
    attempt = _next_attempt(request)
    launcher = launcher_named(request.config.launcher.name)
    code = None if launcher.name == "local" else attempt.path / "code" / "tree"
    return launcher.describe(request.job(attempt, code))


def _next_attempt(request: Request) -> Attempt:
    """Returns the attempt that would be taken, of which nothing is there."""
    run = request.run or RunDir(request.root / f"{request.config.recipe}-{request.config.run or '<new id>'}")
    return Attempt(run, (run.attempt_numbers() or [0])[-1] + 1 if request.run else 1)


def _hardware(config: Config) -> Hardware:
    """Returns what a node of the job has; a login node with no cards says nothing about that."""
    options, hardware = config.launcher, config.hardware
    if options.name == "local" or not (options.gpus_per_node or options.gres) or hardware.device != "auto":
        return detect(hardware)
    found = detect(replace(hardware, device="cuda"))
    return replace(found, name="GPU" if found.name == "auto" else found.name, num_devices=options.gpus_per_node or found.num_devices)


def _plan(config: Config, hardware: Hardware, cache: Path) -> Plan:
    manifest = known_manifest(config.data, cache)
    if manifest is not None:
        check_length(manifest, config.train.seq_len)
        check_set_lengths(config.data, config.train.seq_len)
    checks.check_vocabulary(config, manifest.vocab_size if manifest else None)
    at_most = {"bpe": config.data.vocab_size, "byte": checks.BYTE_VOCABULARY, "char": _CHAR_VOCABULARY}[config.data.tokenizer]
    rows = config.model.vocab_size or (manifest.vocab_size if manifest else at_most)
    exact = config.model.vocab_size is not None or manifest is not None or config.data.tokenizer == "byte"
    return make_plan(config, rows, hardware, vocab_exact=exact)


def open_run(path: Path) -> RunDir:
    """Opens a run that has at least one attempt.

    Raises:
        NotFoundError: there is nothing to continue.
    """
    run = RunDir.open(path)
    if run.last_attempt() is None:
        raise NotFoundError("the run was never started", where=run.name, fix=f"recipe={run.info()['recipe']} run={run.id}")
    return run
