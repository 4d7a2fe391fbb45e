"""Network settings by kind of fabric: environment variables that NCCL and gloo read, each with where it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """One environment variable.

    Args:
        value: what it is set to.
        source: why this value, and which document says so.
    """

    value: str
    source: str


# The last collectives of each rank stay in memory and are written down when one times out: cheap enough to be always on.
_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": Setting("2000", "PyTorch, 'Flight Recorder for Debugging Stuck Jobs': events kept; 0 is off"),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": Setting("1", "PyTorch, same tutorial: write them when the watchdog fires"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": Setting(
        "1", "PyTorch, ProcessGroupNCCL environment variables: a timed-out collective ends its rank"
    ),
}

_COMMON = {
    "NCCL_DEBUG": Setting("WARN", "NVIDIA, NCCL user guide, environment variables: says what failed, and little else"),
}

FABRICS: Mapping[str, Mapping[str, Setting]] = {
    # What NCCL and gloo find by themselves.
    "auto": {},
    "ib": {
        "NCCL_IB_DISABLE": Setting("0", "NCCL user guide: InfiniBand verbs in use, even where a site's default says otherwise"),
        "NCCL_IB_TIMEOUT": Setting("22", "NCCL user guide: 4.096 us x 2^22 = 17 s for a lost packet; large fabrics need more than 20"),
        "NCCL_IB_RETRY_CNT": Setting("7", "InfiniBand specification and NCCL user guide: 7 is both the most and the default"),
        "NCCL_SOCKET_IFNAME": Setting(
            "^lo,docker,virbr", "NCCL user guide: bootstrap over any interface but those no other node can reach"
        ),
    },
    "roce": {
        "NCCL_IB_DISABLE": Setting("0", "NCCL user guide: RoCE goes through the same verbs as InfiniBand"),
        "NCCL_IB_GID_INDEX": Setting("3", "NCCL user guide: the index of the RoCE v2 address, 3 on most hosts; show_gids lists them"),
        "NCCL_IB_TIMEOUT": Setting("22", "as for ib"),
        "NCCL_IB_RETRY_CNT": Setting("7", "as for ib"),
        "NCCL_SOCKET_IFNAME": Setting("^lo,docker,virbr", "as for ib"),
    },
    "efa": {
        "FI_PROVIDER": Setting("efa", "AWS, aws-ofi-nccl README: libfabric's provider for Elastic Fabric Adapter"),
        "FI_EFA_USE_DEVICE_RDMA": Setting("1", "libfabric, fi_efa(7): RDMA reads from the device (p4d and newer)"),
        "FI_EFA_FORK_SAFE": Setting("1", "libfabric, fi_efa(7): the checkpoint writer is started from the rank"),
        "NCCL_SOCKET_IFNAME": Setting("^lo,docker,virbr", "as for ib"),
    },
    "tcp": {
        "NCCL_IB_DISABLE": Setting("1", "NCCL user guide: sockets only"),
        "NCCL_NET": Setting("Socket", "NCCL user guide: the name of the socket transport; a plug-in is not tried"),
        "NCCL_SOCKET_IFNAME": Setting("^lo,docker,virbr", "as for ib"),
    },
    # All ranks on one machine, as on a test cluster whose nodes are processes.
    "loopback": {
        "NCCL_IB_DISABLE": Setting("1", "as for tcp"),
        "NCCL_NET": Setting("Socket", "as for tcp"),
        "NCCL_SOCKET_IFNAME": Setting("lo", "ip-link(8): the loopback interface of Linux"),
        "GLOO_SOCKET_IFNAME": Setting("lo", "PyTorch, 'Distributed communication package': the interface gloo binds to"),
    },
}


def fabric_environ(fabric: str, interface: str | None, trace_folder: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns what a rank's environment gets for its network.

    Args:
        fabric: launcher.fabric.
        interface: launcher.interface; it goes before the preset's.
        trace_folder: where NCCL's flight recorder writes, a file a rank.
        environ: what a person or a site has set already; it stays.
    """
    settings = {name: setting.value for name, setting in {**_RECORDER, **_COMMON, **FABRICS[fabric]}.items()}
    settings["TORCH_FR_DUMP_TEMP_FILE"] = f"{trace_folder}/nccl_trace_rank_"
    if interface is not None:
        settings |= {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface}
    return {name: value for name, value in settings.items() if name not in environ}
