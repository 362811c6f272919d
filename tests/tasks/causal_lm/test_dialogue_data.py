"""Dialogues: ParlAI's text and JSON lines say the same, every reply is an example."""

import json

import pytest

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.causal_lm.dialogue import DialogueDataModule, read_replies
from pera_lightning.tasks.causal_lm.protocols.dialogue import render
from tests.tasks.causal_lm.text_helpers import attached, one_line, write_json

FIRST = {
    "id": 0,
    "persona": ["i like tea.", "i have a dog."],
    "turns": [
        {"partner": "hi ! how are you ?", "self": "fine , drinking tea ."},
        {"partner": "alone ?", "self": "no , with my dog ."},
    ],
}
SECOND = {"persona": ["i sing."], "turns": [{"partner": "__SILENCE__", "self": "do you sing ?"}]}
PARLAI = """1 your persona: i like tea.
2 your persona: i have a dog.
3 hi ! how are you ?\tfine , drinking tea .\t\tyes .|no .|fine , drinking tea .
4 alone ?\tno , with my dog .\t\tyes .|no , with my dog .
1 your persona: i sing.
2 __SILENCE__\tdo you sing ?
"""


def text_file(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_every_reply_is_an_example_and_both_formats_agree(tmp_path):
    lines = read_replies(write_json(tmp_path / "train.jsonl", [FIRST, SECOND], lines=True))
    text = read_replies(text_file(tmp_path / "train.txt", PARLAI))
    windows = read_replies(text_file(tmp_path / "train.txt", PARLAI.replace("\n", "\r\n")))
    assert lines == text == windows
    assert [row.id for row in lines] == ["train/0/0", "train/0/1", "train/1/0"]
    assert [row.output for row in lines] == ["fine , drinking tea .", "no , with my dog .", "do you sing ?"]
    assert all(row.output == row.answer and row.set == "convai2" and row.input == "" for row in lines)
    history = [("hi ! how are you ?", "fine , drinking tea .")]
    assert lines[1].instruction == render(["i like tea.", "i have a dog."], history, "alone ?")
    assert lines[0].instruction == render(["i like tea.", "i have a dog."], [], "hi ! how are you ?")
    assert "no , with my dog ." not in lines[1].instruction


def test_a_folder_with_the_usual_names(tmp_path):
    write_json(tmp_path / "valid.jsonl", [FIRST])
    text_file(tmp_path / "train_self_original.txt", PARLAI)
    data = DialogueDataModule(str(tmp_path))
    assert [row.id for row in data.training_examples()] == [f"train_self_original/{k}" for k in ("0/0", "0/1", "1/0")]
    assert [row.id for row in data.test_examples()["convai2"]] == ["valid/0/0", "valid/0/1"]
    other = text_file(tmp_path / "other.txt", PARLAI)
    data = DialogueDataModule(str(tmp_path), test=str(other))
    assert len(data.test_examples()["convai2"]) == 3


def test_a_run(tmp_path):
    many = [{**FIRST, "turns": FIRST["turns"] * 6}] * 2
    path = write_json(tmp_path / "valid.jsonl", many, lines=True)
    data = DialogueDataModule(
        train=str(path), test=str(path), validation_size=4, batch_size=20, max_length=2000, cache_dir=str(tmp_path)
    )
    attached(data).setup("fit")
    data.setup("test")
    (batch,) = data.train_dataloader()
    assert len(batch["input_ids"]) == 20
    learned = {data.tokenizer.decode(row[row != -100]) for row in batch["labels"]}
    assert learned == {f"{turn['self']}</s>" for turn in FIRST["turns"]}
    # Longest first in the batches; in the files' order after that, the tenth turn after the ninth.
    assert data.description()["test_ids"] == [f"valid/{d}/{t}" for d in (0, 1) for t in range(12)]
    questions = [q for loader in data.test_dataloader() for b in loader for q in b]
    assert {q.example.id for q in questions[:2]} == {"valid/0/11", "valid/1/11"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["has no dialogue with a reply", "ParlAI"]),
        ("1 your persona: i sing.\n", ["has no dialogue with a reply"]),
        ("your persona: i sing.\n", ["line 1 is not in ParlAI's form"]),
        ("2 your persona: i sing.\n", ["line 1 is not in ParlAI's form, the next number or 1"]),
        (PARLAI.replace("4 alone", "5 alone"), ["line 4 is not in ParlAI's form, the next number or 1"]),
        (
            PARLAI.replace("alone ?\tno", "alone ? no").split("\t\tyes .|no ,")[0] + "\n",
            ["line 4", "no reply after a tab"],
        ),
        ("1 partner's persona: i sing.\n", ["line 1 has the partner's persona", "valid_self_original.txt"]),
        ("1 hi\thello\n", ["from line 1 of", "turn 0", "lacks a persona"]),
        ("1 your persona: a.\n2 hi\t \n", ["turn 0", "the reply is empty"]),
        ("1 your persona: a.\n2  \thello\n", ["turn 0", "lacks a last utterance"]),
        (json.dumps(FIRST), ["line 1 is not in ParlAI's form", "JSON lines"]),
    ],
)
def test_text_that_does_not_serve(tmp_path, text, words):
    path = text_file(tmp_path / "f.txt", text)
    with pytest.raises(DataError) as error:
        read_replies(path)
    one_line(error, str(path), *words)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("x", ["dialogue 1 of", "'persona', a list of sentences"]),
        ({**FIRST, "persona": "i sing."}, ["'persona', a list"]),
        ({**FIRST, "persona": []}, ["dialogue 1 of", "turn 0", "lacks a persona"]),
        ({**FIRST, "turns": None}, ["'turns', a list"]),
        ({**FIRST, "turns": [{"partner": "hi"}]}, ["'partner' and 'self'"]),
        ({**FIRST, "turns": [{"partner": "hi", "self": ""}]}, ["turn 0: the reply is empty"]),
    ],
)
def test_json_that_does_not_serve(tmp_path, entry, words):
    path = write_json(tmp_path / "f.jsonl", [FIRST, entry], lines=True)
    with pytest.raises(DataError) as error:
        read_replies(path)
    one_line(error, str(path), *words)


def test_files_that_are_missing_say_where_they_come_from(tmp_path):
    origin = ("comes with ParlAI", "train_self_original.txt", '"persona"')
    with pytest.raises(ConfigurationError) as error:
        DialogueDataModule()
    one_line(error, "give folder, or train and test", *origin)
    with pytest.raises(DataError) as error:
        DialogueDataModule(str(tmp_path)).training_examples()
    one_line(error, "train: no such file", f"{tmp_path}/train.jsonl", *origin)
    with pytest.raises(DataError) as error:
        DialogueDataModule(test=str(tmp_path / "none.txt")).test_examples()
    one_line(error, "test: no such file", "none.txt", *origin)
    with pytest.raises(DataError) as error:
        DialogueDataModule(test="x.txt").training_examples()
    one_line(error, "train: no such file", "folder is not given", *origin)


def test_metrics_that_need_files_are_measured_where_asked_for(tmp_path, monkeypatch):
    asked = []
    module = "pera_lightning.tasks.causal_lm.protocols.dialogue"
    monkeypatch.setattr(f"{module}.meteor", lambda records: 12.0)
    monkeypatch.setattr(f"{module}.bertscore", lambda records, model: asked.append(model) or 34.0)
    records = [{"id": "a", "set": "convai2", "output": "hi", "prediction": "hi", "answer": "hi", "correct": False}]
    plain = DialogueDataModule(str(tmp_path)).evaluation.summarise(records)
    more = DialogueDataModule(str(tmp_path), meteor=True, bertscore_model="org/encoder").evaluation.summarise(records)
    assert more == {**plain, "meteor": 12.0, "bertscore": 34.0}
    assert asked == ["org/encoder"]
