"""Islands of one rank each, as threads: a small least-squares problem, plain SGD inside, everything else real."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from unrecorded import stop_recording

from factory_train.checkpoint.agreement import Ranks
from factory_train.data.leases import Deal, LeasedCursor
from factory_train.diloco import OuterLoop
from factory_train.diloco_config import DilocoConfig
from factory_train.diloco_schedule import Schedule, assign_fragments, names_by_fragment
from factory_train.distributed.board import Beat, Epoch
from factory_train.distributed.coordination import Rules
from factory_train.distributed.exchange import Exchange
from factory_train.distributed.gang import Copies
from factory_train.distributed.membership import Membership, Planner, Start
from factory_train.distributed.outer_state import OuterState
from factory_train.distributed.tcp_board import open_board

stop_recording()

CPU = torch.device("cpu")
SHAPES = {"embedding": (40, 8), "layers.0.w": (17, 9), "layers.0.norm": (9,), "layers.1.w": (300,), "layers.2.w": (5, 70), "norm": (9,)}


def parameters(dtype: torch.dtype = torch.float32, grid: float | None = None) -> dict[str, torch.Tensor]:
    """The same initial parameters for everybody; multiples of `grid` where it is given."""
    generator = torch.Generator().manual_seed(5)
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    if grid:
        values = {name: (value / grid).round() * grid for name, value in values.items()}
    return {name: value.to(dtype) for name, value in values.items()}


def gradient(name: str, value: torch.Tensor, sample: int, grid: float | None = None) -> torch.Tensor:
    """Of |value - target|^2 / 2, the target being that of a sample."""
    seed = sample * 100 + sorted(SHAPES).index(name)
    target = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(value)
    if grid:
        return (target / grid).round() * grid
    return value - target


@dataclass
class Toy:
    """One island's training.

    Args:
        values: its parameters.
        cfg: section diloco.
        steps: of the run.
        lr: of SGD.
    """

    folder: Path
    name: str
    cfg: DilocoConfig
    steps: int
    lr: float = 0.1
    incarnation: int = 1
    layout: str = ""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    grid: float | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    outer: OuterLoop | None = None
    before_step: Callable[[Toy, int], None] = lambda toy, step: None

    def __post_init__(self) -> None:
        self.values = {name: value.to(self.device) for name, value in parameters(self.dtype, self.grid).items()}

    def build(self) -> OuterLoop:
        cfg, names = self.cfg, [f"island-{index}" for index in range(self.cfg.islands)]
        sizes = {name: value.numel() for name, value in self.values.items()}
        fragments = names_by_fragment(assign_fragments(sizes, cfg.fragments, cfg.pattern), sizes)
        state = OuterState(self.values, fragments, cfg.payload, error_feedback=cfg.error_feedback)
        schedule = Schedule(cfg.fragments, cfg.sync_every, cfg.delay, self.steps)
        board = open_board(self.folder, self.cfg.rendezvous)

        def after_failure(epoch: Epoch, survivors: tuple[str, ...], lost: tuple[str, ...], step: int, completed: int) -> dict[str, Any]:
            return Deal.from_json(epoch.deal).next(step, survivors, lost, schedule.sent_step(completed)).to_json()

        planner = Planner(lambda found: Start(0, Deal.opening(cfg.sync_every, found).to_json(), tuple(found)), after_failure, self.steps)
        rules = Rules(tuple(names), cfg.quorum, cfg.silence_s, cfg.grace_s)
        membership = Membership(board, rules, Beat(self.name, self.incarnation, layout=self.layout), planner, self.record)
        exchange = Exchange(self.name, self.incarnation, Ranks(0, 1), Copies(), board, membership, state, cfg.grace_s)
        self.outer = OuterLoop(cfg, schedule, state, exchange, Copies(), self.load, self.record)
        return self.outer

    def load(self, epoch: Epoch) -> None:
        assert epoch.step == 0
        assert self.outer is not None
        for name, value in parameters(self.dtype, self.grid).items():
            self.values[name].copy_(value)
        self.outer.state.copy_inner_to_outer()
        self.outer.restart_at(0)

    def record(self, kind: str, **facts: Any) -> None:
        self.events.append((kind, facts))

    def run(self) -> Toy:
        torch.set_num_threads(1)
        outer = self.build()
        try:
            step = outer.begin()
            while step < self.steps:
                self.before_step(self, step)
                self.inner_step(outer.deal, step)
                step = outer.after_step(step + 1)
        finally:
            outer.close()
        return self

    def inner_step(self, deal: Deal, step: int) -> None:
        (sample,), _ = LeasedCursor(deal, self.name, step).take(1)
        self.samples.append(sample)
        for name, value in self.values.items():
            value -= self.lr * gradient(name, value, sample, self.grid)

    def outer_values(self) -> dict[str, torch.Tensor]:
        assert self.outer is not None
        return self.outer.state.named("outer")

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [facts for name, facts in self.events if name == kind]


def config(**settings: Any) -> DilocoConfig:
    """Silence and grace are long: a busy machine keeps a thread waiting for seconds, and no test waits for them that does not say so."""
    return DilocoConfig(**{"islands": 2, "silence_s": 30.0, "grace_s": 30.0, "sync_every": 4, "payload": "none"} | settings)


def run_toys(toys: list[Toy], timeout_s: float = 240.0) -> list[Toy]:
    """Runs islands together.

    Raises:
        Exception: what the first of them raised.
    """
    failures: list[BaseException] = []

    def run(toy: Toy) -> None:
        try:
            toy.run()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(toy,), daemon=True) for toy in toys]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))
        if thread.is_alive() and not failures:
            raise AssertionError(f"an island hangs: {[toy.events[-1:] for toy in toys]}")
    if failures:
        raise failures[0]
    return toys


def train(folder: Path, *, steps: int = 13, cfg: DilocoConfig, **toy: Any) -> list[Toy]:
    folder.mkdir(parents=True, exist_ok=True)
    return run_toys([Toy(folder, f"island-{index}", cfg, steps, **toy) for index in range(cfg.islands)])


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
