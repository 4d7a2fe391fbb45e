"""The schedule of synchronisations, and which parameter is in which fragment."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory_train.diloco_schedule import PATTERNS, Round, Schedule, assign_fragments, names_by_fragment


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    sync_every = draw(st.integers(1, 24))
    fragments = draw(st.integers(1, min(sync_every, 6)))
    delay = draw(st.integers(0, Schedule.longest_delay(fragments, sync_every)))
    return Schedule(fragments, sync_every, delay, draw(st.integers(1, 90)))


def walk(schedule: Schedule) -> list[tuple[str, int, Round]]:
    """All sends and applications in the order in which they happen."""
    found = []
    for step in range(1, schedule.steps + 1):
        moment = schedule.at(step)
        found += [("apply", step, item) for item in moment.apply]
        found += [("send", step, item) for item in moment.send]
        for item in moment.drain:
            found += [("send", step, item), ("apply", step, item)]
    return found


@given(schedules())
def test_every_round_is_sent_once_and_applied_once_in_order_with_one_under_way(schedule: Schedule) -> None:
    under_way: list[Round] = []
    numbers = []
    for what, step, item in walk(schedule):
        if what == "send":
            assert item.sent == step
            assert not under_way, "two rounds at once"
            under_way.append(item)
            numbers.append(item.number)
        else:
            assert under_way == [item]
            assert item.applied == step == min(item.sent + schedule.delay, schedule.steps)
            under_way.clear()
    assert not under_way
    assert numbers == list(range(len(numbers)))


@given(schedules())
def test_each_fragment_is_sent_every_h_steps_and_once_more_at_the_end(schedule: Schedule) -> None:
    sent: dict[int, list[int]] = {fragment: [] for fragment in range(schedule.num_fragments)}
    for what, step, item in walk(schedule):
        if what == "send":
            sent[item.fragment].append(step)
    for steps in sent.values():
        assert steps[-1] == schedule.steps
        assert {after - before for before, after in itertools.pairwise(steps[:-1])} <= {schedule.sync_every}
        assert steps[0] <= schedule.sync_every
    regular = Counter(step for steps in sent.values() for step in steps[:-1])
    assert all(count == 1 for count in regular.values())


@given(schedules(), st.data())
def test_what_is_under_way_follows_from_the_step(schedule: Schedule, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, schedule.steps))
    under_way: list[Round] = []
    for what, step, item in walk(schedule):
        if step <= at:
            under_way = [*under_way, item] if what == "send" else [other for other in under_way if other != item]
    assert schedule.under_way(at) == tuple(under_way)


@given(schedules(), st.data())
def test_what_is_completed_and_when_it_was_sent_follow_from_numbers(schedule: Schedule, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, schedule.steps - 1))
    applied = [item for what, step, item in walk(schedule) if what == "apply" and step <= at]
    assert schedule.completed_at(at) == (applied[-1].number if applied else -1)
    assert all(schedule.sent_step(item.number) == item.sent for what, _, item in walk(schedule))


def test_classic_diloco_is_one_fragment_without_delay() -> None:
    sends = [(step, item.fragment) for what, step, item in walk(Schedule(1, 10, 0, 35)) if what == "send"]
    assert sends == [(10, 0), (20, 0), (30, 0), (35, 0)]


def test_offsets_are_staggered() -> None:
    sends = [(step, item.fragment) for what, step, item in walk(Schedule(4, 20, 2, 31)) if what == "send"]
    assert sends[:7] == [(5, 0), (10, 1), (15, 2), (20, 3), (25, 0), (30, 1), (31, 0)]


def sizes(layers: int) -> dict[str, int]:
    return {
        "embedding.weight": 900,
        **{f"layers.{layer}.{part}": size for layer in range(layers) for part, size in (("w", 100), ("norm", 4))},
        "norm.weight": 4,
    }


@pytest.mark.parametrize("pattern", PATTERNS)
@given(layers=st.integers(1, 12), data=st.data())
def test_each_parameter_is_in_one_fragment_and_layers_stay_whole(pattern: str, layers: int, data: st.DataObject) -> None:
    fragments = data.draw(st.integers(1, layers))
    chosen = assign_fragments(sizes(layers), fragments, pattern)
    lists = names_by_fragment(chosen, sizes(layers))
    assert sorted(name for names in lists for name in names) == sorted(sizes(layers))
    assert all(names for names in lists)
    assert all(chosen[f"layers.{layer}.w"] == chosen[f"layers.{layer}.norm"] for layer in range(layers))


def test_strided_and_sequential_fragments() -> None:
    def of_layers(pattern: str) -> list[int]:
        chosen = assign_fragments(sizes(6), 3, pattern)
        return [chosen[f"layers.{layer}.w"] for layer in range(6)]

    assert of_layers("strided") == [0, 1, 2, 0, 1, 2]
    assert of_layers("sequential") == [0, 0, 1, 1, 2, 2]
