"""Output folders: whole or not there, and nobody's files replaced."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pera_lightning.errors import CheckpointError, ConfigurationError
from pera_lightning.export import folder as folder_file
from pera_lightning.export.folder import check_output_folder, megabytes, output_folder


def write(path, content="new", **options):
    with output_folder(path, **options) as made:
        (made / "model_index.json").write_text(content)
        (made / "part").mkdir()
        (made / "part" / "model.safetensors").write_text(content)


def fail(path, error, **options):
    with output_folder(path, **options) as made:
        (made / "config.json").write_text("half")
        raise error


def export(path, content="old"):
    path.mkdir()
    (path / "adapter_config.json").write_text(content)
    (path / "adapter_model.safetensors").write_text(content)
    return path


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_it_is_there_at_the_end_and_not_before(tmp_path):
    with output_folder(tmp_path / "deep" / "out") as made:
        assert made.parent == tmp_path / "deep"
        (made / "config.json").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["config.json"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(type(error)):
        fail(tmp_path / "out", error)
    assert names(tmp_path) == []


def test_what_exists_is_refused_before_anything_is_written(tmp_path):
    export(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "out", tmp_path / "empty"):
        with pytest.raises(ConfigurationError, match="exists; give another --output, or --overwrite"):
            write(path)
        with pytest.raises(ConfigurationError, match="--overwrite"):
            check_output_folder(path)
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "old"
    assert names(tmp_path) == ["empty", "out"]


def test_an_earlier_export_is_replaced_whole(tmp_path):
    path = export(tmp_path / "out")
    with output_folder(path, overwrite=True) as made:
        (made / "config.json").write_text("new")
        (made / "model.safetensors").write_text("new")
        assert names(path) == ["adapter_config.json", "adapter_model.safetensors"]
    assert names(tmp_path) == ["out"]
    assert names(path) == ["config.json", "model.safetensors"]  # nothing of the old one beside the new
    write(path, overwrite=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", overwrite=True)


def test_the_earlier_export_stays_where_the_new_one_fails(tmp_path):
    path = export(tmp_path / "out")
    with pytest.raises(ValueError, match="x"):
        fail(path, ValueError("x"), overwrite=True)
    assert (path / "adapter_config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_the_earlier_export_stays_where_the_renaming_fails(tmp_path, monkeypatch):
    path = export(tmp_path / "out")
    rename = folder_file.Path.rename

    def fails(self, target):
        if ".writing-" in self.name:
            raise OSError(errno.EIO, "I/O error")
        return rename(self, target)

    monkeypatch.setattr(folder_file.Path, "rename", fails)
    with pytest.raises(OSError, match="I/O"):
        write(path, overwrite=True)
    assert (path / "adapter_config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_other_folders_are_never_replaced(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_text("x")
    code = export(tmp_path / "code")
    (code / "train.py").write_text("x")
    nested = export(tmp_path / "nested")
    (nested / "runs").mkdir()
    text = tmp_path / "text"
    text.mkdir()
    (text / "notes.txt").write_text("x")
    link = export(tmp_path / "link")
    (link / "data").symlink_to(photos)
    for path, what in ((photos, "a.jpg"), (code, "train.py"), (nested, "runs"), (text, "notes.txt"), (link, "data")):
        with pytest.raises(ConfigurationError, match=f"not an earlier export, for it holds {what}"):
            write(path, overwrite=True)
    monkeypatch.chdir(export(tmp_path / "here"))
    for path in (".", "..", "/", Path.home()):
        with pytest.raises(ConfigurationError, match="holds the working directory or your home folder"):
            write(path, overwrite=True)
    assert (photos / "a.jpg").exists()


def test_a_pipeline_of_diffusers_is_an_export(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "model_index.json").write_text("{}")
    (path / "unet").mkdir()
    (path / "unet" / "config.json").write_text("{}")
    (path / "unet" / "diffusion_pytorch_model.safetensors").write_text("")
    write(path, overwrite=True)
    assert names(path) == ["model_index.json", "part"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigurationError, match="it holds out: give another" if overwrite else "exists"):
        write(tmp_path / "out", overwrite=overwrite)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "out" / "below", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_keeps_pointing(tmp_path):
    export(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["model_index.json", "part"]


def test_no_room(tmp_path):
    with pytest.raises(CheckpointError, match=r"needs about 1e\+09 GB.*free; make room"):
        write(tmp_path / "out", needed=10**18)
    assert names(tmp_path) == []


RUST = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space"), OSError(errno.EDQUOT, "Quota"), RuntimeError(RUST)], ids=str
)
def test_a_disk_that_fills_up(tmp_path, error):
    path = export(tmp_path / "out")
    message = r"out could not be written: it needs about 12\.3 MB, and its disk has .* free; make room"
    with pytest.raises(CheckpointError, match=message):
        fail(path, error, overwrite=True, needed=12_345_678)
    assert (path / "adapter_config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_what_others_may_read(tmp_path):
    """safetensors and mkdtemp make files that only their owner can read; a server runs as somebody else."""
    mask = os.umask(0o022)
    try:
        with output_folder(tmp_path / "out") as made:
            save_file({"a": torch.zeros(3)}, made / "model.safetensors")
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_leftovers_of_killed_processes(tmp_path):
    """A process that lives keeps its folder; one that was killed leaves one, which is removed a day later."""
    living, killed, other = (
        tmp_path / name for name in (".out.writing-1234abcd", ".out.writing-5678abcd", ".o.writing-")
    )
    for path in (living, killed, other):
        path.mkdir()
        (path / "config.json").write_text("half")
    for path in (killed, other):
        os.utime(path, (0, 0))
    write(tmp_path / "out")
    assert names(tmp_path) == [other.name, living.name, "out"]


def test_killed_between_the_two_renames(tmp_path):
    export(tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(ConfigurationError, match="exists"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "old"
    export(tmp_path / ".out.replaced")  # killed before the old one was removed
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == ["out"]


def test_it_was_made_meanwhile(tmp_path):
    with pytest.raises(ConfigurationError, match="exists"), output_folder(tmp_path / "out"):
        export(tmp_path / "out", "of another process")
    assert (tmp_path / "out" / "adapter_config.json").read_text() == "of another process"
    assert names(tmp_path) == ["out"]


def test_sizes():
    assert [megabytes(size) for size in (0, 12_345, 3.2e8, 5.4e10)] == ["0 MB", "0.0123 MB", "320 MB", "54 GB"]


def test_settings_without_weights_are_no_export(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("config.json", "thesis_notes.md"):
        (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ConfigurationError, match=r"not an earlier export, for it holds config\.json, thesis_notes\.md"):
        write(tmp_path / "out", overwrite=True)


def test_what_was_trained_is_not_overwritten(tmp_path):
    path = export(tmp_path / "out")
    (path / "adapter.safetensors").write_text("trained")
    with pytest.raises(ConfigurationError, match=r"for it holds adapter\.safetensors"):
        write(path, overwrite=True)


@pytest.mark.parametrize("output", ["base", "base/deeper", "."])
def test_what_is_read_is_not_written_over(tmp_path, output):
    export(tmp_path / "base")
    with pytest.raises(ConfigurationError, match="which is read, are or hold one another"):
        check_output_folder(tmp_path / output, overwrite=True, apart=[tmp_path / "base", "org/of-the-hub"])


def test_a_name_of_blanks(tmp_path):
    with pytest.raises(ConfigurationError, match="'  ' does not name a folder"):
        check_output_folder("  ")
