"""Muon's kernels: the Triton code (in the interpreter), the references, the operators, and the iteration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sm90 import compile_for_sm90

from factory_train.kernels import muon

SIZES = [1, 7, muon.BLOCK - 1, muon.BLOCK, muon.BLOCK + 1]
RUN, SKIP = torch.zeros(()), torch.ones(())


def tensors(n: int, num: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + n)
    return [torch.randn(n, generator=generator) for _ in range(num)]


@pytest.mark.parametrize("implementation", [muon.launch_momentum, muon.reference_momentum])
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", SIZES)
def test_momentum_agrees_with_float64(implementation, update_dtype: torch.dtype, n: int) -> None:
    momentum, grad = tensors(n, 2)
    divisor = torch.tensor(3.5, dtype=torch.float64)
    scaled = grad.double() / 3.5
    average = 0.95 * momentum.double() + 0.05 * scaled
    ahead = 0.05 * scaled + 0.95 * average
    update = torch.full((n,), float("nan"), dtype=update_dtype)
    implementation(momentum, grad, update, divisor, RUN, 0.95)
    torch.testing.assert_close(momentum.double(), average, rtol=1e-6, atol=1e-6)
    loose = 1e-6 if update_dtype == torch.float32 else 4e-3
    torch.testing.assert_close(update.double(), ahead, rtol=loose, atol=1e-6)


@pytest.mark.parametrize("implementation", [muon.launch_apply, muon.reference_apply])
@pytest.mark.parametrize("update_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", SIZES)
def test_the_update_agrees_with_float64(implementation, update_dtype: torch.dtype, n: int) -> None:
    weight, update = tensors(n, 2)
    update = update.to(update_dtype)
    expected = weight.double() * 0.99 - 0.03 * update.double()
    implementation(weight, update, RUN, 0.99, 0.03)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("momentum_pass", "apply_pass"), [(muon.launch_momentum, muon.launch_apply), (muon.reference_momentum, muon.reference_apply)]
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1.0])
def test_a_skipped_step_leaves_every_bit(momentum_pass, apply_pass, poison: float) -> None:
    momentum, grad, update, weight = tensors(5000, 4)
    before = momentum.clone(), weight.clone()
    momentum_pass(momentum, grad * poison, update, torch.ones((), dtype=torch.float64), SKIP, 0.95)
    apply_pass(weight, torch.full_like(weight, poison), SKIP, 0.99, 0.1)
    assert torch.equal(momentum, before[0])
    assert torch.equal(weight, before[1])


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 9000), offset=st.integers(0, 9))
def test_nothing_outside_of_the_tensors_is_touched(n: int, offset: int) -> None:
    """Tensors lie in larger buffers at any offset, as in the buffer that is sent."""
    buffers = tensors(n + 20, 3, seed=offset)
    before = [buffer.clone() for buffer in buffers]
    momentum, update, weight = (buffer[offset : offset + n] for buffer in buffers)
    (grad,) = tensors(n, 1, seed=1)
    muon.launch_momentum(momentum, grad, update, torch.ones((), dtype=torch.float64), RUN, 0.9)
    muon.launch_apply(weight, update, RUN, 0.9, 0.1)
    for buffer, old in zip(buffers, before, strict=True):
        assert torch.equal(buffer[:offset], old[:offset])
        assert torch.equal(buffer[offset + n :], old[offset + n :])
        assert not torch.equal(buffer[offset : offset + n], old[offset : offset + n])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 8), (2, 5, 13), (2, 13, 5), (1, 1, 9)])
def test_singular_values_come_close_to_one_and_the_vectors_stay(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    # Given ones: from the norm down to 2e-3 of it.
    s = torch.logspace(0, -2.7, s.shape[-1], dtype=torch.float64).expand(s.shape)
    found = muon.orthogonalize(u @ torch.diag_embed(s) @ vh, 5)
    inner = u.mT @ found @ vh.mT
    values = torch.diagonal(inner, dim1=-2, dim2=-1)
    assert values.min() > 0.8
    assert values.max() < 1.15
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-12)


def test_more_iterations_converge_to_the_polar_factor() -> None:
    x = torch.randn(2, 6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(muon.orthogonalize(x, 10), u @ vh, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_float64(dtype: torch.dtype) -> None:
    x = torch.randn(4, 48, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = muon.orthogonalize(x.double(), 5)
    error = (muon.orthogonalize(x, 5).double() - exact).norm() / exact.norm()
    print(f"{dtype}: relative error {error:.1e}")
    assert error < (1e-5 if dtype == torch.float32 else 5e-2)


def test_the_result_does_not_depend_on_the_scale_and_zeros_stay_zeros() -> None:
    x = torch.randn(1, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(muon.orthogonalize(x * 1e-12, 5), muon.orthogonalize(x, 5), rtol=1e-9, atol=1e-12)
    assert not muon.orthogonalize(torch.zeros(1, 6, 9), 5).any()


def test_the_operators_pass_opcheck_and_compile() -> None:
    momentum, grad, update, weight = tensors(33, 4)
    one = torch.ones((), dtype=torch.float64)
    torch.library.opcheck(muon.muon_momentum, (momentum, grad, update.bfloat16(), one, RUN, 0.95))
    torch.library.opcheck(muon.muon_apply, (weight, update, RUN, 0.99, 0.1))

    def step(momentum: torch.Tensor, grad: torch.Tensor, update: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        muon.muon_momentum(momentum, grad, update, one, RUN, 0.95)
        muon.muon_apply(weight, update, RUN, 0.99, 0.1)
        return weight * 2

    copies = [tensor.clone() for tensor in (momentum, grad, update, weight)]
    found = torch.compile(step, backend="aot_eager", fullgraph=True)(*copies)
    torch.testing.assert_close(found, step(momentum, grad, update, weight))
    torch.testing.assert_close(copies[0], momentum)


def test_the_kernels_compile_for_sm90_with_accesses_of_sixteen_bytes() -> None:
    module, options, block = "factory_train.kernels.muon", {"num_warps": 8}, {"BLOCK": muon.BLOCK}
    momentum = {"momentum": "*fp32", "grad": "*fp32", "update": "*bf16", "divisor": "*fp64", "skip": "*fp32", "n": "i32"}
    # A tensor of more than 2^31 elements makes n an i64.
    apply = {"weight": "*fp32", "update": "*bf16", "skip": "*fp32", "n": "i64", "keep": "fp32", "rate": "fp32"}
    found = compile_for_sm90(
        (module, "momentum_pass", momentum, {"BETA": 0.95} | block, options, list(momentum)),
        (module, "apply_pass", apply, block, options, ["weight", "update", "n"]),
    )
    for accesses in found:
        assert accesses["ld.global.v4.b32"] >= 6
        assert not [kind for kind in accesses if kind.startswith("st") and ".v4" not in kind]
