"""Testing a language model through the trainer: results, predictions, several processes, prompts."""

import json
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoTokenizer

from pera_lightning.adapters import PERA, AuroRA, LinearProbe
from pera_lightning.adapters.aurora import static_inference
from pera_lightning.data.tokenization import tokenizer_key
from pera_lightning.errors import ConfigurationError
from pera_lightning.tasks.causal_lm.protocols.commonsense import first_match
from pera_lightning.tasks.causal_lm.statistics import average_of, wilson_interval
from tests.tasks.causal_lm.evaluator_helpers import (
    COUNTS,
    TOTAL,
    by_hand,
    close,
    data,
    evaluate,
    interrupted,
    left,
    partials,
    ready,
)
from tests.tasks.causal_lm.language_helpers import (
    CONTEXT,
    examples,
    fit,
    loader,
    make_trainer,
    module,
    padded,
    save_tiny,
)

# ---- results --------------------------------------------------------------------------------------------------------


def test_results_and_predictions(llama, sets, tmp_path, capsys):
    network = ready(llama)
    found = evaluate(tmp_path, network, data(sets))
    expected = by_hand(network, sets)
    assert set(found.records) == {"score/ARC-Easy.jsonl", "score/boolq.jsonl"}
    assert len({prediction for prediction, _ in expected.values()}) > 2
    accuracies = []
    for row in found.results["sets"]["test"]:
        name = row["set"]
        records = found.records[f"score/{name}.jsonl"]
        assert [r["id"] for r in records] == [f"{name}/test/{k}" for k in range(COUNTS[name])]
        assert [(r["prediction"], r["answer"]) for r in records] == [expected[r["id"]] for r in records]
        right = sum(prediction == answer for prediction, answer in (expected[r["id"]] for r in records))
        assert sum(r["correct"] for r in records) == right
        accuracies.append(right / COUNTS[name])
        assert row["n"] == COUNTS[name]
        assert isinstance(row["n"], int)
        assert row["accuracy"] == pytest.approx(accuracies[-1])
        assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(wilson_interval(right, COUNTS[name]))
        assert row["not_found"] == 0
        assert row["seconds"] == pytest.approx(sum(r["seconds"] for r in records))
        assert row["tokens_per_second"] == pytest.approx(sum(r["tokens"] for r in records) / row["seconds"])
        assert found.scores[f"test_accuracy/{name}"] == pytest.approx(accuracies[-1])
    mean = sum(accuracies) / 2
    assert found.results["metrics"]["test/accuracy"] == pytest.approx(mean)
    assert found.scores["test/accuracy"] == pytest.approx(mean)
    assert found.results["average"] == {"test": average_of(found.results["sets"]["test"])}
    assert found.results["average"]["test"]["accuracy"] == found.results["metrics"]["test/accuracy"]
    assert json.loads((tmp_path / "predictions" / "score" / "results.json").read_text()) == found.results
    out = capsys.readouterr().out
    assert "test, protocol score" in out
    assert f"average {mean:.4f}" in " ".join(out.split())
    assert str(tmp_path / "results.json") in out


def test_the_scores_are_shown_once(llama, sets, tmp_path, capsys):
    """Returned by the trainer, there for callbacks and loggers, and not in a table of Lightning's too."""
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = make_trainer(tmp_path, logger=logger)
    returned = trainer.test(ready(llama), datamodule=data(sets))
    names = {"test/accuracy", "test_accuracy/ARC-Easy", "test_accuracy/boolq"}
    assert all(scores.keys() == names for scores in returned)
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == returned[0]
    assert names <= set((tmp_path / "metrics.csv").read_text().splitlines()[0].split(","))
    out = capsys.readouterr().out
    assert "DataLoader 0" not in out
    assert out.count(f"{returned[0]['test/accuracy']:.4f}") == 1


def test_protocols_keep_their_results(llama, sets, tmp_path):
    """`results.json` is the latest one; each protocol's lies with its predictions."""
    network = ready(llama)
    kept = {name: evaluate(tmp_path, network, data(sets, name)).results for name in ("score", "strict")}
    assert left(tmp_path)["results"] == kept["strict"]
    for name, results in kept.items():
        assert results["protocol"]["evaluation"]["name"] == name
        assert json.loads((tmp_path / "predictions" / name / "results.json").read_text()) == results


def test_predictions_are_of_one_evaluation(llama, sets, tmp_path):
    """A later test with other sets and without a static row leaves nothing of the first."""
    network = ready(llama, AuroRA(rank=2))
    evaluate(tmp_path, network, data(sets), AuroRA(rank=2))
    assert (tmp_path / "predictions" / "score_static").exists()
    evaluate(tmp_path, ready(llama), data(sets, test=["boolq"]))
    assert set(left(tmp_path)["records"]) == {"score/boolq.jsonl"}
    assert sorted(p.name for p in (tmp_path / "predictions" / "score").iterdir()) == ["boolq.jsonl", "results.json"]


def test_results_say_what_was_measured_and_how(llama, sets, tmp_path):
    found = evaluate(tmp_path, ready(llama, attn_implementation="eager"), data(sets, "strict", test_limit=3))
    results, protocol = found.results, found.results["protocol"]
    assert results["method"] == PERA(rank=2).spec()
    assert results["n"] == {"test": 6}
    assert results["complete"] is True
    assert results["inference"] == {"test": "linear"}
    assert results["seconds"] == pytest.approx(sum(row["seconds"] for row in results["sets"]["test"]))
    assert protocol["task"] == "causal_lm"
    assert protocol["model_name"] == llama
    assert (protocol["base_dtype"], protocol["precision"]) == ("float32", "32-true")
    assert protocol["attn_implementation"] == "eager"
    assert protocol["checkpoint"] is protocol["training"] is None
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert protocol["tokenizer"] == {"name_or_path": llama, "key": tokenizer_key(tokenizer)}
    assert protocol["evaluation"]["name"] == "strict"
    assert protocol["evaluation"]["test_limit"] == 3
    assert "### Response:" in protocol["evaluation"]["evaluation_prompt"]


def test_results_say_how_the_checkpoint_was_trained(llama, sets, tmp_path):
    """Trained on answers in packed batches, tested by another protocol, from the file."""
    keep = ModelCheckpoint(tmp_path, filename="best", enable_version_counter=False)
    trained_on = data(sets, "llm_adapters", batching="packed", train_fraction=0.5)
    fit(tmp_path, module(llama), trained_on, callbacks=[keep], enable_checkpointing=True, limit_train_batches=1)
    path = str(tmp_path / "best.ckpt")
    make_trainer(tmp_path).test(module(llama), datamodule=data(sets), ckpt_path=path, verbose=False)
    protocol = left(tmp_path)["results"]["protocol"]
    assert protocol["checkpoint"] == path
    assert protocol["evaluation"]["name"] == "score"
    assert protocol["training"]["name"] == "llm_adapters"
    assert (protocol["training"]["batching"], protocol["training"]["train_fraction"]) == ("packed", 0.5)


@pytest.mark.parametrize("protocol", ["llm_adapters", "hira", "strict", "score"])
def test_every_protocol_and_batch_sizes(llama, sets, tmp_path, protocol):
    network = ready(llama)
    one = evaluate(tmp_path / "one", network, data(sets, protocol, eval_batch_size=1))
    many = evaluate(tmp_path / "many", network, data(sets, protocol, eval_batch_size=4))
    close(one.records, many.records)
    for record in many.records[f"{protocol}/ARC-Easy.jsonl"]:
        if protocol != "score":
            assert record["tokens"] <= 32
        if protocol == "hira":
            assert record["prediction"] == first_match(record["output"], SimpleNamespace(set="ARC-Easy"))
        assert record["correct"] == (record["prediction"] == record["answer"])


def test_aurora_has_two_rows(llama, sets, tmp_path):
    network = ready(llama, AuroRA(rank=2))
    found = evaluate(tmp_path, network, data(sets), AuroRA(rank=2))
    assert set(found.records) == {f"score{s}/{name}.jsonl" for s in ("", "_static") for name in COUNTS}
    dynamic = by_hand(network, sets)
    with static_inference(network):
        static = by_hand(network, sets)
    scores = [[r["scores"] for r in found.records[f"{folder}/ARC-Easy.jsonl"]] for folder in ("score", "score_static")]
    assert scores[0] != scores[1]
    for folder, expected in (("score", dynamic), ("score_static", static)):
        for name in COUNTS:
            records = found.records[f"{folder}/{name}.jsonl"]
            assert [(r["prediction"], r["answer"]) for r in records] == [expected[r["id"]] for r in records]
    assert found.results["inference"] == {
        "test": "dynamic, the paper's AuroRA-D",
        "test_static": "static, the paper's row AuroRA",
    }
    assert found.results["n"] == {"test": TOTAL, "test_static": TOTAL}
    assert {"test/accuracy", "test_static/accuracy", "test_static_accuracy/boolq"} <= set(found.scores)


def test_an_unadapted_model(llama, sets, tmp_path):
    network = module(llama)
    found = evaluate(tmp_path, network, data(sets), LinearProbe(), trainable=["lm_head"])
    expected = by_hand(network, sets)
    records = [r for rows in found.records.values() for r in rows]
    assert all((r["prediction"], r["answer"]) == expected[r["id"]] for r in records)


# ---- several processes ----------------------------------------------------------------------------------------------


def longest(records):
    """The seconds of the process that answered longest."""
    return max(sum(r["seconds"] for r in records if r["rank"] == rank) for rank in (0, 1))


@pytest.mark.filterwarnings("error:.*sync_dist=True.*", "error:.*it is recommended to use .Trainer.devices=1.*")
def test_two_processes_answer_each_question_once(llama, sets, tmp_path):
    """Seven and four questions: one rank is given a question that the other has too."""
    options = {"devices": 2, "strategy": "ddp_fork"}
    one = evaluate(tmp_path / "one", ready(llama), data(sets))
    two = evaluate(tmp_path / "two", ready(llama), data(sets), **options)
    close(one.records, two.records)
    assert two.results["n"] == {"test": TOTAL}
    assert two.results["complete"] is True
    assert two.results["metrics"] == pytest.approx(one.results["metrics"])
    records = [r for rows in two.records.values() for r in rows]
    assert {r["rank"] for r in records} == {0, 1}
    assert two.results["seconds"] == pytest.approx(longest(records))
    for row in two.results["sets"]["test"]:
        own = two.records[f"score/{row['set']}.jsonl"]
        assert row["seconds"] == pytest.approx(longest(own))
        assert row["tokens_per_second"] == pytest.approx(sum(r["tokens"] for r in own) / longest(own))


def test_two_processes_go_on_with_what_there_is(llama, sets, tmp_path, capfd):
    interrupted(tmp_path, ready(llama), data(sets))
    whole = evaluate(tmp_path / "whole", ready(llama), data(sets))
    capfd.readouterr()
    two = evaluate(tmp_path, ready(llama), data(sets), devices=2, strategy="ddp_fork")
    close(whole.records, two.records)
    assert capfd.readouterr().out.count("6 questions were answered by an interrupted run") == 1
    assert not partials(tmp_path)


# ---- prediction -----------------------------------------------------------------------------------------------------


def test_predict_writes_predictions(llama, sets, tmp_path):
    network = ready(llama)
    whole = evaluate(tmp_path / "test", network, data(sets))
    trainer = make_trainer(tmp_path)
    returned = trainer.predict(network, datamodule=data(sets))
    found = left(tmp_path)
    assert found["results"] is None
    expected = {name.replace("score/", "score_predict/"): rows for name, rows in whole.records.items()}
    close(expected, found["records"])  # beside what a test has left, not in its place
    assert sorted(r["id"] for batches in returned for rows in batches for r in rows) == sorted(
        r["id"] for rows in whole.records.values() for r in rows
    )


# ---- prompts and bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["strict", "score"])
def test_prompts_longer_than_the_context_lose_their_middle(sets, tmp_path, asked, capsys, protocol):
    """The first token, and the end with the question's last words and the response marker, stay."""
    whole = ready(save_tiny(tmp_path / "long"))
    evaluate(tmp_path / "a", whole, data(sets, protocol, eval_batch_size=1))
    full = asked.taken()
    context = 28 + (16 if protocol == "strict" else 4)
    short = ready(save_tiny(tmp_path / "short", max_position_embeddings=context))
    found = evaluate(tmp_path / "b", short, data(sets, protocol, eval_batch_size=1))
    count = 0
    for one, other in zip(full, asked.taken(), strict=True):
        pairs = [(one, other)] if protocol == "strict" else [(a[0], b[0]) for a, b in zip(one, other, strict=True)]
        for before, after in pairs:
            room = 28 if protocol == "strict" else context + 1  # the last token of an option is not read
            assert after == (before if len(before) <= room else [before[0], *before[len(before) - room + 1 :]])
        if protocol == "score":
            assert [len(b[0]) - b[1] for b in other] == [5] * len(other)
        count += len(pairs[0][0]) > len(pairs[0][1])
    assert 0 < count < TOTAL
    assert found.results["shortened"] == count
    assert f"{count} prompts were longer than the model's context; their ends were kept" in capsys.readouterr().out


@pytest.mark.parametrize(("protocol", "context"), [("strict", 17), ("score", 5)])
def test_a_context_without_room_is_refused(sets, tmp_path, protocol, context):
    network = ready(save_tiny(tmp_path / "base", max_position_embeddings=context))
    with pytest.raises(ConfigurationError, match=f"the model's context of {context} tokens has no room for a prompt"):
        evaluate(tmp_path, network, data(sets, protocol))


def test_a_test_without_a_protocol_says_so(llama, tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigurationError, match=r"testing a language model needs a data module with a protocol, e.g"):
        trainer.test(module(llama), loader([padded(examples([(CONTEXT, 3)]))]), verbose=False)


def test_a_fast_dev_run_writes_nothing(llama, sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluate(tmp_path, ready(llama), data(sets), fast_dev_run=True)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
