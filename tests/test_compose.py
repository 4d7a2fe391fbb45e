"""Hydra's grammar over the schema: what composes, and how mistakes are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from factory_train.compose import apply_overrides, compose, compose_run, differences, groups
from factory_train.config import RopeScaling, dump_config, flatten, load_config
from factory_train.errors import ConfigError
from factory_train.overrides import sweep_points

RECIPE = "recipe=llama_fsdp"


def value(word: str) -> Any:
    """Composes with one more word and returns the value of the key it names."""
    return flatten(compose([RECIPE, word]))[word.lstrip("+").partition("=")[0]]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=1", 1.0),
        ("++optim.lr=0.5", 0.5),
        ("optim.lr=${optim.eps}", 1e-8),
        ("train.steps=1e4", 10_000),
        ("train.steps=1_000", 1000),
        ("train.deterministic=true", True),
        ("train.deterministic=No", False),
        ("train.num_threads=null", None),
        ("run=7e3", "7e3"),
        ("run=007", "007"),
        ("run=true", "true"),
        ("run=null", None),
        ("run='null'", "null"),
        ("tracking.experiment='a, b=c'", "a, b=c"),
        ('tracking.experiment="it is"', "it is"),
        ("tracking.uri=http://user:pw@host:5000/x?y=(1)", "http://user:pw@host:5000/x?y=(1)"),
        ("evaluation.prompt=def main():", "def main():"),
    ],
)
def test_a_value_gets_the_type_of_its_key(word: str, expected: Any) -> None:
    found = value(word)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("word", "what", "fix"),
    [
        (
            "recipe=lama_fsdp",
            "recipe 'lama_fsdp' not found. Did you mean llama_fsdp? available: llama_ddp llama_diloco llama_fsdp",
            "recipe=llama_fsdp",
        ),
        ("model=llama_tiney", "Did you mean llama_tiny?", "model=llama_tiny"),
        ("train.stepz=3", "unknown key 'train.stepz'", "did you mean train.steps=3?"),
        ("lr=1e-3", "unknown key 'lr'", "did you mean optim.lr=1e-3?"),
        ("+optim.foo=3", "unknown key 'optim.foo'", "keys of optim: name lr"),
        ("optim={lrr: 3}", "unknown key 'optim.lrr'", "did you mean optim.lr=3?"),
        ("train.steps=many", "'many' is not a whole number", "train.steps=100"),
        ("train.steps=3.5", "'3.5' is not a whole number", "train.steps=100"),
        ("train.steps=true", "'true' is not a whole number", "train.steps=100"),
        ("train.steps=null", "'null' is not a whole number", "train.steps=100"),
        ("train.steps=", "'' is not a whole number", "train.steps=100"),
        ("optim.lr=fast", "'fast' is not a number", "optim.lr=0.003"),
        ("optim.lr=[1]", "'[1]' is not a number", "optim.lr=0.003"),
        ("train.deterministic=maybe", "'maybe' is not true or false", "train.deterministic=false"),
        ("parallel.strategy=fdsp", "'fdsp' is not one of: single ddp fsdp", "did you mean parallel.strategy=fsdp?"),
        ("optim.lr=1e-3,3e-3", "several values", "--multirun"),
        ("recipe=llama_ddp,llama_fsdp", "several values", "--multirun"),
        ("+optim.lr=3", "'optim.lr' is there already", "optim.lr=3"),
        ("~optim.lr", "removes a key", "key=value"),
        ("optim@x=adamw", "another package", "optim=adamw"),
        ("train=3", "'train' is a section", "train.steps=..."),
        ("stuff", "neither key=value nor a flag", "key=value"),
        ("optim.lr={a", "cannot read the value", "quote it"),
        ("optim.lr=${nope}", "Interpolation key 'nope' not found", "--help"),
        ("hydra.foo=3", "Key 'foo' not in 'HydraConf'", "--help"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(word: str, what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([RECIPE, word])
    assert what in caught.value.what
    assert fix in (caught.value.fix or "")
    assert "\n" not in caught.value.what


def test_without_a_recipe_the_recipes_are_listed() -> None:
    with pytest.raises(ConfigError, match="available: llama_ddp llama_diloco llama_fsdp"):
        compose(["train.steps=3"])


def test_groups_and_keys_both_work_and_later_words_win() -> None:
    config = compose([RECIPE, "parallel.reshard_after_forward=false", "parallel=ddp", "optim.lr=1", "optim.lr=2", "recipe=llama_ddp"])
    assert config.recipe == "llama_ddp"
    assert (config.parallel.strategy, config.parallel.reshard_after_forward, config.optim.lr) == ("ddp", False, 2.0)


@pytest.mark.parametrize("word", ["model.rope_scaling.factor=4", "model.rope_scaling={factor: 4}"])
def test_a_key_of_an_absent_section_brings_it_into_being(word: str) -> None:
    assert compose([RECIPE, word]).model.rope_scaling == RopeScaling(factor=4.0)
    assert compose([RECIPE, "model=llama3_1b", "model.rope_scaling=null"]).model.rope_scaling is None


@pytest.mark.parametrize("group", sorted(set(groups()) - {"recipe"}))
def test_every_option_of_every_group_composes(group: str) -> None:
    for option in groups()[group]:
        compose([RECIPE, f"{group}={option}"])


def test_a_data_path_alone_selects_text_and_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose([RECIPE, "data.path=a folder/some (text)=1.txt", "runs_root=here"])
    assert config.data.name == "text"
    assert config.data.path == str(tmp_path / "a folder/some (text)=1.txt")
    assert config.runs_root == str(tmp_path / "here")
    assert compose([RECIPE, "data.path=~/x.txt"]).data.path == os.path.expanduser("~/x.txt")
    assert compose([RECIPE, "data=builtin", "data.path=x.txt"]).data.name == "builtin"


def test_own_recipes_come_from_a_folder_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.write_text("# @package _global_\ndefaults:\n  - override /parallel: hsdp\ntrain:\n  steps: 77\n")
    config = compose(["recipe=mine"], str(tmp_path))
    assert (config.recipe, config.train.steps, config.parallel.dp_replicate) == ("mine", 77, 2)
    recipe.write_text("# @package _global_\ntrain:\n  stepz: 77\n")
    with pytest.raises(ConfigError, match="stepz"):
        compose(["recipe=mine"], str(tmp_path))
    recipe.write_text("train: [1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml, line 2: not YAML"):
        compose(["recipe=mine"], str(tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        compose(["recipe=mine"], str(tmp_path / "absent"))


def test_a_composition_tells_what_the_words_changed() -> None:
    composition = compose_run([RECIPE, "model=llama_small", "optim.lr=0.5"])
    assert composition.choices == ("model=llama_small",)
    assert differences(composition.config, composition.groups_only) == {"optim.lr": (0.004, 0.5)}


def test_overrides_apply_to_a_frozen_configuration(tmp_path: Path) -> None:
    frozen = compose([RECIPE, "run=x", "train.steps=50", "parallel.reshard_after_forward=false", "data.path=x.txt"])
    (tmp_path / "config.yaml").write_text(dump_config(frozen))
    frozen = load_config(tmp_path / "config.yaml")
    assert apply_overrides(frozen, []) == frozen
    config = apply_overrides(frozen, ["parallel=ddp", "train.steps=1e2", "checkpoint=default", "model.rope_scaling.factor=2"])
    assert config.train.steps == 100
    # The group's option replaces the section, what the frozen one had in it included.
    assert (config.parallel.strategy, config.parallel.reshard_after_forward) == ("ddp", True)
    assert config.model.rope_scaling == RopeScaling(factor=2.0)
    assert config.data == frozen.data


@pytest.mark.parametrize("word", ["recipe=llama_ddp", "train.stepz=3", "parallel=dpd", "parallel.strategy=x", "train.steps=x"])
def test_overrides_of_a_frozen_configuration_are_checked_alike(word: str) -> None:
    with pytest.raises(ConfigError):
        apply_overrides(compose([RECIPE]), [word])


def test_a_sweep_is_every_combination_and_keeps_text_as_text() -> None:
    points = sweep_points([RECIPE, "run=7e3", "optim.lr=1e-3,3e-3", "train.seed=range(1,3)", "parallel=ddp,fsdp"])
    assert len(points) == 8
    configs = [compose(point) for point in points]
    assert {config.run for config in configs} == {"7e3"}
    assert len({(config.optim.lr, config.train.seed, config.parallel.strategy) for config in configs}) == 8
    with pytest.raises(ConfigError):
        sweep_points(["optim.lr=interval(0,1)"])
