"""`logs RUN`: what a rank or a stage printed, across attempts."""

from __future__ import annotations

import codecs
import sys
import time

from factory_train import flight_recorder
from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.run_words import add_words, the_run
from factory_train.errors import NotFoundError
from factory_train.gangs import has_islands, island_run
from factory_train.launchers.by_name import is_alive, scheduled
from factory_train.run_dir import Attempt, RunDir
from factory_train.tail import Follower

_POLL_S = 0.3


def main(argv: list[str]) -> int:
    """Prints a log and, with -f, what comes after it; returns 0.

    Raises:
        NotFoundError: no such run, attempt or log.
    """
    parser = ArgumentParser("logs", "Prints the log of a rank or a stage.", "example: logs -f 7k2m9x --rank 1")
    add_words(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run ends, through restarts")
    parser.add_argument("--rank", type=int, default=0, help="which rank (0)")
    parser.add_argument("--island", type=int, default=0, help="of which island, where the run has several (0)")
    parser.add_argument("--stage", choices=("prepare", "train", "finish", "sync"), default="train", help="which stage (train)")
    parser.add_argument("--collectives", action="store_true", help="which rank entered which collective last (PyTorch's flight recorder)")
    parser.add_argument("--attempt", type=int, help="which attempt (the newest)")
    arguments = parser.parse(argv)
    run, _ = the_run("logs", arguments.words)
    log = f"rank-{arguments.rank:05d}" if arguments.stage == "train" else arguments.stage
    if arguments.stage == "train" and has_islands(run):
        run = _island(run, arguments.island)
    attempt = _attempt(run, arguments.attempt)
    if arguments.collectives:
        return _collectives(attempt)
    try:
        return _follow(run, attempt, log) if arguments.follow else _print(attempt, log)
    except KeyboardInterrupt:
        return 0


def _island(run: RunDir, index: int) -> RunDir:
    home = island_run(run, f"island-{index}")
    if not home.path.is_dir():
        there = ", ".join(sorted(entry.name for entry in home.path.parent.iterdir()))
        raise NotFoundError(f"no island {index}", where=run.name, fix=f"there is: {there}")
    return home


def _attempt(run: RunDir, number: int | None) -> Attempt:
    numbers = run.attempt_numbers()
    if not numbers or (number is not None and number not in numbers):
        known = ", ".join(map(str, numbers)) or "none"
        raise NotFoundError(f"no attempt {number}" if numbers else "the run was never started", where=run.name, fix=f"attempts: {known}")
    return Attempt(run, number or numbers[-1])


def _print(attempt: Attempt, log: str) -> int:
    path = attempt.log_path(log)
    if not path.is_file():
        there = sorted(entry.stem for entry in path.parent.glob("*.log"))
        raise NotFoundError(
            f"no log '{log}' in attempt {attempt.number}", where=attempt.run.name, fix=f"there is: {', '.join(there) or 'none'}"
        )
    sys.stdout.write(path.read_text(errors="replace"))
    return 0


def _collectives(attempt: Attempt) -> int:
    """Shows what the flight recorders of an attempt hold, by process group, the first rank that stopped ahead of all."""
    recorded, unread = flight_recorder.read_groups(attempt)
    if not recorded:
        raise NotFoundError(
            f"no flight recorder of attempt {attempt.number} to read" + "".join(f"; {why}" for why in unread),
            where=attempt.run.name,
            fix="NCCL writes them when a collective times out; status names the rank that stopped by its heartbeat",
        )
    found = flight_recorder.first_stopped(recorded)
    print(found.text if found else "every rank is in the same collectives")
    for group in recorded:
        print(f"{group.name}: ranks {', '.join(map(str, group.ranks))}")
        for rank in group.ranks:
            last = group.last(rank)
            print(f"  rank {rank:<4} " + (f"{'left' if last.is_over else 'in'} {last.text}" if last else "no record"))
    for why in unread:
        print(f"not read: {why}", file=sys.stderr)
    return 0


def _follow(run: RunDir, attempt: Attempt, log: str) -> int:
    while True:
        follower = Follower(attempt.log_path(log))
        # A character may be cut in two by the end of what is there so far.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        while True:
            # Asked before reading: what is written until the verdict is read after it.
            # A scheduler may start the next attempt long after the verdict of this one.
            goes_on = is_alive(run)
            ended = not attempt.is_newest() or not goes_on or (attempt.verdict() is not None and scheduled(run) is None)
            sys.stdout.write(decoder.decode(follower.read()))
            sys.stdout.flush()
            if ended:
                break
            time.sleep(_POLL_S)
        newest = run.last_attempt()
        if newest is None or newest.number == attempt.number:
            return 0
        attempt = newest
        print(f"--- attempt {attempt.number} ---", flush=True)
