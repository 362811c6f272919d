"""Prompts for a subject: our own, a file of one a line, and the form of the DreamBooth data set's file in miniature."""

import pytest

from pera_lightning.errors import ConfigurationError, DataError
from pera_lightning.tasks.dreambooth.subject_prompts import PROMPTS, read_prompts

CALL = ".format(unique_token, class_token)"
MINIATURE = f"""Classes

subject_name,class
tin_robot,toy
tin_robot_cat,toy
grey_cat,cat
grey_cat2,cat
hound,dog
old_boot,walking boot

Prompts

Object Prompts

prompt_list = [
'a {{0}} {{1}} under a ladder'{CALL},
"a {{0}} {{1}} on the baker's shelf"{CALL},
'a striped {{0}} {{1}}'{CALL}
]

Live Subject Prompts

prompt_list = [
'a {{0}} {{1}} under a ladder'{CALL},
'a {{0}} {{1}} asleep in a drawer'{CALL}
]
"""
OBJECT = ["a {} under a ladder", "a {} on the baker's shelf", "a striped {}"]
LIVE = ["a {} under a ladder", "a {} asleep in a drawer"]


def written(tmp_path, text, **options):
    file = tmp_path / "prompts.txt"
    file.write_bytes(text.encode(**options))
    return file


def test_our_own_list():
    assert len(PROMPTS) == len({*PROMPTS}) == 10
    for template in PROMPTS:
        assert template.count("{}") == 1
        assert "sks dog" in template.replace("{}", "sks dog")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig"])
def test_one_prompt_a_line(tmp_path, end, coding):
    lines = ["# by hand", "", "  a photo of {} in a café ", "tag #3 on {}", "   # not this one", "a plain wall"]
    file = written(tmp_path, end.join(lines), encoding=coding)
    assert read_prompts(file) == ["a photo of {} in a café", "tag #3 on {}", "a plain wall"]
    assert read_prompts(str(file), "sks dog") == read_prompts(file)


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("grey_cat2", LIVE),
        ("grey cat", LIVE),
        ("sks cat", LIVE),
        ("Sks  DOG", LIVE),
        ("hound", LIVE),
        ("tin_robot", OBJECT),
        ("sks toy", OBJECT),
        ("sks walking boot", OBJECT),
        ("sks tin robot cat", OBJECT),
    ],
)
def test_the_data_sets_file_by_subject(tmp_path, subject, expected):
    assert read_prompts(written(tmp_path, MINIATURE), subject) == expected


@pytest.mark.parametrize("subject", ["sks gnu", "polecat", "cat toys", "", None])
def test_a_subject_of_no_known_class(tmp_path, subject):
    with pytest.raises(
        ConfigurationError, match=r"does not say whether .* is an object or alive.*end the subject with"
    ):
        read_prompts(written(tmp_path, MINIATURE), subject)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (f"ladder'{CALL}", "ladder'.format(unique_token)", "line 16: .* is not as in the data set"),
        ("'a {0} {1} under", "'a {1} {0} under", "line 16: .* is not as in the data set"),
        ("'a {0} {1} under", "'a {0} {1} {2} under", r"line 16: .* has braces that are not \{\}"),
        ("Object Prompts", "Things", "line 16: .* is not as in the data set"),
        ("prompt_list = [\n'a {0} {1} under a ladder'", "prompt_list = [\na {0} {1} under a ladder", "line 16"),
    ],
)
def test_a_changed_file_of_the_data_set(tmp_path, old, new, words):
    assert old in MINIATURE
    with pytest.raises(DataError, match=words):
        read_prompts(written(tmp_path, MINIATURE.replace(old, new)), "sks toy")


def test_a_list_that_is_cut_off(tmp_path):
    with pytest.raises(DataError, match="no prompts for live subjects"):
        read_prompts(written(tmp_path, MINIATURE.partition("Live")[0]), "sks cat")


@pytest.mark.parametrize("line", ["a {0} {1} on ice", "a {subject}", "a {", "a } b", "a { } c"])
def test_other_braces_are_no_subject(tmp_path, line):
    with pytest.raises(DataError, match=r"prompts.txt, line 2: .* has braces that are not \{\}; write \{\} alone"):
        read_prompts(written(tmp_path, f"a good {{}}\n{line}\n"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        DataError, match=r"nothing.txt is not a file: give prompts as a list, or a file with one prompt a line"
    ):
        read_prompts(tmp_path / "nothing.txt")
    with pytest.raises(DataError, match="is not a file: give prompts"):
        read_prompts(tmp_path)
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_prompts(written(tmp_path, "a café {}", encoding="latin-1"))
    for empty in ("", "\n\n", "# a {}\n"):
        with pytest.raises(DataError, match="has no prompts; write one a line"):
            read_prompts(written(tmp_path, empty))
