"""A worker that speaks the launcher's contract without training anything.

What a process does is read from the environment variable SCRIPT: {"train:1": "raise", "prepare": "ok", ...}, keyed by
stage and, in the train stage, rank; "ok" where nothing is said.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from factory_train.launchers.job import WorkerEnv
from factory_train.launchers.lifeline import end_with_launcher
from factory_train.run_dir import process_started_at

PATIENCE_S = 120.0


def main() -> int:
    stage = sys.argv[1]
    env = WorkerEnv.from_environ()
    attempt = env.open_attempt()
    if env.lifeline:
        end_with_launcher()
    script = json.loads(os.environ.get("SCRIPT", "{}"))
    action = script.get(f"{stage}:{env.rank}" if stage == "train" else stage, "ok")
    stops: list[int] = []
    if action != "unready":
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda number, frame: stops.append(number))
        # As a rank does: some launchers start it with these blocked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    print(f"{stage} rank {env.rank} of {env.world_size} does: {action}", flush=True)
    started = attempt.path / f"started-{stage}-{env.rank}"
    started.with_suffix(".part").write_text(str(os.getpid()))
    started.with_suffix(".part").rename(started)
    if stage == "train" and action in ("raise", "silent", "killed", "blames-peer", "killed-late"):
        # Nothing fails before all are there, however slowly their processes start.
        for rank in range(env.world_size):
            _await(lambda rank=rank: (attempt.path / f"started-train-{rank}").exists())
    return _act(action, stops, env)


def _await(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)


def _act(action: str, stops: list[int], env: WorkerEnv) -> int:
    attempt = env.open_attempt()
    match action:
        case "ok":
            return 0
        case "train":
            # Steps until it is told to stop; rank 0 speaks for all.
            for step in range(1, int(PATIENCE_S * 50)):
                if env.rank == 0:
                    with open(attempt.metrics_path, "a") as file:
                        row = {"kind": "train", "step": step, "time": time.time(), "loss": 4.0, "tokens_per_s": 100.0}
                        file.write(json.dumps(row) + "\n")
                time.sleep(0.02)
                if stops:
                    outcome, code = ("interrupted", 130) if stops[0] == signal.SIGINT else ("preempted", 75)
                    if env.rank == 0:
                        attempt.write_verdict(outcome, code, step=step, reason=f"saved at step {step}")
                    return code
            return 1
        case "raise":
            attempt.record_error({"rank": env.rank, "host": "here", "message": "ValueError: no such thing", "hint": "do the other thing"})
            return 1
        case "usage":
            attempt.record_error({"rank": env.rank, "host": "here", "message": "vocabulary too small", "hint": None})
            return 2
        case "silent":
            print("the last words", flush=True)
            os._exit(3 if env.world_size == 1 else 17)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "blames-peer":
            # Loses its peer and reports that before the launcher can.
            attempt.record_error({"rank": env.rank, "host": "here", "message": "connection closed by peer"})
            peer = int((attempt.path / f"started-train-{1 - env.rank}").read_text())
            _await(lambda: process_started_at(peer) is None)
            return 1
        case "killed-late":
            _await(attempt.error_path.exists)
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang" | "unready":
            # Signals are noted and not acted upon, as in a collective whose peer is gone.
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                time.sleep(0.05)
        case "hang-with-child":
            child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({PATIENCE_S})"])
            (attempt.path / "grandchild").write_text(str(child.pid))
            time.sleep(PATIENCE_S)
    return 1


if __name__ == "__main__":
    sys.exit(main())
