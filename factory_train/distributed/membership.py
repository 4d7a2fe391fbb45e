"""An island's part in the membership: it shows that it lives, watches the others, and coordinates while it holds the lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from factory_train.distributed.board import BROKEN, JOINING, LEFT, MEMBER, Beat, Epoch, FolderBoard, Lease
from factory_train.distributed.coordination import Coordination, Decision, Rules, View
from factory_train.distributed.reach import Reach
from factory_train.errors import FactoryTrainError

# Signs of life in one `silence_s`.
_BEATS_IN_SILENCE = 8
_LONGEST_BEAT_S = 1.0
# While an island waits for the others, it gives signs and looks for theirs more often.
_WAITING_BEAT_S = 0.25


@dataclass(frozen=True)
class Planner:
    """What the coordinator must know of the run to make epochs.

    Args:
        start: (islands, their own checkpoints' steps) -> step to begin from and its deal.
        after_failure: (epoch, survivors, lost, step, completed) -> the next deal.
        steps: of the run.
    """

    start: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, Mapping[str, Any]]]
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

    def __init__(self, board: FolderBoard, rules: Rules, beat: Beat, planner: Planner, record: Callable[..., None]) -> None:
        self._board, self._rules, self._planner, self._record = board, rules, planner, record
        self._reach = Reach(beat.island)
        self._beat, self._lock = replace(beat, address=self._reach.address), threading.Lock()
        self._coordination = Coordination(rules, beat.island, beat.incarnation)
        self._moved: dict[str, tuple[int, int, float]] = {}
        self._decision = Decision()
        self._seen: Epoch | None = None
        self._failure: Exception | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diloco-membership", daemon=True)
        self._thread.start()

    # What the training loop calls

    def tell(self, **facts: Any) -> None:
        """Changes what this island says of itself: at once where its state changes, else with the next sign of life."""
        with self._lock:
            if "state" in facts:
                # What was found out before says nothing of the links as they are now.
                self._reach.forget()
                facts = {"reaches": None, **facts}
            self._beat = replace(self._beat, **facts)
        if "state" in facts:
            self._write_beat()

    def newest(self) -> Epoch | None:
        """Returns the newest epoch as it was last seen: training does not wait for a filesystem to ask."""
        return self._seen

    def await_epoch(self, after: int, timeout_s: float) -> Epoch:
        """Returns an epoch with a number above `after`, waiting for it.

        Raises:
            FactoryTrainError: there is none in time: too few islands are left.
        """
        limit = time.monotonic() + timeout_s
        while True:
            if self._failure is not None:
                raise self._failure
            epoch = self._board.epoch()
            if epoch is not None and epoch.number > after:
                return epoch
            if time.monotonic() > limit:
                raise FactoryTrainError(
                    f"no membership after epoch {after} within {timeout_s:.0f} s: fewer than diloco.quorum={self._rules.quorum} islands",
                    where=f"island {self._beat.island}",
                    fix="start the others, or lower diloco.quorum",
                )
            time.sleep(0.02)

    def await_membership(self, after: int) -> Epoch:
        """Returns the first epoch after `after` that this incarnation is a member of; waits as long as it takes."""
        while True:
            if self._failure is not None:
                raise self._failure
            epoch = self._board.epoch()
            if epoch is not None and epoch.number > after and epoch.has(self._beat.island, self._beat.incarnation):
                return epoch
            time.sleep(0.02)

    def admissible(self) -> tuple[str, ...]:
        """Returns islands that may join after the next round, if it is for this island to say so."""
        return self._decision.admit

    def admit(self, epoch: Epoch, islands: tuple[str, ...], step: int, completed: int, deal: Mapping[str, Any]) -> None:
        """Makes the epoch in which islands join; the others wait for it already, so there is one even when none is left to join."""
        beats = self._board.beats()
        members = dict(epoch.members) | {name: beats[name].incarnation for name in islands}
        why = f"{', '.join(islands)} joined" if islands else "nobody joined"
        self._publish(Epoch(epoch.number + 1, self._lease_number(), members, islands, completed, step, False, deal, why))

    def close(self) -> None:
        """Leaves: the others need not wait for this island. May be called twice."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self.tell(state=LEFT)
            self._reach.close()

    # The thread

    def _run(self) -> None:
        while not self._closed.wait(self._until_next_beat_s()):
            try:
                with self._lock:
                    self._beat = replace(self._beat, count=self._beat.count + 1)
                self._write_beat()
                self._look()
            except OSError:
                # A shared filesystem has bad moments; if it stays away, the others see this island as gone.
                continue
            except Exception as error:
                self._failure = error
                return

    def _until_next_beat_s(self) -> float:
        longest_s = _LONGEST_BEAT_S if self._beat.state == MEMBER else _WAITING_BEAT_S
        return min(longest_s, self._rules.silence_s / _BEATS_IN_SILENCE)

    def _write_beat(self) -> None:
        with self._lock:
            self._board.write_beat(self._beat)

    def _look(self) -> None:
        now = time.monotonic()
        beats = self._board.beats()
        for name, beat in beats.items():
            before = self._moved.get(name)
            if before is None or before[:2] != (beat.incarnation, beat.count):
                self._moved[name] = beat.incarnation, beat.count, now
        self._look_around(beats)
        silent_s = {name: now - self._moved[name][2] for name in beats}
        view = View(now, beats, silent_s, self._board.epoch(), self._board.lease())
        self._seen = view.epoch
        decision = self._coordination.decide(view)
        self._decision = decision
        if decision.take_lease is not None:
            if self._board.take_lease(Lease(decision.take_lease, self._beat.island, self._beat.incarnation)):
                self._record("diloco-coordinator", island=self._beat.island, lease=decision.take_lease)
        elif decision.start:
            self._start(view, decision.start)
        elif decision.survivors:
            self._after_failure(view, decision)

    def _look_around(self, beats: Mapping[str, Beat]) -> None:
        """Finds out whom this island reaches, while that matters."""
        with self._lock:
            if self._beat.state in (BROKEN, JOINING):
                others = {name: beat.address for name, beat in beats.items() if name != self._beat.island and beat.state != LEFT}
                self._beat = replace(self._beat, reaches=self._reach.look(others))

    def _start(self, view: View, islands: tuple[str, ...]) -> None:
        members = view.epoch.members if view.epoch else {}
        done = [name for name, beat in view.beats.items() if members.get(name) == beat.incarnation and beat.step >= self._planner.steps]
        if done:
            # Beginning from an older checkpoint now would undo what they have done.
            raise FactoryTrainError(f"the run is done: {', '.join(done)} made its last step", where=f"island {self._beat.island}")
        layouts = {view.beats[name].layout for name in islands}
        if len(layouts) > 1:
            raise FactoryTrainError(
                f"the islands do not hold the same model in the same way: {' / '.join(sorted(layouts))}",
                where="diloco",
                fix="start all islands with the same configuration and as many ranks each",
            )
        step, deal = self._planner.start({name: view.beats[name].resumes for name in islands})
        number = view.epoch.number + 1 if view.epoch else 1
        starting = {name: view.beats[name].incarnation for name in islands}
        why = f"begins at step {step}" if view.epoch is None else f"begins anew at step {step}: no member was left"
        self._publish(Epoch(number, self._lease_number(), starting, (), -1, step, True, deal, why))

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
