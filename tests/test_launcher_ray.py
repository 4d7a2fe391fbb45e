"""What the Ray launcher asks for, says and decides, with no Ray cluster: HTTP, tokens, room, attempts, one node's processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import command
import pytest
from checkpoint_cases import new_run
from conftest import REPOSITORY
from scripted_end import Quiet, dies_after_a_look

from factory_train import storage, switches
from factory_train.commands.status import run_status
from factory_train.config import ElasticConfig, LauncherConfig
from factory_train.distributed.board import Beat, FolderBoard
from factory_train.errors import ConfigError, FactoryTrainError, PolicyError, PreflightError, UnavailableError
from factory_train.gangs import exchange_folder, new_island_attempt
from factory_train.launchers import ray_api, ray_entry, ray_jobs, ray_options, ray_own, ray_room
from factory_train.launchers.by_name import is_alive
from factory_train.launchers.child import Child
from factory_train.launchers.job import Gang, WorkerEnv
from factory_train.launchers.ray_agent import NodeAgent
from factory_train.launchers.ray_api import RayApi
from factory_train.launchers.ray_jobs import RayHandle
from factory_train.launchers.ray_room import NodeRoom, Wanted
from factory_train.run_dir import Attempt

GOLDEN = Path(__file__).parent / "golden" / "ray.txt"
TOKEN = "t" * 64


class Dashboard(BaseHTTPRequestHandler):
    """What a Ray dashboard answers."""

    token: str | None = None
    version = "2.60.0"
    jobs: dict[str, dict[str, Any]] = {}
    seen: list[str] = []

    def do_GET(self) -> None:
        said = self.headers.get("Authorization")
        type(self).seen.append(f"{self.path} {said}")
        if self.token and said is None:
            return self._answer(401, "Unauthorized: Missing authentication token")
        if self.token and said != f"Bearer {self.token}":
            return self._answer(403, "Forbidden: Invalid authentication token")
        if self.path == "/api/version":
            return self._answer(200, {"version": "4", "ray_version": self.version})
        if self.path.startswith("/api/v0/nodes"):
            rows = [
                {"node_name": "a", "state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": 4.0}},
                {"node_name": "b", "state": "DEAD", "resources_total": {"CPU": 8.0, "GPU": 4.0}},
            ]
            return self._answer(200, {"data": {"result": {"result": rows}}})
        if self.path == "/api/jobs/":
            return self._answer(200, list(self.jobs.values()))
        job = self.jobs.get(self.path.rpartition("/")[2])
        return self._answer(200, job) if job else self._answer(404, "Job does not exist")

    def _answer(self, status: int, said: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(said.encode() if isinstance(said, str) else json.dumps(said).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    for name, value in {"token": None, "version": "2.60.0", "jobs": {}, "seen": []}.items():
        monkeypatch.setattr(Dashboard, name, value)
    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def token_file(path: Path, text: str = TOKEN, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_is_sent_only_to_a_cluster_that_asks_for_it(dashboard: str, tmp_path: Path) -> None:
    token_file(tmp_path / "token")
    assert RayApi.connect(dashboard).token is None
    assert Dashboard.seen == ["/api/version None"]
    Dashboard.token = TOKEN
    assert RayApi.connect(dashboard).token == TOKEN


def test_no_token_another_one_and_one_that_others_can_read_are_refused(dashboard: str, tmp_path: Path) -> None:
    Dashboard.token = TOKEN
    with pytest.raises(PolicyError, match="wants a token, and there is none") as refused:
        RayApi.connect(dashboard)
    assert refused.value.fix
    token_file(tmp_path / "token", "u" * 64)
    with pytest.raises(PolicyError, match="does not accept this token"):
        RayApi.connect(dashboard)
    token_file(tmp_path / "token", mode=0o644)
    with pytest.raises(PolicyError, match="others can read") as refused:
        RayApi.connect(dashboard)
    assert "chmod 600" in str(refused.value.fix)


@pytest.mark.parametrize(
    ("setup", "code", "words"),
    [
        ("nothing there", 69, "no Ray dashboard answers"),
        ("token wanted", 77, "wants a token"),
        ("other version", 3, "the cluster runs Ray 1.0.0"),
        ("too small", 3, "fix: launcher.nodes=1"),
    ],
)
def test_what_stands_in_the_way_of_submitting_has_its_exit_code_and_a_fix(
    dashboard: str, tmp_path: Path, setup: str, code: int, words: str
) -> None:
    pytest.importorskip("ray")
    from importlib import metadata

    Dashboard.version = "1.0.0" if setup == "other version" else metadata.version("ray")
    Dashboard.token = TOKEN if setup == "token wanted" else None
    address = "http://127.0.0.1:9" if setup == "nothing there" else dashboard
    text = tmp_path / "text.txt"
    text.write_text(Path(subprocess.__file__).read_text())
    gang = ("recipe=llama_fsdp", "launcher=ray", "launcher.nodes=2", "launcher.tasks_per_node=2", f"launcher.address={address}")
    done = command.run(*gang, f"data.path={text}", *command.SMALL, "run=refused", cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stderr
    assert "fix: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "llama_fsdp-refused").exists()


@pytest.mark.parametrize(
    ("setup", "code", "words"),
    [
        ("open", 0, "takes jobs from anybody"),
        ("with token", 0, "ray token is wanted, and the one here is accepted"),
        ("other version", 3, "the cluster runs Ray 1.0.0"),
        ("nothing there", 3, "no Ray dashboard answers"),
    ],
)
def test_doctor_tells_about_the_cluster(dashboard: str, tmp_path: Path, setup: str, code: int, words: str) -> None:
    from importlib import metadata

    Dashboard.version = "1.0.0" if setup == "other version" else metadata.version("ray")
    Dashboard.token = TOKEN if setup == "with token" else None
    token_file(tmp_path / "token")
    Dashboard.jobs = {"j": {"status": "RUNNING"}}
    address = "http://127.0.0.1:9" if setup == "nothing there" else dashboard
    done = command.run("doctor", f"launcher.address={address}", cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in " ".join(done.stdout.split())
    if setup != "nothing there":
        assert "1 of 1 jobs running or waiting" in done.stdout
        assert "1 with 8 CPU and 4 GPU" in done.stdout


def test_a_dry_run_prints_the_job_where_there_is_no_ray(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(subprocess.__file__).read_text())
    words = ("recipe=llama_fsdp", "launcher=ray", "launcher.address=http://head:8265", "launcher.nodes=2", "launcher.gpus_per_node=4")
    more = ("launcher.tasks_per_node=4", "run=golden", f"data.path={text}", *command.SMALL, "tracking=none", "--dry-run")
    program = "import sys; sys.modules['ray'] = None; import factory_train.cli as cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *words, *more], cwd=tmp_path, env=command.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout[done.stdout.index("ray: POST") :]
    for found, name in ((str(tmp_path), "WORK"), (sys.executable, "PYTHON"), (str(REPOSITORY), "CLONE")):
        said = said.replace(found, name)
    assert "\n".join(line.rstrip() for line in said.splitlines()) + "\n" == GOLDEN.read_text()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("wanted", "environ", "address"),
    [
        ("http://head:8265/", {}, "http://head:8265"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "http://10.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "ray://head:10001"}, "http://head:8265"),
        (None, {"RAY_ADDRESS": "auto"}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_API_SERVER_ADDRESS": "http://10.0.0.2:1"}, "http://10.0.0.2:1"),
        ("[fd00::1]:6379", {}, "http://[fd00::1]:8265"),
    ],
)
def test_the_dashboard_is_found_from_what_ray_users_set(wanted: str | None, environ: dict[str, str], address: str) -> None:
    assert ray_api.dashboard_address(wanted, environ) == address


def test_no_address_is_refused_with_all_ways_to_name_one() -> None:
    with pytest.raises(ConfigError) as refused:
        ray_api.dashboard_address(None, {})
    assert "launcher.address=local" in str(refused.value.fix)


def room(cpus: float, gpus: float = 0, free: float | None = None, **more: float) -> NodeRoom:
    total = {"CPU": cpus, "GPU": gpus, **more}
    return NodeRoom("node", total, None if free is None else {**total, "CPU": free})


GIB = 2**30


@pytest.mark.parametrize(
    ("wanted", "nodes", "what", "fix"),
    [
        (Wanted(4, 8, 1, 8), [room(64, 8)] * 2, "the cluster has 2 nodes, the largest with 64 CPU and 8 GPU", "launcher.nodes=2"),
        (Wanted(2, 4, 1, 0), [room(3)] * 2, "largest with 3 CPU", "launcher.tasks_per_node=3"),
        (Wanted(2, 8, 1, 8), [room(64, 4)] * 2, "4 GPU", "launcher.tasks_per_node=4 launcher.gpus_per_node=4"),
        (Wanted(1, 1, 8, 0), [room(4)], "1 node with 8 CPU are needed", "launcher.cpus_per_task=FEWER"),
        (Wanted(1, 1, 1, 0), [], "no node that takes work", None),
        (Wanted(2, 2, 1, 0), [room(4, free=4), room(4, free=1)], "2 are large enough, 1 of them free: it waits", None),
        (
            Wanted(2, 2, 1, 0, 64 * GIB),
            [room(4, memory=16.5 * GIB), room(4, memory=80 * GIB)],
            "2 nodes with 2 CPU and 64 GiB of memory each are needed, and the cluster has 2 nodes, the largest with 4 CPU and 80 GiB",
            "launcher.nodes=1 or launcher.memory=16G",
        ),
        (Wanted(1, 2, 1, 0, 0, {"disk": 1.0}), [room(4)], "the largest with 4 CPU and 0 disk", "launcher.resources={}"),
        (
            Wanted(1, 2, 1, 0, gangs=3),
            [room(4), room(2, free=0)],
            "3 islands of 1 node with 2 CPU are needed; they are not free together: it waits",
            None,
        ),
        (
            Wanted(2, 2, 1, 0, gangs=3),
            [room(2)] * 5,
            "the cluster has 5 nodes",
            "diloco.islands=2 or launcher.nodes=1 or launcher.tasks_per_node=1",
        ),
    ],
)
def test_a_gang_without_a_place_says_what_is_there_and_what_would_fit(
    wanted: Wanted, nodes: list[NodeRoom], what: str, fix: str | None
) -> None:
    found = ray_room.shortage(wanted, nodes)
    assert found is not None
    assert what in found.what
    assert found.fix == fix


def test_a_gang_that_fits_has_no_shortage_and_one_node_never_gives_two_shares() -> None:
    assert ray_room.shortage(Wanted(2, 2, 1, 0), [room(2), room(2)]) is None
    assert ray_room.shortage(Wanted(2, 2, 1, 0), [room(4)]) is not None


def test_islands_share_nodes_and_the_nodes_of_one_are_different() -> None:
    assert ray_room.shortage(Wanted(1, 2, 1, 0, gangs=2), [room(4)]) is None
    assert ray_room.shortage(Wanted(2, 2, 1, 0, gangs=2), [room(4), room(4)]) is None
    # Room for four bundles, and two of them are on one node.
    assert ray_room.num_gangs(Wanted(2, 2, 1, 0, gangs=2), [room(6), room(2)]) == 1
    assert ray_room.num_gangs(Wanted(2, 2, 1, 0, gangs=2), [room(4), room(2), room(2)]) == 2


def test_memory_and_resources_of_the_site_are_part_of_every_nodes_share() -> None:
    options = LauncherConfig(memory="1.5", tasks_per_node=2, cpus_per_task=3)
    with pytest.raises(ConfigError, match="no amount of memory"):
        ray_options.wanted((Gang("main", 2, 2),), options)
    for text, size in (("64G", 64 * GIB), ("512", 512 * 2**20), ("2tb", 2 * 2**40)):
        options = LauncherConfig(memory=text, cpus_per_task=3, gpus_per_node=4, resources={"disk": 0.5})
        wanted = ray_options.wanted((Gang("main", 2, 2),), options)
        assert wanted.bundle == {"CPU": 6.0, "GPU": 4.0, "memory": float(size), "disk": 0.5}
    islands = ray_options.wanted((Gang("island-0", 1, 2), Gang("island-1", 1, 2)), LauncherConfig())
    assert (islands.gangs, islands.bundle) == (2, {"CPU": 2.0})


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (LauncherConfig(nodes=2, elastic=ElasticConfig(min_nodes=3)), "launcher.elastic.min_nodes"),
        (LauncherConfig(nodes=2, address="local"), "launcher.nodes"),
        (LauncherConfig(requeue="chain"), "launcher.requeue"),
        (LauncherConfig(then=["export"]), "launcher.then"),
        (LauncherConfig(container="image"), "launcher.container"),
        (LauncherConfig(memory="0"), "launcher.memory"),
        (LauncherConfig(memory="much"), "launcher.memory"),
        (LauncherConfig(resources={"GPU": 1.0}), "launcher.resources"),
        (LauncherConfig(resources={"disk": 1.5}), "launcher.resources"),
    ],
)
def test_ray_keys_that_cannot_be_right_are_refused(options: LauncherConfig, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ray_options.check(options)
    assert refused.value.where == key
    assert refused.value.fix


def test_islands_keep_their_size() -> None:
    options = LauncherConfig(nodes=2, address="http://head:8265", elastic=ElasticConfig(min_nodes=1))
    assert ray_options.check(options) == "http://head:8265"
    with pytest.raises(ConfigError, match=r"down to diloco\.quorum") as refused:
        ray_options.check(options, islands=True)
    assert refused.value.where == "launcher.elastic.min_nodes"


QUIET: Any = Quiet()


def begun(tmp_path: Path, address: str = "http://127.0.0.1:9", **spec: Any) -> Attempt:
    attempt = new_run(tmp_path)
    orders = {"requeue": "requeue", "fabric": "loopback", "interface": None, "environ": {}, "meets_others": False}
    storage.write_json(attempt.launch / "ray.json", orders | spec)
    job = {"launcher": "ray", "job_id": "j", "job_ids": ["j"], "address": address, "token_path": None, "attempt": 1}
    storage.write_json(attempt.job_path, job | {"run_dir": str(attempt.run.path)})
    return attempt


def handle_of(attempt: Attempt) -> RayHandle:
    return RayHandle(storage.read_json(attempt.job_path))


def test_a_job_that_waits_says_why_and_how_to_shrink_it(dashboard: str, tmp_path: Path) -> None:
    attempt = begun(tmp_path, dashboard)
    Dashboard.jobs["j"] = {"status": "RUNNING"}
    storage.write_json(attempt.launch / ray_jobs.PLACEMENT_NAME, {"state": "waiting", "what": "too large", "fix": "launcher.nodes=1"})
    job = handle_of(attempt).queued()
    assert job is not None
    assert (job.status, job.why) == ("pending", "too large: launcher.nodes=1")
    storage.write_json(attempt.launch / ray_jobs.PLACEMENT_NAME, {"state": "placed", "nodes": ["a", "b"]})
    job = handle_of(attempt).queued()
    assert job is not None
    assert (job.status, job.nodes) == ("running", "a, b")


def test_status_says_what_an_island_without_a_place_lacks(tmp_path: Path) -> None:
    attempt = begun(tmp_path)
    island = new_island_attempt(attempt.run, "island-0", attempt.config())
    storage.write_json(island.launch / ray_jobs.PLACEMENT_NAME, {"state": "waiting", "what": "1 node with 2 CPU are needed", "fix": None})
    assert run_status(attempt.run).islands == "island-0 waits (1 node with 2 CPU are needed)"
    storage.write_json(island.launch / ray_jobs.PLACEMENT_NAME, {"state": "placed", "nodes": ["a"]})
    FolderBoard(exchange_folder(attempt.run)).write_beat(Beat("island-0", 1, step=7))
    assert run_status(attempt.run).islands == "island-0 joining at step 7"


@pytest.mark.parametrize(
    ("job", "outcome", "words"),
    [
        (
            {"status": "FAILED", "message": "exit code 3, last logs:\nno python here", "driver_exit_code": 3},
            "failed-user",
            "no python here",
        ),
        ({"status": "FAILED", "message": "the job's actor died", "driver_exit_code": None}, "failed-transient", "actor died"),
        (None, "failed-transient", "does not know the job any more"),
    ],
)
def test_a_job_that_ended_without_a_word_is_explained_by_whoever_looks(
    dashboard: str, tmp_path: Path, job: dict[str, Any] | None, outcome: str, words: str
) -> None:
    attempt = begun(tmp_path, dashboard)
    Dashboard.jobs = {"j": job} if job else {}
    assert handle_of(attempt).status() == "ended"
    verdict = attempt.verdict()
    assert verdict is not None
    assert verdict.outcome == outcome
    assert words in verdict.reason


def test_another_cluster_at_the_address_does_not_speak_for_a_job_that_lives(dashboard: str, tmp_path: Path) -> None:
    attempt = begun(tmp_path, dashboard)
    (attempt.path / "heartbeat" / "launcher").touch()
    with pytest.raises(UnavailableError, match="does not know the job, whose processes live"):
        handle_of(attempt).status()
    assert attempt.verdict() is None
    assert is_alive(attempt.run)


def test_a_dashboard_that_is_away_for_a_moment_has_not_lost_the_job(
    dashboard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = begun(tmp_path, dashboard)
    Dashboard.jobs["j"] = {"status": "RUNNING"}
    handle = handle_of(attempt)
    assert handle.status() == "running"
    monkeypatch.setattr(ray_jobs, "_FRESH_S", -1.0)

    def away(*_: Any) -> Any:
        raise UnavailableError("gone")

    monkeypatch.setattr(ray_api, "_request", away)
    assert handle.status() == "running"
    monkeypatch.setattr(ray_jobs, "_PATIENCE_S", -1.0)
    with pytest.raises(UnavailableError):
        handle.status()


def test_sigterm_makes_room_sigint_stops_and_a_second_one_ends(dashboard: str, tmp_path: Path) -> None:
    attempt = begun(tmp_path, dashboard)
    Dashboard.jobs["j"] = {"status": "RUNNING"}
    handle_of(attempt).signal(signal.SIGTERM)
    assert switches.is_on(attempt.run, switches.PREEMPT)
    assert not switches.is_on(attempt.run, switches.STOP)
    switches.turn_off(attempt.run, switches.PREEMPT)
    handle_of(attempt).signal(signal.SIGINT)
    assert switches.is_on(attempt.run, switches.STOP)
    assert attempt.verdict() is None


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [("preempted", True), ("failed-transient", True), ("done", False), ("interrupted", False), ("failed-user", False), ("killed", False)],
)
def test_an_attempt_follows_only_where_it_makes_sense(tmp_path: Path, outcome: str, expected: bool) -> None:
    attempt = begun(tmp_path)
    attempt.write_verdict(outcome, 1, step=None, reason="so it was")
    assert ray_entry.goes_on(attempt, QUIET) is expected


@pytest.mark.parametrize("switch", [switches.STOP, switches.PREEMPT])
def test_no_attempt_follows_where_a_person_or_a_scheduler_wants_an_end(tmp_path: Path, switch: str) -> None:
    attempt = begun(tmp_path)
    attempt.write_verdict("preempted", 75, step=None, reason="saved")
    switches.turn_on(attempt.run, switch)
    assert not ray_entry.goes_on(attempt, QUIET)


def test_restarts_that_nobody_wants_are_left_out(tmp_path: Path) -> None:
    attempt = begun(tmp_path, requeue="never")
    attempt.write_verdict("failed-transient", 1, step=None, reason="node lost")
    assert not ray_entry.goes_on(attempt, QUIET)


def test_attempts_that_never_had_a_place_stop_after_three(tmp_path: Path) -> None:
    attempt = begun(tmp_path)
    for number in (1, 2, 3):
        attempt.write_verdict("failed-transient", 69, step=None, reason="cannot join the cluster")
        assert ray_entry.goes_on(attempt, QUIET) is (number < 3)
        attempt = attempt.run.new_attempt(attempt.config())
        storage.write_json(attempt.launch / "ray.json", {"requeue": "requeue"})


def test_a_driver_that_dies_gets_its_verdict_from_the_process_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = begun(tmp_path)
    monkeypatch.setattr(ray_entry, "_DRIVER", "no.such.module")
    code = ray_entry.run_attempt(attempt, "j", QUIET)
    verdict = attempt.verdict()
    assert verdict is not None
    assert (code, verdict.outcome) == (1, "failed-transient")
    assert "exited with code 1" in verdict.reason


class Script:
    """An agent on this machine whose ranks do what a script says."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: dict[str, str]) -> None:
        monkeypatch.setenv("SCRIPT", json.dumps(script))
        monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{REPOSITORY / 'tests'}")
        self.before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)}
        self.attempt = begun(tmp_path, worker_module="scripted_worker", python=sys.executable)
        self.agent = NodeAgent(str(self.attempt.run.path), 1)

    def start(self, stage: str, size: int) -> None:
        orders = WorkerEnv(run_dir=str(self.attempt.run.path), attempt=1, world_size=size, local_world_size=size, lifeline=1)
        from dataclasses import replace

        self.agent.start(stage, [replace(orders, rank=rank, local_rank=rank) for rank in range(size)])

    def exits(self, count: int) -> dict[int, int]:
        limit = time.monotonic() + 60
        while len(found := self.agent.poll()[0]) < count:
            assert time.monotonic() < limit
            time.sleep(0.05)
        return {found.rank: found.code for found in found}

    def close(self) -> None:
        self.agent.end()
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def test_an_agent_reports_its_ranks_and_explains_the_one_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Script(tmp_path, monkeypatch, {"train:1": "killed"})
    try:
        node.start("train", 2)
        assert node.exits(2) == {0: 0, 1: 1}
        error = node.attempt.error()
        assert error is not None
        assert (error["rank"], error["signal"]) == (1, "SIGKILL")
        assert (node.attempt.launch / "train.done").exists()
    finally:
        node.close()


def test_an_agent_explains_an_end_before_it_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the rank dies while the agent looks: who hears of the last end goes on at once."""
    monkeypatch.setattr(Child, "running", dies_after_a_look())
    node = Script(tmp_path, monkeypatch, {"train:1": "killed"})
    try:
        node.start("train", 2)
        found: list[int] = []
        limit = time.monotonic() + 60
        while len(found) < 2:
            assert time.monotonic() < limit
            found = [end.rank for end in node.agent.poll()[0]]
            assert (0 in found) == (node.attempt.launch / "train.done").exists()
            assert (1 in found) == (node.attempt.error() is not None)
            time.sleep(0.02)
    finally:
        node.close()


def test_a_notice_to_an_agent_reaches_its_ranks_and_counts_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Script(tmp_path, monkeypatch, {"train:0": "train", "train:1": "train"})
    try:
        node.start("train", 2)
        limit = time.monotonic() + 60
        while not all((node.attempt.path / f"started-train-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert not node.agent.poll()[2]
        os.kill(os.getpid(), signal.SIGTERM)
        # scripted ranks save and exit 75: for the stage they have done what they were asked to.
        assert node.exits(2) == {0: 0, 1: 0}
        assert node.agent.poll()[2]
        verdict = node.attempt.verdict()
        assert verdict is not None
        assert verdict.outcome == "preempted"
    finally:
        node.close()


def test_an_agent_ends_what_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Script(tmp_path, monkeypatch, {"train:0": "hang-with-child"})
    try:
        node.start("train", 1)
        grandchild = node.attempt.path / "grandchild"
        limit = time.monotonic() + 60
        while not grandchild.exists() or not grandchild.read_text():
            assert time.monotonic() < limit
            time.sleep(0.05)
        node.agent.end()
        assert node.exits(1) == {0: 1}
        assert node.attempt.error() is None
        while Path(f"/proc/{grandchild.read_text()}/cmdline").exists() and Path(f"/proc/{grandchild.read_text()}/cmdline").read_bytes():
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        node.close()


def test_our_own_cluster_keeps_its_token_and_folder_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORY_TRAIN_RAY", str(tmp_path / "own"))
    home = ray_own.folder()
    assert home.stat().st_mode & 0o777 == 0o700
    line = ray_own.start_command(home, 4321)
    assert "--dashboard-host=127.0.0.1" in line
    assert "--dashboard-port=4321" in line
    home.chmod(0o755)
    with pytest.raises(PolicyError):
        ray_own.folder()
    assert issubclass(PolicyError, FactoryTrainError)
    assert PreflightError.exit_code != PolicyError.exit_code


def test_submitting_imports_neither_torch_nor_mlflow_nor_ray() -> None:
    program = (
        "import sys; import factory_train.commands.submission, factory_train.launchers.ray_entry, factory_train.commands.doctor;"
        "print([m for m in ('torch', 'mlflow', 'ray', 'requests', 'aiohttp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], env=command.environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
