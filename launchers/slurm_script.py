"""The batch script of a Slurm job: every launcher key as the flag that sbatch knows, and the command that runs the stages."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from factory_train.config import LauncherConfig
from factory_train.errors import ConfigError, PreflightError
from factory_train.launchers import slurm_islands, slurm_queue
from factory_train.launchers.job import JobSpec

# Verbs that may follow a run as jobs of their own.
FOLLOWERS = ("evaluate", "export")
# Keys that become a flag as they are.
_PLAIN = ("account", "partition", "qos", "constraint", "cpus_per_task", "gpus_per_node", "gres", "time", "exclude", "nodelist", "comment")
# What the script itself sets; a second one in launcher.extra would silently win or lose, by Slurm's version.
_OWN = {
    *("job-name", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "nodes", "ntasks-per-node", "dependency", "array"),
    *("account", "partition", "qos", "reservation", "constraint", "cpus-per-task", "gpus-per-node", "gres", "mem", "time", "exclude"),
    *("nodelist", "comment", "exclusive"),
}


def check(options: LauncherConfig) -> None:
    """Checks what can be wrong about the Slurm keys before sbatch is asked.

    Raises:
        ConfigError: a time limit that is none, a flag that has a key of its own.
    """
    if options.time is not None and slurm_queue.parse_time_s(options.time) is None:
        raise ConfigError(
            f"'{options.time}' is no time limit", where="launcher.time", fix="launcher.time=4:00:00, or minutes, or days-hours"
        )
    for flag in options.extra:
        name = flag.partition("=")[0]
        if name.startswith("-") or not name:
            raise ConfigError(f"'{flag}' has dashes", where="launcher.extra", fix=f"launcher.extra=[{flag.lstrip('-')}]")
        if name in _OWN:
            key = {"mem": "memory", "ntasks-per-node": "tasks_per_node"}.get(name, name.replace("-", "_"))
            raise ConfigError(
                f"--{name} is set by factory_train", where="launcher.extra", fix=f"launcher.{key}=... where there is such a key"
            )
    for verb in options.then:
        if verb not in FOLLOWERS:
            raise ConfigError(
                f"'{verb}' cannot follow a run", where="launcher.then", fix=f"launcher.then=[{','.join(FOLLOWERS)}] or part of it"
            )
    if options.then and options.requeue == "chain":
        raise ConfigError(
            "which job of a chain ends the run is not known beforehand, so none can follow it",
            where="launcher.then",
            fix="launcher.requeue=requeue",
        )
    if options.island_jobs == "separate":
        _check_islands_apart(options)
    if options.container is None and options.container_mounts:
        raise ConfigError("mounts without a container", where="launcher.container_mounts", fix="launcher.container=IMAGE")


def _check_islands_apart(options: LauncherConfig) -> None:
    fix = "launcher.island_jobs=one"
    if options.islands_per_node > 1:
        raise ConfigError("islands that are jobs of their own share no node", where="launcher.islands_per_node", fix=fix)
    if options.nodelist is not None:
        raise ConfigError("the jobs of all islands would wait for the same nodes", where="launcher.nodelist", fix=fix)
    if options.then:
        raise ConfigError("which island ends the run is not known beforehand, so no job can follow it", where="launcher.then", fix=fix)


def warning_s(options: LauncherConfig) -> int:
    """Returns how long before the time limit Slurm warns: never so early that a short job is warned as it starts."""
    limit_s = slurm_queue.parse_time_s(options.time) if options.time else None
    return options.warn_s if limit_s is None or limit_s < 0 else max(1, min(options.warn_s, limit_s // 4))


def parameters(job: JobSpec, name: str, launch: Path, *, dependency: str | None = None, array: str | None = None) -> dict[str, Any]:
    """Returns what submitit's SlurmExecutor is told.

    Args:
        name: of the job.
        launch: where its log goes.
        dependency: as in sbatch --dependency.
        array: as in sbatch --array; None for an ordinary job.
    """
    options, whole = job.options, slurm_islands.whole(job.gangs, job.options.islands_per_node)
    requeue = "requeue" if options.requeue == "requeue" else "no-requeue"
    more: dict[str, Any] = {"output": str(launch / ("slurm-%A_%a.log" if array else "slurm-%j.log")), requeue: True}
    if array is not None:
        more["array"] = array
    if len(job.gangs) > 1:
        # The island on a node that is lost must not take the others with it.
        more["no-kill"] = True
    if options.reservation is not None:
        more["reservation"] = options.reservation
    if dependency is not None:
        # Otherwise a job whose condition can no longer come true stays in the queue for ever.
        more["kill-on-invalid-dep"] = "yes"
    for flag in options.extra:
        key, equals, value = flag.partition("=")
        more[key] = value if equals else True
    plain = {key: getattr(options, key) for key in _PLAIN if getattr(options, key) is not None}
    return {
        # submitit's own defaults: five minutes, and a wckey that sites with wckeys refuse.
        "time": None,
        "wckey": None,
        **plain,
        "job_name": name,
        "nodes": whole.nodes,
        "ntasks_per_node": whole.tasks_per_node,
        "signal_delay_s": warning_s(options),
        "stderr_to_stdout": True,
        "use_srun": False,
        "additional_parameters": more,
        **({"mem": options.memory} if options.memory is not None else {}),
        **({"exclusive": True} if options.exclusive else {}),
        **({"setup": list(options.setup)} if options.setup else {}),
        **({"dependency": dependency} if dependency is not None else {}),
    }


def batch_command(code: Path, module: str, arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """Returns the last lines of the script: Python in place of the shell, so that signals reach it and not its parent.

    Args:
        code: folder with the snapshot of the package.
        module: what runs the stages.
    """
    path = os.pathsep.join([str(code), *(entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry)])
    lines = [
        f"export PYTHONPATH={shlex.quote(path)} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1",
        shlex.join(["exec", sys.executable, "-m", module, *arguments]),
    ]
    return "\n".join(lines)


def text(parameters: Mapping[str, Any], folder: Path, command: str) -> str:
    """Returns the whole script, as submitit writes it."""
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string(command=command, folder=str(folder), **parameters)


def submit(parameters: Mapping[str, Any], folder: Path, command: str) -> str:
    """Writes the script into `folder`, gives it to sbatch and returns the job id.

    Raises:
        PreflightError: sbatch refuses, in Slurm's words, with the key to change.
        UnavailableError: there is no Slurm here, or it does not answer.
    """
    import contextlib
    import io

    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    if not slurm_queue.is_installed():
        slurm_queue.run("sbatch", "--version")
    try:
        executor = SlurmExecutor(folder)
        executor.update_parameters(**parameters)
        # submitit prints what sbatch complained about; it is part of the error below.
        with contextlib.redirect_stderr(io.StringIO()):
            # No pickle travels: what to do is in the run directory.
            job = executor._submit_command(command)
    except FailedJobError as error:
        raise refusal(str(error)) from error
    finally:
        for left in folder.glob(".submission_file_*.sh"):
            if not left.is_symlink():
                left.unlink()
    slurm_queue.forget()
    return str(job.job_id)


# What sbatch says, in part, the key it is about, and whether a policy of the site is in the way.
_REFUSALS = (
    (
        "Invalid account or account/partition",
        "launcher.account",
        "launcher.account=ONE OF YOURS (sacctmgr show associations user=$USER), or launcher.partition=",
        False,
    ),
    ("Invalid partition", "launcher.partition", "launcher.partition=ONE OF: sinfo --format=%P", False),
    ("Invalid qos", "launcher.qos", "launcher.qos=ONE OF YOURS: sacctmgr show associations user=$USER format=qos", False),
    ("time limit is invalid", "launcher.time", "launcher.time=SHORTER: sinfo --format='%P %l' lists the limits", True),
    ("Node count specification invalid", "launcher.nodes", "launcher.nodes=FEWER", True),
    ("More processors requested", "launcher.cpus_per_task", "launcher.cpus_per_task=FEWER, or launcher.tasks_per_node=FEWER", False),
    ("Memory specification", "launcher.memory", "launcher.memory=LESS", False),
    (
        "Requested node configuration is not available",
        "launcher.nodes",
        "FEWER of launcher.nodes, gpus_per_node, gres, cpus_per_task or memory: sinfo -N -l",
        False,
    ),
    (
        "Job violates accounting/QOS policy",
        "launcher.qos",
        "less of launcher.nodes, launcher.time or gpus: a limit of your account or launcher.qos",
        True,
    ),
    (
        "Invalid job array specification",
        "--multirun",
        "fewer points a command, each command with a sweep=NAME: scontrol show config | grep MaxArraySize",
        True,
    ),
    ("Invalid generic resource", "launcher.gres", "launcher.gres=ONE OF: sinfo --format=%G", False),
    ("Invalid feature", "launcher.constraint", "launcher.constraint=ONE OF: sinfo --format=%f", False),
    ("Requested reservation is invalid", "launcher.reservation", "launcher.reservation=ONE OF: scontrol show reservation", False),
    ("Invalid node name", "launcher.nodelist", "launcher.nodelist and launcher.exclude name nodes of sinfo -N", False),
    ("CPU count per node", "launcher.cpus_per_task", "launcher.cpus_per_task=FEWER", False),
    ("Access/permission denied", "launcher.partition", "launcher.partition=ANOTHER: this one is not for you", True),
)
_AWAY = ("Unable to contact slurm controller", "Connection refused", "Socket timed out", "Could not establish a configuration source")


def refusal(said: str) -> Exception:
    """Returns the error for what sbatch said, with the key it is about."""
    from factory_train.errors import PolicyError, UnavailableError

    lines = [slurm_queue.first_line(line) for line in said.splitlines()]
    reasons = [line.removeprefix("Batch job submission failed: ") for line in lines if line]
    # The last line is the verdict; those before it may say why.
    what = "; ".join(dict.fromkeys(reversed(reasons))) or "sbatch failed and did not say why"
    if any(word in said for word in _AWAY):
        return UnavailableError(what, where="Slurm", fix="try again when the controller answers: scontrol ping")
    for part, where, fix, is_policy in _REFUSALS:
        # Its versions differ in capitals.
        if part.lower() in said.lower():
            return (PolicyError if is_policy else PreflightError)(f"Slurm refused the job: {what}", where=where, fix=fix)
    return PreflightError(
        f"Slurm refused the job: {what}", where="launcher", fix="--dry-run prints the script; sbatch --test-only checks it"
    )


def stage_command(spec: Mapping[str, Any], stage: str, *, nodes: int, tasks_per_node: int) -> list[str]:
    """Returns the srun that runs one stage.

    Args:
        spec: content of launch/slurm.json.
        nodes, tasks_per_node: of the stage: 1 and 1 but for `train`.
    """
    _, sharing = spec.get("share", (0, 1))
    command = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        # Without it the others wait for a rank that is gone.
        "--kill-on-bad-exit=1",
        "--input=none",
        "--unbuffered",
        "--label",
        "--export=ALL",
    ]
    if spec["cpus_per_task"]:
        # From 22.05 on srun no longer takes this from sbatch. One process of a stage of its own may have the cores of all ranks.
        share = sharing if stage == "train" else spec["tasks_per_node"]
        command.append(f"--cpus-per-task={spec['cpus_per_task'] * share}")
    if sharing > 1:
        # Islands on one node have all of its cores together: bound, each would have the first ones.
        command.append("--cpu-bind=none")
    if spec.get("nodes"):
        # Inside an allocation that others may use too: what they hold there is shared, and rank 0 is on the first node.
        command += [f"--nodelist={','.join(spec['nodes'][:nodes])}", "--overlap"]
    command += spec["srun_args"]
    return [*command, *in_container(spec, [spec["python"], "-m", "factory_train.launchers.slurm_task", stage])]


def stage_commands(spec: Mapping[str, Any], stage: str) -> list[list[str]]:
    """Returns the srun lines of a stage, for people: one, or one an island, on nodes whose names are not known yet."""
    gang = spec["gang"]
    if stage != "train":
        return [stage_command(spec, stage, nodes=1, tasks_per_node=1)]
    specs = [spec]
    if spec["islands"]:
        nodes = spec.get("nodes") or [f"NODE{number}" for number in range(1, spec["num_nodes"] + 1)]
        found = slurm_islands.shares(len(spec["islands"]), gang["nodes"], spec["islands_per_node"], nodes)
        specs = [slurm_islands.step_spec(spec, island, share) for island, share in zip(spec["islands"], found, strict=True)]
    return [stage_command(each, stage, nodes=gang["nodes"], tasks_per_node=gang["tasks_per_node"]) for each in specs]


def verb_command(spec: Mapping[str, Any], code: Path, words: Sequence[str], environ: Mapping[str, str]) -> str:
    """Returns the last lines of the script of a job that follows: one verb of the command line, in one process."""
    exports = batch_command(code, "", [], environ).rpartition("\n")[0]
    srun = ["exec", "srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--input=none", "--unbuffered", *spec["srun_args"]]
    return exports + "\n" + shlex.join([*srun, *in_container(spec, [spec["python"], "-m", "factory_train", *words])])


def in_container(spec: Mapping[str, Any], inside: list[str]) -> list[str]:
    """Returns the end of an srun command line: what it runs, in the image where there is one."""
    if spec["container"] is None:
        return inside
    if spec["container_runtime"] == "pyxis":
        mounts = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in spec["mounts"])
        return [f"--container-image={spec['container']}", f"--container-mounts={mounts}", "--no-container-mount-home", *inside]
    binds = [word for mount in spec["mounts"] for word in ("--bind", mount)]
    gpus = ["--nv"] if spec["gpus"] else []
    return ["apptainer", "exec", *gpus, *binds, spec["container"], *inside]
