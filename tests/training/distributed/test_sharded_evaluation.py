"""A test of a language model sharded over processes, interrupted when one of them had answered more than the other."""

import pytest

from tests.tasks.causal_lm.evaluator_helpers import COUNTS, close, data, evaluate, left
from tests.tasks.causal_lm.language_helpers import module
from tests.training.distributed.test_strategies import case, launch

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_an_interrupted_sharded_test_goes_on(llama, sets, tmp_path):
    """Ranks do as many forwards, or they would wait for each other; each question counts once, as if never stopped.

    Of 7 and 4 questions in batches of two, each rank has batches of 2, 2 and 2; they stop after one. Then the first
    has answered its batch and the second has not.
    """
    assert COUNTS == {"ARC-Easy": 7, "boolq": 4}
    folder, options = tmp_path / "sharded", {"command": "test", "protocol": "strict"}
    launch([case(folder, "fsdp2", llama, sets, dies=1, **options)], 2, tmp_path / "first")
    files = sorted((folder / "predictions").glob("*.partial-*/rank*.jsonl"))
    assert [len(path.read_text().splitlines()) for path in files] == [2, 2]
    files[1].unlink()
    said = launch([case(folder, "fsdp2", llama, sets, **options)], 2, tmp_path / "second")
    assert said.count("2 questions were answered by an interrupted run") == 1
    resumed, whole = left(folder), evaluate(tmp_path / "whole", module(llama), data(sets, "strict"))
    close(whole.records, resumed["records"])
    assert resumed["results"]["metrics"] == whole.results["metrics"]
    assert resumed["results"]["n"] == whole.results["n"] == {"test": sum(COUNTS.values())}
