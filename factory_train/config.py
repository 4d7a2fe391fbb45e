"""The configuration schema: one dataclass a section, one line of help a key.

Hydra composes YAML values into these types on the login node; every later process reads the frozen result with
`load_config`, which needs neither Hydra nor OmegaConf. Checks that involve several keys live in `checks.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional, get_args, get_type_hints

import yaml

from factory_train.diloco_config import DilocoConfig
from factory_train.errors import ConfigError, did_you_mean
from factory_train.setting import setting


@dataclass
class RopeScaling:
    """Llama 3.1's frequency-dependent scaling of rotary embeddings to a longer context."""

    factor: float = setting(8.0, "how many times longer the context becomes")
    low_freq_factor: float = setting(1.0, "wavelengths above original_max_seq_len / this are scaled in full")
    high_freq_factor: float = setting(4.0, "wavelengths below original_max_seq_len / this are left alone")
    original_max_seq_len: int = setting(8192, "context length the base frequencies were trained for, in tokens")


@dataclass
class ModelConfig:
    """A Llama-family decoder."""

    name: str = setting("llama_tiny", "name of the preset, for people")
    architecture: str = setting("llama", "which model class to build")
    vocab_size: Optional[int] = setting(None, "rows of the embedding; null takes the tokenizer's vocabulary")
    dim: int = setting(128, "width of the residual stream")
    num_layers: int = setting(4, "number of decoder layers")
    num_heads: int = setting(4, "number of query heads")
    num_kv_heads: int = setting(4, "number of key and value heads; fewer than num_heads is grouped-query attention")
    head_dim: Optional[int] = setting(None, "width of a head; null is dim / num_heads")
    qkv_bias: bool = setting(False, "add a bias to queries, keys and values, as Qwen2 does")
    qk_norm: bool = setting(False, "normalise each head's queries and keys before they are rotated, as Qwen3 does")
    ffn_dim: int = setting(384, "width of the SwiGLU feed-forward layer")
    max_seq_len: int = setting(2048, "longest context the model is meant for, in tokens")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    rope_scaling: Optional[RopeScaling] = setting(None, "Llama 3.1 rotary scaling; null leaves frequencies alone")
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm")
    tie_embeddings: bool = setting(True, "use the input embedding as the output head too")
    init_std: float = setting(0.02, "standard deviation of the initial weights")

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.head_dim or self.dim // self.num_heads


@dataclass
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    name: str = setting("builtin", "builtin: this Python's standard library; text: what is at data.path")
    path: Optional[str] = setting(None, "a UTF-8 text file to train on, or a folder that prepare made")
    tokenizer: str = setting("bpe", "bpe is trained on the training split", choices=("bpe", "byte", "char"))
    vocab_size: int = setting(4096, "vocabulary of the trained BPE tokenizer, at most")
    validation_fraction: float = setting(0.05, "part of the text held out for validation")
    packing: str = setting(
        "concatenate",
        "document: rows of whole documents, which do not see each other; concatenate: the text as it is, cut into rows",
        choices=("concatenate", "document"),
    )
    sets: dict[str, str] = setting({}, "a mixture: folders that prepare made, by name: {web:FOLDER,code:FOLDER}")
    weights: dict[str, float] = setting({}, "part of the samples that comes from each of data.sets; by their tokens if left out")
    phases: list[dict[str, float]] = setting([], "weights that change: [{until_step:800,web:9,code:1},{web:1,code:1}]")
    cache_dir: Optional[str] = setting(None, "prepared data, shared by runs; null is <runs_root>/.data", safe=True)


@dataclass
class TrainConfig:
    """How long, how much at once, and in what order."""

    steps: int = setting(100, "number of optimizer steps of the whole run", safe=True)
    seq_len: int = setting(256, "length of a training row, in tokens")
    global_batch_tokens: int = setting(4096, "target tokens of one optimizer step over all ranks")
    micro_batch_size: int = setting(4, "rows a rank processes at once; accumulation follows from it", safe=True)
    loss: str = setting("cross_entropy", "what training minimises; validation is always the cross-entropy")
    loss_impl: str = setting(
        "auto", "chunked never holds all logits; auto does so on GPUs", choices=("auto", "plain", "chunked"), safe=True
    )
    z_loss: float = setting(0.0, "weight of the squared log-partition function, which keeps logits small; part of the logged loss")
    seed: int = setting(1234, "fixes initial weights and sample order")
    log_every: int = setting(10, "steps between progress lines", safe=True)
    validate_every: int = setting(100, "steps between validations; 0 validates at the end only", safe=True)
    validation_rows: int = setting(256, "rows of seq_len tokens used by one validation, at most")
    deterministic: bool = setting(False, "pin algorithms and thread counts: the same world size repeats bit for bit", safe=True)
    num_threads: Optional[int] = setting(None, "CPU threads of a rank; null shares the machine's cores", safe=True)
    gc_every_steps: int = setting(100, "steps between garbage collections, the same on all ranks; 0 leaves them to Python", safe=True)


@dataclass
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    name: str = setting("adamw", "which optimizer to build")
    lr: float = setting(3e-3, "peak learning rate")
    beta1: float = setting(0.9, "decay of the first moment")
    beta2: float = setting(0.95, "decay of the second moment")
    momentum: float = setting(0.95, "muon: decay of the average of gradients")
    ns_steps: int = setting(5, "muon: iterations that make an update orthogonal")
    eps: float = setting(1e-8, "added to the root of the second moment")
    weight_decay: float = setting(0.1, "decoupled decay of matrices; norms are not decayed")
    state: str = setting("fp32", "adamw_fused: how moments are kept", choices=("fp32", "bf16", "int8"), safe=True)
    master: str = setting("fp32", "adamw_fused: split is a bf16 weight and the rest of float32", choices=("fp32", "split"), safe=True)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; 0 turns clipping off")
    schedule: str = setting("wsd", "shape after warm-up")
    warmup_steps: int = setting(20, "steps of linear warm-up")
    decay_fraction: float = setting(0.3, "part of the run that wsd spends decaying")
    min_lr_ratio: float = setting(0.0, "final learning rate as a part of the peak")


@dataclass
class ParallelConfig:
    """How ranks share the model and the batch."""

    strategy: str = setting("fsdp", "how the model is replicated or sharded", choices=("single", "ddp", "fsdp"), safe=True)
    dp_replicate: int = setting(1, "copies of the sharded model (fsdp: more than 1 is HSDP)", safe=True)
    dp_shard: int = setting(-1, "ranks that share one copy; -1 is all that are left", safe=True)
    cp: int = setting(1, "context-parallel ranks; only 1 in this version", safe=True)
    tp: int = setting(1, "tensor-parallel ranks; only 1 in this version", safe=True)
    reshard_after_forward: bool = setting(True, "free gathered parameters between forward and backward", safe=True)
    activation_checkpoint: str = setting("none", "full recomputes each layer in the backward pass", choices=("none", "full"), safe=True)
    compile: bool = setting(False, "torch.compile each layer", safe=True)


@dataclass
class PrecisionConfig:
    """Number formats."""

    params: str = setting("float32", "master parameters and optimizer state", choices=("float32", "float64"))
    compute: str = setting("float32", "matmuls and activations", choices=("float32", "bfloat16", "float64"), safe=True)
    reduce: str = setting("float32", "gradient reduction", choices=("float32", "bfloat16", "float64"), safe=True)


@dataclass
class CheckpointConfig:
    """When to save and how much to keep."""

    every_steps: int = setting(100, "steps between checkpoints; the last step is always saved", safe=True)
    mode: str = setting(
        "async",
        "async copies the state and writes it in another process; sync trains on when all is on disk",
        choices=("async", "sync"),
        safe=True,
    )
    keep_last: int = setting(2, "newest checkpoints kept; older ones are removed after a newer one is complete", safe=True)
    keep_every_steps: int = setting(0, "checkpoints of every so many steps are kept for good; 0 keeps none for that", safe=True)
    keep_best: int = setting(0, "so many with the best best_metric are kept too", safe=True)
    best_metric: str = setting("validation/loss", "what keep_best compares; measured where a validation and a checkpoint meet", safe=True)
    best_is: str = setting("min", "which best_metric is the best", choices=("min", "max"), safe=True)


@dataclass
class ElasticConfig:
    """Going on with fewer nodes than a run was started with; Ray only."""

    min_nodes: Optional[int] = setting(None, "Ray: after a loss go on with as few nodes as this; null waits for all", safe=True)
    wait_s: float = setting(30.0, "Ray: seconds to wait for all of launcher.nodes before fewer are taken", safe=True)


@dataclass
class LauncherConfig:
    """Where the ranks run."""

    name: str = setting("auto", "auto chooses and says why", choices=("auto", "local", "allocation", "slurm", "ray"), safe=True)
    address: Optional[str] = setting(
        None, "Ray: dashboard of the cluster (http://HOST:8265), or local for one of our own; null is $RAY_ADDRESS", safe=True
    )
    elastic: ElasticConfig = setting(ElasticConfig, "elastic")
    nodes: int = setting(1, "number of machines; of each island, where there are islands", safe=True)
    tasks_per_node: Optional[int] = setting(None, "ranks a machine (and island); null is one a GPU, or 2 without GPUs", safe=True)
    sweep_parallel: int = setting(1, "runs of a sweep that go on at once", safe=True)
    grace_s: float = setting(120.0, "seconds the ranks have to save after a stop signal before they are ended", safe=True)
    hang_s: float = setting(120.0, "Slurm, Ray: a rank silent for so long, while another is not, has stopped; 0 never", safe=True)
    stall_s: float = setting(1800.0, "Slurm, Ray: training that makes no step for so long has stopped; 0 never", safe=True)
    fabric: str = setting("auto", "network settings of NCCL and gloo", choices=("auto", "ib", "roce", "efa", "tcp", "loopback"), safe=True)
    interface: Optional[str] = setting(None, "network interface ranks talk over (eth0); null leaves it to them", safe=True)
    account: Optional[str] = setting(None, "Slurm account that is charged", safe=True)
    partition: Optional[str] = setting(None, "Slurm partition; null is the site's default", safe=True)
    qos: Optional[str] = setting(None, "Slurm quality of service", safe=True)
    reservation: Optional[str] = setting(None, "Slurm reservation", safe=True)
    constraint: Optional[str] = setting(None, "node features, as in sbatch --constraint", safe=True)
    gpus_per_node: Optional[int] = setting(None, "GPUs of each node, as in sbatch --gpus-per-node", safe=True)
    gres: Optional[str] = setting(None, "generic resources of each node (gpu:a100:4), where a site wants them so", safe=True)
    cpus_per_task: Optional[int] = setting(None, "CPU cores of each rank", safe=True)
    memory: Optional[str] = setting(None, "memory of each node (64G; 0 is all of it), as in sbatch --mem", safe=True)
    resources: dict[str, float] = setting({}, "Ray: what else each node must give, by the cluster's own names: {fast_disk:1}", safe=True)
    time: Optional[str] = setting(None, "time limit (minutes, HH:MM:SS, D-HH:MM:SS); null is the partition's", safe=True)
    exclusive: bool = setting(False, "share nodes with no other job", safe=True)
    exclude: Optional[str] = setting(None, "nodes to stay away from (node[3-5])", safe=True)
    nodelist: Optional[str] = setting(None, "nodes the job must have", safe=True)
    comment: Optional[str] = setting(None, "comment of the job, which some sites bill by", safe=True)
    extra: list[str] = setting([], "more sbatch flags, each as NAME=VALUE or NAME without dashes", safe=True)
    srun_args: list[str] = setting([], "more arguments of srun", safe=True)
    setup: list[str] = setting([], "shell lines before anything runs (module load cuda)", safe=True)
    python: Optional[str] = setting(None, "Python on the nodes; null is the one that submits (in a container: python3)", safe=True)
    container: Optional[str] = setting(None, "image the stages run in", safe=True)
    container_runtime: str = setting("pyxis", "what runs the image", choices=("pyxis", "apptainer"), safe=True)
    container_mounts: list[str] = setting([], "folders the image sees (SOURCE:TARGET), beside runs, data and code", safe=True)
    preflight: bool = setting(
        False, "Slurm: look at every node before a rank starts (cards, disk, clock, a collective), leave bad ones out", safe=True
    )
    warn_s: int = setting(120, "seconds before the time limit at which Slurm warns the ranks", safe=True)
    requeue: str = setting(
        "requeue",
        "what goes on after a preemption or a lost node: the job again, one of the chain behind it (Slurm), or nothing",
        choices=("requeue", "chain", "never"),
        safe=True,
    )
    chain: int = setting(4, "jobs queued behind the first where requeue=chain", safe=True)
    then: list[str] = setting([], "jobs that follow when the run has ended well: evaluate, export", safe=True)
    island_jobs: str = setting(
        "one", "Slurm: islands are groups of nodes of one job, or each is a job of its own", choices=("one", "separate"), safe=True
    )
    islands_per_node: int = setting(1, "Slurm, island_jobs=one: islands that share a node, each with cards of its own", safe=True)


@dataclass
class TrackingConfig:
    """The MLflow side."""

    backend: str = setting("mlflow", "none leaves everything in the run directory", choices=("mlflow", "none"), safe=True)
    uri: Optional[str] = setting(None, "MLflow tracking URI; null is sqlite:///<runs_root>/mlflow.db", safe=True)
    experiment: str = setting("factory_train", "MLflow experiment", safe=True)
    registered_model: Optional[str] = setting(None, "registry name of the result; null is the recipe's name", safe=True)
    register: bool = setting(True, "register the exported model at the end", safe=True)
    sync_every_s: float = setting(5.0, "seconds between batches sent to MLflow", safe=True)


@dataclass
class EvaluationConfig:
    """What is measured and shown when training ends."""

    prompt: Optional[str] = setting(None, "start of the text sample; null takes the start of a validation document", safe=True)
    sample_tokens: int = setting(64, "tokens of the text sample", safe=True)
    temperature: float = setting(0.7, "of the text sample: 0 takes the most likely token each time", safe=True)
    export_dtype: str = setting("float32", "number format of exported weights", choices=("float32", "bfloat16"), safe=True)


@dataclass
class ProfileConfig:
    """What is recorded about the inside of a step (docs/diagnostics.md)."""

    steps: Optional[str] = setting(None, "steps to profile: 10:13 are steps 10, 11 and 12; null is none", safe=True)
    ranks: list[int] = setting([0], "ranks that profile", safe=True)
    shapes: bool = setting(False, "tell operators apart by the shapes of their inputs", safe=True)
    memory: bool = setting(False, "record what operators allocate; on CUDA also where, in a snapshot", safe=True)
    sync_check: bool = setting(True, "on CUDA: look once, early in training, for code that makes the host wait for the card", safe=True)

    def window(self) -> range | None:
        """Returns the steps to profile, counted from 1 as in metrics.jsonl; None for none.

        Raises:
            ValueError: `steps` is not of the form START:STOP.
        """
        if self.steps is None:
            return None
        start, _, stop = self.steps.partition(":")
        if not (start.isdecimal() and stop.isdecimal()):
            raise ValueError(f"'{self.steps}' is not START:STOP")
        return range(int(start), int(stop))


@dataclass
class HardwareConfig:
    """The device a rank runs on; null fields are read from the machine."""

    name: str = setting("auto", "auto reads this machine; a preset describes the machine the job will get", safe=True)
    device: str = setting("auto", "kind of device", choices=("auto", "cpu", "cuda"), safe=True)
    memory_bytes: Optional[int] = setting(None, "memory of one device (one machine for cpu), in bytes", safe=True)
    peak_flops: Optional[float] = setting(None, "dense bf16 peak of one device in FLOP/s; without it no MFU is printed", safe=True)


@dataclass
class Config:
    """Everything one run is made from."""

    recipe: str = setting("???", "name of the recipe in configs/recipe/")
    program: str = setting("pretrain", "module of recipes/ that runs it", choices=("pretrain",))
    plugins: list[str] = setting([], "packages imported in every process, for the names they register (docs/extending.md)")
    run: Optional[str] = setting(None, "names the run: the same command with the same run= continues it")
    sweep: Optional[str] = setting(None, "names a sweep (-m): the same command with the same sweep= continues it", safe=True)
    init_from: Optional[str] = setting(None, "start from other weights: those of RUN or RUN@STEP, or of the Hugging Face folder in hf:PATH")
    init_strict: bool = setting(True, "false takes the weights that fit and leaves the others at their initial values")
    runs_root: Optional[str] = setting(None, "folder of all runs; null is $FACTORY_TRAIN_RUNS, else ./runs", safe=True)
    wait: Optional[bool] = setting(None, "follow the run to its end; null does so unless a scheduler has the job", safe=True)
    model: ModelConfig = setting(ModelConfig, "model")
    data: DataConfig = setting(DataConfig, "data")
    train: TrainConfig = setting(TrainConfig, "train")
    optim: OptimConfig = setting(OptimConfig, "optim")
    parallel: ParallelConfig = setting(ParallelConfig, "parallel")
    diloco: DilocoConfig = setting(DilocoConfig, "diloco")
    precision: PrecisionConfig = setting(PrecisionConfig, "precision")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "checkpoint")
    launcher: LauncherConfig = setting(LauncherConfig, "launcher")
    tracking: TrackingConfig = setting(TrackingConfig, "tracking")
    evaluation: EvaluationConfig = setting(EvaluationConfig, "evaluation")
    profile: ProfileConfig = setting(ProfileConfig, "profile")
    hardware: HardwareConfig = setting(HardwareConfig, "hardware")


@dataclass(frozen=True)
class Key:
    """One leaf of the schema: `optim.lr`, its help, allowed words and whether a resumed run may change it."""

    name: str
    help: str
    choices: tuple[str, ...]
    safe: bool


def schema_keys(section: type = Config, prefix: str = "") -> Iterator[Key]:
    """Yields every leaf key of the schema, in order of declaration."""
    hints = get_type_hints(section)
    for item in fields(section):
        name = prefix + item.name
        inner = _dataclass_in(hints[item.name])
        if inner is not None:
            yield from schema_keys(inner, name + ".")
        else:
            yield Key(name, item.metadata["help"], item.metadata["choices"], item.metadata["safe"])


def _dataclass_in(hint: Any) -> type | None:
    """Returns the dataclass in `X` or `Optional[X]`, if there is one."""
    return next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part) and isinstance(part, type)), None)


def flatten(config: Config) -> dict[str, Any]:
    """Returns the configuration as one flat mapping of dotted keys to leaf values."""

    keys = {key.name for key in schema_keys()}

    def walk(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, inner in value.items():
            if isinstance(inner, Mapping) and prefix + name not in keys:
                yield from walk(inner, f"{prefix}{name}.")
            else:
                yield prefix + name, inner

    return dict(walk(dataclasses.asdict(config), ""))


def from_mapping(values: Mapping[str, Any], section: type = Config, prefix: str = "") -> Any:
    """Builds a section from plain nested values, as read from YAML.

    Raises:
        ConfigError: a key is not in the schema.
    """
    hints = get_type_hints(section)
    known = {item.name for item in fields(section)}
    for name in values:
        if name not in known:
            guess = did_you_mean(name, known)
            raise ConfigError(f"unknown key '{prefix}{name}'", fix=f"did you mean {prefix}{guess}?" if guess else None)
    built = {}
    for name, value in values.items():
        inner = _dataclass_in(hints[name])
        built[name] = from_mapping(value, inner, f"{prefix}{name}.") if inner and value is not None else value
    return section(**built)


def dump_config(config: Config) -> str:
    """Returns the configuration as YAML: the frozen form an attempt keeps."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def load_config(path: Path) -> Config:
    """Reads a configuration written by `dump_config`."""
    return from_mapping(yaml.safe_load(path.read_text()))


def unsafe_changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the keys a resumed run may not change and yet `new` does, with both values."""
    before, after = flatten(old), flatten(new)
    safe = {key.name for key in schema_keys() if key.safe} | {"recipe", "run"}
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if name not in safe and before.get(name) != after.get(name)
    }
