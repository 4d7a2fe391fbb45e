"""The names that keys of the configuration may hold, and what they stand for: architectures, data sources, optimizers ...

An entry may be a reference, "module:attribute", that is imported when it is asked for: a login node knows every name
without torch. Built-in entries are such references; plugins add theirs with `declare`, or `register` the thing itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast

from factory_train import plugins
from factory_train.config import DataConfig, ModelConfig, OptimConfig
from factory_train.errors import ConfigError, did_you_mean

T = TypeVar("T")
# What `register` decorates keeps its own type: a class stays a class.
E = TypeVar("E")


class Registry(Generic[T]):
    """What the values of one key stand for, by name.

    Args:
        kind: what an entry is, for people: "optimizer".
        key: the key whose values are its names: "optim.name".
        builtin: references of the entries that factory_train itself brings.
    """

    def __init__(self, kind: str, key: str, builtin: Mapping[str, str]) -> None:
        self.kind, self.key = kind, key
        self._builtin = frozenset(builtin)
        self._references: dict[str, str] = dict(builtin)
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """Returns a decorator that gives a class or function its name.

        Raises:
            ConfigError: another one has that name.
        """

        def decorate(entry: E) -> E:
            self._add(name, _origin(entry))
            self._entries[name] = cast(T, entry)
            return entry

        return decorate

    def declare(self, name: str, reference: str) -> None:
        """Gives a name to "module:attribute", which is imported when a process asks for it.

        Raises:
            ConfigError: another one has that name.
        """
        self._add(name, reference)
        self._entries.pop(name, None)

    def _add(self, name: str, reference: str) -> None:
        known = self._references.get(name, reference)
        # A module imported again, after it failed half-way, meets its own entries.
        if known != reference:
            raise ConfigError(
                f"two {self.kind}s are named '{name}': {known.replace(':', '.')} and {reference.replace(':', '.')}",
                where="plugins",
                fix="give one of them another name",
            )
        self._references[name] = reference

    def names(self) -> tuple[str, ...]:
        """Returns the names, built-in ones first."""
        return tuple(self._references)

    def is_builtin(self, name: str) -> bool:
        """Returns whether factory_train itself brings the entry."""
        return name in self._builtin

    def check(self, name: str) -> None:
        """Checks that there is an entry of that name; imports nothing.

        Raises:
            ConfigError: there is none.
        """
        if name in self._references:
            return
        guess = did_you_mean(name, self._references)
        fix = f"{self.key}={guess}" if guess else f"{self.key}={self.names()[0]}, or plugins=[PACKAGE] with the package that registers it"
        raise ConfigError(f"'{name}' is not one of: {' '.join(self.names())}", where=self.key, fix=fix)

    def get(self, name: str) -> T:
        """Returns the entry of that name.

        Raises:
            ConfigError: there is none, or the plugin's module that holds it cannot be imported.
        """
        self.check(name)
        if name not in self._entries:
            module_name, _, attribute = self._references[name].partition(":")
            # An error in a module of ours is a bug and keeps its traceback.
            module = importlib.import_module(module_name) if name in self._builtin else plugins.import_module(module_name)
            if not hasattr(module, attribute):
                what = f"{self.kind} '{name}' is declared as {module_name}:{attribute}, which is not there"
                raise ConfigError(what, where="plugins", fix=f"mend the reference: {module_name}:NAME")
            self._entries[name] = getattr(module, attribute)
        return self._entries[name]


def _origin(entry: object) -> str:
    """Returns where an entry was defined; one without a name of its own (a partial) is told apart by its value."""
    name = getattr(entry, "__qualname__", None)
    return f"{getattr(entry, '__module__', '?')}:{name}" if name else repr(entry)


# (model section, rows of the embedding) -> LanguageModel
ARCHITECTURES: Registry[Callable[[ModelConfig, int], Any]] = Registry(
    "architecture", "model.architecture", {"llama": "factory_train.models.llama:Llama"}
)
# (data section) -> Source
DATA_SOURCES: Registry[Callable[[DataConfig], Any]] = Registry(
    "data source",
    "data.name",
    {"builtin": "factory_train.data.source:read_builtin", "text": "factory_train.data.source:read_text"},
)
# (model, optim section) -> Optimizer
OPTIMIZERS: Registry[Callable[[Any, OptimConfig], Any]] = Registry(
    "optimizer",
    "optim.name",
    {
        "adamw": "factory_train.optim:AdamW",
        "adamw_fused": "factory_train.optim_adamw_fused:AdamWFused",
        "muon": "factory_train.optim_muon:Muon",
    },
)
# (part of the run after warm-up that is over, optim section) -> part of the peak learning rate
SCHEDULES: Registry[Callable[[float, OptimConfig], float]] = Registry(
    "schedule", "optim.schedule", {name: f"factory_train.schedule:{name}" for name in ("wsd", "cosine", "linear", "constant")}
)
# (logits_BTV, targets_BT) -> sum over the target tokens, a scalar tensor
LOSSES: Registry[Callable[[Any, Any], Any]] = Registry("loss", "train.loss", {"cross_entropy": "factory_train.loss:summed_cross_entropy"})

ALL: tuple[Registry[Any], ...] = (ARCHITECTURES, DATA_SOURCES, OPTIMIZERS, SCHEDULES, LOSSES)


def names_for(key: str) -> tuple[str, ...]:
    """Returns the names a key may hold; empty for a key that no registry is about."""
    return next((registry.names() for registry in ALL if registry.key == key), ())
