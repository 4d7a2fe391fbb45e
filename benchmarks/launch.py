"""From the command to the first step: the same two ranks started on this machine, by Slurm and by Ray.

    python benchmarks/launch.py [rounds] [--out=FILE.json]

Measures every way that answers here: `local` always, `slurm` where a controller does (slurm/local_cluster.sh start),
`ray` on a cluster of our own, first with the cluster down and then with it up. A round has each of them once, so that
whatever else the machine does falls on all. Data is prepared beforehand. Every time is read from the run directory,
against the start of the command.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from factory_train import storage
from factory_train.launchers import ray_own, slurm_queue
from factory_train.run_dir import RunDir

_LIMIT_S = 180.0
# So small that what is measured is the start, not the step.
_SMALL = (
    *("recipe=llama_fsdp", "launcher.tasks_per_node=2", "tracking=none", "data.tokenizer=byte", "evaluation.sample_tokens=8"),
    *("model.dim=32", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=64", "train.seq_len=32"),
    *(
        "train.global_batch_tokens=256",
        "train.micro_batch_size=4",
        "train.steps=2",
        "train.validate_every=0",
        "train.log_every=1",
        "optim.warmup_steps=0",
    ),
)
WAYS = {
    "local": ("launcher=local",),
    "slurm": ("launcher=slurm", "launcher.fabric=loopback"),
    "ray, cluster down": ("launcher=ray", "launcher.address=local"),
    "ray, cluster up": ("launcher=ray", "launcher.address=local"),
}


@dataclass(frozen=True)
class Timeline:
    """Seconds from the start of the command to what the run directory tells.

    Args:
        submitted: the command took an attempt, with everything checked, and was about to copy the code and hand the job over.
        returned: the command gave the terminal back; None for a local run, which it follows.
        begun: the job had its place, and its first stage, which finds the data prepared, began.
        training: ranks were being started.
        ready: they had met, and their model was built.
        stepped: the first optimizer step was done.
        load: tasks of the machine that wanted a core when the command started, the mean of a minute.
    """

    submitted: float
    returned: float | None
    begun: float
    training: float
    ready: float
    stepped: float
    load: float


def measure(way: str, root: Path, number: int) -> Timeline:
    """Starts one run and returns its times."""
    name = f"{way.replace(', ', '-').replace(' ', '-')}-{number}"
    text = root.parent / "text.txt"
    command = [sys.executable, "-m", "factory_train", *_SMALL, *WAYS[way], f"run={name}", f"runs_root={root}", f"data.path={text}"]
    began, load = time.time(), os.getloadavg()[0]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    returned = None
    if way != "local":
        _, complaint = process.communicate(timeout=_LIMIT_S)
        returned = time.time() - began
        assert process.returncode == 0, complaint
    run, limit = RunDir(root / f"llama_fsdp-{name}"), time.monotonic() + _LIMIT_S
    while not (attempt := run.last_attempt() if run.path.exists() else None) or attempt.verdict() is None:
        assert process.poll() in (None, 0), process.communicate()[1]
        assert time.monotonic() < limit, f"{way}: no verdict within {_LIMIT_S:g} s"
        time.sleep(0.1)
    process.wait()
    verdict = attempt.verdict()
    assert verdict is not None
    assert verdict.outcome == "done", verdict
    at = {(event["event"], event.get("stage")): event["time"] - began for event in reversed(attempt.events())}
    rows = {row["kind"]: row["time"] - began for row in reversed(storage.read_json_lines(attempt.metrics_path))}
    return Timeline(
        submitted=at["submit", None],
        returned=returned,
        begun=at["stage-start", "prepare"],
        training=at["stage-start", "train"],
        ready=rows["start"],
        stepped=rows["train"],
        load=load,
    )


def ways() -> Iterator[str]:
    """Yields the ways that answer on this machine."""
    yield "local"
    if slurm_queue.is_installed() and slurm_queue.answers():
        yield "slurm"
    yield from ("ray, cluster down", "ray, cluster up")


def end_cluster() -> None:
    """Ends our own Ray cluster, if it runs."""
    known = storage.read_json(ray_own.folder() / "cluster.json")
    if known is not None and ray_own.find() is not None:
        keeper = psutil.Process(known["pid"])
        keeper.terminate()
        keeper.wait(60)


def main() -> None:
    """Prints a table, and writes all measurements where `--out` says."""
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    out = next((word.removeprefix("--out=") for word in sys.argv[1:] if word.startswith("--out=")), None)
    rounds = int(words[0]) if words else 3
    found: dict[str, list[Timeline]] = {way: [] for way in ways()}
    with tempfile.TemporaryDirectory() as scratch:
        # Neither the cluster of this user nor the index of their runs is touched.
        os.environ |= {"FACTORY_TRAIN_RAY": f"{scratch}/ray", "XDG_STATE_HOME": f"{scratch}/state"}
        root = Path(scratch) / "runs"
        Path(scratch, "text.txt").write_text(Path(subprocess.__file__).read_text())
        # Prepares the data and warms the page cache; not counted.
        measure("local", root, 0)
        try:
            for number in range(1, rounds + 1):
                for way, times in found.items():
                    if way == "ray, cluster down":
                        end_cluster()
                    times.append(measure(way, root, number))
        finally:
            end_cluster()
    fields = ("submitted", "returned", "begun", "training", "ready", "stepped", "load")
    medians = {way: {name: _median([getattr(timeline, name) for timeline in times]) for name in fields} for way, times in found.items()}
    print(f"{'seconds, median of ' + str(rounds):<22}" + "".join(f"{name:>11}" for name in fields))
    for way, values in medians.items():
        print(f"{way:<22}" + "".join(f"{'-' if value is None else format(value, '.1f'):>11}" for value in values.values()))
    if out:
        versions = {name: version(name) for name in ("torch", "ray")}
        facts = {"command": f"python benchmarks/launch.py {rounds}", "cores": os.cpu_count(), "python": platform.python_version()}
        measured = {"median": medians, "all": {way: [asdict(timeline) for timeline in times] for way, times in found.items()}}
        storage.write_json(Path(out), {**facts, "versions": versions, **measured})


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


if __name__ == "__main__":
    main()
