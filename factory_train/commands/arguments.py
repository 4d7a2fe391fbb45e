"""Flags of a verb, with mistakes reported as every other mistake."""

from __future__ import annotations

import argparse
from typing import NoReturn

from factory_train.errors import ConfigError, did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of printing its usage and ending the process."""

    def __init__(self, verb: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=f"python -m factory_train {verb}",
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where=self.prog.split()[-1], fix=f"{self.prog} -h")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Returns the arguments; flags may stand among `key=value` words.

        Raises:
            ConfigError: a flag the verb does not have, or a missing argument.
        """
        known = [option for action in self._actions for option in action.option_strings]
        for word in argv:
            flag = word.partition("=")[0]
            # A dash alone is stdin, and no flag has a space in it.
            is_flag = word.startswith("-") and word != "-" and " " not in flag
            if is_flag and flag not in known and not (flag[:2] in known and flag[1:2] != "-"):
                guess = did_you_mean(flag, known)
                raise ConfigError(f"unknown flag '{flag}'", fix=f"did you mean {guess}?" if guess else f"{self.prog} -h")
        return self.parse_intermixed_args(argv)
