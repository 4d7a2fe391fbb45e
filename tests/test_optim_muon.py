"""optim=muon: what it does to a model, alone and shared over ranks, and through checkpoints."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import muon_ranks
import pytest
import torch
from gang import run_gang, start_run
from rank_pool import RankPool
from test_training import LAYOUTS, rows, small_config

from factory_train.checks import check_config
from factory_train.config import Config, ModelConfig, OptimConfig
from factory_train.distributed.matrix_exchange import assign_owners
from factory_train.errors import ConfigError
from factory_train.hardware import detect
from factory_train.kernels.muon import orthogonalize
from factory_train.models.llama import Llama
from factory_train.optim_muon import Muon, takes_muon
from factory_train.plan import make_plan
from factory_train.run_dir import Attempt


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool("muon_ranks")
    yield pool
    pool.close()


def expected_weights(count: int) -> dict[str, torch.Tensor]:
    """The rule, written out: Nesterov momentum, orthogonalised, at the root mean square of AdamW; AdamW for the rest."""
    cfg, lr = OptimConfig(name="muon"), 0.02
    weights = muon_ranks.draw(0, torch.float64)
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(1, count + 1):
        for name, grad in muon_ranks.draw(step, torch.float64).items():
            grad, weight = grad / 1.5, weights[name]
            if name.startswith("layers") and weight.ndim == 2:
                first[name] = 0.95 * first[name] + 0.05 * grad
                update = orthogonalize((0.05 * grad + 0.95 * first[name])[None], 5)[0]
                weights[name] = (1 - lr * 0.1) * weight - lr * 0.2 * max(weight.shape) ** 0.5 * update
            else:
                first[name] = cfg.beta1 * first[name] + (1 - cfg.beta1) * grad
                second[name] = cfg.beta2 * second[name] + (1 - cfg.beta2) * grad**2
                root = (second[name] / (1 - cfg.beta2**step)).sqrt() + cfg.eps
                decay = 0.1 if weight.ndim == 2 else 0.0
                weights[name] = (1 - lr * decay) * weight - lr * first[name] / (1 - cfg.beta1**step) / root
    return weights


def test_steps_follow_the_rule() -> None:
    found = muon_ranks.steps(0, 1, "single", torch.float64)
    for name, expected in expected_weights(3).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.cluster
@pytest.mark.parametrize(("strategy", "world"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_ranks_share_the_work_and_agree_bit_for_bit(ranks: RankPool, strategy: str, world: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        results = ranks.run(world, muon_ranks.steps, strategy, dtype)
        alone = muon_ranks.steps(0, 1, "single", dtype)
        for name, value in alone.items():
            assert all(torch.equal(result[name], results[0][name]) for result in results), name
            torch.testing.assert_close(results[0][name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.cluster
@pytest.mark.parametrize(("strategy", "world"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_each_matrix_is_worked_on_whole_by_its_owner_alone(ranks: RankPool, strategy: str, world: int) -> None:
    values = muon_ranks.draw(0, torch.float32)
    shapes = {name: tuple(value.shape) for name, value in values.items() if value.ndim == 2}
    owners = assign_owners(shapes, world)
    for result in ranks.run(world, muon_ranks.marked_by_owner, strategy):
        for name, found in result.items():
            torch.testing.assert_close(found, values[name] + 100 * (owners[name] + 1), msg=name)
    assert set(owners.values()) == set(range(world))


def test_work_is_spread_evenly_over_ranks() -> None:
    layers = {f"layers.{i}.{name}": shape for i in range(32) for name, shape in {"wq": (4096, 4096), "w1": (14336, 4096)}.items()}
    for num_ranks in (1, 8, 64):
        owners = assign_owners(layers, num_ranks)
        loads = [0] * num_ranks
        for name, (rows_, columns) in layers.items():
            loads[owners[name]] += rows_ * columns * min(rows_, columns)
        largest = max(rows_ * columns * min(rows_, columns) for rows_, columns in layers.values())
        assert max(loads) <= max(largest, 1.05 * sum(loads) / num_ranks)


def test_a_skipped_step_leaves_weights_states_and_count() -> None:
    model = muon_ranks.model_of("single", 1, torch.float32)
    optimizer = Muon(model, OptimConfig(name="muon"))

    def step(poison: float, skip: float) -> None:
        for name, grad in muon_ranks.draw(1, torch.float32).items():
            model.get_parameter(name).grad = grad * poison
        optimizer.step(lr=0.02, grad_norm=torch.tensor(poison, dtype=torch.float64), skip=torch.tensor(skip))

    def everything() -> list[torch.Tensor]:
        states = [tensor.clone() for tensors in optimizer.state().values() for tensor in tensors.values()]
        return [*(parameter.detach().clone() for parameter in model.parameters()), *states]

    step(1.0, 0.0)
    before = everything()
    step(float("nan"), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert optimizer.step_count() == 1
    step(1.0, 0.0)
    assert optimizer.step_count() == 2
    assert all(tensor.isfinite().all() for tensor in everything())


def test_matrices_of_layers_are_muons_and_nothing_else_is() -> None:
    with torch.device("meta"):
        model = Llama(ModelConfig(num_layers=1, qkv_bias=True, tie_embeddings=False), 50)
    names = {name for name, parameter in model.named_parameters() if takes_muon(name, parameter)}
    layer = "layers.0."
    assert names == {layer + f"attention.w{c}.weight" for c in "qkvo"} | {layer + f"feed_forward.w{i}.weight" for i in (1, 2, 3)}


def test_the_plan_counts_one_moment_of_a_matrix() -> None:
    cfg = Config(recipe="claim")
    hardware = detect(cfg.hardware)
    adamw = make_plan(cfg, 4096, hardware, vocab_exact=True)
    muon = make_plan(replace(cfg, optim=replace(cfg.optim, name="muon")), 4096, hardware, vocab_exact=True)
    matrices = cfg.model.num_layers * (4 * cfg.model.dim**2 + 3 * cfg.model.dim * cfg.model.ffn_dim)
    assert adamw.params.layer_matrices == matrices
    assert adamw.checkpoint_bytes - muon.checkpoint_bytes == 4 * matrices
    with torch.device("meta"):
        optimizer = Muon(Llama(cfg.model, 4096), replace(cfg.optim, name="muon"))
    held = sum(tensor.numel() for tensors in optimizer.state().values() for tensor in tensors.values())
    assert muon.checkpoint_bytes == 4 * (muon.params.total + held)


@pytest.mark.parametrize(("key", "value"), [("momentum", 1.0), ("momentum", -0.1), ("ns_steps", 0)])
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    cfg = Config(recipe="claim")
    cfg.optim.name = "muon"
    check_config(cfg)
    setattr(cfg.optim, key, value)
    with pytest.raises(ConfigError, match=f"optim.{key}"):
        check_config(cfg)


RUNS = ("single", "ddp2", "fsdp2", "hsdp2x2")
HALF = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Attempt]:
    """The same run under each strategy; and two that stop half-way: one goes on in another world, one with AdamW."""
    root = tmp_path_factory.mktemp("runs")
    text = root / "text.txt"
    text.write_text(Path(subprocess.__file__).read_text())

    def config(layout: str, steps: int = 2 * HALF) -> Config:
        cfg = small_config(text, layout, "float64")
        cfg.optim.name, cfg.optim.lr, cfg.optim.schedule = "muon", 2e-2, "constant"
        cfg.train.steps = steps
        return cfg

    attempts = {layout: start_run(root, layout, config(layout)) for layout in RUNS}
    halves = [start_run(root, name, config("fsdp2", HALF)) for name in ("world", "optimizer")]
    run_gang([*((attempt, LAYOUTS[layout][1]) for layout, attempt in attempts.items()), *((half, 2) for half in halves)])
    adamw = config("single", HALF + 1)
    adamw.optim.name = "adamw"
    attempts["resumed"] = start_run(root, "world", config("hsdp2x2"))
    attempts["adamw"] = start_run(root, "optimizer", adamw)
    run_gang([(attempts["resumed"], 4), (attempts["adamw"], 1)])
    return attempts


def worst_difference(a: list[dict], b: list[dict]) -> float:
    assert [row["step"] for row in a] == [row["step"] for row in b]
    return max(abs(x["loss"] - y["loss"]) / x["loss"] for x, y in zip(a, b, strict=True))


@pytest.mark.cluster
@pytest.mark.parametrize("layout", [name for name in RUNS if name != "single"])
def test_losses_agree_with_one_process_step_by_step(trained: dict[str, Attempt], layout: str) -> None:
    alone = rows(trained["single"])
    worst = worst_difference(alone, rows(trained[layout]))
    print(f"{layout}: largest relative difference {worst:.1e}")
    assert worst <= 1e-10
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.5


@pytest.mark.cluster
def test_a_run_resumes_in_another_world(trained: dict[str, Attempt]) -> None:
    assert worst_difference(rows(trained["single"]), rows(trained["resumed"])) <= 1e-10


@pytest.mark.cluster
def test_adamw_goes_on_from_muons_weights_with_fresh_moments(trained: dict[str, Attempt]) -> None:
    events = [event for event in trained["adamw"].events() if "resume" in (event.get("event"), event.get("kind"))]
    assert events
    assert events[-1]["step"] == HALF
    assert events[-1]["optimizer"].startswith("fresh")
