"""Files of predictions: each example once, in the order of the data, and nothing in a fast_dev_run."""

from types import SimpleNamespace

from pera_lightning.training import predictions
from pera_lightning.training.predictions import write_predictions


def as_text(rows):
    return "".join(f"{name} {value}\n" for name, value in rows)


def trainer(folder, **options):
    run = {"log_dir": str(folder), "fast_dev_run": 0, "is_global_zero": True}
    return SimpleNamespace(**{**run, "default_root_dir": "", "callbacks": [], "ckpt_path": None, **options})


def test_a_file_for_each_set(tmp_path, capsys):
    write_predictions(trainer(tmp_path), {"a.txt": [("x", 1), ("y", 2)], "b.txt": []}, as_text)
    assert (tmp_path / "predictions" / "a.txt").read_text() == "x 1\ny 2\n"
    assert (tmp_path / "predictions" / "b.txt").read_text() == ""
    assert capsys.readouterr().out.startswith(f"Predictions of 2 examples: {tmp_path / 'predictions' / 'a.txt'}\n")


def test_shards_are_merged_in_order_without_what_fills_up(tmp_path, monkeypatch):
    shards = [{"a.txt": [("0", 5), ("2", 6)]}, {"a.txt": [("1", 7), ("2", 6)]}]
    monkeypatch.setattr(predictions, "all_gather_object", lambda own: shards)
    write_predictions(trainer(tmp_path), shards[0], as_text)
    assert (tmp_path / "predictions" / "a.txt").read_text() == "0 5\n1 7\n2 6\n"


def test_one_process_writes_and_a_fast_dev_run_does_not(tmp_path):
    for options in ({"is_global_zero": False}, {"fast_dev_run": 1}):
        write_predictions(trainer(tmp_path, **options), {"a.txt": [("x", 1)]}, as_text)
    assert not (tmp_path / "predictions").exists()
    write_predictions(trainer(None, log_dir=None, default_root_dir=str(tmp_path)), {"a.txt": []}, as_text)
    assert (tmp_path / "predictions" / "a.txt").exists()
