"""What tests want to know of runs of islands, whatever has started them."""

from __future__ import annotations

from pathlib import Path

from slurm_cluster import told

from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.checkpoint.compare import compare
from factory_train.checkpoint.reader import CheckpointReader
from factory_train.distributed.board import FolderBoard
from factory_train.gangs import exchange_folder, island_run, islands_of
from factory_train.run_dir import RunDir


def curve(run: RunDir, island: str) -> list[tuple[int, float, float, int]]:
    """Returns step, loss, gradient norm and samples of every step of an island."""
    rows = [row for row in island_run(run, island).metrics() if row["kind"] == "train"]
    return [(row["step"], row["loss"], row["grad_norm"], row["data_hash"]) for row in rows]


def check_same(run: RunDir, other: RunDir) -> None:
    """Checks that two runs computed the same, bit for bit: every step of every island, and the outer state at the end."""
    for island in islands_of(other):
        assert curve(run, island.name) == curve(other, island.name), island.name
    with CheckpointReader(list_checkpoints(run)[0].path) as first, CheckpointReader(list_checkpoints(other)[0].path) as second:
        assert not [str(found) for found in compare(first, second) if not found.equal]


def check_agreement(run: RunDir, step: int) -> None:
    """Checks that all islands made the last step and hold the same outer state."""
    prints = {}
    for island in islands_of(run):
        newest = list_checkpoints(island)[0]
        assert newest.step == step, island.name
        with CheckpointReader(newest.path) as reader:
            prints[island.name] = reader.state["diloco"]["fingerprint"]
    assert len(set(prints.values())) == 1, prints
    assert list_checkpoints(run)[0].step == step


def step_of(run: RunDir, island: str) -> int:
    """Returns the step an island said that it is at."""
    beat = FolderBoard(exchange_folder(run)).beats().get(island)
    return beat.step if beat else 0


def num_attempts(run: RunDir, island: str) -> int:
    """Returns how often an island was started."""
    home = island_run(run, island)
    return len(home.attempt_numbers()) if home.path.is_dir() else 0


def is_given_up(run: RunDir, island: str) -> bool:
    """Returns whether its launcher has said that it does not start it any more."""
    attempt = island_run(run, island).last_attempt()
    verdict = attempt.verdict() if attempt else None
    return verdict is not None and "not tried again" in verdict.reason


def is_member(run: RunDir, island: str) -> bool:
    """Returns whether the newest attempt of an island takes part."""
    board = FolderBoard(exchange_folder(run))
    epoch, beat = board.epoch(), board.beats().get(island)
    return epoch is not None and beat is not None and epoch.has(island, num_attempts(run, island)) and beat.epoch == epoch.number


def told_by_all(run: RunDir) -> str:
    """Returns what a failed wait should show."""
    drivers = [f"{path}\n{_end(path)}" for path in sorted(run.path.rglob("driver.log"))]
    return "\n".join([*map(told, [run, *islands_of(run)]), *drivers])


def _end(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-8:])
