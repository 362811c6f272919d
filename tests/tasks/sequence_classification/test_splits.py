"""The split protocols: the papers' sizes, draws that depend on their seed alone, and sets that are too small."""

import numpy as np
import pytest
import torch

from pera_lightning.data import splits
from pera_lightning.data.batching import collate_classified
from pera_lightning.data.length_grouping import padding_share, padding_shares
from pera_lightning.errors import DataError, UnknownNameError
from tests.tasks.causal_lm.text_helpers import one_line


@pytest.mark.parametrize(
    ("task", "count", "selected", "scored"),
    [
        ("sst2", 872, 436, 436),
        ("mrpc", 408, 204, 204),
        ("cola", 1043, 522, 521),
        ("qnli", 5463, 1000, 4463),
        ("rte", 277, 139, 138),
        ("stsb", 1500, 750, 750),
        ("2,000 rows are not above 2,000", 2000, 1000, 1000),
        ("2,001 are", 2001, 1000, 1001),
        ("smallest", 4, 2, 2),
    ],
)
def test_red_has_the_papers_sizes_and_every_example_on_one_side(task, count, selected, scored):
    first, second = splits.red(count, 42)
    assert (len(first), len(second)) == (selected, scored)
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(count))
    assert np.array_equal(first, np.sort(first))


def test_red_is_a_function_of_its_seed_and_of_no_global_state():
    before = splits.red(277, 42)[0]
    np.random.seed(1)
    torch.manual_seed(1)
    assert np.array_equal(before, splits.red(277, 42)[0])
    draws = {tuple(splits.red(277, seed)[0]) for seed in range(42, 47)}
    assert len(draws) == 5
    assert before[:10].tolist() == FIRST  # results of another version or machine are on the same rows


FIRST = [1, 4, 8, 9, 10, 14, 15, 17, 21, 25]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_red_refuses_sets_that_are_too_small(count):
    with pytest.raises(DataError) as error:
        splits.red(count, 42)
    one_line(error, "'red'", f"{count} examples are too few", "full_validation")


def test_full_validation_scores_the_examples_that_selected_and_own_test_none_of_them():
    for part in splits.full_validation(7, 1):
        assert part.tolist() == list(range(7))
    assert splits.own_test(7, 1)[1] is None
    scored = {name: splits.selected_on_test(cut) for name, cut in splits.SPLIT_PROTOCOLS.items()}
    assert scored == {"full_validation": True, "red": False, "own_test": False}


def test_an_unknown_protocol_has_its_closest_named():
    with pytest.raises(UnknownNameError) as error:
        splits.split_protocol("fullvalidation")
    one_line(error, "'fullvalidation'", "full_validation, red, own_test", "closest: full_validation")


def test_the_share_of_padding_is_that_of_the_filled_batches():
    assert padding_share([3, 1, 2, 2], [[0, 1], [2, 3]]) == pytest.approx(2 / 10)
    shares = padding_shares([5, 9] * 100, 10, seed=3)
    assert shares["grouped"] == pytest.approx(0, abs=0.03)
    assert shares["random"] > 0.15


def test_collated_labels_keep_their_kind_and_examples_are_filled_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "label": 1, "id": "a"}, {"input_ids": [8], "label": -100, "id": "b"}]
    batch = collate_classified(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (batch["labels"].dtype, batch["ids"]) == (torch.int64, ["a", "b"])
    values = collate_classified([{"input_ids": [1], "label": 0.5}, {"input_ids": [1], "label": -100.0}], pad_id=0)
    assert (values["labels"].dtype, values["labels"].tolist()) == (torch.float32, [0.5, -100.0])
