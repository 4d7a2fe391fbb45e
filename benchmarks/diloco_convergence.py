"""DiLoCo's variants at equal tokens on the built-in corpus: validation loss over seeds, each method at the learning rate best for it.

    PYTHONPATH=FOLDER_OF_TORCHFT python benchmarks/diloco_convergence.py [--steps N] [--seeds 1 2 3] [--json FILE] [--plot FILE] [key=value]

Two islands, H = 20; diloco_replicas.py says what is real and what is not. A method first chooses its inner learning rate with a
seed that does not count afterwards, in runs of half the length; variants of a method take its rate. torchft's DiLoCo
(`pip install torchft-nightly opentelemetry-exporter-otlp-proto-http`; left out where there is none) has the place of our outer
loop in "torchft classic", all else being equal. With --json seeds are kept as they come: the same command goes on with those
that are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from diloco_replicas import WORDS, H, simulate

# The inner learning rates among which a method chooses; the best is to be no end of its range.
RATES = {
    "data-parallel": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "averaging": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "classic": (1e-3, 2e-3, 4e-3, 8e-3),
    "streaming + overlap": (1e-3, 2e-3, 4e-3, 8e-3),
    "classic, momentum 0.5": (2e-3, 4e-3, 8e-3),
    "streaming + int4, momentum 0.5": (2e-3, 4e-3, 8e-3, 1.6e-2),
}
# Whose rate a variant takes.
SAME_RATE = {"torchft classic": "classic", "... + int8": "streaming + overlap", "... + int4": "streaming + overlap"}
TUNING_SEED = 99


class Comparison:
    """What was found so far.

    Args:
        facts: settings and results.
        path: where they are kept; None for nowhere.
    """

    def __init__(self, facts: dict[str, Any], path: Path | None) -> None:
        self.facts, self._path = facts, path

    def run(self, seeds: list[int], methods: list[str], cache: Path, jobs: int) -> None:
        """Searches for rates and then trains with each seed; what is there already is not run again."""
        steps, overrides = self.facts["steps"], self.facts["overrides"]
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            tuning: dict[Any, str] = {}
            for method in dict.fromkeys(SAME_RATE.get(method, method) for method in methods):
                tried = self.facts["tuning"].get(method, {})
                runs = [(f"{rate:g}", method, rate) for rate in RATES[method] if f"{rate:g}" not in tried]
                if runs:
                    tuning[pool.submit(simulate, TUNING_SEED, steps // 2, runs, cache, overrides)] = method
            for done in as_completed(tuning):
                found = {label: list(curve.values())[-1] for label, curve in done.result().items()}
                self._keep(self.facts["tuning"].setdefault(tuning[done], {}), found)
            training = {}
            for seed in seeds:
                missing = [method for method in methods if str(seed) not in self.facts["curves"].get(method, {})]
                if missing:
                    runs = [(method, method, self.rate(method)) for method in missing]
                    training[pool.submit(simulate, seed, steps, runs, cache, overrides)] = seed
            for done in as_completed(training):
                for method, curve in done.result().items():
                    self._keep(self.facts["curves"].setdefault(method, {}), {str(training[done]): curve})

    def rate(self, method: str) -> float:
        """Returns the learning rate of a method."""
        tried = self.facts["tuning"][SAME_RATE.get(method, method)]
        return float(min(tried, key=lambda rate: tried[rate]))

    def _keep(self, where: dict[str, Any], found: dict[str, Any]) -> None:
        where |= found
        if self._path:
            self._path.write_text(json.dumps(self.facts, indent=1) + "\n")

    def finals(self) -> dict[str, dict[str, float]]:
        """Returns the last losses by method and seed, in the order of the table."""
        curves = self.facts["curves"]
        return {name: {seed: list(curve.values())[-1] for seed, curve in curves[name].items()} for name in WORDS if name in curves}

    def gaps(self, method: str) -> list[float]:
        """Returns by how much a method is above data-parallel training of the same seed, in per cent of its loss."""
        finals = self.finals()
        base = finals["data-parallel"]
        return [100 * (loss / base[seed] - 1) for seed, loss in finals[method].items() if seed in base]

    def show(self) -> None:
        """Prints the table: means, spreads (largest - smallest) and gaps."""
        for method, tried in self.facts["tuning"].items():
            print(f"{method:30s} tried {'  '.join(f'{rate}: {loss:.4f}' for rate, loss in tried.items())}")
        print(f"\n{'':30s} {'rate':>6s} {'mean':>7s} {'spread':>7s} {'gap':>7s}  {'of single seeds':>18s}   {self.facts['steps']} steps")
        for method, losses in self.finals().items():
            mean, spread, gaps = statistics.fmean(losses.values()), max(losses.values()) - min(losses.values()), self.gaps(method)
            print(
                f"{method:30s} {self.rate(method):6g} {mean:7.4f} {spread:7.4f} {statistics.fmean(gaps):+6.2f}%  "
                f"{min(gaps):+7.2f} .. {max(gaps):+6.2f}%   {'  '.join(f'{loss:.4f}' for loss in losses.values())}"
            )

    def plot(self, path: Path) -> None:
        """Draws the mean validation loss over steps, and the gap of every seed at the end."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        methods = list(self.finals())
        for place, method in enumerate(methods):
            found = list(self.facts["curves"][method].values())
            means = {int(step): statistics.fmean(curve[step] for curve in found) for step in found[0]}
            (line,) = left.plot(list(means), list(means.values()), marker=".")
            gaps = self.gaps(method)
            right.plot(gaps, [place] * len(gaps), "o", color=line.get_color(), alpha=0.6)
            right.plot(statistics.fmean(gaps), place, "|", color=line.get_color(), markersize=22)
        left.set(xlabel="step", ylabel="validation loss, nats a token")
        right.set(xlabel="above data-parallel of the same seed, %", yticks=range(len(methods)))
        right.set_yticklabels([f"{method}, rate {self.rate(method):g}" for method in methods])
        right.invert_yaxis()
        right.axvline(0, color="grey", linewidth=0.8)
        figure.savefig(path)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500, help=f"a multiple of {H}: torchft does not synchronise once more at the end")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="*", choices=list(WORDS), default=list(WORDS), help="these and data-parallel")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--data", type=Path, help="folder of prepared data, kept from one call to the next")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rates-of", type=Path, help="take the rates that another comparison found")
    parser.add_argument("--plot", type=Path)
    options, overrides = parser.parse_known_args()
    assert options.steps % H == 0, f"--steps {options.steps} is no multiple of {H}"
    facts = {"steps": options.steps, "islands": 2, "H": H, "torch": torch.__version__, "overrides": overrides, "tuning": {}, "curves": {}}
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text())
        assert {**known, "tuning": {}, "curves": {}} == facts, f"{options.json} is of another comparison"
        facts = known
    if options.rates_of:
        facts["tuning"] |= json.loads(options.rates_of.read_text())["tuning"]
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "RUST_LOG": "warn"}
    has_torchft = importlib.util.find_spec("torchft") is not None
    wanted = {"data-parallel", *options.methods} - (set() if has_torchft else {"torchft classic"})
    methods = [method for method in WORDS if method in wanted]
    comparison = Comparison(facts, options.json)
    with tempfile.TemporaryDirectory() as folder:
        comparison.run(options.seeds, methods, options.data or Path(folder), options.jobs)
    comparison.show()
    if options.plot:
        comparison.plot(options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
