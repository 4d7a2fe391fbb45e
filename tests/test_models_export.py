"""The Hugging Face folder: it loads, and says the same as the model it came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_models_llama import BASE, SCALING, filled

from factory_train.config import ModelConfig
from factory_train.data.tokenizer import END_OF_TEXT
from factory_train.errors import IntegrityError
from factory_train.models.generate import generate
from factory_train.models.hf import write_hf_folder
from factory_train.models.hf_config import hf_config
from factory_train.models.language_model import LanguageModel

VOCAB = 300
TEXT = "def rotate(self, angle):\n    return 'Grüße,\tworld  ' * 12  # naïve\n"
# Weights larger than initial ones, so that greedy decoding does not get stuck on one token.
VARIED = replace(BASE, num_kv_heads=2, max_seq_len=96, init_std=0.3)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT * 20], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def export(folder: Path, model: LanguageModel, cfg: ModelConfig, tokenizer_json: Path, **options: int) -> Path:
    write_hf_folder(folder, cfg, VOCAB, model.named_parameters(), tokenizer_json, eos_id=0, dtype="float32", **options)
    return folder


@pytest.mark.parametrize(
    "cfg",
    [
        VARIED,
        replace(VARIED, tie_embeddings=True),
        replace(VARIED, tie_embeddings=True, rope_scaling=replace(SCALING, original_max_seq_len=32)),
    ],
    ids=["untied", "tied", "tied_scaled_rope"],
)
def test_export_loads_and_generates_the_same_tokens(cfg: ModelConfig, tokenizer_json: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    model = filled(cfg)
    folder = export(tmp_path / "export", model, cfg, tokenizer_json)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    prompt = [17, 250, 3, 88]
    expected = loaded.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=48)[0].tolist()
    assert generate(model, prompt, 48, eos_id=0) == expected
    assert len(set(expected)) > 10, "a sample this uniform would prove little"


def test_exported_tokenizer_encodes_and_decodes_the_same(tokenizer_json: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    from tokenizers import Tokenizer

    folder = export(tmp_path / "export", filled(VARIED), VARIED, tokenizer_json)
    loaded, original = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(tokenizer_json))
    ids = loaded.encode(TEXT)
    assert ids == original.encode(TEXT).ids
    assert loaded.decode(ids) == TEXT
    assert (loaded.eos_token, loaded.eos_token_id, loaded.bos_token_id) == (END_OF_TEXT, 0, 0)
    assert loaded.model_max_length == VARIED.max_seq_len


def test_small_shards_hold_the_same_weights(tokenizer_json: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    limit = 200_000
    model = filled(VARIED)
    folder = export(tmp_path / "export", model, VARIED, tokenizer_json, max_shard_bytes=limit)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == files
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    assert all((folder / name).stat().st_size < limit + 4096 for name in files)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        torch.testing.assert_close(model(tokens), theirs, rtol=0, atol=1e-4 * theirs.std().item())


def test_both_generations_of_transformers_find_the_rope_settings() -> None:
    config = hf_config(replace(BASE, rope_theta=5e5, rope_scaling=SCALING), VOCAB, 0, "bfloat16")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    scaling = config["rope_scaling"]
    assert {**scaling, "rope_theta": 5e5} == config["rope_parameters"]
    assert scaling["original_max_position_embeddings"] == 64
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    plain = hf_config(BASE, VOCAB, None, "float32")
    assert plain["rope_scaling"] is None
    assert plain["rope_parameters"]["rope_type"] == "default"


def test_export_replaces_an_older_one_and_leaves_nothing_beside_it(tokenizer_json: Path, tmp_path: Path) -> None:
    small = replace(BASE, num_layers=1)
    folder = export(tmp_path / "export", filled(small), small, tokenizer_json, max_shard_bytes=100_000)
    (folder / "stale").touch()
    export(folder, filled(small, seed=2), small, tokenizer_json)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("fault", ["missing", "twice", "misshapen"])
def test_incomplete_weights_are_refused_and_the_older_export_stays(fault: str, tokenizer_json: Path, tmp_path: Path) -> None:
    small = replace(BASE, num_layers=1)
    folder = export(tmp_path / "export", filled(small), small, tokenizer_json)
    before = (folder / "model.safetensors").read_bytes()
    weights = list(filled(small, seed=2).named_parameters())
    name, tensor = weights[3]
    faulty = {"missing": weights[1:], "twice": [*weights, weights[0]], "misshapen": [*weights[:3], (name, tensor[1:]), *weights[4:]]}[fault]
    with pytest.raises(IntegrityError):
        write_hf_folder(folder, small, VOCAB, faulty, tokenizer_json, eos_id=0, dtype="float32")
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_generation_stops_at_the_end_token_and_slides_past_the_context() -> None:
    model = filled(VARIED)
    prompt = list(range(1, 9))
    free = generate(model, prompt, 120)
    assert free[:8] == prompt
    assert len(free) == 128 > VARIED.max_seq_len
    with torch.no_grad():
        assert free[-1] == int(model(torch.tensor([free[-1 - VARIED.max_seq_len : -1]]))[0, -1].argmax())
    eos = free[12]
    assert generate(model, prompt, 120, eos_id=eos) == free[: free.index(eos, 8) + 1]


def test_sampling_repeats_with_the_seed_and_varies_with_it() -> None:
    model = filled(VARIED)

    def sample(seed: int) -> list[int]:
        return generate(model, [5, 6], 30, temperature=2.0, generator=torch.Generator().manual_seed(seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
