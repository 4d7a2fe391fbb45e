"""Moving parameters into one buffer under the feet of those who hold them: of plain parameters, and of FSDP2's shards.

What FSDP2 keeps is private to torch, so all that knows of it is here; the names are those of torch 2.13, and of older
versions that have one group of parameters a module. Where they are not what is expected nothing is moved and the answer is
no: whoever asked then takes the parameters where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from factory_train.distributed.box import local_tensor


def shard_owners(module: nn.Module) -> dict[int, Any]:
    """Returns FSDP2's own record of each sharded parameter, by the parameter's id; empty where there is none or torch differs."""
    owners: dict[int, Any] = {}
    for child in module.modules():
        if not isinstance(child, FSDPModule):
            continue
        state = child._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:
            groups = [group for group in [getattr(state, "_fsdp_param_group", None)] if group is not None]
        for group in groups:
            for record in getattr(group, "fsdp_params", ()):
                if not _is_as_expected(record):
                    return {}
                owners[id(record.sharded_param)] = record
    return owners


def _is_as_expected(record: Any) -> bool:
    names = ("sharded_param", "_sharded_param_data", "padded_sharded_param_size", "fsdp_placement")
    if not all(hasattr(record, name) for name in names) or not hasattr(record.sharded_param, "_local_tensor"):
        return False
    data = record._sharded_param_data
    return type(data) is torch.Tensor and data.numel() == record.padded_sharded_param_size.numel() and record.fsdp_placement.dim == 0


def held_numel(parameter: Tensor, owners: dict[int, Any]) -> int:
    """Returns the elements this rank keeps of a parameter; FSDP2 pads the last ranks' shards to the size of the first's."""
    owner = owners.get(id(parameter))
    return int(owner._sharded_param_data.numel()) if owner is not None else local_tensor(parameter.detach()).numel()


@torch.no_grad()
def move_into(places: Sequence[tuple[nn.Parameter, Tensor]], owners: dict[int, Any]) -> bool:
    """Makes each parameter live in its place; returns False, having moved nothing, where one is sharded by somebody unknown.

    Args:
        places: parameters and one-dimensional tensors of `held_numel` elements of the same type, which get their values.
        owners: of `shard_owners`.
    """
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) and id(parameter) not in owners for parameter, _ in places):
        return False
    for parameter, place in places:
        owner = owners.get(id(parameter))
        if owner is None:
            place.copy_(parameter.detach().reshape(-1))
            parameter.data = place.view(parameter.shape)
            continue
        shape = parameter._local_tensor.shape  # type: ignore[attr-defined]
        place.copy_(owner._sharded_param_data)
        owner._sharded_param_data = place
        parameter._local_tensor = place[: shape.numel()].view(shape)  # type: ignore[attr-defined]
    return True
