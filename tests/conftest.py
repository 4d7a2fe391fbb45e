"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rank_pool import RankPool
    from slurm_cluster import Cluster

    from factory_train.run_dir import Attempt

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Runs Triton kernels in the interpreter, except where tests of a card are asked for; Triton decides when it is imported."""
    if config.option.markexpr not in ("gpu", "multigpu"):
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, None]:
    """Under FACTORY_TRAIN_NO_SKIPS a skipped test is a failed one: continuous integration installs everything."""
    outcome = yield
    report = outcome.get_result()
    if os.environ.get("FACTORY_TRAIN_NO_SKIPS") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {report.longrepr}"


@pytest.fixture(autouse=True)
def _own_state_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps tests away from the person's index of run folders."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / "state"))
    monkeypatch.delenv("FACTORY_TRAIN_RUNS", raising=False)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Four processes that save and load checkpoints together."""
    from rank_pool import RankPool

    pool = RankPool("checkpoint_ranks")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm of four nodes on this machine, without accounting; it goes with its module, or launcher=auto of later tests finds it."""
    from slurm_cluster import Cluster

    with Cluster(tmp_path_factory.mktemp("slurm") / "state") as cluster:
        yield cluster


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """The first attempt of an empty run."""
    from checkpoint_cases import new_run

    return new_run(tmp_path)
