"""Hugging Face folders in and out: Llama, Qwen2 and Qwen3."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import pytest
import torch
import yaml
from conftest import REPOSITORY
from gang import run_gang, start_run

from factory_train import checks, cli
from factory_train.checkpoint.reader import open_checkpoint
from factory_train.config import Config, ModelConfig, from_mapping
from factory_train.data.catalog import cache_root, find_prepared
from factory_train.data.loader import TokenLoader
from factory_train.data.rows import ConcatenatedRows
from factory_train.data.samples import ShuffledRows
from factory_train.data.shards import TokenStream
from factory_train.distributed.box import Box
from factory_train.errors import ConfigError
from factory_train.model_size import count_parameters
from factory_train.models.build import build_model
from factory_train.models.hf import write_hf_folder
from factory_train.models.hf_config import hf_config, hf_name, model_config, weight_shapes
from factory_train.models.hf_folder import HfFolder
from factory_train.models.language_model import LanguageModel
from factory_train.run_dir import RunDir

transformers = pytest.importorskip("transformers", reason="pip install transformers")
safetensors = pytest.importorskip("safetensors.torch")

# The byte tokenizer's.
VOCAB = 257
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# Sizes that two ranks cannot share evenly; heads of Qwen3 are wider than its width has room for.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_theta": 500000.0, **SCALED}},
    "qwen2": {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}},
    "qwen3": {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "head_dim": 16},
}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def random_model(kind: str, *, tied: bool = True, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """Returns a model of transformers in which no bias is zero and no norm is one."""
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], "tie_word_embeddings": tied, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.ndim == 1 else 0.05, generator=generator)
    return model.to(dtype)


def save(folder: Path, model: Any, *, sharded: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size=20_000 if sharded else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return folder


def imported(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, ModelConfig]:
    source = HfFolder.open(folder)
    with torch.device("meta"):
        model = build_model(source.model, VOCAB)
    model.to(dtype).to_empty(device="cpu")
    model.init_buffers(torch.device("cpu"))
    parameters = dict(model.named_parameters())
    source.check_holds({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    source.fill([(name, Box.whole(tuple(parameter.shape)), parameter.data) for name, parameter in parameters.items()])
    return model, source.model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in safetensors.load_file(file).items()}


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    return path


@every_kind
@tied_or_not
@pytest.mark.parametrize("sharded", [False, True], ids=["one_file", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_and_out_again_is_bit_identical(kind: str, tied: bool, sharded: bool, dtype: str, tokenizer_json: Path, tmp_path: Path) -> None:
    theirs = random_model(kind, tied=tied, dtype=getattr(torch, dtype))
    folder = save(tmp_path / "theirs", theirs, sharded=sharded)
    model, cfg = imported(folder)
    out = tmp_path / "ours"
    shard_bytes = 20_000 if sharded else 10**9
    write_hf_folder(out, cfg, VOCAB, model.named_parameters(), tokenizer_json, eos_id=None, dtype=dtype, max_shard_bytes=shard_bytes)
    before, after = stored(folder), stored(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is type(theirs)
    told, expected = loaded.config.to_dict(), theirs.config.to_dict()
    assert {key: told[key] for key in (*SIZES, "tie_word_embeddings", "rope_parameters")} == {
        key: expected[key] for key in (*SIZES, "tie_word_embeddings", "rope_parameters")
    }
    assert model_config(hf_config(cfg, VOCAB, None, dtype), "config.json") == cfg


@every_kind
@tied_or_not
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=["fp32", "fp64"])
def test_logits_equal_those_of_transformers(kind: str, tied: bool, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    theirs = random_model(kind, tied=tied)
    model, _ = imported(save(tmp_path / "theirs", theirs), dtype)
    tokens = torch.randint(VOCAB, (2, 384), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = model(tokens), theirs.to(dtype)(tokens).logits
    assert logits.dtype == expected.dtype == dtype
    assert (logits - expected).abs().max() <= tolerance * expected.std()


@pytest.mark.parametrize(("kind", "part"), [("qwen2", "bias"), ("qwen3", "q_norm"), ("qwen3", "k_norm")])
def test_biases_and_head_norms_count(kind: str, part: str, tmp_path: Path) -> None:
    model, _ = imported(save(tmp_path / "theirs", random_model(kind)))
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        before = model(tokens)
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.mul_(1.5)
        assert not torch.allclose(before, model(tokens), atol=1e-3)


@every_kind
@tied_or_not
def test_shapes_are_known_without_building_the_model(kind: str, tied: bool) -> None:
    config = random_model(kind, tied=tied).config.to_dict() | {"architectures": [f"{kind.capitalize()}ForCausalLM"]}
    cfg = model_config(config, "config.json")
    with torch.device("meta"):
        built = build_model(cfg, VOCAB)
    assert weight_shapes(cfg, VOCAB) == {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert count_parameters(cfg, VOCAB).total == sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize(
    ("preset", "parameters", "architecture"),
    [("qwen2_5_0_5b", 494_032_768, "Qwen2ForCausalLM"), ("qwen3_0_6b", 596_049_920, "Qwen3ForCausalLM")],
)
def test_presets_have_the_published_sizes_and_architecture(preset: str, parameters: int, architecture: str) -> None:
    cfg = from_mapping(yaml.safe_load((REPOSITORY / f"configs/model/{preset}.yaml").read_text()), ModelConfig)
    assert count_parameters(cfg, cfg.vocab_size).total == parameters
    assert hf_config(cfg, cfg.vocab_size, None, "bfloat16")["architectures"] == [architecture]


def test_biases_start_at_zero() -> None:
    model = build_model(ModelConfig(qkv_bias=True), VOCAB)
    stds = {name: model.initial_std(name) for name, _ in model.named_parameters()}
    assert {std for name, std in stds.items() if name.endswith(".bias")} == {0.0}


def test_a_model_that_no_architecture_is_is_refused_before_training_and_at_export() -> None:
    cfg = ModelConfig(qkv_bias=True, qk_norm=True)
    with pytest.raises(ConfigError, match="could not be exported"):
        checks.check_config(Config(recipe="claim", model=cfg))
    with pytest.raises(ConfigError, match="no Hugging Face architecture"):
        hf_config(cfg, VOCAB, None, "float32")


def test_what_a_published_config_leaves_out_is_what_its_class_says() -> None:
    """The keys of the first Llama's config.json, and of Qwen3's as transformers 4 wrote it."""
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "max_position_embeddings")}
    llama = model_config({"architectures": ["LlamaForCausalLM"], **sizes}, "config.json")
    assert (llama.num_kv_heads, llama.head_dim, llama.rope_theta, llama.tie_embeddings) == (6, 6, 10000.0, False)
    old = {"rope_theta": 5e5, "rope_scaling": SCALED, "sliding_window": None, "use_sliding_window": False, "attention_bias": None}
    qwen3 = model_config({"architectures": ["Qwen3ForCausalLM"], **SIZES, **old}, "config.json")
    assert (qwen3.head_dim, qwen3.rope_theta, qwen3.rope_scaling and qwen3.rope_scaling.factor) == (128, 5e5, 8.0)


# Runs: a text, small rows, and overrides that name the model of a folder.


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(subprocess.__file__).read_text())
    return path


def run_config(folder: Path, text_file: Path, world: int) -> Config:
    """Returns a run of one step that changes nothing: what it saves is what it began with."""
    cfg = Config(recipe="claim", init_from=f"hf:{folder}", model=HfFolder.open(folder).model)
    cfg.data.name, cfg.data.path, cfg.data.tokenizer = "text", str(text_file), "byte"
    cfg.train.steps, cfg.train.seq_len, cfg.train.global_batch_tokens, cfg.train.micro_batch_size = 1, 32, 8 * 32, 4
    cfg.train.validate_every, cfg.train.validation_rows, cfg.train.num_threads = 0, 16, 1
    cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.warmup_steps = 1e-30, 0.0, 0
    cfg.parallel.strategy, cfg.launcher.tasks_per_node = "fsdp" if world > 1 else "single", world
    cfg.evaluation.sample_tokens = 0
    return cfg


@pytest.fixture(scope="module")
def runs(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, RunDir]]:
    """For every kind and world size: the folder and a run that began from it. Llama and Qwen3 are untied, Qwen2 is sharded."""
    root = tmp_path_factory.mktemp("runs")
    attempts = {}
    for kind in KINDS:
        folder = save(root / "models" / kind, random_model(kind, tied=kind == "qwen2"), sharded=kind == "qwen2")
        for world in (1, 2):
            attempts[kind, world] = folder, start_run(root, f"{kind}-{world}", run_config(folder, text_file, world))
    run_gang([(attempt, world) for (_, world), (_, attempt) in attempts.items()])
    return {key: (folder, attempt.run) for key, (folder, attempt) in attempts.items()}


@pytest.mark.cluster
@every_kind
@pytest.mark.parametrize("world", [1, 2])
def test_every_rank_fills_its_part_with_the_very_weights(runs: dict[tuple[str, int], tuple[Path, RunDir]], kind: str, world: int) -> None:
    folder, run = runs[kind, world]
    expected, reader = stored(folder), open_checkpoint(run, 1)
    names = reader.names("weights")
    assert sorted(map(hf_name, names)) == sorted(expected)
    assert all(torch.equal(reader.read("weights", name), expected[hf_name(name)]) for name in names)


@pytest.mark.cluster
@every_kind
@pytest.mark.parametrize("world", [1, 2])
def test_training_starts_at_the_loss_that_transformers_has(runs: dict[tuple[str, int], tuple[Path, RunDir]], kind: str, world: int) -> None:
    folder, run = runs[kind, world]
    attempt = run.last_attempt()
    assert attempt is not None
    cfg = attempt.config()
    dataset = find_prepared(cfg.data, cache_root(cfg, run.path.parent))
    assert dataset is not None
    rows = cfg.train.global_batch_tokens // cfg.train.seq_len
    stream = TokenStream(dataset, "train")
    samples = ShuffledRows(ConcatenatedRows(stream, cfg.train.seq_len), cfg.train.seed)
    with TokenLoader(samples, samples_per_step=rows, micro_batch_size=rows, dp_rank=0, dp_size=1) as loader:
        (batch,) = loader.next_step().micro_batches
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(batch.tokens_BT).logits
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), batch.targets_BT.flatten()).item()
    (row,) = [row for row in run.metrics() if row["kind"] == "train"]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.cluster
def test_two_ranks_train_biases_and_head_norms_as_one_does(text_file: Path, tmp_path: Path) -> None:
    attempts = {}
    for kind in ("qwen2", "qwen3"):
        folder = save(tmp_path / "models" / kind, random_model(kind))
        for world in (1, 2):
            cfg = run_config(folder, text_file, world)
            cfg.train.steps, cfg.optim.lr = 6, 1e-2
            attempts[kind, world] = start_run(tmp_path, f"{kind}-{world}", cfg)
    run_gang([(attempt, world) for (_, world), attempt in attempts.items()])
    for kind in ("qwen2", "qwen3"):
        one, two = ([row["loss"] for row in attempts[kind, world].run.metrics() if row["kind"] == "train"] for world in (1, 2))
        assert two == pytest.approx(one, rel=1e-5)
        assert one[-1] < one[0] - 0.1


SIZES_OF_SMALL = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model of `command.SMALL`."""
    return save(tmp_path_factory.mktemp("small") / "tiny-llama", random_model("llama", **SIZES_OF_SMALL))


@pytest.fixture
def place(small_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the model in `tiny-llama`, and a text."""
    shutil.copytree(small_folder, tmp_path / "tiny-llama")
    shutil.copy(text_file, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(*more: str) -> tuple[str, ...]:
    return (
        *("recipe=llama_fsdp", "data.path=text.txt", *command.SMALL, "model.vocab_size=257", "tracking=none", "train.validate_every=0"),
        *("launcher.tasks_per_node=1", "parallel=single", "train.steps=4", *more),
    )


@pytest.mark.cluster
def test_a_run_starts_from_a_folder_and_goes_on_when_that_has_gone(place: Path) -> None:
    command_line = words("run=child", "init_from=hf:tiny-llama", "checkpoint.every_steps=4")
    done = command.run(*command_line, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "init        weights of hf:tiny-llama" in done.stdout
    run = RunDir.open(place / "runs/llama_fsdp-child")
    assert run.info()["parent_run"] == "hf:tiny-llama"
    shutil.rmtree(place / "tiny-llama")
    done = command.run(*command_line, "train.steps=6", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resume      from step 4" in done.stdout
    done = command.run(*command_line, "train.steps=8", "init_from=hf:another", cwd=place)
    assert done.returncode == 2
    assert "has begun from hf:tiny-llama" in done.stderr


@pytest.mark.cluster
@pytest.mark.long
def test_a_model_that_has_grown_takes_what_fits(place: Path) -> None:
    done = command.run(*words("run=grown", "init_from=hf:tiny-llama", "model.num_layers=3", "init_strict=false"), cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights of hf:tiny-llama; 9 tensors keep their initial values: weights layers.2." in done.stdout


@every_kind
@tied_or_not
def test_one_line_of_overrides_makes_any_model_fit(place: Path, kind: str, tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    save(place / "model", random_model(kind, tied=tied))
    line = ["recipe=llama_fsdp", "data.path=text.txt", "data.tokenizer=byte", "tracking=none", "init_from=hf:model", "--dry-run"]
    assert cli.main(line) == 2
    message = capsys.readouterr().err
    (fix,) = [text.removeprefix("  fix: ") for text in message.splitlines() if text.startswith("  fix: ")]
    overrides, _, otherwise = fix.partition(", or ")
    assert otherwise == "init_strict=false to take what fits"
    assert cli.main([*line, *shlex.split(overrides)]) == 0
    assert not (place / "runs").exists()


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = safetensors.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def into_pickle(folder: Path) -> None:
    torch.save(safetensors.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def into_index(folder: Path) -> None:
    first = (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = list(safetensors.load_file(first))
    places = dict.fromkeys(names, first.name) | {names[0]: "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4])


EMBEDDING, PROJECTION = "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"
BAD: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "gone": (shutil.rmtree, 4, "no such folder"),
    "no_config": (lambda folder: (folder / "config.json").unlink(), 4, "no config.json"),
    "broken_config": (lambda folder: (folder / "config.json").write_text("{"), 2, "config.json: cannot be read"),
    "config_is_a_list": (lambda folder: (folder / "config.json").write_text("[]"), 2, "not a JSON object"),
    "config_without_a_size": (edit_config(hidden_size=None), 2, "hidden_size is missing"),
    "architecture": (
        edit_config(architectures=["MixtralForCausalLM"]),
        2,
        "MixtralForCausalLM; supported are LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
    ),
    "yarn": (edit_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), 2, "'yarn'"),
    "bias": (edit_config(attention_bias=True), 2, "attention_bias is true, and only false"),
    "quantised": (edit_config(quantization_config={"bits": 4}), 2, "quantised"),
    "sliding": (edit_config(layer_types=["sliding_attention", "full_attention"]), 2, "layers have sliding_attention"),
    "another_model": (edit_config(rms_norm_eps=1e-6, num_attention_heads=8, head_dim=4), 2, "model.num_heads=8 model.head_dim=4"),
    "pickle": (into_pickle, 2, "the weights are pickled (pytorch_model.bin)"),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), 4, "no weights"),
    "lost_shard": (into_index, 4, "1 of 2 weight files are missing: model-00002-of-00002.safetensors"),
    "cut_short": (cut, 6, "model.safetensors: not a whole safetensors file"),
    "lfs_pointer": (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), 6, "git lfs"),
    "missing_weight": (edit_weights(lambda tensors: tensors.pop(PROJECTION)), 2, f"not in the folder: {PROJECTION}"),
    "unexpected_weight": (edit_weights(lambda tensors: tensors.update(extra=torch.ones(2))), 2, "not in the model: extra"),
    "misshapen_weight": (
        edit_weights(lambda tensors: tensors.update({PROJECTION: torch.ones(3)})),
        2,
        f"{PROJECTION} is [3] in the folder",
    ),
    "integers": (edit_weights(lambda tensors: tensors.update({PROJECTION: torch.ones(16, 32, dtype=torch.int8)})), 2, "is of type I8"),
    "head_of_its_own": (
        edit_weights(lambda tensors: tensors.update({"lm_head.weight": torch.ones(VOCAB, 32)})),
        2,
        "differs from the embedding",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_before_anything_is_written(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, code, text = BAD[name]
    spoil(place / "tiny-llama")
    assert cli.main([*words("init_from=hf:tiny-llama")]) == code
    message = capsys.readouterr().err
    assert text in message
    assert f"init_from=hf:{place / 'tiny-llama'}" in message
    assert "\n  fix: " in message
    assert not (place / "runs").exists()


@pytest.mark.parametrize(("text", "what"), [("hf:", "no folder after 'hf:'"), ("hf:text.txt", "this is a file")])
def test_a_reference_to_no_folder_is_refused(place: Path, text: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words(f"init_from={text}")]) == 2
    message = capsys.readouterr().err
    assert what in message
    assert "\n  fix: " in message
    assert not (place / "runs").exists()


def test_what_older_writers_add_is_left_out(place: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(add)(place / "tiny-llama")
    assert cli.main([*words("init_from=hf:tiny-llama", "--dry-run")]) == 0


def test_checking_a_folder_loads_no_torch(small_folder: Path) -> None:
    program = f"""
import sys
from factory_train.checkpoint import origin
from factory_train.config import Config
from factory_train.models.hf_folder import HfFolder
found = origin.resolve("hf:{small_folder}", None)
found.check_fits(Config(recipe="claim", model=HfFolder.open(found.folder).model))
assert not {{"torch", "numpy", "safetensors", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], env=command.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
