"""The benchmarks, at a size that takes no time: they run, and their numbers hang together."""

import importlib
import json

import pytest
import torch

from tests.run_helpers import QUICKSTART, ROOT


@pytest.fixture(autouse=True)
def where_they_lie(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # as Python does for a script


def load(name):
    return importlib.import_module(name)


# ---- memory of the loss ---------------------------------------------------------------------------------------------

SIZES = {"vocabulary": 300, "hidden": 8, "examples": 2, "length": 16, "answer_length": 4}


def sizes(dtype=torch.bfloat16, **changes):
    results = load("loss_memory").measure(**{**SIZES, **changes}, dtype=dtype)
    return [row["saved_bytes"] for row in results]


def test_label_only_logits_keep_less():
    plain, chunked, label_plain, label_chunked = sizes()
    assert label_chunked < label_plain < chunked < plain
    # B T V in float32, and in bfloat16; with labels only the share of labelled tokens of it.
    logits = 2 * 16 * 300
    assert plain == pytest.approx(4 * logits, rel=0.05)
    assert chunked == pytest.approx(2 * logits, rel=0.05)
    assert label_plain == pytest.approx(plain / 4, rel=0.05)
    assert label_chunked == pytest.approx(chunked / 4, rel=0.05)


def test_the_share_of_labels_decides():
    assert sizes(answer_length=2)[3] == pytest.approx(sizes(answer_length=4)[3] / 2, rel=0.05)
    assert sizes(answer_length=2)[:2] == sizes(answer_length=4)[:2]


def test_a_storage_is_counted_once_and_parameters_never():
    module = load("loss_memory")
    weight, x = torch.ones(3, 5), torch.ones(2, 5, requires_grad=True)

    def loss():
        y = x.exp()  # saves y
        return (y * y).sum() + (y @ weight.T).sum()  # saves y twice, and weight

    assert module.saved_bytes(loss, apart=[weight]) == y_bytes(x)
    assert module.saved_bytes(loss) == y_bytes(x) + weight.numel() * 4


def y_bytes(x):
    return x.numel() * 4


def test_the_memory_table_and_file(tmp_path, capsys):
    words = [word for key, value in SIZES.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    result = load("loss_memory").main([*words, "--json", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["results"][0]["share"] == 1
    assert [row["logits"] for row in result["results"]] == [32, 32, 8, 8]
    printed = capsys.readouterr().out
    assert printed.startswith("| loss |")
    assert "label-only logits, summed_loss" in printed
    with pytest.raises(SystemExit):
        load("loss_memory").main(["--length", "4", "--answer-length", "4"])


# ---- speed of batches -----------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A set of 130 examples, of which 120 go to validation, in a folder."""
    folder = tmp_path / "data" / "openbookqa"
    folder.mkdir(parents=True)
    rows = [
        {
            "instruction": f"{'What is it? ' * (1 + k % 7)}\n\nAnswer format: answer1/answer2",
            "input": "",
            "output": f"the correct answer is answer{1 + k % 2}",
            "answer": f"answer{1 + k % 2}",
        }
        for k in range(130)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder.parent


def test_batches_of_the_same_examples(llama, data, tmp_path, capsys):
    words = [
        "--cache-dir",
        tmp_path / "cache",
        "--model",
        llama,
        "--data",
        data,
        "--train",
        "openbookqa",
        "--examples",
        10,
        "--batch-size",
        3,
        "--rank",
        2,
    ]
    result = load("text_batching").main([str(word) for word in [*words, "--length", 1024]])
    padded, grouped, packed = result["results"]
    assert [row["batches"] for row in result["results"]] == ["padded", "grouped", "packed"]
    assert result["settings"]["examples"] == 10
    assert padded["tokens"] == grouped["tokens"] == packed["tokens"]
    assert padded["padding"] > grouped["padding"] > packed["padding"] == 0
    assert padded["ratio"] == 1
    for row in (grouped, packed):
        assert row["summed_loss"] == pytest.approx(padded["summed_loss"], rel=1e-4)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / padded["tokens_per_second"])
    assert capsys.readouterr().out.count("| packed |") == 1


def test_ways_take_turns():
    module = load("text_batching")
    turns = module.take_turns({"a": [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}], "b": [{"n": 5}, {"n": 6}]})
    assert [(name, batch["n"]) for name, batch in turns] == [("a", 1), ("b", 5), ("a", 2), ("a", 3), ("b", 6), ("a", 4)]


# ---- loss curves ----------------------------------------------------------------------------------------------------


def test_loss_curves(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    curves = load("loss_curves")
    for name, start in (("lora", 3.0), ("pera", 2.0)):
        for begin in (0, 10):  # stopped, and resumed from an earlier step
            with SummaryWriter(tmp_path / name) as writer:
                for step in range(begin, begin + 15):
                    writer.add_scalar("train/loss", start / (1 + step), step)
    steps, values = curves.scalars(tmp_path / "lora", "train/loss")
    assert steps.tolist() == list(range(25))
    assert values[4] == pytest.approx(0.6)
    assert curves.smoothed(values, 2)[:3].tolist() == pytest.approx([3.0, 2.25, 1.25])
    last = curves.draw([tmp_path / "lora", tmp_path / "pera"], tmp_path / "losses.png", window=1)
    assert last == pytest.approx({"lora": 3 / 25, "pera": 2 / 25})
    assert (tmp_path / "losses.png").stat().st_size > 1000
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"has no train/loss"):
        curves.draw([tmp_path / "empty"], tmp_path / "none.png")


# ---- AuroRA's merges ------------------------------------------------------------------------------------------------


def test_the_merges_of_aurora(tmp_path, capsys):
    short = [
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "4",
        "--trainer.enable_progress_bar",
        "false",
    ]
    words = ["--config", str(QUICKSTART), "--seeds", "3", "--batches", "1", "--output", str(tmp_path), *short]
    load("aurora_merge").main(words)
    rows = json.loads((tmp_path / "results.json").read_text())["3"]
    assert list(rows) == ["dynamic", "static", "calibrated", "adapter removed"]
    assert rows["dynamic"]["change"] == 0 < rows["calibrated"]["change"] < rows["static"]["change"]
    assert "| calibrated | 0." in capsys.readouterr().out
    best = tmp_path / "seed_3" / "checkpoints" / "best.ckpt"
    written = best.stat().st_mtime_ns
    load("aurora_merge").main(words)  # what is trained is not trained again, and gives the same
    again = json.loads((tmp_path / "results.json").read_text())["3"]
    assert best.stat().st_mtime_ns == written
    assert [row["accuracy"] for row in again.values()] == [row["accuracy"] for row in rows.values()]


# ---- the fingerprint ------------------------------------------------------------------------------------------------


def test_a_fingerprint_reads_a_few_values_of_each_tensor(tmp_path):
    from tests.tasks.causal_lm.language_helpers import save_tiny

    own, large = load("fingerprint_cost").main(["--model", str(save_tiny(tmp_path / "tiny")), "--repeats", "1"])[
        "results"
    ]
    assert own["bytes_read"] <= own["tensors"] * 64 * 2
    assert (large["tensors"], round(large["bytes"] / 1e9, 2)) == (291, 16.06)
    assert large["bytes_read"] == 291 * 64 * 2
