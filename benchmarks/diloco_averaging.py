"""Why averaging is behind data-parallel training in diloco_convergence.py: what is left with H = 1, with more tokens, with other rates.

    python benchmarks/diloco_averaging.py [--tokens 256 1024] [--every 1 5 20] [--steps N] [--seed N] [--json FILE] [key=value]

Each method may choose: its learning rate, and how much more the embedding learns. A row of the embedding has a gradient only where
its token was seen. AdamW takes a whole step then, however small the gradient: where one of M islands has seen it, averaging keeps
1/M of that step, and data-parallel training all of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from diloco_replicas import H, simulate

RATES, FACTORS = (4e-3, 5.7e-3, 8e-3), (1.0, 2.0, 4.0)


def best(losses: dict[str, float], factors: tuple[float, ...]) -> tuple[float, str]:
    """Returns the smallest loss with one of these factors of the embedding's rate, and where it was found ("RATE x FACTOR")."""
    return min((loss, label) for label, loss in losses.items() if float(label.split(" x ")[1]) in factors)


def train(method: str, tokens: int, every: int, options: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """Returns the last loss for each rate and factor."""
    grid = list(itertools.product(RATES, FACTORS))
    runs = [(f"{rate:g} x {factor:g}", method, rate) for rate, factor in grid]
    words = [f"diloco.sync_every={every}", f"train.global_batch_tokens={tokens}", *overrides]
    curves = simulate(options.seed, options.steps, runs, options.data, words, embedding=[factor for _, factor in grid])
    return {label: list(curve.values())[-1] for label, curve in curves.items()}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024], help="in a step, of both islands together")
    parser.add_argument("--every", type=int, nargs="*", default=[1, 5, H])
    parser.add_argument("--steps", type=int, default=760)
    parser.add_argument("--seed", type=int, default=99)
    parser.add_argument("--data", type=Path, help="folder of prepared data, kept from one call to the next")
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    facts = {"steps": options.steps, "seed": options.seed, "islands": 2, "torch": torch.__version__, "overrides": overrides, "losses": {}}
    with tempfile.TemporaryDirectory() as folder:
        options.data = options.data or Path(folder)
        for tokens in options.tokens:
            found = {"data-parallel": train("data-parallel", tokens, H, options, overrides)}
            found |= {f"averaging, H = {every}": train("averaging", tokens, every, options, overrides) for every in options.every}
            facts["losses"][str(tokens)] = found
            if options.json:
                options.json.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"\n{'tokens':>6s} {'':20s} {'best rate':>22s} {'gap':>7s} {'and best factor':>22s} {'gap':>7s}")
    for tokens, found in facts["losses"].items():
        for method, losses in found.items():
            cells = []
            for factors in (FACTORS[:1], FACTORS):
                (loss, label), (base, _) = best(losses, factors), best(found["data-parallel"], factors)
                cells.append(f"{loss:8.4f} {label:>13s} {100 * (loss / base - 1):+6.2f}%")
            print(f"{tokens:>6s} {method:20s} {cells[0]} {cells[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
