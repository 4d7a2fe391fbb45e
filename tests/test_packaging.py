"""The wheel holds every file once, and works from any folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command import environment
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A build leaves its traces in the tree it builds from; tracked and new files, links kept as links.
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, check=True
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        original, target = REPOSITORY / name, source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if original.is_symlink():
            target.symlink_to(original.readlink())
        elif original.exists():
            target.write_bytes(original.read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_configs_and_code_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    packaged = {name for name in names if ".dist-info/" not in name}
    assert all(name.startswith("factory_train/") for name in packaged)
    for name in (
        "configs/recipe/llama_fsdp.yaml",
        "launchers/local.py",
        "recipes/pretrain.py",
        "kernels/__init__.py",
        "slurm/train.sbatch",
    ):
        assert f"factory_train/{name}" in packaged


def test_an_unpacked_wheel_plans_a_run_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    environ = environment() | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-m", "factory_train", "recipe=llama_fsdp", "--dry-run"],
        cwd=elsewhere,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "llama_tiny" in done.stdout
    assert not list(elsewhere.iterdir())
