"""Plugins: a person's own packages, imported so that they can register names, and what is said when one cannot be.

An error names the plugin's own line, not the place deep inside another package where it came to light.
"""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from factory_train.errors import ConfigError, FactoryTrainError

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def load(names: Iterable[str]) -> None:
    """Imports the modules of `plugins=[...]`; what they register is known from then on. Doing it again is harmless.

    Raises:
        ConfigError: a name is not one of a module, or its import fails.
    """
    for name in names:
        guess = name.removesuffix(".py").replace("/", ".")
        if name != guess or not _MODULE.fullmatch(name):
            fix = f"plugins=[{guess}]" if _MODULE.fullmatch(guess) else "plugins=[my_package], as in `import my_package`"
            raise ConfigError(f"'{name}' is not the name of a module", where="plugins", fix=fix)
        import_module(name)


def import_module(name: str) -> ModuleType:
    """Returns a module of a plugin.

    Raises:
        ConfigError: it is not there, or something in it fails; with the file and the line.
    """
    try:
        return importlib.import_module(name)
    except FactoryTrainError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            top = name.partition(".")[0]
            fix = f"start python -m factory_train in the folder that holds {top}, or add that folder to PYTHONPATH, or install it"
            raise ConfigError(f"no module named '{error.name}'", where=f"plugins: {name}", fix=fix) from error
        raise _failed(name, error) from error
    # A module that ends the process while it is imported would end ours without a word.
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error


def source_file(name: str) -> Path | None:
    """Returns the file of a plugin that was imported: `__init__.py` of a package; None where it has none."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return Path(file) if file else None


def _failed(name: str, error: BaseException) -> ConfigError:
    file, line = _place(name, error)
    message = (str(error.msg if isinstance(error, SyntaxError) else error).splitlines() or ["no message"])[0]
    what = f"cannot be imported: {type(error).__name__}: {message}"
    return ConfigError(what, where=f"plugins: {name}: {file}, line {line}", fix=f"mend that line, or leave {name} out of plugins=[...]")


def _place(name: str, error: BaseException) -> tuple[str, int]:
    """Returns file and line of an import error: the deepest that are the plugin's own, else the deepest of all."""
    if isinstance(error, SyntaxError) and error.filename:
        return error.filename, error.lineno or 1
    frames = [(frame.filename, frame.lineno or 1) for frame in traceback.extract_tb(error.__traceback__)]
    spec = find_spec(name.partition(".")[0])
    own = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec else []
    inside = [frame for frame in frames if any(root and Path(frame[0]).is_relative_to(root) for root in own)]
    return (inside or frames)[-1]
