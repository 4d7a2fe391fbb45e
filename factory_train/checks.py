"""Everything that can be wrong about a configuration, found on the login node before any process starts.

Pure functions of the configuration, the number of ranks and the size of the vocabulary. Each refusal is one line and
one override that would mend it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from factory_train.config import Config, flatten, schema_keys
from factory_train.diloco_checks import check_diloco
from factory_train.errors import ConfigError, did_you_mean
from factory_train.registries import ALL as REGISTRIES
from factory_train.schema import leaves

# Bytes 0-255 and the end-of-text token.
BYTE_VOCABULARY = 257

_POSITIVE = (
    "model.dim",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.ffn_dim",
    "model.max_seq_len",
    "model.rope_theta",
    "model.norm_eps",
    "model.init_std",
    "model.vocab_size",
    "model.rope_scaling.factor",
    "model.rope_scaling.low_freq_factor",
    "model.rope_scaling.high_freq_factor",
    "model.rope_scaling.original_max_seq_len",
    "train.steps",
    "train.seq_len",
    "train.global_batch_tokens",
    "train.micro_batch_size",
    "train.log_every",
    "train.validation_rows",
    "train.num_threads",
    "optim.lr",
    "optim.eps",
    "optim.ns_steps",
    "parallel.dp_replicate",
    "parallel.cp",
    "parallel.tp",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "launcher.nodes",
    "launcher.tasks_per_node",
    "launcher.islands_per_node",
    "launcher.sweep_parallel",
    "launcher.elastic.min_nodes",
    "tracking.sync_every_s",
    "hardware.memory_bytes",
    "hardware.peak_flops",
)
_NOT_NEGATIVE = (
    "checkpoint.keep_every_steps",
    "checkpoint.keep_best",
    "train.seed",
    "train.z_loss",
    "train.validate_every",
    "optim.weight_decay",
    "optim.max_grad_norm",
    "optim.warmup_steps",
    "launcher.grace_s",
    "launcher.hang_s",
    "launcher.stall_s",
    "launcher.elastic.wait_s",
    "train.gc_every_steps",
    "evaluation.sample_tokens",
    "evaluation.temperature",
)
# Traces of more steps than this take minutes to write and no viewer opens them.
MAX_PROFILED_STEPS = 50
# Key: (lowest, highest, whether the bounds themselves are refused at each end).
_RANGES = {
    "data.validation_fraction": (0.0, 0.5, True, False),
    "optim.beta1": (0.0, 1.0, False, True),
    "optim.beta2": (0.0, 1.0, False, True),
    "optim.momentum": (0.0, 1.0, False, True),
    "optim.decay_fraction": (0.0, 1.0, False, False),
    "optim.min_lr_ratio": (0.0, 1.0, False, False),
}


def check_config(config: Config) -> None:
    """Checks everything that needs no knowledge of the machine or the data.

    Raises:
        ConfigError: the first thing that cannot be right.
    """
    check_choices(config)
    _check_name(config)
    _check_numbers(config)
    _check_model(config)
    _check_data(config)
    _check_training(config)
    _check_checkpoint(config)
    _check_precision(config)
    _check_profile(config)
    check_diloco(config)


def check_choices(config: Config) -> None:
    """Checks that every key with a list of allowed words, or with a registry of names, holds one of them.

    Names of plugins count once these are imported.

    Raises:
        ConfigError: it does not.
    """
    values = flatten(config)
    for key in schema_keys():
        value = values.get(key.name)
        if key.choices and value is not None and value not in key.choices:
            guess = did_you_mean(str(value), key.choices)
            fix = f"did you mean {key.name}={guess}?" if guess else f"{key.name}={key.choices[0]}"
            raise ConfigError(f"'{value}' is not one of: {' '.join(key.choices)}", where=key.name, fix=fix)
    for registry in REGISTRIES:
        registry.check(values[registry.key])


def check_world(config: Config, world_size: int) -> None:
    """Checks that the mesh `dp_replicate x dp_shard x cp x tp` uses every rank once.

    Raises:
        ConfigError: it does not.
    """
    parallel = config.parallel
    if config.profile.steps is not None and (absent := [rank for rank in config.profile.ranks if not 0 <= rank < world_size]):
        raise ConfigError(f"there is no rank {absent[0]} among {world_size}", where="profile.ranks", fix="profile.ranks=[0]")
    for axis in ("cp", "tp"):
        if getattr(parallel, axis) > 1:
            raise ConfigError(
                f"{getattr(parallel, axis)} ranks, and this version has no {'context' if axis == 'cp' else 'tensor'} parallelism",
                where=f"parallel.{axis}",
                fix=f"parallel.{axis}=1",
            )
    if parallel.dp_shard != -1 and parallel.dp_shard < 1:
        raise ConfigError(f"{parallel.dp_shard} ranks", where="parallel.dp_shard", fix="parallel.dp_shard=-1 for all that are left")
    if parallel.strategy == "single":
        if world_size != 1:
            raise ConfigError(
                f"strategy single is one rank, and the launcher starts {world_size}",
                where="parallel.strategy",
                fix="launcher.nodes=1 launcher.tasks_per_node=1, or parallel=ddp",
            )
        _check_mesh_size(config, 1)
    elif parallel.strategy == "ddp":
        if parallel.dp_shard not in (1, -1):
            raise ConfigError(
                "ddp replicates the model and shards nothing", where="parallel.dp_shard", fix="parallel.dp_shard=1, or parallel=fsdp"
            )
        if parallel.dp_replicate not in (1, world_size):
            _refuse_mesh(config, world_size, parallel.dp_replicate)
    else:
        _check_mesh_size(config, world_size)


def _check_mesh_size(config: Config, world_size: int) -> None:
    replicate, shard = config.parallel.dp_replicate, config.parallel.dp_shard
    if shard != -1 and replicate * shard != world_size:
        _refuse_mesh(config, world_size, replicate * shard)
    if shard == -1 and world_size % replicate:
        raise ConfigError(
            f"{world_size} ranks do not divide into {replicate} copies",
            where="parallel.dp_replicate",
            fix=f"launcher.tasks_per_node={_nearest_multiple(world_size, replicate) // math.gcd(config.launcher.nodes, replicate)}"
            if config.launcher.nodes == 1
            else "parallel.dp_replicate=1",
        )


def _refuse_mesh(config: Config, world_size: int, mesh: int) -> None:
    nodes = config.launcher.nodes
    ranks_fit = mesh % nodes == 0
    raise ConfigError(
        f"the mesh has {mesh} ranks (dp_replicate {config.parallel.dp_replicate} x dp_shard {config.parallel.dp_shard} x cp 1 x tp 1), "
        f"the launcher starts {world_size} ({nodes} x {world_size // nodes})",
        where="parallel",
        fix="parallel.dp_replicate=1 parallel.dp_shard=-1" + (f", or launcher.tasks_per_node={mesh // nodes}" if ranks_fit else ""),
    )


def check_vocabulary(config: Config, tokenizer_size: int | None) -> None:
    """Checks that the model has an embedding row for every token.

    Args:
        tokenizer_size: vocabulary of the prepared tokenizer; None when it is not prepared yet.

    Raises:
        ConfigError: it has fewer.
    """
    rows = config.model.vocab_size
    if rows is None:
        return
    at_most, source = {
        "bpe": (config.data.vocab_size, f"data.vocab_size is {config.data.vocab_size}"),
        "byte": (BYTE_VOCABULARY, f"the byte tokenizer has {BYTE_VOCABULARY}"),
        "char": (None, ""),
    }[config.data.tokenizer]
    if tokenizer_size is not None:
        at_most, source = tokenizer_size, f"the prepared {config.data.tokenizer} tokenizer has {tokenizer_size}"
    if at_most is not None and rows < at_most:
        raise ConfigError(
            f"vocabulary mismatch: the model has {rows} tokens, {source}",
            where="model.vocab_size",
            fix="model.vocab_size=null takes the tokenizer's"
            + (f", or data.vocab_size={rows}" if config.data.tokenizer == "bpe" and rows > BYTE_VOCABULARY else ""),
        )


def _check_name(config: Config) -> None:
    for key, name in (("sweep", config.sweep), ("run", config.run)):
        if name is not None and not re.fullmatch(r"[^\W_][\w.-]*", name):
            raise ConfigError(f"'{name}' cannot name a folder", where=key, fix=f"{key}=NAME of letters, digits, '-', '_' and '.'")


def _check_numbers(config: Config) -> None:
    values = {key: value for key, value in flatten(config).items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    for key, value in values.items():
        if not math.isfinite(value):
            raise ConfigError(f"{value} is not a finite number", where=key, fix=f"give {key} a number")
    for key in _POSITIVE:
        if key in values and values[key] <= 0:
            default = leaves()[key].default
            raise ConfigError(f"{values[key]} must be above zero", where=key, fix=f"{key}={'null' if default is None else default}")
    for key in _NOT_NEGATIVE:
        if key in values and values[key] < 0:
            raise ConfigError(f"{values[key]} must not be negative", where=key, fix=f"{key}=0")
    for key, (low, high, low_open, high_open) in _RANGES.items():
        value = values[key]
        if not (low < value if low_open else low <= value) or not (value < high if high_open else value <= high):
            interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
            raise ConfigError(f"{value} is outside {interval}", where=key, fix=f"{key}={leaves()[key].default}")


def _check_model(config: Config) -> None:
    model = config.model
    if model.head_dim is None and model.dim % model.num_heads:
        raise ConfigError(
            f"width {model.dim} does not divide into {model.num_heads} heads",
            where="model.dim",
            fix=f"model.dim={_nearest_multiple(model.dim, 2 * model.num_heads)}",
        )
    if model.head_width % 2:
        key, near = ("dim", (model.dim, 2 * model.num_heads)) if model.head_dim is None else ("head_dim", (model.head_dim, 2))
        raise ConfigError(
            f"rotary embeddings need an even head width, this one is {model.head_width}",
            where=f"model.{key}",
            fix=f"model.{key}={_nearest_multiple(*near)}",
        )
    if model.architecture == "llama" and model.qkv_bias and model.qk_norm:
        # Every run ends with an export, and days of training should not end with its refusal.
        raise ConfigError(
            "the model could not be exported: no Hugging Face architecture has a bias of queries, keys and values, and norms of them too",
            where="model.qkv_bias",
            fix="model.qkv_bias=false as in Qwen3, or model.qk_norm=false as in Qwen2",
        )
    if model.num_heads % model.num_kv_heads:
        divisors = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        raise ConfigError(
            f"{model.num_heads} query heads do not share {model.num_kv_heads} key-value heads evenly",
            where="model.num_kv_heads",
            fix=f"model.num_kv_heads={min(divisors, key=lambda n: abs(n - model.num_kv_heads))}",
        )
    scaling = model.rope_scaling
    if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ConfigError(
            f"low_freq_factor {scaling.low_freq_factor} must be below high_freq_factor {scaling.high_freq_factor}",
            where="model.rope_scaling",
            fix="model.rope_scaling.low_freq_factor=1 model.rope_scaling.high_freq_factor=4",
        )


def _check_data(config: Config) -> None:
    data = config.data
    if data.name == "text" and data.path is None:
        raise ConfigError("data.name=text needs a file", where="data.path", fix="data.path=FILE, or data=builtin")
    if data.name == "builtin" and data.path is not None:
        raise ConfigError(
            f"data.name={data.name} reads no file, and data.path names one", where="data.path", fix="data=text, or data.path=null"
        )


def _check_training(config: Config) -> None:
    train, optim = config.train, config.optim
    if train.seq_len > config.model.max_seq_len:
        raise ConfigError(
            f"rows of {train.seq_len} tokens are longer than the model's context of {config.model.max_seq_len}",
            where="train.seq_len",
            fix=f"train.seq_len={config.model.max_seq_len}, or model.max_seq_len={train.seq_len}",
        )
    if train.global_batch_tokens % train.seq_len:
        nearest = " or ".join(f"train.global_batch_tokens={value}" for value in _neighbours(train.global_batch_tokens, train.seq_len))
        raise ConfigError(
            f"a global batch of {train.global_batch_tokens} tokens is not a multiple of train.seq_len={train.seq_len}",
            where="train.global_batch_tokens",
            fix=nearest,
        )
    if train.loss_impl == "chunked" and train.loss != "cross_entropy":
        raise ConfigError(
            f"only the cross-entropy is computed in chunks, and train.loss={train.loss}",
            where="train.loss_impl",
            fix="train.loss_impl=plain",
        )
    for key in ("state", "master"):
        if getattr(optim, key) != "fp32" and optim.name in ("adamw", "muon"):
            raise ConfigError(
                f"optim.name={optim.name} keeps float32 and nothing else",
                where=f"optim.{key}",
                fix=f"optim=adamw_fused, or optim.{key}=fp32",
            )
    if optim.warmup_steps >= train.steps and optim.warmup_steps > 0:
        raise ConfigError(
            f"{optim.warmup_steps} steps of warm-up do not end within {train.steps} steps",
            where="optim.warmup_steps",
            fix=f"optim.warmup_steps={train.steps // 10}",
        )


def _check_checkpoint(config: Config) -> None:
    every, keep_every = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
    if keep_every % every:
        nearest = " or ".join(f"checkpoint.keep_every_steps={value}" for value in _neighbours(keep_every, every))
        raise ConfigError(
            f"{keep_every} is not a multiple of checkpoint.every_steps={every}", where="checkpoint.keep_every_steps", fix=nearest
        )


def _check_precision(config: Config) -> None:
    precision = config.precision
    wide = {"params": precision.params, "compute": precision.compute, "reduce": precision.reduce}
    if "float64" in wide.values() and set(wide.values()) != {"float64"}:
        mixed = ", ".join(f"{name} {value}" for name, value in wide.items())
        raise ConfigError(f"float64 is for all of it or none ({mixed})", where="precision", fix="precision=fp64, or precision=fp32")

    if config.optim.name == "adamw_fused" and precision.params != "float32":
        raise ConfigError(
            f"optim.name=adamw_fused has a float32 master, and precision.params={precision.params}",
            where="optim.name",
            fix="optim=adamw, or precision=fp32",
        )
    if config.optim.master == "split" and precision.compute != "bfloat16":
        raise ConfigError(
            f"optim.master=split keeps bf16 weights in the model, and precision.compute={precision.compute}",
            where="optim.master",
            fix="precision=bf16, or optim.master=fp32",
        )


def _check_profile(config: Config) -> None:
    last, key = config.train.steps, "profile.steps"
    example = f"{key}=10:13" if last >= 12 else f"{key}=1:{min(last, 3) + 1}"
    try:
        window = config.profile.window()
    except ValueError as error:
        # YAML 1.1 reads 10:13 as a number in base 60.
        hint = f'{example}, in a YAML file with quotes: steps: "10:13"'
        raise ConfigError(str(error), where=key, fix=hint) from None
    if window is None:
        return
    if window.start < 1 or not window:
        raise ConfigError(f"{config.profile.steps} holds no step: the first is 1, and STOP is not in it", where=key, fix=example)
    if window[-1] > last:
        raise ConfigError(f"the run ends after step {last}", where=key, fix=f"{example}, or {key}=null")
    if len(window) > MAX_PROFILED_STEPS:
        raise ConfigError(
            f"{len(window)} steps make a trace too large to open, {MAX_PROFILED_STEPS} are the most",
            where=key,
            fix=f"{key}={window.start}:{window.start + 3}",
        )


def _neighbours(value: int, step: int) -> Iterator[int]:
    below = value // step * step
    if below:
        yield below
    yield below + step


def _nearest_multiple(value: int, step: int) -> int:
    return max(step, round(value / step) * step)
