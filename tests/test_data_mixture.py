"""Mixtures: exact shares in every phase, every row of a set once in each of its epochs, the same samples at any world size."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import numpy as np
import pytest
from gang import run_gang, start_run

from factory_train.compose import compose
from factory_train.config import Config, DataConfig
from factory_train.data import mixture
from factory_train.data.loader import Cursor, StepBatch, TokenLoader
from factory_train.data.manifest import DataManifest
from factory_train.data.mixture_order import BLOCK, MixtureOrder
from factory_train.data.samples import mixture_order, training_samples
from factory_train.data.shards import TokenStream
from factory_train.errors import ConfigError, DataError, FactoryTrainError

SAMPLES_PER_STEP = 8
SEQ_LEN = 16


@pytest.mark.parametrize("ends", [(), (1,), (700, 701, 5000), (3 * BLOCK + 17,)])
def test_shares_are_exact_in_every_phase_and_samples_of_a_set_follow_each_other(ends: tuple[int, ...]) -> None:
    source = random.Random(len(ends))
    shares = []
    for _ in range(len(ends) + 1):
        weights = [source.random() for _ in range(4)]
        shares.append([weight / sum(weights) for weight in weights])
    order = MixtureOrder(ends, shares, seed=5)
    total = (ends[-1] if ends else 0) + BLOCK + 1000
    sets, numbers = order.locate(np.arange(total, dtype=np.int64))
    for number in range(4):
        # Numbers 0, 1, 2 ... of each set, none left out, none twice, in whatever order within a block.
        own = numbers[sets == number]
        assert sorted(own.tolist()) == list(range(len(own)))
        assert (np.diff(own) > 0).all()
    for phase, (start, end) in enumerate(zip((0, *ends), (*ends, total), strict=True)):
        counts = np.bincount(sets[start:end], minlength=4)
        blocks = -(-(end - start) // BLOCK)
        assert np.abs(counts - np.asarray(shares[phase]) * (end - start)).max() <= max(2, 2 * blocks)
    for count in (0, 1, 500, total - 1, total):
        assert order.counts(count).tolist() == np.bincount(sets[:count], minlength=4).tolist()


def test_any_stretch_has_nearly_the_shares_of_the_whole() -> None:
    order = MixtureOrder((), [[0.6, 0.3, 0.1]], seed=3)
    sets, _ = order.locate(np.arange(BLOCK, dtype=np.int64))
    for start in range(0, BLOCK - 200, 997):
        counts = np.bincount(sets[start : start + 200], minlength=3)
        # Independent draws would stray by some seven of them.
        assert np.abs(counts - [120, 60, 20]).max() <= 2


def test_order_is_a_function_of_the_seed_alone() -> None:
    samples = np.random.default_rng(1).integers(0, 5 * BLOCK, 300)
    first, again, other = (MixtureOrder((100,), [[0.5, 0.5], [0.2, 0.8]], seed).locate(samples) for seed in (1, 1, 2))
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    assert first[0].tolist() != other[0].tolist()
    one_by_one = [MixtureOrder((100,), [[0.5, 0.5], [0.2, 0.8]], 1).locate(samples[place : place + 1]) for place in range(0, 300, 37)]
    assert [int(sets[0]) for sets, _ in one_by_one] == first[0][::37].tolist()


def test_a_tiny_share_is_sampled_all_the_same() -> None:
    order = MixtureOrder((), [[1 - 1e-9, 1e-9]], seed=0)
    assert order.counts(3 * BLOCK).tolist() == [3 * BLOCK - 3, 3]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared sets a, b, c of one tokenizer, and d of another; each token of a set is the set's own letter but for spaces."""
    folder = tmp_path_factory.mktemp("sets")
    for name, rows in {"a": 400, "b": 300, "c": 300, "d": 50}.items():
        lines = [json.dumps({"text": f"{name * (5 + number % 60)} {name * 3}"}) for number in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        words = ("tokenizer=bpe", "vocab_size=260") if name == "d" else ("tokenizer=byte",)
        done = command.run("prepare", f"{name}.jsonl", f"out={name}", "validation_fraction=0.15", *words, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def mixed(folder: Path, names: str = "abc", **settings: Any) -> DataConfig:
    return DataConfig(sets={name: str(folder / name) for name in names}, **settings)


def run_config(data: DataConfig) -> Config:
    cfg = Config(data=data)
    cfg.train.seq_len = SEQ_LEN
    cfg.train.global_batch_tokens = SAMPLES_PER_STEP * SEQ_LEN
    return cfg


def steps(cfg: Config, tmp_path: Path, count: int, *, dp_rank: int = 0, dp_size: int = 1, cursor: Cursor | None = None) -> list[StepBatch]:
    samples = training_samples(cfg, tmp_path, tmp_path / "no dataset of its own", SAMPLES_PER_STEP)
    options = {"samples_per_step": SAMPLES_PER_STEP, "micro_batch_size": 2, "dp_rank": dp_rank, "dp_size": dp_size, "cursor": cursor}
    with TokenLoader(samples, **options) as loader:  # type: ignore[arg-type]
        return [loader.next_step() for _ in range(count)]


PHASES = [{"until_step": 20.0, "a": 3.0, "b": 1.0}, {"until_step": 50.0, "b": 1.0, "c": 1.0}, {"a": 0.2, "b": 0.2, "c": 0.6}]


def test_what_is_trained_on_has_the_shares_of_each_phase(sets: Path, tmp_path: Path) -> None:
    batches = steps(run_config(mixed(sets, phases=PHASES)), tmp_path, 90)
    letters = {ord(name): place for place, name in enumerate("abc")}
    for first, last, shares in ((0, 20, (0.75, 0.25, 0)), (20, 50, (0, 0.5, 0.5)), (50, 90, (0.2, 0.2, 0.6))):
        counts = [0, 0, 0]
        for batch in batches[first:last]:
            for micro in batch.micro_batches:
                for row in micro.tokens_BT.tolist():
                    counts[letters[next(token for token in row if token in letters)]] += 1
        expected = [share * (last - first) * SAMPLES_PER_STEP for share in shares]
        assert np.abs(np.asarray(counts) - expected).max() <= 2, (counts, expected)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_resumed_in_mid_phase_at_another_world_size_it_sees_the_same_samples(sets: Path, tmp_path: Path, dp_size: int) -> None:
    cfg = run_config(mixed(sets, phases=PHASES))
    straight = steps(cfg, tmp_path, 60)
    for done in (7, 33, 49):
        saved = Cursor.from_json(json.loads(json.dumps(straight[done - 1].cursor_after.to_json())))
        ranks = [steps(cfg, tmp_path, 60 - done, dp_rank=rank, dp_size=dp_size, cursor=saved) for rank in range(dp_size)]
        for step in range(60 - done):
            assert sum(rank[step].data_hash for rank in ranks) == straight[done + step].data_hash
            assert {rank[step].num_targets for rank in ranks} == {straight[done + step].num_targets}


def test_every_row_of_a_set_comes_once_before_any_comes_twice(sets: Path, tmp_path: Path) -> None:
    cfg = run_config(mixed(sets, "ac", weights={"a": 1.0, "c": 1.0}))
    stream = TokenStream(sets / "c", "train")
    rows = (stream.num_tokens - 1) // SEQ_LEN
    seen = [
        tuple(row)
        for batch in steps(cfg, tmp_path, 2 * rows // SAMPLES_PER_STEP)
        for micro in batch.micro_batches
        for row in micro.tokens_BT.tolist()
        if ord("c") in row
    ]
    whole = sorted(tuple(stream.slice(row * SEQ_LEN, SEQ_LEN).tolist()) for row in range(rows))
    assert len(seen) >= rows - SAMPLES_PER_STEP
    left = list(whole)
    for row in seen[:rows]:
        left.remove(row)
    assert len(left) <= max(0, rows - len(seen))


def test_without_weights_shares_are_those_of_the_tokens(sets: Path) -> None:
    loaded = mixture.load(mixed(sets))
    tokens = [manifest.splits["train"].num_tokens for manifest in loaded.manifests]
    assert loaded.final_shares == pytest.approx([count / sum(tokens) for count in tokens])


def test_identity_follows_from_sets_and_final_shares_not_from_folders(sets: Path, tmp_path: Path) -> None:
    ids = [
        mixture.load(config).manifest.id
        for config in (
            mixed(sets, weights={"a": 1.0, "b": 1.0, "c": 1.0}),
            mixed(sets, weights={"a": 2.0, "b": 2.0, "c": 2.0}),
            mixed(sets, phases=[{"until_step": 3.0, "a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}]),
            mixed(sets, weights={"a": 1.0, "b": 1.0, "c": 2.0}),
            mixed(sets, "ab", weights={"a": 1.0, "b": 1.0}),
        )
    ]
    assert ids[0] == ids[1] == ids[2]
    assert len(set(ids)) == 3
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in "abc":
        (moved / name).symlink_to(sets / name)
    assert mixture.load(mixed(moved, weights={"a": 1.0, "b": 1.0, "c": 1.0})).manifest.id == ids[0]


BAD: list[tuple[Callable[[Path], DataConfig], type[FactoryTrainError], str, str]] = [
    (lambda sets: mixed(sets, weights={"a": 0.0, "b": 0.0}), ConfigError, "all weights are zero", "a:1"),
    (lambda sets: mixed(sets, weights={"a": 1.0, "b": 1.0}), ConfigError, "c has weight 0 throughout", "leave c out"),
    (lambda sets: mixed(sets, weights={"a": -1.0, "b": 1.0, "c": 1.0}), ConfigError, "the weight of a is -1", "a number from 0 on"),
    (lambda sets: mixed(sets, weights={"a": math.nan, "b": 1.0, "c": 1.0}), ConfigError, "the weight of a is nan", "a number from 0 on"),
    (lambda sets: mixed(sets, weights={"a": math.inf, "b": 1.0, "c": 1.0}), ConfigError, "the weight of a is inf", "a number from 0 on"),
    (lambda sets: mixed(sets, weights={"aa": 1.0}), ConfigError, "there is no set 'aa'", "did you mean a?"),
    (
        lambda sets: mixed(sets, weights={"a": 1.0}, phases=[{"a": 1.0}]),
        ConfigError,
        "either data.weights or data.phases",
        "data.weights={}",
    ),
    (lambda sets: mixed(sets, phases=[{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}]), ConfigError, "which step ends", "until_step: a whole"),
    (
        lambda sets: mixed(sets, phases=[{"until_step": 4.0, "a": 1.0, "b": 1.0, "c": 1.0}]),
        ConfigError,
        "the last phase has no end",
        "until_step",
    ),
    (
        lambda sets: mixed(sets, phases=[{"until_step": 4.0, "a": 1.0}, {"until_step": 4.0, "b": 1.0}, {"c": 1.0}]),
        ConfigError,
        "which do not increase",
        "increasing",
    ),
    (lambda sets: mixed(sets, "ad"), DataError, "the tokens of d are not those of a", "prepare d again with tokenizer="),
    (lambda sets: DataConfig(sets={"a": str(sets / "nowhere")}), DataError, "no such folder", "prepare PATH out="),
    (lambda sets: DataConfig(sets={"a": str(sets)}), DataError, "no prepared data there", "prepare PATH out="),
    (lambda sets: DataConfig(sets={"a-b": str(sets / "a")}), ConfigError, "cannot be the name of a set", "letters"),
]


@pytest.mark.parametrize(("make", "kind", "message", "fix"), BAD)
def test_what_cannot_be_mixed_is_refused(
    sets: Path, make: Callable[[Path], DataConfig], kind: type[FactoryTrainError], message: str, fix: str
) -> None:
    with pytest.raises(kind) as caught:
        mixture.load(make(sets))
    assert message in str(caught.value)
    assert fix in str(caught.value.fix)
    assert (caught.value.where or "").startswith("data.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data.weights={a:1}",), "weights of what? There are no data.sets"),
        (("data.sets.a={folder}/a", "data.path={folder}/a.jsonl"), "either data.path or data.sets"),
        (("data.sets=web",), "'web' is not a mapping from names"),
        (("data.sets.a={folder}/a", "data.weights.a=much"), "'much' is not a number"),
        (("data.sets.a={folder}/a", "data.phases=[a]"), "is not a mapping from names"),
        (
            ("data.sets.a={folder}/a", "train.seq_len=50000", "model.max_seq_len=50000", "train.global_batch_tokens=50000"),
            "the context is longer than the data",
        ),
    ],
)
def test_wrong_words_are_refused_before_anything_starts(sets: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = command.run("recipe=llama_ddp", *(word.replace("{folder}", str(sets)) for word in words), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "fix:" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_mappings_are_written_item_by_item_or_whole(sets: Path) -> None:
    one = compose(["recipe=llama_ddp", f"data.sets.a={sets}/a", f"data.sets.b={sets}/b", "data.weights.a=0.25", "data.weights.b=1"])
    whole = compose(["recipe=llama_ddp", f"data.sets={{a:{sets}/a,b:{sets}/b}}", "data.weights={a:0.25,b:1}"])
    assert one.data == whole.data
    assert one.data.sets == {"a": str(sets / "a"), "b": str(sets / "b")}
    assert one.data.weights == {"a": 0.25, "b": 1.0}
    phases = compose(["recipe=llama_ddp", f"data.sets.a={sets}/a", "data.phases=[{until_step:5,a:1},{a:2}]"]).data.phases
    assert phases == [{"until_step": 5.0, "a": 1.0}, {"a": 2.0}]


def test_weights_can_be_swept(sets: Path, tmp_path: Path) -> None:
    words = ("recipe=llama_ddp", f"data.sets.a={sets}/a", f"data.sets.b={sets}/b", "data.weights.a=1", "data.weights.b=1,3", *command.SMALL)
    done = command.run(*words, "-m", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data.weights.b=1" in done.stdout
    assert "data.weights.b=3" in done.stdout


@pytest.mark.parametrize("packing", [pytest.param("concatenate", marks=pytest.mark.long), "document"])
def test_a_run_on_a_mixture_resumes_at_another_world_size_with_the_same_samples(sets: Path, tmp_path: Path, packing: str) -> None:
    phases = "data.phases=[{until_step:5,a:3,b:1},{a:1,b:1,c:6}]"
    words = [f"data.sets.{name}={sets}/{name}" for name in "abc"]
    cfg = compose(["recipe=llama_fsdp", *words, phases, f"data.packing={packing}", *command.SMALL, "tracking=none", "train.steps=12"])
    cfg.checkpoint.every_steps, cfg.train.validate_every = 7, 4
    whole, first = start_run(tmp_path / "runs", "whole", cfg), start_run(tmp_path / "runs", "split", cfg)
    cfg.train.steps = 7
    first.config_path.write_text(first.config_path.read_text().replace("steps: 12", "steps: 7"))
    run_gang([(whole, 2), (first, 2)])
    cfg.train.steps = 12
    second = start_run(tmp_path / "runs", "split", cfg)
    run_gang([(second, 1)])

    def hashes(attempt: Any) -> dict[int, int]:
        return {row["step"]: row["data_hash"] for row in attempt.run.metrics() if row["kind"] == "train"}

    assert hashes(second) == hashes(whole)
    assert len(hashes(whole)) == 12
    manifest = DataManifest.load(whole.run.data)
    assert manifest.kind == "mixture"
    # Judged on the shares of the last phase, and by what counting says of the same text.
    stream = TokenStream(whole.run.data, "validation")
    tokens = stream.slice(0, stream.num_tokens)
    counts = np.asarray([(tokens == ord(name)).sum() for name in "abc"])
    assert counts / counts.sum() == pytest.approx([1 / 8, 1 / 8, 6 / 8], abs=0.06)
    assert 0 < manifest.baselines["bigram_kneser_ney"] < manifest.baselines["unigram"]
    events = [event["message"] for event in whole.run.attempts()[0].events() if event["event"] == "prepare"]
    assert any("until step 5 a 0.75, b 0.25; then a 0.125, b 0.125, c 0.75" in message for message in events)
    expected = mixture_order(mixture.load(cfg.data), SAMPLES_PER_STEP, cfg.train.seed).counts(12 * SAMPLES_PER_STEP)
    assert any(f"c {expected[2] / expected.sum():.2%} of all samples" in message for message in events)
