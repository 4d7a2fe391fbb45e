"""The outer state of one rank: parameters, momentum and what codes left out, flat by fragment, of the rank's own shards.

It costs 8 bytes a local parameter in float32, 12 with error feedback, and codes and what they leave out of one fragment. Kernels
see a fragment as one tensor, whatever the parallel strategy: it is worked through in windows, and inner parameters are gathered
only where a window holds more than one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from factory_train.distributed.box import local_tensor
from factory_train.distributed.windows import cut
from factory_train.kernels import pseudogradient as kernels

PAYLOADS = ("none", "fp32", "bf16", "int8", "int4")
# Blocks of a window, and how many of one parameter are one of their own, on a CPU and on a card.
_WINDOW_BLOCKS, _ALONE_BLOCKS = (2048, 65536), (1024, 4096)


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
        on_card = device.type == "cuda"
        sizes = {name: (start, shape.numel()) for name, (start, shape) in self.places.items()}
        self.windows = cut(sizes, _WINDOW_BLOCKS[on_card], _ALONE_BLOCKS[on_card])

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
        # What the next code leaves out is written over error feedback that is not needed any more.
        self._spare: torch.Tensor | None = None
        # Codes and scales of the round under way: one is at a time.
        self._code_room: tuple[torch.Tensor, torch.Tensor] | None = None
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
        return self._room(kernels.num_blocks(self.numel(fragment)), pinned=False)

    def _room(self, blocks: int, *, pinned: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            torch.empty(blocks * kernels.CODE_BYTES[self.format], dtype=torch.uint8, pin_memory=pinned),
            torch.empty(blocks if kernels.has_scales(self.format) else 0, dtype=torch.float32, pin_memory=pinned),
        )

    @torch.no_grad()
    def encode(self, fragment: int) -> Encoded:
        """Encodes outer - inner parameters of a fragment as they are now; the code before must not be needed any more."""
        state = self._fragments[fragment]
        blocks, on_card = kernels.num_blocks(state.numel), self.device.type == "cuda"
        if self._code_room is None:
            largest = max(kernels.num_blocks(state.numel) for state in self._fragments)
            self._code_room = self._room(largest, pinned=on_card)
        hosted = self._code_room[0][: blocks * kernels.CODE_BYTES[self.format]], self._code_room[1][:blocks]
        codes, scales = (torch.empty_like(host, device=self.device) for host in hosted) if on_card else hosted
        spare, self._spare = self._spare, None
        left_out = spare if spare is not None and spare.shape == state.error.shape else torch.empty_like(state.error)
        squares = torch.empty(blocks, dtype=self.dtype, device=self.device)
        flats = self._flats(state)
        for window in state.windows:
            at = window.elements
            kernels.encode(
                state.outer[at], window.gather(flats), state.error[at], codes[window.code_bytes(self.format)],
                scales[window.blocks], left_out[at], squares[window.blocks], self.format,
            )  # fmt: skip
        if not on_card:
            return Encoded(codes, scales, left_out, squares)
        host_squares = torch.empty_like(squares, device="cpu", pin_memory=True)
        for host, tensor in zip((*hosted, host_squares), (codes, scales, squares), strict=True):
            host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Encoded(*hosted, left_out, host_squares, copied)

    @torch.no_grad()
    def apply(self, fragment: int, codes: torch.Tensor, scales: torch.Tensor, *, lr: float, momentum: float, keep: float) -> torch.Tensor:
        """Takes the outer step of a fragment; see `kernels.pseudogradient.outer_update`.

        Returns:
            The fingerprint's parts, on the device; none of an only fragment, whose fingerprint is taken anew for each round.
        """
        state = self._fragments[fragment]
        num_prints = kernels.num_blocks(state.numel) if len(self) > 1 else 0
        prints = torch.empty(num_prints, dtype=torch.int64, device=self.device)
        flats = self._flats(state)
        for window in state.windows:
            at, blocks, inner = window.elements, window.blocks, window.gather(flats, read=keep != 0)
            # From pinned memory the host does not wait. What is there stays until the round after the next, whose code waits for this.
            code = codes[window.code_bytes(self.format)].to(self.device, non_blocking=True)
            kernels.outer_update(
                code, scales[blocks].to(self.device, non_blocking=True),
                state.outer[at], state.momentum[at], inner, prints[blocks], lr, momentum, keep, self.format, blocks.start,
            )  # fmt: skip
            window.scatter(inner, flats)
        self._put_back(flats)
        return prints

    @torch.no_grad()
    def mix(self, fragment: int, keep: float) -> None:
        """Makes the inner parameters `keep` inner + (1 - `keep`) outer, without an outer step."""
        state, shards = self._fragments[fragment], self._shards()
        for name, outer in state.views(state.outer).items():
            if keep:
                shards[name].mul_(keep).add_(outer, alpha=1.0 - keep)
            else:
                shards[name].copy_(outer)

    @torch.no_grad()
    def accept(self, fragment: int, encoded: Encoded) -> None:
        """Makes what a code left out the error feedback: its round counts."""
        state = self._fragments[fragment]
        state.error, self._spare = encoded.left_out, state.error

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

    def _flats(self, fragment: _Fragment) -> dict[str, torch.Tensor]:
        """Returns the shards of a fragment's parameters, flat: themselves, or copies where their elements do not follow each other."""
        shards = self._shards()
        return {name: shards[name].reshape(-1) for name in fragment.names}

    def _put_back(self, flats: Mapping[str, torch.Tensor]) -> None:
        """Takes over what was written into flat copies."""
        shards = self._shards()
        for name, flat in flats.items():
            if flat.data_ptr() != shards[name].data_ptr():
                shards[name].copy_(flat.view(shards[name].shape))

    def _scatter(self, fragment: _Fragment, flat: torch.Tensor) -> None:
        shards, views = self._shards(), fragment.views(flat)
        if views:
            torch._foreach_copy_([shards[name] for name in views], list(views.values()))
