"""Every launcher key, given to a real sbatch: read back from the job that Slurm has, or refused with the key to change."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from checkpoint_cases import new_run
from slurm_cluster import until

from factory_train.config import LauncherConfig
from factory_train.errors import PreflightError
from factory_train.launchers import slurm_queue
from factory_train.launchers.job import Gang, JobSpec
from factory_train.launchers.slurm import SlurmHandle, SlurmLauncher

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]


@dataclass(frozen=True)
class Shown:
    """`scontrol show job` must contain `text`.

    Args:
        value: of the key.
        text: what Slurm says about the job then.
        beside: keys that this one needs.
    """

    value: Any
    text: str
    beside: dict[str, Any] | None = None


@dataclass(frozen=True)
class InScript(Shown):
    """The script that Slurm has of the job must contain `text`."""


@dataclass(frozen=True)
class InOrders(Shown):
    """launch/slurm.json, which the job reads, must contain `text`: it is no business of sbatch."""


@dataclass(frozen=True)
class Refused:
    """The real sbatch refuses `value`, and we say so with this key."""

    value: Any


@dataclass(frozen=True)
class Elsewhere:
    """The key never reaches a job; `test` proves what it does."""

    test: str


# Every key has its proof; a new one without one fails below.
PROOFS: dict[str, list[Shown | Refused | Elsewhere]] = {
    "name": [Elsewhere("test_slurm.py: launcher=slurm; test_slurm_allocation.py: auto")],
    "address": [Elsewhere("test_ray.py: a Ray cluster, which sbatch knows nothing of")],
    "elastic": [Elsewhere("test_ray.py: Ray only")],
    "nodes": [Shown(3, "NumNodes=3")],
    "tasks_per_node": [Shown(3, "NtasksPerN:B:S:C=3:")],
    "sweep_parallel": [Elsewhere("test_slurm_sweep.py: ArrayTaskThrottle")],
    "grace_s": [InOrders(77.0, '"grace_s": 77.0')],
    "hang_s": [InOrders(77.0, '"hang_s": 77.0')],
    "stall_s": [InOrders(77.0, '"stall_s": 77.0')],
    "fabric": [InOrders("roce", '"fabric": "roce"')],
    "interface": [InOrders("ib0", '"interface": "ib0"')],
    "account": [Shown("lab", "Account=lab")],
    "partition": [Shown("urgent", "Partition=urgent"), Refused("nope")],
    "qos": [Elsewhere("test_slurm_limits.py: a Slurm without accounting keeps none")],
    "reservation": [Refused("nope")],
    "constraint": [Refused("a100")],
    "gpus_per_node": [Shown(2, "TresPerNode=gres:gpu:2"), Refused(9)],
    "gres": [Shown("gpu:3", "TresPerNode=gres:gpu:3"), Refused("gpu:h900:1"), Refused("fpga:1")],
    "cpus_per_task": [Shown(2, "CPUs/Task=2")],
    "memory": [Shown("2G", "MinMemoryNode=2G"), Refused("900G")],
    "resources": [Elsewhere("test_launcher_ray.py: Ray only")],
    "time": [Shown("1-02:00:00", "TimeLimit=1-02:00:00")],
    "exclusive": [Shown(True, "OverSubscribe=NO")],
    "exclude": [Shown("node[3-4]", "ExcNodeList=node[3-4]"), Refused("nope1")],
    "nodelist": [Shown("node[2-3]", "ReqNodeList=node[2-3]"), Refused("nope1")],
    "comment": [Shown("project 7", "Comment=project 7")],
    "extra": [Shown(["hold", "nice=42"], "Nice=42"), Refused(["licenses=nope"])],
    "srun_args": [InOrders(["--mpi=none"], '"--mpi=none"')],
    "setup": [InScript(["module load cuda"], "module load cuda")],
    "python": [InOrders("/opt/python3", '"python": "/opt/python3"')],
    "container": [InOrders("train.sqsh", '"container": "train.sqsh"')],
    "container_runtime": [InOrders("apptainer", '"container_runtime": "apptainer"')],
    "container_mounts": [InOrders(["/data:/data"], '"/data:/data"', {"container": "train.sqsh"})],
    "preflight": [InOrders(True, '"preflight": true')],
    "warn_s": [InScript(99, "--signal=USR2@99")],
    "requeue": [Shown("requeue", "Requeue=1"), Shown("never", "Requeue=0"), Shown("chain", "Dependency=singleton", {"chain": 1})],
    "chain": [Shown(2, "Requeue=0", {"requeue": "chain"})],
    "then": [Shown(["export"], "Dependency=afterok:")],
    "island_jobs": [Elsewhere("test_slurm_diloco.py: one job, and one for each island")],
    "islands_per_node": [InOrders(2, '"islands_per_node": 2')],
}


def test_every_key_has_a_proof() -> None:
    assert list(PROOFS) == [field.name for field in fields(LauncherConfig)]


def submitted(folder: Path, key: str, proof: Shown | Refused) -> SlurmHandle:
    """Submits a job with one key set. Slurm holds it back, unless it is to be refused: of held ones it checks less."""
    beside = {"extra": ["hold"], **(proof.beside or {})} if isinstance(proof, Shown) else {}
    settings = beside | {key: proof.value}
    options = replace(LauncherConfig(nodes=2, tasks_per_node=2), **settings)
    gang = Gang("main", options.nodes, options.tasks_per_node or 2)
    return SlurmLauncher().submit(JobSpec(new_run(folder), (gang,), grace_s=options.grace_s, options=options))


@pytest.mark.parametrize(("key", "index"), [(key, index) for key, proofs in PROOFS.items() for index in range(len(proofs))])
def test_a_key_is_read_back_from_the_job_or_refused(cluster: Cluster, tmp_path: Path, key: str, index: int) -> None:
    proof = PROOFS[key][index]
    if isinstance(proof, Elsewhere):
        assert (Path(__file__).parent / proof.test.partition(":")[0]).is_file()
        return
    if isinstance(proof, Refused):
        with pytest.raises(PreflightError) as refused:
            submitted(tmp_path, key, proof)
        assert "Slurm refused the job" in refused.value.what
        assert key in f"{refused.value.where} {refused.value.fix}" or key == "extra", str(refused.value)
        assert refused.value.fix
        return
    handle = submitted(tmp_path, key, proof)
    job = handle.to_json()
    ids = [*handle.job_ids, *job["then"].values()]
    try:
        if isinstance(proof, InOrders):
            said = (handle.attempt.launch / "slurm.json").read_text()
        elif isinstance(proof, InScript):
            said = cluster.slurm("scontrol", "write", "batch_script", ids[0], "-")
        else:
            said = "\n".join(cluster.slurm("scontrol", "show", "job", job_id) for job_id in ids)
        assert proof.text in said, json.dumps(said)
    finally:
        cluster.slurm("scancel", *ids)


@pytest.mark.parametrize(
    ("settings", "reason", "override"),
    [
        ({"nodes": 9}, "PartitionNodeLimit", "launcher.nodes=FEWER"),
        ({"partition": "tiny", "time": "60"}, "PartitionTimeLimit", "launcher.time=SHORTER"),
        ({"nodelist": "node4"}, "ReqNodeNotAvail", "launcher.nodelist"),
        ({"partition": "urgent"}, "PartitionDown", "the partition is down"),
    ],
    ids=["nodes", "time", "drained", "partition"],
)
def test_what_this_slurm_accepts_and_never_starts_is_explained(
    cluster: Cluster, tmp_path: Path, settings: dict[str, Any], reason: str, override: str
) -> None:
    """Without EnforcePartLimits, most of what cannot run waits for ever."""
    cluster.slurm("scontrol", "update", "nodename=node4", "state=drain", "reason=test")
    cluster.slurm("scontrol", "update", "partitionname=urgent", "state=down")
    options = replace(LauncherConfig(nodes=1, tasks_per_node=1), **settings)
    handle = SlurmLauncher().submit(JobSpec(new_run(tmp_path), (Gang("main", options.nodes, 1),), options=options))
    try:

        def why() -> str:
            slurm_queue.forget()
            job = handle.queued()
            return job.why if job else "not in the queue"

        until(lambda: reason in why(), 30, why)
        assert override in why()
        assert handle.status() == "pending"
    finally:
        cluster.slurm("scancel", *handle.job_ids)
        cluster.slurm("scontrol", "update", "nodename=node4", "state=resume")
        cluster.slurm("scontrol", "update", "partitionname=urgent", "state=up")
