"""Predictions on disk: written as they come, read after an interruption, put in order at the end."""

import json
import os
from pathlib import Path

import pytest

from pera_lightning.tasks.causal_lm.predictions import PartialPredictions, unique, write_predictions


def record(name, **more):
    return {"id": name, "set": name.partition("/")[0], "stage": "test", **more}


A, B, C = record("x/0", output="jä\n\u2028!"), record("x/1"), record("y/0")


def partial(folder, rank=0, key="0123456789abcdef"):
    return PartialPredictions(folder, "hira", key, rank)


def test_what_was_appended_is_read(tmp_path):
    records = partial(tmp_path)
    assert records.read() == []
    records.append([A, B])
    records.append([C])
    assert partial(tmp_path).read() == [A, B, C]
    assert records.path == tmp_path / "hira.partial-0123456789ab" / "rank0.jsonl"
    assert len(records.path.read_bytes().splitlines()) == 3
    assert "ä" in records.path.read_text(encoding="utf-8")


def test_every_process_reads_all(tmp_path):
    partial(tmp_path, rank=1).append([B])
    partial(tmp_path, rank=0).append([A])
    assert partial(tmp_path, rank=2).read() == [A, B]


def test_another_key_reads_nothing(tmp_path):
    partial(tmp_path).append([A])
    assert partial(tmp_path, key="fedcba9876543210").read() == []


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_half_a_line_is_left_out_and_kept_apart(tmp_path, cut):
    """The process died while it wrote: the end of the file is missing, within a character too."""
    records = partial(tmp_path)
    records.append([B, A])
    os.truncate(records.path, records.path.stat().st_size - cut)
    whole = [B, A] if cut == 1 else [B]  # without the newline alone the line is whole
    assert records.read() == whole
    partial(tmp_path).append([C])
    assert records.read() == [*whole, C]


@pytest.mark.parametrize("junk", [b"", b"\n\n", b"3\n", b'["id"]\n', b'{"set": "x"}\n', b"\xff\xfe\n", b"{}\n"])
def test_what_is_no_prediction_is_left_out(tmp_path, junk):
    records = partial(tmp_path)
    records.append([A])
    with records.path.open("ab") as file:
        file.write(junk)
    records.append([C])
    assert records.read() == [A, C]


def test_an_empty_file_is_begun(tmp_path):
    records = partial(tmp_path)
    records.folder.mkdir()
    records.path.touch()
    records.append([A])
    assert records.read() == [A]


def test_remove(tmp_path):
    records = partial(tmp_path)
    records.append([A])
    records.remove()
    assert list(tmp_path.iterdir()) == []
    records.remove()


def test_others_are_of_the_same_evaluation(tmp_path):
    """What another evaluation left, a prediction by the same protocol too, is not its business."""
    records = partial(tmp_path)
    assert records.others() == []
    records.append([A])
    for name in ("hira", "hira_predict", "strict"):
        PartialPredictions(tmp_path, name, "fedcba9876543210", 0).append([A])
    (tmp_path / "hira").mkdir()
    assert records.others() == [tmp_path / "hira.partial-fedcba987654"]


def test_a_file_a_set_in_the_order_given(tmp_path):
    folder = tmp_path / "predictions" / "hira"
    write_predictions(folder, [C, B, A], {"results.json": "jä\n"})
    assert {path.name for path in folder.iterdir()} == {"x.jsonl", "y.jsonl", "results.json"}
    assert [json.loads(line) for line in (folder / "x.jsonl").read_bytes().splitlines()] == [B, A]
    assert (folder / "results.json").read_text(encoding="utf-8") == "jä\n"
    assert [path.name for path in folder.parent.iterdir()] == ["hira"]  # nothing temporary


def test_the_whole_folder_is_replaced(tmp_path):
    """Sets that the new evaluation does not have are gone with the old one."""
    folder = tmp_path / "hira"
    write_predictions(folder, [A, C], {"results.json": ""})
    write_predictions(folder, [B])
    assert [path.name for path in folder.iterdir()] == ["x.jsonl"]
    assert json.loads((folder / "x.jsonl").read_bytes()) == B
    assert [path.name for path in tmp_path.iterdir()] == ["hira"]


@pytest.mark.parametrize(("owner", "name", "which"), [(os, "fsync", 1), (Path, "rename", 1), (Path, "rename", 2)])
def test_a_write_that_fails_leaves_the_old_folder(tmp_path, monkeypatch, owner, name, which):
    """While it writes, at the rename of the old folder, at that of the new one."""
    folder, works, calls = tmp_path / "hira", getattr(owner, name), []
    write_predictions(folder, [A, C])

    def fail(*args):
        calls.append(args)
        if len(calls) == which:
            raise OSError("disk full")
        return works(*args)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="disk full"):
        write_predictions(folder, [B])
    assert [path.name for path in tmp_path.iterdir()] == ["hira"]
    assert sorted(path.name for path in folder.iterdir()) == ["x.jsonl", "y.jsonl"]
    assert json.loads((folder / "x.jsonl").read_bytes()) == A


def test_a_process_that_dies_between_the_renames(tmp_path, monkeypatch):
    """Nothing is lost meanwhile, and the next write leaves no trace of it."""
    folder, rename = tmp_path / "hira", Path.rename
    write_predictions(folder, [A])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, to: os._exit(7) if ".writing-" in path.name else rename(path, to))
        child = os.fork()
        if not child:
            try:
                write_predictions(folder, [B])
            finally:
                os._exit(1)  # the child must not go on with pytest
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    kept = {path.name[:14]: json.loads((path / "x.jsonl").read_bytes()) for path in tmp_path.iterdir()}
    assert kept == {".hira.replaced": A, ".hira.writing-": B}
    for left in tmp_path.glob(".hira.writing-*"):
        os.utime(left, (0, 0))  # long ago: a younger one may be another process's
    write_predictions(folder, [B])
    assert [path.name for path in tmp_path.iterdir()] == ["hira"]
    assert json.loads((folder / "x.jsonl").read_bytes()) == B


def test_each_question_once_in_the_order_of_the_data():
    again = record("x/1", output="another")
    assert unique([C, B, again, A], ["x/0", "x/1", "x/2", "y/0"]) == [A, B, C]
    assert unique([A, B], ["x/1"]) == [B]
