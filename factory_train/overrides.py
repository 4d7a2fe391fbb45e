"""What a person writes after the verb: `key=value` and `group=option`, checked against the schema one by one.

The grammar is Hydra's. What is added: mistakes are named with the closest right word, keys that hold text take the
words as they stand (`run=7e3` is a name, not a number), and whole numbers may be written `1e4`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from factory_train.errors import ConfigError, did_you_mean
from factory_train.schema import Leaf, leaves, sections

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a mapping"}


@dataclass(frozen=True)
class Choice:
    """`group=option`: which file of a group to take."""

    text: str
    group: str
    option: str


@dataclass(frozen=True)
class Assignment:
    """`key=value`, its value converted to the key's type (or an interpolation, resolved later)."""

    text: str
    key: str
    value: Any


@dataclass(frozen=True)
class HydraSetting:
    """`hydra.something=...`: Hydra's own business."""

    text: str


Override = Choice | Assignment | HydraSetting


def parse(texts: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[Override]:
    """Checks overrides one by one and converts their values.

    Args:
        texts: the words of the command line, in order.
        groups: names of the options of every configuration group.

    Raises:
        ConfigError: a word that is not an override, an unknown key, group or option, or a value of the wrong type.
    """
    return [override for text in texts for override in _parse_one(text, groups)]


def _parse_one(text: str, groups: Mapping[str, Sequence[str]]) -> Iterator[Override]:
    if text.lstrip("+~").startswith(("hydra.", "hydra/")):
        yield HydraSetting(text)
        return
    if text.startswith("~"):
        raise ConfigError(f"'{text}' removes a key, and every key of the schema is needed", fix="give it a value instead: key=value")
    name, equals, raw = text.lstrip("+").partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"'{text}' is neither key=value nor a flag", fix="write key=value, without spaces around '='")
    if "@" in name:
        raise ConfigError(
            f"'{text}' moves a group to another package, which the schema does not allow", fix=f"{name.partition('@')[0]}={raw}"
        )
    known = name in groups or name in leaves() or name in sections() or _mapping_of(name) is not None
    if not known:
        raise _unknown_key(name, raw, groups)
    if text.startswith("+") and not text.startswith("++"):
        raise ConfigError(f"'+' adds a key, and '{name}' is there already", fix=f"{name}={raw}")
    value = _parse_value(name, raw)
    if name in sections() and isinstance(value, dict):
        for inner, item in _flatten(value, name):
            if inner not in leaves():
                raise _unknown_key(inner, str(item), groups)
            yield Assignment(text, inner, _convert(inner, item, str(item)))
    elif name in sections() and sections()[name].optional and value is None:
        yield Assignment(text, name, None)
    elif name in groups:
        yield _choice(text, name, raw.strip(), groups[name])
    elif name in leaves():
        yield Assignment(text, name, _convert(name, value, raw))
    elif (mapping := _mapping_of(name)) is not None:
        yield Assignment(text, name, _converted(name, value, raw, Leaf(leaves()[mapping].item, False, None)))
    else:
        raise ConfigError(f"'{name}' is a section, not a key", where=text, fix=f"{name}.{_first_key(name)}=...")


def _mapping_of(name: str) -> str | None:
    """Returns the key that holds a mapping, of the name of one of its items: `data.sets` of `data.sets.web`."""
    owner, _, item = name.rpartition(".")
    return owner if item and owner in leaves() and leaves()[owner].type is dict else None


def _unknown_key(name: str, raw: str, groups: Mapping[str, Sequence[str]]) -> ConfigError:
    section, _, last = name.rpartition(".")
    siblings = [key.removeprefix(section + ".") for key in leaves() if section and key.startswith(section + ".")]
    if siblings:
        # The common prefix would make any two keys of a section look alike.
        guess = did_you_mean(last, siblings)
        fix = f"did you mean {section}.{guess}={raw}?" if guess else f"keys of {section}: {' '.join(siblings)}"
    else:
        guess = did_you_mean(name, [*leaves(), *groups])
        fix = f"did you mean {guess}={raw}?" if guess else "python -m factory_train --help lists every key"
    return ConfigError(f"unknown key '{name}'", fix=fix)


def _first_key(section: str) -> str:
    return next(key for key in leaves() if key.startswith(section + ".")).removeprefix(section + ".")


def _choice(text: str, group: str, option: str, options: Sequence[str]) -> Choice:
    option = option.strip("'\"")
    if option in options:
        return Choice(text, group, option)
    if "," in option:
        raise _needs_multirun(group, option)
    raise unknown_option(group, option, options)


def unknown_option(group: str, option: str, options: Sequence[str]) -> ConfigError:
    """Returns the error for an option that its group does not have."""
    guess = did_you_mean(option, options)
    question = f" Did you mean {guess}?" if guess else ""
    return ConfigError(
        f"{group} '{option}' not found.{question} available: {' '.join(options)}",
        fix=f"{group}={guess or (options[0] if options else '...')}",
    )


def _needs_multirun(name: str, raw: str) -> ConfigError:
    return ConfigError(f"{name} has several values ({raw})", fix=f"--multirun for one run each, or quotes for one text: {name}=\"'{raw}'\"")


def _not_a_list(name: str, raw: str) -> ConfigError:
    if leaves()[name].item is int:
        return ConfigError(f"{raw!r} is not a list of whole numbers", where=name, fix=f"for example {name}={leaves()[name].default}")
    return ConfigError(f"{raw!r} is not a list of names", where=name, fix=f"{name}=[{raw.strip('[]')}]")


def _parse_value(name: str, raw: str) -> Any:
    """Returns the value Hydra's grammar sees in `raw`; for keys that hold text, the text as it stands."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    mapping = _mapping_of(name)
    is_text = leaves()[mapping].item is str if mapping else name in leaves() and leaves()[name].type is str
    try:
        parsed = OverridesParser.create().parse_override(f"{name}={raw}")
    except HydraException as error:
        if is_text:
            return raw
        raise ConfigError(f"cannot read the value {raw!r}", where=name, fix=f"quote it: {name}=\"'{raw}'\"") from error
    if parsed.is_sweep_override():
        raise _not_a_list(name, raw) if name in leaves() and leaves()[name].type is list else _needs_multirun(name, raw)
    # The quotes are inside `_value`; `value()` has already dropped them.
    if is_text and not isinstance(parsed._value, QuotedString) and parsed.value() is not None:
        return raw.strip()
    return parsed.value()


def _flatten(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", inner


def _convert(key: str, value: Any, raw: str) -> Any:
    return _converted(key, value, raw, leaves()[key])


def _converted(key: str, value: Any, raw: str, leaf: Leaf) -> Any:
    if value is None:
        if leaf.optional:
            return None
    elif isinstance(value, str) and "${" in value:
        return value
    elif leaf.type is dict:
        return _mapping(key, value, raw, leaf.item)
    elif leaf.type is list and leaf.item not in (str, int):
        # Of mappings from names to numbers.
        if isinstance(value, list):
            return [_mapping(key, item, raw, get_args(leaf.item)[-1]) for item in value]
        raise _not_a_mapping(key, raw)
    elif leaf.type is list:
        # The type itself: true and false are numbers for Python, not for people.
        if isinstance(value, list) and all(type(item) is leaf.item for item in value):
            return value
        raise _not_a_list(key, raw)
    elif leaf.type is bool:
        if str(value).lower() in _YES + _NO:
            return str(value).lower() in _YES
    elif leaf.type is str:
        if not isinstance(value, (list, dict)) and str(value) != "":
            return str(value)
    elif not isinstance(value, (bool, list, dict)):
        try:
            number = float(value)
            if leaf.type is float:
                return number
            if number.is_integer():
                return value if isinstance(value, int) else int(number)
        except ValueError:
            pass
    wanted = _NAMES[leaf.type] + (" or null" if leaf.optional else "")
    example = "null" if leaf.default is None else str(leaf.default).lower() if leaf.type is bool else leaf.default
    raise ConfigError(f"{raw!r} is not {wanted}", where=key, fix=f"for example {key}={example}")


def _mapping(key: str, value: Any, raw: str, item: Any) -> dict[str, Any]:
    """Returns a mapping from names with its values converted."""
    if not isinstance(value, dict):
        raise _not_a_mapping(key, raw)
    return {str(name): _converted(f"{key}.{name}", inner, str(inner), Leaf(item, False, None)) for name, inner in value.items()}


def _not_a_mapping(key: str, raw: str) -> ConfigError:
    leaf = leaves().get(key)
    example = "{web:FOLDER,code:FOLDER}" if leaf is not None and leaf.item is str else "{web:0.7,code:0.3}"
    if leaf is not None and leaf.type is list:
        example = f"[{example}]"
    return ConfigError(f"{raw!r} is not a mapping from names", where=key, fix=f"'{key}={example}', in quotes for the shell")


@dataclass(frozen=True)
class _GroupOptions:
    """The one thing Hydra's `glob()` asks of its configuration loader."""

    groups: Mapping[str, Sequence[str]]

    def get_group_options(self, group_name: str, results_filter: Any = None) -> list[str]:
        return list(self.groups.get(group_name, ()))


def sweep_points(texts: Sequence[str], groups: Mapping[str, Sequence[str]] | None = None) -> list[list[str]]:
    """Returns the overrides of every run that `--multirun` asks for: all combinations of values, the last varying fastest.

    Args:
        groups: names of the options of every configuration group, for `group=glob(...)`.

    Raises:
        ConfigError: a word that is not an override, or a sweep that is not a list of values.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create(config_loader=_GroupOptions(groups or {})).parse_overrides(quoted(texts))
        batches = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise ConfigError(str(error).splitlines()[0], where="--multirun", fix="key=value1,value2 or key=range(1,4)") from error
    points = [list(point) for batch in batches for point in batch]
    if not points:
        raise ConfigError("no run follows from these words", where="--multirun", fix="a range or glob that has values in it")
    return points


def quoted(texts: Sequence[str]) -> list[str]:
    """Returns the overrides with text values quoted, so that Hydra's own code reads them as `parse` does."""
    return [_quoted(text) for text in texts]


def _quoted(text: str) -> str:
    name, _, raw = text.partition("=")
    leaf = leaves().get(name.lstrip("+"))
    # `recipe` names a group as well as a key, and a group's option is not quoted.
    if leaf is None or leaf.type is not str or name == "recipe" or not raw or raw == "null" or raw[0] in "'\"" or "${" in raw or "," in raw:
        return text
    return f"{name}='{raw.strip()}'" if "'" not in raw else text
