"""`checkpoint list|verify|show|diff|prune|mark|unmark`: what is in a run's checkpoints, and whether it is whole."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from factory_train.checkpoint import reference, retention
from factory_train.checkpoint.catalog import CheckpointInfo, list_checkpoints
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.format import STATE_NAME, Manifest, read_manifest
from factory_train.checkpoint.lease import Lease
from factory_train.checkpoint.reference import Reference
from factory_train.checkpoint.retention import Retention
from factory_train.checkpoint.verify import verify_files
from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.progress_bar import ProgressBar
from factory_train.commands.run_words import integer
from factory_train.config import Config
from factory_train.errors import ConfigError, ExitCode, FactoryTrainError, NotFoundError, did_you_mean
from factory_train.run_dir import RunDir
from factory_train.runs_index import find_run, runs_root
from factory_train.units import format_bytes, format_count, format_duration

_ACTIONS = ("list", "verify", "show", "diff", "prune", "mark", "unmark")
_POLICY_KEYS = ("keep_last", "keep_every_steps", "keep_best")
_EPILOG = """\
  checkpoint list RUN                      which there are, and why each is kept
  checkpoint verify RUN | RUN@STEP         compare every byte with its checksum; exit 6 if one differs
  checkpoint show RUN@STEP [--tensors]     what it holds
  checkpoint diff RUN@100 RUN@200          which tensors differ, and by how much
  checkpoint prune RUN [keep_last=1]       remove what the policy does not keep; --dry-run only tells
  checkpoint mark RUN@STEP                 keep it whatever the policy says; unmark takes that back

A checkpoint may also be named by its folder. Without a step the newest is meant."""


def main(argv: list[str]) -> int:
    """Runs one action and returns its exit code.

    Raises:
        ConfigError: words that are not understood.
        NotFoundError: no such run or checkpoint.
    """
    parser = ArgumentParser("checkpoint", "Looks at checkpoints, and looks after them.", _EPILOG)
    parser.add_argument("words", nargs="*", metavar="ACTION RUN[@STEP] [key=value]", help="see below")
    parser.add_argument("--tensors", action="store_true", help="show: every tensor, with type, shape and chunks")
    parser.add_argument("--json", action="store_true", help="list, show: for programs")
    parser.add_argument("--dry-run", action="store_true", help="prune: tell what would go, remove nothing")
    arguments = parser.parse(argv)
    names = [word for word in arguments.words if "=" not in word]
    settings = dict(word.split("=", 1) for word in arguments.words if "=" in word)
    if not names:
        raise ConfigError("which action?", where="checkpoint", fix=f"checkpoint {'|'.join(_ACTIONS)} RUN")
    action, targets = names[0], names[1:]
    if action not in _ACTIONS:
        guess = did_you_mean(action, _ACTIONS)
        raise ConfigError(f"unknown action '{action}'", where="checkpoint", fix=f"did you mean {guess}?" if guess else " ".join(_ACTIONS))
    _check_words(action, targets, settings)
    root = runs_root(settings.pop("runs_root", None))
    if action == "list":
        return _list(find_run(targets[0], root), as_json=arguments.json)
    if action == "verify":
        return _verify(targets[0], root)
    if action == "show":
        return _show(reference.find(targets[0], root), tensors=arguments.tensors, as_json=arguments.json)
    if action == "diff":
        return _diff(reference.find(targets[0], root), reference.find(targets[1], root))
    if action == "prune":
        return _prune(find_run(targets[0], root), settings, dry_run=arguments.dry_run)
    return _mark(reference.find(targets[0], root), action == "mark")


def _check_words(action: str, targets: Sequence[str], settings: dict[str, str]) -> None:
    wanted, example = (2, "RUN@100 RUN@200") if action == "diff" else (1, "RUN")
    if len(targets) != wanted:
        what = "two checkpoints" if wanted == 2 else "one run or checkpoint"
        raise ConfigError(f"{action} takes {what}, not {len(targets)}", where="checkpoint", fix=f"checkpoint {action} {example}")
    known = ("runs_root", *(_POLICY_KEYS if action == "prune" else ()))
    for key in settings:
        if key not in known:
            guess = did_you_mean(key, known)
            fix = f"did you mean {guess}={settings[key]}?" if guess else f"keys: {', '.join(known)}"
            raise ConfigError(f"checkpoint {action} does not take '{key}'", where="checkpoint", fix=fix)


def _policy(run: RunDir) -> Retention:
    attempt = run.last_attempt()
    return Retention.of((attempt.config() if attempt else Config()).checkpoint)


# list


def _list(run: RunDir, *, as_json: bool) -> int:
    found = list_checkpoints(run)
    policy = _policy(run)
    reasons = retention.reasons_to_keep(run, found, policy)
    rows = [_summary(info, policy, reasons[info]) for info in found]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"{run.name} has no checkpoint yet")
    else:
        print("\n".join(_table(rows, policy.best_metric)))
    return ExitCode.OK


def _summary(info: CheckpointInfo, policy: Retention, reasons: list[str]) -> dict[str, Any]:
    metric = retention.metric_of(info.path, policy.best_metric)
    row: dict[str, Any] = {"name": info.path.name, "step": info.step, "kept": reasons, "metric": metric}
    try:
        manifest = info.manifest()
    except FactoryTrainError as error:
        return row | {"problem": error.what}
    facts = {"created": manifest.created, "attempt": manifest.attempt, "world_size": manifest.world_size}
    return row | {"bytes": _num_bytes(manifest), **facts}


def _table(rows: Sequence[dict[str, Any]], metric: str) -> list[str]:
    header = ("CHECKPOINT", "STEP", "SIZE", "AGE", "TRY", "RANKS", metric.upper(), "KEPT")
    lines = [header]
    for row in rows:
        if "problem" in row:
            lines.append((row["name"], str(row["step"]), "-", "-", "-", "-", "-", f"DAMAGED: {row['problem']}"))
            continue
        figure = "-" if row["metric"] is None else f"{row['metric']:.4f}"
        age = f"{format_duration(time.time() - row['created'])} ago"
        facts = (format_bytes(row["bytes"]), age, str(row["attempt"]), str(row["world_size"]), figure)
        lines.append((row["name"], str(row["step"]), *facts, ", ".join(row["kept"]) or "goes with the next save"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _num_bytes(manifest: Manifest) -> int:
    return sum(record.bytes for record in manifest.contents.files.values())


# verify


def _verify(text: str, root: Path) -> int:
    """Verifies one checkpoint, or all of a run when no step was given."""
    whole_run = "@" not in text and not (Path(text) / "MANIFEST.json").is_file()
    paths = [info.path for info in list_checkpoints(find_run(text, root))] if whole_run else [reference.find(text, root).path]
    if not paths:
        raise NotFoundError("the run has no checkpoint yet", where=text, fix="train it first")
    damaged = 0
    for path in paths:
        try:
            began = time.monotonic()
            size = verify(path)
        except NotFoundError:
            print(f"{path.name}  gone meanwhile: the run goes on and has newer ones")
        except FactoryTrainError as error:
            damaged += 1
            print(f"{path.name}  DAMAGED: {error.where}: {error.what}")
        else:
            seconds = time.monotonic() - began
            print(f"{path.name}  ok  {format_bytes(size)} in {format_duration(seconds)}, {format_bytes(size / max(seconds, 1e-6))}/s")
    return ExitCode.INTEGRITY if damaged else ExitCode.OK


def verify(path: Path) -> int:
    """Compares every byte of a checkpoint with its manifest, showing progress; returns the bytes read.

    Raises:
        IntegrityError: something differs.
        NotFoundError: it is being removed.
    """
    lease = Lease.to_read(path)
    try:
        manifest = read_manifest(path)
        with ProgressBar(f"verify {path.name}", _num_bytes(manifest)) as bar:
            return verify_files(path, manifest, progress=bar.add)
    finally:
        lease.close()


# show


def _show(target: Reference, *, tensors: bool, as_json: bool) -> int:
    manifest = read_manifest(target.path)
    state = json.loads((target.path / STATE_NAME).read_bytes())
    if as_json:
        print(json.dumps({"path": str(target.path), "manifest": json.loads(manifest.encode()), "state": state}, indent=2))
        return ExitCode.OK
    facts = [
        ("checkpoint", target.title),
        ("folder", str(target.path)),
        ("written", f"{format_duration(time.time() - manifest.created)} ago by attempt {manifest.attempt}, {manifest.world_size} ranks"),
        ("size", f"{format_bytes(_num_bytes(manifest))} in {len(manifest.contents.files)} files"),
        *(("section", line) for line in _sections(manifest)),
        *(("state", f"{key}: {json.dumps(value)}") for key, value in state.items()),
    ]
    previous = ""
    for name, text in facts:
        print(f"{'' if name == previous else name:<10}  {text}")
        previous = name
    for line in _tensors(manifest) if tensors else ():
        print(line)
    return ExitCode.OK


def _sections(manifest: Manifest) -> Iterator[str]:
    for section, records in manifest.contents.tensors.items():
        elements = sum(_numel(record.shape) for record in records.values())
        chunks = sum(len(record.chunks) for record in records.values())
        types = "/".join(sorted({record.dtype for record in records.values()}))
        yield f"{section}: {len(records)} tensors, {format_count(elements)} elements, {types}, {chunks} chunks"


def _tensors(manifest: Manifest) -> Iterator[str]:
    for section, records in manifest.contents.tensors.items():
        for name, record in sorted(records.items()):
            files = sorted({chunk.file for chunk in record.chunks})
            yield f"  {section}  {name}  {record.dtype} {list(record.shape)}  {len(record.chunks)} chunks in {', '.join(files)}"


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


# diff


def _diff(a: Reference, b: Reference) -> int:
    """Compares two checkpoints tensor by tensor, however each is cut; verifies both first."""
    for target in (a, b):
        verify(target.path)
    from factory_train.checkpoint.compare import compare
    from factory_train.checkpoint.reader import CheckpointReader

    with CheckpointReader(a.path) as first, CheckpointReader(b.path) as second:
        print(f"{'a':<10}  {a.title}\n{'b':<10}  {b.title}")
        lines = list(compare(first, second))
        different = [line for line in lines if not line.equal]
        for line in different:
            print(f"  {line}")
        print(f"{'tensors':<10}  {len(lines) - len(different)} equal, {len(different)} different")
        before, after = first.state, second.state
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                print(f"{'state':<10}  {key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}")
    return ExitCode.OK


# prune, mark


def _prune(run: RunDir, settings: dict[str, str], *, dry_run: bool) -> int:
    attempt = run.last_attempt()
    if attempt is None:
        raise NotFoundError("the run was never started", where=run.name)
    values = {key: integer("checkpoint prune", key, settings) for key in settings}
    policy = Retention(**{**_policy(run).to_json(), **values})
    if policy.keep_last < 1:
        raise ConfigError("the newest checkpoint always stays", where="keep_last", fix="keep_last=1")
    going = retention.removable(run, policy, _is_good)
    if not going:
        print(f"{run.name}: nothing to remove")
    for info in going:
        size = sum(path.stat().st_size for path in info.path.iterdir())
        if dry_run:
            print(f"{info.path.name}  would go, {format_bytes(size)}")
        elif retention.discard(info.path, attempt, DurableFiles()):
            print(f"{info.path.name}  removed, {format_bytes(size)}")
        else:
            print(f"{info.path.name}  stays: somebody reads it")
    return ExitCode.OK


def _is_good(info: CheckpointInfo) -> bool:
    try:
        verify(info.path)
    except FactoryTrainError:
        return False
    return True


def _mark(target: Reference, on: bool) -> int:
    if target.run is None:
        raise ConfigError("this checkpoint is in no run directory", where=str(target.path), fix="RUN@STEP")
    if on:
        retention.mark(target.run, target.path.name)
        print(f"{target.title} is kept until it is unmarked")
    elif retention.unmark(target.run, target.path.name):
        print(f"{target.title} is kept or removed as the policy says")
    else:
        print(f"{target.title} was not marked")
    return ExitCode.OK
