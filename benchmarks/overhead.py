"""What the trainer costs: its step against a bare PyTorch loop over the same model, data and optimizer.

    python benchmarks/overhead.py [steps per block] [blocks] [key=value ...]

Both live in one process and take turns in short blocks, so that the machine's drift hits both alike; the ratio of
their medians is the figure to quote. Needs neither Hydra nor MLflow.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from factory_train.config import Config
from factory_train.data.catalog import cache_root
from factory_train.data.manifest import DataManifest
from factory_train.data.prepare import copy_for_run, prepare
from factory_train.distributed.parallelize import initialize_parameters
from factory_train.distributed.process_group import choose_device, process_group
from factory_train.distributed.runtime import configure_runtime
from factory_train.hardware import detect
from factory_train.launchers.job import WorkerEnv
from factory_train.loss import summed_cross_entropy
from factory_train.models.build import build_model
from factory_train.plan import make_plan
from factory_train.preemption import StopSignal
from factory_train.run_dir import RunDir
from factory_train.trainer import Trainer


def configuration() -> Config:
    """Returns the small CPU model of the default recipe, in one process."""
    cfg = Config(recipe="overhead")
    cfg.parallel.strategy = "single"
    cfg.launcher.tasks_per_node = 1
    cfg.train.steps = 10**6
    cfg.train.seq_len, cfg.train.micro_batch_size, cfg.train.global_batch_tokens = 256, 8, 4096
    return cfg


def main() -> None:
    """Prints the median step time of both and their ratio."""
    steps, blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 5, int(sys.argv[2]) if len(sys.argv) > 2 else 20
    cfg = configuration()
    with tempfile.TemporaryDirectory() as root:
        run = RunDir.create(Path(root), "overhead", "bench")
        attempt = run.new_attempt(cfg)
        env = WorkerEnv(str(run.path), attempt.number)
        configure_runtime(cfg.train, 1)
        dataset = prepare(cfg.data, cache_root(cfg, Path(root)), lambda message: None)
        copy_for_run(dataset, run.data, max_validation_tokens=2048)
        manifest = DataManifest.load(run.data)
        plan = make_plan(cfg, manifest.vocab_size, detect(cfg.hardware), vocab_exact=True)
        device = choose_device("auto", 0)
        with process_group(env, attempt.path / "rendezvous.json", device):
            trainer = Trainer(cfg, plan, attempt, env, device, StopSignal(), dataset)
            ours, bare = compare(trainer, device, steps, blocks)
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    print(f"trainer {statistics.median(ours) * 1e3:8.2f} ms/step   bare loop {statistics.median(bare) * 1e3:8.2f} ms/step")
    print(f"ratio   {statistics.median(ours) / statistics.median(bare):.4f} of medians; pairwise median {statistics.median(ratios):.4f},")
    print(
        f"        min {min(ratios):.4f}, max {max(ratios):.4f} over {blocks} blocks of {steps} steps; torch {torch.__version__}, {device}"
    )


def compare(trainer: Trainer, device: torch.device, steps: int, blocks: int) -> tuple[list[float], list[float]]:
    """Times both loops in alternating blocks; returns seconds a step, block by block, for the trainer and the bare loop."""
    cfg = trainer.cfg
    vocab_size = trainer.manifest.vocab_size
    with torch.device("meta"):
        model = build_model(cfg.model, vocab_size)
    model.to_empty(device=device)
    model.init_buffers(device)
    initialize_parameters(model, cfg.train.seed, model.initial_std)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": cfg.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=cfg.optim.lr,
        betas=(cfg.optim.beta1, cfg.optim.beta2),
        eps=cfg.optim.eps,
        fused=True,
    )
    loaders = (trainer.open_loader(), trainer.open_loader())

    def bare_step() -> None:
        batch = loaders[1].next_step()
        for micro in batch.micro_batches:
            logits = model(micro.tokens_BT.to(device, non_blocking=True))
            (summed_cross_entropy(logits, micro.targets_BT.to(device, non_blocking=True)) / batch.num_targets).backward()
        clip_grad_norm_(model.parameters(), cfg.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def timed(step: object) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()  # type: ignore[operator]
        trainer.settle()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    def trainer_step() -> None:
        trainer.train_step(loaders[0])

    timed(trainer_step), timed(bare_step)
    ours, bare = [], []
    for block in range(blocks):
        # Who goes first changes, so that neither profits from the other's warm caches.
        order = ((trainer_step, ours), (bare_step, bare)) if block % 2 else ((bare_step, bare), (trainer_step, ours))
        for step, times in order:
            times.append(timed(step))
    for loader in loaders:
        loader.close()
    return ours, bare


if __name__ == "__main__":
    main()
