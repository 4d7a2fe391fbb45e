"""Two islands behind a limited link: the part of the time that is training, and the bytes on the link, measured and predicted.

    sudo python benchmarks/diloco.py [--rates 10 100 1000] [--delay-ms 0] [--params N] [--step-s T] [--json FILE] [--plot FILE]

Each island is a process in a network namespace of its own; a pair of virtual interfaces joins them, and a token bucket limits each
(Linux, root). A delay is added by the processes, before each message, since the kernel's netem is often absent. An inner step is
a pause of T seconds that changes every parameter. Training: these pauses as a part of all the time. Not waiting: all the time
but that spent waiting for the link; where the machine is busy with other things, encoding makes a difference between the
two. Bytes are those of the interface, headers of TCP included.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from factory_train.checkpoint.agreement import Ranks
from factory_train.data.leases import Deal
from factory_train.diloco import OuterLoop
from factory_train.diloco_config import DilocoConfig
from factory_train.diloco_plan import plan_diloco
from factory_train.diloco_schedule import Schedule, assign_fragments, names_by_fragment
from factory_train.distributed import exchange as exchange_module
from factory_train.distributed.board import Beat, Epoch, FolderBoard
from factory_train.distributed.coordination import Rules
from factory_train.distributed.exchange import Exchange
from factory_train.distributed.gang import Copies
from factory_train.distributed.gloo_wire import GlooWire, Parts
from factory_train.distributed.membership import Membership, Planner, Start
from factory_train.distributed.outer_state import OuterState

ISLANDS = ("island-0", "island-1")
INTERFACES = ("ftlink0", "ftlink1")
# Jumbo frames: headers are then below 1 % of the bytes.
MTU = 9000
H, P = 20, 4
METHODS: dict[str, dict[str, Any]] = {
    "data-parallel": {},
    "classic": {"sync_every": H, "payload": "fp32"},
    "streaming": {"sync_every": H, "fragments": P, "payload": "fp32"},
    "+ overlap": {"sync_every": H, "fragments": P, "delay": 1, "payload": "fp32"},
    "+ int8": {"sync_every": H, "fragments": P, "delay": 1, "payload": "int8"},
    "+ int4": {"sync_every": H, "fragments": P, "delay": 1, "payload": "int4"},
}


class DelayedWire(GlooWire):
    """A wire on which every message is on its way for `delay_s`."""

    delay_s = 0.0

    def all_to_all(self, received: Sequence[Parts], sent: Sequence[Parts], meanwhile: Callable[[], object] = lambda: None) -> None:
        time.sleep(self.delay_s)
        super().all_to_all(received, sent, meanwhile)

    def all_gather(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        time.sleep(self.delay_s)
        super().all_gather(received, sent)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums over the islands, in two phases."""
        time.sleep(2 * self.delay_s)
        self._group.allreduce([tensor]).wait()


def parameters(total: int) -> dict[str, torch.Tensor]:
    """Four layers, each with a matrix and a vector of one per cent."""
    layer = total // P
    small = layer // 100
    return {f"layers.{index}.{part}": torch.zeros(size) for index in range(P) for part, size in (("w", layer - small), ("norm", small))}


def sent_bytes(interface: str) -> int:
    """Returns what the interface of this namespace has sent, in bytes."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith(interface + ":"))
    return int(line.split(":")[1].split()[8])


def work(order: dict[str, Any]) -> dict[str, float]:
    """Trains one island and returns utilisation and bytes a step."""
    torch.set_num_threads(1)
    torch.manual_seed(order["index"])
    values = parameters(order["params"])
    DelayedWire.delay_s = order["delay_s"]
    waits: list[float] = []
    step = (data_parallel if order["method"] == "data-parallel" else islands)(order, values, waits)
    step_s, steps = order["step_s"], order["steps"]
    began, sent = time.monotonic(), sent_bytes(INTERFACES[order["index"]])
    for number in range(1, steps + 1):
        time.sleep(step_s)
        for value in values.values():
            value.add_(torch.randn(1).item() * 1e-3)
        step(number)
    took_s = time.monotonic() - began
    busy = {"utilisation": steps * step_s / took_s, "not_waiting": 1 - sum(waits) / took_s}
    return {**busy, "bytes_per_step": (sent_bytes(INTERFACES[order["index"]]) - sent) / steps}


def data_parallel(order: dict[str, Any], values: dict[str, torch.Tensor], waits: list[float]) -> Any:
    store = dist.FileStore(str(Path(order["folder"]) / "data-parallel"), len(ISLANDS))
    wire = DelayedWire(store, order["index"], len(ISLANDS), datetime.timedelta(seconds=300))
    gradient = torch.zeros(order["params"])

    def step(number: int) -> None:
        began = time.monotonic()
        wire.all_reduce(gradient)
        waits.append(time.monotonic() - began)

    return step


def islands(order: dict[str, Any], values: dict[str, torch.Tensor], waits: list[float]) -> Any:
    exchange_module.GlooWire = DelayedWire  # type: ignore[misc]
    cfg = DilocoConfig(islands=2, silence_s=8.0, grace_s=300.0, **METHODS[order["method"]])
    # The last step synchronises everything once more; it is beyond what is measured.
    schedule = Schedule(cfg.fragments, cfg.sync_every, cfg.delay, order["steps"] + 1)
    sizes = {name: value.numel() for name, value in values.items()}
    state = OuterState(
        values,
        names_by_fragment(assign_fragments(sizes, P, "strided"), sizes) if cfg.fragments > 1 else [list(sizes)],
        cfg.payload,
        error_feedback=True,
    )
    board = FolderBoard(Path(order["folder"]))
    name = ISLANDS[order["index"]]

    def start(found: Any) -> Start:
        return Start(0, Deal.opening(cfg.sync_every, found).to_json(), tuple(found))

    def load(epoch: Epoch) -> None:
        outer.restart_at(0)

    planner = Planner(start, lambda epoch, *_: dict(epoch.deal), order["steps"] + 1)
    membership = Membership(board, Rules(ISLANDS, 2, cfg.silence_s, cfg.grace_s), Beat(name, 1), planner, lambda kind, **facts: None)
    exchange = Exchange(name, 1, Ranks(0, 1), Copies(), board, membership, state, cfg.grace_s)
    outer = OuterLoop(cfg, schedule, state, exchange, Copies(), load, lambda kind, **facts: waits.append(facts.get("waited_s", 0.0)))
    outer.begin()
    # The first call of an operator imports what torch needs for it, which takes seconds.
    state.encode(0)
    return outer.after_step


class Link:
    """Two network namespaces and the link between them."""

    def __enter__(self) -> Link:
        self._holders = [subprocess.Popen(["unshare", "-n", "sleep", "infinity"]) for _ in ISLANDS]
        time.sleep(0.5)
        _run("ip", "link", "add", INTERFACES[0], "type", "veth", "peer", "name", INTERFACES[1])
        for index, (holder, interface) in enumerate(zip(self._holders, INTERFACES, strict=True)):
            _run("ip", "link", "set", interface, "netns", str(holder.pid))
            self.inside(index, "ip", "addr", "add", f"10.77.0.{index + 1}/24", "dev", interface)
            self.inside(index, "ip", "link", "set", interface, "mtu", str(MTU), "up")
            self.inside(index, "ip", "link", "set", "lo", "up")
        return self

    def limit(self, mbit_per_s: float) -> None:
        """Limits both directions.

        The queue holds all that is sent at once: a packet lost at the end of a message costs TCP a second. The bucket holds a
        millisecond's bytes, or two packets: what it saves up while islands train is beyond the rate.
        """
        burst = max(2 * (MTU + 100), int(mbit_per_s * 1e6 / 8 / 1000))
        for index, interface in enumerate(INTERFACES):
            shape = ("rate", f"{mbit_per_s:g}mbit", "burst", f"{burst}b", "limit", "64mb")
            self.inside(index, "tc", "qdisc", "replace", "dev", interface, "root", "tbf", *shape)

    def command(self, index: int, *words: str) -> list[str]:
        return ["nsenter", "-t", str(self._holders[index].pid), "-n", *words]

    def inside(self, index: int, *words: str) -> None:
        _run(*self.command(index, *words))

    def __exit__(self, *exception: object) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}\nthis benchmark needs root, iproute2 and util-linux")


def measure(link: Link, method: str, options: argparse.Namespace, mbit: float, delay_s: float) -> dict[str, float]:
    """Runs both islands once."""
    seconds = 4 * options.params * 8 / (mbit * 1e6)
    # With a delay, until the last round has arrived too.
    steps = 2 * H + METHODS[method].get("delay", 0) if method != "data-parallel" else max(3, min(H, int(20 / seconds)))
    with tempfile.TemporaryDirectory() as folder:
        orders = [
            {
                "method": method,
                "index": index,
                "folder": folder,
                "params": options.params,
                "step_s": options.step_s,
                "steps": steps,
                "delay_s": delay_s,
            }
            for index in range(len(ISLANDS))
        ]
        processes = [
            subprocess.Popen(
                [
                    "env",
                    f"GLOO_SOCKET_IFNAME={INTERFACES[index]}",
                    *link.command(index, sys.executable, __file__, "--worker", json.dumps(order)),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for index, order in enumerate(orders)
        ]
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return json.loads(outputs[0].splitlines()[-1])


def predict(method: str, options: argparse.Namespace, mbit: float, delay_s: float) -> dict[str, float]:
    """What `plan` would say, with the delay of a round's three messages (two for a reduction) added to its time."""
    bytes_per_s = mbit * 1e6 / 8
    cfg = DilocoConfig(islands=2, **(METHODS[method] or {"sync_every": 1}))
    plan = plan_diloco(cfg, options.params, 4)
    assert plan is not None
    if method == "data-parallel":
        late = dataclasses.replace(plan, step_bytes=plan.step_bytes + 2 * delay_s * bytes_per_s)
        return {"utilisation": late.data_parallel_utilisation(options.step_s, bytes_per_s), "bytes_per_step": plan.step_bytes}
    late = dataclasses.replace(plan, round_bytes=plan.round_bytes + 3 * delay_s * bytes_per_s)
    per_step = plan.round_bytes / plan.steps_between_sends
    return {"utilisation": late.utilisation(options.step_s, bytes_per_s), "bytes_per_step": per_step}


def plot(rows: list[dict[str, Any]], options: argparse.Namespace, path: Path) -> None:
    """Draws utilisation over bandwidth: points measured, lines predicted. Lines that coincide are told apart by their dashes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    shown = [row for row in rows if row["delay_ms"] == 0]
    low, high = (choose(row["mbit_per_s"] for row in shown) for choose in (min, max))
    rates = [low * (high / low) ** (number / 200) for number in range(201)]
    for index, (method, marker) in enumerate(zip(METHODS, "os^vDx", strict=True)):
        mine = [row for row in shown if row["method"] == method]
        dashes = (0, (4, 0) if index % 2 == 0 else (4, 4))
        (line,) = axes.plot(
            rates, [predict(method, options, rate, 0.0)["utilisation"] for rate in rates], linestyle=dashes, zorder=2 + index % 2
        )
        style = {"marker": marker, "linestyle": "none", "color": line.get_color(), "markerfacecolor": "none", "label": method}
        axes.plot([row["mbit_per_s"] for row in mine], [row["measured"]["utilisation"] for row in mine], **style)
    model = f"{options.params / 1e6:g} M parameters, steps of {options.step_s:g} s, H = {H}, P = {P}"
    axes.set(xscale="log", xlabel="link, Mbit/s", ylabel="part of the time that is training", ylim=(0, 1.05))
    axes.set_title(f"Two islands, {model}: points measured, lines predicted", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rates", type=float, nargs="*", default=[10, 30, 100, 300, 1000], help="Mbit/s")
    parser.add_argument("--delay-ms", type=float, nargs="*", default=[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--params", type=int, default=1_000_000)
    parser.add_argument("--step-s", type=float, default=0.2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker)))
        sys.stdout.flush()
        # What the last step sends is not waited for.
        os._exit(0)
    rows = []
    print(f"{'':14s} {'Mbit/s':>7s} {'delay':>6s}  {'training':>8s} {'not waiting':>11s} {'predicted':>9s}  {'bytes':>12s} {'formula':>9s}")
    with Link() as link:
        for delay_ms in options.delay_ms:
            for mbit in options.rates:
                link.limit(mbit)
                for method in options.methods:
                    measured, predicted = (
                        run(*arguments, mbit, delay_ms / 1e3)
                        for run, arguments in ((measure, (link, method, options)), (predict, (method, options)))
                    )
                    rows.append({"method": method, "mbit_per_s": mbit, "delay_ms": delay_ms, "measured": measured, "predicted": predicted})
                    shares = (measured["utilisation"], measured["not_waiting"], predicted["utilisation"])
                    sizes = (measured["bytes_per_step"], predicted["bytes_per_step"])
                    texts = (*(f"{share:12.1%}" for share in shares), *(f"{size:12,.0f}" for size in sizes))
                    print(f"{method:14s} {mbit:7g} {delay_ms:4g}ms  {' '.join(texts)}", flush=True)
    if options.json:
        facts = {
            "torch": torch.__version__,
            "load": os.getloadavg()[0],
            "params": options.params,
            "step_s": options.step_s,
            "islands": 2,
            "H": H,
            "P": P,
            "rows": rows,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    if options.plot:
        plot(rows, options, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
