"""What the ranks run on: kind, number, memory and peak speed of the devices, found without importing torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from factory_train.config import HardwareConfig

_MIB = 1024**2


@dataclass(frozen=True)
class Hardware:
    """One machine as a rank sees it.

    Args:
        name: what it is, for people.
        device: "cuda" or "cpu".
        num_devices: cards of one machine; a machine without cards is itself one device.
        memory_bytes: memory of one device, what is free of it now for a cpu; None when unknown.
        peak_flops: dense bf16 peak of one device in FLOP/s; None when unknown.
    """

    name: str
    device: str
    num_devices: int
    memory_bytes: int | None
    peak_flops: float | None


@dataclass(frozen=True)
class Card:
    """A card of a known kind: memory as the driver reports it, dense bf16 peak of the tensor cores."""

    memory_bytes: int
    peak_flops: float


# By the exact name the driver reports: a near match could be a card with half the speed. Data sheets state the rate with
# 2:4 sparsity; the dense rate is half of it.
KNOWN_CARDS: Mapping[str, Card] = {
    # A100 data sheet (2021): 312 TFLOP/s, 624 with sparsity, the same for SXM and PCIe.
    "NVIDIA A100-SXM4-40GB": Card(40960 * _MIB, 312e12),
    "NVIDIA A100-SXM4-80GB": Card(81920 * _MIB, 312e12),
    "NVIDIA A100-PCIE-40GB": Card(40960 * _MIB, 312e12),
    "NVIDIA A100 80GB PCIe": Card(81920 * _MIB, 312e12),
    # H100 architecture white paper, table 2: SXM5 989.4, PCIe 756 dense. Data sheet: NVL 1671 with sparsity.
    "NVIDIA H100 80GB HBM3": Card(81559 * _MIB, 989.4e12),
    "NVIDIA H100 PCIe": Card(81559 * _MIB, 756e12),
    "NVIDIA H100 NVL": Card(95830 * _MIB, 835.5e12),
    # H200 data sheet: SXM 1979 with sparsity (the same chip as H100 SXM), NVL 1671.
    "NVIDIA H200": Card(143771 * _MIB, 989.4e12),
    "NVIDIA H200 NVL": Card(143771 * _MIB, 835.5e12),
    # Blackwell architecture brief, HGX B200: 4.5 PFLOP/s with sparsity.
    "NVIDIA B200": Card(183359 * _MIB, 2250e12),
    # L4 and L40S data sheets: 242 and 733 (L40S: 362.05 dense) with sparsity.
    "NVIDIA L4": Card(23034 * _MIB, 121e12),
    "NVIDIA L40S": Card(46068 * _MIB, 362.05e12),
}


def known_peak_flops(card_name: str) -> float | None:
    """Returns the dense bf16 peak in FLOP/s of the card that the driver calls `card_name`; None when it is not known."""
    card = KNOWN_CARDS.get(card_name)
    return card.peak_flops if card else None


def detect(cfg: HardwareConfig) -> Hardware:
    """Returns the hardware a run gets: what the configuration states, and this machine for what it leaves open."""
    cards = visible_cards() if cfg.device != "cpu" else []
    if cards and cfg.device == "auto" and _torch_is_cpu_build():
        cards = []
    if cfg.device == "cuda" or cards:
        name, memory_bytes = cards[0] if cards else (cfg.name, None)
        found = Hardware(name, "cuda", max(1, len(cards)), memory_bytes, known_peak_flops(name))
    else:
        found = Hardware(f"CPU, {num_cores()} cores", "cpu", 1, available_memory_bytes(), None)
    return Hardware(
        found.name if cfg.name == "auto" else cfg.name,
        found.device,
        found.num_devices,
        found.memory_bytes if cfg.memory_bytes is None else cfg.memory_bytes,
        found.peak_flops if cfg.peak_flops is None else cfg.peak_flops,
    )


def _torch_is_cpu_build() -> bool:
    """Returns whether the installed torch says of itself that it cannot use a card."""
    from importlib import metadata

    try:
        return metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def visible_cards(
    root: Path = Path("/"), environ: Mapping[str, str] = os.environ, *, ask_driver: bool = True
) -> list[tuple[str, int | None]]:
    """Returns (name, memory in bytes) of each NVIDIA card that a process started here may use.

    Args:
        root: where /proc and /dev are.
        environ: CUDA_VISIBLE_DEVICES is read from it.
        ask_driver: run nvidia-smi where the files do not tell; it takes about a second.
    """
    cards: list[tuple[str, str, int | None]] = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        facts = dict(re.findall(r"^([^:\n]+):\s*(.*?)\s*$", file.read_text(), re.MULTILINE))
        # A container shows all cards of its host in /proc, and has device files only for its own.
        if (root / f"dev/nvidia{facts.get('Device Minor', '')}").exists() and "Model" in facts:
            known = KNOWN_CARDS.get(facts["Model"])
            cards.append((facts.get("GPU UUID", ""), facts["Model"], known.memory_bytes if known else None))
    unclear = not cards or any(memory_bytes is None for _, _, memory_bytes in cards)
    if ask_driver and unclear and list((root / "dev").glob("nvidia[0-9]*")):
        cards = _cards_from_driver() or cards
    return [(name, memory_bytes) for _, name, memory_bytes in _select(cards, environ.get("CUDA_VISIBLE_DEVICES"))]


def _select(cards: list[tuple[str, str, int | None]], visible: str | None) -> list[tuple[str, str, int | None]]:
    """Applies CUDA_VISIBLE_DEVICES: indices or starts of UUIDs; what follows one that names no card is ignored, as CUDA does."""
    if visible is None:
        return cards
    chosen = []
    for word in (part.strip() for part in visible.split(",")):
        if word.isdigit() and int(word) < len(cards):
            chosen.append(cards[int(word)])
        elif word.startswith("MIG-") and cards:
            # A slice of a card: neither its memory nor its speed is that of the whole.
            chosen.append((word, f"{cards[0][1]} (MIG slice)", None))
        elif word and (match := next((card for card in cards if card[0].startswith(word)), None)):
            chosen.append(match)
        else:
            break
    return chosen


def _cards_from_driver() -> list[tuple[str, str, int | None]]:
    """Asks nvidia-smi for (uuid, name, memory in bytes); an empty list when it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines()]
    return [(row[0], row[1], int(row[2]) * _MIB if row[2].isdigit() else None) for row in rows if len(row) == 3]


def num_cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes(root: Path = Path("/")) -> int:
    """Returns the memory a new process could take: free on the machine, and within the limits of its cgroup.

    Args:
        root: where /proc and /sys are.
    """
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_cgroup_headrooms(root)]))


def _cgroup_headrooms(root: Path) -> list[int]:
    """Returns what each memory limit above this process leaves; page cache counts as free, since it is given back."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    headrooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_name, usage_name = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_name, usage_name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        while folder == base or base in folder.parents:
            limit, usage = _read_int(folder / limit_name), _read_int(folder / usage_name)
            if limit is not None and usage is not None:
                cache = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                headrooms.append(limit - usage + (int(cache.group(1)) if cache else 0))
            folder = folder.parent
    return headrooms


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None
