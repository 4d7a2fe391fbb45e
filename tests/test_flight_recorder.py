"""Records of PyTorch's flight recorder: real ones, of ranks over gloo, and what must not be read as one."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from factory_train import cli, flight_recorder
from factory_train.console import failure_lines
from factory_train.flight_recorder import PREFIX, explain, first_stopped, groups_of, read_dump, read_groups
from factory_train.run_dir import Attempt

RANKS = 3


def record(folder: Path, case: str) -> Path:
    folder.mkdir()
    script = str(Path(__file__).parent / "flight_ranks.py")
    environ = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), str(RANKS), str(folder), case], env=environ, stderr=subprocess.DEVNULL)
        for rank in range(RANKS)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * RANKS
    return folder


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three ranks leave of which rank 1 did not come to the sixth all-reduce."""
    return record(tmp_path_factory.mktemp("recorder") / "behind", "behind")


def put(attempt: Attempt, folder: Path, *, without: int | None = None) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        if path.name != f"{PREFIX}{without}":
            shutil.copy(path, attempt.path / "logs" / path.name)


def test_the_rank_that_did_not_come_is_named_with_the_collective_and_the_line(attempt: Attempt, behind: Path) -> None:
    put(attempt, behind)
    groups, unread = read_groups(attempt)
    assert not unread
    assert [(group.name, group.ranks) for group in groups] == [("default_pg", (0, 1, 2))]
    found = first_stopped(groups)
    assert found is not None
    assert found.ranks == (1,)
    assert found.text.startswith("rank 1 did not enter gloo:all_reduce #6 of 3x2 at flight_ranks.py:")
    assert "of default_pg, which ranks 0, 2 wait in; its last was gloo:all_reduce #5" in found.text


def test_status_and_logs_tell_it(attempt: Attempt, behind: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(attempt, behind)
    attempt.record_error({"stage": "train", "rank": 2, "host": "node1", "message": "a collective timed out"})
    assert any(line.startswith("  collectives: rank 1 did not enter gloo:all_reduce #6") for line in failure_lines(attempt))
    assert cli.main(["logs", str(attempt.run.path), "--collectives"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("rank 1 did not enter")
    assert "  rank 1    left gloo:all_reduce #5 of 3x2" in shown
    assert re.search(r"  rank 2    (in|left) gloo:all_reduce #6 of 3x2", shown)


def test_a_rank_that_called_something_else_is_named(tmp_path: Path) -> None:
    folder = record(tmp_path / "mismatch", "mismatch")
    found = first_stopped(groups_of({rank: read_dump(folder / f"{PREFIX}{rank}") for rank in range(RANKS)}))
    assert found is not None
    assert found.ranks == (1,)
    assert "rank 1 called gloo:broadcast #6" in found.text
    assert "where ranks 0, 2 called gloo:all_reduce #6" in found.text


def test_a_rank_that_left_no_record_stopped_first(attempt: Attempt, behind: Path) -> None:
    """As when it was killed: the others, at one collective, wait for it."""
    put(attempt, behind, without=1)
    for rank in (0, 2):
        path = attempt.path / "logs" / f"{PREFIX}{rank}"
        dump = read_dump(path)
        # NCCL's watchdog writes before it gives a collective up, gloo has given it up by then.
        dump["entries"][-1] |= {"state": "started", "retired": False}
        path.write_bytes(pickle.dumps(dump))
    text = explain(attempt)
    assert text is not None
    assert text.startswith("rank 1 left no record of gloo:all_reduce #6")


def test_the_group_that_waits_longest_is_the_cause() -> None:
    def entry(group: str, seq: int, at: int, done: bool) -> dict[str, object]:
        return {
            "process_group": (group, f"dp{group}"),
            "collective_seq_id": seq,
            "profiling_name": "nccl:all_reduce",
            "input_sizes": [[4]],
            "state": "completed" if done else "started",
            "time_created_ns": at,
            "frames": [{"name": "step", "filename": "/x/trainer.py", "line": 7}],
        }

    config = {"0": {"name": "0", "desc": "dp0", "ranks": "[0, 1]"}, "1": {"name": "1", "desc": "dp1", "ranks": "[1, 2]"}}
    dumps = {
        0: {"entries": [entry("0", 1, 10, True), entry("0", 2, 90, False)], "pg_config": config},
        1: {"entries": [entry("0", 1, 10, True), entry("1", 1, 20, False)], "pg_config": config},
        2: {"entries": [], "pg_config": config},
    }
    found = first_stopped(groups_of(dumps))
    assert found is not None
    assert found.text == "rank 2 left no record of nccl:all_reduce #1 of 4 at trainer.py:7 of dp1, which rank 1 waits in"
    finished = {rank: {"entries": [entry("0", 1, 10, True)], "pg_config": config} for rank in (0, 1)}
    assert first_stopped(groups_of(finished)) is None
    stuck = {rank: {"entries": [entry("0", 1, 10, False)], "pg_config": config} for rank in (0, 1)}
    network = first_stopped(groups_of(stuck))
    assert network is not None
    assert "the network between them" in network.text


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/never",)


def test_a_file_that_would_run_code_or_is_cut_off_is_refused_and_hides_no_other(attempt: Attempt, behind: Path) -> None:
    put(attempt, behind)
    logs = attempt.path / "logs"
    (logs / f"{PREFIX}7").write_bytes(pickle.dumps({"entries": [Evil()]}))
    (logs / f"{PREFIX}8").write_bytes((behind / f"{PREFIX}0").read_bytes()[:-40])
    (logs / f"{PREFIX}9").write_bytes(pickle.dumps([1, 2]))
    groups, unread = read_groups(attempt)
    assert len(unread) == 3
    assert "wants posix.system" in unread[0]
    assert groups[0].ranks == (0, 1, 2)


def test_the_largest_record_that_is_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight_recorder, "_MAX_BYTES", 10)
    path = tmp_path / f"{PREFIX}0"
    path.write_bytes(pickle.dumps({"entries": []}))
    with pytest.raises(ValueError, match="larger than"):
        read_dump(path)


def test_without_records_logs_says_who_names_the_rank(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", str(attempt.run.path), "--collectives"]) == 4
    assert "by its heartbeat" in capsys.readouterr().err
