"""An island's part in the membership: it shows that it lives, watches the others, and coordinates while it holds the lease."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from factory_train.distributed.board import BROKEN, JOINING, LEFT, MEMBER, Beat, Board, Epoch, Lease
from factory_train.distributed.coordination import Coordination, Decision, Rules, View, finding_out_s
from factory_train.distributed.reach import Reach
from factory_train.errors import ConfigError, FactoryTrainError

# Signs of life in one `silence_s`.
_BEATS_IN_SILENCE = 8
_LONGEST_BEAT_S = 1.0
# While an island waits for the others, it gives signs and looks for theirs more often; most of all where training waits.
_WAITING_BEAT_S = {JOINING: 0.25, BROKEN: 0.1}
_LOOK_EVERY_S = 0.02
# So many grace times an island that needs the board waits for one that cannot be reached.
AWAY_GRACES = 5.0


@dataclass(frozen=True)
class Start:
    """An epoch that begins cold.

    Args:
        step: to begin from.
        deal: which samples are whose.
        islands: that can begin there; the others join them.
    """

    step: int
    deal: Mapping[str, Any]
    islands: tuple[str, ...]


@dataclass(frozen=True)
class Planner:
    """What the coordinator must know of the run to make epochs.

    Args:
        start: (signs of life of the islands that are there) -> how to begin.
        after_failure: (epoch, survivors, lost, step, completed) -> the next deal.
        steps: of the run.
    """

    start: Callable[[Mapping[str, Beat]], Start]
    after_failure: Callable[[Epoch, tuple[str, ...], tuple[str, ...], int, int], Mapping[str, Any]]
    steps: int


class Membership:
    """Rank 0 of an island has one.

    Args:
        board: what the islands share.
        rules: see there.
        beat: name, incarnation, layout and checkpoints of this island.
        planner: see there.
        record: called with the name of an event and its facts.
    """

    def __init__(self, board: Board, rules: Rules, beat: Beat, planner: Planner, record: Callable[..., None]) -> None:
        self._board, self._rules, self._planner, self._record = board, rules, planner, record
        self._reach = Reach(beat.island, finding_out_s(rules.grace_s) / 2)
        self._beat, self._lock, self._writing = replace(beat, address=self._reach.address), threading.Lock(), threading.Lock()
        self._coordination = Coordination(rules, beat.island, beat.incarnation)
        self._waits_since = 0.0
        self._moved: dict[str, tuple[int, int, float]] = {}
        # Islands whose signs were seen to change: what lies there from an earlier attempt says nothing about now.
        self._heard: set[str] = set()
        self._decision = Decision()
        self._seen: Epoch | None = None
        # Islands without a sign of life, and how long the thread has been looking: a moment in which it could not is nobody's silence.
        self._silent: frozenset[str] = frozenset()
        self._watched_s, self._looked_at = 0.0, time.monotonic()
        self._failure: Exception | None = None
        self._closed, self._woken = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="diloco-membership", daemon=True)
        self._thread.start()

    # What the training loop calls

    def tell(self, **facts: Any) -> None:
        """Changes what this island says of itself: at once where its state changes, else with the next sign of life."""
        with self._lock:
            if "state" in facts:
                # What was found out before says nothing of the links as they are now.
                self._reach.forget()
                facts = {"reaches": None, "waited_s": 0.0, **facts}
                self._waits_since = time.monotonic() - facts["waited_s"]
            self._beat = replace(self._beat, **facts)
        if "state" in facts:
            # Where the board cannot be reached, the next sign of life says it.
            with contextlib.suppress(OSError):
                self._write_beat()
            self._woken.set()

    def newest(self) -> Epoch | None:
        """Returns the newest epoch as it was last seen: training does not wait for a filesystem to ask."""
        return self._seen

    def gives_up(self, epoch: Epoch) -> bool:
        """Returns whether a round of an epoch is not to be waited for, because a member gives no sign of life; the board says so, too."""
        if gone := not self._silent.isdisjoint(epoch.members):
            self.tell(gave_up=epoch.number)
        return gone

    def await_epoch(self, after: int, timeout_s: float) -> Epoch:
        """Returns an epoch with a number above `after`, waiting for it.

        Raises:
            FactoryTrainError: there is none in time: too few islands are left, or the board cannot be reached.
        """
        patience = _Patience(self._rules.grace_s, self._beat.island)
        limit = time.monotonic() + timeout_s
        while (epoch := self._newer(after, patience)) is None:
            if patience.is_away:
                # Nobody can make an epoch meanwhile.
                limit = time.monotonic() + timeout_s
            elif time.monotonic() > limit:
                raise FactoryTrainError(
                    f"no membership after epoch {after} within {timeout_s:.0f} s: fewer than diloco.quorum={self._rules.quorum} islands",
                    where=f"island {self._beat.island}",
                    fix="start the others, or lower diloco.quorum",
                )
            time.sleep(_LOOK_EVERY_S)
        return epoch

    def await_membership(self, after: int) -> Epoch:
        """Returns the first epoch after `after` that this incarnation is a member of; waits as long as it takes.

        Raises:
            FactoryTrainError: the board cannot be reached.
        """
        patience = _Patience(self._rules.grace_s, self._beat.island)
        while (epoch := self._newer(after, patience)) is None or not epoch.has(self._beat.island, self._beat.incarnation):
            time.sleep(_LOOK_EVERY_S)
        return epoch

    def _newer(self, after: int, patience: _Patience) -> Epoch | None:
        """Returns the newest epoch if its number is above `after`."""
        if self._failure is not None:
            raise self._failure
        try:
            epoch = self._board.epoch()
        except OSError as error:
            patience.failed(error)
            return None
        patience.worked()
        return epoch if epoch is not None and epoch.number > after else None

    def admissible(self) -> tuple[str, ...]:
        """Returns islands that may join after the next round, if it is for this island to say so."""
        return self._decision.admit

    def admit(self, epoch: Epoch, islands: tuple[str, ...], step: int, completed: int, deal: Mapping[str, Any]) -> None:
        """Makes the epoch in which islands join; the others wait for it already, so there is one even when none is left to join."""
        why = f"{', '.join(islands)} joined" if islands else "nobody joined"
        patience = _Patience(self._rules.grace_s, self._beat.island)
        while True:
            try:
                beats = self._board.beats()
                members = dict(epoch.members) | {name: beats[name].incarnation for name in islands}
                self._publish(Epoch(epoch.number + 1, self._lease_number(), members, islands, completed, step, False, deal, why))
                return
            except OSError as error:
                patience.failed(error)
                time.sleep(_LOOK_EVERY_S)

    def close(self) -> None:
        """Leaves: the others need not wait for this island. May be called twice."""
        if not self._closed.is_set():
            self._closed.set()
            self._woken.set()
            self._thread.join()
            self.tell(state=LEFT)
            self._reach.close()

    # The thread

    def _run(self) -> None:
        while True:
            self._woken.wait(self._until_next_beat_s())
            self._woken.clear()
            if self._closed.is_set():
                return
            try:
                with self._lock:
                    self._beat = replace(self._beat, count=self._beat.count + 1)
                self._write_beat()
                self._look()
            except OSError:
                # A shared filesystem has bad moments, and a server may start again. Meanwhile nobody is let in, and nobody's silence
                # means anything; if only this island cannot see the board, the others see it as gone.
                self._decision, self._silent = Decision(), frozenset()
                self._moved.clear()
            except Exception as error:
                self._failure = error
                return

    def _until_next_beat_s(self) -> float:
        longest_s = _WAITING_BEAT_S.get(self._beat.state, _LONGEST_BEAT_S)
        return min(longest_s, self._rules.silence_s / _BEATS_IN_SILENCE)

    def _write_beat(self) -> None:
        # Training changes the beat without waiting for one that is being written.
        with self._writing:
            with self._lock:
                beat = self._beat
            self._board.write_beat(beat)

    def _look(self) -> None:
        now, beats = time.monotonic(), self._board.beats()
        self._watched_s += min(now - self._looked_at, 2 * self._until_next_beat_s())
        self._looked_at = now
        for name, beat in beats.items():
            before = self._moved.get(name)
            if before is None or before[:2] != (beat.incarnation, beat.count):
                self._moved[name] = beat.incarnation, beat.count, self._watched_s
                self._heard |= {name} if before else set()
        self._look_around(beats)
        silent_s = {name: self._watched_s - self._moved[name][2] for name in beats}
        # One that has left closed its connections, which says it sooner.
        self._silent = frozenset(name for name, beat in beats.items() if beat.state != LEFT and silent_s[name] > self._rules.silence_s)
        view = View(now, beats, silent_s, self._board.epoch(), self._board.lease())
        self._seen = view.epoch
        self._check_fits(view)
        decision = self._coordination.decide(view)
        decision = replace(decision, admit=tuple(name for name in decision.admit if beats[name].layout == self._beat.layout))
        self._decision = decision
        if decision.take_lease is not None:
            if self._board.take_lease(Lease(decision.take_lease, self._beat.island, self._beat.incarnation)):
                self._record("diloco-coordinator", island=self._beat.island, lease=decision.take_lease)
        elif decision.start:
            self._start(view, decision.start)
        elif decision.survivors:
            self._after_failure(view, decision)

    def _look_around(self, beats: Mapping[str, Beat]) -> None:
        """Notes whom this island reaches and how long it waits, while that matters."""
        with self._lock:
            if self._beat.state == BROKEN:
                self._beat = replace(self._beat, waited_s=time.monotonic() - self._waits_since)
            if self._beat.state in (BROKEN, JOINING):
                others = {name: beat.address for name, beat in beats.items() if name != self._beat.island and beat.state != LEFT}
                self._beat = replace(self._beat, reaches=self._reach.look(others))

    def _check_fits(self, view: View) -> None:
        """Keeps this island from waiting to join others that hold something else.

        Raises:
            ConfigError: they were not started alike.
        """
        members = view.epoch.members if view.epoch else {}
        for name in self._heard & members.keys() if self._beat.state == JOINING else ():
            beat = view.beats[name]
            if beat.incarnation == members[name] and beat.state in (MEMBER, BROKEN):
                _check_layouts({beat.layout, self._beat.layout})

    def _start(self, view: View, islands: tuple[str, ...]) -> None:
        members = view.epoch.members if view.epoch else {}
        done = [name for name, beat in view.beats.items() if members.get(name) == beat.incarnation and beat.step >= self._planner.steps]
        if done:
            # Beginning from an older checkpoint now would undo what they have done.
            raise FactoryTrainError(f"the run is done: {', '.join(done)} made its last step", where=f"island {self._beat.island}")
        _check_layouts({view.beats[name].layout for name in islands})
        start = self._planner.start({name: view.beats[name] for name in islands})
        number = view.epoch.number + 1 if view.epoch else 1
        starting = {name: view.beats[name].incarnation for name in start.islands}
        why = f"begins at step {start.step}" if view.epoch is None else f"begins anew at step {start.step}: no member was left"
        self._publish(Epoch(number, self._lease_number(), starting, (), -1, start.step, True, start.deal, why))

    def _after_failure(self, view: View, decision: Decision) -> None:
        epoch = view.epoch
        assert epoch is not None
        beats = [view.beats[name] for name in decision.survivors]
        step, completed = max(beat.step for beat in beats), max(beat.number for beat in beats)
        lost = tuple(decision.lost)
        deal = self._planner.after_failure(epoch, decision.survivors, lost, step, completed)
        members = {name: epoch.members[name] for name in decision.survivors}
        why = ", ".join(f"{name} {reason}" for name, reason in decision.lost.items()) or "a round failed"
        self._publish(Epoch(epoch.number + 1, self._lease_number(), members, (), completed, step, False, deal, why))

    def _publish(self, epoch: Epoch) -> None:
        if self._board.publish(epoch):
            self._record(
                "diloco-epoch",
                epoch=epoch.number,
                members=sorted(epoch.members),
                joining=list(epoch.joining),
                step=epoch.step,
                message=f"epoch {epoch.number}: {epoch.why}; {len(epoch.members)} islands: {', '.join(sorted(epoch.members))}",
            )

    def _lease_number(self) -> int:
        lease = self._board.lease()
        return lease.number if lease else 0


def _check_layouts(layouts: set[str]) -> None:
    if len(layouts) > 1:
        raise ConfigError(
            f"the islands were not started with the same configuration, data and ranks: {' / '.join(sorted(layouts))}",
            where="diloco",
            fix="start all islands with the same keys, data and ranks each, wherever they are started",
        )


class _Patience:
    """How long an island goes on trying to reach a board that it cannot do without.

    Args:
        grace_s: of the rules.
        island: who waits.
    """

    def __init__(self, grace_s: float, island: str) -> None:
        self._most_s, self._island = AWAY_GRACES * grace_s, island
        self._since: float | None = None

    @property
    def is_away(self) -> bool:
        return self._since is not None

    def worked(self) -> None:
        self._since = None

    def failed(self, error: OSError) -> None:
        """Notes a failure.

        Raises:
            FactoryTrainError: it is enough.
        """
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > self._most_s:
            raise FactoryTrainError(
                f"the islands' membership could not be reached for {self._most_s:.0f} s ({AWAY_GRACES:g} times diloco.grace_s): {error}",
                where=f"island {self._island}",
                fix="start what serves it, or mend the way there; the same command goes on from the last checkpoint",
            ) from error
