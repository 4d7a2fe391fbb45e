"""AdamW's kernels: gradient statistics, 8-bit codes, the update in both layouts and all formats, in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90 import compile_for_sm90

from factory_train.kernels import adamw, block_codes, gradient_statistics
from factory_train.kernels.split_float import join_float32, split_float32

BETA1, BETA2, EPS, DECAY = 0.9, 0.95, 1e-8, 0.1
FORMATS = [(split, state) for split in (False, True) for state in ("float32", "bfloat16", "int8")]
IDS = [f"{'split' if split else 'float32'}-{state}" for split, state in FORMATS]
TILE = 8 * 256
SIZES = [1, 255, 256, 257, TILE - 1, TILE, TILE + 1, 5003]
LAUNCHED = (gradient_statistics.launch_squares, gradient_statistics.launch_prepare)
REFERENCE = (gradient_statistics.reference_squares, gradient_statistics.reference_prepare)


@dataclass
class Buffers:
    """Weights and states of N elements in one of the formats, and what a step needs."""

    weight: torch.Tensor
    remainder: torch.Tensor | None
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    scale: torch.Tensor | None
    scale_sq: torch.Tensor | None

    @staticmethod
    def of(values: torch.Tensor, split: bool, state: str) -> Buffers:
        weight, remainder = split_float32(values) if split else (values.clone(), None)
        n, kind = values.numel(), getattr(torch, state)
        coded = state == "int8"
        scales = [torch.zeros(block_codes.num_blocks(n)) if coded else None for _ in range(2)]
        return Buffers(weight, remainder, torch.zeros(n, dtype=kind), torch.zeros(n, dtype=torch.uint8 if coded else kind), *scales)

    def tensors(self) -> list[torch.Tensor]:
        every = (self.weight, self.remainder, self.exp_avg, self.exp_avg_sq, self.scale, self.scale_sq)
        return [tensor for tensor in every if tensor is not None]

    def copy(self) -> Buffers:
        return Buffers(*(None if tensor is None else tensor.clone() for tensor in vars(self).values()))

    def master(self) -> torch.Tensor:
        return self.weight if self.remainder is None else join_float32(self.weight, self.remainder)


class Statistics:
    """The device's side of steps: hyper-parameters, counter, flag."""

    def __init__(self, passes: tuple[Callable, Callable] = REFERENCE, groups: int = 2, max_norm: float = 0.0) -> None:
        self.squares, self.prepare = passes
        rows = [[1e-2 * (1 + group), BETA1, BETA2, EPS, DECAY * (group % 2 == 0), max_norm] for group in range(groups)]
        self.hyper = torch.tensor(rows, dtype=torch.float64)
        self.control, self.step = torch.zeros(groups, 8), torch.zeros(1, dtype=torch.int64)
        self.norm, self.flag = torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.int32)

    def advance(self, grads: list[torch.Tensor], skip: float = 0.0, programs: int = 3) -> None:
        partials = torch.full((programs,), float("nan"), dtype=torch.float64)
        self.squares(partials, grads)
        self.prepare(partials, torch.tensor(skip), self.hyper, self.control, self.step, self.norm, self.flag)


def update_flat(update: Callable, buffers: Buffers, grad: torch.Tensor, groups: torch.Tensor, facts: Statistics) -> None:
    state = (buffers.exp_avg, buffers.exp_avg_sq, buffers.scale, buffers.scale_sq)
    update(buffers.weight, buffers.remainder, grad, *state, groups, facts.control, facts.flag)


def update_list(update: Callable, many: list[Buffers], grads: list[torch.Tensor], groups: torch.Tensor, facts: Statistics) -> None:
    def column(name: str) -> list[torch.Tensor]:
        return [getattr(one, name) for one in many if getattr(one, name) is not None]

    states = (column("exp_avg"), column("exp_avg_sq"), column("scale"), column("scale_sq"))
    update(column("weight"), column("remainder"), grads, *states, groups, facts.control, facts.flag)


def noise(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1000 * seed + n % 997), dtype=torch.float64).to(dtype)


# Numbers


@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_a_float32_is_taken_apart_and_joined_without_loss(bits: list[int]) -> None:
    ties = [(bit & ~0xFFFF) | 0x8000 if bit >= 0 else bit for bit in bits]
    values = torch.tensor(bits + ties, dtype=torch.int32).view(torch.float32)
    high, remainder = split_float32(values)
    assert (high.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_float32(high, remainder).view(torch.int32), values.view(torch.int32))
    ordinary = values.isfinite() & (values.abs() < 3.38e38) & (values.abs() > 1e-37)
    worst = ((high.float() - values).abs() / values.abs())[ordinary]
    assert not len(worst) or worst.max() <= 2**-8


def test_the_upper_half_is_the_nearest_bfloat16() -> None:
    values = noise(100_000)
    high, _ = split_float32(values)
    plain = values.bfloat16()
    assert torch.equal((high.float() - values).abs(), (plain.float() - values).abs())
    assert (high == plain).float().mean() > 0.9999


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 0.37, 3e4])
def test_codes_that_were_decoded_are_the_same_codes_again(scale: float) -> None:
    """Every code, beside the largest one that a block always has."""
    codes = torch.arange(-127, 128).to(torch.int8)
    rows = torch.full((len(codes), block_codes.BLOCK), 127, dtype=torch.int8)
    rows[:, 1:] = codes[:, None]
    scales = torch.full((len(codes),), scale) * torch.linspace(0.7, 1.3, len(codes))
    again, largest = block_codes.encode_signed(block_codes.decode_signed(rows, scales))
    assert torch.equal(again, rows)
    assert torch.equal(largest, scales)
    roots = torch.full((256, block_codes.BLOCK), 255, dtype=torch.uint8)
    roots[:, 1:] = torch.arange(256).to(torch.uint8)[:, None]
    scales = torch.full((256,), scale if scale > 1e-18 else 1e-15)
    again, largest = block_codes.encode_root(block_codes.exact_sqrt(block_codes.decode_root(roots, scales)))
    assert torch.equal(again, roots)
    assert torch.equal(largest, scales)


def test_codes_are_near_and_no_second_moment_becomes_zero() -> None:
    m = noise(256 * 64).view(64, 256) * torch.logspace(-6, 0, 64)[:, None]
    found, largest = block_codes.decode_signed(*block_codes.encode_signed(m)), m.abs().amax(dim=1, keepdim=True)
    assert ((found - m).norm() / m.norm()) < 8e-3
    # Half a code of its root, and that number's slope.
    assert ((found - m).abs() / largest <= (m.abs() / largest).sqrt() / 127 + 1 / 127**2).all()
    roots = m.abs() * torch.logspace(-12, 0, 256)
    again = block_codes.exact_sqrt(block_codes.decode_root(*block_codes.encode_root(roots)))
    largest = roots.amax(dim=1, keepdim=True)
    assert ((again - roots).abs() / largest <= (roots / largest).sqrt() / 255 + 1 / 255**2).all()
    assert (again >= largest / 65100).all()
    assert not block_codes.encode_root(torch.zeros(3, 256))[0].any()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), cuts=st.lists(st.integers(1, 8), max_size=3), exponent=st.integers(-15, 15), seed=st.integers(0, 99))
def test_shards_of_whole_blocks_are_coded_as_the_whole_and_a_second_time_as_the_first(
    rows: int, cuts: list[int], exponent: int, seed: int
) -> None:
    values = noise(256 * rows, seed).view(rows, 256) * 10.0**exponent
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    for encode, decode, x in (
        (block_codes.encode_signed, block_codes.decode_signed, values),
        (block_codes.encode_root, block_codes.decode_root, values.abs()),
    ):
        whole = decode(*encode(x))
        assert torch.equal(whole, torch.cat([decode(*encode(x[a:b])) for a, b in itertools.pairwise(edges)]))
        again = whole if decode is block_codes.decode_signed else block_codes.exact_sqrt(whole)
        assert torch.equal(decode(*encode(again)), whole)


# Statistics


@pytest.mark.parametrize("passes", [LAUNCHED, REFERENCE], ids=["triton", "reference"])
@pytest.mark.parametrize("sizes", [[1], [5003], [8192], [8193], [1, 7, 4096, 4097, 0, 33]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_and_the_numbers_of_each_group_agree_with_float64(passes, sizes: list[int], dtype: torch.dtype) -> None:
    facts = Statistics(passes, groups=5, max_norm=0.5)
    grads = [noise(size, seed, dtype) for seed, size in enumerate(sizes)]
    exact = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    for count in (1, 2, 3):
        facts.advance(grads)
        assert facts.step.item() == count
        assert facts.norm.item() == pytest.approx(exact, rel=1e-6)
        assert facts.flag.tolist() == [0, 0]
        for (lr, beta1, beta2, eps, decay, most), row in zip(facts.hyper.tolist(), facts.control.tolist(), strict=True):
            root = math.sqrt(1 - beta2**count)
            expected = [1 - lr * decay, lr / (1 - beta1**count), 1 / root, eps, 1 - beta1, 1 - beta2, min(1.0, most / exact)]
            assert row[:7] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta2", [0.999, 0.9999, 0.0])
def test_bias_corrections_are_exact_in_float32(beta2: float) -> None:
    found = []
    for passes in (LAUNCHED, REFERENCE):
        facts = Statistics(passes, groups=1)
        facts.hyper[0, gradient_statistics.BETA2] = beta2
        facts.step.fill_(7)
        facts.advance([noise(4)])
        found.append(facts.control[0, gradient_statistics.INVERSE_ROOT].item())
        assert facts.control[0, gradient_statistics.FRESH2].item() == pytest.approx(1 - beta2, rel=6e-8)
    assert found == pytest.approx([1 / math.sqrt(1 - beta2**8)] * 2, rel=6e-8)


@pytest.mark.parametrize("passes", [LAUNCHED, REFERENCE], ids=["triton", "reference"])
@pytest.mark.parametrize(("poison", "skip"), [(float("nan"), 0.0), (float("inf"), 0.0), (-float("inf"), 0.0), (1e30, 0.0), (1.0, 1.0)])
def test_what_is_not_finite_or_asked_for_is_skipped_and_not_counted(passes, poison: float, skip: float) -> None:
    facts = Statistics(passes)
    facts.advance([noise(300)])
    bad = noise(300)
    bad[217] = poison
    facts.advance([noise(40), bad], skip)
    assert facts.flag.tolist() == [1, 1]
    assert facts.step.item() == 1
    facts.advance([noise(300)])
    assert facts.flag.tolist() == [0, 1]
    assert facts.step.item() == 2


# The update


def expected(x, m, v, grad, facts: Statistics, group: torch.Tensor):
    """One step in float64 by the formula, from the states as they are stored."""
    lr, _, _, eps, decay, _ = (facts.hyper[group, column] for column in range(6))
    t = facts.step.item()
    clip = facts.control[group, gradient_statistics.CLIP].double()
    g = grad.double() * clip
    m = BETA1 * m.double() + (1 - BETA1) * g
    v = BETA2 * v.double() + (1 - BETA2) * g * g
    step = m / (1 - BETA1**t) / ((v / (1 - BETA2**t)).sqrt() + eps)
    return x.double() * (1 - lr * decay) - lr * step, m, v


def decoded(buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
    if buffers.scale is None:
        return buffers.exp_avg.float().clone(), buffers.exp_avg_sq.float().clone()
    n = buffers.exp_avg.numel()
    first = block_codes.decode_signed(block_codes.in_blocks(buffers.exp_avg), buffers.scale)
    second = block_codes.decode_root(block_codes.in_blocks(buffers.exp_avg_sq), buffers.scale_sq)
    return first.view(-1)[:n], second.view(-1)[:n]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("split", "state"), FORMATS, ids=IDS)
def test_the_kernel_is_its_reference_bit_for_bit_and_the_formula_in_float64(split: bool, state: str, n: int) -> None:
    """As a list of one, at any size; every step starts from what the last one stored."""
    found = Buffers.of(noise(n), split, state)
    kernel = found.copy()
    facts, groups = Statistics(max_norm=0.3), torch.ones(1, dtype=torch.int32)
    grad_dtype = torch.bfloat16 if split else torch.float32
    for step in range(3):
        grad = noise(n, 1 + step, grad_dtype)
        before, (m, v) = found.master().clone(), decoded(found)
        facts.advance([grad])
        update_list(adamw.reference_adamw_tensors, [found], [grad], groups, facts)
        update_list(adamw.launch_adamw_tensors, [kernel], [grad], groups, facts)
        for a, b in zip(found.tensors(), kernel.tensors(), strict=True):
            assert torch.equal(a, b)
        exact = expected(before, m, v, grad, facts, groups.long().expand(n))
        torch.testing.assert_close(found.master().double(), exact[0], rtol=4e-7, atol=2e-8)
        if state != "int8":
            loose = {"float32": 4e-7, "bfloat16": 2**-8}[state]
            for stored, value in zip(decoded(found), exact[1:], strict=True):
                torch.testing.assert_close(stored.double(), value, rtol=loose, atol=1e-7)


@pytest.mark.parametrize(("split", "state"), FORMATS, ids=IDS)
def test_both_layouts_and_both_implementations_are_one(split: bool, state: str) -> None:
    """Many groups, parameters of odd sizes, each at the next multiple of 256 in the flat buffers."""
    sizes = [1, 255, 256, 257, 700, 2049, 3, 4096]
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += -(-size // 256) * 256
    values, grads = torch.zeros(total), torch.zeros(total)
    rows, of_tensor = torch.zeros(total // 256, dtype=torch.uint8), torch.arange(len(sizes), dtype=torch.int32) % 5
    places = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    for index, place in enumerate(places):
        values[place], grads[place] = noise(sizes[index], 1), noise(sizes[index], 2)
        rows[place.start // 256 : -(-place.stop // 256)] = of_tensor[index]
    grads = grads.bfloat16() if split else grads
    flat = [Buffers.of(values, split, state) for _ in range(2)]
    lists = [[Buffers.of(values[place].clone(), split, state) for place in places] for _ in range(2)]
    facts = Statistics(groups=5)
    pairs = (adamw.reference_adamw_flat, adamw.reference_adamw_tensors), (adamw.launch_adamw_flat, adamw.launch_adamw_tensors)
    for _ in range(2):
        facts.advance([grads])
        for index, (on_flat, on_list) in enumerate(pairs):
            update_flat(on_flat, flat[index], grads, rows, facts)
            update_list(on_list, lists[index], [grads[place] for place in places], of_tensor, facts)
    for a, b in zip(flat[0].tensors(), flat[1].tensors(), strict=True):
        assert torch.equal(a, b)
    for one in lists:
        for place, buffers in zip(places, one, strict=True):
            assert torch.equal(buffers.master(), flat[0].master()[place])
            for a, b in zip(decoded(buffers), decoded(flat[0]), strict=True):
                assert torch.equal(a, b[place])
    assert not torch.equal(flat[0].master()[places[5]], values[places[5]])


@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
def test_split_weights_hold_the_very_master_of_float32_ones(state: str) -> None:
    n = 3000
    wide, split = (Buffers.of(noise(n), halves, state) for halves in (False, True))
    facts, groups = Statistics(max_norm=1.0), torch.zeros(1, dtype=torch.int32)
    for step in range(20):
        grad = noise(n, step, torch.bfloat16)
        facts.advance([grad])
        update_list(adamw.reference_adamw_tensors, [wide], [grad.float()], groups, facts)
        update_list(adamw.launch_adamw_tensors if step < 3 else adamw.reference_adamw_tensors, [split], [grad], groups, facts)
        assert torch.equal(split.master(), wide.weight)
        assert torch.equal(split.weight, split_float32(wide.weight)[0])


@pytest.mark.parametrize(("split", "state"), FORMATS, ids=IDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_every_bit(split: bool, state: str, poison: float) -> None:
    n = 1024
    buffers = Buffers.of(noise(n), split, state)
    facts, rows = Statistics(), torch.zeros(n // 256, dtype=torch.uint8)
    facts.advance([noise(n)])
    update_flat(adamw.reference_adamw_flat, buffers, noise(n, 1), rows, facts)
    before = buffers.copy()
    grad = noise(n, 2)
    grad[1000] = poison
    facts.advance([grad])
    for on_flat in (adamw.reference_adamw_flat, adamw.launch_adamw_flat):
        update_flat(on_flat, buffers, grad, rows, facts)
    for on_list in (adamw.reference_adamw_tensors, adamw.launch_adamw_tensors):
        update_list(on_list, [buffers], [grad], torch.zeros(1, dtype=torch.int32), facts)
    for a, b in zip(buffers.tensors(), before.tensors(), strict=True):
        assert torch.equal(a, b)
    assert facts.step.item() == 1


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 2500), min_size=1, max_size=4),
    offset=st.integers(0, 9),
    kind=st.sampled_from(FORMATS),
)
def test_nothing_outside_of_the_tensors_is_touched(sizes: list[int], offset: int, kind: tuple[bool, str]) -> None:
    """Tensors lie in larger buffers at any offset, so that addresses are not aligned either."""
    whole, inner = [], []
    for seed, size in enumerate(sizes):
        outer = Buffers.of(noise(size + 20, seed), *kind)
        place = slice(offset, offset + size)
        scales = [None if s is None else s[: block_codes.num_blocks(size)] for s in (outer.scale, outer.scale_sq)]
        remainder = None if outer.remainder is None else outer.remainder[place]
        whole.append(outer)
        inner.append(Buffers(outer.weight[place], remainder, outer.exp_avg[place], outer.exp_avg_sq[place], *scales))
    before = [outer.copy() for outer in whole]
    alone = [one.copy() for one in inner]
    grads = [noise(size + 3, seed)[3:] for seed, size in enumerate(sizes)]
    facts, groups = Statistics(LAUNCHED), torch.zeros(len(sizes), dtype=torch.int32)
    facts.advance(grads, programs=2)
    update_list(adamw.launch_adamw_tensors, inner, grads, groups, facts)
    update_list(adamw.reference_adamw_tensors, alone, grads, groups, facts)
    for outer, old, one, reference, size in zip(whole, before, inner, alone, sizes, strict=True):
        for name in ("weight", "remainder", "exp_avg", "exp_avg_sq"):
            found, kept = getattr(outer, name), getattr(old, name)
            if found is not None:
                assert torch.equal(found[:offset], kept[:offset])
                assert torch.equal(found[offset + size :], kept[offset + size :])
        for a, b in zip(one.tensors(), reference.tensors(), strict=True):
            assert torch.equal(a, b)


DISPLACEMENT = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 3e-2}


@pytest.mark.parametrize(("split", "state"), FORMATS, ids=IDS)
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["alike", "log-normal"])
def test_a_hundred_steps_go_where_float64_goes(split: bool, state: str, spread: float) -> None:
    """Relative error of the way travelled, gradients with a direction of their own and noise on them.

    Sizes of gradients change from block to block, and with `spread` within blocks too, which 8 bits are worse at.
    """
    n = 8192
    start = 0.02 * noise(n, 50)
    direction, size = noise(n, 51).double(), torch.logspace(-4, 0, n, dtype=torch.float64) * (spread * noise(n, 52).double()).exp()
    buffers, facts, groups = Buffers.of(start, split, state), Statistics(), torch.zeros(1, dtype=torch.int32)
    facts.hyper[:, gradient_statistics.LR] = 1e-3
    x, m, v = start.double(), torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(100):
        grad = (size * (0.3 * direction + noise(n, step).double())).to(torch.bfloat16 if split else torch.float32)
        facts.advance([grad])
        update_list(adamw.reference_adamw_tensors, [buffers], [grad], groups, facts)
        x, m, v = expected(x, m, v, grad, facts, torch.zeros(n, dtype=torch.int64))
    error = float((buffers.master().double() - x).norm() / (x - start.double()).norm())
    print(f"{'split' if split else 'float32'} {state}: {spread}: displacement error {error:.2e}")
    assert error <= DISPLACEMENT[state] * (1 + spread)


# Operators


@pytest.mark.parametrize(("split", "state"), [(False, "float32"), (True, "int8")], ids=["float32", "split-int8"])
def test_the_operators_pass_opcheck_and_compile(split: bool, state: str) -> None:
    buffers, facts = Buffers.of(noise(512), split, state), Statistics()
    rows, groups, grad = torch.zeros(2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32), noise(512, 1)
    partials, skip = torch.zeros(2, dtype=torch.float64), torch.zeros(())
    torch.library.opcheck(gradient_statistics.gradient_squares, (partials, [grad, grad]))
    facts.advance([grad])
    numbers = (facts.hyper, facts.control, facts.step, facts.norm, facts.flag)
    torch.library.opcheck(gradient_statistics.prepare_step, (partials, skip, *numbers))
    update_flat(lambda *args: torch.library.opcheck(adamw.adamw_flat, args), buffers, grad, rows, facts)
    update_list(lambda *args: torch.library.opcheck(adamw.adamw_tensors, args), [buffers], [grad], groups, facts)

    rest = list(vars(buffers).values())[1:]

    def step(weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        gradient_statistics.gradient_squares(partials, [grad])
        gradient_statistics.prepare_step(partials, skip, *numbers)
        changed = Buffers(weight, *rest)
        update_flat(adamw.adamw_flat, changed, grad, rows, facts)
        update_list(adamw.adamw_tensors, [changed], [grad], groups, facts)
        return 2 * weight

    before = [tensor.clone() for tensor in (*buffers.tensors(), facts.step)]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(buffers.weight, grad)
    after = [tensor.clone() for tensor in (*buffers.tensors(), facts.step)]
    for tensor, value in zip((*buffers.tensors(), facts.step), before, strict=True):
        tensor.copy_(value)
    assert torch.equal(compiled, step(buffers.weight, grad))
    for a, b in zip(after, (*buffers.tensors(), facts.step), strict=True):
        assert torch.equal(a, b)


def test_without_triton_the_references_run() -> None:
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
import torch
from factory_train.fused_adamw import FusedAdamW
from factory_train.kernels import loss, muon
parameter = torch.nn.Parameter(torch.ones(300, dtype=torch.bfloat16))
optimizer = FusedAdamW([parameter], lr=0.1, state="int8", master="split", max_grad_norm=1.0)
parameter.square().sum().backward()
optimizer.step()
assert abs(float(optimizer.master(parameter).detach()[7]) - 0.899) < 1e-4
assert "triton" not in sys.modules or not hasattr(loss, "triton")
"""
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_kernels_compile_for_sm90_with_accesses_of_sixteen_bytes() -> None:
    """Where addresses and sizes allow it; otherwise they compile as well. Narrow accesses are those of tables and of one number a row."""
    module, statistics = "factory_train.kernels.adamw", "factory_train.kernels.gradient_statistics"
    kernels = []
    tables = {"tile_tensor": "*i32", "tile_first": "*i64", "sizes": "*i64"}
    for split, state in FORMATS:
        weight, kind = ("*i16", "*bf16") if split else ("*fp32", "*fp32")
        codes = state == "int8"
        moments = {"float32": ("*fp32", "*fp32"), "bfloat16": ("*bf16", "*bf16"), "int8": ("*i8", "*u8")}[state]
        scale = "*fp32" if codes else weight
        flat = {
            **{"weight": weight, "remainder": weight, "grad": kind, "exp_avg": moments[0], "exp_avg_sq": moments[1]},
            **{"scale": scale, "scale_sq": scale, "groups": "*u8", "control": "*fp32", "flag": "*i32", "num_rows": "i64"},
        }
        constants = {"SPLIT": split, "CODES": codes, "ROWS": 16 if codes else 8}
        options = {"num_warps": 8 if codes else 4, "enable_fp_fusion": False}
        kernels.append((module, "adamw_buffer", flat, constants, options, [name for name in flat if name != "num_rows"]))
        table = {"addresses": "*i64", "num_tensors": "i32", **tables, "groups": "*i32", "control": "*fp32", "flag": "*i32"}
        constants = constants | {"NARROW_STATE": state == "bfloat16", "NARROW_GRAD": split}
        pointers = [name for name in table if name != "num_tensors"]
        kernels.append((module, "adamw_tensors_pass", table, constants | {"ALIGNED": True}, options, pointers))
    squares = {"grad": "*bf16", "partials": "*fp64", "n": "i64"}
    kernels.append((statistics, "squares_of_buffer", squares, {"ITERATIONS": 7, "BLOCK": 8192}, {"num_warps": 8}, list(squares)))
    squares = {"addresses": "*i64", **tables, "partials": "*fp64", "num_tiles": "i32"}
    constants = {"ITERATIONS": 7, "BLOCK": 4096, "NARROW": False, "ALIGNED": True}
    kernels.append((statistics, "squares_of_tensors", squares, constants, {"num_warps": 8}))
    for accesses, (_, name, *_) in zip(compile_for_sm90(*kernels), kernels, strict=True):
        print(name, accesses)
        narrow = sum(count for kind, count in accesses.items() if kind.startswith("st") and ".v4" not in kind)
        assert accesses["ld.global.v4.b32"] >= 4
        # Scales, or a partial sum; every other store is of 16 bytes.
        assert narrow <= 2
    prepare = {
        **{"partials": "*fp64", "num_partials": "i32", "skip": "*fp32", "hyper": "*fp64", "control": "*fp32"},
        **{"step": "*i64", "norm": "*fp64", "flag": "*i32", "num_groups": "i32"},
    }
    unaligned = [(*kernel[:3], kernel[3] | {"ALIGNED": False}, kernel[4]) for kernel in kernels if "ALIGNED" in kernel[3]]
    compile_for_sm90(*unaligned[-2:], (statistics, "prepare_pass", prepare, {"PARTIALS": 1024, "GROUPS": 2}, {"num_warps": 4}))
