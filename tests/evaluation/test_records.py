"""Prediction records on disk: written as they come, read after an interruption, put in order at the end."""

import json
import os

import pytest

from pera_lightning.evaluation.records import PartialRecords, unique, write_records


def record(name, **more):
    return {"id": name, "set": name.partition("/")[0], "stage": "test", **more}


A, B, C = record("x/0", output="jä\n\u2028!"), record("x/1"), record("y/0")


def partial(folder, rank=0, key="0123456789abcdef"):
    return PartialRecords(folder, "hira", key, rank)


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
def test_what_is_no_record_is_left_out(tmp_path, junk):
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


def test_a_file_a_set_in_the_order_given(tmp_path):
    folder = tmp_path / "predictions" / "hira"
    paths = write_records(folder, [C, B, A])
    assert paths == [folder / "y.jsonl", folder / "x.jsonl"]
    assert [json.loads(line) for line in (folder / "x.jsonl").read_bytes().splitlines()] == [B, A]
    write_records(folder, [A])
    assert [json.loads(line) for line in (folder / "x.jsonl").read_bytes().splitlines()] == [A]
    assert sorted(path.name for path in folder.iterdir()) == ["x.jsonl", "y.jsonl"]  # nothing temporary


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_records(tmp_path, [A])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_records(tmp_path, [B])
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    assert json.loads((tmp_path / "x.jsonl").read_bytes()) == A


def test_each_question_once_in_the_order_of_the_data():
    again = record("x/1", output="another")
    assert unique([C, B, again, A], ["x/0", "x/1", "x/2", "y/0"]) == [A, B, C]
    assert unique([A, B], ["x/1"]) == [B]
