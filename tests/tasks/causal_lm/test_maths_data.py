"""Word problems: three forms of example, from files and the hub."""

import warnings

import datasets
import pytest

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.causal_lm.maths import MathsDataModule, read_problems
from tests.tasks.causal_lm.text_helpers import attached, one_line, write_json

META = {
    "query": "How many?",
    "response": "2 and 3. The answer is: 5",
    "type": "GSM_Rephrased",
    "original_question": "?",
}
GSM = {"question": "How much?", "answer": "It is <<7*10=70>>70 and 2.\n#### 72"}
OURS = {"instruction": "How far?", "input": "", "output": "\nA: 12. The answer is 12.", "answer": 12.0}


@pytest.fixture
def hub(monkeypatch):
    """Answers `datasets.load_dataset` from memory; keeps what was asked for."""
    tables, asked = {}, []

    def load(repository, config_name=None, *, split):
        asked.append((repository, config_name, split))
        if repository == "org/several":
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']")
        if repository not in tables:
            raise datasets.exceptions.DatasetNotFoundError("it doesn't exist")
        return datasets.Dataset.from_list(tables[repository])

    monkeypatch.setattr(datasets, "load_dataset", load)
    tables["asked"] = asked
    return tables


@pytest.mark.parametrize(
    ("form", "question", "output", "answer"),
    [
        (META, "How many?", META["response"], "5"),
        (GSM, "How much?", GSM["answer"], "72"),
        (OURS, "How far?", OURS["output"], "12.0"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_three_forms(tmp_path, form, question, output, answer, split):
    path = write_json(tmp_path / "gsm.json", [form, form], lines=form is GSM)
    rows = read_problems(str(path), split)
    assert [row.id for row in rows] == [f"gsm/{split}/0", f"gsm/{split}/1"]
    assert (rows[0].instruction, rows[0].input, rows[0].output, rows[0].answer) == (question, "", output, answer)
    assert rows[0].set == "gsm"


def test_the_hub_by_default(hub):
    hub["meta-math/MetaMathQA"] = [{**META, "query": f"{k}?"} for k in range(5)]
    hub["openai/gsm8k"] = [GSM] * 3
    data = attached(MathsDataModule())
    data.prepare_data()
    assert hub["asked"] == [("meta-math/MetaMathQA", None, "train")]
    assert [row.instruction for row in data.training_examples()] == [f"{k}?" for k in range(5)]
    assert {name: len(rows) for name, rows in data.test_examples().items()} == {"gsm8k": 3}
    assert hub["asked"][-1] == ("openai/gsm8k", "main", "test")
    assert data.test_examples()["gsm8k"][2].id == "gsm8k/test/2"
    hub["asked"].clear()
    data.trainer.state.fn = "test"
    data.prepare_data()
    assert hub["asked"] == [("openai/gsm8k", "main", "test")]


def test_a_run_on_files_asks_nobody(hub, tmp_path):
    train = write_json(tmp_path / "train.jsonl", [{**META, "query": f"{k}?"} for k in range(9)], lines=True)
    test = write_json(tmp_path / "gsm8k.json", [GSM, OURS | {"instruction": "Ours"}][:1])
    data = MathsDataModule(train=str(train), test=str(test), validation_size=2, batch_size=7, cache_dir=str(tmp_path))
    attached(data)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert hub["asked"] == []
    (batch,) = data.train_dataloader()
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert data.tokenizer.decode(learned) == META["response"] + "</s>"
    assert data.description()["test_ids"] == ["gsm8k/test/0"]
    assert data.evaluation.name == "last_number"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("downloads/problems.json", "problems"),
        ("downloads/test.json", "maths"),
        ("AddSub/test.json", "AddSub"),
        ("AddSub/mine.json", "mine"),
    ],
)
def test_a_set_is_called_like_its_file_and_no_folder_that_it_lies_in(tmp_path, file, name):
    data = MathsDataModule(test=str(write_json(tmp_path / file, [GSM])))
    assert [*data.test_examples()] == [name]


def test_a_test_file_that_is_not_all_of_its_set_is_said(tmp_path):
    path = write_json(tmp_path / "gsm8k.json", [GSM] * 2)
    with pytest.warns(UserWarning, match=r"gsm8k.json has 2 examples, gsm8k as published has 1319"):
        MathsDataModule(test=str(path)).test_examples()
    path = write_json(tmp_path / "mine.json", [GSM] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MathsDataModule(test=str(path)).test_examples()


def test_answers_that_the_protocol_would_not_read_are_said(tmp_path):
    """A model that answers exactly like the file would be counted wrong."""
    answers = ["#### - 3", "#### 1_000", "#### 1.000.000", "#### 72", "#### -5", "#### 1,200"]
    path = write_json(tmp_path / "mine.json", [{"question": "x", "answer": f"So: {one}"} for one in answers])
    with pytest.warns(UserWarning, match=r"3 of 6 answers of mine .* protocol=last_number does not .*'- 3', '1_000', "):
        MathsDataModule(test=str(path)).test_examples()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MathsDataModule(test=str(path), protocol="last_written_number").test_examples()


@pytest.mark.parametrize(
    ("entries", "split", "words"),
    [
        ([GSM, {"question": "x"}], "test", ["example 1 of", "text is needed as 'question' and as 'answer'"]),
        ([META, {"query": "x", "response": ""}], "train", ["example 1 of", "text is needed as 'output'"]),
        ([OURS, {"instruction": "x", "output": "y"}], "test", ["example 1 of", "as 'answer'"]),
        ([OURS, {"instruction": "x", "answer": "3"}], "train", ["example 1 of", "as 'output'"]),
        ([{"problem": "x", "solution": "y"}], "train", ["has the columns problem, solution", "MetaMathQA"]),
        (["text"], "train", ["of no object"]),
        ([META, "text"], "train", ["example 1 of", "is str; an object with"]),
    ],
)
def test_examples_that_do_not_serve(tmp_path, entries, split, words):
    path = write_json(tmp_path / "rows.json", entries)
    with pytest.raises(DataError) as error:
        read_problems(str(path), split)
    one_line(error, str(path), *words)


@pytest.mark.parametrize("answer", ["no number", "so \\frac{1}{2}", "word " * 500])
def test_an_answer_that_is_not_a_number_is_named_before_the_test(tmp_path, answer):
    path = write_json(tmp_path / "rows.json", [GSM, {"question": "x", "answer": answer}])
    data = attached(MathsDataModule(test=str(path)), fn="test")
    with pytest.raises(DataError) as error:
        data.setup("test")
    one_line(error, "example rows/test/1 of rows", "is not a number")
    assert len(str(error.value)) < 400


def test_sources_that_are_none(hub, tmp_path):
    for argument in ("train", "test"):
        with pytest.raises(ConfigurationError) as error:
            MathsDataModule(**{argument: "gsm8k"})
        one_line(error, f"{argument}='gsm8k': a hub id like org/name")
    with pytest.raises(DataError) as error:
        MathsDataModule(train="meta/MetaMath").prepare_data()
    one_line(error, "data set meta/MetaMath on https://", "or give a file of JSON or JSON lines")
    with pytest.raises(DataError) as error:
        MathsDataModule(test=str(tmp_path / "none.json")).test_examples()
    one_line(error, "none.json cannot be read: No such file")
    with pytest.raises(DataError) as error:
        read_problems("org/several", "test")
    one_line(error, "available configs: ['a', 'b']", "ORG/NAME:CONFIGURATION")
    hub["org/odd"] = [{"text": "x"}]
    with pytest.raises(DataError) as error:
        read_problems("org/odd", "train")
    one_line(error, "data set org/odd, split 'train' has the columns", "known are")
