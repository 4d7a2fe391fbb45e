"""`doctor`: what of this machine and its scheduler will work, and what to do about the rest."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from factory_train import storage
from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.doctor_ray import ray_cluster
from factory_train.commands.finding import NOTE, OK, PROBLEM, Finding
from factory_train.commands.run_words import add_words, split_words
from factory_train.errors import ExitCode, FactoryTrainError, UnavailableError
from factory_train.hardware import visible_cards
from factory_train.launchers import slurm_queue
from factory_train.runs_index import runs_root
from factory_train.units import format_bytes

_PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "submitit", "ray", "safetensors", "mlflow")
_SLOW_FSYNC_S = 0.1


def main(argv: list[str]) -> int:
    """Prints what was found; returns 0, or 3 when something will not work."""
    parser = ArgumentParser("doctor", "Looks at the environment, the filesystem, the network and the scheduler; starts nothing.")
    add_words(parser, ("launcher.address",))
    arguments = parser.parse(argv)
    _, settings = split_words("doctor", arguments.words, ("launcher.address",))
    findings = [*environment(), *filesystem(runs_root(settings.get("runs_root"))), *network(), *scheduler()]
    findings += ray_cluster(settings.get("launcher.address"))
    width = max(len(finding.about) for finding in findings)
    for finding in findings:
        print(f"{finding.level:<7}  {finding.about:<{width}}  {finding.text}")
        if finding.fix:
            print(f"{'':<7}  {'':<{width}}  fix: {finding.fix}")
    return ExitCode.PREFLIGHT if any(finding.level == PROBLEM for finding in findings) else ExitCode.OK


def environment() -> Iterator[Finding]:
    """Python, packages and cards."""
    yield Finding("python", OK, f"{platform.python_version()} at {sys.executable}")
    missing = [name for name in _PACKAGES if _version(name) is None]
    if missing:
        yield Finding("packages", PROBLEM, f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    else:
        yield Finding("packages", OK, ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    cards = visible_cards()
    kinds = ", ".join(sorted({name for name, _ in cards}))
    yield Finding("devices", OK, f"{len(cards)} x {kinds}" if cards else "no NVIDIA card here, as on most login nodes")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def filesystem(root: Path) -> Iterator[Finding]:
    """The folder of the runs: writable, with room, with locks and with an fsync that comes back."""
    if not storage.is_writable(root):
        yield Finding("runs", PROBLEM, f"{root} cannot be written", "runs_root=FOLDER where you may write")
        return
    folder = root
    while not folder.exists():
        folder = folder.parent
    probe = folder / f".factory_train-doctor-{os.getpid()}"
    try:
        began = time.monotonic()
        storage.write_atomic(probe, b"\0" * (1 << 20))
        seconds = time.monotonic() - began
        with storage.locked(probe):
            pass
    except OSError as error:
        yield Finding(
            "runs", PROBLEM, f"{folder}: {error.strerror}", "runs_root=FOLDER on a filesystem with locks (Lustre: mounted with -o flock)"
        )
        return
    finally:
        probe.unlink(missing_ok=True)
    speed = f"1 MiB written and flushed in {seconds * 1000:.0f} ms"
    level = NOTE if seconds > _SLOW_FSYNC_S else OK
    yield Finding("runs", level, f"{root}: {format_bytes(storage.free_bytes(folder))} free, {speed}, locks work")


def network() -> Iterator[Finding]:
    """How this host is called, the ports ranks meet at, and the fabric."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError:
        yield Finding("host", NOTE, f"{name} does not resolve here; ranks use the address Slurm knows")
    else:
        loops = all(address.startswith("127.") or address == "::1" for address in addresses)
        text = f"{name} is {', '.join(addresses)}"
        yield Finding(
            "host", NOTE if loops else OK, text + ("; gloo will be told to use the interface towards the other nodes" if loops else "")
        )
    devices = Path("/sys/class/infiniband")
    names = sorted(entry.name for entry in devices.iterdir()) if devices.is_dir() else []
    kinds = {_link_layer(devices / entry) for entry in names}
    preset = (
        "efa"
        if any(entry.startswith(("efa", "rdmap")) for entry in names)
        else "ib"
        if "InfiniBand" in kinds
        else "roce"
        if names
        else "tcp"
    )
    yield Finding("fabric", OK, f"{', '.join(names) or 'no RDMA device'} here; on nodes like this one launcher.fabric={preset}")


def _link_layer(device: Path) -> str:
    try:
        return next(device.glob("ports/*/link_layer")).read_text().strip()
    except (OSError, StopIteration):
        return ""


def scheduler() -> Iterator[Finding]:
    """Slurm: the controller, partitions, and the settings that decide what a preemption costs."""
    if not slurm_queue.is_installed():
        yield Finding("slurm", NOTE, "no sbatch here: launcher=auto runs on this machine")
        return
    try:
        config = slurm_queue.run("scontrol", "show", "config")
        partitions = slurm_queue.run("sinfo", "--noheader", "--format=%P|%a|%l|%D|%G|%f")
    except UnavailableError as error:
        yield Finding("slurm", NOTE, f"sbatch is here, but {error.what}", "scontrol ping; SLURM_CONF names the configuration")
        return
    facts = dict(re.findall(r"^(\S+)\s+= (.*)$", config, re.MULTILINE))
    yield Finding("slurm", OK, f"{facts.get('SLURM_VERSION', '?')}, cluster {facts.get('ClusterName', '?')}, a controller answers")
    for line in partitions.splitlines():
        name, state, limit, nodes, gres, _ = [*line.split("|"), ""][:6]
        text = f"{name.rstrip('*')}: {nodes} nodes, limit {limit}, {gres}" + (" (default)" if name.endswith("*") else "")
        yield Finding("partition", OK if state == "up" else NOTE, text + ("" if state == "up" else f", {state}"))
    yield from _limits(facts)
    yield _accounts()
    in_path = shutil.which("srun") is not None
    yield Finding(
        "srun", OK if in_path else PROBLEM, "is here" if in_path else "is missing", None if in_path else "the package slurm-client"
    )


def _limits(facts: dict[str, str]) -> Iterator[Finding]:
    """What a stop costs here: seconds to save, and whether a job may start again."""
    requeues = facts.get("JobRequeue") == "1"
    text = "jobs may be requeued" if requeues else "jobs are not requeued by default; each asks for it with --requeue"
    yield Finding("requeue", OK, text)
    kill_s = int((re.match(r"\d+", facts.get("KillWait", "30")) or ["30"])[0])
    few = kill_s < 30
    text = f"{kill_s} s between SIGTERM and SIGKILL" + (": a save that takes longer is lost unless Slurm warns before" if few else "")
    yield Finding("KillWait", NOTE if few else OK, text)
    told = "send_user_signal" in facts.get("SlurmctldParameters", "") + facts.get("PreemptParameters", "")
    mode = facts.get("PreemptMode", "OFF")
    text = f"PreemptMode={mode}, " + ("ranks get SIGUSR2 first" if told else "ranks get SIGTERM alone; both are understood")
    yield Finding("preemption", OK, text)
    enforced = facts.get("AccountingStorageEnforce", "none")
    late = facts.get("EnforcePartLimits", "NO") == "NO"
    text = f"AccountingStorageEnforce={enforced}, EnforcePartLimits={facts.get('EnforcePartLimits', 'NO')}"
    yield Finding(
        "limits", NOTE if late else OK, text + ("; what breaks a partition's limit is accepted and waits: see status" if late else "")
    )


def _accounts() -> Finding:
    try:
        text = slurm_queue.run(
            "sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={os.environ.get('USER', 'root')}", "format=account,qos"
        )
    except FactoryTrainError:
        return Finding("accounts", NOTE, "no accounting database answers; status reads squeue and the run directories, and needs none")
    rows = [line.replace("|", ": ") for line in text.splitlines() if line.strip("|")]
    return Finding("accounts", OK, "; ".join(rows) or "none of yours; launcher.account is not needed here, or ask the site")
