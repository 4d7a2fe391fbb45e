"""When each fragment is sent and applied: a pure function of the step, so that all ranks communicate in the same order.

Notation of Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512): P fragments, H inner steps between two synchronisations
of one fragment, tau steps between sending and applying.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PATTERNS = ("strided", "sequential")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Round:
    """One synchronisation of one fragment.

    Args:
        number: rounds are numbered from 0 in the order in which they happen.
        fragment: which part of the model.
        sent: completed inner steps when it is sent.
        applied: completed inner steps when its result is applied; `sent` itself means that training waits for it.
    """

    number: int
    fragment: int
    sent: int
    applied: int


@dataclass(frozen=True)
class Moment:
    """What happens right after an inner step: first `apply`, then `send`; in the last step they alternate (`drain`).

    Args:
        apply: rounds whose result is applied.
        send: rounds that are sent, none of them applied at this step unless in `drain`.
        drain: rounds that are sent and applied one after the other, training waiting.
    """

    apply: tuple[Round, ...] = ()
    send: tuple[Round, ...] = ()
    drain: tuple[Round, ...] = ()


class Schedule:
    """The rounds of a whole run.

    Fragment p is sent after steps t with (t - t_p) mod H = 0, t_p = (p + 1) H / P rounded down: as far apart as can be. After
    the last step every fragment is synchronised once more, so that the outer parameters hold all that was learned.

    Args:
        num_fragments: P, at most `sync_every`.
        sync_every: H, in inner steps.
        delay: tau, in inner steps; at most the steps between two sends, so that one round is under way at a time.
        steps: inner steps of the run.
    """

    def __init__(self, num_fragments: int, sync_every: int, delay: int, steps: int) -> None:
        assert 1 <= num_fragments <= sync_every, (num_fragments, sync_every)
        assert steps >= 1, steps
        self.num_fragments, self.sync_every, self.delay, self.steps = num_fragments, sync_every, delay, steps
        self._offsets = [(fragment + 1) * sync_every // num_fragments for fragment in range(num_fragments)]
        assert 0 <= delay <= self.spacing, (delay, self.spacing)

    @property
    def spacing(self) -> int:
        """Fewest inner steps between two sends."""
        edges = [0, *self._offsets]
        return min(after - before for before, after in itertools.pairwise(edges))

    @staticmethod
    def longest_delay(num_fragments: int, sync_every: int) -> int:
        """Returns the largest delay that leaves one round under way at a time."""
        return Schedule(num_fragments, sync_every, 0, 1).spacing

    def sent_before(self, step: int) -> int:
        """Returns how many rounds are sent before inner step `step` is completed, the last step's not counted."""
        whole, rest = divmod(max(0, step - 1), self.sync_every)
        return whole * self.num_fragments + bisect.bisect_right(self._offsets, rest)

    def at(self, step: int) -> Moment:
        """Returns what happens after inner step `step` (1 .. steps) is completed."""
        assert 1 <= step <= self.steps, (step, self.steps)
        if step == self.steps:
            first = self.sent_before(step)
            drain = tuple(Round(first + fragment, fragment, step, step) for fragment in range(self.num_fragments))
            return Moment(apply=self.under_way(step - 1), drain=drain)
        sent = self._regular(step)
        drained = (sent,) if sent is not None and sent.applied == step else ()
        earlier = self._regular(step - self.delay) if self.delay and step > self.delay else None
        return Moment((earlier,) if earlier else (), (sent,) if sent is not None and not drained else (), drained)

    def under_way(self, step: int) -> tuple[Round, ...]:
        """Returns the rounds that were sent at or before `step` and are applied after it, oldest first."""
        if step >= self.steps:
            return ()
        recent = (self._regular(sent) for sent in range(max(1, step - self.delay + 1), step + 1))
        return tuple(found for found in recent if found is not None and found.applied > step)

    def sent_step(self, number: int) -> int:
        """Returns the step after which round `number` is sent; 0 for -1."""
        whole, fragment = divmod(number, self.num_fragments)
        return min(whole * self.sync_every + self._offsets[fragment], self.steps) if number >= 0 else 0

    def completed_at(self, step: int) -> int:
        """Returns the last round that is applied when inner step `step` is over; -1 for none."""
        return self.sent_before(step + 1) - len(self.under_way(step)) - 1

    def _regular(self, step: int) -> Round | None:
        """The round that is sent at `step`, if there is one; not for the last step."""
        if step < 1 or step >= self.steps:
            return None
        number = self.sent_before(step)
        whole, fragment = divmod(number, self.num_fragments)
        if whole * self.sync_every + self._offsets[fragment] != step:
            return None
        return Round(number, fragment, step, min(step + self.delay, self.steps))


def assign_fragments(sizes: Mapping[str, int], num_fragments: int, pattern: str) -> dict[str, int]:
    """Returns the fragment of each parameter; each is in exactly one.

    Layers are dealt in turn (strided: layer l to fragment l mod P, the paper's choice) or in runs (sequential). What is in no
    layer (embeddings, final norm, head) goes, name by name, to the fragment that is smallest by then.

    Args:
        sizes: elements of the whole parameter, by name; the same on all ranks.
        num_fragments: P, at most the number of layers, unless it is 1.
        pattern: one of `PATTERNS`.
    """
    assert pattern in PATTERNS, pattern
    layers = {name: int(found[1]) for name in sizes if (found := _LAYER.search(name))}
    count = max(layers.values(), default=-1) + 1
    assert num_fragments == 1 or num_fragments <= count, (num_fragments, count)
    strided = pattern == "strided"
    chosen = {name: layer % num_fragments if strided else layer * num_fragments // count for name, layer in layers.items()}
    totals = [0] * num_fragments
    for name, fragment in chosen.items():
        totals[fragment] += sizes[name]
    for name in sorted(set(sizes) - set(layers), key=lambda name: (-sizes[name], name)):
        chosen[name] = totals.index(min(totals))
        totals[chosen[name]] += sizes[name]
    return chosen


def names_by_fragment(chosen: Mapping[str, int], names: Iterable[str]) -> list[list[str]]:
    """Returns the names of each fragment, in the order of `names`."""
    lists: list[list[str]] = [[] for _ in range(max(chosen.values(), default=-1) + 1)]
    for name in names:
        lists[chosen[name]].append(name)
    return lists
