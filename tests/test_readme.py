"""The README: its Python blocks run, and its configs and commands exist."""

import re

import pytest

from pera_lightning.cli.main import OWN_COMMANDS, TRAINER_COMMANDS
from tests.run_helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "k", [pytest.param(0, id="lightning", marks=pytest.mark.slow), pytest.param(1, id="any-module")]
)
def test_a_python_block_runs(tmp_path, monkeypatch, k):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[k], f"README.md, block {k}", "exec"), {"__name__": "__main__"})


def test_every_config_exists():
    configs = set(re.findall(r"configs/[\w./-]*\.yaml", README))
    assert configs
    assert sorted(path for path in configs if not (ROOT / path).is_file()) == []


def test_every_command_is_known():
    commands = set(re.findall(r"python\s+cli\.py\s+(\w[\w-]*)", README))
    assert commands
    assert commands - {*TRAINER_COMMANDS, *OWN_COMMANDS} == set()


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_no_placeholder_is_left(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert re.findall(r"@[A-Z][A-Z0-9_]*@|^[A-Z]+_[A-Z_]+$", text, flags=re.MULTILINE) == []
