"""Examples of JSON files: both kinds of file, and every way in which a file or an example does not serve."""

import json

import pytest

from pera_lightning.data.json_files import read_json
from pera_lightning.errors import DataError
from pera_lightning.tasks.causal_lm.examples import digest, read_examples
from tests.tasks.causal_lm.text_helpers import entry, one_line, write_json


@pytest.mark.parametrize("lines", [False, True])
def test_examples_of_a_list_and_of_lines(tmp_path, lines):
    path = write_json(tmp_path / "test.json", [entry(0), entry(1, input="more", answer=576.0)], lines)
    first, second = read_examples(path, set_name="ARC-Easy", split="test")
    assert (first.id, first.set, first.answer) == ("ARC-Easy/test/0", "ARC-Easy", "answer1")
    assert (second.id, second.input, second.answer) == ("ARC-Easy/test/1", "more", "576.0")
    assert second.output == "the correct answer is answer2"


def test_separators_and_marks_that_json_lets_stand_in_a_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    path.write_text("\ufeff" + "\n".join(json.dumps({"t": t}, ensure_ascii=False) for t in texts) + "\r\n\n", "utf-8")
    assert [one["t"] for one in read_json(path)] == texts


def test_fields_that_are_not_needed_may_be_missing(tmp_path):
    path = write_json(tmp_path / "f.json", [{"instruction": "x", "answer": "answer1"}])
    (row,) = read_examples(path, set_name="s", split="test", needed=("instruction", "answer"))
    assert (row.output, row.input) == ("", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["has no examples"]),
        ("[]", ["has no examples"]),
        ("[1, 2", ["is not a JSON list"]),
        ('{"instruction": "x", "output": "y"}\n{oops}', ["its line 2 is not JSON"]),
        ("instruction,output\na,b", ["its line 1 is not JSON"]),
        ("[3]", ["example 0 of", "is int; an object with", "instruction, output"]),
        ('[{"instruction": "x"}]', ["example 0 of", "text is needed as 'output'", "there are instruction"]),
        ('[{"instruction": "x", "output": null}]', ["as 'output', which is None"]),
        ('[{"instruction": "x", "output": " "}]', ["example 0 of", "as 'output', which is ' '"]),
        ('[{"instruction": "x", "output": ["y"]}]', ["text is needed as 'output', which is ['y']"]),
        ('[{"instruction": "x", "output": "y", "answer": true}]', ["as 'answer', which is True"]),
    ],
)
def test_files_and_examples_that_do_not_serve(tmp_path, text, words):
    path = tmp_path / "file.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_examples(path, set_name="s", split="train")
    one_line(error, str(path), *words)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError) as error:
        read_json(tmp_path / "none.json")
    one_line(error, "none.json cannot be read: No such file")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(DataError) as error:
        read_json(tmp_path / "latin.json")
    one_line(error, "latin.json is not UTF-8 text", "byte 2")


def test_the_digest_sees_every_field_and_the_order(tmp_path):
    def of(*entries):
        return digest(read_examples(write_json(tmp_path / "f.json", entries), set_name="s", split="train"))

    plain = of(entry(0), entry(1))
    assert plain == of(entry(0), entry(1))
    others = [of(entry(1), entry(0)), of(entry(0)), *(of(entry(0), entry(1, **{f: "z"})) for f in entry(0))]
    assert len({plain, *others}) == 1 + len(others)
