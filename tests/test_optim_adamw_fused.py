"""optim=adamw_fused: the same steps as torch.optim.AdamW under every strategy, in every format, and through checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import adamw_ranks
import pytest
import torch
from adamw_ranks import FORMATS, LR, MAX_NORM, UNEVEN, WHOLE
from checkpoint_cases import new_run
from rank_pool import RankPool

from factory_train.distributed.encoded import Coded, Rounded, SplitWeight
from factory_train.errors import ConfigError
from factory_train.fused_adamw import FusedAdamW
from factory_train.kernels import block_codes

STEPS = 10


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool("adamw_ranks")
    yield pool
    pool.close()


def torch_steps(shapes: dict, count: int) -> list[dict[str, torch.Tensor]]:
    """The same steps by torch.optim.AdamW, with its own way of clipping."""
    model = adamw_ranks.model_of("single", 1, shapes, torch.float32)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        foreach=False,
    )
    history = [{name: parameter.detach().clone() for name, parameter in parameters.items()}]
    for step in range(count):
        adamw_ranks.give_gradients(model, shapes, 1 + step)
        torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = LR / (1 + step)
        optimizer.step()
        history.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    return history


def worst_relative(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> float:
    assert len(a) == len(b)
    return max(float((x[name] - y[name]).abs().max() / y[name].abs().max()) for x, y in zip(a, b, strict=True) for name in y)


LAYOUTS = [("single", 1), ("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]


@pytest.mark.cluster
@pytest.mark.parametrize(("strategy", "world"), LAYOUTS)
@pytest.mark.parametrize("shapes", [WHOLE, UNEVEN], ids=["whole", "uneven"])
def test_float32_is_torchs_adamw_step_by_step(ranks: RankPool, strategy: str, world: int, shapes: dict) -> None:
    expected = torch_steps(shapes, STEPS)
    for found in ranks.run(world, adamw_ranks.steps, strategy, shapes, "fp32", STEPS):
        worst = worst_relative(found, expected)
        assert worst <= 1e-6
    print(f"{strategy} {world}: largest difference {worst:.1e} of the largest weight")
    assert worst_relative(expected[1:], expected[:-1]) > 1e-3


@pytest.mark.cluster
@pytest.mark.parametrize(("strategy", "world"), LAYOUTS)
def test_split_weights_hold_the_bit_identical_float32_master(ranks: RankPool, strategy: str, world: int) -> None:
    """The same gradients, of numbers that both types have; initial weights are those of float32 too."""
    wide = adamw_ranks.steps(0, 1, "single", UNEVEN, "fp32", STEPS)
    for found in ranks.run(world, adamw_ranks.steps, strategy, UNEVEN, "split", STEPS):
        for a, b in zip(found, wide, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_narrow_states_go_the_same_way_on_any_number_of_ranks(ranks: RankPool, kind: str) -> None:
    """Where shards are whole blocks even bit for bit; and nowhere far from float32."""
    wide = adamw_ranks.steps(0, 1, "single", WHOLE, "fp32", STEPS)
    alone = adamw_ranks.steps(0, 1, "single", WHOLE, kind, STEPS)
    way = sum(float((wide[-1][name] - wide[0][name]).norm()) for name in WHOLE)
    error = sum(float((alone[-1][name] - wide[-1][name]).norm()) for name in WHOLE)
    print(f"{kind}: {error / way:.1e} of the way")
    assert 0 < error / way <= 3e-2
    for found in ranks.run(4, adamw_ranks.steps, "fsdp", WHOLE, kind, STEPS):
        for a, b in zip(found, alone, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.cluster
@pytest.mark.parametrize(("rows", "whole"), [(64, True), (50, False)])
@pytest.mark.parametrize("world", [1, 2])
def test_shards_of_fsdp2_move_into_one_buffer_and_their_gradients_are_taken_unit_by_unit(
    ranks: RankPool, rows: int, whole: bool, world: int
) -> None:
    moved = ranks.run(world, adamw_ranks.train_sharded, rows, True)
    stayed = ranks.run(world, adamw_ranks.train_sharded, rows, False)
    for (weights, pieces, one_buffer), (others, no_pieces, of_others) in zip(moved, stayed, strict=True):
        assert (one_buffer, of_others) == (True, False)
        # Two layers and the root, or a table for all where blocks would cross from one parameter to the next.
        assert (pieces, no_pieces) == ([3 if whole else 0] * 3, [0] * 3)
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.cluster
@pytest.mark.parametrize("shapes", [pytest.param(WHOLE, marks=pytest.mark.long), UNEVEN], ids=["whole", "uneven"])
def test_checkpoints_move_between_all_formats_and_numbers_of_ranks(ranks: RankPool, shapes: dict, tmp_path) -> None:
    runs = {}
    for world in (1, 2, 4):
        attempts = {kind: new_run(tmp_path / f"{kind}-{world}") for kind in FORMATS}
        ranks.run(world, adamw_ranks.save, "fsdp" if world > 1 else "single", shapes, attempts)
        runs |= {(kind, world): attempt.run for kind, attempt in attempts.items()}
    for world in (1, 2, 4):
        for wrong in ranks.run(world, adamw_ranks.load_all, "fsdp" if world > 1 else "single", shapes, runs):
            assert not wrong, wrong[:5]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float64])
def test_encoded_tensors_take_values_of_any_type_and_say_what_they_are(narrow: torch.dtype) -> None:
    """What reads a Hugging Face folder copies into weights whatever it finds there."""
    values = torch.randn(7, 50, dtype=torch.float64).to(narrow)
    blocks = block_codes.num_blocks(values.numel())
    encoded = [
        SplitWeight(torch.zeros(7, 50, dtype=torch.bfloat16), torch.zeros(7, 50, dtype=torch.int16)),
        Rounded(torch.zeros(7, 50, dtype=torch.bfloat16)),
        Coded(torch.zeros(7, 50, dtype=torch.int8), torch.zeros(blocks)),
        Coded(torch.zeros(7, 50, dtype=torch.uint8), torch.zeros(blocks)),
    ]
    for tensor, tolerance in zip(encoded, (0.0, 2**-8, 2e-2, 2e-2), strict=True):
        expected = values.abs() if tensor is encoded[3] else values
        found = tensor.copy_(expected).detach()
        assert (found.dtype, found.shape, tensor.nbytes) == (torch.float32, values.shape, found.nbytes)
        assert (found - expected.float()).norm() <= tolerance * expected.float().norm()
        again = found.clone()
        assert torch.equal(tensor.copy_(found).detach(), again)


# As a torch.optim.Optimizer


def model_and_gradients(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((33, 40), (7,), (2, 256))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return parameters


def test_a_scheduler_closures_and_groups_work_as_with_any_optimizer() -> None:
    ours, theirs = model_and_gradients(), model_and_gradients()
    groups = [[{"params": p[:1], "weight_decay": 0.3, "lr": 0.05, "betas": (0.8, 0.9)}, {"params": p[1:]}] for p in (ours, theirs)]
    fused, plain = FusedAdamW(groups[0]), torch.optim.AdamW(groups[1], weight_decay=1e-2)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (fused, plain)]
    for _ in range(3):
        assert fused.step(lambda: 7.0) == 7.0
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_states_move_to_and_from_torchs_adamw() -> None:
    ours, theirs = model_and_gradients(), model_and_gradients()
    fused, plain = FusedAdamW(ours), torch.optim.AdamW(theirs)
    for _ in range(2):
        fused.step()
        plain.step()
    again, back = FusedAdamW(theirs), torch.optim.AdamW(ours)
    again.load_state_dict(plain.state_dict())
    back.load_state_dict(fused.state_dict())
    for optimizer in (again, back):
        optimizer.step()
    assert again.step_count() == 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_state_dict_restores_every_bit(state: str) -> None:
    first = model_and_gradients(dtype=torch.bfloat16)
    fused = FusedAdamW(first, state=state, master="split", max_grad_norm=0.5)
    for _ in range(3):
        fused.step()
    second = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
    other = FusedAdamW(second, state=state, master="split", max_grad_norm=0.5)
    other.load_state_dict(fused.state_dict())
    for a, b in zip(first, second, strict=True):
        b.grad = a.grad.clone()
    for optimizer in (fused, other):
        optimizer.step()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(fused.master(a).detach(), other.master(b).detach())
        assert torch.equal(fused.slot(a).exp_avg, other.slot(b).exp_avg)


@pytest.mark.parametrize("flat", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(flat: bool) -> None:
    parameters = model_and_gradients()
    fused = FusedAdamW(parameters, max_grad_norm=1.0, flat_gradients=flat)
    for parameter in parameters:
        parameter.grad = None if not flat else parameter.grad
        parameter.sum().backward()
    fused.step()
    before = [tensor.clone() for p in parameters for tensor in (p.detach(), fused.slot(p).exp_avg, fused.slot(p).exp_avg_sq)]
    parameters[1].grad[3] = float("nan")
    fused.step()
    after = [tensor for p in parameters for tensor in (p.detach(), fused.slot(p).exp_avg, fused.slot(p).exp_avg_sq)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (fused.step_count(), int(fused.skipped)) == (1, 1)


def test_flat_gradients_keep_their_addresses_and_give_the_same_steps() -> None:
    loose, flat = model_and_gradients(), model_and_gradients()
    optimizers = FusedAdamW(loose, state="int8"), FusedAdamW(flat, state="int8", flat_gradients=True)
    addresses = [parameter.grad.data_ptr() for parameter in flat]
    for step in range(3):
        for optimizer, parameters in zip(optimizers, (loose, flat), strict=True):
            optimizer.zero_grad()
            sum((parameter.sin() * (step + 1)).sum() for parameter in parameters).backward()
            optimizer.step()
        assert [parameter.grad.data_ptr() for parameter in flat] == addresses
    assert len({parameter.untyped_storage().data_ptr() for parameter in flat}) == 1
    assert all(torch.equal(a, b) for a, b in zip(loose, flat, strict=True))


def test_what_it_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="master=split is for"):
        FusedAdamW(model_and_gradients(), master="split")
    with pytest.raises(ConfigError, match="257 groups"):
        FusedAdamW([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(257)])
    with pytest.raises(ConfigError, match="cannot be added"):
        FusedAdamW(model_and_gradients()).add_param_group({"params": model_and_gradients()})
