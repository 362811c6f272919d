"""Files and folders that are whole or not there. What an export does with them is in export/test_output_folder.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pera_lightning.files import atomic_directory, atomic_path, atomic_write


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_file_that_a_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(UnicodeEncodeError), atomic_path(path) as temporary:
        temporary.write_text("two \ud800", encoding="utf-8")
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass  # nothing was written
    assert path.read_text() == "one"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_others_may_read_what_the_mask_lets_them(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic_write(tmp_path / "file", b"")
        with atomic_directory(tmp_path / "folder") as made:
            (made / "private").touch(0o600)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder", "folder/private")]
    assert modes == [0o666 & ~mask, 0o777 & ~mask, 0o666 & ~mask]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    with atomic_directory(path) as made:
        (made / "one").touch()
        assert not path.exists()
    with pytest.raises(UnicodeEncodeError), atomic_directory(path) as made:
        (made / "half").write_text("two \ud800", encoding="utf-8")
    assert names(path) == ["one"]
    with atomic_directory(path) as made:
        (made / "two").touch()
        assert names(path) == ["one"]
    assert names(path) == ["two"]
    assert names(tmp_path / "deep") == ["folder"]


def test_an_error_of_the_disk_inside_is_raised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="I/O error"), atomic_directory(tmp_path / "folder"):
        raise OSError(5, "I/O error")
    assert names(tmp_path) == []
