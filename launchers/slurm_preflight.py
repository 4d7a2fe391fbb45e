"""The look at every node before a job uses it: `slurm/preflight.sh` on each, and which of them should be left out."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import factory_train
from factory_train.launchers import slurm_script
from factory_train.launchers.environment import import_environ
from factory_train.run_dir import Attempt

# Two processes that import torch from a cold filesystem and add a number; beyond that a node does not answer.
LIMIT_S = 300.0
_END_S = 60.0
LOG_NAME = "preflight.log"


def command(spec: Mapping[str, Any], folder: Path, nodes: int, code: Path | None = None) -> list[str]:
    """Returns the srun that looks at every node once.

    Args:
        spec: content of launch/slurm.json.
        folder: of the run, which every node must be able to write.
        nodes: of the allocation.
        code: folder that the job imports this package from; None is that of this process.
    """
    root = code or Path(factory_train.__file__).absolute().parent.parent
    script = root / "factory_train" / "slurm" / "preflight.sh"
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0", "--input=none"]
    if spec.get("nodes"):
        srun += [f"--nodelist={','.join(spec['nodes'][:nodes])}", "--overlap"]
    inside = ["env", f"PYTHON={spec['python']}", "bash", str(script), str(folder)]
    return [*srun, "--export=ALL", *spec["srun_args"], *slurm_script.in_container(spec, inside)]


class Look:
    """One look at all nodes of a job; leaving the context ends what still runs of it.

    Args:
        attempt: whose launch folder gets the log.
        spec: content of launch/slurm.json.
        nodes: of the job.
    """

    def __init__(self, attempt: Attempt, spec: Mapping[str, Any], nodes: Sequence[str]) -> None:
        self._attempt, self._nodes = attempt, nodes
        self._log = attempt.launch / LOG_NAME
        self._began = time.monotonic()
        line = command(spec, attempt.run.path, len(nodes))
        with open(self._log, "wb") as log:
            self._srun = subprocess.Popen(line, env=import_environ(os.environ), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self) -> Look:
        return self

    def __exit__(self, *_: object) -> None:
        if self._srun.poll() is None:
            self._srun.terminate()
            try:
                self._srun.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._srun.kill()
                self._srun.wait()

    def is_over(self) -> bool:
        """Returns whether all nodes have answered, or have had their time."""
        return self._srun.poll() is not None or time.monotonic() - self._began > LIMIT_S

    def conclude(self) -> dict[str, list[str]]:
        """Puts the findings on record and returns what is wrong with which node; nothing where all is well."""
        bad = read(self._log.read_text(errors="replace"), self._nodes)
        self._attempt.record_launch_event("preflight", seconds=round(time.monotonic() - self._began, 3), bad=bad)
        if bad:
            everywhere = is_everywhere(bad, self._nodes)
            self._attempt.record_error(
                {
                    "time": time.time(),
                    "stage": "preflight",
                    "rank": 0,
                    "host": next(iter(bad)),
                    "message": f"preflight: {in_words(bad)}",
                    "hint": "every node says so: look at what they share"
                    if everywhere
                    else f"launcher.exclude={','.join(bad)} leaves it out for good",
                    "log": str(self._log.relative_to(self._attempt.run.path)),
                    "traceback": None,
                }
            )
        return bad


def is_everywhere(bad: Mapping[str, Sequence[str]], nodes: Sequence[str]) -> bool:
    """Returns whether every one of several nodes is bad: then it is not the nodes, and others would be no better."""
    return len(bad) == len(nodes) > 1


def read(text: str, nodes: Sequence[str]) -> dict[str, list[str]]:
    """Returns what is wrong with which node.

    Args:
        text: what the script said on all nodes.
        nodes: of the allocation; one that was not heard of has not answered.
    """
    bad: dict[str, list[str]] = {}
    for node, what in re.findall(r"^(\S+): BAD (.*)$", text, re.MULTILINE):
        bad.setdefault(node, []).append(what)
    good = set(re.findall(r"^(\S+): ok$", text, re.MULTILINE))
    return bad | {node: ["did not answer"] for node in nodes if node not in good and node not in bad}


def in_words(bad: Mapping[str, Sequence[str]]) -> str:
    """Returns the findings as one line."""
    return "; ".join(f"{node}: {', '.join(found)}" for node, found in bad.items())
