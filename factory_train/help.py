"""The text of `python -m factory_train --help`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping

from factory_train.compose import groups
from factory_train.config import Key, schema_keys
from factory_train.errors import ExitCode
from factory_train.registries import names_for
from factory_train.schema import leaves

_EXAMPLES = (
    ("recipe=llama_fsdp", "train a small model on this Python's own sources"),
    ("recipe=llama_fsdp --dry-run", "show the plan, start nothing"),
    ("recipe=llama_ddp data.path=book.txt run=book", "your own text; the same line again continues the run"),
    ("recipe=llama_fsdp -m optim.lr=1e-3,3e-3", "one run for each value"),
    ("logs -f book", "any unique part of a run's name will do"),
    ("resume book train.steps=2000", "train on for longer"),
)
_FLAGS = (
    ("--dry-run", "compose, check and plan; write and start nothing"),
    ("--force", "continue a run although keys changed that it was trained with (recorded)"),
    ("--multirun, -m", "a sweep: one run for every combination of comma-separated values, launcher.sweep_parallel at once"),
    ("--config-dir, -cd DIR", "your own recipes and groups, beside the package's"),
    ("--cfg job|hydra|all, --resolve, --package, --info, --hydra-help, --shell-completion", "Hydra's own"),
    ("--version", ""),
)


def overview(verbs: Mapping[str, str]) -> str:
    """Returns the whole help: verbs, examples, groups and keys."""
    width = min(shutil.get_terminal_size((110, 24)).columns, 140)
    lines = ["usage: python -m factory_train [VERB] [ARG ...] [key=value ...] [--flags]", "", "verbs (VERB -h tells more)"]
    lines += _columns(list(verbs.items()), width)
    lines += ["", "examples"]
    lines += _columns([(f"python -m factory_train {words}", why) for words, why in _EXAMPLES], width)
    lines += ["", "flags"]
    lines += _columns(list(_FLAGS), width)
    lines += ["", "groups (group=option)"]
    lines += _columns([(group, " ".join(options)) for group, options in groups().items()], width)
    lines += ["", "keys (key=value), with their defaults before a recipe's values"]
    lines += _columns([(f"{key.name}={_shown(key.name)}", _explained(key)) for key in schema_keys()], width)
    codes = [f"{code.value} {code.name.lower().replace('_', ' ')}" for code in ExitCode]
    lines += ["", *textwrap.wrap(f"exit codes: {', '.join(codes)}", width)]
    return "\n".join(lines)


def _shown(key: str) -> str:
    default = leaves()[key].default
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _explained(key: Key) -> str:
    words = key.choices or names_for(key.name)
    return f"{key.help} [{'|'.join(words)}]" if words else key.help


def _columns(rows: list[tuple[str, str]], width: int) -> list[str]:
    left = min(max(len(name) for name, _ in rows), 46) + 2
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, max(width - left - 2, 30)) or [""]
        first = f"  {name:<{left}}{wrapped[0]}" if len(name) < left else f"  {name}\n  {'':<{left}}{wrapped[0]}"
        lines += [first.rstrip(), *(f"  {'':<{left}}{line}" for line in wrapped[1:])]
    return lines
