"""The files that GLUE's leaderboard takes."""

from pera_lightning.evaluation.submission import submission


def test_the_form_is_that_of_the_leaderboard():
    assert submission([("0", "entailment"), ("1", "2.500")]) == "index\tprediction\n0\tentailment\n1\t2.500\n"


def test_a_name_with_a_tab_is_one_field():
    assert submission([("0", "a\tb")]) == 'index\tprediction\n0\t"a\tb"\n'
