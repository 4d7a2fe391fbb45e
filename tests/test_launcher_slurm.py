"""What the Slurm launcher writes and understands, with no Slurm: scripts, text of Slurm's commands, attempts, heartbeats."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import command
import pytest
import torch.distributed as dist
from checkpoint_cases import new_run
from conftest import REPOSITORY

from factory_train import heartbeat
from factory_train.config import Config, LauncherConfig
from factory_train.distributed import process_group as meeting
from factory_train.errors import ConfigError, FactoryTrainError, PolicyError, PreflightError, UnavailableError
from factory_train.heartbeat import Beat, Place
from factory_train.launchers import attempts, slurm_array, slurm_preflight, slurm_queue, slurm_script
from factory_train.launchers.allocation import Allocation, check_started_once, fill_in, find_allocation
from factory_train.launchers.fabric import FABRICS, fabric_environ
from factory_train.launchers.job import Gang, JobSpec, WorkerEnv
from factory_train.launchers.slurm_queue import QueuedJob
from factory_train.launchers.slurm_restart import Restart
from factory_train.launchers.slurm_task import place
from factory_train.preemption import Deadline
from factory_train.run_dir import Attempt

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("preset", ["slurm", "slurm_h100_ib", "slurm_efa_pyxis", "slurm_modules_apptainer"])
def test_a_dry_run_prints_the_script_where_there_is_no_slurm(preset: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(subprocess.__file__).read_text())
    words = ("recipe=llama_fsdp", f"launcher={preset}", "run=golden", f"data.path={text}", *command.SMALL, "tracking=none", "--dry-run")
    environ = command.environment() | {"PATH": "/nowhere"}
    environ.pop("SLURM_CONF", None)
    done = subprocess.run([sys.executable, "-m", "factory_train", *words], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = done.stdout[done.stdout.index("slurm: sbatch") :]
    for found, name in ((str(tmp_path), "WORK"), (sys.executable, "PYTHON"), (str(REPOSITORY), "CLONE")):
        script = script.replace(found, name)
    script = "\n".join(line.rstrip() for line in script.splitlines()) + "\n"
    assert script == (GOLDEN / f"{preset}.txt").read_text()
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_sweep_prints_the_one_script_of_its_points(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(subprocess.__file__).read_text())
    words = ("recipe=llama_fsdp", "launcher=slurm", "launcher.sweep_parallel=2", "sweep=grid", f"data.path={text}", *command.SMALL)
    done = command.run(*words, "-m", "optim.lr=1e-3,2e-3,3e-3", "train.seed=1,2", "tracking=none", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#!/bin/bash") == 1
    assert "#SBATCH --array=1-6%2\n" in done.stdout
    assert "#SBATCH --job-name=sweep-llama_fsdp-grid\n" in done.stdout
    folder = tmp_path / "runs" / "sweep-llama_fsdp-grid" / "submissions" / "0001"
    assert f"#SBATCH --output={folder}/slurm-%A_%a.log\n" in done.stdout
    assert f"-m factory_train.launchers.slurm_batch {folder}/array-1.json\n" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_points_that_ask_for_different_things_are_arrays_of_their_own(tmp_path: Path) -> None:
    attempt = new_run(tmp_path)
    times = {1: "10", 2: "20", 3: "10", 5: "10"}
    jobs = {number: JobSpec(attempt, (Gang("main", 1, 1),), options=LauncherConfig(time=time)) for number, time in times.items()}
    found = slurm_array.arrays(jobs, "grid", tmp_path, 2, tmp_path)
    assert [array.parameters["additional_parameters"]["array"] for array in found] == ["1,3,5%2", "2%1"]
    assert [array.orders.name for array in found] == ["array-1.json", "array-2.json"]
    chained = {1: JobSpec(attempt, (Gang("main", 1, 1),), options=LauncherConfig(requeue="chain"))}
    with pytest.raises(ConfigError, match=r"launcher\.requeue"):
        slurm_array.arrays(chained, "grid", tmp_path, 2, tmp_path)


def test_every_launcher_key_of_sbatch_becomes_its_flag(tmp_path: Path) -> None:
    options = LauncherConfig(
        account="lab",
        partition="train",
        qos="high",
        reservation="maintenance",
        constraint="a100",
        gpus_per_node=4,
        gres="gpu:a100:4",
        cpus_per_task=8,
        memory="64G",
        time="1-02:00:00",
        exclusive=True,
        exclude="node[3-5]",
        nodelist="node1",
        comment="project 7",
        extra=["mail-type=END", "spread-job"],
        setup=["module load cuda"],
    )
    job = JobSpec(new_run(tmp_path), (Gang("main", 2, 4),), options=options)
    parameters = slurm_script.parameters(job, "run", tmp_path, dependency="afterok:7")
    text = slurm_script.text(parameters, tmp_path, "true")
    for flag in (
        *("account=lab", "partition=train", "qos=high", "reservation=maintenance", "constraint=a100", "gpus-per-node=4", "gres=gpu:a100:4"),
        *("cpus-per-task=8", "mem=64G", "time=1-02:00:00", "exclusive", "exclude='node[3-5]'", "nodelist=node1", "comment='project 7'"),
        *("mail-type=END", "spread-job", "nodes=2", "ntasks-per-node=4", "dependency=afterok:7", "kill-on-invalid-dep=yes", "requeue"),
    ):
        assert f"#SBATCH --{flag}\n" in text
    assert text.index("module load cuda") < text.index("# command")
    assert "wckey" not in text


def test_the_warning_never_comes_as_a_short_job_starts() -> None:
    assert slurm_script.warning_s(LauncherConfig(time="1", warn_s=120)) == 15
    assert slurm_script.warning_s(LauncherConfig(time="4:00:00", warn_s=120)) == 120
    assert slurm_script.warning_s(LauncherConfig(warn_s=120)) == 120


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (LauncherConfig(time="soon"), "launcher.time"),
        (LauncherConfig(extra=["--mail-type=END"]), "launcher.extra"),
        (LauncherConfig(extra=["mem=4G"]), "launcher.extra"),
        (LauncherConfig(container_mounts=["/data"]), "launcher.container_mounts"),
        (LauncherConfig(then=["deploy"]), "launcher.then"),
        (LauncherConfig(then=["export"], requeue="chain"), "launcher.then"),
    ],
)
def test_slurm_keys_that_cannot_be_right_are_refused_before_sbatch(options: LauncherConfig, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        slurm_script.check(options)
    assert refused.value.where == key
    assert refused.value.fix


@pytest.mark.parametrize(
    ("said", "kind", "key"),
    [
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            PreflightError,
            "account",
        ),
        (
            "sbatch: error: invalid partition: nope\nsbatch: error: Batch job submission failed: Invalid partition name specified",
            PreflightError,
            "partition",
        ),
        (
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            PolicyError,
            "time",
        ),
        (
            "sbatch: error: QOSMaxNodePerJobLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy",
            PolicyError,
            "qos",
        ),
        ("sbatch: error: Batch job submission failed: Node count specification invalid", PolicyError, "nodes"),
    ],
)
def test_a_refusal_of_sbatch_names_the_key_to_change(said: str, kind: type[FactoryTrainError], key: str) -> None:
    error = slurm_script.refusal(said)
    assert isinstance(error, kind)
    assert error.where == f"launcher.{key}"
    assert "sbatch:" not in error.what
    assert isinstance(slurm_script.refusal("sbatch: error: Unable to contact slurm controller (connect failure)"), UnavailableError)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[1-3,7],gpu1", ["node1", "node2", "node3", "node7", "gpu1"]),
        ("n[08-11]-ib", ["n08-ib", "n09-ib", "n10-ib", "n11-ib"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_node_lists_are_read_without_scontrol(text: str, names: list[str]) -> None:
    assert slurm_queue.host_names(text) == names


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("4:00:00", 14400), ("2-0", 172800), ("1-02:30", 95400), ("UNLIMITED", -1), ("x", None)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int | None) -> None:
    assert slurm_queue.parse_time_s(text) == seconds


@pytest.mark.parametrize(
    ("environ", "nodes", "tasks", "gpus"),
    [
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "4(x2)"}, ("n1", "n2"), 4, None),
        ({"SLURM_TASKS_PER_NODE": "1(x2)"}, ("n1", "n2"), 1, None),
        ({"SLURM_TASKS_PER_NODE": "64,32"}, ("n1", "n2"), 2, None),
        # One task a node is how many ask for a node whole: cards say how many ranks it has.
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_PER_NODE": "a100:8"}, ("n1", "n2"), None, 8),
        ({"SLURM_GPUS_ON_NODE": "4"}, ("n1", "n2"), None, 4),
    ],
)
def test_an_allocation_says_how_many_ranks_it_is_for(environ: dict[str, str], nodes: tuple[str, ...], tasks: int | None, gpus: int) -> None:
    found = find_allocation({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", **environ})
    assert found == Allocation("7", nodes, tasks, gpus)
    assert fill_in(LauncherConfig(), found) == {"nodes": 2, "tasks_per_node": tasks, "gpus_per_node": gpus}
    assert fill_in(LauncherConfig(nodes=2, tasks_per_node=3), found)["tasks_per_node"] == 3


def test_an_allocation_that_is_too_small_and_a_command_started_once_a_task_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"launcher\.nodes=2"):
        fill_in(LauncherConfig(nodes=3), Allocation("7", ("n1", "n2"), 1, None))
    with pytest.raises(ConfigError, match="started this command 4 times"):
        check_started_once({"SLURM_STEP_NUM_TASKS": "4"})
    assert find_allocation({}) is None
    assert Allocation("7", (socket.gethostname().partition(".")[0],), 1, None).is_here


def test_a_job_that_waits_says_what_would_help() -> None:
    assert "launcher.time" in QueuedJob("1", "PENDING", "PartitionTimeLimit", "", "N/A").why
    assert "launcher.nodes" in QueuedJob("1", "PENDING", "AssocMaxNodePerJobLimit", "", "N/A").why
    assert QueuedJob("1", "PENDING", "Resources", "", "N/A").why == "Resources"
    assert QueuedJob("1", "PENDING", "Resources", "", "N/A").status == "pending"


def test_a_task_reads_its_place_from_slurm() -> None:
    orders = WorkerEnv(run_dir="/runs/a", attempt=2, local_world_size=2, master_addr="node1")
    worker = place({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}, orders)
    assert (worker.rank, worker.local_rank, worker.world_size, worker.local_world_size) == (3, 1, 4, 2)
    assert (worker.master_addr, worker.attempt, worker.lifeline) == ("node1", 2, 1)


@pytest.mark.parametrize("fabric", sorted(FABRICS))
def test_fabric_presets_are_these(fabric: str) -> None:
    found = fabric_environ(fabric, None, Path("/logs"), environ={})
    text = "".join(f"{name}={value}\n" for name, value in sorted(found.items()))
    assert text == (GOLDEN / f"fabric_{fabric}.txt").read_text()
    assert all(len(setting.source) > 8 or setting.source.startswith("as for") for setting in FABRICS[fabric].values())


def test_what_a_person_has_set_stays_and_an_interface_goes_before_the_preset() -> None:
    found = fabric_environ("ib", "ib0", Path("/logs"), environ={"NCCL_IB_TIMEOUT": "18"})
    assert "NCCL_IB_TIMEOUT" not in found
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("=ib0", "ib0")


def beats(*places: tuple[float, int, str]) -> list[Beat]:
    return [Beat(rank, age_s, step, phase, 100.0 + rank) for rank, (age_s, step, phase) in enumerate(places)]


def test_a_silent_rank_is_found_and_a_slow_filesystem_is_not_a_rank() -> None:
    stopped = heartbeat.silent(beats((1, 5, "compute"), (90, 5, "compute"), (2, 5, "reduce")), 60)
    assert stopped is not None
    assert stopped.rank == 1
    assert heartbeat.silent(beats((90, 5, "compute"), (91, 5, "compute")), 60) is None
    assert heartbeat.silent(beats((1, 5, "compute"), (90, 5, "compute")), 0) is None


def test_the_first_rank_that_stopped_is_the_one_furthest_behind() -> None:
    first = heartbeat.furthest_behind(beats((1, 7, "reduce"), (1, 7, "reduce"), (1, 7, "data"), (1, 7, "compute")))
    assert first is not None
    assert first.rank == 2
    quiet = heartbeat.furthest_behind(beats((1, 7, "reduce"), (40, 8, "reduce")))
    assert quiet is not None
    assert quiet.rank == 1


def test_heartbeats_are_written_in_place_and_read_back(attempt: Attempt) -> None:
    spot = Place()
    for step in (3, 1234567):
        spot.enter(step, "reduce")
        heartbeat.write(attempt.heartbeat_path(2), spot)
    (found,) = heartbeat.read_all(attempt)
    assert (found.rank, found.step, found.phase) == (2, 1234567, "reduce")


def begun(tmp_path: Path) -> Attempt:
    attempt = new_run(tmp_path)
    (attempt.path / "job.json").write_text('{"launcher": "slurm", "job_id": "7", "job_ids": ["7"]}')
    return attempt


def test_a_preflight_names_the_nodes_that_are_ill_and_those_that_say_nothing() -> None:
    said = "n1: no nvidia-smi: GPUs not looked at\nn1: ok\nn2: BAD the clock is 9 s off\nn2: BAD 3 GPUs, 4 expected\nsrun: n2 failed\n"
    bad = slurm_preflight.read(said, ["n1", "n2", "n3"])
    assert bad == {"n2": ["the clock is 9 s off", "3 GPUs, 4 expected"], "n3": ["did not answer"]}
    assert slurm_preflight.in_words(bad) == "n2: the clock is 9 s off, 3 GPUs, 4 expected; n3: did not answer"
    assert not slurm_preflight.is_everywhere(bad, ["n1", "n2", "n3"])
    assert slurm_preflight.is_everywhere(bad, ["n2", "n3"])
    assert not slurm_preflight.is_everywhere({"n1": ["full"]}, ["n1"]), "another node may do"


def test_the_first_start_takes_the_submitted_attempt_and_a_restart_makes_the_next(tmp_path: Path) -> None:
    submitted = begun(tmp_path)
    first = attempts.take(submitted.run, 1, "7")
    second = attempts.take(submitted.run, 1, "7")
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (1, 2)
    assert second.config() == first.config()
    assert not first.is_newest()


def test_a_job_whose_run_went_on_elsewhere_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path).run
    assert attempts.take(run, 1, "7")
    resumed = run.new_attempt(Config(recipe="fake"))
    (resumed.path / "job.json").write_text('{"launcher": "slurm", "job_id": "8", "job_ids": ["8"]}')
    assert attempts.take(run, 1, "7") is None
    assert "another job" in capsys.readouterr().out


@pytest.mark.parametrize("outcome", ["done", "interrupted", "failed-user", "killed"])
def test_a_restart_after_a_final_verdict_does_nothing(tmp_path: Path, outcome: str) -> None:
    run = begun(tmp_path).run
    first = attempts.take(run, 1, "7")
    assert first is not None
    first.write_verdict(outcome, 0, step=1, reason="so it was")
    assert attempts.take(run, 1, "7") is None


def test_attempts_without_progress_stop_after_three(tmp_path: Path) -> None:
    run = begun(tmp_path).run
    for number in (1, 2, 3):
        attempt = attempts.take(run, 1, "7")
        assert attempt is not None
        attempt.record_launch_event("start", checkpoint=attempts.newest_checkpoint_step(run))
        assert attempts.count_fruitless(run) == number
    assert attempts.take(run, 1, "7") is None
    verdict = run.attempts()[-1].verdict()
    assert verdict is not None
    assert "without a newer checkpoint" in verdict.reason


def test_a_newer_checkpoint_or_a_new_submission_begins_the_count_anew(tmp_path: Path) -> None:
    run = begun(tmp_path).run
    for _ in range(2):
        attempt = attempts.take(run, 1, "7")
        assert attempt is not None
        attempt.record_launch_event("start", checkpoint=-1)
    (run.checkpoints / "step-00000020").mkdir(parents=True)
    assert attempts.count_fruitless(run) == 0
    shutil.rmtree(run.checkpoints / "step-00000020")
    attempt.record_launch_event("submit")
    assert attempts.count_fruitless(run) == 1


@pytest.mark.parametrize(("states", "event"), [(["RUNNING", "COMPLETING"], "exclude"), (["RUNNING"] * 5, "requeue-failed")])
def test_a_requeue_whose_command_dies_with_the_job_counts_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: list[str], event: str
) -> None:
    """Slurm ends every process of the job, the scontrol that asked for it among them."""
    attempt = begun(tmp_path)
    excluded: list[str] = []

    def killed(*command: str) -> str:
        raise UnavailableError("scontrol failed", where="Slurm", fix="scontrol ping")

    monkeypatch.setattr(slurm_queue, "run", killed)
    monkeypatch.setattr(slurm_queue, "job_state", lambda job_id: states.pop(0))
    monkeypatch.setattr(slurm_queue, "exclude_nodes", lambda job_id, nodes: excluded.extend(nodes))
    Restart(attempt, "7", "requeue").ask(bad_nodes=["n2"])
    assert attempt.events()[-1]["event"] == event
    assert excluded == (["n2"] if event == "exclude" else [])


def test_a_job_that_ended_as_it_was_stopped_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scancel fails without a word then; with one, or when it is killed, it has failed."""
    scancel = tmp_path / "scancel"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for body, fails in (("exit 1", False), ("echo scancel: error: no such luck >&2; exit 1", True), ("kill -9 $$", True)):
        scancel.write_text(f"#!/bin/sh\n{body}\n")
        scancel.chmod(0o755)
        if fails:
            with pytest.raises(UnavailableError, match=r"no such luck|ended by a signal"):
                slurm_queue.signal_steps("7", "INT")
        else:
            slurm_queue.signal_steps("7", "INT")
            slurm_queue.cancel(["7"])


def test_a_deadline_leaves_room_for_the_measured_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    deadline = Deadline(now + 60.0)
    assert not deadline.is_near()
    events: list[str] = []
    deadline.noting(lambda kind, **facts: events.append(kind))("checkpoint", seconds=20.0)
    assert events == ["checkpoint"]
    now += 10.0
    assert not deadline.is_near()
    now += 8.0
    assert deadline.is_near()
    assert not Deadline(None).is_near()


def test_ports_to_meet_at_lie_outside_of_those_the_kernel_hands_out() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    *ports, any_port = meeting.candidate_ports()
    assert any_port == 0
    assert ports
    assert all(not first <= port <= last for port in ports)


def test_rank_0_takes_another_port_when_the_first_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    free = next(port for port in meeting.candidate_ports() if port != taken.port)
    monkeypatch.setattr(meeting, "candidate_ports", lambda: [taken.port, free, 0])
    store = meeting._listen(WorkerEnv(run_dir="/", attempt=1), meeting.datetime.timedelta(seconds=5))
    assert store.port == free


def test_a_first_node_whose_name_means_this_node_is_refused() -> None:
    with pytest.raises(PreflightError, match="this node itself"):
        meeting._refuse_loopback("localhost", 4)


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "CONNECT_TIMEOUT_S", 0.3)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    store.set("here/2", "node1")
    with pytest.raises(FactoryTrainError, match=r"2 of 4 ranks did not connect within .*: 1, 3"):
        meeting._await_all(store, WorkerEnv(run_dir="/", attempt=1, world_size=4))


def test_rank_0_that_never_publishes_is_reported_in_bounded_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meeting, "CONNECT_TIMEOUT_S", 0.3)
    env = WorkerEnv(run_dir="/", attempt=1, rank=1, world_size=2, local_world_size=2)
    with pytest.raises(FactoryTrainError, match="did not publish its address"):
        meeting._connect(env, tmp_path / "rendezvous.json", meeting.datetime.timedelta(seconds=5), False)


def test_submitting_imports_neither_torch_nor_mlflow() -> None:
    program = (
        "import sys; import factory_train.commands.submission, submitit.slurm.slurm;"
        "print([m for m in ('torch', 'mlflow', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=command.environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
