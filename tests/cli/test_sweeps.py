"""The pure parts of a sweep: its words, names, statistics, and what a folder says of a run."""

from __future__ import annotations

import csv
import io
import json
import os
import re

import pytest

from pera_lightning.cli.sweeps import choice, plan, summary
from pera_lightning.cli.sweeps import folder as sweep_folder
from pera_lightning.cli.sweeps.running import run_words
from pera_lightning.errors import PeraError

# ---- words ----------------------------------------------------------------------------------------------------------


def test_a_sweep_s_words_are_told_from_those_of_its_runs():
    words = ["--config", "c.yaml", "--seeds", "42,043", "--model.lr", "1", "--grid", "a.b=1,2", "d=x", "--dry_run"]
    request = plan.read_request(
        [*words, "--output=out", "--data.split_seed", "{seed}", "--grid", 'e.init_args.f=["q,"]']
    )
    assert request.words == ["--config", "c.yaml", "--model.lr", "1", "--data.split_seed", "{seed}"]
    assert request.seeds == (42, 43)
    assert request.grid == {"a.b": ("1", "2"), "d": ("x",), "e.f": ('["q,"]',)}
    assert (request.output, request.dry_run) == ("out", True)
    assert plan.with_seed(request.words, 7)[-1] == "7"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1,2", ["1", "2"]),
        ('["q", "v"],["k"]', ['["q", "v"]', '["k"]']),
        ('{"a": [1, 2], "b": "]"}, 3', ['{"a": [1, 2], "b": "]"}', "3"]),
        ("'a,b',c", ["a,b", "c"]),
        ("it's,x", ["it's", "x"]),
        ("[1,2", None),
        ('"a,b', None),
        ("1,,2", ["1", "", "2"]),
        ("a photo of {},a dog", ["a photo of {}", "a dog"]),
        ("train[:10%],train[:20%]", ["train[:10%]", "train[:20%]"]),
        ("re:^a.*b$,attn.qkv", ["re:^a.*b$", "attn.qkv"]),
    ],
)
def test_values_are_parted_at_the_outer_commas(text, parts):
    assert plan.split_values(text) == parts


WRONG = {
    "seeds that are words": (
        ["--seeds", "a,b"],
        "--seeds a,b: different whole numbers from 0 to 4294967295 are needed",
    ),
    "half a seed": (["--seeds", "1.5"], "--seeds 1.5: different whole numbers"),
    "a negative seed": (["--seeds", "-1,2"], "--seeds -1,2: different whole numbers"),
    "a seed too large": (["--seeds", "4294967296"], "--seeds 4294967296: different whole numbers"),
    "no seed": (["--seeds="], "--seeds : different whole numbers"),
    "a comma too many": (["--seeds", "1,2,"], "--seeds 1,2,: different whole numbers"),
    "a seed twice": (["--seeds", "1,2,01"], "--seeds 1,2,01: different whole numbers"),
    "seeds without a value": (["--seeds", "--grid", "a=1"], "--seeds: expected one argument"),
    "grid without a value": (["--grid"], "--grid: expected one argument"),
    "grid without =": (["--grid", "model.lr"], "--grid model.lr: a key and its values are needed, such as model.lr=0"),
    "an empty grid": (["--grid", "model.lr="], "--grid model.lr=: a key and its values are needed"),
    "an empty value": (["--grid", "model.lr=1,,2"], "--grid model.lr=1,,2: one of its values is empty"),
    "a bracket left open": (["--grid", "a=[1,2"], "--grid a=[1,2: one of its values is empty, or has brackets"),
    "a value twice": (["--grid", "model.lr=1e-3,0.001"], "--grid model.lr=1e-3,0.001: a value is given twice"),
    "a key twice": (["--grid", "model.lr=1", "model.init_args.lr=2"], "--grid model.lr is given twice"),
    "a key given and swept": (
        ["--model.init_args.lr=3", "--grid", "model.lr=1"],
        "--model.lr is given, and swept",
    ),
    "a grid of seeds": (["--grid", "seed_everything=1,2"], "--seed_everything is set by sweep: give --seeds"),
    "a seed for all": (["--seed_everything", "3"], "--seed_everything is set by sweep: give --seeds"),
    "a checkpoint": (["--ckpt_path=last"], "--ckpt_path is set by sweep: leave it out"),
    "a folder for all": (
        ["--trainer.default_root_dir", "x"],
        "is set by sweep: give --output",
    ),
    "a logger's folder": (["--trainer.logger.init_args.save_dir", "x"], "is set by sweep: give --output"),
    "a grid of configs": (["--grid", "config=a,b"], "--grid config: not one value of the config"),
}


@pytest.mark.parametrize(("words", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_words_are_one_line(words, expected):
    with pytest.raises(PeraError, match=re.escape(expected)):
        plan.read_request(words)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_runs_are_all_combinations_in_the_given_order():
    found = plan.runs({"model.lr": ("1e-3", "1"), "adapter.method.rank": ("8",)}, [2, 1])
    assert [run.name for run in found] == [
        "lr=0.001_rank=8_seed=2",
        "lr=0.001_rank=8_seed=1",
        "lr=1_rank=8_seed=2",
        "lr=1_rank=8_seed=1",
    ]
    assert plan.value_words(found[0].values) == ["--model.lr=1e-3", "--adapter.method.rank=8"]
    assert [run.name for run in plan.runs({}, [3])] == ["seed3"]


def test_names_tell_keys_and_values_apart():
    assert plan.short_keys(["model.lr", "adapter.lr", "rank"]) == {
        "model.lr": "model.lr",
        "adapter.lr": "adapter.lr",
        "rank": "rank",
    }
    one, other = (plan.run_name({"targets": text}, 0) for text in ('["q/v"]', '["q*v"]'))
    assert one != other
    for name in (one, other, plan.run_name({f"key{k}": "x" * 300 for k in range(9)}, 12)):
        assert re.fullmatch(r"[\w.=+-]{1,200}", name), name
    with pytest.raises(PeraError, match="differ in capitals alone cannot have a folder each"):
        plan.runs({"a": ("x", "X")}, [0])


def test_a_run_has_its_folder_by_its_first_logger(tmp_path):
    folder = tmp_path / "out" / "seed1"
    run = plan.Run("seed1", {"model.lr": "1"}, 1)
    names = {"save_dir": str(tmp_path), "name": "out", "version": "seed1"}

    def words(loggers):
        made = plan.Plan([run], (1,), ["--a", "{seed}"], {}, {}, {"lr=1": loggers})
        return run_words(made, run, folder)

    shared = ["--a", "1", "--seed_everything=1", "--model.lr=1", f"--trainer.default_root_dir={folder}"]
    assert words([]) == shared
    one = {"class_path": "x.CSVLogger", "init_args": {"save_dir": "runs", "prefix": "p"}}
    *others, logger = words([one, {"class_path": "y.Z"}])
    assert others == shared
    first, second = json.loads(logger.removeprefix("--trainer.logger="))
    assert first["init_args"] == {"prefix": "p", **names}
    assert second == {"class_path": "y.Z"}


# ---- sums -----------------------------------------------------------------------------------------------------------


def record(lr, seed, selected, tested, *, status="complete", mode="max", on_test=False):
    made = sweep_folder.new_record(plan.Run(f"{lr}_{seed}", {"model.lr": lr}, seed))
    made |= {"status": status, "metrics": {"test/accuracy": tested}, "trainable_parameters": 10}
    return made | {
        "selection": {"name": "val/accuracy", "mode": mode, "score": selected},
        "selected_on_test": on_test,
    }


def test_statistics_are_those_of_a_sample():
    of = summary.statistics_of([1.0, 2.0, 6.0])
    assert of == {
        "n": 3,
        "not_finite": 0,
        "mean": 3.0,
        "median": 2.0,
        "sd": pytest.approx(7**0.5),
        "min": 1.0,
        "max": 6.0,
    }
    assert summary.statistics_of([2.0])["sd"] is None


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("odd", [NAN, INF, -INF, None], ids=str)
def test_statistics_leave_out_what_is_no_number_and_count_it(odd):
    of = summary.statistics_of([1.0, odd, 3.0])
    assert (of["n"], of["not_finite"], of["mean"], of["min"], of["max"]) == (2, 1, 2.0, 1.0, 3.0)
    assert of["sd"] == pytest.approx(2**0.5)
    none = dict.fromkeys(("mean", "median", "sd", "min", "max"))
    assert summary.statistics_of([odd, odd]) == {"n": 0, "not_finite": 2, **none}


def test_a_table_tells_how_many_runs_are_no_number():
    records = [record("1", seed, score, score) for seed, score in enumerate((0.5, None, None))]
    lines = summary.table(summary.summarise([*records, record("2", 0, None, None)])).splitlines()
    assert lines[1].split()[3:] == ["1", "of", "3", "0.5000", "±", "-", "0.5000", "0.5000", "0.5000"]
    assert lines[3].split()[3:] == ["0", "of", "1", "-", "±", "-", "-", "-", "-"]
    assert summary.scores(records[1]) == "val/accuracy is not a number, test/accuracy is not a number"
    assert summary.without_number(records[:1]) == ""
    told = summary.without_number([*records, record("2", 0, None, None, status="failed")])
    assert "statistics: val/accuracy of 1_1, 1_2; test/accuracy of 1_1, 1_2." in told


def test_the_best_setting_is_chosen_by_selection_never_by_test():
    records = [record("1", 0, 0.9, 0.1), record("1", 1, 0.8, 0.2), record("2", 0, 0.7, 0.95)]
    rows = summary.summarise([*records, record("2", 1, 1.0, 1.0, status="failed")])
    assert [row["seeds"] for row in rows] == [[0, 1], [0]]
    assert rows[0]["metrics"]["test/accuracy"]["mean"] == pytest.approx(0.15)
    best, text = choice.best_settings(rows)
    assert best == [{"of": None, "values": {"model.lr": "1"}, "mean": pytest.approx(0.85)}]
    assert text == ("Best by the mean of val/accuracy (max): lr=1, 0.8500; the settings have unlike numbers of runs.")
    low = summary.summarise([record("1", 0, 0.9, 0.1, mode="min"), record("2", 0, 0.7, 0.2, mode="min")])
    assert choice.best_settings(low)[0][0]["values"] == {"model.lr": "2"}
    same = summary.summarise([record("1", 0, 0.9, 0.9, on_test=True), record("2", 0, 0.7, 0.7, on_test=True)])
    assert "val/accuracy is measured on the test set itself" in choice.best_settings(same)[1]


def test_nothing_is_best_where_nothing_was_selected():
    one = summary.summarise([record("1", 0, 0.9, 0.1)])
    assert choice.best_settings(one) == ([], "")
    bare = summary.summarise([{**record(lr, 0, 1, 1), "selection": None} for lr in "12"])
    assert choice.best_settings(bare)[0] == []
    odd = summary.summarise([record(lr, 0, None, 0.1) for lr in "12"])
    assert choice.best_settings(odd) == (
        [],
        "No setting is named best: each has a run whose val/accuracy is not a number.",
    )


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_setting_with_a_run_that_is_no_number_is_not_chosen(mode):
    records = [record(*values, mode=mode) for values in (("1", 0, 0.9, 0.1), ("1", 1, None, 0.1), ("2", 0, 0.5, 0.1))]
    best, text = choice.best_settings(summary.summarise([*records, record("2", 1, 0.5, 0.1, mode=mode)]))
    assert [one["values"] for one in best] == [{"model.lr": "2"}]
    assert text == (
        f"Best by the mean of val/accuracy ({mode}): lr=2, 0.5000; not chosen from, as val/accuracy of a run is not a "
        "number: lr=1."
    )


def of_data(values, score, **facts):
    return {**record("1", 0, score, score), "values": values, "protocol": facts}


def glue(task, method, score, metric="accuracy"):
    facts = {"selection": metric, "data.task": task, "data.split_seed": 42, "data.sha256.validation": task}
    return of_data({"data.task": task, "adapter.method": method}, score, task="sequence_classification", **facts)


def test_scores_of_unlike_tasks_are_not_compared():
    runs = [glue("rte", "PERA", 0.7), glue("rte", "LoRA", 0.6)]
    runs += [glue("stsb", "PERA", 0.8, "pearson"), glue("stsb", "LoRA", 0.9, "pearson")]
    best, text = choice.best_settings(summary.summarise([*runs, glue("cola", "LoRA", 0.95, "matthews")]))
    assert [(one["of"], one["values"]["adapter.method"]) for one in best] == [
        ("task=rte", "PERA"),
        ("task=stsb", "LoRA"),
    ]
    assert text.splitlines() == [
        "Best of task=rte by the mean of val/accuracy (max): task=rte, method=PERA, 0.7000.",
        "Best of task=stsb by the mean of val/accuracy (max): task=stsb, method=LoRA, 0.9000.",
    ]
    alone = summary.summarise([runs[0], runs[2]])
    assert choice.best_settings(alone) == ([], "No setting is named best: no two of them are of the same data.")


def test_settings_of_the_same_data_are_compared_whatever_option_of_the_data_is_swept():
    runs = [of_data({"data.max_length": n}, float(n), **{"data.task": "rte"}) for n in "12"]
    best, text = choice.best_settings(summary.summarise(runs))
    assert [one["values"] for one in best] == [{"data.max_length": "2"}]
    assert text.startswith("Best by the mean of ")


@pytest.mark.parametrize("key", ["data.dataset", "evaluation.task", "evaluation.name", "training.sha256.train"])
def test_data_are_told_by_what_any_data_module_says(key):
    facts = [{"data.dataset": "x", "evaluation.sha256.test": "y", **{key: name}} for name in "ab"]
    values = [{"data.any": name, "model.lr": lr} for name in "ab" for lr in "12"]
    runs = [of_data(one, float(one["model.lr"]), **facts[one["data.any"] == "b"]) for one in values]
    best, _ = choice.best_settings(summary.summarise(runs))
    assert [(one["of"], one["values"]["model.lr"]) for one in best] == [("any=a", "2"), ("any=b", "2")]


def test_data_that_tell_nothing_of_themselves_are_told_by_the_grid():
    runs = [of_data({"data.corpus": name, "model.lr": lr}, float(lr), task="x") for name in "ab" for lr in "12"]
    assert [one["of"] for one in choice.best_settings(summary.summarise(runs))[0]] == ["corpus=a", "corpus=b"]
    sizes = [of_data({"data.batch_size": n}, float(n), task="x") for n in "12"]
    assert len(choice.best_settings(summary.summarise(sizes))[0]) == 1


def test_data_that_no_grid_key_tells_are_named_by_what_differs():
    found = ["a", "a", "b" * 64, "b" * 64]
    runs = [of_data({"model.lr": str(k)}, k / 10, **{"data.sha256.test": one}) for k, one in enumerate(found)]
    of = [one["of"] for one in choice.best_settings(summary.summarise(runs))[0]]
    assert of == ["data.sha256.test=a", f"data.sha256.test={'b' * 12}"]


def test_the_table_and_the_csv_have_every_run():
    records = [record("1", 0, 0.9, 0.25), record("1", 1, 0.8, 0.75), record("2", 0, 0.5, 0.5, status="failed")]
    lines = summary.table(summary.summarise(records)).splitlines()
    assert lines[1].split() == [
        "lr=1",
        "val/accuracy",
        "(selection)",
        "2",
        *["0.8500", "±", "0.0707", "0.8500", "0.8000", "0.9000"],
    ]
    assert lines[2].split() == ["test/accuracy", "2", "0.5000", "±", "0.3536", "0.5000", "0.2500", "0.7500"]
    rows = list(csv.DictReader(io.StringIO(summary.as_csv(records))))
    assert [row["status"] for row in rows] == ["complete", "complete", "failed"]
    assert (rows[0]["lr"], rows[1]["selection_score"], rows[1]["test/accuracy"]) == ("1", "0.8", "0.75")


# ---- folders --------------------------------------------------------------------------------------------------------


def write(file, time, text="x"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    os.utime(file, (time, time))


def test_a_fit_is_finished_when_its_adapter_is_the_newest(tmp_path):
    assert not sweep_folder.fit_finished(tmp_path)
    write(tmp_path / "config.yaml", 10)
    write(tmp_path / "checkpoints" / "best.ckpt", 20)
    assert not sweep_folder.fit_finished(tmp_path)
    write(tmp_path / "adapter" / "adapter_config.json", 30)
    assert sweep_folder.fit_finished(tmp_path)
    write(tmp_path / "config.yaml", 40)  # another fit has begun, and not ended
    assert not sweep_folder.fit_finished(tmp_path)
    write(tmp_path / "adapter" / "adapter_config.json", 50)
    write(tmp_path / "checkpoints" / "last.ckpt", 60)
    assert not sweep_folder.fit_finished(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "predictions/score/results.json"])
def test_a_run_is_complete_with_the_results_that_were_written_down(tmp_path, name):
    write(tmp_path / "checkpoints" / "best.ckpt", 10)
    write(tmp_path / name, 20)
    file = sweep_folder.find_results(tmp_path)
    known = {"status": "complete", "results": name, "results_sha256": sweep_folder.digest(file)}
    assert sweep_folder.is_complete(tmp_path, known)
    assert not sweep_folder.is_complete(tmp_path, {**known, "status": "fitted"})
    assert not sweep_folder.is_complete(tmp_path, None)
    write(tmp_path / "checkpoints" / "best.ckpt", 30)  # trained anew
    assert not sweep_folder.is_complete(tmp_path, known)
    write(file, 40, "tested by hand with other words")
    assert not sweep_folder.is_complete(tmp_path, known)


def test_configs_are_compared_leaf_by_leaf():
    before = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert plan.differences(before, {"a": {"b": 1, "c": [1, 2]}}) == []
    assert plan.differences(before, {"a": {"b": 2, "c": [1]}}) == ["a.b is 2, and was 1", "a.c.1 is None, and was 2"]
