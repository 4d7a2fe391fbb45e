"""From the words on the command line to one checked `Config`: groups of YAML values over the dataclass schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from factory_train import checks, plugins
from factory_train.config import Config, flatten, from_mapping
from factory_train.errors import ConfigError
from factory_train.overrides import Assignment, Choice, HydraSetting, Override, parse, unknown_option
from factory_train.schema import sections

CONFIG_DIR = Path(__file__).parent / "configs"
# A relative path in these means the folder the command was typed in; workers run elsewhere.
_PATH_KEYS = ("runs_root", "data.path", "data.cache_dir")


def groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Returns the options of every configuration group, those of the user's own folder included."""
    found: dict[str, set[str]] = {}
    for root in [CONFIG_DIR, *([Path(config_dir)] if config_dir else [])]:
        for folder in root.iterdir() if root.is_dir() else ():
            if folder.is_dir() and not folder.name.startswith((".", "_")):
                found.setdefault(folder.name, set()).update(file.stem for file in folder.glob("*.yaml"))
    return {group: sorted(options) for group, options in sorted(found.items())}


def register_schema() -> None:
    """Tells Hydra the dataclasses that every composed configuration must match."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


@dataclass(frozen=True)
class Composition:
    """A composed configuration and where it comes from.

    Args:
        config: the result.
        groups_only: the same before any `key=value`, to tell what those changed.
        choices: the `group=option` words.
    """

    config: Config
    groups_only: Config
    choices: tuple[str, ...]


def compose(overrides: Sequence[str], config_dir: str | None = None) -> Config:
    """Composes the configuration of a new run.

    Args:
        overrides: `key=value` and `group=option` words, in Hydra's grammar; `recipe=` must be among them.
        config_dir: folder with the user's own groups, searched after the package's.

    Raises:
        ConfigError: anything in the overrides or in the YAML files that cannot be right.
    """
    return compose_run(overrides, config_dir).config


def compose_run(overrides: Sequence[str], config_dir: str | None = None) -> Composition:
    """Does what `compose` does, and tells also what the words changed."""
    from omegaconf import OmegaConf

    available = _checked_groups(config_dir)
    parsed = parse(overrides, available)
    choices = [item for item in parsed if isinstance(item, Choice)]
    recipe = next((item.option for item in reversed(choices) if item.group == "recipe"), None)
    if recipe is None:
        raise ConfigError(f"no recipe given. available: {' '.join(available['recipe'])}", fix=f"recipe={available['recipe'][-1]}")
    composed = _hydra_compose("config", [item.text for item in parsed if isinstance(item, (Choice, HydraSetting))], config_dir)
    if OmegaConf.is_missing(composed, "recipe"):
        composed.recipe = recipe
    # First with every word, for names in the groups' files may be those of plugins that a word brings.
    config = _finish(composed.copy(), parsed)
    groups_only = _finish(composed, choices)
    return Composition(config, groups_only, tuple(item.text for item in choices if item.group != "recipe"))


def apply_overrides(config: Config, overrides: Sequence[str], config_dir: str | None = None) -> Config:
    """Returns `config` with overrides on top, as `resume` does with the frozen configuration of a run.

    `group=option` replaces the whole section by that option's values over the schema's defaults.

    Raises:
        ConfigError: as in `compose`, or another recipe.
    """
    from omegaconf import OmegaConf

    parsed = parse(overrides, _checked_groups(config_dir))
    built = OmegaConf.structured(config)
    for item in parsed:
        if isinstance(item, HydraSetting):
            raise ConfigError(f"'{item.text}' has no meaning for a run that exists", fix="leave it out")
        if isinstance(item, Choice) and item.group == "recipe":
            if item.option != config.recipe:
                raise ConfigError(
                    f"the run was made by recipe '{config.recipe}'", where=item.text, fix="start a new run for another recipe"
                )
        elif isinstance(item, Choice):
            section = sections()[item.group].type
            values = _hydra_compose(f"{item.group}/{item.option}", [], config_dir)[item.group]
            try:
                built[item.group] = OmegaConf.merge(OmegaConf.structured(section), values)
            except Exception as error:
                raise _translated(error, f"{item.group}={item.option}") from error
    return _finish(built, parsed)


def differences(config: Config, base: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the keys in which `config` differs from `base`, with the values of (base, config)."""
    before, after = flatten(base), flatten(config)
    return {key: (before.get(key), value) for key, value in after.items() if before.get(key) != value}


def _checked_groups(config_dir: str | None) -> dict[str, list[str]]:
    if config_dir is not None and not Path(config_dir).is_dir():
        raise ConfigError("no such folder", where=f"--config-dir {config_dir}", fix="a folder with recipe/, model/ ... in it")
    return groups(config_dir)


def search_path(config_dir: str | None) -> list[str]:
    """Returns the override that adds the user's own folder to Hydra's search path."""
    return [f"hydra.searchpath=['file://{Path(config_dir).absolute()}']"] if config_dir else []


def _hydra_compose(name: str, words: Sequence[str], config_dir: str | None) -> Any:
    import hydra

    register_schema()
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR.resolve()), version_base=None):
            return hydra.compose(name, overrides=[*words, *search_path(config_dir)])
    except Exception as error:
        raise _translated(error, " ".join(words)) from error


def _finish(composed: Any, parsed: Sequence[Override]) -> Config:
    from omegaconf import OmegaConf

    assignments = [item for item in parsed if isinstance(item, Assignment)]
    for item in assignments:
        try:
            _assign(composed, item.key, item.value)
        except Exception as error:
            raise _translated(error, item.text) from error
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except Exception as error:
        raise _translated(error, None) from error
    assert isinstance(values, dict)
    config: Config = from_mapping({str(key): value for key, value in values.items()})
    config = _with_text_for_path(config, parsed)
    _make_paths_absolute(config)
    plugins.load(config.plugins)
    checks.check_choices(config)
    return config


def _assign(composed: Any, key: str, value: Any) -> None:
    from omegaconf import open_dict

    *parents, last = key.split(".")
    node = composed
    for depth, name in enumerate(parents, start=1):
        if node[name] is None:
            # A section that is null comes into being when one of its keys is named.
            node[name] = sections()[".".join(parents[:depth])].type()
        node = node[name]
    # A mapping from names takes names that it does not have yet.
    with open_dict(node):
        node[last] = value


def _with_text_for_path(config: Config, parsed: Sequence[Override]) -> Config:
    """`data.path=FILE` alone means that file; next to another data source it is left for the checks to judge."""
    explicit = any(
        (isinstance(item, Choice) and item.group == "data") or (isinstance(item, Assignment) and item.key == "data.name") for item in parsed
    )
    if config.data.path is None or explicit or config.data.name != "builtin":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, name="text"))


def _make_paths_absolute(config: Config) -> None:
    for key in _PATH_KEYS:
        section, _, name = key.rpartition(".")
        owner = getattr(config, section) if section else config
        value = getattr(owner, name)
        if value is not None:
            setattr(owner, name, str(Path(value).expanduser().absolute()))
    config.data.sets = {name: str(Path(folder).expanduser().absolute()) for name, folder in config.data.sets.items()}


def _translated(error: Exception, where: str | None) -> Exception:
    """Returns Hydra's and OmegaConf's complaints as one line of ours; anything else as it is."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return ConfigError(f"not YAML: {error.problem}", where=f"{mark.name}, line {mark.line + 1}", fix="mend the file")
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group and error.options is not None:
            return unknown_option(group, option, list(error.options))
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    cause = getattr(error.__cause__, "msg", None)
    if lines[0].endswith("raised while composing config:"):
        # "In 'recipe/mine': KeyError raised while composing config:", and then what it was.
        lines[0] = f"{lines[0].rpartition(': ')[0]}: {lines[1]}"
    what = str(cause or lines[0]).splitlines()[0].rstrip(".")
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    return ConfigError(what, where=str(key) if key else where, fix="python -m factory_train --help lists keys and values")
