"""Samples dealt to islands: none lost, none twice, whoever comes and goes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from factory_train.data.leases import Deal, LeasedCursor, Share

SAMPLES = 3


def play(deal: Deal, step: int, until: int, seen: dict[str, list[tuple[int, int]]]) -> None:
    """Lets every island take its samples of the steps from `step` to `until`."""
    for name in deal.shares:
        cursor = LeasedCursor(deal, name, step)
        for at in range(step, until):
            numbers, cursor = cursor.take(SAMPLES)
            seen.setdefault(name, []).extend((at, number) for number in numbers)


def test_islands_of_a_fixed_membership_take_turns() -> None:
    deal = Deal.opening(2, ["b", "a"])
    seen: dict[str, list[tuple[int, int]]] = {}
    play(deal, 0, 4, seen)
    assert [number for _, number in seen["a"]] == [*range(0, 6), *range(12, 18)]
    assert [number for _, number in seen["b"]] == [*range(6, 12), *range(18, 24)]


def test_a_lost_islands_lease_is_dealt_again_from_its_start() -> None:
    deal = Deal.opening(4, ["a", "b", "c"])
    after = deal.next(6, ["a", "b"], lost=["c"], brought_in=4)
    assert after.again == (5,)
    assert after.shares == {"a": Share(8, (0, 3)), "b": Share(8, (1, 4))}
    assert after.lease_at("a", 7) == (3, 3)
    assert after.lease_at("a", 8) == (5, 0)
    assert after.lease_at("b", 3) == (1, 3), "an island that is a lease behind goes on with what it had"
    assert after.lease_at("b", 8) == (6, 0)


def test_an_island_that_leaves_after_all_was_brought_in_loses_nothing() -> None:
    deal = Deal.opening(4, ["a", "b"])
    assert deal.next(8, ["a"], lost=["b"], brought_in=8).again == ()
    assert deal.next(8, ["a"], lost=["b"], brought_in=4).again == (3,)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_sample_is_lost_or_seen_twice_while_islands_come_and_go(data: st.DataObject) -> None:
    """Every lease below the highest begun one is done, under way, due again, or was brought in by nobody and due again."""
    steps = data.draw(st.integers(1, 5))
    names = ["a", "b", "c", "d"]
    members = data.draw(st.sets(st.sampled_from(names), min_size=1))
    deal, step = Deal.opening(steps, members), 0
    done: Counter[int] = Counter()
    taken: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(data.draw(st.integers(1, 8))):
        until = step + data.draw(st.integers(0, 3 * steps))
        for name in members:
            taken[name] += [deal.lease_at(name, at)[0] for at in range(step, until)]
        step = until
        following = data.draw(st.sets(st.sampled_from(names), min_size=1))
        lost = members - following
        for name in lost:
            # What it had finished by `step` was brought in; the rest is gone.
            finished = [lease for lease, count in Counter(taken[name]).items() if count == steps]
            done.update(finished)
            taken[name] = []
        before, deal = deal, deal.next(step, following, lost, brought_in=step)
        assert Deal.from_json(deal.to_json()) == deal
        for name in members & following:
            assert step == 0 or step % steps == 0 or deal.lease_at(name, step)[0] >= 0
            if step < before.shares[name].begins or (step - before.shares[name].begins) % steps:
                assert deal.lease_at(name, step) == before.lease_at(name, step), "a lease under way stays with its island"
        members = following
    # All finish what they have begun.
    for name in members:
        at = step
        while at < deal.shares[name].begins:
            taken[name].append(deal.lease_at(name, at)[0])
            at += 1
        done.update(lease for lease, count in Counter(taken[name]).items() if count == steps)
        assert set(Counter(taken[name]).values()) <= {steps}
    assert set(done.values()) <= {1}, "a lease was finished twice"
    assert sorted([*done, *deal.again]) == list(range(deal.first)), "a lease is lost, or due twice"
