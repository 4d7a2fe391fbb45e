"""DiLoCo's outer loop around the training of one island.

Classic (Douillard et al. 2023, arXiv 2311.08105): one fragment, no delay. Streaming (Douillard et al. 2025, arXiv 2501.18512):
fragments in turn, sent after step t and applied after step t + tau, mixed with what was learned meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from factory_train.data.leases import Deal
from factory_train.diloco_config import DilocoConfig
from factory_train.diloco_schedule import Round, Schedule
from factory_train.distributed.board import Epoch
from factory_train.distributed.exchange import Exchange, LeftBehindError
from factory_train.distributed.gang import Copies
from factory_train.distributed.outer_state import Encoded, OuterState


class OuterLoop:
    """What an island does besides training: the trainer tells it of each completed step.

    Args:
        cfg: section diloco.
        schedule: of the run.
        state: outer parameters, momentum, error feedback.
        exchange: the way to the other islands.
        copies: ranks of the island with the same shards.
        load: fills state and trainer where an epoch begins cold.
        record: called with figures of each synchronisation.
    """

    def __init__(
        self,
        cfg: DilocoConfig,
        schedule: Schedule,
        state: OuterState,
        exchange: Exchange,
        copies: Copies,
        load: Callable[[Epoch], None],
        record: Callable[..., None],
    ) -> None:
        self._cfg, self.schedule, self.state, self._exchange, self._copies = cfg, schedule, state, exchange, copies
        self._load, self._record = load, record
        # Inner steps at which this island joined others that were ahead; None where it began with them.
        self._joined_at: int | None = None
        # Islands that were told they may join after the round under way, where this island said so.
        self._admitting: tuple[str, ...] = ()

    @property
    def epoch(self) -> Epoch:
        """The membership this island is in."""
        assert self._exchange.epoch is not None
        return self._exchange.epoch

    @property
    def deal(self) -> Deal:
        """Which samples are whose."""
        return Deal.from_json(self.epoch.deal)

    def begin(self) -> int:
        """Becomes a member and returns the completed steps from which this island trains on."""
        return self._begun(self._exchange.begin(0, self._load))

    def after_step(self, step: int) -> int:
        """Does what is due after an inner step.

        Returns:
            The step from which this island trains on: `step`, unless the others have gone on without it and it had to
            take over their state.
        """
        moment = self.schedule.at(step)
        try:
            for due in moment.apply:
                self._apply(due, step, self._cfg.mixing)
            for due in moment.send:
                self._send(due, step)
            for due in moment.drain:
                self._send(due, step)
                self._apply(due, step, 0.0)
            if step == self.schedule.steps:
                self._exchange.verify_end()
        except LeftBehindError:
            self._record("diloco-left-behind", step=step, message="the other islands have gone on; joining them again")
            return self._begun(self._exchange.join_again(self._load))
        return step

    def _begun(self, epoch: Epoch) -> int:
        joined = self._exchange.island in epoch.joining
        self._joined_at = epoch.step if joined else None
        if not joined:
            return epoch.step
        self._record("diloco-joined", step=epoch.step, message=f"took over the state of {epoch.donor} at step {epoch.step}")
        # The others send what is due at this step right after they let this island in.
        if epoch.step:
            for due in self.schedule.at(epoch.step).send:
                self._send(due, epoch.step)
        return epoch.step

    def _send(self, due: Round, step: int) -> None:
        admit = self._exchange.before_send(step)
        last = step == self.schedule.steps
        self._admitting = () if last else admit
        encoded = self.state.encode(due.fragment) if self._copies.is_first else None
        self._exchange.send(due.number, due.fragment, encoded, weight=self._weight(step), turn_over=bool(self._admitting))

    def _weight(self, step: int) -> float:
        """What this island counts: one that has just joined has not trained a whole period yet."""
        if self._joined_at is None:
            return 1.0
        trained = min(1.0, (step - self._joined_at) / self._cfg.sync_every)
        return trained if self._cfg.weights == "tokens" else float(trained == 1.0)

    def _apply(self, due: Round, step: int, mixing: float) -> None:
        under_way = self._exchange.in_flight()
        assert under_way is not None
        encoded = under_way[2]
        arrival = self._exchange.arrive(step)
        if encoded is not None and not encoded.is_finite():
            # What this island has is of no use: it goes on from the outer parameters.
            mixing = 0.0
        prints = None
        if arrival.codes is None or arrival.scales is None:
            self.state.mix(due.fragment, mixing)
        else:
            prints = self.state.apply(
                due.fragment, arrival.codes, arrival.scales, lr=self._cfg.outer_lr, momentum=self._cfg.outer_momentum, keep=mixing
            )
        if encoded is not None and arrival.counted:
            self.state.accept(due.fragment, encoded)
        self._exchange.applied(due.number, due.fragment, prints)
        self._record(
            "sync",
            step=step,
            number=due.number,
            fragment=due.fragment,
            members=len(self.epoch.members),
            epoch=self.epoch.number,
            exchange_s=arrival.took_s,
            waited_s=arrival.waited_s,
            num_bytes=arrival.num_bytes,
            counted=int(arrival.counted),
        )
        if arrival.turn_over:
            self._let_join(step)

    def _let_join(self, step: int) -> None:
        islands = self._admitting
        deal = self.deal.next(step, {*self.epoch.members, *islands}).to_json() if islands else {}
        self._exchange.let_join(islands, step, deal)

    # Checkpoints and validation

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """Puts the outer parameters into the model for a while."""
        return self.state.outer_in_model()

    def in_flight(self) -> tuple[dict[str, Any], Encoded | None] | None:
        """Returns what a checkpoint has to say of the round under way, and its code."""
        under_way = self._exchange.in_flight()
        if under_way is None:
            return None
        number, fragment, encoded, weight = under_way
        return {"number": number, "fragment": fragment, "weight": weight}, encoded

    def put_in_flight(self, facts: Mapping[str, Any], encoded: Encoded | None) -> None:
        """Takes up the round that a checkpoint was saved in the middle of."""
        self._admitting = ()
        self._exchange.put_in_flight(facts["number"], facts["fragment"], encoded, facts["weight"])

    def complete_in_flight(self, step: int, weight: float) -> None:
        """Takes part in the round under way at a step although no checkpoint says with what: with the parameters as they are."""
        if self._exchange.in_flight() is None:
            for due in self.schedule.under_way(step):
                encoded = self.state.encode(due.fragment) if self._copies.is_first else None
                self._exchange.put_in_flight(due.number, due.fragment, encoded, weight)

    def nothing_in_flight(self) -> None:
        """Drops what `put_in_flight` took up."""
        self._exchange.drop()

    def restart_at(self, step: int) -> None:
        """Notes that the state is now that of a completed step."""
        self._exchange.restart_at(self.schedule.completed_at(step), step)

    def fingerprints(self) -> list[int]:
        """Returns the fingerprint of each fragment of this rank."""
        return [self.state.fingerprint(fragment) for fragment in range(len(self.state))]

    def close(self) -> None:
        """Leaves the other islands. May be called twice."""
        self._exchange.close()
