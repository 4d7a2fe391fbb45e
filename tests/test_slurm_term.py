"""A site whose Slurm sends only SIGTERM before it takes a job's nodes away (run with -m long)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import command
import pytest
from slurm_cluster import ended, losses, reached, resumed_at, submit

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(600)]
STEPS = "train.steps=120"


@pytest.fixture(scope="module")
def terse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Without preempt_send_user_signal."""
    from slurm_cluster import Cluster

    with Cluster(tmp_path_factory.mktemp("terse"), user_signal=False) as cluster:
        yield cluster


def test_a_preemption_announced_by_sigterm_alone_repeats_nothing(terse: Cluster, tmp_path: Path) -> None:
    doctor = command.run("doctor", cwd=tmp_path)
    assert "ranks get SIGTERM alone; both are understood" in doctor.stdout
    whole = submit(tmp_path, "whole", STEPS)
    ended(whole)
    run = submit(tmp_path, "preempted", STEPS, "launcher.partition=preempt")
    reached(run, 30)
    terse.slurm("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    ended(run)
    first = run.attempts()[0].verdict()
    assert first is not None
    assert (first.outcome, len(run.attempts())) == ("preempted", 2)
    assert "SIGTERM" in first.reason
    assert resumed_at(run, 2) == first.step
    assert losses(run) == losses(whole)
