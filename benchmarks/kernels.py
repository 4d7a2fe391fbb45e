"""Kernels: ceilings of the card, correctness, and times against others in the same process, within ten minutes.

    python -m benchmarks.kernels [--sections adamw loss muon pseudogradient] [--budget SECONDS] [--json FILE]

Without a card only the correctness part runs, the Triton code in its interpreter. Rows are written as they come, so that a call that
is cut short keeps what it has. Rivals are taken if they are installed (`pip install liger-kernel flashoptim torchao bitsandbytes`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Parts of the time for measuring, by section.
SHARES = {"adamw": 0.45, "loss": 0.25, "muon": 0.15, "pseudogradient": 0.15}


class Record:
    """Rows of results, printed and kept in a file after each."""

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self._path, self._facts, self._rows = path, facts, list[dict[str, Any]]()

    def note(self, **facts: Any) -> None:
        """Adds facts about the whole."""
        self._facts |= facts
        print(json.dumps(facts), flush=True)
        self._keep()

    def add(self, section: str, part: str, row: dict[str, Any]) -> None:
        """Adds a row of a section."""
        self._rows.append({"section": section, "part": part, **row})
        print(json.dumps(self._rows[-1]), flush=True)
        self._keep()

    def wrong(self) -> list[dict[str, Any]]:
        """Returns the rows of correctness that do not hold."""
        return [row for row in self._rows if not row.get("ok", True)]

    def _keep(self) -> None:
        if self._path is not None:
            self._path.write_text(json.dumps(self._facts | {"rows": self._rows}, indent=1) + "\n")


def main() -> int:
    """Runs the sections; exits 1 if something is not correct."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began = time.monotonic()
    on_card = torch.cuda.is_available()
    device = "cuda" if on_card else "cpu"
    if not on_card:
        # Triton decides when it is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from benchmarks.kernel_sections import timing

    name = torch.cuda.get_device_name() if on_card else "cpu, Triton's interpreter"
    record = Record(options.json, {"format_version": 1, "device": name, "torch": torch.__version__})
    copy_gb_per_s = 0.0
    if on_card:
        copy_gb_per_s = timing.copy_gb_per_s(device)
        record.note(copy_gb_per_s=copy_gb_per_s, matmul_tflops_per_s=timing.matmul_tflops_per_s(device))
        torch.cuda.empty_cache()
    sections = {section: importlib.import_module(f"benchmarks.kernel_sections.{section}") for section in options.sections}
    incorrect = set()
    for section, module in sections.items():
        try:
            for row in module.correctness(device):
                record.add(section, "correctness", row)
                if not row["ok"]:
                    incorrect.add(section)
        except Exception as error:
            incorrect.add(section)
            record.add(section, "correctness", {"ok": False, "error": f"{type(error).__name__}: {error}"})
        if on_card:
            torch.cuda.empty_cache()
    if not on_card:
        print("timing needs a GPU")
        return 1 if incorrect else 0
    left = sum(SHARES[section] for section in sections)
    for section, module in sections.items():
        share, left = SHARES[section] / left, left - SHARES[section]
        if section in incorrect:
            # The time of a wrong result is of no interest.
            record.add(section, "times", {"error": "not timed: not correct"})
            continue
        try:
            for row in module.times(device, max(10.0, (options.budget - (time.monotonic() - began)) * share)):
                if "gb_per_s" in row:
                    row["part_of_copy"] = row["gb_per_s"] / copy_gb_per_s
                record.add(section, "times", row)
        except Exception as error:
            record.add(section, "times", {"error": f"{type(error).__name__}: {error}"})
        torch.cuda.empty_cache()
    record.note(seconds=time.monotonic() - began)
    return 1 if incorrect else 0


if __name__ == "__main__":
    sys.exit(main())
