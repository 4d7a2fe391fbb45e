"""The outer state of a rank: the same numbers in whatever windows it is worked through and however parameters lie in memory."""

from __future__ import annotations

import pytest
import torch

from factory_train.distributed import outer_state
from factory_train.distributed.outer_state import OuterState
from factory_train.kernels import pseudogradient as kernels

FRAGMENTS = [["a", "c"], ["b", "d"]]


def parameters() -> dict[str, torch.Tensor]:
    """Of sizes that are no multiples of a block; the elements of one do not follow each other."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (3, 211), "b": (1000,), "c": (77, 9), "d": (1,)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found["c"] = found["c"].t()
    assert not found["c"].is_contiguous()
    return found


def outer_steps(payload: str) -> tuple[dict[str, torch.Tensor], OuterState, list[torch.Tensor]]:
    values, found = parameters(), []
    state = OuterState(values, FRAGMENTS, payload, error_feedback=True)
    for step in range(3):
        for fragment in range(2):
            for value in values.values():
                value.mul_(0.9).add_(0.01 * step)
            encoded = state.encode(fragment)
            found += [encoded.codes.clone(), encoded.scales.clone(), encoded.squares]
            prints = state.apply(fragment, encoded.codes, encoded.scales, lr=0.7, momentum=0.9, keep=0.25)
            assert int(prints.sum()) == state.fingerprint(fragment)
            state.accept(fragment, encoded)
    state.mix(0, 0.5)
    state.mix(1, 0.0)
    return values, state, found


@pytest.mark.parametrize("payload", ["fp32", "int4"])
def test_windows_do_not_change_a_bit(payload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, state, codes = outer_steps(payload)
    monkeypatch.setattr(outer_state, "_WINDOW_BLOCKS", (1, 1))
    small_values, small_state, small_codes = outer_steps(payload)
    assert all(torch.equal(values[name], small_values[name]) for name in values)
    for kind in ("outer", "momentum", "error"):
        theirs = small_state.named(kind)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in state.named(kind).items())
    assert all(torch.equal(a, b) for a, b in zip(codes, small_codes, strict=True))
    assert torch.equal(values["b"], state.named("outer")["b"]), "mixed with nothing kept"


def test_the_outer_step_is_the_one_of_each_parameter() -> None:
    values = parameters()
    state = OuterState(values, [["a", "b", "c", "d"]], "fp32", error_feedback=True)
    start = {name: value.clone() for name, value in values.items()}
    for value in values.values():
        value -= 0.125
    encoded = state.encode(0)
    assert not state.apply(0, encoded.codes, encoded.scales, lr=1.0, momentum=0.0, keep=0.0).numel(), "taken anew for each round"
    for name, value in values.items():
        torch.testing.assert_close(value, start[name] - 0.125, rtol=0, atol=1e-6)
    assert encoded.codes.numel() == kernels.num_blocks(sum(value.numel() for value in values.values())) * kernels.CODE_BYTES["fp32"]


def test_what_a_code_left_out_counts_only_when_its_round_does() -> None:
    values = parameters()
    state = OuterState(values, FRAGMENTS, "int4", error_feedback=True)
    for value in values.values():
        value.mul_(0.9)
    first = state.encode(0)
    kept = first.left_out.clone()
    assert not state.named("error")["a"].any()
    state.accept(0, first)
    second = state.encode(0)
    assert torch.equal(state.named("error")["a"].reshape(-1), kept[: values["a"].numel()]), "the next code is written elsewhere"
    assert not torch.equal(second.left_out, kept)
