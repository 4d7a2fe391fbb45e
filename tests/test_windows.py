"""Windows over a fragment: every element in exactly one, long parameters without neighbours."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from factory_train.distributed.windows import cut
from factory_train.kernels.pseudogradient import BLOCK

LONG = st.sampled_from([BLOCK, 4 * BLOCK, 11 * BLOCK + 3, 40 * BLOCK])
SIZES = st.lists(st.one_of(st.integers(1, 3 * BLOCK), LONG), min_size=1, max_size=8)


def placed(sizes: list[int]) -> dict[str, tuple[int, int]]:
    return {f"p{index}": (sum(sizes[:index]), size) for index, size in enumerate(sizes)}


@given(SIZES)
def test_windows_tile_the_fragment_in_whole_blocks(sizes: list[int]) -> None:
    windows, end = cut(placed(sizes), 8, 4), 0
    for window in windows:
        assert window.start == end
        assert window.start % BLOCK == 0
        assert 0 < window.stop - window.start <= 8 * BLOCK
        end = window.stop
    assert end == sum(sizes)


@given(SIZES)
def test_what_is_gathered_is_the_fragment_and_what_is_scattered_comes_back(sizes: list[int]) -> None:
    flat = torch.arange(sum(sizes), dtype=torch.float32)
    flats = dict(zip(placed(sizes), flat.clone().split(sizes), strict=True))
    for window in cut(placed(sizes), 8, 4):
        inner = window.gather(flats)
        assert torch.equal(inner, flat[window.elements])
        assert window.gather(flats, read=False).shape == inner.shape
        inner += 1
        window.scatter(inner, flats)
    assert torch.equal(torch.cat(list(flats.values())), flat + 1)


@given(SIZES)
def test_of_a_long_parameter_less_than_a_block_at_each_end_is_copied(sizes: list[int]) -> None:
    copied = dict.fromkeys(placed(sizes), 0)
    for window in cut(placed(sizes), 8, 4):
        for name, of_shard, _ in window.pieces if len(window.pieces) > 1 else ():
            copied[name] += of_shard.stop - of_shard.start
    for (name, most), size in zip(copied.items(), sizes, strict=True):
        assert size < 6 * BLOCK or most < 2 * BLOCK, name


def test_short_ones_share_windows() -> None:
    assert len(cut(placed([10] * 50), 8, 4)) == 1
    assert [len(window.pieces) for window in cut(placed([10, 10, 20 * BLOCK, 10]), 8, 4)] == [3, 1, 1, 1, 2]
