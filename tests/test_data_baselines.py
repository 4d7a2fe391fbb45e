"""Counting models: proper distributions, and the figures a calculation by hand gives."""

from __future__ import annotations

import math

import numpy as np
import pytest

from factory_train.data.baselines import KneserNeyBigram, Unigram, baselines

RANDOM = np.random.default_rng(0)
# Skewed, so that some pairs are seen once, some twice, many never; the last ids never occur.
TRAIN = (RANDOM.random(3000) ** 3 * 40).astype(np.int64)
CASES = {
    "skewed": TRAIN,
    "every pair new": np.arange(40, dtype=np.int64),
    "one token": np.zeros(50, dtype=np.int64),
    "two tokens": np.array([3, 3], dtype=np.int64),
    "no pair": np.array([5], dtype=np.int64),
}


@pytest.mark.parametrize("name", CASES)
def test_bigram_sums_to_one_in_every_context(name: str) -> None:
    model, every = KneserNeyBigram(CASES[name], vocab_size=45), np.arange(45)
    for context in range(45):
        probability = model.probability(np.full(45, context), every)
        assert probability.sum() == pytest.approx(1, abs=1e-12)
        assert probability.min() > 0


@pytest.mark.parametrize("name", CASES)
def test_unigram_sums_to_one(name: str) -> None:
    assert Unigram(CASES[name], 45).probability(np.arange(45)).sum() == pytest.approx(1, abs=1e-12)


def test_unigram_is_add_one() -> None:
    assert Unigram(np.array([0, 0, 1]), 4).probability(np.array([0, 1, 2])) == pytest.approx([3 / 7, 2 / 7, 1 / 7])


def test_bigram_agrees_with_a_calculation_by_hand() -> None:
    # Pairs of 0 1 0 1 0 2 0 2: (0,1) 2, (1,0) 2, (0,2) 2, (2,0) 1; so n1 = 1, n2 = 3, D = 1/7.
    # Predecessors: 0 has two, 1 and 2 have one; so n1 = 2, n2 = 1, D' = 1/2. Four tokens in the vocabulary, 3 never seen.
    model = KneserNeyBigram(np.array([0, 1, 0, 1, 0, 2, 0, 2]), vocab_size=4)
    uniform = (1 / 2 * 3 / 4) / 4
    continuation = {0: (2 - 1 / 2) / 4 + uniform, 1: (1 - 1 / 2) / 4 + uniform, 3: uniform}
    left = 1 / 7 * 2 / 4
    expected = [(2 - 1 / 7) / 4 + left * continuation[1], left * continuation[0], left * continuation[3], continuation[0]]
    got = model.probability(np.array([0, 0, 0, 3]), np.array([1, 0, 3, 0]))
    assert got == pytest.approx(expected, rel=1e-12)


def test_cross_entropies_are_over_the_targets_of_a_trained_model() -> None:
    validation = np.array([1, 2, 1, 0])
    found = baselines(TRAIN, validation, 45)
    unigram, bigram = Unigram(TRAIN, 45), KneserNeyBigram(TRAIN, 45)
    assert found["unigram"] == pytest.approx(-np.log(unigram.probability(validation[1:])).mean())
    assert found["bigram_kneser_ney"] == pytest.approx(-np.log(bigram.probability(validation[:-1], validation[1:])).mean())


def test_a_text_with_structure_is_easier_for_the_bigram() -> None:
    alternating = np.tile([0, 1], 500)
    found = baselines(alternating, alternating, 2)
    assert found["unigram"] == pytest.approx(math.log(2), rel=1e-3)
    assert found["bigram_kneser_ney"] < 0.01
