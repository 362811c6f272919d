"""A process of a run dies: the others end too, soon, and say why."""

import pytest

from tests.run_helpers import ROOT
from tests.training.distributed.node_helpers import environment, free_port, pera_words, run_together, torchrun_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
LIMIT = 300  # of starting and ending, on a machine that has other things to do
SOON = 60  # after the death


@pytest.mark.parametrize(
    ("launcher", "rank", "how"),
    [
        ("lightning", 1, "error"),
        ("lightning", 0, "killed"),
        ("torchrun", 0, "killed"),
    ],
)
def test_none_outlives_one_that_dies(tmp_path, launcher, rank, how):
    options = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    options += ["--trainer.callbacks+=dying_rank.Dies", f"--trainer.callbacks.rank={rank}"]
    options += [f"--trainer.callbacks.died={tmp_path / 'died'}"]
    words = pera_words(tmp_path / "runs", "fit", *options, f"--trainer.callbacks.how={how}")
    if launcher == "torchrun":
        words = torchrun_words(words, nodes=1, node=0, port=free_port(), processes=2)
    variables = environment(PYTHONPATH=ROOT / "tests" / "training" / "distributed")
    (end,) = run_together([(words, variables)], tmp_path, LIMIT)
    assert end.code not in (None, 0), end.text[-3000:]
    assert not end.outlived, end.text[-3000:]
    assert end.at - float((tmp_path / "died").read_text()) < SOON
    assert ("has had enough" in end.text) == (how == "error")
    assert not (tmp_path / "runs" / "quickstart" / "adapter").exists()
