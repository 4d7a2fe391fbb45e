"""AdamW over `kernels/adamw.py`, as a `torch.optim.Optimizer`.

States lie in flat buffers, each parameter at a multiple of 256 elements; weights are moved into one too where that
helps. A step is three launches (two statistics, one update) and never waits for the device. Where gradients lie as the weights
do, in one buffer or in a few, the update takes them as flat buffers; otherwise it finds them by a table of addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from factory_train.distributed.box import local_tensor
from factory_train.distributed.encoded import Coded, Rounded, SplitWeight, Stored
from factory_train.distributed.flat_weights import held_numel, move_into
from factory_train.errors import ConfigError
from factory_train.kernels.adamw import adamw_flat, adamw_tensors
from factory_train.kernels.block_codes import BLOCK, num_blocks
from factory_train.kernels.gradient_statistics import CONTROL_SIZE, HYPER_SIZE, MAX_PARTIALS, gradient_squares, prepare_step

STATE_DTYPES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16), "int8": (torch.int8, torch.uint8)}
# Where gradients come in more buffers than this, one launch with a table takes less than one launch each.
_MAX_SPANS = 64
# A row of a flat buffer has one byte for its group.
_MAX_GROUPS = 256


@dataclass
class _Slot:
    """Where a parameter's states are, and views of them shaped like the local shard."""

    parameter: nn.Parameter
    group: int
    start: int
    numel: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scale: Tensor | None
    scale_sq: Tensor | None
    remainder: Tensor | None

    @property
    def weight(self) -> Tensor:
        return local_tensor(self.parameter.detach())

    def moment(self, key: str) -> Stored:
        """Returns a moment as it looks to a checkpoint: float32, of the shard's shape."""
        moment, scale = (self.exp_avg, self.scale) if key == "exp_avg" else (self.exp_avg_sq, self.scale_sq)
        if scale is not None:
            return Coded(moment, scale)
        return moment if moment.dtype == torch.float32 else Rounded(moment)


class FusedAdamW(torch.optim.Optimizer):
    """AdamW in one pass, with clipping and the decision to skip a step inside it.

    Args:
        params: parameters or groups, on one device: plain tensors, or shards of FSDP2. Float32; with `master="split"` bfloat16.
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`; groups may have their own.
        max_grad_norm: gradients are scaled down to this norm; 0 turns clipping off.
        state: how moments are kept: "fp32", "bf16" or "int8".
        master: "split" keeps beside a bfloat16 parameter the 16 bits that make it a float32, in which it is updated.
        remainders: those bits, int16 by parameter, shaped like local shards; default: zeros.
        owners: FSDP2's records of its shards (`flat_weights.shard_owners`), to move the weights into one buffer.
        flat_gradients: gradients lie in one buffer too and `zero_grad` fills it with zeros: addresses never change, as a CUDA graph
            needs it. It costs an addition where autograd would hand over its own tensor.

    Raises:
        ConfigError: parameters are not of the type that `master` needs, or there are more than 256 groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float = 0.0,
        state: str = "fp32",
        master: str = "fp32",
        remainders: Mapping[nn.Parameter, Tensor] | None = None,
        owners: Mapping[int, Any] | None = None,
        flat_gradients: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._max_grad_norm, self._owners = max_grad_norm, dict(owners or {})
        placed = [(parameter, index) for index, group in enumerate(self.param_groups) for parameter in group["params"]]
        placed = self._in_buffer_order(placed)
        self._device = local_tensor(placed[0][0].detach()).device
        wanted = torch.bfloat16 if master == "split" else torch.float32
        for parameter, _ in placed:
            if parameter.dtype != wanted:
                raise ConfigError(
                    f"master={master} is for {wanted} parameters, and one is {parameter.dtype}",
                    where="FusedAdamW",
                    fix=f"model.to({wanted}), or master={'fp32' if master == 'split' else 'split'}",
                )
        if len(self.param_groups) > _MAX_GROUPS:
            raise ConfigError(f"{len(self.param_groups)} groups, and {_MAX_GROUPS} are the most", where="FusedAdamW", fix="merge groups")
        self._build(placed, state, master == "split", remainders or {})
        self._flat_weight: Tensor | None = None
        self._flat_grad: Tensor | None = None
        if flat_gradients or self._owners:
            self._flatten_weights(wanted)
        if flat_gradients and self._flat_weight is not None:
            self._flat_grad = torch.zeros_like(self._flat_weight)
            self._adopt_gradients()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group while the optimizer is built; later there is no place for its states (raises ConfigError)."""
        if hasattr(self, "_slots"):
            raise ConfigError("parameters cannot be added to flat buffers", where="FusedAdamW", fix="build it with all parameters")
        super().add_param_group(param_group)

    def _in_buffer_order(self, placed: list[tuple[nn.Parameter, int]]) -> list[tuple[nn.Parameter, int]]:
        """Orders parameters as FSDP2 lays out a unit's gradients, so that those of a unit lie as the weights do."""
        order = {key: place for place, key in enumerate(self._owners)}
        return sorted(placed, key=lambda item: order.get(id(item[0]), len(order)))

    def _build(self, placed: list[tuple[nn.Parameter, int]], state: str, split: bool, remainders: Mapping[nn.Parameter, Tensor]) -> None:
        device, (first, second) = self._device, STATE_DTYPES[state]
        held = [-(-held_numel(parameter, self._owners) // BLOCK) * BLOCK for parameter, _ in placed]
        total, coded = sum(held), state == "int8"
        self._numel = total
        self._exp_avg = torch.zeros(total, dtype=first, device=device)
        self._exp_avg_sq = torch.zeros(total, dtype=second, device=device)
        self._scale, self._scale_sq = (torch.zeros(total // BLOCK, device=device) if coded else None for _ in range(2))
        self._remainder = torch.zeros(total, dtype=torch.int16, device=device) if split else None
        row_groups = torch.zeros(total // BLOCK, dtype=torch.uint8)
        self._slots: list[_Slot] = []
        start = 0
        for (parameter, group), length in zip(placed, held, strict=True):
            shape = local_tensor(parameter.detach()).shape
            place, rows = slice(start, start + shape.numel()), slice(start // BLOCK, start // BLOCK + num_blocks(shape.numel()))
            row_groups[start // BLOCK : (start + length) // BLOCK] = group
            scale, scale_sq = (None if every is None else every[rows] for every in (self._scale, self._scale_sq))
            remainder = None if self._remainder is None else self._remainder[place].view(shape)
            if remainder is not None and parameter in remainders:
                remainder.copy_(remainders[parameter])
            first_moment, second_moment = self._exp_avg[place].view(shape), self._exp_avg_sq[place].view(shape)
            self._slots.append(_Slot(parameter, group, start, shape.numel(), first_moment, second_moment, scale, scale_sq, remainder))
            start += length
        self._by_parameter = {id(slot.parameter): slot for slot in self._slots}
        self._present = [slot for slot in self._slots if slot.numel]
        self._row_groups = row_groups.to(device)
        self._tensor_groups = torch.tensor([slot.group for slot in self._present], dtype=torch.int32, device=device)
        groups = len(self.param_groups)
        self._hyper_rows: list[tuple[float, ...]] = []
        self._hyper = torch.zeros(groups, HYPER_SIZE, dtype=torch.float64, device=device)
        self._control = torch.zeros(groups, CONTROL_SIZE, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._norm = torch.zeros(1, dtype=torch.float64, device=device)
        self._flag = torch.zeros(2, dtype=torch.int32, device=device)
        self._never = torch.zeros((), device=device)
        self._partials = torch.zeros(MAX_PARTIALS if device.type == "cuda" else 2, dtype=torch.float64, device=device)

    def _flatten_weights(self, dtype: torch.dtype) -> None:
        flat = torch.zeros(self._numel, dtype=dtype, device=self._device)
        lengths = [held_numel(slot.parameter, self._owners) for slot in self._slots]
        places = [flat[slot.start : slot.start + length] for slot, length in zip(self._slots, lengths, strict=True)]
        if move_into(list(zip([slot.parameter for slot in self._slots], places, strict=True)), self._owners):
            self._flat_weight = flat

    def _adopt_gradients(self) -> None:
        assert self._flat_grad is not None
        for slot in self._slots:
            slot.parameter.grad = self._flat_grad[slot.start : slot.start + slot.numel].view(slot.parameter.shape)

    # Steps

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the gradient at the last step; float64 scalar on the device."""
        return self._norm[0]

    @property
    def skipped(self) -> Tensor:
        """How many steps were skipped because of their gradients; int32 scalar on the device."""
        return self._flag[1]

    def gradients(self) -> list[Tensor]:
        """Returns this rank's gradient shards; those without elements are left out."""
        return [_gradient(slot.parameter) for slot in self._present]

    def gradient_squares(self) -> Tensor:
        """Returns the sum of the squares of this rank's gradient shards; float64 scalar on the device."""
        gradient_squares(self._partials, self._gradient_buffers(self.gradients()))
        return self._partials.sum()

    def _gradient_buffers(self, grads: list[Tensor]) -> list[Tensor]:
        return [self._flat_grad] if self._flat_grad is not None and len(self._spans(grads)) == 1 else grads

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, grad_squares: Tensor | None = None, skip: Tensor | None = None) -> Any:
        """Updates the weights, unless the gradient is not finite.

        Args:
            closure: computes the loss and the gradients again.
            grad_squares: squared norm of the whole gradient, where the caller has it already; scalar on the device.
            skip: 1.0 leaves everything as it is; scalar on the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._upload_hyper()
        grads = self.gradients()
        if grad_squares is None:
            gradient_squares(self._partials, self._gradient_buffers(grads))
            partials = self._over_shards(self._partials)
        else:
            partials = grad_squares.double().view(1)
        skip = self._never if skip is None else skip
        prepare_step(partials, skip, self._hyper, self._control, self._step, self._norm, self._flag)
        spans = self._spans(grads)
        if 0 < len(spans) <= _MAX_SPANS:
            for place, grad in spans:
                self._update_flat(place, grad)
        elif self._present:
            self._update_tensors(grads)
        return loss

    def _update_flat(self, place: slice, grad: Tensor) -> None:
        assert self._flat_weight is not None
        rows = slice(place.start // BLOCK, place.stop // BLOCK)
        adamw_flat(
            self._flat_weight[place],
            None if self._remainder is None else self._remainder[place],
            grad,
            self._exp_avg[place],
            self._exp_avg_sq[place],
            None if self._scale is None else self._scale[rows],
            None if self._scale_sq is None else self._scale_sq[rows],
            self._row_groups[rows],
            self._control,
            self._flag,
        )

    def _update_tensors(self, grads: list[Tensor]) -> None:
        slots = self._present
        adamw_tensors(
            [slot.weight for slot in slots],
            [slot.remainder for slot in slots if slot.remainder is not None],
            grads,
            [slot.exp_avg for slot in slots],
            [slot.exp_avg_sq for slot in slots],
            [slot.scale for slot in slots if slot.scale is not None],
            [slot.scale_sq for slot in slots if slot.scale_sq is not None],
            self._tensor_groups,
            self._control,
            self._flag,
        )

    def _spans(self, grads: list[Tensor]) -> list[tuple[slice, Tensor]]:
        """Returns the parts of the flat buffers whose gradients lie in one piece, and those pieces; none where a table is needed."""
        if self._flat_weight is None:
            return []
        if self._flat_grad is not None:
            at = self._flat_grad.data_ptr()
            size = self._flat_grad.element_size()
            alike = all(grad.data_ptr() == at + slot.start * size for slot, grad in zip(self._present, grads, strict=True))
            return [(slice(0, self._numel), self._flat_grad)] if alike else []
        spans: list[tuple[slice, Tensor]] = []
        first: Tensor | None = None
        begin = end = 0
        for slot, grad in zip(self._present, grads, strict=True):
            if slot.numel % BLOCK:
                # What follows its end in a row belongs to somebody else.
                return []
            if first is not None and slot.start == end and _follows(first, grad, slot.start - begin):
                end += slot.numel
                spans[-1] = (slice(begin, end), first.as_strided((end - begin,), (1,)))
            else:
                first, begin, end = grad, slot.start, slot.start + slot.numel
                spans.append((slice(begin, end), grad.view(-1)))
        return spans

    def _over_shards(self, partials: Tensor) -> Tensor:
        """Returns the sum over the ranks that share one copy of the model, where there are several."""
        parameter = self._slots[0].parameter
        if not isinstance(parameter, DTensor):
            return partials
        total = partials.sum().view(1)
        for dim, placement in enumerate(parameter.placements):
            if not placement.is_replicate() and parameter.device_mesh.size(dim) > 1:
                dist.all_reduce(total, group=parameter.device_mesh.get_group(dim))
        return total

    def _upload_hyper(self) -> None:
        rows = [(group["lr"], *group["betas"], group["eps"], group["weight_decay"], self._max_grad_norm) for group in self.param_groups]
        if rows == self._hyper_rows:
            return
        host = torch.tensor(rows, dtype=torch.float64)
        self._hyper.copy_(host.pin_memory() if self._device.type == "cuda" else host, non_blocking=True)
        self._hyper_rows = rows

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients; those in a flat buffer become zeros."""
        if self._flat_grad is None:
            super().zero_grad(set_to_none)
            return
        self._flat_grad.zero_()
        self._adopt_gradients()

    # State

    def slot(self, parameter: nn.Parameter) -> _Slot:
        """Returns where the states of a parameter are."""
        return self._by_parameter[id(parameter)]

    def step_count(self) -> int:
        """Returns how many updates were made; waits for the device."""
        return int(self._step.item())

    def set_step_count(self, count: int) -> None:
        """Continues counting from `count`."""
        self._step.fill_(count)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in the form of `torch.optim.AdamW`'s: moments in float32, and "remainder" of split weights."""
        packed = super().state_dict()
        number = {id(p): index for index, p in enumerate(p for group in self.param_groups for p in group["params"])}
        step = self._step[0].float()
        for slot in self._slots:
            values: dict[str, Tensor] = {key: slot.moment(key).detach() for key in ("exp_avg", "exp_avg_sq")}
            if slot.remainder is not None:
                values["remainder"] = slot.remainder
            packed["state"][number[id(slot.parameter)]] = {
                "step": step.clone(),
                **{key: _like(value.clone(), slot.parameter) for key, value in values.items()},
            }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state of this class, in whatever encoding it was made, or of `torch.optim.AdamW`."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        number = {id(p): index for index, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for slot in self._slots:
            values = state_dict["state"].get(number[id(slot.parameter)])
            if values is None:
                continue
            self.set_step_count(int(values["step"]))
            for key in ("exp_avg", "exp_avg_sq"):
                slot.moment(key).copy_(local_tensor(values[key]))
            if slot.remainder is not None and "remainder" in values:
                slot.remainder.copy_(local_tensor(values["remainder"]))

    def master(self, parameter: nn.Parameter) -> Stored:
        """Returns the float32 weight of a parameter."""
        slot = self.slot(parameter)
        return slot.weight if slot.remainder is None else SplitWeight(slot.weight, slot.remainder)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "a parameter has no gradient"
    grad = local_tensor(parameter.grad)
    return grad if grad.is_contiguous() else grad.contiguous()


def _follows(first: Tensor, grad: Tensor, offset: int) -> bool:
    """Returns whether `grad` lies `offset` elements behind `first` in the same memory."""
    same = first.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr()
    return same and grad.data_ptr() == first.data_ptr() + offset * first.element_size()


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    """Returns a local tensor as what the parameter is, plain or a DTensor."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
