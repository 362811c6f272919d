"""An interrupted test goes on where it stopped, with the answers of the same test alone."""

import re
import shutil
import tracemalloc
from types import SimpleNamespace

import pytest
import torch

from pera_lightning import AdapterInjection
from pera_lightning.adapters import PERA, AuroRA
from pera_lightning.tasks.causal_lm import evaluator as evaluation
from pera_lightning.tasks.causal_lm.evaluation_key import hashed
from pera_lightning.training import results
from tests.tasks.causal_lm.evaluator_helpers import (
    COUNTS,
    TOTAL,
    close,
    data,
    evaluate,
    interrupted,
    left,
    partials,
    ready,
    without_time,
)
from tests.tasks.causal_lm.language_helpers import QV, module, randomise, save_tiny, write_sets

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
    assert not partials(folder)


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
        patch.setattr(evaluation, "write_predictions", stop)
        with pytest.raises(InterruptedError):
            evaluate(tmp_path, network, data(sets))
    asked.taken()
    resumed = evaluate(tmp_path, network, data(sets))
    assert asked.taken() == []
    close(whole.records, resumed.records)
    assert resumed.results["n"] == {"test": TOTAL}


@pytest.mark.parametrize(
    "change",
    ["weights", "protocol", "limit", "rows", "dtype", "base", "tokenizer", "versions"],
)
def test_answers_of_something_else_are_not_taken(llama, sets, tmp_path, asked, monkeypatch, change):
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
    if change == "tokenizer":  # of the same name, where two words have changed places
        other = shutil.copytree(llama, tmp_path / "tokenizer")
        text = (other / "tokenizer.json").read_text()
        swapped = {'"q1"': '"q2"', '"q2"': '"q1"'}
        (other / "tokenizer.json").write_text(re.sub('"q[12]"', lambda match: swapped[match[0]], text))
        options = {"tokenizer": str(other)}
    if change == "versions":
        known = results.versions()
        monkeypatch.setattr(results, "versions", lambda: {**known, "transformers": "1.2.3"})
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


def test_another_end_of_texts_is_another_test(llama, sets, tmp_path, asked):
    """Where texts are generated; options that are scored have no end."""
    for protocol, taken in (("strict", 0), ("score", 6)):
        folder = tmp_path / protocol
        interrupted(folder, ready(llama), data(sets, protocol))
        asked.taken()
        network = ready(llama)
        network.model.generation_config.eos_token_id = [1, 9]
        evaluate(folder, network, data(sets, protocol))
        assert len(asked.taken()) == TOTAL - taken


def test_the_key_is_made_once_a_test(llama, sets, tmp_path, asked, monkeypatch):
    """And anew for the same module with other weights, after an exception too."""
    network, made = ready(llama), []
    key = evaluation.Evaluator._key

    def counted(self):
        made.append(key(self))
        return made[-1]

    monkeypatch.setattr(evaluation.Evaluator, "_key", counted)
    interrupted(tmp_path, network, data(sets))
    evaluate(tmp_path, network, data(sets))
    assert len(made) == 2
    assert made[0] == made[1]
    randomise(network, seed=8)
    asked.taken()
    interrupted(tmp_path, network, data(sets))
    randomise(network, seed=9)
    evaluate(tmp_path, network, data(sets))
    assert len(asked.taken()) == 6 + TOTAL
    assert len(made) == 4
    assert len(set(made)) == 3


def test_the_key_copies_no_weights():
    weights = torch.zeros(1 << 22)
    tracemalloc.start()
    try:
        hashed([("weights", weights), ("none", weights[:0]), ("low", weights[:7].bfloat16())], [])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_is_hashed_decides():
    one = torch.arange(6.0)
    several = [[("a", one)], [("b", one)], [("a", one.bfloat16())], [("a", one.flip(0))], [("a", one[::2])], []]
    assert len({hashed(tensors, ["facts"]) for tensors in several}) == len(several)
    assert hashed([("a", one)], ["facts"]) == hashed([("a", one.clone())], ["facts"])
    assert hashed([("a", one)], ["facts"]) != hashed([("a", one)], ["others"])


@pytest.mark.parametrize("limit", [1, 0.7])
@pytest.mark.parametrize("command", ["test", "predict"])
def test_some_batches_are_whole_as_they_are(llama, sets, tmp_path, asked, command, limit):
    """The integer 1 is one batch of each set; the same twice, and no other test is the shorter for it."""
    network = ready(llama)
    interrupted(tmp_path, network, data(sets), command=command, batches=1)
    name = "score" if command == "test" else "score_predict"
    asked.taken()
    for _ in range(2):
        part = evaluate(tmp_path, network, data(sets), command=command, **{f"limit_{command}_batches": limit})
        count = len(asked.taken())
        assert count == (6 if limit == 1 else 9)
        found = [r for file, rows in part.records.items() if file.startswith(f"{name}/") for r in rows]
        assert len(found) == count
        assert partials(tmp_path) == [f"{name}.partial"]
        if command == "test":
            assert part.results["complete"] is False
            assert part.results["n"] == {"test": count}
    whole = evaluate(tmp_path, network, data(sets), command=command)
    assert len(asked.taken()) == TOTAL - 3
    assert not partials(tmp_path)
    if command == "test":
        assert whole.results["complete"] is True


@pytest.mark.parametrize("command", ["test", "predict"])
def test_tests_and_predictions_are_apart(llama, sets, tmp_path, asked, command):
    """What an interrupted one has left is neither taken nor removed by the other."""
    other = {"test": "predict", "predict": "test"}[command]
    network = ready(llama)
    interrupted(tmp_path, network, data(sets), command=command)
    asked.taken()
    evaluate(tmp_path, network, data(sets), command=other)
    assert len(asked.taken()) == TOTAL
    assert partials(tmp_path) == [{"test": "score.partial", "predict": "score_predict.partial"}[command]]
    evaluate(tmp_path, network, data(sets), command=command)
    assert len(asked.taken()) == TOTAL - 6
    assert {file.partition("/")[0] for file in left(tmp_path)["records"]} == {"score", "score_predict"}


def test_what_others_left_is_named(llama, sets, tmp_path, capsys):
    interrupted(tmp_path, ready(llama, seed=4), data(sets))
    (path,) = tmp_path.glob("predictions/score.partial-*")
    network = ready(llama)
    interrupted(tmp_path, network, data(sets), command="predict")
    text = f"Interrupted with other weights or settings, to go on with or to delete: {path}\n"
    evaluate(tmp_path, network, data(sets), limit_test_batches=1)
    assert text not in capsys.readouterr().out
    evaluate(tmp_path, network, data(sets))
    assert text in capsys.readouterr().out
    assert path.exists()


def test_the_same_test_twice(llama, sets, tmp_path, asked):
    network, datamodule = ready(llama), data(sets)
    kept = []
    for _ in range(2):
        kept.append(evaluate(tmp_path, network, datamodule))
        assert len(asked.taken()) == TOTAL
    assert without_time(kept[0].records) == without_time(kept[1].records)
    assert kept[0].scores == kept[1].scores
