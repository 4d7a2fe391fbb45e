"""How much memory a rank needs at its peak, from the configuration alone.

The estimate is of eager PyTorch. State is exact; activations are what autograd keeps for this model (checked against it
in the tests); the rest is from measurements of others, so that a quarter more or less is to be expected on large models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from factory_train.config import Config, ModelConfig, OptimConfig, TrainConfig
from factory_train.model_size import ParameterCount

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}
# CUDA context, NCCL and cuBLAS workspaces; on a CPU the interpreter with torch in it.
_RUNTIME_BYTES = {"cuda": 3 * 2**29, "cpu": 400 * 2**20}
# Bytes of one moment in memory: float32, bfloat16, 8 bits and a scale for 256 of them.
_MOMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / 256}
# What the CUDA caching allocator cannot use of what it holds.
_FRAGMENTATION = 0.05
# kernels.loss.CHUNK_BYTES, which torch comes with; a test holds them together.
_CHUNK_BYTES = {"cuda": 1 << 29, "cpu": 1 << 24}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a training step.

    Args:
        params: weights held between steps: masters, or the upper halves of split ones.
        grads: reduced gradients, of the weights' type.
        optimizer: moments, remainders of split weights, and what the optimizer keeps to work with.
        outer: outer parameters, their momentum, what codes left out, and a fragment gathered; 0 without islands.
        working_weights: copies for computing: FSDP's gathered units and their gradients, or autocast's casts.
        accumulated_grads: whole gradients that FSDP keeps between micro-batches it does not reduce.
        activations: what the layers keep for the backward pass.
        mask: which tokens see which, where documents are packed; one for all layers.
        logits: scores of the vocabulary, their log-softmax and gradient; computed in chunks, the gradients of the head too.
        snapshot: this rank's share of the state, copied for an asynchronous checkpoint; in host memory, so 0 on cards.
        runtime: libraries and processes, whatever the model.
        fragmentation: held by the allocator and not usable.
    """

    params: int
    grads: int
    optimizer: int
    outer: int
    working_weights: int
    accumulated_grads: int
    activations: int
    mask: int
    logits: int
    snapshot: int
    runtime: int
    fragmentation: int

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))

    @property
    def states(self) -> int:
        """What is there between steps too."""
        return self.params + self.grads + self.optimizer + self.outer


def moments_numel(optim: OptimConfig, count: ParameterCount) -> int:
    """Returns how many numbers of optimizer state a checkpoint holds: two a parameter, with Muon one for a matrix of a layer."""
    return 2 * count.total - (count.layer_matrices if optim.name == "muon" else 0)


def checkpoint_bytes(cfg: Config, count: ParameterCount) -> int:
    """Returns the bytes of a checkpoint: masters and moments in the type of masters, and 8-bit moments beside them as they are."""
    canonical = (count.total + moments_numel(cfg.optim, count)) * BYTES[cfg.precision.params]
    return canonical + (math.ceil(2 * count.total * _MOMENT_BYTES["int8"]) if cfg.optim.state == "int8" else 0)


def chunked_loss(train: TrainConfig, device: str) -> bool:
    """Returns whether the loss is computed without all logits."""
    return train.loss_impl == "chunked" or (train.loss_impl == "auto" and train.loss == "cross_entropy" and device == "cuda")


def layer_activation_bytes(model: ModelConfig, *, compute: str, autocast: bool, device: str, masked: bool = False) -> int:
    """Returns the bytes that one layer keeps for its backward pass, a token.

    With h the width, q that of queries, k that of keys and of values, f that of the feed-forward: the inputs of both norms
    (2h), their outputs (2h), queries and attention output (2q), keys and values (2k), gate, its activation, up and their
    product (4f). Norms of queries and keys keep what they read (q + k). With a mask CUDA's attention wants as many key and value
    heads as query heads (2q for 2k).
    """
    q_dim, kv_dim = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    size = BYTES[compute]
    wide = max(size, 4)
    # Under autocast the residual stream stays in fp32; norms on a CPU keep a float32 copy of their input.
    stream = wide if autocast or device == "cpu" else size
    attended = q_dim if masked and device == "cuda" else kv_dim
    kept = 2 * model.dim * stream + (2 * model.dim + 2 * q_dim + 2 * attended + 4 * model.ffn_dim) * size
    head_norms = q_dim + kv_dim if model.qk_norm else 0
    kept += head_norms * (wide if device == "cpu" else size)
    # Only the fused norm of CUDA does without the normalised value itself.
    return kept + ((2 * model.dim + head_norms) * wide if device == "cpu" else 0)


def estimate_memory(
    cfg: Config, count: ParameterCount, vocab_size: int, *, world_size: int, dp_shard: int, grad_accum_steps: int, device: str
) -> Memory:
    """Estimates the peak memory of one rank.

    Args:
        cfg: strategy, precision, batch and recomputation are read from it.
        count: parameters of the model.
        vocab_size: rows of the embedding.
        world_size: ranks in all.
        dp_shard: ranks that share one copy of the state (fsdp).
        grad_accum_steps: micro-batches of a step.
        device: "cuda" or "cpu".
    """
    split = cfg.optim.master == "split"
    # What the model's parameters and their gradients are.
    master = 2 if split else BYTES[cfg.precision.params]
    compute, reduce = BYTES[cfg.precision.compute], BYTES[cfg.precision.reduce]
    tokens = cfg.train.micro_batch_size * cfg.train.seq_len
    sharded = cfg.parallel.strategy == "fsdp"
    autocast = not sharded and compute != master
    own = -(-count.total // (dp_shard if sharded else 1))

    accumulated = working = 0
    if sharded:
        # The root stays gathered and collects gradients through the whole backward pass; of the layers there are the
        # one at work, the next one on its way, and the gradients of one being reduced.
        gathered = cfg.model.num_layers if not cfg.parallel.reshard_after_forward else min(2, cfg.model.num_layers)
        working = 2 * count.root * compute + count.layer * (gathered * compute + compute + reduce)
        accumulated = count.total * reduce if grad_accum_steps > 1 else 0
    elif autocast:
        working = count.total * compute

    masked = cfg.data.packing == "document"
    mask = tokens * cfg.train.seq_len * compute if masked else 0
    layer = layer_activation_bytes(cfg.model, compute=cfg.precision.compute, autocast=autocast, device=device, masked=masked)
    if cfg.parallel.activation_checkpoint == "full":
        entry = cfg.model.dim * (master if autocast else compute)
        activations = tokens * (cfg.model.num_layers * entry + layer)
    else:
        activations = tokens * cfg.model.num_layers * layer
    # In the backward pass: log-softmax, the gradient that reaches it, and the one that leaves it, all at least float32.
    logits = tokens * vocab_size * 3 * max(compute, 4)
    if chunked_loss(cfg.train, device):
        # Gradients of hidden states and head wait for the backward pass; the reference of CPUs has a copy of a chunk.
        chunk = min(_CHUNK_BYTES[device], tokens * vocab_size * compute)
        logits = chunk * (1 if device == "cuda" else 2) + tokens * cfg.model.dim * compute + count.embedding * max(compute, 4)
        if sharded:
            # They are gone when the layers, and an input embedding of its own, get their gradients, which are counted above.
            later = count.layer * (compute + reduce) + (0 if cfg.model.tie_embeddings else count.embedding * compute)
            logits = max(tokens * cfg.model.dim * compute, logits - later)

    outer = outer_checkpoint = 0
    if cfg.diloco.islands:
        narrow = cfg.diloco.error_feedback and cfg.diloco.payload not in ("none", "fp32")
        outer = own * BYTES[cfg.precision.params] * (2 + narrow) + own * BYTES[cfg.precision.params] // cfg.diloco.fragments
        # The island that saves for the run copies the outer state too.
        outer_checkpoint = count.total * BYTES[cfg.precision.params] * (2 + narrow)
    saved = checkpoint_bytes(cfg, count) + outer_checkpoint
    snapshot = saved // world_size if device == "cpu" and cfg.checkpoint.mode == "async" else 0
    shards = dp_shard if sharded else 1
    moment = _MOMENT_BYTES[cfg.optim.state] if cfg.optim.state != "fp32" else BYTES[cfg.precision.params]
    optimizer = math.ceil(-(-moments_numel(cfg.optim, count) // shards) * moment) + (own * 2 if split else 0)
    if cfg.optim.name == "muon":
        # One update of each matrix, in the type of the matmuls.
        optimizer += -(-count.layer_matrices // shards) * (2 if device == "cuda" and master == 4 else master)

    allocated = own * 2 * master + optimizer + outer + working + accumulated + activations + mask + logits
    return Memory(
        params=own * master,
        grads=own * master,
        optimizer=optimizer,
        outer=outer,
        working_weights=working,
        accumulated_grads=accumulated,
        activations=activations,
        mask=mask,
        logits=logits,
        snapshot=snapshot,
        runtime=_RUNTIME_BYTES[device],
        fragmentation=int(_FRAGMENTATION * allocated) if device == "cuda" else 0,
    )
