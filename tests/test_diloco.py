"""DiLoCo against its definition: what it must equal, bit for bit or to the last digits."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_islands import Toy, config, equal, gradient, parameters, train

from factory_train.data.leases import Deal
from factory_train.diloco_schedule import Schedule, assign_fragments, names_by_fragment
from factory_train.distributed.encoded_reduce import Notice
from factory_train.distributed.flight import Flight
from factory_train.distributed.gloo_wire import GlooWire
from factory_train.distributed.outer_state import Encoded


def data_parallel(islands: int, steps: int, lr: float, dtype: torch.dtype, grid: float | None) -> dict[str, torch.Tensor]:
    """Plain SGD on the mean gradient of the samples that the islands see at each step."""
    values, deal = parameters(dtype, grid), Deal.opening(1, [f"island-{index}" for index in range(islands)])
    for step in range(steps):
        samples = [deal.lease_at(name, step)[0] for name in deal.shares]
        for name, value in values.items():
            value -= lr * sum(gradient(name, value, sample, grid) for sample in samples) / islands
    return values


def test_with_h_1_and_a_plain_outer_step_it_is_data_parallel_training(tmp_path: Path) -> None:
    """Bit-exact on multiples of a power of two, where no sum rounds; to the last digits in float64 otherwise."""
    cfg = config(islands=4, sync_every=1, outer_lr=1.0, outer_momentum=0.0)
    toys = train(tmp_path / "dyadic", cfg=cfg, steps=6, lr=2.0**-3, grid=2.0**-10)
    expected = data_parallel(4, 6, 2.0**-3, torch.float32, 2.0**-10)
    assert all(equal(toy.values, expected) for toy in toys)
    toys = train(tmp_path / "fp64", cfg=cfg, steps=6, dtype=torch.float64)
    expected = data_parallel(4, 6, 0.1, torch.float64, None)
    for toy in toys:
        assert max((toy.values[name] - expected[name]).abs().max() for name in expected) <= 1e-14


def reference(islands: int, steps: int, cfg) -> list[dict[str, torch.Tensor]]:
    """Streaming DiLoCo as its algorithm 2 reads, in float64 and in one process; also classic DiLoCo and no overlap."""
    start = parameters(torch.float64)
    inner = [{name: value.clone() for name, value in start.items()} for _ in range(islands)]
    outer = {name: value.clone() for name, value in start.items()}
    velocity = {name: torch.zeros_like(value) for name, value in start.items()}
    sizes = {name: value.numel() for name, value in start.items()}
    fragments = names_by_fragment(assign_fragments(sizes, cfg.fragments, cfg.pattern), sizes)
    schedule = Schedule(cfg.fragments, cfg.sync_every, cfg.delay, steps)
    deal = Deal.opening(cfg.sync_every, [f"island-{index}" for index in range(islands)])
    sent: dict[int, dict[str, torch.Tensor]] = {}

    def send(fragment: int) -> None:
        sent[fragment] = {name: sum(outer[name] - island[name] for island in inner) / islands for name in fragments[fragment]}

    def apply(fragment: int, alpha: float) -> None:
        for name, delta in sent.pop(fragment).items():
            velocity[name] = cfg.outer_momentum * velocity[name] + delta
            outer[name] = outer[name] - cfg.outer_lr * (delta + cfg.outer_momentum * velocity[name])
            for island in inner:
                island[name] = alpha * island[name] + (1 - alpha) * outer[name]

    for step in range(1, steps + 1):
        for index, island in enumerate(inner):
            lease, done = deal.lease_at(f"island-{index}", step - 1)
            for name in island:
                island[name] = island[name] - 0.1 * gradient(name, island[name], lease * cfg.sync_every + done)
        moment = schedule.at(step)
        for item in moment.apply:
            apply(item.fragment, cfg.mixing)
        for item in moment.send:
            send(item.fragment)
        for item in moment.drain:
            send(item.fragment)
            apply(item.fragment, 0.0)
    return inner


@pytest.mark.parametrize(
    "settings",
    [{}, {"sync_every": 5, "fragments": 1, "delay": 3}, {"sync_every": 6, "fragments": 3}, {"sync_every": 6, "fragments": 3, "delay": 2}],
    ids=["classic", "delayed", "streaming", "overlap"],
)
@pytest.mark.parametrize("islands", [1, 2, 3])
def test_it_is_the_published_algorithm(tmp_path: Path, settings: dict, islands: int) -> None:
    cfg = config(islands=islands, **settings)
    toys = train(tmp_path, cfg=cfg, steps=20, dtype=torch.float64)
    for toy, expected in zip(toys, reference(islands, 20, cfg), strict=True):
        assert max((toy.values[name] - expected[name]).abs().max() for name in expected) <= 1e-13
        assert equal(toy.values, toy.outer_values()), "after the last step the islands hold the outer parameters"


def test_payload_fp32_is_none_bit_for_bit(tmp_path: Path) -> None:
    found = [train(tmp_path / payload, cfg=config(payload=payload))[0].values for payload in ("none", "fp32")]
    assert equal(*found)


def test_alpha_does_not_matter_without_delay(tmp_path: Path) -> None:
    found = [train(tmp_path / str(mixing), cfg=config(mixing=mixing))[0].values for mixing in (0.5, 0.0)]
    assert equal(*found)


def test_all_kept_and_no_outer_step_means_never_synchronised(tmp_path: Path) -> None:
    """alpha = 1: what arrives changes nothing until the run's end."""
    cfg = config(islands=2, delay=2, mixing=1.0)
    alone: list[dict[str, torch.Tensor]] = []

    def look(toy: Toy, step: int) -> None:
        if step == 12:
            alone.append({name: value.clone() for name, value in toy.values.items()})

    toys = train(tmp_path, cfg=cfg, steps=13, before_step=look)
    for toy in toys:
        values = parameters()
        for sample in toy.samples[:12]:
            for name, value in values.items():
                value -= 0.1 * gradient(name, value, sample)
        assert any(equal(values, found) for found in alone)


@pytest.mark.parametrize("payload", ["fp32", "bf16", "int8", "int4"])
def test_outer_state_is_bit_identical_on_all_islands(tmp_path: Path, payload: str) -> None:
    cfg = config(islands=3, sync_every=6, fragments=3, delay=2, payload=payload)
    toys = train(tmp_path, cfg=cfg, steps=20)
    for kind in ("outer", "momentum"):
        first = toys[0].outer.state.named(kind)
        assert all(equal(first, toy.outer.state.named(kind)) for toy in toys)
    exact = train(tmp_path / "exact", cfg=config(islands=3, sync_every=6, fragments=3, delay=2), steps=20)[0].values
    error = max((toys[0].values[name] - exact[name]).abs().max() for name in exact)
    assert error <= {"fp32": 0.0, "bf16": 5e-3, "int8": 0.02, "int4": 0.4}[payload]


def test_every_sync_is_reported_with_its_bytes(tmp_path: Path) -> None:
    toys = train(tmp_path, cfg=config(sync_every=4, fragments=2, payload="int8"), steps=10)
    rows = toys[0].rows("sync")
    assert [(row["step"], row["fragment"]) for row in rows] == [(2, 0), (4, 1), (6, 0), (8, 1), (10, 0), (10, 1)]
    assert all(row["members"] == 2 and row["num_bytes"] > 0 for row in rows)


def test_rounds_leave_no_garbage_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of past rounds go at once, not with the next collection: training collects seldom.

    Looked at when all threads have ended: while one runs, it may hold what it has just worked on.
    """
    made: list[weakref.ref] = []

    class Watched(Flight):
        def __init__(self, wire: GlooWire, notice: Callable[[], Notice], encoded: Encoded, *args: Any) -> None:
            made.extend((weakref.ref(self), weakref.ref(encoded)))
            super().__init__(wire, notice, encoded, *args)

    monkeypatch.setattr("factory_train.distributed.exchange.Flight", Watched)
    # The first operator that runs in a process imports it, and leaves garbage that holds the frames it was called from.
    importlib.import_module("torch._dynamo")
    gc.disable()
    try:
        toys = train(tmp_path, cfg=config(payload="int8"), steps=31)
        left = [thing for thing in (ref() for ref in made) if thing is not None]
    finally:
        gc.enable()
    assert len(made) == 2 * sum(len(toy.rows("sync")) for toy in toys)
    assert not left
