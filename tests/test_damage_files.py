"""The script that damages files, with every kind of damage once."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "damage_files.py"


def test_every_kind_of_damage_is_refused_or_changes_nothing(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("damage_files", SCRIPT)
    damage_files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(damage_files)
    kinds = len(damage_files.RAW) + len(damage_files.TENSORS) + len(damage_files.CONTENT)
    assert damage_files.main(["--copies", str(kinds)]) == 0, capsys.readouterr().out
    assert f"ALL RIGHT of {kinds} folders and {kinds} checkpoints" in capsys.readouterr().out
    # It tells what is wrong: here a loader that takes whatever comes.
    monkeypatch.setattr(damage_files, "load_adapter", lambda module, folder: module)
    assert damage_files.main(["--copies", "1"]) == 1
    assert "folder 0, cut: other: accepted" in capsys.readouterr().out
