"""DiLoCo's kernels: the Triton code (in the interpreter), the references, the operators, codes and fingerprints."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90 import compile_for_sm90

from factory_train.kernels import pseudogradient as pg
from factory_train.kernels import pseudogradient_reference as reference

FORMATS = ["fp32", "bf16", "int8", "int4"]
SIZES = [1, 255, 256, 257, pg.ROWS * pg.BLOCK, pg.ROWS * pg.BLOCK + 3]


def tensors(n: int, num: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + n)
    return [torch.randn(n, generator=generator) for _ in range(num)]


def room(n: int, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = pg.num_blocks(n)
    return torch.zeros(blocks * pg.CODE_BYTES[format], dtype=torch.uint8), torch.zeros(blocks if pg.has_scales(format) else 0)


def encoded(x: torch.Tensor, format: str, encode=reference.encode, error: torch.Tensor | None = None):
    """Codes, scales, what is left out, and sums of squares of x."""
    codes, scales = room(x.numel(), format)
    error = torch.zeros_like(x) if error is None else error
    new_error, squares = torch.full_like(error, float("nan")), torch.zeros(pg.num_blocks(x.numel()), dtype=x.dtype)
    encode(x, torch.zeros_like(x), error, codes, scales, new_error, squares, format)
    return codes, scales, new_error, squares


def decoded(codes: torch.Tensor, scales: torch.Tensor, n: int, format: str) -> torch.Tensor:
    return reference.decode(codes, scales, format).view(-1)[:n]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", SIZES)
def test_kernel_and_reference_encode_to_the_same_bytes(format: str, n: int) -> None:
    outer, inner, error = tensors(n, 3)
    found = []
    for encode in (pg.launch_encode, reference.encode):
        codes, scales = room(n, format)
        new_error, squares = torch.zeros(n), torch.zeros(pg.num_blocks(n))
        encode(outer, inner, error, codes, scales, new_error, squares, format)
        found.append((codes, scales, new_error, squares))
    for a, b in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[0][3], found[1][3])


@pytest.mark.parametrize("encode", [pg.launch_encode, reference.encode])
@pytest.mark.parametrize("format", FORMATS)
def test_what_the_code_leaves_out_is_kept_exactly(encode, format: str) -> None:
    (x,) = tensors(3000, 1)
    codes, scales, error, _ = encoded(x, format, encode)
    back = decoded(codes, scales, 3000, format)
    assert torch.equal(back + error, x)
    worst = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.5 / 127, "int4": 0.5 / 7}[format]
    blocks = torch.nn.functional.pad(x, (0, -3000 % pg.BLOCK)).view(-1, pg.BLOCK).abs().amax(dim=1)
    assert (error.abs() <= 1.001 * worst * blocks.repeat_interleave(pg.BLOCK)[:3000]).all()


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_with_error_feedback_the_mean_of_many_codes_is_the_value(format: str) -> None:
    (x,) = tensors(512, 1)
    total, error, rounds = torch.zeros_like(x), torch.zeros_like(x), 200
    for _ in range(rounds):
        codes, scales, error, _ = encoded(x, format, error=error)
        total += decoded(codes, scales, 512, format)
    assert (total / rounds - x).abs().max() < 2.5 * x.abs().max() / 7 / rounds + 1e-5
    assert error.abs().max() <= x.abs().max() / 7


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_tiny_values(format: str) -> None:
    x = torch.zeros(2 * pg.BLOCK)
    x[pg.BLOCK] = 1e-44
    for encode in (pg.launch_encode, reference.encode):
        codes, scales, error, squares = encoded(x, format, encode)
        back = decoded(codes, scales, x.numel(), format)
        assert not back[: pg.BLOCK].any()
        assert back.isfinite().all()
        assert error.isfinite().all()
        assert squares.isfinite().all()


@pytest.mark.parametrize("encode", [pg.launch_encode, reference.encode])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_an_element_that_is_not_finite_shows_in_the_sums(encode, format: str, poison: float) -> None:
    (x,) = tensors(600, 1)
    x[300] = poison
    squares = encoded(x, format, encode)[3]
    assert squares.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("format", [*FORMATS, "fp64"])
@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.25, 0.0, 0.75]])
def test_the_reduction_is_the_weighted_sum_and_zero_weight_is_not_looked_at(format: str, weights: list[float]) -> None:
    n, dtype = 700, torch.float64 if format == "fp64" else torch.float32
    parts = [x.to(dtype) for x in tensors(n, len(weights))]
    if len(parts) == 3:
        parts[1] *= float("nan")
    for x in parts:
        x[5] = -0.0
    sent = [encoded(x, format) for x in parts]
    w = torch.tensor(weights, dtype=dtype)
    results = []
    ways = [(reference.reduce, list), (reference.reduce, torch.stack), (pg.launch_reduce, torch.stack)]
    for reduce, together in ways if format != "fp64" else ways[:2]:
        out_codes, out_scales = room(n, format)
        reduce(together([item[0] for item in sent]), together([item[1] for item in sent]), w, out_codes, out_scales, format)
        results.append((out_codes, out_scales))
    for codes, scales in results[1:]:
        assert torch.equal(codes, results[0][0])
        assert torch.equal(scales, results[0][1])
    exact = sum(weight * decoded(item[0], item[1], n, format).double() for weight, item in zip(weights, sent, strict=True) if weight)
    worst = {"fp64": 0.0, "fp32": 1e-6, "bf16": 2.0**-8, "int8": 0.6 / 127, "int4": 0.6 / 7}[format]
    assert (decoded(*results[0], n, format).double() - exact).abs().max() <= worst * exact.abs().max()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 257, 3000])
def test_kernel_and_reference_take_the_same_outer_step_bit_for_bit(format: str, keep: float, n: int) -> None:
    g, *state = tensors(n, 4)
    codes, scales, _, _ = encoded(g, format)
    found = []
    for update in (pg.launch_outer_update, reference.outer_update):
        mine = [tensor.clone() for tensor in state]
        prints = torch.zeros(pg.num_blocks(n), dtype=torch.int64)
        update(codes, scales, *mine, prints, 0.7, 0.9, keep, format)
        found.append((*mine, prints))
        unasked = [tensor.clone() for tensor in state]
        update(codes, scales, *unasked, prints[:0], 0.7, 0.9, keep, format)
        assert all(torch.equal(a, b) for a, b in zip(unasked, mine, strict=True))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found[0][3], pg.fingerprint_parts(found[0][0], found[0][1]))


@pytest.mark.parametrize("update", [pg.launch_outer_update, reference.outer_update])
def test_a_fragment_that_is_updated_in_two_parts_has_the_same_fingerprint(update) -> None:
    g, *state = tensors(3000, 4)
    codes, scales, _, _ = encoded(g, "int8")
    prints = torch.zeros(pg.num_blocks(3000), dtype=torch.int64)
    middle, blocks = 5 * pg.BLOCK, 5
    for at, code, block in (
        (slice(middle), slice(middle), slice(blocks)),
        (slice(middle, None), slice(middle, None), slice(blocks, None)),
    ):
        parts = (tensor[at] for tensor in state)
        update(codes[code], scales[block], *parts, prints[block], 0.7, 0.9, 0.5, "int8", block.start or 0)
    assert torch.equal(prints, pg.fingerprint_parts(state[0], state[1]))


def test_the_outer_step_is_that_of_torch_sgd_with_nesterov_momentum() -> None:
    (start,) = tensors(500, 1)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    outer, momentum, inner = start.clone(), torch.zeros(500), start.clone()
    prints = torch.zeros(2, dtype=torch.int64)
    for step in range(4):
        (g,) = tensors(500, 1, seed=step + 1)
        parameter.grad = g.clone()
        optimizer.step()
        codes, scales, _, _ = encoded(g, "fp32")
        pg.outer_update(codes, scales, outer, momentum, inner, prints, 0.7, 0.9, 0.0, "fp32")
    torch.testing.assert_close(outer, parameter.detach(), rtol=0, atol=2e-6)
    assert torch.equal(inner, outer)


def test_keep_zero_overwrites_what_is_not_finite() -> None:
    g, outer, momentum = tensors(100, 3)
    codes, scales, _, _ = encoded(g, "int8")
    for update in (pg.launch_outer_update, reference.outer_update):
        inner = torch.full((100,), float("nan"))
        update(codes, scales, outer.clone(), momentum.clone(), inner, torch.zeros(1, dtype=torch.int64), 0.7, 0.9, 0.0, "int8")
        assert inner.isfinite().all()


@pytest.mark.parametrize("n", SIZES)
def test_kernel_and_reference_take_the_same_fingerprint(n: int) -> None:
    state = tensors(n, 2)
    assert torch.equal(pg.launch_fingerprint(*state), reference.fingerprint_parts(*state))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 599), st.integers(0, 31), st.booleans(), st.booleans())
def test_no_flipped_bit_leaves_the_fingerprint_as_it_was(place: int, bit: int, in_momentum: bool, wide: bool) -> None:
    state = [tensor.to(torch.float64 if wide else torch.float32) for tensor in tensors(600, 2)]
    before = int(pg.fingerprint_parts(*state).sum())
    bits = state[in_momentum].view(torch.int64 if wide else torch.int32)
    bits[place] ^= 1 << bit if wide or bit < 31 else -(1 << 31)
    assert int(pg.fingerprint_parts(*state).sum()) != before


def test_swapped_elements_change_the_fingerprint() -> None:
    outer, momentum = tensors(600, 2)
    before = int(pg.fingerprint_parts(outer, momentum).sum())
    outer[[3, 500]] = outer[[500, 3]]
    assert int(pg.fingerprint_parts(outer, momentum).sum()) != before


@pytest.mark.parametrize("format", ["fp32", "int4"])
def test_the_operators_pass_opcheck(format: str) -> None:
    n = 300
    outer, inner, error, momentum = tensors(n, 4)
    codes, scales = room(n, format)
    torch.library.opcheck(pg.encode, (outer, inner, error, codes, scales, torch.zeros(n), torch.zeros(2), format))
    torch.library.opcheck(pg.fingerprint_parts, (outer, momentum))
    sent = torch.stack((codes, codes)), torch.stack((scales, scales))
    torch.library.opcheck(pg.reduce, (*sent, torch.tensor([0.5, 0.5]), codes.clone(), scales.clone(), format))
    prints = torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(pg.outer_update, (codes, scales, outer, momentum, inner, prints, 0.7, 0.9, 0.5, format))


@pytest.mark.parametrize("format", FORMATS)
def test_the_kernels_compile_for_sm90(format: str) -> None:
    module, options = "factory_train.kernels.pseudogradient", {"num_warps": 4, "enable_fp_fusion": False}
    block = {"FORMAT": format, "BLOCK": pg.BLOCK, "ROWS": pg.ROWS}
    names = ("outer", "inner", "error", "scales", "new_error", "squares")
    # A tensor of more than 2^31 elements makes n an i64.
    encode = dict.fromkeys(names, "*fp32") | {"codes": "*u8", "n": "i64", "num_blocks": "i32"}
    reduce = {"codes": "*u8", "scales": "*fp32", "weights": "*fp32", "out_codes": "*u8", "out_scales": "*fp32"}
    reduce |= {"num_blocks": "i32", "code_stride": "i64"}
    update = dict.fromkeys(("scales", "outer", "momentum", "inner"), "*fp32") | {"codes": "*u8", "prints": "*i64"}
    fingerprint = dict.fromkeys(("outer", "momentum"), "*fp32") | {"prints": "*i64", "n": "i64", "num_blocks": "i32", "mix_block": "i64"}
    mixes = {"MIX_OUTER": reference.MIX_OUTER, "MIX_MOMENTUM": reference.MIX_MOMENTUM}
    update |= {"n": "i32", "num_blocks": "i32", "first": "i32", "lr": "fp32", "mu": "fp32", "keep": "fp32", "mix_block": "i64"}
    compile_for_sm90(
        (module, "encode_pass", encode, {"HAS_ERROR": True} | block, options),
        (module, "reduce_pass", reduce, {"MEMBERS": 3} | block, options),
        (module, "update_pass", update, mixes | {"HAS_PRINTS": True} | block, options),
        (module, "fingerprint_pass", fingerprint, mixes | {"BLOCK": pg.BLOCK, "ROWS": pg.ROWS}, {"num_warps": 4}),
    )
