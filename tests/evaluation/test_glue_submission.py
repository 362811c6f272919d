"""The files that GLUE's leaderboard takes."""

from pera_lightning.evaluation.submission import in_order, submission


def test_the_form_is_that_of_the_leaderboard():
    assert submission([("0", "entailment"), ("1", "2.500")]) == "index\tprediction\n0\tentailment\n1\t2.500\n"


def test_a_name_with_a_tab_is_one_field():
    assert submission([("0", "a\tb")]) == 'index\tprediction\n0\t"a\tb"\n'


def test_rows_of_several_processes_come_in_order_and_once():
    """Seven rows dealt to three processes: two fill up with the last row."""
    ranks = [[("0", 5), ("3", 4), ("6", 9)], [("1", 2), ("4", 7), ("6", 9)], [("2", 0), ("5", 1), ("6", 9)]]
    assert in_order(ranks) == {"0": 5, "1": 2, "2": 0, "3": 4, "4": 7, "5": 1, "6": 9}
    assert list(in_order(ranks)) == [str(k) for k in range(7)]
