"""One round between islands: the mean, its bytes, damage, and islands that are not there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from island_threads import run_islands

from factory_train.distributed.encoded_reduce import Notice, Reduced, RoundFailedError, payload_bytes, reduce_round
from factory_train.distributed.gloo_wire import GlooWire, Parts
from factory_train.kernels import pseudogradient as kernels
from factory_train.kernels import pseudogradient_reference as reference

CPU = torch.device("cpu")
FORMATS = ["fp32", "bf16", "int8", "int4"]


def delta(member: int, n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(member)) * (member + 1)


def encode(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = kernels.num_blocks(x.numel())
    codes = torch.zeros(blocks * kernels.CODE_BYTES[format], dtype=torch.uint8)
    scales = torch.zeros(blocks if kernels.has_scales(format) else 0)
    nothing = torch.zeros(0, dtype=x.dtype)
    kernels.encode(x, torch.zeros_like(x), nothing, codes, scales, nothing, torch.zeros(blocks, dtype=x.dtype), format)
    return codes, scales


def decode(reduced: Reduced, n: int, format: str) -> torch.Tensor:
    return reference.decode(reduced.codes, reduced.scales, format).view(-1)[:n]


def a_round(n: int, format: str, weights: list[float], **notice: int):
    """Work of one member: encodes its pseudo-gradient and takes part."""

    def work(wire: GlooWire) -> tuple[Reduced, int]:
        mine = Notice(1, notice.get("number", 4), 2, 0, weights[wire.rank])
        reduced = reduce_round(wire, mine, *encode(delta(wire.rank, n), format), format, CPU, lambda: wire.rank)
        return reduced, wire.bytes_sent

    return work


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("members", "n"), [(1, 700), (2, 5000), (3, 1), (3, 4711), (4, 9000)])
def test_all_members_get_the_same_bytes_and_they_are_the_mean(format: str, members: int, n: int) -> None:
    results = run_islands(members, a_round(n, format, [1.0] * members))
    first = results[0][0]
    for reduced, _ in results:
        assert torch.equal(reduced.codes, first.codes)
        assert torch.equal(reduced.scales, first.scales)
        assert [notice.fingerprint for notice in reduced.notices] == list(range(members))
    exact = sum(delta(member, n).double() for member in range(members)) / members
    worst = {"fp32": 1e-6, "bf16": 2.0**-7, "int8": 1.2 / 127, "int4": 1.2 / 7}[format] * 4 * members
    assert (decode(first, n, format).double() - exact).abs().max() <= worst


def test_weights_count_and_zero_takes_part_without_counting() -> None:
    results = run_islands(3, a_round(600, "fp32", [3.0, 0.0, 1.0]))
    exact = 0.75 * delta(0, 600) + 0.25 * delta(2, 600)
    for reduced, _ in results:
        torch.testing.assert_close(decode(reduced, 600, "fp32"), exact)
    nothing = run_islands(2, a_round(600, "int8", [0.0, 0.0]))
    assert all(reduced.codes is None for reduced, _ in nothing)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("members", [2, 3])
def test_the_bytes_sent_are_those_of_the_formula(format: str, members: int) -> None:
    """Within 2 % of 2 (M-1)/M x payload with its scales."""
    n = 400_000
    results = run_islands(members, a_round(n, format, [1.0] * members))
    payload = n * {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}[format] + (n / 256 * 4 if format.startswith("int") else 0)
    for member, (_, sent) in enumerate(results):
        assert sent == payload_bytes(n, members, member, format)
        assert sent == pytest.approx(2 * (members - 1) / members * payload, rel=0.02)


class Damaging(GlooWire):
    """Flips a bit of what member 1 sends to member 0, in the first `times` tries: in its part, or in its result."""

    times = 1
    damaged_in = "part"

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.left = self.times if self.rank == 0 else 0
        self.calls = 0

    def all_to_all(self, received: Sequence[Parts], sent: Sequence[Parts], meanwhile: Callable[[], object] = lambda: None) -> None:
        super().all_to_all(received, sent, meanwhile)
        if self.left and self.damaged_in == ("part", "result")[self.calls % 2]:
            received[1][1][100] ^= 4
            self.left -= 1
        self.calls += 1


@pytest.mark.parametrize("where", ["part", "result"])
def test_what_arrives_damaged_is_sent_again(where: str) -> None:
    wire = type("Once", (Damaging,), {"times": 1, "damaged_in": where})
    results = run_islands(3, a_round(5000, "int8", [1.0] * 3), wire=wire)
    clean = run_islands(3, a_round(5000, "int8", [1.0] * 3))[0][0]
    for reduced, _ in results:
        assert reduced.tries == 2
        assert reduced.left_out == ()
        assert torch.equal(reduced.codes, clean.codes)


def test_an_island_whose_part_is_always_damaged_weighs_nothing() -> None:
    wire = type("Always", (Damaging,), {"times": 99})
    results = run_islands(3, a_round(5000, "fp32", [1.0] * 3), wire=wire)
    for reduced, _ in results:
        assert reduced.left_out == (1,)
        torch.testing.assert_close(decode(reduced, 5000, "fp32"), (delta(0, 5000) + delta(2, 5000)) / 2)


def test_a_result_that_is_always_damaged_fails_the_round_everywhere() -> None:
    wire = type("Always", (Damaging,), {"times": 99, "damaged_in": "result"})
    results = run_islands(3, a_round(5000, "int8", [1.0] * 3), wire=wire)
    assert all(isinstance(result, RoundFailedError) for result in results)


def test_islands_at_different_rounds_are_told_so() -> None:
    def work(wire: GlooWire) -> Reduced:
        notice = Notice(1, 7 + wire.rank, 0, 0, 1.0)
        return reduce_round(wire, notice, *encode(delta(0, 100), "int8"), "int8", CPU, lambda: 0)

    results = run_islands(2, work)
    assert all(isinstance(result, RoundFailedError) for result in results)
    assert "meet" in str(results[0])


def test_a_member_that_is_gone_fails_the_round_within_the_timeout() -> None:
    def work(wire: GlooWire) -> Reduced | None:
        return None if wire.rank == 2 else a_round(100, "int8", [1.0] * 3)(wire)

    results = run_islands(3, work, timeout_s=5.0)
    assert all(isinstance(result, RuntimeError) for result in results[:2])
