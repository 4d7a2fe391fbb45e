"""What the exchange between islands took, as measured: read from the `sync` rows of their metrics."""

from __future__ import annotations

from dataclasses import dataclass

from factory_train import storage
from factory_train.gangs import islands_of
from factory_train.run_dir import RunDir


@dataclass(frozen=True)
class ExchangeFigures:
    """The counterpart of the plan's utilisation.

    Args:
        islands: that made two rounds at least.
        rounds: of the island that made most.
        not_waiting: part of its time that an island did not wait for others, of the one that waited most.
        island: which one that is.
    """

    islands: int
    rounds: int
    not_waiting: float
    island: str

    def line(self) -> str:
        """Returns the figures for people."""
        return f"{self.not_waiting:.1%} of the time not waiting for each other (least: {self.island}), {self.rounds} rounds"


def measure_exchange(run: RunDir) -> ExchangeFigures | None:
    """Returns what was measured on all islands, repeated work included; None where there was nothing to measure.

    Time counts from the first round of an attempt to its last, so starting and evaluating are not in it.
    """
    parts, most = {}, 0
    for island in islands_of(run):
        elapsed_s = waited_s = 0.0
        rounds = 0
        for attempt in island.attempts():
            rows = [row for row in storage.read_json_lines(attempt.metrics_path) if row["kind"] == "sync"]
            if len(rows) > 1:
                elapsed_s += rows[-1]["time"] - rows[0]["time"]
                waited_s += sum(row["waited_s"] for row in rows[1:])
            rounds += len(rows)
        most = max(most, rounds)
        if elapsed_s > 0:
            parts[island.name] = max(0.0, 1 - waited_s / elapsed_s)
    if not parts:
        return None
    least = min(parts, key=lambda name: parts[name])
    return ExchangeFigures(len(parts), most, parts[least], least)
