"""The code keeps its own rules: style, types, and the one-way order of imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY


def check(*command: str) -> None:
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*command], cwd=REPOSITORY, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("words", [("check", "."), ("format", "--check", ".")], ids=["lint", "format"])
def test_ruff_has_nothing_to_say(words: tuple[str, ...]) -> None:
    check(sys.executable, "-m", "ruff", *words)


def test_types_check() -> None:
    check(sys.executable, "-m", "mypy")


def test_imports_only_point_down() -> None:
    check(str(Path(sys.executable).with_name("lint-imports")))


def test_the_trainer_stays_small() -> None:
    assert len((REPOSITORY / "factory_train/trainer.py").read_text().splitlines()) <= 300


def test_modules_hold_one_noun() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for folder in ("factory_train", "kernels", "launchers", "recipes")
        for path in (REPOSITORY / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_training_needs_no_scheduler_tracker_or_hydra() -> None:
    """What runs on a compute node imports where only torch, numpy and a few small packages are installed."""
    program = """
import sys
for name in ("ray", "mlflow", "hydra", "omegaconf", "submitit", "deepspeed", "antlr4"):
    sys.modules[name] = None
import factory_train.worker, factory_train.trainer, factory_train.recipes.pretrain, factory_train.export
"""
    check(sys.executable, "-c", program)
