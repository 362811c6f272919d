"""JSON files of whatever content: entries, or one line."""

import pytest

from pera_lightning.data.json_files import read_json
from pera_lightning.errors import DataError
from tests.tasks.causal_lm.text_helpers import one_line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
        ('{"a": 1}\n' + '{"a":' * 200_000, "its line 2 is not JSON: it is nested too deeply"),
        (f'[{{"a": {"9" * 10_000}}}]', "has 10000 digits"),
        (f'{{"a": {"9" * 10_000}}}', "its line 1 is not JSON"),
        ('[{"a": 1}', "is not a JSON list"),
    ],
)
def test_nesting_and_numbers_of_any_length_are_one_line(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_json(path)
    one_line(error, str(path), words)
    assert len(str(error.value)) < 400
