"""The files that GLUE's leaderboard takes."""

from pera_lightning.tasks.sequence_classification.submission import submission


def test_the_form_is_that_of_the_leaderboard():
    assert submission([("0", "entailment"), ("1", "2.500")]) == "index\tprediction\n0\tentailment\n1\t2.500\n"


def test_a_name_with_quotes_tabs_or_line_breaks_is_one_field_without_quoting():
    assert submission([("0", 'say "x"'), ("1", "a\tb\r\nc")]) == 'index\tprediction\n0\tsay "x"\n1\ta b c\n'
