"""An interrupted test goes on where it stopped, with the answers of the same test alone."""

from types import SimpleNamespace

import pytest
from answering_helpers import (
    COUNTS,
    TOTAL,
    close,
    data,
    evaluate,
    interrupted,
    ready,
    without_time,
)
from language_helpers import QV, module, save_tiny, write_sets

from pera_lightning import AdapterInjection
from pera_lightning.adapters import PERA, AuroRA
from pera_lightning.modules import answering

# ---- interruptions --------------------------------------------------------------------------------------------------


def rank_file(folder):
    (path,) = folder.glob("predictions/*.partial-*/rank0.jsonl")
    return path


@pytest.mark.parametrize("protocol", ["score", "strict"])
@pytest.mark.parametrize("method", [PERA(rank=2), AuroRA(rank=2)], ids=["pera", "aurora"])
def test_an_interrupted_test_goes_on(llama, sets, tmp_path, asked, capsys, protocol, method):
    times = 2 if isinstance(method, AuroRA) else 1
    whole = evaluate(tmp_path / "whole", ready(llama, method), data(sets, protocol), method)
    assert len(asked.taken()) == TOTAL * times
    folder = tmp_path / "cut"
    interrupted(folder, ready(llama, method), data(sets, protocol), method)
    first = asked.taken()
    assert len(first) == 6 * times
    capsys.readouterr()
    resumed = evaluate(folder, ready(llama, method), data(sets, protocol), method)
    second = asked.taken()
    assert len(second) == (TOTAL - 6) * times
    assert not [q for q in second if q in first]
    assert f"6 questions were answered by an interrupted run: {folder}" in capsys.readouterr().out
    close(whole.records, resumed.records)
    assert resumed.results["metrics"] == whole.results["metrics"]
    assert resumed.results["n"] == whole.results["n"]
    seconds = [r["seconds"] for rows in resumed.records.values() for r in rows]
    assert resumed.results["seconds"] == pytest.approx(sum(seconds))
    assert not list(folder.glob("predictions/*.partial-*"))


def test_half_a_line_is_asked_again(llama, sets, tmp_path, asked):
    whole = evaluate(tmp_path / "whole", ready(llama), data(sets))
    interrupted(tmp_path, ready(llama), data(sets))
    path = rank_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    asked.taken()
    resumed = evaluate(tmp_path, ready(llama), data(sets))
    assert len(asked.taken()) == TOTAL - 5
    close(whole.records, resumed.records)


def test_a_test_stopped_after_its_last_answer(llama, sets, tmp_path, asked, monkeypatch):
    network = ready(llama)
    whole = evaluate(tmp_path / "whole", network, data(sets))

    def stop(*_):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(answering, "write_records", stop)
        with pytest.raises(InterruptedError):
            evaluate(tmp_path, network, data(sets))
    asked.taken()
    resumed = evaluate(tmp_path, network, data(sets))
    assert len(asked.taken()) == 1  # Lightning does not come to the end of a test without a batch
    close(whole.records, resumed.records)
    assert resumed.results["n"] == {"test": TOTAL}


@pytest.mark.parametrize(
    "change",
    ["weights", "protocol", "limit", "rows", "dtype", "base"],
)
def test_answers_of_something_else_are_not_taken(llama, sets, tmp_path, asked, change):
    interrupted(tmp_path, ready(llama), data(sets))
    asked.taken()
    options, network, folder = {}, ready(llama, seed=4 if change == "weights" else 3), sets
    if change == "protocol":
        options = {"protocol": "strict"}
    if change == "limit":
        options = {"test_limit": 6}
    if change == "rows":
        folder = write_sets(tmp_path / "others", COUNTS, seed=1)
    if change == "dtype":
        network = ready(llama, base_dtype="bfloat16")
    if change == "base":  # in the same folder
        base = save_tiny(tmp_path / "base")
        interrupted(tmp_path / "b", ready(base), data(sets))
        save_tiny(tmp_path / "base", seed=5)
        asked.taken()
        evaluate(tmp_path / "b", ready(base), data(sets))
    else:
        evaluate(tmp_path, network, data(folder, **options))
    assert len(asked.taken()) == (10 if change == "limit" else TOTAL)


def test_a_tied_head_that_was_trained_decides_too(sets, tmp_path, asked):
    """Its weight has the name of the embeddings."""
    folder = save_tiny(tmp_path / "base", tie_word_embeddings=True)

    def network(seed):
        one = module(folder)
        one.adapter_injection = AdapterInjection(PERA(rank=2), QV, ["lm_head"]).injector()
        one.configure_model()
        one.model.lm_head.weight.data[7, 3] += seed
        return one

    options = {"trainable": ["lm_head"]}
    interrupted(tmp_path, network(0), data(sets), **options)
    asked.taken()
    evaluate(tmp_path, network(1), data(sets), **options)
    assert len(asked.taken()) == TOTAL


def test_a_test_after_a_fit_is_the_same_test(llama, sets, tmp_path, asked):
    """What the data module has read for the training changes no answer."""
    datamodule = data(sets)
    datamodule.trainer = SimpleNamespace(lightning_module=ready(llama), fast_dev_run=True)
    datamodule.setup("fit")
    interrupted(tmp_path, ready(llama), datamodule)
    asked.taken()
    evaluate(tmp_path, ready(llama), data(sets, batching="random", max_length=77))
    assert len(asked.taken()) == TOTAL - 6


def test_some_batches_are_not_a_complete_test(llama, sets, tmp_path, asked):
    network = ready(llama)
    part = evaluate(tmp_path, network, data(sets), limit_test_batches=1)  # of each set
    assert part.results["complete"] is False
    assert part.results["n"] == {"test": 6}
    asked.taken()
    whole = evaluate(tmp_path, network, data(sets))
    assert len(asked.taken()) == TOTAL - 6
    assert whole.results["complete"] is True


def test_the_same_test_twice(llama, sets, tmp_path, asked):
    network, datamodule = ready(llama), data(sets)
    kept = []
    for _ in range(2):
        kept.append(evaluate(tmp_path, network, datamodule))
        assert len(asked.taken()) == TOTAL
    assert without_time(kept[0].records) == without_time(kept[1].records)
    assert kept[0].scores == kept[1].scores
