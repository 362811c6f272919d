"""Tasks, files and examples of GLUE's data: what is read, and what is refused in a line that says which row and why."""

import csv
import json

import numpy as np
import pytest

from pera_lightning import GLUEDataModule
from pera_lightning.data.batching import IGNORE
from pera_lightning.errors import ConfigurationError, DataError, UnknownNameError
from pera_lightning.tasks.sequence_classification.sources import GLUESource
from pera_lightning.tasks.sequence_classification.tasks import TASKS, custom_task
from tests.tasks.causal_lm.text_helpers import one_line
from tests.tasks.sequence_classification.glue_helpers import pairs, write


def source(folder=None, name="custom", files=None, **options):
    defaults = {"text_columns": None, "label_column": "label", "regression": False}
    return GLUESource(name=name, folder=folder, files=files or {}, **{**defaults, **options})


def custom(tmp_path, rows, suffix=".csv", text_columns=("text",), **options):
    """A custom task whose training and validation rows are these."""
    path = tmp_path / f"rows{suffix}"
    path.write_text(rows, encoding="utf-8") if isinstance(rows, str) else write(path, rows)
    return source(files={"train": path, "validation": path}, text_columns=text_columns, **options)


def test_the_nine_tasks_have_the_labels_metrics_and_submissions_of_the_leaderboard():
    assert [*TASKS] == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    assert {name: task.num_labels for name, task in TASKS.items() if task.num_labels != 2} == {"stsb": 1, "mnli": 3}
    selection = {name: task.selection for name, task in TASKS.items()}
    assert {n: s for n, s in selection.items() if s != "accuracy"} == {"cola": "matthews", "stsb": "pearson"}
    assert all(task.selection in task.metrics for task in TASKS.values())
    assert [f for task in TASKS.values() for f in task.submission_files] == [
        *("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI")
    ]
    written = {name: [task.written(k) for k in range(task.num_labels)] for name, task in TASKS.items()}
    assert written["mnli"] == ["entailment", "neutral", "contradiction"]
    assert written["rte"] == written["qnli"] == ["entailment", "not_entailment"]
    assert all(written[name] == ["0", "1"] for name in ("cola", "sst2", "mrpc", "qqp", "wnli"))
    assert [TASKS["stsb"].written(v) for v in (-0.3, 2.34567, 7)] == ["0.000", "2.346", "5.000"]
    assert TASKS["stsb"].written(-0.0) == "0.000"


def test_predictions_of_ones_own_regression_keep_their_digits():
    task = custom_task(["text"], ())
    written = [task.written(np.float32(value).item()) for value in (0.00012, -3e-5, -0.0, 1234.5, 2)]
    assert written == ["0.00012", "-3e-05", "0.0", "1234.5", "2.0"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json"])
def test_files_of_every_kind_give_the_same_examples(tmp_path, suffix):
    rows = [{"text": "häh, ja", "label": "yes", "idx": 7}, {"text": "no 'thing'", "label": "no", "idx": 8}]
    made = custom(tmp_path, rows, suffix)
    got = made.examples("train")
    assert got.texts == (["häh, ja", "no 'thing'"],)
    assert made.task.class_names == ("no", "yes")
    assert got.labels.tolist() == [1, 0]
    assert got.ids == ["7", "8"]


def test_csv_has_quoted_fields_and_tsv_takes_quotes_as_they_are(tmp_path):
    quoted = custom(tmp_path, 'text,label\r\n"a, ""b""\nc",1\r\nd,0\r\n\r\n')
    assert quoted.examples("train").texts == (['a, "b"\nc', "d"],)
    plain = custom(tmp_path, '\ufefftext\tlabel\n"unbalanced\t1\nd"\t0\n', ".tsv")
    assert plain.examples("train").texts == (['"unbalanced', 'd"'],)


def test_a_field_of_a_csv_may_be_long(tmp_path):
    text = "word " * 50_000  # the csv module refuses more than 131,072 characters
    made = custom(tmp_path, f"text,label\n{text}end,1\nb,0\n")
    assert made.examples("train").texts == ([f"{text}end", "b"],)
    assert csv.field_size_limit() == 131_072  # of the process, and others'


def test_json_may_hold_line_separators_in_a_text(tmp_path):
    rows = "".join(
        json.dumps({"text": t, "label": k}, ensure_ascii=False) + "\n" for k, t in enumerate(["a\u2028b", "c"])
    )
    assert custom(tmp_path, rows, ".jsonl").examples("train").texts == (["a\u2028b", "c"],)


@pytest.mark.parametrize(
    ("values", "found", "names"),
    [
        (["10", "2", "10"], ["10", "2", "10"], ["2", "10"]),
        # Texts are names, whatever numbers they look like.
        (["01", "1", "001", "02"], ["01", "1", "001", "02"], ["001", "01", "1", "02"]),
        (["1.10", "1.1", "v1"], ["1.10", "1.1", "v1"], ["1.1", "1.10", "v1"]),
        ([" b ", "a", 3], ["b", "a", "3"], ["3", "a", "b"]),
        # Numbers of JSON are whole however they are written.
        ([2.0, 1, "2"], ["2", "1", "2"], ["1", "2"]),
        ([True, False, "True"], ["true", "false", "True"], ["True", "false", "true"]),
        # As a Mac writes it and others do.
        (["cafe\u0301", "caf\u00e9", "tea"], ["caf\u00e9", "caf\u00e9", "tea"], ["caf\u00e9", "tea"]),
    ],
)
def test_classes_are_those_of_training_in_their_order(tmp_path, values, found, names):
    made = custom(tmp_path, [{"text": "t", "label": value} for value in values], ".jsonl")
    assert [*made.task.class_names] == names
    assert [names[k] for k in made.examples("train").labels] == found


def test_numbers_with_a_fraction_are_names_in_a_csv_which_is_said(tmp_path):
    with pytest.warns(
        UserWarning, match=r"labels 1\.10, 2\.0 are taken as the names of 2 classes; set regression=True"
    ):
        made = custom(tmp_path, "text,label\na,1.10\nb,2.0\n").task
    assert made.class_names == ("1.10", "2.0")
    with pytest.raises(DataError, match=r"label 1\.5 is not a class.*regression=True"):
        _ = custom(tmp_path, [{"text": "t", "label": label} for label in (1.5, 2)], ".jsonl").task


def test_metrics_of_a_custom_task(tmp_path):
    for count, metrics in ((2, ("accuracy", "f1", "matthews")), (3, ("accuracy", "matthews"))):
        made = custom(tmp_path, [{"text": "t", "label": k} for k in range(count)])
        assert (made.task.metrics, made.task.selection) == (metrics, "accuracy")


def test_a_test_set_without_labels_or_some_has_minus_100(tmp_path):
    made = custom(tmp_path, [{"text": "t", "label": k} for k in range(2)])
    for rows, labels in (
        ([{"text": "t"}, {"text": "u"}], [IGNORE, IGNORE]),
        ([{"text": "t", "label": -1}, {"text": "u", "label": 1}], [IGNORE, 1]),
        ([{"text": "t", "label": None}, {"text": "u", "label": ""}], [IGNORE, IGNORE]),
    ):
        made.files["test"] = tmp_path / "test.jsonl"
        write(made.files["test"], rows)
        got = made.examples("test")
        assert got.labels.tolist() == labels
        assert got.labelled == (IGNORE not in labels)


def test_minus_one_is_a_label_of_ones_own_regression_and_none_of_stsb(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": -1.0}]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    made = source(tmp_path, "stsb")
    assert made.examples("test").labels.tolist() == [IGNORE]
    with pytest.raises(DataError, match=r"label -1\.0; allowed: numbers from 0 to 5"):
        made.examples("train")
    own = custom(tmp_path, rows, ".jsonl", ("sentence1",), regression=True)
    assert own.examples("train").labels.tolist() == [-1.0]
    assert own.examples("train").labels.dtype == np.float32


def test_a_pair_of_glue_may_lack_one_text_and_is_counted_but_not_both(tmp_path):
    rows = pairs(3)
    write(tmp_path / "train.jsonl", [{**rows[0], "sentence2": ""}, *rows[1:]])
    assert source(tmp_path, "rte").examples("train").empty == 1
    write(tmp_path / "train.jsonl", [{**rows[0], "sentence2": " ", "sentence1": ""}, *rows[1:]])
    with pytest.raises(DataError, match=r"row 0 .*'sentence1' is empty"):
        source(tmp_path, "rte").examples("train")
    own = custom(tmp_path, "a,b,label\nx,,1\ny,z,0\n", text_columns=("a", "b"))
    with pytest.raises(DataError, match=r"row 0 of .*'b' is empty"):
        own.examples("train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": 2}, ["row 3", "label 2", "0 (entailment), 1 (not_entailment)"]),
        ({"label": -2}, ["row 3", "label -2", "0 (entailment)"]),
        ({"label": 3.8}, ["row 3", "label 3.8", "0 (entailment)"]),
        ({"label": -1}, ["row 3", "label -1", "0 (entailment)"]),
        ({"label": None}, ["row 3", "label None", "0 (entailment)"]),
        ({"label": "entailment"}, ["row 3", "'entailment'", "0 (entailment)"]),
        ({"sentence1": None}, ["row 3", "'sentence1'", "empty"]),
        ({"sentence2": float("nan")}, ["row 3", "'sentence2'", "nan", "not text"]),
        ({"sentence2": "\ud800x"}, ["'\\ud800'", "lone surrogate"]),
        ({"idx": "\ud800x"}, ["'\\ud800'", "lone surrogate"]),
        ({"label": "\ud800x"}, ["'\\ud800'", "lone surrogate"]),
        ({"label": 10**400}, ["row 3", "label 1000", "0 (entailment)"]),
        ({"sentence2": 5}, ["row 3", "'sentence2'", "5", "not text"]),
        ({"idx": 1}, ["row 3", "has idx=1, as row 1 has"]),
        ({"idx": None}, ["row 3", "has nothing in 'idx'"]),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_what_is_allowed(tmp_path, change, words):
    rows = pairs(6)
    rows[3].update(change)
    write(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError) as error:
        source(tmp_path, "rte").examples("train")
    one_line(error, str(tmp_path / "train.jsonl"), *words)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ("text,label\na,1\nb,0,c\n", {}, ["line 3", "3 fields", "header 2"]),
        ("text,label\na,1\nb\n", {}, ["line 3", "1 fields", "header 2"]),
        ('text,label\n"a,1\nb,0\n', {}, ["damaged", "line"]),
        ("text,label\n", {}, ["no rows"]),
        ("", {}, ["no rows"]),
        ("text,text,label\na,b,1\n", {}, ["column text twice"]),
        ("txt,label\na,1\nb,0\n", {}, ["no column 'text'", "txt, label", "closest: txt"]),
        ("text,lable\na,1\nb,0\n", {}, ["no column 'label'", "text, lable", "closest: lable"]),
        ("text,label\n ,1\nb,0\n", {}, ["row 0", "'text' is empty"]),
        ("text,label\na,\nb,0\n", {}, ["row 0", "label ''", "not a class"]),
        ("text,label\na,-1\nb,1\n", {}, ["row 0", "label '-1'", "unlabelled", "from 0", "names"]),
        (f"text,label\na,{'9' * 5000}\nb,1\n", {"regression": True}, ["row 0", "label '999", "finite"]),
        ("text,label\na,1e39\nb,1\n", {"regression": True}, ["row 0", "'1e39'", "32 bits"]),
        ("text,label\na,nan\nb,1\n", {"regression": True}, ["row 0", "'nan'", "finite"]),
        ("text,label\na,1\nb,1\n", {}, ["1 different labels in 2 rows", "two classes or more"]),
        ("text,label\na,x\nb,2\n", {"regression": True}, ["row 0", "'x'", "finite numbers"]),
        ("text,label\na,-100\nb,2\n", {"regression": True}, ["row 0", "except -100"]),
        (
            "".join(["text,label\n", *(f"a,name {k}\n" for k in range(150))]),
            {},
            ["150 different labels", "label_column"],
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_explained(tmp_path, rows, options, words):
    with pytest.raises(DataError) as error:
        custom(tmp_path, rows, **options).examples("train")
    one_line(error, "rows.csv", *words)


@pytest.mark.parametrize("number", [10**400, -(10**400), 1e39])
def test_a_number_that_float32_cannot_hold_is_refused(tmp_path, number):
    rows = [{"text": "a", "label": 1.5}, {"text": "b", "label": number}]
    with pytest.raises(DataError) as error:
        custom(tmp_path, rows, ".jsonl", regression=True).examples("train")
    one_line(error, "row 1", "32 bits")


def test_validation_labels_that_training_lacks_are_named(tmp_path):
    made = custom(tmp_path, "text,label\na,x\nb,y\n")
    made.files["validation"] = tmp_path / "other.csv"
    made.files["validation"].write_text("text,label\na,x\nb,z\n")
    with pytest.raises(DataError) as error:
        made.examples("validation")
    one_line(error, "row 1", "'z'", "allowed: x, y")


def test_columns_are_listed_where_none_is_named(tmp_path):
    with pytest.raises(ConfigurationError) as error:
        _ = custom(tmp_path, "question,answer,label\na,b,1\n", text_columns=None).task
    one_line(error, "text_columns", "question, answer, label")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["train.jsonl"], ["no validation.jsonl", "it has train.jsonl"]),
        ([], ["no validation.jsonl", "it has nothing"]),
    ],
)
def test_a_folder_without_the_file_lists_what_it_has(tmp_path, files, words):
    for name in files:
        write(tmp_path / name, pairs(3))
    with pytest.raises(DataError) as error:
        source(tmp_path, "rte").examples("validation")
    one_line(error, *words)


def test_files_of_a_folder_that_nothing_reads_are_named(tmp_path):
    for name in ("train.jsonl", "train.csv", "validation.csv", "dev.tsv", "test.parquet"):
        write(tmp_path / name, pairs(4))
    with pytest.warns(
        UserWarning, match="3 file.s. under .* are not read: 1 .tsv .dev.tsv., 1 .parquet .*1 .csv .train"
    ):
        source(tmp_path, "rte").examples("train")


def test_missing_folders_files_and_odd_kinds(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        source(tmp_path / "none", "rte").examples("train")
    with pytest.raises(DataError, match="cannot be read"):
        _ = source(files={"train": tmp_path / "none.csv"}, text_columns=("t",)).task
    with pytest.raises(DataError, match=r"\.jsonl, \.json, \.csv, \.tsv, not \.xlsx"):
        _ = source(files={"train": tmp_path / "rows.xlsx"}, text_columns=("t",)).task
    with pytest.raises(ConfigurationError, match="give validation_file"):
        source(files={"train": tmp_path / "a.csv"}, text_columns=("t",), regression=True).examples("validation")
    (tmp_path / "validation.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"validation\.jsonl has no examples"):
        source(tmp_path, "rte").examples("validation")
    (tmp_path / "validation.jsonl").write_text("[1, 2]")
    with pytest.raises(DataError, match=r"row 0 .* is int; an object"):
        source(tmp_path, "rte").examples("validation")


@pytest.mark.parametrize(
    ("task", "options", "kind", "words"),
    [
        ("rtf", {}, UnknownNameError, ["unknown task 'rtf'", "cola, sst2", "closest: rte"]),
        ("STS-B", {}, UnknownNameError, ["'STS-B'", "closest: stsb"]),
        ("rte", {"split_protocol": "redd"}, UnknownNameError, ["'redd'", "full_validation, red", "closest: red"]),
        ("rte", {"batching": "packed"}, UnknownNameError, ["batching='packed'", "grouped, random"]),
        ("rte", {"train_file": "a.csv"}, ConfigurationError, ["train_file", "task=custom only"]),
        ("rte", {"text_columns": ["a"], "regression": True}, ConfigurationError, ["text_columns, regression"]),
        ("custom", {}, ConfigurationError, ["train_file"]),
        (
            None,
            {"folder": "x", "train_file": "a.csv"},
            ConfigurationError,
            ["train_file", "no folder"],
        ),
        ("custom", {"train_file": "a.csv", "text_columns": ["a", "b", "c"]}, ConfigurationError, ["one column"]),
        ("custom", {"train_file": "a.csv", "text_columns": ["a", "a"]}, ConfigurationError, ["one column"]),
        ("rte", {"split_protocol": "own_test"}, ConfigurationError, ["own_test", "hidden", "red"]),
        (
            "custom",
            {"train_file": "a.csv", "split_protocol": "own_test"},
            ConfigurationError,
            ["own_test", "as test_file"],
        ),
        ("rte", {"max_length": 0}, ConfigurationError, ["max_length=0: an integer of at least 1"]),
        ("rte", {"train_limit": 0}, ConfigurationError, ["train_limit=0: an integer of at least 1"]),
        ("rte", {"split_seed": -1}, ConfigurationError, ["split_seed=-1: an integer of at least 0"]),
    ],
)
def test_wrong_arguments_are_refused_before_any_data_is_read(task, options, kind, words):
    with pytest.raises(kind) as error:
        GLUEDataModule(task, **options)
    one_line(error, *words)
