"""What the plan says of islands: bytes, utilisation, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from factory_train import storage
from factory_train.checks import check_config
from factory_train.config import Config
from factory_train.diloco_config import DilocoConfig
from factory_train.diloco_plan import DilocoPlan, plan_diloco
from factory_train.errors import ConfigError
from factory_train.exchange_figures import measure_exchange
from factory_train.gangs import island_names, new_island_attempt
from factory_train.hardware import Hardware
from factory_train.plan import make_plan
from factory_train.run_dir import Attempt, RunDir

CPU = Hardware("CPU", "cpu", 1, 8 << 30, None)


def plan(params: float = 1e9, **diloco) -> DilocoPlan:
    found = plan_diloco(DilocoConfig(**{"islands": 2, "sync_every": 100} | diloco), int(params), 4)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("diloco", "goal", "gbit_per_s"),
    [
        # Douillard et al. 2025 (arXiv 2501.18512), table 4, 1B parameters, steps of 0.1 s; within their grid of bandwidths.
        ({"payload": "bf16"}, 0.5, 1.4),
        ({"payload": "bf16"}, 0.8, 6.2),
        ({"payload": "bf16"}, 0.9, 13.3),
        ({"payload": "bf16", "fragments": 8, "delay": 1}, 0.5, 1.4),
        ({"payload": "bf16", "fragments": 8, "delay": 1}, 0.8, 4.3),
        ({"payload": "int4", "fragments": 8, "delay": 1}, 0.8, 0.9),
    ],
)
def test_the_closed_form_gives_the_published_bandwidths(diloco: dict, goal: float, gbit_per_s: float) -> None:
    found = 8 * plan(**diloco).bytes_per_s_for(goal, 0.1) / 1e9
    assert found == pytest.approx(gbit_per_s, rel=0.4)


def test_utilisation_and_bandwidth_are_inverse() -> None:
    for settings in ({}, {"fragments": 4, "delay": 2, "payload": "int4"}):
        exchange = plan(**settings)
        for goal in (0.3, 0.9):
            assert exchange.utilisation(0.2, exchange.bytes_per_s_for(goal, 0.2)) == pytest.approx(goal)
    assert plan(fragments=4, delay=2).utilisation(1.0, 1e12) == 1.0


def test_an_islands_batch_is_its_share_and_the_runs_tokens_are_all() -> None:
    cfg = Config(recipe="r")
    cfg.launcher.tasks_per_node = 1
    plain = make_plan(cfg, 512, CPU, True)
    cfg.diloco = DilocoConfig(islands=2, payload="int8")
    island = make_plan(cfg, 512, CPU, True)
    assert island.samples_per_step * 2 == plain.samples_per_step
    assert island.total_tokens == plain.total_tokens
    assert island.memory.outer > 8 * plain.params.total
    assert "2 islands" in island.lines()[0]
    assert "Mbit/s" in island.lines()[0]
    assert island.to_json()["diloco"]["islands"] == 2
    assert plain.diloco is None


@pytest.mark.parametrize(
    ("settings", "key", "fix"),
    [
        ({"islands": -1}, "diloco.islands", "diloco.islands=0"),
        ({"fragments": 9}, "diloco.fragments", "diloco.fragments=4"),
        ({"sync_every": 2, "fragments": 3}, "diloco.fragments", "diloco.fragments=2"),
        ({"sync_every": 8, "fragments": 4, "delay": 3}, "diloco.delay", "diloco.delay=2"),
        ({"mixing": 1.5}, "diloco.mixing", "diloco.mixing=0.5"),
        ({"quorum": 3}, "diloco.quorum", "diloco.quorum=2"),
        ({"islands": 3}, "train.global_batch_tokens", "train.global_batch_tokens=3840"),
        ({"payload": "int3"}, "diloco.payload", "diloco.payload=int8"),
    ],
)
def test_what_cannot_be_is_refused_with_the_override_that_mends_it(settings: dict, key: str, fix: str) -> None:
    cfg = Config(recipe="r")
    cfg.diloco = replace(DilocoConfig(islands=2), **settings)
    with pytest.raises(ConfigError) as caught:
        check_config(cfg)
    assert caught.value.where == key
    assert fix in caught.value.fix
    if "=" in fix and "." in fix:
        name, _, value = fix.rpartition("=")
        section, _, leaf = name.rpartition(".")
        owner = getattr(cfg, section)
        setattr(owner, leaf, type(getattr(owner, leaf))(value))
        check_config(cfg)


def rounds(attempt: Attempt, times: list[float], waited_s: list[float]) -> None:
    for time, waited in zip(times, waited_s, strict=True):
        storage.append_json_line(attempt.metrics_path, {"kind": "sync", "step": 8, "time": time, "waited_s": waited})


def test_what_was_planned_is_measured_on_the_island_that_waited_most(tmp_path: Path) -> None:
    config = Config(recipe="llama_diloco")
    run = RunDir.create(tmp_path, config.recipe, "a")
    run.new_attempt(config)
    assert measure_exchange(run) is None
    first, second = (new_island_attempt(run, name, config) for name in island_names(2))
    rounds(first, [100.0], [9.0])
    assert measure_exchange(run) is None
    rounds(first, [110.0, 120.0], [1.0, 1.0])
    rounds(second, [100.0, 120.0], [50.0, 4.0])
    # The time until the next attempt began is not time between rounds.
    rounds(new_island_attempt(run, "island-1", config), [500.0, 520.0], [50.0, 2.0])
    found = measure_exchange(run)
    assert found is not None
    assert (found.islands, found.rounds, found.island) == (2, 4, "island-1")
    assert found.not_waiting == pytest.approx(1 - 6 / 40)
    assert found.line() == "85.0% of the time not waiting for each other (least: island-1), 4 rounds"
