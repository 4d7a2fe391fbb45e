"""A Slurm whose limits are enforced: what it refuses, and what it accepts and never starts (run with -m long)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import command
import pytest
from slurm_cluster import GANG, QUICK, job_id, submit, text_file, until

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits")


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With accounting, AccountingStorageEnforce=limits,qos, EnforcePartLimits=ALL and a MaxTime of two hours."""
    from slurm_cluster import Cluster

    with Cluster(tmp_path_factory.mktemp("limited"), limits=True) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("words", "key", "code"),
    [
        (("launcher.account=nope",), "launcher.account", 3),
        (("launcher.partition=nope",), "launcher.partition", 3),
        (("launcher.qos=nope",), "launcher.qos", 3),
        (("launcher.time=5:00:00",), "launcher.time", 77),
        (("launcher.nodes=9",), "launcher.nodes", 77),
        (("launcher.partition=tiny",), "launcher.nodes", 77),
        (("launcher.qos=small", "launcher.nodes=3"), "launcher.qos", 77),
    ],
)
def test_what_breaks_a_limit_is_refused_at_submission(limited: Cluster, folder: Path, words: tuple[str, ...], key: str, code: int) -> None:
    done = command.run(*GANG, "run=refused", f"data.path={text_file(folder)}", *QUICK, *words, cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    assert f"error: {key}: Slurm refused the job" in done.stderr
    assert "  fix: " in done.stderr
    assert not (folder / "runs" / "llama_fsdp-refused").exists()


@pytest.mark.parametrize(
    ("words", "reason", "override"),
    [
        (("launcher.nodes=2", "launcher.time=4"), "QOSMaxNodePerJobLimit", "launcher.nodes=FEWER"),
        (("launcher.nodes=1", "launcher.time=30"), "QOSMaxWallDurationPerJobLimit", "launcher.time=SHORTER"),
    ],
)
def test_what_slurm_accepts_and_never_starts_status_explains(
    limited: Cluster, folder: Path, words: tuple[str, ...], reason: str, override: str
) -> None:
    run = submit(folder, reason, *words, "launcher.qos=patient", "launcher.account=lab")
    until(lambda: reason in limited.slurm("squeue", "--noheader", f"--job={job_id(run)}", "--format=%r"))
    status = command.run("status", run.name, cwd=folder)
    assert f"pending, attempt 1: {reason}: a limit of your account or quality of service: {override}" in status.stdout, status.stdout
    table = command.run("status", cwd=folder)
    assert f"  waits: {reason}: " in table.stdout
    stopped = command.run("stop", run.name, cwd=folder)
    assert "taken out of the queue" in stopped.stdout


def test_account_and_qos_reach_the_job(limited: Cluster, folder: Path) -> None:
    run = submit(folder, "charged", "launcher.qos=small", "launcher.account=lab", "launcher.extra=[hold]")
    said = limited.slurm("scontrol", "--oneliner", "show", "job", job_id(run))
    assert "Account=lab QOS=small" in said
    limited.slurm("scancel", job_id(run))
    doctor = command.run("doctor", cwd=folder)
    assert "AccountingStorageEnforce=" in doctor.stdout
    assert "lab: normal," in doctor.stdout, doctor.stdout
