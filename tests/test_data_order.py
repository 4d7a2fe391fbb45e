"""The order of samples is a fixed permutation of each epoch, computed element by element."""

from __future__ import annotations

import numpy as np
import pytest

from factory_train.data.order import Permutation, SampleOrder


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 251, 256, 257, 1000, 4096, 7919])
def test_permutation_reaches_every_element_once(size: int) -> None:
    permutation = Permutation(size, seed=7, epoch=3)
    assert sorted(permutation(index) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 17, 257, 4096, 7919, 10**15 + 37])
def test_many_elements_at_once_go_where_each_goes_alone(size: int) -> None:
    permutation = Permutation(size, seed=7, epoch=3)
    index = np.unique(np.linspace(0, size - 1, 500).astype(np.int64))
    assert permutation.many(index).tolist() == [permutation(int(value)) for value in index]
    assert permutation.many(index[:0]).tolist() == []


def test_rows_of_samples_over_several_epochs_are_those_of_each() -> None:
    order, samples = SampleOrder(num_rows=11, seed=5), np.array([40, 3, 10, 11, 12, 0, 33, 21], dtype=np.int64)
    assert order.rows_of_samples(samples).tolist() == [order.row_of_sample(int(sample)) for sample in samples]


def test_permutation_of_a_huge_size_costs_nothing_to_make() -> None:
    permutation = Permutation(10**15 + 37, seed=1, epoch=0)
    places = [permutation(index) for index in range(1000)]
    assert len(set(places)) == 1000
    assert max(places) < 10**15 + 37
    # Neighbours go far apart: the mean of uniform places is half the size, within five standard errors.
    assert abs(sum(places) / 1000 / 10**15 - 0.5) < 5 * 0.2887 / 1000**0.5


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(Permutation(50, seed, epoch)(index) for index in range(50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_small_permutations_take_every_order() -> None:
    orders = {tuple(Permutation(3, seed=0, epoch=epoch)(index) for index in range(3)) for epoch in range(200)}
    assert len(orders) == 6


def test_every_row_is_seen_once_in_each_epoch() -> None:
    order = SampleOrder(num_rows=11, seed=5)
    for epoch in range(4):
        assert sorted(order.row_of_sample(epoch * 11 + index) for index in range(11)) == list(range(11))


def test_row_of_a_sample_does_not_depend_on_what_was_asked_before() -> None:
    straight = [SampleOrder(13, 2).row_of_sample(sample) for sample in range(60)]
    order = SampleOrder(13, 2)
    assert [order.row_of_sample(sample) for sample in reversed(range(60))] == straight[::-1]


def test_order_is_the_one_that_old_checkpoints_were_written_with() -> None:
    order = SampleOrder(num_rows=10, seed=1234)
    assert [order.row_of_sample(sample) for sample in range(20)] == [9, 7, 1, 8, 5, 2, 4, 0, 6, 3, 4, 0, 9, 3, 6, 8, 2, 1, 7, 5]
