"""Checks of the keys about islands, with the override that would mend each."""

from __future__ import annotations

from factory_train.config import Config
from factory_train.diloco_config import DilocoConfig
from factory_train.diloco_schedule import Schedule
from factory_train.errors import ConfigError
from factory_train.rendezvous.address import Address


def check_diloco(config: Config) -> None:
    """Checks what a run of islands needs; an ordinary run passes.

    Raises:
        ConfigError: the first thing that cannot be right.
    """
    cfg = config.diloco
    if cfg.islands < 0:
        raise ConfigError(f"{cfg.islands} islands", where="diloco.islands", fix="diloco.islands=0 for an ordinary run")
    if cfg.islands == 0:
        return
    if config.optim.master == "split":
        raise ConfigError(
            "islands exchange whole master weights, and optim.master=split keeps half of them in the model",
            where="optim.master",
            fix="optim.master=fp32",
        )
    for key in ("sync_every", "fragments", "quorum", "outer_lr", "silence_s", "grace_s"):
        if getattr(cfg, key) <= 0:
            raise ConfigError(
                f"{getattr(cfg, key)} must be above zero", where=f"diloco.{key}", fix=f"diloco.{key}={getattr(type(cfg)(), key)}"
            )
    most = min(cfg.sync_every, max(1, config.model.num_layers))
    if cfg.fragments > most:
        raise ConfigError(
            f"{cfg.fragments} fragments of {config.model.num_layers} layers, one sent every step of {cfg.sync_every} at most",
            where="diloco.fragments",
            fix=f"diloco.fragments={most}",
        )
    longest = Schedule.longest_delay(cfg.fragments, cfg.sync_every)
    if not 0 <= cfg.delay <= longest:
        raise ConfigError(
            f"a delay of {cfg.delay} steps: a fragment is sent every {longest}, and one is under way at a time",
            where="diloco.delay",
            fix=f"diloco.delay={max(0, min(cfg.delay, longest))}, or fewer diloco.fragments",
        )
    for key in ("mixing", "outer_momentum"):
        if not 0.0 <= getattr(cfg, key) <= 1.0:
            raise ConfigError(
                f"{getattr(cfg, key)} is outside [0, 1]", where=f"diloco.{key}", fix=f"diloco.{key}={getattr(type(cfg)(), key)}"
            )
    if cfg.quorum > cfg.islands:
        raise ConfigError(f"{cfg.quorum} of {cfg.islands} islands", where="diloco.quorum", fix=f"diloco.quorum={cfg.islands}")
    _check_meeting(cfg)
    rows = config.train.global_batch_tokens // config.train.seq_len
    if rows % cfg.islands:
        nearest = max(1, round(rows / cfg.islands)) * cfg.islands * config.train.seq_len
        raise ConfigError(
            f"{rows} rows of a step do not divide among {cfg.islands} islands",
            where="train.global_batch_tokens",
            fix=f"train.global_batch_tokens={nearest}",
        )


def _check_meeting(cfg: DilocoConfig) -> None:
    if cfg.rendezvous is not None:
        Address.parse(cfg.rendezvous)
    here = cfg.local_islands
    if len(set(here)) < len(here) or not set(here) <= set(range(cfg.islands)):
        raise ConfigError(
            f"{here} are not different ones of {cfg.islands} islands, which have the numbers 0 to {cfg.islands - 1}",
            where="diloco.local_islands",
            fix=f"diloco.local_islands={sorted({index for index in here if 0 <= index < cfg.islands}) or [0]}",
        )
    if here and cfg.rendezvous is None:
        raise ConfigError(
            "islands of several commands do not share a run directory to meet in",
            where="diloco.local_islands",
            fix="diloco.rendezvous=tcp://HOST:PORT, or leave diloco.local_islands out",
        )
