"""Packing examples into sequences: every one once, in few sequences."""

from __future__ import annotations

import numpy as np
import pytest

from pera_lightning.data.batching import capacity_for, pack
from pera_lightning.errors import ConfigurationError, DataError
from tests.data.test_length_grouping import lognormal


@pytest.mark.parametrize("capacity", [512, 1300, 9000])
def test_pack_holds_every_example_once_in_few_sequences(capacity: int) -> None:
    lengths = lognormal(5000)
    sequences = pack(lengths, capacity, seed=1)
    assert sorted(example for sequence in sequences for example in sequence) == list(range(5000))
    assert max(sum(lengths[example] for example in sequence) for sequence in sequences) <= capacity
    assert len(sequences) <= 1.01 * sum(lengths) / capacity + 1


@pytest.mark.parametrize("seed", range(5))
def test_pack_against_a_plain_best_fit(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 40, 200).tolist()
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, left in enumerate(space) if left >= length]
        if not fits:
            space.append(47)
            fits = [len(space) - 1]
        space[min(fits, key=lambda i: space[i])] -= length
    sequences = pack(lengths, 47, seed=seed)
    assert sorted(47 - sum(lengths[example] for example in sequence) for sequence in sequences) == sorted(space)


def test_pack_of_examples_that_fill_sequences_exactly() -> None:
    assert len(pack([4, 6, 3, 7, 5, 5, 10], 10)) == 4
    assert pack([10], 10) == [[0]]
    assert sorted(map(len, pack([1] * 7, 3))) == [1, 3, 3]


def test_pack_is_a_function_of_the_seed() -> None:
    lengths = lognormal(500)
    once = pack(lengths, 600, seed=1)
    assert pack(lengths, 600, seed=1) == pack(np.array(lengths), 600, seed=1) == once
    assert pack(lengths, 600, seed=2) != once
    # Not in the order of packing, where the longest examples come first.
    longest = [max(lengths[example] for example in sequence) for sequence in once]
    assert longest != sorted(longest, reverse=True)
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3
    with pytest.raises(ConfigurationError, match="seed=-1"):
        pack([1], 2, seed=-1)


def test_pack_refuses_examples_that_do_not_fit() -> None:
    with pytest.raises(DataError, match=r"2 of 4 examples .* capacity of 8 .*number 1 has 9.* 12 tokens") as error:
        pack([3, 9, 8, 12], 8)
    assert "\n" not in str(error.value)


def test_capacity_for() -> None:
    assert capacity_for([10, 20, 30], 4) == 80
    assert capacity_for([1, 1, 1, 50], 2) == 50
    lengths = lognormal(3000)
    examples = [len(sequence) for sequence in pack(lengths, capacity_for(lengths, 16))]
    assert np.mean(examples) == pytest.approx(16, rel=0.02)


def test_lengths_that_are_none() -> None:
    for use in (lambda lengths: pack(lengths, 9), lambda lengths: capacity_for(lengths, 2)):
        with pytest.raises(DataError, match="no examples"):
            use([])
        with pytest.raises(DataError, match="example 1 has length 0"):
            use([3, 0, 2])
