"""Training with optim=adamw_fused through the trainer: the same losses as AdamW, and resuming in other formats and worlds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gang import run_gang, start_run
from test_optim_muon import worst_difference
from test_plan import config, cuda
from test_training import LAYOUTS, rows, small_config

from factory_train.checkpoint.reader import open_checkpoint
from factory_train.checks import check_config
from factory_train.config import Config, unsafe_changes
from factory_train.errors import ConfigError
from factory_train.models.llama import Llama
from factory_train.optim_adamw_fused import AdamWFused
from factory_train.plan import make_plan
from factory_train.run_dir import Attempt

HALF = 5
# name: (layout, optimizer, state, master)
RUNS = {
    "adamw": ("single", "adamw", "fp32", "fp32"),
    "single": ("single", "adamw_fused", "fp32", "fp32"),
    "ddp": ("ddp2", "adamw_fused", "fp32", "fp32"),
    "fsdp": ("fsdp2", "adamw_fused", "fp32", "fp32"),
    "int8-whole": ("fsdp2", "adamw_fused", "int8", "split"),
    "int8-ddp": ("ddp2", "adamw_fused", "int8", "split"),
    "adamw-bf16": ("fsdp2", "adamw", "fp32", "fp32"),
}
# Each goes on from the middle of an int8 run in fsdp2.
RESUMED = {
    "int8-resumed": ("fsdp2", "adamw_fused", "int8", "split"),
    "bf16-single": ("single", "adamw_fused", "bf16", "split"),
    "fp32-ddp": ("ddp2", "adamw", "fp32", "fp32"),
}


def config_of(text: Path, layout: str, name: str, state: str, master: str, *, steps: int = 2 * HALF, narrow: bool = False) -> Config:
    cfg = small_config(text, layout, "float32")
    cfg.optim.name, cfg.optim.state, cfg.optim.master, cfg.optim.schedule = name, state, master, "constant"
    cfg.precision.compute = "bfloat16" if narrow else "float32"
    cfg.train.steps = steps
    return cfg


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Attempt]:
    root = tmp_path_factory.mktemp("runs")
    text = root / "text.txt"
    text.write_text(Path(subprocess.__file__).read_text())
    narrow = {name: "int8" in name or "bf16" in name for name in RUNS}
    attempts = {name: start_run(root, name, config_of(text, *kind, narrow=narrow[name])) for name, kind in RUNS.items()}
    half = start_run(root, "half", config_of(text, *RUNS["int8-whole"], steps=HALF, narrow=True))
    run_gang([*((attempts[name], LAYOUTS[kind[0]][1]) for name, kind in RUNS.items()), (half, 2)])
    for name in RESUMED:
        shutil.copytree(half.run.path, root / f"claim-{name}", symlinks=True)
    attempts |= {name: start_run(root, name, config_of(text, *kind, narrow=True)) for name, kind in RESUMED.items()}
    run_gang([(attempts[name], LAYOUTS[kind[0]][1]) for name, kind in RESUMED.items()])
    return attempts


@pytest.mark.cluster
@pytest.mark.parametrize("layout", ["single", "ddp", "fsdp"])
def test_losses_are_those_of_torchs_adamw_step_by_step(trained: dict[str, Attempt], layout: str) -> None:
    expected, found = rows(trained["adamw"]), rows(trained[layout])
    differences = [abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(expected, found, strict=True)]
    print(f"{layout}: largest relative difference {max(differences):.1e}")
    assert max(differences) <= 1e-6
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.5


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["int8-whole", "int8-ddp"])
def test_narrow_formats_learn_as_adamw_does(trained: dict[str, Attempt], name: str) -> None:
    worst = worst_difference(rows(trained["adamw-bf16"]), rows(trained[name]))
    print(f"{name}: largest relative difference {worst:.1e}")
    assert worst <= 2e-2


@pytest.mark.cluster
def test_a_resumed_run_repeats_every_bit_from_the_codes(trained: dict[str, Attempt]) -> None:
    assert [row["loss"] for row in rows(trained["int8-resumed"])] == [row["loss"] for row in rows(trained["int8-whole"])]
    for attempt in (trained["int8-resumed"], trained["int8-whole"]):
        with open_checkpoint(attempt.run, sections=None) as reader:
            assert "native/2-shards/exp_avg.codes" in reader.sections()
            for section in ("weights", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
                assert all(reader.record(section, name).dtype == "float32" for name in reader.names(section))


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["bf16-single", "fp32-ddp"])
def test_a_run_goes_on_in_another_format_and_world(trained: dict[str, Attempt], name: str) -> None:
    events = [event for event in trained[name].events() if event.get("event") == "resume"]
    assert [(event["step"], event["optimizer"]) for event in events] == [(HALF, "loaded")]
    assert worst_difference(rows(trained["int8-whole"]), rows(trained[name])) <= 2e-2


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"optim": {"state": "int8"}}, "optim.state"),
        ({"optim": {"name": "muon", "master": "split"}}, "optim.master"),
        ({"optim": {"name": "adamw_fused", "master": "split"}}, "optim.master"),
        ({"optim": {"name": "adamw_fused"}, "precision": dict.fromkeys(("params", "compute", "reduce"), "float64")}, "optim.name"),
        ({"optim": {"name": "adamw_fused", "state": "int4"}}, "optim.state"),
    ],
)
def test_formats_that_do_not_go_together_are_refused_with_what_would(change: dict, where: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(config(**change))
    assert refused.value.where == where
    assert refused.value.fix
    check_config(config(optim={"name": "adamw_fused", "state": "int8", "master": "split"}, precision={"compute": "bfloat16"}))


def test_a_resumed_run_may_change_its_formats() -> None:
    before = config(optim={"name": "adamw_fused"})
    after = config(optim={"name": "adamw_fused", "state": "int8", "master": "split"})
    assert not unsafe_changes(before, after)


@pytest.mark.parametrize(("state", "master"), [("fp32", "fp32"), ("bf16", "split"), ("int8", "split"), ("int8", "fp32")])
def test_the_plan_counts_what_the_optimizer_holds(state: str, master: str) -> None:
    cfg = config("llama_small", optim={"name": "adamw_fused", "state": state, "master": master})
    cfg.precision.compute, cfg.parallel.strategy = "bfloat16", "single"
    plan = make_plan(cfg, 4096, cuda(1, 80), vocab_exact=True)
    dtype = torch.bfloat16 if master == "split" else torch.float32
    model = Llama(cfg.model, 4096).to(dtype)
    optimizer = AdamWFused(model, cfg.optim)
    held = {id(tensor): tensor.nbytes for tensor in vars(optimizer.fused).values() if isinstance(tensor, torch.Tensor)}
    # Padding to blocks, and the numbers of a step.
    assert plan.memory.optimizer == pytest.approx(sum(held.values()), rel=1e-2)
    assert plan.memory.params == plan.memory.grads == sum(parameter.nbytes for parameter in model.parameters())


def test_eight_billion_parameters_with_float32_masters_fit_one_card_of_80_gb() -> None:
    kinds = {"adamw": ("adamw", "fp32", "fp32"), "narrow": ("adamw_fused", "int8", "split")}
    plans = {}
    for kind, (name, state, master) in kinds.items():
        cfg = config("llama3_8b", optim={"name": name, "state": state, "master": master})
        cfg.precision.compute, cfg.parallel.strategy, cfg.parallel.activation_checkpoint = "bfloat16", "single", "full"
        cfg.train.micro_batch_size, cfg.train.seq_len, cfg.train.global_batch_tokens = 1, 4096, 4096
        plans[kind] = make_plan(cfg, 128256, cuda(1, 80), vocab_exact=True)
    assert (plans["adamw"].fits, plans["narrow"].fits) == (False, True)
    assert plans["narrow"].memory.states <= plans["adamw"].memory.states / 1.98
