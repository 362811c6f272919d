"""LLM-Adapters' files: from a folder in either layout, downloaded once, counted."""

import json

import pytest

from pera_lightning.errors import ConfigurationError, DataError, UnknownNameError
from pera_lightning.tasks.causal_lm.commonsense import CommonsenseDataModule
from pera_lightning.tasks.causal_lm.protocols.commonsense import SETS
from tests.data import test_downloads
from tests.tasks.causal_lm.text_helpers import attached, entry, one_line, write_json

server = test_downloads.server


def folder_of(root, prefixed):
    sets, trained = (root / "dataset", root / "ft-training_set") if prefixed else (root, root)
    write_json(trained / "commonsense_15k.json", [entry(k) for k in range(30)])
    for name in ("ARC-Easy", "openbookqa"):
        write_json(sets / name / "train.json", [entry(k, instruction=f"{name} {k}") for k in range(12)])
        write_json(sets / name / "test.json", [entry(k, instruction=f"q {'long ' * (k % 3)}") for k in range(5)])
    return root


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_folder_in_both_layouts(tmp_path, prefixed):
    folder = folder_of(tmp_path, prefixed)
    data = CommonsenseDataModule(str(folder), train="commonsense_15k", test=["openbookqa", "ARC-Easy"])
    data.prepare_data()
    assert len(data.training_examples()) == 30
    with pytest.warns(UserWarning, match=r"test.json has 5 examples, openbookqa as published has 500"):
        counts = {name: len(rows) for name, rows in data.test_examples().items()}
    assert counts == {"openbookqa": 5, "ARC-Easy": 5}
    data = CommonsenseDataModule(str(folder), train=["ARC-Easy", "openbookqa"], test=["ARC-Easy"])
    rows = data.training_examples()
    assert [rows[0].id, rows[11].id, rows[12].id] == ["ARC-Easy/train/0", "ARC-Easy/train/11", "openbookqa/train/0"]
    assert rows[12].instruction == "openbookqa 0"
    assert len({row.id for row in rows}) == 24


def test_all_eight_sets_are_tested_by_default_in_the_order_of_the_papers():
    data = CommonsenseDataModule("somewhere")
    assert data.test == list(SETS)
    assert len(data.test) == 8
    assert data.train == ["commonsense_170k"]
    assert data.evaluation.name == "hira"


def test_the_questions_of_a_run(tmp_path):
    data = CommonsenseDataModule(str(folder_of(tmp_path, False)), test=["openbookqa"], protocol="score")
    attached(data, fn="test").setup("test")
    (loader,) = data.test_dataloader()
    questions = [question for batch in loader for question in batch]
    assert data.description()["test_ids"] == [f"openbookqa/test/{k}" for k in range(5)]
    assert questions[0].example.id == "openbookqa/test/2"
    assert questions[0].options == ("answer1", "answer2", "answer3", "answer4")


def downloading(server, tmp_path, **arguments):
    data = CommonsenseDataModule(download_from=f"{server.url}/", cache_dir=str(tmp_path / "cache"), **arguments)
    return attached(data, fn=arguments.pop("fn", "fit"))


def serve(server, place, entries):
    server.files[f"/{place}"] = json.dumps(entries).encode()


def test_what_a_run_needs_is_downloaded_once(server, tmp_path):
    serve(server, "dataset/openbookqa/train.json", [entry(k) for k in range(9)])
    serve(server, "dataset/openbookqa/test.json", [entry(k) for k in range(500)])
    serve(server, "dataset/ARC-Easy/test.json", [entry(k) for k in range(2376)])
    data = downloading(server, tmp_path, train=["openbookqa"], test=["openbookqa", "ARC-Easy"])
    data.prepare_data()
    assert server.asked == ["/dataset/openbookqa/train.json"]
    assert len(data.training_examples()) == 9
    data.trainer.state.fn = "test"
    for _ in range(2):
        data.prepare_data()
    assert server.asked[1:] == ["/dataset/openbookqa/test.json", "/dataset/ARC-Easy/test.json"]
    assert [len(rows) for rows in data.test_examples().values()] == [500, 2376]
    assert (tmp_path / "cache" / "llm_adapters" / "dataset" / "ARC-Easy" / "test.json.sha256").is_file()
    data.trainer = None
    data.prepare_data()
    assert len(server.asked) == 3


def test_other_numbers_of_examples_than_the_papers_are_refused(server, tmp_path):
    serve(server, "ft-training_set/commonsense_170k.json", [entry(k) for k in range(10)])
    serve(server, "dataset/openbookqa/test.json", [entry(k) for k in range(499)])
    data = downloading(server, tmp_path, test=["openbookqa"])
    data.trainer = None
    data.prepare_data()
    with pytest.raises(DataError) as error:
        data.training_examples()
    one_line(
        error, "commonsense_170k.json", "has 10 examples", "has 170420", "delete it and commonsense_170k.json.sha256"
    )
    with pytest.raises(DataError) as error:
        data.test_examples()
    one_line(error, "openbookqa/test.json", "has 499 examples", "has 500")


def test_a_download_that_was_changed_is_refused(server, tmp_path):
    serve(server, "dataset/openbookqa/train.json", [entry(k) for k in range(9)])
    data = downloading(server, tmp_path, train=["openbookqa"])
    with pytest.raises(ConfigurationError) as error:
        data.training_examples()
    one_line(error, "openbookqa/train.json is there after prepare_data()")
    data.prepare_data()
    path = tmp_path / "cache" / "llm_adapters" / "dataset" / "openbookqa" / "train.json"
    write_json(path, [entry(0)])
    for load in (data.training_examples, data.prepare_data):
        with pytest.raises(DataError) as error:
            load()
        one_line(error, str(path), "changed or damaged")


def test_a_set_the_mirror_lacks(server, tmp_path):
    with pytest.raises(DataError) as error:
        downloading(server, tmp_path, train=["piqa"]).prepare_data()
    one_line(error, f"{server.url}/dataset/piqa/train.json cannot be had (404 ")


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (
            UnknownNameError,
            {"train": "commonsense_17k"},
            ["train='commonsense_17k' does not exist", "closest:"],
        ),
        (UnknownNameError, {"test": ["arc-easy"]}, ["test='arc-easy' does not exist", "boolq", "closest: ARC-Easy"]),
        (UnknownNameError, {"test": ["commonsense_15k"]}, ["test='commonsense_15k' does not exist"]),
        (ConfigurationError, {"test": []}, ["test=[]: one set or more is needed"]),
        (ConfigurationError, {"train": ["boolq", "boolq"]}, ["train=['boolq', 'boolq']", "each once"]),
        (ConfigurationError, {"folder": "x", "download_from": "http://y"}, ["exclude each other"]),
    ],
)
def test_arguments_that_do_not_serve(kind, arguments, words):
    with pytest.raises(kind) as error:
        CommonsenseDataModule(**arguments)
    one_line(error, *words)


def test_folders_that_do_not_serve(tmp_path):
    with pytest.raises(DataError) as error:
        CommonsenseDataModule(str(tmp_path / "none")).training_examples()
    one_line(error, f"{tmp_path / 'none'} is not a folder")
    with pytest.raises(DataError) as error:
        CommonsenseDataModule(str(tmp_path), test=["piqa"]).test_examples()
    one_line(error, "has neither piqa/test.json nor dataset/piqa/test.json")
    write_json(tmp_path / "piqa" / "test.json", [entry(0), {"instruction": "x"}])
    with pytest.raises(DataError) as error:
        CommonsenseDataModule(str(tmp_path), test=["piqa"]).test_examples()
    one_line(error, "example 1 of", "piqa/test.json: text is needed as 'answer'")
