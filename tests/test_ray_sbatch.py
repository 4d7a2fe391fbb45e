"""What slurm/ray.sbatch does in which order, with stand-ins for srun, scontrol and the job; the real thing: test_ray_slurm.py (-m long)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

SRUN = """#!/bin/bash
case "$*" in
  *ray.scripts.scripts*) echo "$*" >> "$STAGE/started"; trap 'echo ended >> "$STAGE/ended"; exit 0' TERM
    touch "$STAGE/step-$$"; while :; do sleep 0.1; [ -e "$STAGE/lose-head" ] && exit 1; done ;;
  *"rm -rf"*) rm -rf "${@: -1}" ;;
esac
"""
PYTHON = """#!/bin/bash
case "$1" in
  -c) printf token ;;
  -) cat > /dev/null; [ ! -e "$STAGE/never-up" ] ;;
  -m) echo "$*" > "$STAGE/job"
    trap 'exit 75' TERM
    case "$(cat "$STAGE/wanted")" in
      ok) exit 0 ;;
      error) exit 3 ;;
      train) touch "$STAGE/training"; while :; do sleep 0.1; done ;;
    esac ;;
esac
"""
SCONTROL = """#!/bin/bash
echo "$*" >> "$STAGE/scontrol"
"""


class Script:
    """Runs the script in a folder of its own.

    Args:
        wanted: what the job does: ok, error, train (until SIGTERM, then 75).
    """

    def __init__(self, folder: Path, wanted: str, **environ: str) -> None:
        self.folder, bin = folder, folder / "bin"
        bin.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("py", PYTHON)):
            (bin / name).write_text(text)
            (bin / name).chmod(0o755)
        (folder / "wanted").write_text(wanted)
        (folder / "tmp").mkdir()
        settings = {"PATH": f"{bin}:{os.environ['PATH']}", "PYTHON": str(bin / "py"), "STAGE": str(folder), "TMPDIR": str(folder / "tmp")}
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "4", "SLURMD_NODENAME": "node1"}
        self.process = subprocess.Popen(
            ["bash", str(REPOSITORY / "slurm" / "ray.sbatch"), "recipe=llama_fsdp"],
            cwd=folder,
            env=os.environ | settings | slurm | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until(self, name: str) -> None:
        limit = time.monotonic() + 120
        while not (self.folder / name).exists():
            assert time.monotonic() < limit, name
            time.sleep(0.05)

    def ended(self) -> int:
        """Waits for the script; checks that neither steps nor folders nor the token are left."""
        out, err = self.process.communicate(timeout=120)
        for step in self.folder.glob("step-*"):
            pid = int(step.name[5:])
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert not list(self.folder.glob(".ray-*")), out + err
        assert not list((self.folder / "tmp").iterdir())
        return self.process.returncode

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


def test_a_head_then_the_others_then_the_job_and_nothing_is_left(tmp_path: Path) -> None:
    script = Script(tmp_path, "ok")
    assert script.ended() == 0
    head, others = script.read("started").splitlines()
    assert "--nodelist=node1" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--nodes=1 --ntasks=1" in others
    assert "--exclude=node1" in others
    assert "launcher=ray launcher.nodes=2 run=job7 wait=true" in script.read("job")
    assert script.read("ended").count("ended") == 2
    assert not script.read("scontrol")


def test_a_failed_job_passes_its_exit_code_on_and_is_not_requeued(tmp_path: Path) -> None:
    script = Script(tmp_path, "error")
    assert script.ended() == 3
    assert not script.read("scontrol")


def test_a_warning_reaches_the_job_and_what_has_saved_is_requeued(tmp_path: Path) -> None:
    script = Script(tmp_path, "train")
    script.until("training")
    os.kill(script.process.pid, signal.SIGTERM)
    assert script.ended() == 75
    assert script.read("scontrol") == "requeue 7\n"


def test_a_head_that_goes_away_ends_the_job(tmp_path: Path) -> None:
    script = Script(tmp_path, "train")
    script.until("training")
    (tmp_path / "lose-head").touch()
    assert script.ended() not in (0, 75)
    assert not script.read("scontrol")


def test_a_restart_that_is_asked_to_stop_before_it_has_begun_is_requeued(tmp_path: Path) -> None:
    script = Script(tmp_path, "train", SLURM_RESTART_COUNT="1")
    limit = time.monotonic() + 120
    while script.read("started").count("\n") < 2:
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.kill(script.process.pid, signal.SIGTERM)
    assert script.ended() == 75
    assert not script.read("job")
    assert script.read("scontrol") == "requeue 7\n"
