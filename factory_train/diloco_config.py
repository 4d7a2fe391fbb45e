"""The section of the configuration about islands that train apart and synchronise seldom (docs/diloco.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from factory_train.setting import setting


@dataclass
class DilocoConfig:
    """Islands: each a world of ranks of its own; 0 of them is an ordinary run."""

    islands: int = setting(0, "worlds of ranks that train apart; 0 is an ordinary run, and the others of these keys mean nothing then")
    sync_every: int = setting(100, "inner steps between two synchronisations of a fragment (H)")
    fragments: int = setting(1, "parts of the model that are synchronised in turn (P); 1 is classic DiLoCo")
    pattern: str = setting("strided", "layer l is in fragment l mod P, or layers in runs", choices=("strided", "sequential"))
    delay: int = setting(0, "inner steps between sending and applying (tau); 0 waits for the exchange")
    mixing: float = setting(0.5, "part of the inner parameters that is kept when a delayed result is applied (alpha)")
    payload: str = setting("fp32", "what is sent; none sends the parameters' own type", choices=("none", "fp32", "bf16", "int8", "int4"))
    error_feedback: bool = setting(True, "add what a narrow payload leaves out to the next one")
    outer_lr: float = setting(0.7, "learning rate of the outer Nesterov SGD (eta); 1 with outer_momentum=0 averages the parameters")
    outer_momentum: float = setting(0.9, "its momentum (mu)")
    weights: str = setting(
        "uniform", "what an island counts: all alike, or by the tokens since its last synchronisation", choices=("uniform", "tokens")
    )
    quorum: int = setting(1, "fewest islands that go on", safe=True)
    silence_s: float = setting(10.0, "an island without a sign of life for so long is gone", safe=True)
    grace_s: float = setting(60.0, "longest wait for an island that lives but does not answer; then the others go on", safe=True)
    rendezvous: Optional[str] = setting(None, "where islands meet: tcp://HOST:PORT; null is the run directory", safe=True)
    local_islands: list[int] = setting(
        [], "islands that this command starts, where others of them are started elsewhere; empty is all", safe=True
    )
