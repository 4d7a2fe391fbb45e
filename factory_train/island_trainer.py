"""The training loop of one island: that of an ordinary run, with the outer loop around its steps."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from factory_train import tail
from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.entries import TensorEntry
from factory_train.checkpoint.load import LoadedState
from factory_train.checkpoint.saver import Saver
from factory_train.config import Config
from factory_train.data.leases import Deal, LeasedCursor
from factory_train.data.loader import StepBatch, TokenLoader
from factory_train.diloco import OuterLoop
from factory_train.diloco_schedule import Schedule, assign_fragments, names_by_fragment
from factory_train.distributed.board import Beat, Board, Epoch
from factory_train.distributed.coordination import Rules
from factory_train.distributed.exchange import Exchange
from factory_train.distributed.gang import Copies
from factory_train.distributed.membership import Membership, Planner, Start
from factory_train.distributed.outer_state import OuterState
from factory_train.distributed.process_group import interface_towards
from factory_train.distributed.step_reduction import StepFacts
from factory_train.distributed.stop_meeting import ASKED_WAIT_S, CATCH_UP_S, WAIT_S, StopMeeting
from factory_train.distributed.tcp_board import open_board
from factory_train.errors import CheckpointError, ConfigError, IntegrityError
from factory_train.gangs import exchange_folder, island_names, local_islands, run_of_island, same_on_all_islands
from factory_train.island_checkpoint import (
    IslandSaver,
    Placed,
    deals_to_start_with,
    error_entries,
    in_flight_entries,
    load_at,
    newest_of_all,
    outer_entries,
    saved_deal,
    saved_steps,
    step_to_start_from,
)
from factory_train.launchers.job import WorkerEnv
from factory_train.metrics_log import MetricsLog
from factory_train.plan import Plan
from factory_train.preemption import StopSignal
from factory_train.rendezvous.address import Address
from factory_train.run_dir import Attempt
from factory_train.trainer import Outcome, Trainer


class ReopenedLoader(TokenLoader):
    """A loader that can go on from another position: what was made ahead is dropped.

    Args:
        trainer: opens loaders and knows the position.
    """

    def __init__(self, trainer: IslandTrainer) -> None:
        self._trainer, self._current = trainer, trainer.open_plain_loader()

    def next_step(self) -> StepBatch:
        return self._current.next_step()

    def reopen(self) -> None:
        """Goes on from the trainer's position."""
        self._current.close()
        self._current = self._trainer.open_plain_loader()

    def close(self) -> None:
        self._current.close()


class IslandTrainer(Trainer):
    """Trains one attempt of one island; arguments as of `Trainer`, `cfg` being the island's."""

    def __init__(
        self, cfg: Config, plan: Plan, attempt: Attempt, env: WorkerEnv, device: torch.device, stop: StopSignal, dataset: Path
    ) -> None:
        super().__init__(cfg, plan, attempt, env, device, stop, dataset)
        self.island, self.run, self._here = env.gang, run_of_island(attempt.run), local_islands(cfg)
        main = self.run.last_attempt()
        assert main is not None
        self._ranks = Ranks(env.rank, env.world_size)
        self._placed = Placed(self.parameters, env.rank // self.dims.dp_shard, self.dims.dp_replicate)
        self._main_metrics = MetricsLog(main, enabled=self.is_main)
        self._mirrored = -1
        self.metrics.mirror = self._mirror
        self.outer = self._outer_loop()
        outer_saver = Saver(main, cfg.checkpoint, self._ranks, device, self._main_metrics.record_event)
        self.saver = IslandSaver(self.saver, outer_saver, self._outer_entries, self._describe)  # type: ignore[assignment]
        self._loader: ReopenedLoader | None = None
        self._meeting = StopMeeting(self._board, self.island, attempt.number, self.outer.schedule)
        stop.deadline.margin_s += WAIT_S + CATCH_UP_S
        # When this island is to stop, once it was told to, and since when it counts steps.
        self._stops_at: int | None = None
        self._counts_from = 0, 0.0

    def _outer_loop(self) -> OuterLoop:
        cfg = self.cfg.diloco
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        fragments = names_by_fragment(assign_fragments(sizes, cfg.fragments, cfg.pattern), sizes)
        schedule = Schedule(cfg.fragments, cfg.sync_every, cfg.delay, self.cfg.train.steps)
        state = OuterState(self.parameters, fragments, cfg.payload, error_feedback=cfg.error_feedback)
        copies = self._copies()
        self._board = board = open_board(exchange_folder(self.run), cfg.rendezvous)
        if cfg.rendezvous is not None and (interface := interface_towards(Address.parse(cfg.rendezvous).host)) is not None:
            # Islands reach each other where they reach their meeting point; by itself gloo listens where the host's own name leads.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        membership = self._membership(board, schedule, sizes) if self.is_main else None
        exchange = Exchange(self.island, self.attempt.number, self._ranks, copies, board, membership, state, cfg.grace_s)
        return OuterLoop(cfg, schedule, state, exchange, copies, self._load, self._record)

    def _copies(self) -> Copies:
        if self.dims.dp_replicate == 1:
            return Copies()
        mine = None
        for shard in range(self.dims.dp_shard):
            ranks = [copy * self.dims.dp_shard + shard for copy in range(self.dims.dp_replicate)]
            group = dist.new_group(ranks, backend="gloo")
            mine = group if self.env.rank in ranks else mine
        return Copies(mine)

    def _membership(self, board: Board, schedule: Schedule, sizes: Mapping[str, int]) -> Membership:
        cfg = self.cfg.diloco
        same = [sizes, same_on_all_islands(self.cfg), self.manifest.id, self.dims, self.cfg.precision]
        layout = hashlib.sha256(repr(same).encode()).hexdigest()[:12]
        # Islands that share a run directory all see its checkpoints; whether one is intact, who begins looks then.
        outer = deals_to_start_with(self.run) if len(self._here) < cfg.islands else {}
        beat = Beat(self.island, self.attempt.number, layout=layout, resumes=saved_steps(self.attempt.run), outer=outer)

        def start(beats: Mapping[str, Beat]) -> Start:
            if any(beat.outer for beat in beats.values()):
                step, deal, islands = newest_of_all({name: beat.outer for name, beat in beats.items()})
            else:
                islands = tuple(beats)
                step = step_to_start_from(self.run, {name: beat.resumes for name, beat in beats.items()})
                deal = saved_deal(self.run, step) if step else None
            opening = Deal.opening(cfg.sync_every, islands)
            before = Deal.from_json(deal) if deal else None
            if step == 0 or before is None or set(before.shares) == set(islands):
                return Start(step, (before or opening).to_json(), islands)
            return Start(step, before.next(step, islands, set(before.shares) - set(islands), step).to_json(), islands)

        def after_failure(epoch: Epoch, survivors: tuple[str, ...], lost: tuple[str, ...], step: int, completed: int) -> dict[str, Any]:
            return Deal.from_json(epoch.deal).next(step, survivors, lost, schedule.sent_step(completed)).to_json()

        rules = Rules(island_names(cfg.islands), cfg.quorum, cfg.silence_s, cfg.grace_s)
        # A log of its own: the membership has a thread of its own.
        log = MetricsLog(self.attempt, enabled=True)
        return Membership(board, rules, beat, Planner(start, after_failure, self.cfg.train.steps), log.record_event)

    @property
    def _leads(self) -> bool:
        """Whether this island writes and judges for all that share its run directory."""
        return self.outer.epoch.leader(self._here) == self.island

    # The training loop

    def train(self) -> Outcome:
        """See `Trainer.train`; the island leaves the others at the end, however it ends."""
        try:
            return super().train()
        finally:
            self.outer.close()
            self._main_metrics.close()

    def open_plain_loader(self) -> TokenLoader:
        """Returns a loader at the current position."""
        return super().open_loader()

    def open_loader(self) -> TokenLoader:
        """See `Trainer.open_loader`."""
        self._loader = ReopenedLoader(self)
        return self._loader

    def train_step(self, loader: TokenLoader) -> None:
        """See `Trainer.train_step`; what is due with the other islands follows."""
        super().train_step(loader)
        epoch = self.outer.epoch.number
        self.stop.place.enter(self.step, "update")
        step = self.outer.after_step(self.step)
        if step != self.step:
            self.settle()
        if step != self.step or epoch != self.outer.epoch.number:
            self._go_on_from(step)
            self._record_epoch()
            assert self._loader is not None
            self._loader.reopen()

    def _close_row(self, facts: StepFacts) -> None:
        """See `Trainer._close_row`; an island that was told to stop goes on up to where the others stop."""
        super()._close_row(facts)
        if self.outcome is None or self.step >= self.cfg.train.steps:
            return
        if self._stops_at is None:
            self._stops_at = self._ranks.agree_on_main("agreeing on where to stop", self._meet)
        if self._stops_at is None or self.step < self._stops_at:
            self.outcome = None

    def _meet(self) -> int | None:
        first, since = self._counts_from
        step_s = (time.monotonic() - since) / max(1, self.step - first)
        wait_s = ASKED_WAIT_S if self.outcome is Outcome.INTERRUPTED else WAIT_S
        return self._meeting.stops_at(self.step, self.outer.epoch.members, step_s, wait_s)

    def _go_on_from(self, step: int) -> None:
        self.step = step
        self.cursor = LeasedCursor(self.outer.deal, self.island, step)
        self._counts_from = step, time.monotonic()

    def _validate(self) -> None:
        if self._leads:
            with self.outer.evaluating():
                super()._validate()

    # Checkpoints

    def _resume(self) -> None:
        """Becomes a member, with the state of a checkpoint or of another island, or from the beginning."""
        step = self.outer.begin()
        self._go_on_from(step)
        if self.island in self.outer.epoch.joining:
            self._take_up_optimizer(step)
        self._record_epoch()

    def _load(self, epoch: Epoch) -> None:
        """Fills everything where an epoch begins cold."""
        if epoch.step == 0:
            if self.step:
                raise CheckpointError(
                    "no other island and no checkpoint is left to go on from", where=self.island, fix="start the run again with run=NAME"
                )
            self._initialize()
            self.outer.state.copy_inner_to_outer()
            self.outer.restart_at(0)
            return
        outer = load_at(self.run, epoch.step, lambda state: outer_entries(self._placed, self.outer.state), self._ranks, lambda state: True)
        if outer is None:
            raise CheckpointError(
                f"the checkpoint of step {epoch.step} has gone", where=self.run.name, fix="start the run again with run=NAME"
            )
        if outer.state["data_id"] != self.manifest.id:
            raise ConfigError(f"{outer.path.name} was trained on other data", where="data", fix="start a new run (drop run=...)")
        told = outer.state.get("diloco", {})
        self.outer.state.copy_outer_to_inner()
        self.tokens_seen = outer.state["tokens_seen"]
        inner = self._load_inner(epoch.step, told.get("fingerprint"))
        if inner is not None:
            self.optimizer.set_step_count(inner.state["optimizer_step"] if inner.has_optimizer else 0)
        else:
            self._take_up_optimizer(epoch.step)
        self.outer.restart_at(epoch.step)
        # The other islands wait for this one's part, be it that it has none.
        self.outer.complete_in_flight(epoch.step, 1.0 if inner is not None else 0.0)
        how = f"{outer.path.name}, inner state {'loaded' if inner else 'from the outer parameters: this island has none of that step'}"
        self.metrics.record_event("island-loaded", step=epoch.step, checkpoint=how)

    def _load_inner(self, step: int, fingerprint: str | None) -> LoadedState | None:
        """Fills the inner state from this island's checkpoint that goes with an outer state; None where there is none intact."""
        try:
            return load_at(
                self.attempt.run,
                step,
                self._inner_entries,
                self._ranks,
                lambda state: state.get("diloco", {}).get("fingerprint") == fingerprint,
            )
        except IntegrityError as error:
            # All ranks were told the same, before any tensor was touched.
            self.outer.nothing_in_flight()
            self.metrics.record_event("checkpoint-skipped", message=f"of {self.island} at step {step}: {error}")
            return None

    def _inner_entries(self, state: Mapping[str, Any]) -> list[TensorEntry]:
        """Returns what an island's checkpoint of this state fills; the round under way is taken up with it."""
        told, found = state["diloco"], super()._entries()
        if told["format"] == self.outer.state.format and told["feedback"] == bool(self._errors()):
            found += self._errors()
            facts = told["in_flight"]
            if facts is not None and [told["world_size"], told["schedule"]] == [self.env.world_size, self._schedule_words()]:
                first = self._placed.copy == 0
                encoded = self.outer.state.empty_code(facts["fragment"]) if first else None
                found += in_flight_entries(self._placed, self.outer.state, facts["fragment"], encoded, self._ranks)
                weight = facts["weights"][self.env.rank]
                self.outer.put_in_flight({**facts, "weight": weight}, encoded)
        return found

    def _take_up_optimizer(self, step: int) -> None:
        """Takes the optimizer's moments from this island's own newest checkpoint; fresh ones where it has none."""
        entries = [entry for entry in super()._entries() if entry.section != "weights"]
        for mine in saved_steps(self.attempt.run) if self.step == 0 else ():
            if mine > step:
                continue
            with contextlib.suppress(ConfigError, IntegrityError):
                found = load_at(self.attempt.run, mine, lambda state: entries, self._ranks, lambda state: True)
                if found is not None and found.has_optimizer:
                    self.optimizer.set_step_count(found.state["optimizer_step"])
                    return

    def _entries(self) -> list[TensorEntry]:
        found = super()._entries() + self._errors()
        if (under_way := self.outer.in_flight()) is not None:
            facts, encoded = under_way
            found += in_flight_entries(self._placed, self.outer.state, facts["fragment"], encoded, self._ranks)
        return found

    def _schedule_words(self) -> list[Any]:
        cfg = self.cfg.diloco
        return [cfg.fragments, cfg.pattern, cfg.sync_every, cfg.delay]

    def _errors(self) -> list[TensorEntry]:
        return error_entries(self._placed, self.outer.state)

    def _outer_entries(self) -> list[TensorEntry] | None:
        return outer_entries(self._placed, self.outer.state) if self._leads else None

    def _describe(self) -> dict[str, Any]:
        """Returns what checkpoints say of the exchange; all ranks of the island call it."""
        prints = self._ranks.agree("taking fingerprints", self.outer.fingerprints)
        total = sum(sum(of_rank) for of_rank in prints) & (2**64 - 1)
        under_way = self.outer.in_flight()
        facts = None
        if under_way is not None:
            mine, encoded = under_way
            counts = encoded is not None and encoded.is_finite()
            weights = self._ranks.agree("describing the round under way", lambda: mine["weight"] if counts else 0.0)
            facts = {**mine, "weights": weights}
        return {
            "fingerprint": f"{total:016x}",
            "deal": self.outer.epoch.deal,
            "islands": sorted(self.outer.epoch.members),
            "epoch": self.outer.epoch.number,
            "in_flight": facts,
            "world_size": self.env.world_size,
            "schedule": self._schedule_words(),
            "format": self.outer.state.format,
            "feedback": bool(self._errors()),
        }

    # What the run as a whole is told

    def _mirror(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        """Repeats a row of this island as one of the run, while this island leads."""
        if kind == "sync" or not self._leads:
            return
        if self._mirrored < 0:
            # Another island may have written before.
            newest = next(iter(tail.rows_backwards(self._main_metrics_path)), None)
            self._mirrored = int(newest["step"]) if newest else 0
        if kind == "train" and step <= self._mirrored:
            return
        islands = len(self.outer.epoch.members)
        scaled = {name: value * islands for name, value in figures.items() if name in ("tokens_seen", "tokens_per_s") and value is not None}
        self._main_metrics.write(kind, step, **figures | scaled)

    @property
    def _main_metrics_path(self) -> Path:
        main = self.run.last_attempt()
        assert main is not None
        return main.metrics_path

    def _record(self, kind: str, **facts: Any) -> None:
        if kind == "sync":
            self.metrics.write("sync", **facts)
        else:
            self.metrics.record_event(kind, **facts)

    def _record_epoch(self) -> None:
        """Notes the membership this island is in now; the leader does it for the run."""
        epoch = self.outer.epoch
        facts = {
            "epoch": epoch.number,
            "members": sorted(epoch.members),
            "step": self.step,
            "message": f"epoch {epoch.number}: {epoch.why}",
        }
        self.metrics.record_event("diloco-entered", **facts)
        if self._leads:
            self._main_metrics.record_event("diloco-epoch", **facts)
