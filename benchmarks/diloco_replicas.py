"""Models of islands trained side by side in one process, with the real outer loop around each: what diloco_convergence.py runs.

Model, samples, inner AdamW and the whole outer loop, exchange included, are those of a run. Only that islands are threads of one
process, and that all models of a seed are trained in one vectorised pass, is not: a step of so small a model is
all overhead. Data-parallel is two replicas whose gradients are averaged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from factory_train.checkpoint.agreement import Ranks
from factory_train.compose import compose
from factory_train.config import Config
from factory_train.data.leases import Deal, LeasedCursor
from factory_train.data.loader import Cursor
from factory_train.data.prepare import prepare
from factory_train.data.rows import validation_rows
from factory_train.data.samples import training_samples
from factory_train.data.shards import TokenStream
from factory_train.diloco import OuterLoop
from factory_train.diloco_schedule import Schedule, assign_fragments, names_by_fragment
from factory_train.distributed.board import Beat
from factory_train.distributed.coordination import Rules
from factory_train.distributed.exchange import Exchange
from factory_train.distributed.gang import Copies
from factory_train.distributed.membership import Membership, Planner, Start
from factory_train.distributed.outer_state import OuterState
from factory_train.distributed.parallelize import parallelize
from factory_train.distributed.tcp_board import open_board
from factory_train.loss import summed_cross_entropy
from factory_train.models.build import build_model
from factory_train.optim import build_optimizer
from factory_train.schedule import learning_rate

H, ISLANDS = 20, ("island-0", "island-1")
SHORT = ("diloco.outer_lr=0.7", "diloco.outer_momentum=0.5")
WORDS = {
    "data-parallel": ("diloco=none",),
    "averaging": ("diloco=averaging",),
    "classic": ("diloco=classic",),
    "torchft classic": ("diloco=classic",),
    "streaming + overlap": ("diloco=streaming", "diloco.payload=fp32"),
    "... + int8": ("diloco=streaming", "diloco.payload=int8"),
    "... + int4": ("diloco=streaming", "diloco.payload=int4"),
    # The published outer momentum looks back ten rounds, which is a large part of a short run.
    "classic, momentum 0.5": ("diloco=classic", *SHORT),
    "streaming + int4, momentum 0.5": ("diloco=streaming", "diloco.payload=int4", *SHORT),
}
# Nothing is to be given up on a busy machine.
PATIENCE_S = 600
COMMON = (
    *("recipe=llama_diloco", "parallel=single", "tracking=none", f"diloco.sync_every={H}"),
    *("model.dim=32", "model.num_layers=4", "model.num_heads=2", "model.num_kv_heads=2", "model.ffn_dim=96", "data.vocab_size=512"),
    *("train.seq_len=32", "train.global_batch_tokens=256", "train.validation_rows=1024"),
)


def configuration(method: str, rate: float, seed: int, steps: int, overrides: Iterable[str]) -> Config:
    """Returns what a run of a method would be configured with."""
    words = (f"optim.lr={rate}", f"train.seed={seed}", f"train.steps={steps}", f"optim.warmup_steps={max(1, steps // 15)}")
    # A group's preset sets H too, so H comes after it.
    return compose([*WORDS[method], *COMMON, *words, *overrides])


class Replicas:
    """Models of one architecture and one beginning, trained side by side: row k of one matrix holds the parameters of model k.

    Args:
        cfgs: of each.
        embedding: by how much more the embedding of each learns.
    """

    def __init__(self, cfgs: list[Config], embedding: list[float]) -> None:
        self._cfgs = cfgs
        # By how much more than the optimizer did it is changed afterwards; None where all learn alike.
        self._more = torch.tensor(embedding)[:, None] - 1 if any(factor != 1 for factor in embedding) else None
        with torch.device("meta"):
            model = build_model(cfgs[0].model, cfgs[0].data.vocab_size)
        self._module = parallelize(model, None, cfgs[0], torch.device("cpu")).module  # type: ignore[arg-type]
        named = dict(self._module.named_parameters())
        # AdamW decays matrices only: they come first, so that a row is two tensors to it.
        self.shapes = {name: named[name].shape for name in sorted(named, key=lambda name: named[name].ndim < 2)}
        self._sizes = [shape.numel() for shape in self.shapes.values()]
        assert next(iter(self.shapes)) == "tok_embeddings.weight"
        self._decayed = sum(shape.numel() for shape in self.shapes.values() if len(shape) >= 2)
        beginning = torch.cat([named[name].detach().flatten() for name in self.shapes])
        self.matrix = beginning.repeat(len(cfgs), 1).requires_grad_()
        self._rows = [nn.ParameterList(self._halves(row)) for row in self.matrix.detach()]
        self._optimizers = [build_optimizer(row, cfg.optim) for row, cfg in zip(self._rows, cfgs, strict=True)]

    def _halves(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return row[: self._decayed].view(1, -1), row[self._decayed :]

    def views(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the parameters in a row, by name, in the model's order: blocks of codes depend on it."""
        found = {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, row.split(self._sizes), strict=True)}
        return {name: found[name] for name, _ in self._module.named_parameters()}

    def losses(self, matrix: torch.Tensor, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of each row's model, in nats a token.

        Args:
            matrix: (models, parameters).
            tokens, targets: (models, rows, seq_len), or (rows, seq_len) for all alike.
        """

        def loss(parts: tuple[torch.Tensor, ...], tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
            named = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
            return summed_cross_entropy(functional_call(self._module, named, (tokens_BT,)), targets_BT) / targets_BT.numel()

        of_data = 0 if tokens.ndim == 3 else None
        # The fused kernels of CPUs have no vectorised form.
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(loss, in_dims=(0, of_data, of_data))(matrix.split(self._sizes, dim=1), tokens, targets)

    def step(self, step: int, tokens: torch.Tensor, targets: torch.Tensor, averaged: list[slice]) -> None:
        """Makes step number `step` (from 0) of all models; those in a slice of `averaged` take the mean of their gradients."""
        self.losses(self.matrix, tokens, targets).sum().backward()
        grads, self.matrix.grad = self.matrix.grad, None
        assert grads is not None
        for some in averaged:
            grads[some] = grads[some].mean(dim=0)
        table = self.matrix.detach()[:, : self._sizes[0]]
        before = table.clone() if self._more is not None else table
        norms = grads.double().square().sum(dim=1).sqrt()
        for row, optimizer, cfg, grad, norm in zip(self._rows, self._optimizers, self._cfgs, grads, norms, strict=True):
            for parameter, part in zip(row, self._halves(grad), strict=True):
                parameter.grad = part
            optimizer.step(lr=learning_rate(step, cfg.train.steps, cfg.optim), grad_norm=norm, skip=torch.zeros(()))
        if self._more is not None:
            table += self._more * (table - before)


class Ours:
    """The outer loop of one island, as a run has it."""

    def __init__(self, folder: Path, island: str, parameters: dict[str, torch.Tensor], cfg: Config) -> None:
        of_islands, steps = cfg.diloco, cfg.train.steps
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        fragments = names_by_fragment(assign_fragments(sizes, of_islands.fragments, of_islands.pattern), sizes)
        self._state = OuterState(parameters, fragments, of_islands.payload, error_feedback=of_islands.error_feedback)
        self._schedule = Schedule(of_islands.fragments, of_islands.sync_every, of_islands.delay, steps)
        board, rules = open_board(folder, of_islands.rendezvous), Rules(ISLANDS, len(ISLANDS), PATIENCE_S, PATIENCE_S)
        opening = Deal.opening(of_islands.sync_every, ISLANDS).to_json()
        planner = Planner(lambda found: Start(0, opening, tuple(found)), lambda epoch, *_: dict(epoch.deal), steps)
        membership = Membership(board, rules, Beat(island, 1), planner, lambda kind, **facts: None)
        exchange = Exchange(island, 1, Ranks(0, 1), Copies(), board, membership, self._state, PATIENCE_S)
        self._loop = OuterLoop(
            of_islands, self._schedule, self._state, exchange, Copies(), lambda epoch: self._loop.restart_at(0), lambda kind, **facts: None
        )

    def begin(self) -> None:
        assert self._loop.begin() == 0

    def is_due(self, step: int) -> bool:
        moment = self._schedule.at(step)
        return bool(moment.apply or moment.send or moment.drain)

    def after_step(self, step: int) -> None:
        assert self._loop.after_step(step) == step
        assert len(self._loop.epoch.members) == len(ISLANDS), "an island was left out"

    def result(self) -> dict[str, torch.Tensor]:
        return self._state.named("outer")

    def close(self) -> None:
        self._loop.close()


class Torchft:
    """torchft's DiLoCo in its place; the first island has the lighthouse."""

    def __init__(self, folder: Path, island: str, parameters: dict[str, torch.Tensor], cfg: Config) -> None:
        from torchft.coordination import LighthouseServer

        self._folder, self._parameters, self._cfg, self._island = folder, parameters, cfg.diloco, island
        self._module = nn.ParameterList(parameters.values())
        # torchft hooks into an optimizer of torch's kind: this one updates nothing and tells it of the steps.
        self._steps = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)
        folder.mkdir(exist_ok=True)
        if island == ISLANDS[0]:
            self._lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=len(ISLANDS), heartbeat_timeout_ms=PATIENCE_S * 1000)
            port = self._lighthouse.address().rsplit(":", 1)[1]
            (folder / "lighthouse").write_text(f"http://127.0.0.1:{port}")

    def begin(self) -> None:
        from torchft import Manager, ProcessGroupGloo
        from torchft.local_sgd import DiLoCo

        patience = timedelta(seconds=PATIENCE_S)
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._manager = Manager(
            pg=ProcessGroupGloo(timeout=patience),
            load_state_dict=self._module.load_state_dict,
            state_dict=self._module.state_dict,
            min_replica_size=len(ISLANDS),
            use_async_quorum=False,
            init_sync=False,
            replica_id=self._island,
            lighthouse_addr=(self._folder / "lighthouse").read_text(),
            store_addr="127.0.0.1",
            store_port=self._store.port,
            rank=0,
            world_size=1,
            hostname="127.0.0.1",
            timeout=patience,
            quorum_timeout=patience,
            connect_timeout=patience,
        )
        outer = torch.optim.SGD(self._module.parameters(), lr=self._cfg.outer_lr, momentum=self._cfg.outer_momentum, nesterov=True)
        self._loop = DiLoCo(self._manager, [self._module], self._steps, outer, sync_every=self._cfg.sync_every, pin_memory=False)
        self._loop.__enter__()

    def is_due(self, step: int) -> bool:
        return True

    def after_step(self, step: int) -> None:
        self._steps.step()
        assert self._manager.current_step() == step // self._cfg.sync_every, "a synchronisation did not count"

    def result(self) -> dict[str, torch.Tensor]:
        # At the steps at which it is asked, inner and outer parameters are the same.
        return self._parameters

    def close(self) -> None:
        self._manager.shutdown(wait=False)


def simulate(
    seed: int, steps: int, runs: list[tuple[str, str, float]], cache: Path, overrides: list[str], embedding: list[float] | None = None
) -> dict[str, dict[str, float]]:
    """Trains all runs of a seed and returns their validation losses by step: of outer parameters, where there are such.

    Args:
        runs: (label, method, learning rate).
        cache: of prepared data.
        embedding: by how much more the embedding of each run learns; nothing for as much as the rest.
    """
    torch.set_num_threads(1)
    cfgs = [configuration(method, rate, seed, steps, overrides) for _, method, rate in runs]
    replicas = Replicas([cfg for cfg in cfgs for _ in ISLANDS], [factor for factor in embedding or [1.0] * len(runs) for _ in ISLANDS])
    batches, validation = _data(replace(cfgs[0], diloco=replace(cfgs[0].diloco, islands=0)), cache)
    alone = [method == "data-parallel" for _, method, _ in runs]
    places = [slice(2 * number, 2 * number + 2) for number in range(len(runs))]
    averaged = [place for place, single in zip(places, alone, strict=True) if single]
    curves: dict[str, dict[str, float]] = {label: {} for label, _, _ in runs}
    judge_every = max(1, steps // 5 // H) * H
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2 * len(runs)) as pool:
        loops: dict[int, Ours | Torchft] = {}
        for number, (_, method, _) in enumerate(runs):
            for index, island in enumerate(ISLANDS if method != "data-parallel" else ()):
                row = 2 * number + index
                kind = Torchft if method == "torchft classic" else Ours
                loops[row] = kind(Path(folder) / str(number), island, replicas.views(replicas.matrix.detach()[row]), cfgs[number])
        _together(pool, [loop.begin for loop in loops.values()])
        for step in range(1, steps + 1):
            of_ranks, of_islands = batches(step - 1)
            tokens, targets = (torch.cat([of_ranks[part] if single else of_islands[part] for single in alone]) for part in (0, 1))
            replicas.step(step - 1, tokens, targets, averaged)
            _together(pool, [partial(loop.after_step, step) for loop in loops.values() if loop.is_due(step)])
            if step % judge_every == 0 or step == steps:
                judged = replicas.matrix.detach()[::2].clone()
                for number in range(len(runs)):
                    if 2 * number in loops:
                        for name, view in replicas.views(judged[number]).items():
                            view.copy_(loops[2 * number].result()[name])
                with torch.no_grad():
                    chunks = [replicas.losses(judged, *chunk) for chunk in zip(*(part.split(64) for part in validation), strict=True)]
                for label, loss in zip(curves, torch.stack(chunks).mean(dim=0).tolist(), strict=True):
                    curves[label][str(step)] = loss
                shown = "  ".join(f"{label} {curve[str(step)]:.4f}" for label, curve in curves.items())
                print(f"seed {seed} step {step}: {shown}", flush=True)
        _together(pool, [loop.close for loop in loops.values()])
    return curves


def _together(pool: ThreadPoolExecutor, calls: list[Callable[[], None]]) -> None:
    """Makes calls that wait for each other."""
    for call in [pool.submit(call) for call in calls]:
        call.result()


def _data(cfg: Config, cache: Path) -> tuple[Callable[[int], tuple[Any, Any]], tuple[torch.Tensor, torch.Tensor]]:
    """Returns what gives a step's (tokens, targets) of both ranks, and of both islands: (2, rows, seq_len); and validation's."""
    dataset = prepare(cfg.data, cache, lambda message: None)
    rows = cfg.train.global_batch_tokens // cfg.train.seq_len
    samples = training_samples(cfg, cache, dataset, rows)
    deal = Deal.opening(cfg.diloco.sync_every, ISLANDS)

    def stacked(found: Iterable[Any], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [(row.tokens_T, row.targets_T) for row in found]
        tokens, targets = (torch.from_numpy(np.stack(parts).astype(np.int64)).view(*shape, -1) for parts in zip(*pairs, strict=True))
        return tokens, targets

    def batches(step: int) -> tuple[Any, Any]:
        numbers, _ = Cursor(step * rows).take(rows)
        dealt = [number for island in ISLANDS for number in LeasedCursor(deal, island, step).take(rows // 2)[0]]
        of_ranks, of_islands = (stacked(map(samples.row, some), (2, rows // 2)) for some in (numbers, dealt))
        return of_ranks, of_islands

    held_out = validation_rows(cfg, TokenStream(dataset, "validation"))
    return batches, stacked(map(held_out.row, range(cfg.train.validation_rows)), (cfg.train.validation_rows,))
