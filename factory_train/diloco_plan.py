"""What islands send and how much of their time is training, before anything runs. Arithmetic only.

    utilisation = S T / (S T + max(0, B / W - tau T))

S inner steps between two sends, T seconds a step, B bytes an island sends in a round, W bytes a second of its link, tau the delay:
the closed form behind the simulated figures of Streaming DiLoCo (arXiv 2501.18512, table 4). Latency is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from factory_train.diloco_config import DilocoConfig
from factory_train.units import format_bytes

# Elements of a block that share a scale of 4 bytes (kernels/pseudogradient.py).
_BLOCK = 256
_ELEMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / _BLOCK, "int4": 0.5 + 4 / _BLOCK}
# Utilisation that the plan names the bandwidth for.
_GOAL = 0.95


@dataclass(frozen=True)
class DilocoPlan:
    """Figures of the exchange between islands.

    Args:
        islands: M.
        steps_between_sends: S.
        delay: tau, in steps.
        round_bytes: what an island sends in one round, on average over the fragments.
        step_bytes: the same of data-parallel training, in one step, with gradients in `params`.
        text: the schedule in words.
    """

    islands: int
    steps_between_sends: float
    delay: int
    round_bytes: float
    step_bytes: float
    text: str

    def utilisation(self, step_s: float, bytes_per_s: float) -> float:
        """Returns the part of the time that is training, for steps of `step_s` seconds and a link of `bytes_per_s`."""
        train_s = self.steps_between_sends * step_s
        return train_s / (train_s + max(0.0, self.round_bytes / bytes_per_s - self.delay * step_s))

    def data_parallel_utilisation(self, step_s: float, bytes_per_s: float) -> float:
        """Returns the same for data-parallel training that does not overlap its reduction."""
        return step_s / (step_s + self.step_bytes / bytes_per_s)

    def bytes_per_s_for(self, goal: float, step_s: float) -> float:
        """Returns the link that gives the utilisation `goal`."""
        return self.round_bytes / (self.delay * step_s + self.steps_between_sends * step_s * (1 - goal) / goal)

    def line(self) -> str:
        """Returns the plan's line for people."""
        if self.islands == 1:
            return f"{self.text}; one island sends nothing"
        need, plain = 8 * self.bytes_per_s_for(_GOAL, 1.0), 8 * self.step_bytes * _GOAL / (1 - _GOAL)
        return (
            f"{self.text}; {format_bytes(self.round_bytes)} an island and round, one every {self.steps_between_sends:g} steps; "
            f"{_GOAL:.0%} of the time is training at {_rate(need)} where a step takes 1 s "
            f"(twice that at 0.5 s); data-parallel: {_rate(plain)}"
        )


def plan_diloco(cfg: DilocoConfig, params: int, param_bytes: int) -> DilocoPlan | None:
    """Returns the plan of the exchange; None for an ordinary run.

    Args:
        params: parameters of the model.
        param_bytes: bytes of one.
    """
    if not cfg.islands:
        return None
    share = 2 * (cfg.islands - 1) / cfg.islands * params
    element_bytes = float(param_bytes) if cfg.payload == "none" else _ELEMENT_BYTES[cfg.payload]
    fragments = f" in {cfg.fragments} fragments" if cfg.fragments > 1 else ""
    text = f"{cfg.islands} islands, H {cfg.sync_every}{fragments}, delay {cfg.delay}, {cfg.payload}"
    return DilocoPlan(
        cfg.islands,
        cfg.sync_every / cfg.fragments,
        cfg.delay,
        share * element_bytes / cfg.fragments,
        share * param_bytes,
        text,
    )


def _rate(bits_per_s: float) -> str:
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bits_per_s >= size:
            return f"{bits_per_s / size:.3g} {unit}"
    return f"{bits_per_s / 1e3:.3g} kbit/s"
