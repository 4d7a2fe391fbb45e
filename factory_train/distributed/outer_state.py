"""The outer state of one rank: parameters, momentum and what codes left out, flat by fragment, of the rank's own shards.

It costs 8 bytes a local parameter in float32, 12 with error feedback, and one buffer of the largest fragment in which inner
parameters are gathered: kernels then see a fragment as one tensor, whatever the parallel strategy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from factory_train.distributed.box import local_tensor
from factory_train.kernels import pseudogradient as kernels

PAYLOADS = ("none", "fp32", "bf16", "int8", "int4")


@dataclass
class Encoded:
    """A pseudo-gradient on its way, in host memory.

    Args:
        codes, scales: see `kernels.pseudogradient`.
        left_out: what the codes leave out, on the device; becomes the error feedback once the round counts.
        squares: sums of squares; not finite where an element is not.
        copied: on CUDA, when codes, scales and squares are in host memory.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    left_out: torch.Tensor
    squares: torch.Tensor
    copied: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Returns when the host may read it; not to be called where training must not wait."""
        if self.copied is not None:
            self.copied.synchronize()

    def is_finite(self) -> bool:
        """Returns whether all elements are; call `wait` before."""
        return bool(self.squares.sum().isfinite())


class _Fragment:
    """One fragment: where each parameter lies in it, and the state."""

    def __init__(self, names: Sequence[str], shards: Mapping[str, torch.Tensor], dtype: torch.dtype, feedback: bool) -> None:
        self.names = tuple(names)
        self.places: dict[str, tuple[int, torch.Size]] = {}
        self.numel = 0
        for name in names:
            self.places[name] = self.numel, shards[name].shape
            self.numel += shards[name].numel()
        device = next(iter(shards.values())).device
        self.outer, self.momentum = (torch.zeros(self.numel, dtype=dtype, device=device) for _ in range(2))
        self.error = torch.zeros(self.numel if feedback else 0, dtype=dtype, device=device)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the part of `flat` that is each parameter's, in its shape."""
        return {name: flat[start : start + shape.numel()].view(shape) for name, (start, shape) in self.places.items()}


class OuterState:
    """What a rank keeps of the outer optimizer.

    Args:
        parameters: inner ones, by name: plain tensors or DTensors, all of one floating type.
        fragments: names of each fragment; every name in exactly one.
        payload: one of `PAYLOADS`; none sends the parameters' own type.
        error_feedback: whether what a code leaves out is added to the next pseudo-gradient.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], fragments: Sequence[Sequence[str]], payload: str, *, error_feedback: bool
    ) -> None:
        assert sorted(name for names in fragments for name in names) == sorted(parameters), "each parameter is in one fragment"
        self._parameters = dict(parameters)
        shards = self._shards()
        self.dtype = next(iter(shards.values())).dtype
        wide = "fp64" if self.dtype == torch.float64 else "fp32"
        self.format = wide if payload == "none" else payload
        # A format as wide as the parameters leaves nothing out.
        self._fragments = [
            _Fragment(names, shards, self.dtype, error_feedback and self.format not in ("fp64", wide)) for names in fragments
        ]
        self.device = self._fragments[0].outer.device
        self._gathered = torch.zeros(max(fragment.numel for fragment in self._fragments), dtype=self.dtype, device=self.device)
        self.copy_inner_to_outer()

    def _shards(self) -> dict[str, torch.Tensor]:
        # Asked for anew each time: FSDP2 may give a parameter other memory between steps.
        return {name: local_tensor(parameter.detach()) for name, parameter in self._parameters.items()}

    def __len__(self) -> int:
        return len(self._fragments)

    def numel(self, fragment: int) -> int:
        """Returns the local elements of a fragment."""
        return self._fragments[fragment].numel

    def room(self, fragment: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns empty codes and scales of a fragment, in host memory."""
        blocks = kernels.num_blocks(self.numel(fragment))
        return (
            torch.empty(blocks * kernels.CODE_BYTES[self.format], dtype=torch.uint8),
            torch.empty(blocks if kernels.has_scales(self.format) else 0, dtype=torch.float32),
        )

    @torch.no_grad()
    def encode(self, fragment: int) -> Encoded:
        """Encodes outer - inner parameters of a fragment as they are now."""
        state = self._fragments[fragment]
        inner = self._gather(state)
        codes, scales = (tensor.to(self.device) for tensor in self.room(fragment))
        left_out = torch.empty_like(state.error)
        squares = torch.empty(kernels.num_blocks(state.numel), dtype=self.dtype, device=self.device)
        kernels.encode(state.outer, inner, state.error, codes, scales, left_out, squares, self.format)
        if self.device.type != "cuda":
            return Encoded(codes, scales, left_out, squares)
        hosted = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in (codes, scales, squares)]
        for host, tensor in zip(hosted, (codes, scales, squares), strict=True):
            host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Encoded(hosted[0], hosted[1], left_out, hosted[2], copied)

    @torch.no_grad()
    def apply(self, fragment: int, codes: torch.Tensor, scales: torch.Tensor, *, lr: float, momentum: float, keep: float) -> torch.Tensor:
        """Takes the outer step of a fragment; see `kernels.pseudogradient.outer_update`.

        Returns:
            The fingerprint's parts, on the device.
        """
        state = self._fragments[fragment]
        inner = self._gather(state)
        prints = torch.empty(kernels.num_blocks(state.numel), dtype=torch.int64, device=self.device)
        kernels.outer_update(
            codes.to(self.device), scales.to(self.device), state.outer, state.momentum, inner, prints, lr, momentum, keep, self.format
        )
        self._scatter(state, inner)
        return prints

    @torch.no_grad()
    def mix(self, fragment: int, keep: float) -> None:
        """Makes the inner parameters `keep` inner + (1 - `keep`) outer, without an outer step."""
        state = self._fragments[fragment]
        inner = self._gather(state)
        self._scatter(state, inner.mul_(keep).add_(state.outer, alpha=1.0 - keep) if keep else state.outer)

    @torch.no_grad()
    def accept(self, fragment: int, encoded: Encoded) -> None:
        """Makes what a code left out the error feedback: its round counts."""
        self._fragments[fragment].error.copy_(encoded.left_out)

    @torch.no_grad()
    def fingerprint(self, fragment: int) -> int:
        """Returns the fingerprint of outer parameters and momentum of a fragment; waits for the device."""
        state = self._fragments[fragment]
        return int(kernels.fingerprint_parts(state.outer, state.momentum).sum().item())

    @torch.no_grad()
    def copy_inner_to_outer(self) -> None:
        """Begins from the inner parameters: they become the outer ones."""
        shards = self._shards()
        for fragment in self._fragments:
            for name, view in fragment.views(fragment.outer).items():
                view.copy_(shards[name])

    @torch.no_grad()
    def copy_outer_to_inner(self) -> None:
        """Begins from the outer parameters: they become the inner ones, and nothing is left out."""
        for fragment in self._fragments:
            self._scatter(fragment, fragment.outer)
            fragment.error.zero_()

    @contextlib.contextmanager
    def outer_in_model(self) -> Iterator[None]:
        """Puts the outer parameters into the model for a while, as for a validation."""
        shards = self._shards()
        kept = {name: shard.clone() for name, shard in shards.items()}
        with torch.no_grad():
            for fragment in self._fragments:
                self._scatter(fragment, fragment.outer)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, shard in self._shards().items():
                    shard.copy_(kept[name])

    def tensors(self, fragment: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns outer parameters and momentum of a fragment, flat: what one that joins receives."""
        return self._fragments[fragment].outer, self._fragments[fragment].momentum

    def named(self, kind: str) -> dict[str, torch.Tensor]:
        """Returns views by parameter name of "outer", "momentum" or "error"; empty without error feedback."""
        flats = {"outer": [f.outer for f in self._fragments], "momentum": [f.momentum for f in self._fragments]}
        flats["error"] = [fragment.error for fragment in self._fragments]
        pairs = zip(self._fragments, flats[kind], strict=True)
        return {name: view for fragment, flat in pairs if flat.numel() or not fragment.numel for name, view in fragment.views(flat).items()}

    def left_out_views(self, fragment: int, left_out: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Returns views by parameter name of what a code leaves out, or, for None, of a new tensor for it; empty without feedback."""
        state = self._fragments[fragment]
        if state.numel and not state.error.numel():
            return {}
        return state.views(torch.zeros_like(state.error) if left_out is None else left_out)

    def empty_code(self, fragment: int) -> Encoded:
        """Returns a code to be filled from a checkpoint."""
        state = self._fragments[fragment]
        codes, scales = self.room(fragment)
        squares = torch.zeros(1, dtype=self.dtype)
        return Encoded(codes, scales, torch.zeros_like(state.error), squares)

    def _gather(self, fragment: _Fragment) -> torch.Tensor:
        """Returns the inner parameters of a fragment as one flat tensor."""
        shards = self._shards()
        inner = self._gathered[: fragment.numel]
        views = fragment.views(inner)
        if views:
            torch._foreach_copy_(list(views.values()), [shards[name] for name in views])
        return inner

    def _scatter(self, fragment: _Fragment, flat: torch.Tensor) -> None:
        shards, views = self._shards(), fragment.views(flat)
        if views:
            torch._foreach_copy_([shards[name] for name in views], list(views.values()))
