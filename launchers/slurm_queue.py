"""What Slurm's own commands say: their text output, which has not changed in ten years, unlike their JSON. No sacct needed."""

from __future__ import annotations

import datetime
import getpass
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from factory_train.errors import UnavailableError

_TIMEOUT_S = 20.0
_WITHOUT_A_WORD = "it failed and did not say why"
# One look at the queue serves all runs of a table, and all polls of one moment.
_FRESH_S = 1.0
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED", "PREEMPTED"}
_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "REQUEUE_FED", "RESV_DEL_HOLD"}

# Reasons for which a job waits for ever, or longer than a person expects, and what would change that.
_WAITS = {
    "PartitionTimeLimit": "the time limit is beyond that of the partition: launcher.time=SHORTER, or launcher.partition=ANOTHER",
    "PartitionNodeLimit": "more nodes than the partition gives one job: launcher.nodes=FEWER, or launcher.partition=ANOTHER",
    "BadConstraints": "no node satisfies launcher.constraint, launcher.gres and launcher.memory together",
    "ReqNodeNotAvail": "nodes that launcher.nodelist or a reservation wants are down, drained or reserved",
    "NodeDown": "a node that launcher.nodelist wants is down",
    "InvalidAccount": "launcher.account is not one of yours: sacctmgr show associations user=$USER",
    "InvalidQOS": "launcher.qos is not one of yours: sacctmgr show associations user=$USER format=account,qos",
    "DependencyNeverSatisfied": "a job it depends on has failed",
    "JobHeldUser": "held: scontrol release JOB",
    "JobHeldAdmin": "held by an administrator",
    "BeginTime": "starts again shortly after it was requeued",
    "Dependency": "waits for the job before it",
    "Reservation": "waits for its reservation to begin",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes jobs and starts none",
}
_LIMIT_WORDS = (
    ("Node", "launcher.nodes=FEWER"),
    ("Cpu", "launcher.cpus_per_task=FEWER"),
    ("CPU", "launcher.cpus_per_task=FEWER"),
    ("GRES", "launcher.gpus_per_node=FEWER"),
    ("Mem", "launcher.memory=LESS"),
    ("Wall", "launcher.time=SHORTER"),
    ("Time", "launcher.time=SHORTER"),
)


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue.

    Args:
        id: job id; JOB_TASK for one of an array.
        state: Slurm's word in full ("RUNNING").
        reason: why it is pending; "None" when it is not.
        nodes: where it runs.
        start: when Slurm means to start it, as text; "N/A" when it does not say.
    """

    id: str
    state: str
    reason: str
    nodes: str
    start: str

    @property
    def status(self) -> str:
        """Returns "pending", "running" or "ended", as `JobHandle.status` does."""
        return "ended" if self.state in _ENDED else "pending" if self.state in _PENDING else "running"

    @property
    def why(self) -> str:
        """Returns why it is pending, and what to change where waiting does not help."""
        # The reason may have details behind it: "ReqNodeNotAvail, UnavailableNodes:node3".
        word = re.split(r"[,(\s]", self.reason)[0]
        hint = _WAITS.get(word)
        if hint is None and re.match(r"(QOS|Assoc)(Max|Grp)", word):
            fix = next((fix for name, fix in _LIMIT_WORDS if name in word), "launcher.qos=ANOTHER")
            hint = f"a limit of your account or quality of service: {fix}, or it waits for your other jobs"
        return f"{self.reason}: {hint}" if hint else self.reason


def is_installed() -> bool:
    """Returns whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def answers() -> bool:
    """Returns whether a controller answers."""
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=_TIMEOUT_S).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def run(*command: str) -> str:
    """Runs one of Slurm's commands and returns its output.

    Raises:
        UnavailableError: it is not there, does not answer in time, or fails; the message is Slurm's.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError:
        raise UnavailableError(f"no {command[0]} here", where="Slurm", fix="run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError(
            f"{command[0]} did not answer within {_TIMEOUT_S:g} s", where="Slurm", fix="try again; is the controller up? scontrol ping"
        ) from None
    if done.returncode:
        what = first_line(done.stderr) or (f"{command[0]} was ended by a signal" if done.returncode < 0 else _WITHOUT_A_WORD)
        raise UnavailableError(what, where="Slurm", fix="scontrol ping")
    return done.stdout


def first_line(text: str) -> str:
    """Returns the first line of an error of Slurm's, without the name of the command."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^(sbatch|squeue|scontrol|scancel|srun|slurmctld): (error: |fatal: )?", "", lines[0]) if lines else ""


_seen: tuple[float, dict[str, QueuedJob]] | None = None


def my_jobs() -> dict[str, QueuedJob]:
    """Returns this user's jobs in the queue by id; asks at most once a second.

    Raises:
        UnavailableError: Slurm does not answer.
    """
    global _seen
    if _seen is None or time.monotonic() - _seen[0] > _FRESH_S:
        text = run("squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%r|%N|%S")
        rows = [line.split("|") for line in text.splitlines() if line.count("|") == 4]
        _seen = time.monotonic(), {row[0].strip(): QueuedJob(*(part.strip() for part in row)) for row in rows}
    return _seen[1]


def forget() -> None:
    """Makes the next look at the queue a fresh one."""
    global _seen
    _seen = None


def job_state(job_id: str) -> str | None:
    """Returns Slurm's word for the state of a job; None when Slurm does not know it or does not answer."""
    return _facts(job_id).get("JobState")


def running_on(job_id: str) -> list[str] | None:
    """Returns the nodes of a job that runs; None where it does not, or Slurm does not answer."""
    facts = _facts(job_id)
    return host_names(facts["NodeList"]) if facts.get("JobState") == "RUNNING" else None


def _facts(job_id: str) -> dict[str, str]:
    """Returns what Slurm says of a job, by name; nothing when it does not know it or does not answer."""
    try:
        words = run("scontrol", "--oneliner", "show", "job", job_id)
    except UnavailableError:
        return {}
    # A comment at the end may look like anything: what comes first counts.
    return dict(reversed(re.findall(r"(\S+?)=(\S*)", words)))


def end_time(job_id: str) -> float | None:
    """Returns when Slurm will end a running job, in seconds since the epoch; None without a limit."""
    try:
        text = run("squeue", "--noheader", f"--job={job_id}", "--format=%e").strip()
        return datetime.datetime.fromisoformat(text.splitlines()[0]).timestamp()
    except (UnavailableError, ValueError, IndexError):
        return None


def host_names(node_list: str) -> list[str]:
    """Returns the nodes of a list like "node[1-3,7],gpu1", in order.

    Own code: a container has no scontrol, and its absence must not become a world of one.
    """
    names: list[str] = []
    for part in re.findall(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*", node_list):
        names += _expand(part) if part else []
    return names


def _expand(text: str) -> list[str]:
    found = re.match(r"([^\[]*)\[([^\]]*)\](.*)", text)
    if found is None:
        return [text]
    prefix, inside, rest = found.groups()
    numbers: list[str] = []
    for item in inside.split(","):
        first, dash, last = item.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)] if dash else [first]
    return [prefix + number + tail for number in numbers for tail in _expand(rest)]


def node_address(name: str) -> str | None:
    """Returns the address Slurm itself uses for a node; None when Slurm does not say."""
    try:
        found = re.search(r"\bNodeAddr=(\S+)", run("scontrol", "--oneliner", "show", "node", name))
    except UnavailableError:
        return None
    return found.group(1) if found else None


def cancel(job_ids: Sequence[str]) -> None:
    """Ends jobs, those that have ended already left aside.

    Raises:
        UnavailableError: Slurm refuses or does not answer.
    """
    if job_ids:
        _scancel(*job_ids)
        forget()


def signal_steps(job_id: str, name: str) -> None:
    """Sends a signal to all tasks of a job; one that has ended already is left aside.

    Raises:
        UnavailableError: Slurm refuses or does not answer.
    """
    _scancel(f"--signal={name}", job_id)


def _scancel(*words: str) -> None:
    try:
        run("scancel", *words)
    except UnavailableError as error:
        # So it does when a job has ended between our look and now: what was wanted is so.
        if error.what != _WITHOUT_A_WORD:
            raise


def exclude_nodes(job_id: str, nodes: Sequence[str]) -> None:
    """Keeps a job that waits, or has just been asked to start again, away from more nodes.

    Raises:
        UnavailableError: Slurm refuses or does not answer.
    """
    found = re.search(r"\bExcNodeList=(\S+)", run("scontrol", "--oneliner", "show", "job", job_id))
    before = [found.group(1)] if found and found.group(1) != "(null)" else []
    run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join([*before, *nodes])}")


def parse_time_s(text: str) -> int | None:
    """Returns a time limit in sbatch's notation as seconds; None when it is none of its forms, -1 for no limit."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return -1
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        return None
    days, *parts = found.groups()
    values = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*values, 0, 0][:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(values) == 3:
        return values[0] * 3600 + values[1] * 60 + values[2]
    # One number is minutes, two are minutes and seconds.
    return values[0] * 60 + (values[1] if len(values) == 2 else 0)
