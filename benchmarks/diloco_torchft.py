"""Our outer loop beside torchft's DiLoCo: the same parameters, gradients and schedule on two islands of this machine.

    sudo PYTHONPATH=FOLDER_OF_TORCHFT python benchmarks/diloco_torchft.py [--params N] [--syncs N] [--rounds N] [--json FILE]

torchft comes from `pip install torchft-nightly`. Each side runs in a network namespace of its own, where all traffic is on the
loopback interface and counted there. Classic DiLoCo, H = 5, float32; ours with int4 too, which torchft has not. Inner
steps are SGD on |w - target|^2 / 2 with a target a step and island, so both sides must end with the same outer parameters.
Blocked is what a step with a synchronisation takes longer than the median step without; CPU is the same in seconds of all the
island's threads, which other programs on the machine hardly change. Sides take turns, `--rounds` times, and medians are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from factory_train.checkpoint.agreement import Ranks
from factory_train.data.leases import Deal
from factory_train.diloco import OuterLoop
from factory_train.diloco_config import DilocoConfig
from factory_train.diloco_schedule import Schedule
from factory_train.distributed.board import Beat, FolderBoard
from factory_train.distributed.coordination import Rules
from factory_train.distributed.exchange import Exchange
from factory_train.distributed.gang import Copies
from factory_train.distributed.membership import Membership, Planner, Start
from factory_train.distributed.outer_state import OuterState
from factory_train.kernels.pseudogradient import reduce

ISLANDS = ("island-0", "island-1")
H, LR, OUTER_LR, MOMENTUM = 5, 0.1, 0.7, 0.9


def make_model(params: int) -> nn.Module:
    """Eight matrices of the same size."""
    width = max(1, int((params / 8) ** 0.5))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(8)))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def set_gradients(model: nn.Module, targets: list[torch.Tensor], step: int, index: int) -> None:
    for parameter, target in zip(model.parameters(), targets, strict=True):
        parameter.grad = parameter.detach() - target * (1 + 0.1 * step + index)


def with_torchft(order: dict[str, Any], model: nn.Module) -> tuple[Callable[[int], None], Callable[[], list[torch.Tensor]]]:
    """Returns the inner step, and the outer parameters in the end."""
    from torchft import Manager, ProcessGroupGloo
    from torchft.local_sgd import DiLoCo

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + order["index"]), "RANK": "0", "WORLD_SIZE": "1"}
    store = torch.distributed.TCPStore("127.0.0.1", 29600 + order["index"], is_master=True, wait_for_workers=False)
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    outer = torch.optim.SGD(model.parameters(), lr=OUTER_LR, momentum=MOMENTUM, nesterov=True)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=60)),
        load_state_dict=model.load_state_dict,
        state_dict=model.state_dict,
        min_replica_size=2,
        use_async_quorum=False,
        init_sync=False,
        replica_id=ISLANDS[order["index"]],
        lighthouse_addr="http://127.0.0.1:29510",
        store_addr="127.0.0.1",
        store_port=29600 + order["index"],
        rank=0,
        world_size=1,
    )
    loop = DiLoCo(manager, [model], inner, outer, sync_every=H, pin_memory=False)
    loop.__enter__()
    order["keep"] = (store, loop, manager)
    return lambda step: inner.step(), lambda: [parameter.detach() for parameter in model.parameters()]


def with_ours(order: dict[str, Any], model: nn.Module) -> tuple[Callable[[int], None], Callable[[], list[torch.Tensor]]]:
    """The same with this project's outer loop."""
    cfg = DilocoConfig(islands=2, sync_every=H, payload=order["payload"], outer_lr=OUTER_LR, outer_momentum=MOMENTUM)
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    parameters = dict(model.named_parameters())
    state = OuterState(parameters, [list(parameters)], cfg.payload, error_feedback=True)
    board, name = FolderBoard(Path(order["folder"])), ISLANDS[order["index"]]
    steps = order["steps"] + 1
    planner = Planner(lambda found: Start(0, Deal.opening(H, found).to_json(), tuple(found)), lambda epoch, *_: dict(epoch.deal), steps)
    membership = Membership(board, Rules(ISLANDS, 2), Beat(name, 1), planner, lambda kind, **facts: None)
    exchange = Exchange(name, 1, Ranks(0, 1), Copies(), board, membership, state, cfg.grace_s)
    outer = OuterLoop(
        cfg, Schedule(1, H, 0, steps), state, exchange, Copies(), lambda epoch: outer.restart_at(0), lambda kind, **facts: None
    )
    outer.begin()

    def step(number: int) -> None:
        inner.step()
        outer.after_step(number)

    return step, lambda: [state.named("outer")[name] for name in parameters]


def warm_up(side: str) -> None:
    """Loads what a side imports when it is first used: code is no memory of a parameter."""
    if side == "torchft":
        import torchft.local_sgd  # noqa: F401

        return
    state = OuterState({"w": torch.zeros(1)}, [["w"]], "int4", error_feedback=True)
    encoded = state.encode(0)
    state.apply(0, encoded.codes, encoded.scales, lr=1.0, momentum=0.0, keep=0.0)
    reduce(encoded.codes[None], encoded.scales[None], torch.ones(1), *state.room(0), "int4")


def work(order: dict[str, Any]) -> dict[str, Any]:
    """One island: trains, and returns its figures."""
    torch.set_num_threads(1)
    model = make_model(order["params"])
    targets = [torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) for parameter in model.parameters()]
    warm_up(order["side"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step, outer = (with_torchft if order["side"] == "torchft" else with_ours)(order, model)
    times, cpu_times = [], []
    for number in range(1, order["steps"] + 1):
        set_gradients(model, targets, number, order["index"])
        began, cpu_began = time.monotonic(), time.process_time()
        step(number)
        times.append(time.monotonic() - began)
        cpu_times.append(time.process_time() - cpu_began)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    torch.save(outer(), Path(order["folder"]) / f"{ISLANDS[order['index']]}.pt")
    return {"blocked_s": extra(times), "cpu_s": extra(cpu_times), "memory_bytes": used}


def extra(times: list[float]) -> float:
    """Returns what a step with a synchronisation takes longer than one without; the first one makes connections."""
    plain = statistics.median(took for number, took in enumerate(times, 1) if number % H)
    return statistics.median(took - plain for number, took in enumerate(times, 1) if number % H == 0 and number > H)


def compare(side: str, payload: str, options: argparse.Namespace) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Runs both islands of one side."""
    with tempfile.TemporaryDirectory() as folder:
        orders = [
            {"side": side, "payload": payload, "index": index, "folder": folder, "params": options.params, "steps": H * options.syncs}
            for index in range(2)
        ]
        done = subprocess.run(["unshare", "-n", sys.executable, __file__, "--pair", json.dumps(orders)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        outer = torch.load(Path(folder) / f"{ISLANDS[0]}.pt")
        other = torch.load(Path(folder) / f"{ISLANDS[1]}.pt")
        figures = json.loads(done.stdout.splitlines()[-1])
    figures["identical"] = all(torch.equal(a, b) for a, b in zip(outer, other, strict=True))
    return figures, outer


def pair(orders: list[dict[str, Any]]) -> None:
    """Inside of the namespace: two islands, and what the loopback interface carried."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    lighthouse = None
    if orders[0]["side"] == "torchft":
        from torchft.coordination import LighthouseServer

        lighthouse = LighthouseServer(bind="127.0.0.1:29510", min_replicas=2, join_timeout_ms=1000)
    environ = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([sys.executable, __file__, "--worker", json.dumps(order)], env=environ, stdout=subprocess.PIPE, text=True)
        for order in orders
    ]
    found = [json.loads(worker.communicate(timeout=300)[0].splitlines()[-1]) for worker in workers]
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    syncs = orders[0]["steps"] / H
    wire = int(line.split(":")[1].split()[8]) / len(orders) / syncs / orders[0]["params"]
    print(json.dumps({**{key: max(item[key] for item in found) for key in found[0]}, "wire_bytes_per_param": wire}))
    del lighthouse


def main() -> int:
    """Prints the table; exits 1 where both sides end with different outer parameters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pair", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--params", type=int, default=2_000_000)
    parser.add_argument("--syncs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker)), flush=True)
        os._exit(0)
    if options.pair:
        pair(options.pair)
        sys.stdout.flush()
        os._exit(0)
    rounds: dict[str, list[dict[str, float]]] = {}
    outers = {}
    for _ in range(options.rounds):
        for name, side, payload in (("torchft fp32", "torchft", "fp32"), ("ours fp32", "ours", "fp32"), ("ours int4", "ours", "int4")):
            found, outers[name] = compare(side, payload, options)
            rounds.setdefault(name, []).append(found)
    rows = {name: {key: statistics.median(found[key] for found in founds) for key in founds[0]} for name, founds in rounds.items()}
    print(f"{'':16s} {'blocked a sync':>24s} {'CPU a sync':>13s} {'wire bytes/param':>17s} {'more memory/param':>18s}  islands identical")
    for name, row in rows.items():
        blocked = [found["blocked_s"] * 1e3 for found in rounds[name]]
        print(
            f"{name:16s} {row['blocked_s'] * 1e3:7.0f} ({min(blocked):5.0f}-{max(blocked):5.0f}) ms {row['cpu_s'] * 1e3:10.0f} ms "
            f"{row['wire_bytes_per_param']:17.2f} {row['memory_bytes'] / options.params:18.1f}  "
            f"{all(found['identical'] for found in rounds[name])}",
            flush=True,
        )
    gap = max((a - b).abs().max().item() for a, b in zip(outers["torchft fp32"], outers["ours fp32"], strict=True))
    scale = max(tensor.abs().max().item() for tensor in outers["ours fp32"])
    print(f"largest difference of outer parameters: {gap:.2g} of {scale:.3g}")
    if options.json:
        facts = {
            "params": options.params,
            "syncs": options.syncs,
            "H": H,
            "torch": torch.__version__,
            "rows": rows,
            "rounds": rounds,
            "load": os.getloadavg()[0],
            "gap": gap,
            "scale": scale,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if gap <= 1e-5 * scale else 1


if __name__ == "__main__":
    sys.exit(main())
