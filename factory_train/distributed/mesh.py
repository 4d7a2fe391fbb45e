"""The device mesh: which ranks replicate the model and which share one copy."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of the mesh axes, already resolved against the world size.

    Args:
        dp_replicate: copies of the (sharded) model; data-parallel.
        dp_shard: ranks that share one copy; data-parallel too.
    """

    dp_replicate: int
    dp_shard: int

    @property
    def dp_size(self) -> int:
        """Number of ranks that process different rows."""
        return self.dp_replicate * self.dp_shard

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """Returns the mesh with axes dp_replicate and dp_shard; rank = replicate * dp_shard + shard."""
        return init_device_mesh(device_type, (self.dp_replicate, self.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard"))
