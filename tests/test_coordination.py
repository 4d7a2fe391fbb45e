"""Who takes part in DiLoCo's rounds: leases, epochs, islands that go, come late and come back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from factory_train.distributed.board import BROKEN, JOINING, LEFT, MEMBER, Beat, Epoch, FolderBoard, Lease
from factory_train.distributed.coordination import Coordination, Decision, Rules, View, largest_whole
from factory_train.distributed.membership import Membership, Planner, Start
from factory_train.distributed.reach import Reach

RULES = Rules(("a", "b", "c"), quorum=1, silence_s=5.0, grace_s=20.0)
LEASE = Lease(1, "a", 1)
EPOCH = Epoch(1, 1, {"a": 1, "b": 1, "c": 1})


class Scene:
    """What is on the board; each island decides from it."""

    def __init__(self, rules: Rules = RULES, epoch: Epoch | None = EPOCH, lease: Lease | None = LEASE) -> None:
        self.now, self.epoch, self.lease = 0.0, epoch, lease
        state = MEMBER if epoch else JOINING
        self.beats = {name: Beat(name, 1, state=state, epoch=epoch.number if epoch else 0) for name in rules.islands}
        self.silent_s = dict.fromkeys(rules.islands, 0.0)
        self.minds = {name: Coordination(rules, name, 1) for name in rules.islands}

    def says(self, island: str, **facts) -> None:
        self.beats[island] = replace(self.beats[island], **facts)

    def decisions(self, after_s: float = 0.0) -> dict[str, Decision]:
        self.now += after_s
        view = View(self.now, self.beats, self.silent_s, self.epoch, self.lease)
        return {name: mind.decide(view) for name, mind in self.minds.items()}


def test_the_first_island_takes_the_lease_and_begins_when_all_are_there() -> None:
    scene = Scene(epoch=None, lease=None)
    assert [decision.take_lease for decision in scene.decisions().values()] == [1, None, None]
    scene.lease = Lease(1, "a", 1)
    assert scene.decisions()["a"].start == ("a", "b", "c")
    assert scene.decisions()["b"] == Decision()


def test_who_is_missing_at_the_start_is_waited_for_during_the_grace_time() -> None:
    scene = Scene(replace(RULES, quorum=2), epoch=None)
    scene.silent_s["c"] = 99.0
    assert scene.decisions()["a"].start == ()
    assert scene.decisions(19.0)["a"].start == ()
    assert scene.decisions(2.0)["a"].start == ("a", "b")
    scene.silent_s["b"] = 99.0
    assert scene.decisions(99.0)["a"].start == ()


def test_an_undisturbed_epoch_stays() -> None:
    assert set(map(str, Scene().decisions(1000.0).values())) == {str(Decision())}


@pytest.mark.parametrize(
    ("gone", "reason"), [({"incarnation": 2, "state": JOINING}, "restarted"), ({"state": LEFT}, "left"), (None, "silent for 5 s")]
)
def test_after_a_failed_round_those_that_report_it_go_on(gone: dict | None, reason: str) -> None:
    scene = Scene()
    if gone is None:
        scene.silent_s["b"] = 6.0
    else:
        scene.says("b", **gone)
    scene.says("a", state=BROKEN)
    # c has not noticed yet: it is on its way to the round.
    assert scene.decisions()["a"] == Decision()
    scene.says("c", state=BROKEN)
    decision = scene.decisions(0.1)["a"]
    assert decision.survivors == ("a", "c")
    assert decision.lost == {"b": reason}


def test_a_member_that_lives_but_does_not_come_is_late() -> None:
    scene = Scene()
    scene.says("a", state=BROKEN)
    scene.says("c", state=BROKEN)
    assert scene.decisions(0.0)["a"].survivors == ()
    assert scene.decisions(19.0)["a"].survivors == ()
    decision = scene.decisions(2.0)["a"]
    assert decision.survivors == ("a", "c")
    assert decision.lost == {"b": "late"}


def test_what_members_have_waited_counts_against_the_grace_time() -> None:
    scene = Scene()
    scene.says("a", state=BROKEN, waited_s=19.0)
    scene.says("c", state=BROKEN, waited_s=15.0)
    assert scene.decisions(0.0)["a"] == Decision()
    # b may have noticed with the others, a moment later.
    assert scene.decisions(2.0)["a"] == Decision()
    decision = scene.decisions(1.5)["a"]
    assert decision.survivors == ("a", "c")
    assert decision.lost == {"b": "late"}


def test_an_island_says_whom_it_reaches_and_how_long_it_waits_as_long_as_it_does(tmp_path: Path) -> None:
    """Whoever coordinates next needs to know it, too."""
    board, planner = FolderBoard(tmp_path), Planner(lambda found: Start(0, {}, tuple(found)), lambda *facts: {}, 9)
    islands = [Membership(board, RULES, Beat(name, 1), planner, lambda kind, **facts: None) for name in "ab"]

    def until(holds: Callable[[Beat], bool]) -> None:
        limit = time.monotonic() + 60
        while not ("a" in board.beats() and holds(board.beats()["a"])):
            assert time.monotonic() < limit
            time.sleep(0.02)

    try:
        until(lambda beat: beat.reaches == ["b"])
        islands[0].tell(state=BROKEN, epoch=1, waited_s=7.0)
        until(lambda beat: beat.waited_s > 7.2 and beat.reaches == ["b"])
        islands[0].tell(state=MEMBER)
        assert (board.beats()["a"].waited_s, board.beats()["a"].reaches) == (0.0, None)
    finally:
        for island in islands:
            island.close()


def broken(scene: Scene, **reaches: str) -> None:
    for name in scene.beats:
        scene.says(name, state=BROKEN, reaches=tuple(reaches[name]) if name in reaches else None)


def test_after_a_failure_that_nobodys_end_explains_all_try_again_if_they_reach_each_other() -> None:
    scene = Scene()
    broken(scene, a="bc", b="ac")
    assert scene.decisions()["a"] == Decision(), "c does not know yet"
    broken(scene, a="bc", b="ac", c="ab")
    assert scene.decisions(0.1)["a"] == Decision(survivors=("a", "b", "c"))
    scene = Scene()
    broken(scene, a="bc", b="ac")
    scene.decisions()
    assert scene.decisions(11.0)["a"].survivors == ("a", "b", "c"), "one that does not say whom it reaches is not held against it"


def test_a_cut_that_lasts_parts_the_islands() -> None:
    scene = Scene()
    broken(scene, a="b", b="ac", c="b")
    assert scene.decisions()["a"] == Decision()
    assert scene.decisions(19.0)["a"] == Decision(), "it may be mended"
    decision = scene.decisions(2.0)["a"]
    assert decision == Decision(survivors=("a", "b"), lost={"c": "cannot reach all others"})


@pytest.mark.parametrize(
    ("reaches", "coordinator", "together"),
    [
        ({"a": "bc", "b": "ac", "c": "ab"}, "a", "abc"),
        ({"a": "b", "b": "ac", "c": "b"}, "a", "ab"),
        ({"a": "b", "b": "ac", "c": "b"}, "c", "bc"),
        ({"a": "b", "b": "a"}, "b", "ab"),
        ({"a": "", "b": ""}, "b", "b"),
        # Hearing in one direction is not enough.
        ({"a": "bc", "b": "ac", "c": "a"}, "b", "ab"),
        # The larger part, even without the coordinator.
        ({"a": "", "b": "c", "c": "b"}, "a", "bc"),
        ({"a": "bcd", "b": "acd", "c": "abd", "d": "abc"}, "a", "abcd"),
        ({"a": "bd", "b": "ac", "c": "bd", "d": "ac"}, "d", "ad"),
    ],
)
def test_the_largest_part_whose_islands_all_reach_each_other_goes_on(reaches: dict[str, str], coordinator: str, together: str) -> None:
    assert largest_whole({name: tuple(found) for name, found in reaches.items()}, coordinator) == tuple(together)


def test_a_part_below_the_quorum_waits_for_the_link() -> None:
    scene = Scene(replace(RULES, quorum=3))
    broken(scene, a="b", b="ac", c="b")
    scene.decisions()
    assert scene.decisions(99.0)["a"] == Decision()
    broken(scene, a="bc", b="ac", c="ab")
    assert scene.decisions(1.0)["a"].survivors == ("a", "b", "c")


def test_an_island_is_reached_under_its_own_name_only_and_as_long_as_it_is_there() -> None:
    here, there = Reach("a", 2.0), Reach("b", 2.0)
    try:

        def answers(**others: str) -> tuple[str, ...]:
            here.forget()
            limit = time.monotonic() + 60
            while (found := here.look(others)) is None:
                assert time.monotonic() < limit
                time.sleep(0.01)
            return found

        assert answers(b=there.address, a=here.address) == ("a", "b")
        assert answers(c=there.address) == ()
        assert answers(b="nowhere") == ()
        there.close()
        assert answers(b=there.address) == ()
    finally:
        here.close()
        there.close()


def test_too_few_do_not_go_on() -> None:
    scene = Scene(replace(RULES, quorum=2))
    scene.says("a", state=BROKEN)
    scene.silent_s.update(b=9.0, c=9.0)
    assert scene.decisions(99.0)["a"] == Decision()


def test_when_the_coordinator_is_gone_the_next_member_takes_over() -> None:
    scene = Scene()
    scene.silent_s["a"] = 6.0
    decisions = scene.decisions()
    assert decisions["b"].take_lease == 2
    assert decisions["c"] == Decision()
    scene.lease = Lease(2, "b", 1)
    scene.says("b", state=BROKEN)
    scene.says("c", state=BROKEN)
    assert scene.decisions()["b"].survivors == ("b", "c")
    # The old one wakes up: it sees another lease and decides nothing.
    scene.silent_s["a"] = 0.0
    assert scene.decisions()["a"] == Decision()


def test_a_coordinator_that_is_no_member_any_more_hands_over() -> None:
    scene = Scene()
    scene.epoch = Epoch(2, 1, {"b": 1, "c": 1})
    assert scene.decisions()["b"].take_lease == 2


def test_who_comes_back_is_admitted_by_the_coordinator_alone() -> None:
    scene = Scene(epoch=Epoch(2, 1, {"a": 1, "c": 1}))
    scene.says("b", state=JOINING, incarnation=2)
    assert scene.decisions()["a"].admit == ()
    scene.says("b", reaches=("c",))
    assert scene.decisions()["a"].admit == (), "it would only make the next epoch fail"
    scene.says("b", reaches=("a", "c"))
    decisions = scene.decisions()
    assert decisions["a"].admit == ("b",)
    assert decisions["c"] == Decision()


def test_a_stranger_is_not_admitted() -> None:
    scene = Scene(epoch=Epoch(2, 1, {"a": 1, "b": 1, "c": 1}))
    scene.beats["z"], scene.silent_s["z"] = Beat("z", 1), 0.0
    assert scene.decisions()["a"].admit == ()


def test_an_island_that_dies_while_it_joins_is_not_a_survivor() -> None:
    scene = Scene(epoch=Epoch(2, 1, {"a": 1, "b": 2, "c": 1}, joining=("b",)))
    scene.says("b", state=JOINING, incarnation=2)
    for name in ("a", "c"):
        scene.says(name, state=BROKEN, epoch=2)
    decision = scene.decisions()["a"]
    assert decision.survivors == ("a", "c")
    assert list(decision.lost) == ["b"]


def test_when_no_member_is_left_those_that_are_there_begin_anew() -> None:
    scene = Scene(lease=Lease(1, "a", 1))
    for name in RULES.islands:
        scene.says(name, state=JOINING, incarnation=2)
    scene.minds = {name: Coordination(RULES, name, 2) for name in RULES.islands}
    assert scene.decisions()["a"].take_lease == 2
    scene.lease = Lease(2, "a", 2)
    assert scene.decisions()["a"].start == ("a", "b", "c")
