"""Where an island meets the others: it enters epochs, sends rounds, gets over failures, joins and lets others join.

All ranks of an island make the same calls at the same steps. Rank 0 alone is in the membership; what it learns it tells the others
of its island. Each rank has a wire to the ranks of the same number in the other islands; of ranks that hold the same shards (DDP,
HSDP) only the first has one, and tells its copies.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from factory_train.distributed.board import BROKEN, JOINING, MEMBER, Board, Epoch
from factory_train.distributed.coordination import finding_out_s
from factory_train.distributed.encoded_reduce import Notice, Reduced, RoundFailedError
from factory_train.distributed.fingerprints import Fingerprints, check_same
from factory_train.distributed.flight import Arrival, Flight, UnderWay, Waiting
from factory_train.distributed.gang import Copies, Gang
from factory_train.distributed.gloo_wire import GlooWire
from factory_train.distributed.handover import Standing, catch_up
from factory_train.distributed.membership import Membership
from factory_train.distributed.outer_state import Encoded, OuterState
from factory_train.errors import FactoryTrainError, IntegrityError

# Bit of a notice's flags: islands will join after this round.
TURN_OVER = 1
# So many grace times the islands that are left wait for enough others.
QUORUM_WAIT_GRACES = 5.0
# While training waits for a round, it asks whether all members are there.
_LOOK_EVERY_S = 0.5


class LeftBehindError(Exception):
    """The others have gone on without this island; it has to join again."""


class Exchange:
    """One rank's side.

    Args:
        island, incarnation: its island.
        gang: the ranks of the island.
        copies: ranks with the same shards.
        board: where epochs are told.
        membership: on rank 0 of the island, None elsewhere.
        state: what those that join receive.
        grace_s: how long another island is waited for.
    """

    def __init__(
        self,
        island: str,
        incarnation: int,
        gang: Gang,
        copies: Copies,
        board: Board,
        membership: Membership | None,
        state: OuterState,
        grace_s: float,
    ) -> None:
        self.island, self._incarnation = island, incarnation
        self._gang, self._copies, self._board, self._membership = gang, copies, board, membership
        self._state, self._grace_s = state, grace_s
        self._thread = ThreadPoolExecutor(1, "diloco-exchange")
        self._wire: GlooWire | None = None
        self._under_way: UnderWay | None = None
        self._last: tuple[int, Reduced] | None = None
        self._bytes_before = 0
        self._waiting = Waiting()
        self.epoch: Epoch | None = None
        # The last round that was applied, and the step it was applied at.
        self.completed, self.step, self._fragment = -1, 0, 0
        self._prints = Fingerprints(state)

    # Beginning

    def begin(self, after: int, load: Callable[[Epoch], None]) -> Epoch:
        """Becomes a member of an epoch and returns it; the state is that of `epoch.step` then.

        Args:
            after: number of the last epoch this island was in; 0 at first.
            load: fills the state where an epoch begins cold.
        """
        while True:
            epoch = self._agree_on_epoch(lambda after=after: self._members().await_membership(after))  # type: ignore[misc]
            after = epoch.number
            try:
                if epoch.cold:
                    load(epoch)
                    with self._waiting:
                        self._enter_or_recover(epoch)
                    return epoch
                if self._enter(epoch):
                    return epoch
            except LeftBehindError:
                assert self.epoch is not None
                after = self.epoch.number
                self._tell(state=JOINING, epoch=0)

    def restart_at(self, completed: int, step: int) -> None:
        """Notes where the state is that was loaded, and takes its fingerprints."""
        self.completed, self.step = completed, step
        self._prints.take_all()

    def join_again(self, load: Callable[[Epoch], None]) -> Epoch:
        """Joins after the others have gone on alone; what was under way is dropped."""
        assert self.epoch is not None
        self.drop()
        self._tell(state=JOINING, epoch=0)
        return self.begin(self.epoch.number, load)

    # Rounds

    def before_send(self, step: int) -> tuple[str, ...]:
        """Enters a newer epoch if there is one, and returns the islands that may join after the next round.

        Raises:
            LeftBehindError: this island is not a member any more.
        """
        self.step = step
        assert self.epoch is not None
        entered = self.epoch.number

        def look() -> dict[str, Any]:
            self._members().tell(step=step)
            newest = self._members().newest()
            is_newer = newest is not None and newest.number > entered
            return {"epoch": newest.to_json() if newest and is_newer else None, "admit": list(self._members().admissible())}

        seen = self._gang.agree_on_main("looking at the membership", look)
        if seen["epoch"] is not None:
            with self._waiting:
                self._enter_or_recover(Epoch.from_json(seen["epoch"]))
        return tuple(seen["admit"])

    def send(self, number: int, fragment: int, encoded: Encoded | None, *, weight: float, turn_over: bool) -> None:
        """Starts a round; training goes on.

        Args:
            encoded: this rank's pseudo-gradient; None on copies that are not the first.
            weight: what the island counts.
            turn_over: whether it tells the others that islands will join after this round.
        """
        assert self._under_way is None, "one round at a time"
        self._under_way = UnderWay(number, fragment, encoded, weight, TURN_OVER if turn_over else 0)
        self._launch()

    def arrive(self, step: int) -> Arrival:
        """Ends the round under way, waiting for it, whatever epochs that takes.

        Raises:
            LeftBehindError: the others have gone on without this island.
            IntegrityError: the islands' outer states differ.
        """
        self.step = step
        mine = self._under_way
        assert mine is not None
        with self._waiting:
            while True:
                outcome: Reduced | Exception | None = mine.caught
                if outcome is None and mine.flight is not None:
                    outcome = self._await(mine.flight)
                elif outcome is None and self._copies.is_first:
                    outcome = RoundFailedError("not sent")
                failures = self._gang.agree("synchronising islands", functools.partial(self._problem, outcome))
                if not any(failures):
                    break
                self._recover()
            waited_s = self._waiting.seconds()
        assert not isinstance(outcome, Exception)
        if outcome is not None:
            self._last = mine.number, outcome
        return self._arrival(mine, outcome, waited_s)

    def applied(self, number: int, fragment: int, prints: torch.Tensor | None) -> None:
        """Notes that a round has been applied, and parts of the new fingerprint: empty to take it when asked, None if it is the old one."""
        self.completed, self._fragment = number, fragment
        if prints is not None:
            # Read when the next round is sent: now the host would wait for the device.
            self._prints.note(fragment, prints)
        self._under_way = None
        self._tell(number=number, step=self.step)

    def let_join(self, islands: tuple[str, ...], step: int, deal: dict[str, Any]) -> None:
        """Ends an epoch after a round whose notices said so.

        Args:
            islands: that join, if this island is the one that said so; empty on the others.
            deal: which samples are whose from now on.
        """
        epoch = self.epoch
        assert epoch is not None

        def admit() -> dict[str, Any]:
            self._members().admit(epoch, islands, step, self.completed, deal)
            return self._members().await_epoch(epoch.number, self._grace_s).to_json()

        with self._waiting:
            if islands:
                self._enter_or_recover(Epoch.from_json(self._gang.agree_on_main("letting islands join", admit)))
            else:
                self._recover()

    def verify_end(self) -> None:
        """Compares the fingerprints of all islands once more; the last rounds are over.

        Raises:
            IntegrityError: they differ.
        """

        def compare() -> None:
            if self._wire is None or self._wire.size == 1:
                return
            theirs = torch.empty(self._wire.size, 8, dtype=torch.uint8)
            try:
                self._wire.all_gather(theirs, torch.tensor([self._prints.total()], dtype=torch.int64).view(torch.uint8))
            except RuntimeError:
                # Islands that are gone by now have nothing to say; the others ended with the same round.
                return
            self._compare(theirs.view(torch.int64).view(-1).tolist())

        self._gang.agree("comparing the islands' outer parameters", compare)

    def in_flight(self) -> tuple[int, int, Encoded | None, float] | None:
        """Returns number, fragment, code and weight of the round under way, for a checkpoint."""
        mine = self._under_way
        return None if mine is None else (mine.number, mine.fragment, mine.encoded, mine.weight)

    def put_in_flight(self, number: int, fragment: int, encoded: Encoded | None, weight: float) -> None:
        """Takes up a round from a checkpoint; it is sent when an epoch is entered."""
        self._under_way = UnderWay(number, fragment, encoded, weight, 0)

    def drop(self) -> None:
        """Gives up the round under way."""
        self._end_flight()
        self._under_way = None

    def close(self) -> None:
        """Leaves. May be called twice."""
        if self._membership is not None:
            self._membership.close()
        self._end_flight()
        self._thread.shutdown()
        self._board.close()

    # Epochs

    def _recover(self) -> None:
        """Gets into a newer epoch after this one failed or is over."""
        while True:
            number = self.epoch.number if self.epoch else 0

            def ask(number: int = number) -> Epoch:
                self._members().tell(state=BROKEN, epoch=number, number=self.completed, step=self.step, waited_s=self._waiting.seconds())
                return self._members().await_epoch(number, QUORUM_WAIT_GRACES * self._grace_s)

            epoch = self._agree_on_epoch(ask)
            if self._enter(epoch):
                return

    def _enter_or_recover(self, epoch: Epoch) -> None:
        if not self._enter(epoch):
            self._recover()

    def _enter(self, epoch: Epoch) -> bool:
        """Enters an epoch and sends what is under way; False when not all of its members came.

        Raises:
            LeftBehindError: this island is not among them.
        """
        self.epoch = epoch
        if not epoch.has(self.island, self._incarnation):
            raise LeftBehindError
        self._end_flight()

        def meet() -> str | None:
            if not self._copies.is_first:
                return None
            try:
                grace = datetime.timedelta(seconds=self._grace_s)
                store = self._board.store(epoch, self._gang.rank, grace)
                # A member that comes later than this, but within the grace time, finds the others waiting for a new epoch with it.
                silent = grace - datetime.timedelta(seconds=finding_out_s(self._grace_s))
                # What makes a member late where all begin, its checkpoint, it has behind it where an epoch follows another.
                meet, on_card = grace if epoch.cold else grace / 2, self._state.device.type == "cuda"
                self._wire = GlooWire(store, epoch.place(self.island), len(epoch.members), silent, meet, pinned=on_card)
                mine, self._bytes_before = self._under_way, 0
                due = (mine.number, mine.fragment) if mine else None
                stand = Standing(self.island, self.completed, self._last, due, self._state, self._prints.of)
                caught = catch_up(stand, epoch, self._wire)
                if mine is not None and caught is not None:
                    mine.caught = caught
            except (RuntimeError, RoundFailedError) as error:
                if self._wire is not None:
                    # Other ranks of the island may take longer; members that wait for this one need not.
                    self._wire.close()
                return str(error)
            return None

        if any(self._gang.agree("entering an epoch", meet)):
            self._end_flight()
            return False
        if self.island in epoch.joining:
            for fragment in range(len(self._state)):
                self._copies.share(self._state.tensors(fragment))
            self._state.copy_outer_to_inner()
            self.restart_at(epoch.completed, epoch.step)
        self._tell(state=MEMBER, epoch=epoch.number, number=self.completed, step=self.step)
        self._launch()
        return True

    def _launch(self) -> None:
        mine = self._under_way
        if mine is None or mine.caught is not None or mine.encoded is None or self._wire is None:
            return
        assert self.epoch is not None
        epoch, encoded = self.epoch.number, mine.encoded

        def notice() -> Notice:
            weight = mine.weight if encoded.is_finite() else 0.0
            return Notice(epoch, mine.number, mine.fragment, mine.flags, weight)

        fingerprint, state = functools.partial(self._prints.take_anew, mine.fragment), self._state
        mine.flight = Flight(self._wire, notice, fingerprint, encoded, state.format, state.device, self._thread)

    def _await(self, flight: Flight) -> Reduced | Exception:
        """Returns what a flight came to; ends it where a member gives no sign of life: what was sent to it gets no answer, nor an error."""
        epoch, wire = self.epoch, self._wire
        assert epoch is not None
        assert wire is not None
        while not flight.is_over(_LOOK_EVERY_S):
            with contextlib.suppress(OSError):
                # Rank 0 finds out, and the others of its island read it.
                ours = self._membership
                if ours.gives_up(epoch) if ours else self._board.has_given_up(self.island, self._incarnation, epoch.number):
                    wire.close()
        return flight.arrive()

    def _end_flight(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        if self._under_way is not None and self._under_way.flight is not None:
            self._under_way.flight.arrive()
            self._under_way.flight = None

    # Small things

    def _arrival(self, mine: UnderWay, outcome: Reduced | None, waited_s: float) -> Arrival:
        assert self.epoch is not None
        flags = torch.zeros(3, dtype=torch.int64)
        if outcome is not None:
            place = self.epoch.place(self.island)
            caught = mine.caught is not None
            counted = caught or (outcome.notices[place].weight > 0 and place not in outcome.left_out)
            turn_over = any(notice.flags & TURN_OVER for notice in outcome.notices)
            flags[:] = torch.tensor([outcome.codes is not None, counted, turn_over])
        self._copies.share([flags])
        codes, scales = (None, None) if outcome is None else (outcome.codes, outcome.scales)
        if flags[0]:
            if codes is None or scales is None:
                codes, scales = self._state.room(mine.fragment)
            self._copies.share([codes, scales])
        sent = self._wire.bytes_sent if self._wire else 0
        num_bytes, self._bytes_before = sent - self._bytes_before, sent
        took_s = mine.flight.took_s if mine.flight else 0.0
        notices = outcome.notices if outcome else ()
        return Arrival(codes, scales, bool(flags[1]), bool(flags[2]), notices, took_s, waited_s, num_bytes)

    def _problem(self, outcome: Reduced | Exception | None) -> str | None:
        """Returns why a round has to be sent again; None when it is well."""
        if isinstance(outcome, IntegrityError):
            raise outcome
        if isinstance(outcome, Exception):
            return f"{type(outcome).__name__}: {outcome}"
        if outcome is not None and outcome.notices:
            self._compare([notice.fingerprint for notice in outcome.notices])
        return None

    def _compare(self, prints: Sequence[int]) -> None:
        assert self.epoch is not None
        check_same(prints, sorted(self.epoch.members), f"round {self.completed}", f"fragment {self._fragment}, step {self.step}")

    def _members(self) -> Membership:
        if self._membership is None:
            raise FactoryTrainError("only rank 0 of an island is in the membership")
        return self._membership

    def _tell(self, **facts: Any) -> None:
        if self._membership is not None:
            self._membership.tell(**facts)

    def _agree_on_epoch(self, find: Callable[[], Epoch]) -> Epoch:
        return Epoch.from_json(self._gang.agree_on_main("waiting for the membership", lambda: find().to_json()))
