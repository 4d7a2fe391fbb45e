"""What code an attempt ran: written beside its configuration, so that a result can be traced to its sources."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import factory_train
from factory_train import plugins, storage
from factory_train.errors import PreflightError
from factory_train.run_dir import Attempt

SNAPSHOT_FORMAT_VERSION = 1
_PACKAGE = Path(factory_train.__file__).parent
_SOURCES = (".py", ".yaml", ".sbatch", ".sh")
_PACKAGES = ("torch", "triton", "numpy", "hydra-core", "omegaconf", "safetensors", "tokenizers", "mlflow", "ray", "submitit", "deepspeed")
# A patch beyond this holds something that is not source code.
_MAX_PATCH_BYTES = 16 * 2**20
# A folder beyond this holds something that is not source code.
_MAX_TREE_BYTES = 64 * 2**20
_GIT_TIMEOUT_S = 10.0


def copy_code(attempt: Attempt, plugin_names: Sequence[str] = ()) -> Path:
    """Copies the sources of the package, and of plugins, into the attempt; returns the folder to import them from.

    A job that waits in a queue runs these, whatever becomes of the files it was submitted from: modified and untracked
    ones as they are now.

    Raises:
        PreflightError: a plugin is larger than source code is.
    """
    return copy_code_to(attempt.path / "code" / "tree", plugin_names)


def share_code(attempt: Attempt, root: Path) -> None:
    """Lets an attempt show a copy that it shares with others, as the points of a sweep do."""
    link = attempt.path / "code" / "tree"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(os.path.relpath(root, link.parent), target_is_directory=True)


def copy_code_to(root: Path, plugin_names: Sequence[str] = ()) -> Path:
    """Copies what `copy_code` does into the folder `root`, and returns it."""
    _copy_sources(_PACKAGE, root / _PACKAGE.name)
    for name in plugin_names:
        file = plugins.source_file(name)
        if file is None or _PACKAGE in file.parents:
            continue
        top = name.partition(".")[0]
        if file.name != "__init__.py" and "." not in name:
            _copy_file(file, root / file.name)
        else:
            # The package the plugin is in, from its outermost folder on.
            folder = file.parent
            while folder.name != top and folder != folder.parent:
                folder = folder.parent
            _copy_sources(folder, root / top)
    return root


def _copy_sources(source: Path, target: Path) -> None:
    size = 0
    for path in _source_files(source, everything=True):
        size += path.stat().st_size
        if size > _MAX_TREE_BYTES:
            raise PreflightError(
                f"more than {_MAX_TREE_BYTES >> 20} MiB of files go with the code",
                where=str(source),
                fix="keep data and results out of the folders of plugins",
            )
        _copy_file(path, target / path.relative_to(source))


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_snapshot(attempt: Attempt, argv: Sequence[str], plugin_names: Sequence[str] = ()) -> None:
    """Writes `code.json`, and `code/diff.patch` where the package lies in a git checkout with changes.

    A missing git or an unreadable checkout leaves its fields null: lineage is worth having, not worth failing for.
    """
    with contextlib.suppress(OSError):
        facts = describe_code(argv) | {"plugins": dict(_describe_plugins(plugin_names))}
        patch = _git("diff", "--binary", "HEAD") if facts["git_sha"] and facts["git_dirty"] else None
        if patch and len(patch) <= _MAX_PATCH_BYTES:
            storage.write_atomic(attempt.path / "code" / "diff.patch", patch)
        storage.write_json(attempt.path / "code.json", facts)


def describe_code(argv: Sequence[str]) -> dict[str, Any]:
    """Returns the content of code.json."""
    sha, status = _git("rev-parse", "--verify", "-q", "HEAD"), _git("status", "--porcelain")
    changes = status.decode(errors="replace").splitlines() if status is not None else []
    return {
        "format_version": SNAPSHOT_FORMAT_VERSION,
        "version": factory_train.__version__,
        "git_sha": sha.decode().strip() or None if sha is not None else None,
        "git_dirty": bool(changes) if status is not None else None,
        "git_untracked": [line[3:] for line in changes if line.startswith("??")],
        "tree_sha256": tree_sha256(_PACKAGE),
        "argv": list(argv),
        "working_directory": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(_versions()),
    }


def _describe_plugins(names: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields where each plugin was found, and the hash of its file or, for a package, of its folder."""
    for name in names:
        file = plugins.source_file(name)
        if file is not None:
            is_package = file.name == "__init__.py"
            sha256 = tree_sha256(file.parent) if is_package else hashlib.sha256(file.read_bytes()).hexdigest()
            yield name, {"file": str(file), "sha256": sha256}


def tree_sha256(root: Path) -> str:
    """Returns one hash over names and contents of all sources below `root`, links followed."""
    digest = hashlib.sha256()
    for path in sorted(_source_files(root)):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _source_files(root: Path, *, everything: bool = False) -> Iterator[Path]:
    """Yields the sources below `root`; with `everything`, what a package may read at run time too."""
    for folder, inner, files in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if name != "__pycache__" and not name.startswith(".")]
        yield from (Path(folder, name) for name in files if everything or name.endswith(_SOURCES))


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)


def _git(*words: str) -> bytes | None:
    """Returns what git says about the checkout the package lies in; None when there is none or git fails."""
    root = _PACKAGE.resolve().parent
    if not (root / ".git").exists():
        return None
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, timeout=_GIT_TIMEOUT_S, env=environ)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
