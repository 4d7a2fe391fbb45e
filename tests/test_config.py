"""The schema, and the checks that involve several of its keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from factory_train import checks
from factory_train.compose import compose
from factory_train.config import Config, dump_config, flatten, from_mapping, load_config, schema_keys, unsafe_changes
from factory_train.errors import ConfigError
from factory_train.schema import leaves, sections


def changed(config: Config, **values: Any) -> Config:
    """Returns `config` with `section__key=value` changed."""
    for name, value in values.items():
        section, _, key = name.partition("__")
        inner = dataclasses.replace(getattr(config, section), **{key: value}) if key else value
        config = dataclasses.replace(config, **{section: inner})
    return config


@pytest.fixture
def config() -> Config:
    return Config(recipe="llama_fsdp")


def test_every_key_has_help_and_a_default_of_its_type() -> None:
    for key in schema_keys():
        leaf = leaves()[key.name]
        assert key.help, key.name
        assert leaf.default is None if leaf.default is None else isinstance(leaf.default, leaf.type), key.name
        assert leaf.default is not None or leaf.optional, key.name
        assert not key.choices or leaf.default in key.choices, key.name


def test_keys_of_yaml_files_are_keys_of_the_schema() -> None:
    for path in (REPOSITORY / "configs").glob("*/*.yaml"):
        values = yaml.safe_load(path.read_text()) or {}
        values.pop("defaults", None)
        group = path.parent.name
        from_mapping({"recipe": "x", **values}) if group == "recipe" else from_mapping(values, sections()[group].type, f"{group}.")


def test_frozen_configuration_reads_back_the_same(tmp_path: Path, config: Config) -> None:
    config = changed(config, run="7e3", data__path="a: b # c.txt", optim__lr=1e-8, hardware__peak_flops=989.4e12)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


def test_checks_accept_the_schema_defaults_and_every_recipe(config: Config) -> None:
    checks.check_config(config)
    checks.check_world(config, 2)
    for recipe in ("llama_ddp", "llama_fsdp"):
        checks.check_config(compose([f"recipe={recipe}"]))


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ({"train__global_batch_tokens": 5000}, "not a multiple of train.seq_len=256", "=4864 or train.global_batch_tokens=5120"),
        ({"train__global_batch_tokens": 100}, "not a multiple", "train.global_batch_tokens=256"),
        ({"train__seq_len": 4096}, "longer than the model's context of 2048", "train.seq_len=2048"),
        ({"train__steps": 0}, "above zero", "train.steps=100"),
        ({"train__steps": 20}, "20 steps of warm-up", "optim.warmup_steps=2"),
        ({"train__validate_every": -1}, "negative", "train.validate_every=0"),
        ({"train__num_threads": 0}, "above zero", "train.num_threads=null"),
        ({"optim__lr": -1.0}, "above zero", "optim.lr=0.003"),
        ({"optim__lr": float("nan")}, "finite", "optim.lr"),
        ({"optim__beta2": 1.0}, "outside [0, 1)", "optim.beta2=0.95"),
        ({"data__validation_fraction": 0.9}, "outside (0, 0.5]", "data.validation_fraction=0.05"),
        ({"data__validation_fraction": 0.0}, "outside (0, 0.5]", "data.validation_fraction=0.05"),
        ({"data__name": "text"}, "needs a file", "data.path=FILE"),
        ({"data__path": "/x"}, "names one", "data=text"),
        ({"model__num_kv_heads": 3}, "evenly", "model.num_kv_heads=2"),
        ({"model__dim": 130}, "does not divide into 4 heads", "model.dim=128"),
        ({"model__dim": 132, "model__num_heads": 12}, "even head width", "model.dim=144"),
        ({"model__head_dim": 31}, "even head width", "model.head_dim=32"),
        ({"model__head_dim": 0}, "above zero", "model.head_dim=null"),
        ({"model__qkv_bias": True, "model__qk_norm": True}, "could not be exported", "model.qkv_bias=false"),
        ({"precision__compute": "float64"}, "all of it or none", "precision=fp64"),
        ({"parallel__strategy": "fdsp"}, "not one of: single ddp fsdp", "parallel.strategy=fsdp"),
        ({"run": "a/b"}, "cannot name a folder", "run=NAME"),
        ({"run": ".hidden"}, "cannot name a folder", "run=NAME"),
    ],
)
def test_what_cannot_be_right_is_refused_with_its_fix(config: Config, change: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checks.check_config(changed(config, **change))
    assert what in caught.value.what
    assert fix in (caught.value.fix or "")
    assert caught.value.where


@pytest.mark.parametrize(
    ("change", "world_size", "fix"),
    [
        ({"parallel__dp_shard": 3}, 2, "launcher.tasks_per_node=3"),
        ({"parallel__dp_replicate": 2, "parallel__dp_shard": 2}, 2, "launcher.tasks_per_node=4"),
        ({"parallel__dp_replicate": 2}, 3, "launcher.tasks_per_node=4"),
        ({"parallel__strategy": "single"}, 2, "parallel=ddp"),
        ({"parallel__strategy": "ddp", "parallel__dp_shard": 2}, 2, "parallel=fsdp"),
        ({"parallel__strategy": "ddp", "parallel__dp_replicate": 4}, 2, "launcher.tasks_per_node=4"),
        ({"parallel__cp": 2}, 2, "parallel.cp=1"),
        ({"parallel__tp": 2}, 2, "parallel.tp=1"),
        ({"parallel__dp_shard": 0}, 2, "parallel.dp_shard=-1"),
    ],
)
def test_a_mesh_that_does_not_use_every_rank_once_is_refused(config: Config, change: dict[str, Any], world_size: int, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checks.check_world(changed(config, **change), world_size)
    assert fix in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("change", "world_size"),
    [
        ({}, 1),
        ({"parallel__dp_replicate": 2}, 4),
        ({"parallel__dp_replicate": 2, "parallel__dp_shard": 2}, 4),
        ({"parallel__strategy": "ddp"}, 3),
        ({"parallel__strategy": "ddp", "parallel__dp_replicate": 3, "parallel__dp_shard": 1}, 3),
        ({"parallel__strategy": "single"}, 1),
    ],
)
def test_a_mesh_that_uses_every_rank_once_is_accepted(config: Config, change: dict[str, Any], world_size: int) -> None:
    checks.check_world(changed(config, **change), world_size)


@pytest.mark.parametrize(
    ("tokenizer", "prepared", "rows", "ok"),
    [
        ("bpe", None, 4096, True),
        ("bpe", None, 4095, False),
        ("bpe", 1000, 1000, True),
        ("bpe", 1000, 999, False),
        ("byte", None, 257, True),
        ("byte", None, 256, False),
        ("char", None, 5, True),
        ("char", 65, 64, False),
        ("char", 65, None, True),
    ],
)
def test_the_model_has_a_row_for_every_token(config: Config, tokenizer: str, prepared: int | None, rows: int | None, ok: bool) -> None:
    config = changed(config, data__tokenizer=tokenizer, model__vocab_size=rows)
    if ok:
        checks.check_vocabulary(config, prepared)
    else:
        with pytest.raises(ConfigError, match="vocabulary mismatch"):
            checks.check_vocabulary(config, prepared)


def test_only_keys_that_are_not_safe_count_as_unsafe_changes(config: Config) -> None:
    new = changed(config, optim__lr=1.0, train__steps=7, parallel__strategy="ddp", launcher__tasks_per_node=4, run="other")
    assert unsafe_changes(config, new) == {"optim.lr": (0.003, 1.0)}


def test_flatten_names_every_leaf_of_the_schema(config: Config) -> None:
    named = {key.name for key in schema_keys() if not key.name.startswith("model.rope_scaling.")}
    assert flatten(config).keys() - {"model.rope_scaling"} == named
