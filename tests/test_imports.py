"""Who may import whom: the layers of the package, held by walking its imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pera_lightning

ROOT = Path(pera_lightning.__file__).parent
OURS = "pera_lightning"

# Lower parts know nothing of higher ones. A part is a module or folder of the package.
CORE = {"errors", "files", "adapters", "targets", "layouts", "fingerprint", "injection"}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "adapters": {"errors"},
    "layouts": {"errors"},
    "targets": {"errors", "adapters", "layouts"},
    "fingerprint": {"errors"},
    "injection": CORE,
    "state": CORE,
    "drift": {"errors"},
    "layer_inputs": set(),
    "calibration": CORE | {"drift", "layer_inputs"},
    "merging": CORE | {"calibration", "drift"},
    "sharding": CORE | {"state"},
    "memory": CORE | {"sharding"},
    "data": {"errors", "evaluation", "files"},
    "evaluation": {"errors", "files"},
}
# Everything above `state` and `merging` must leave the command line alone.
ABOVE = {"cli", "commands"}
TORCH_ONLY = CORE | {"state", "drift", "layer_inputs", "calibration", "merging", "sharding", "memory"}
ALLOWED_THERE = {"torch", "safetensors", "numpy"}
# Heavy libraries, and the files or folders that may import them (inside functions too).
OWNERS: dict[str, tuple[str, ...]] = {
    "timm": ("modules/image", "data/image", "data/transforms", "export/timm"),
    "diffusers": ("modules/dreambooth", "data/dreambooth", "export/diffusers"),
    "peft": ("adapters/peft", "bridges/peft", "export/peft"),
}

FILES = sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").as_posix()


def part_of(file: Path) -> str:
    return name_of(file).partition("/")[0]


def imported(file: Path) -> list[str]:
    """Dotted names that a file imports, anywhere in it, but for what is there for type checkers only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    names = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from pera_lightning import x` means the module x
            names += [f"{node.module}.{a.name}" for a in node.names] if node.module == OURS else [node.module or ""]
    return names


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_of_parts(file: Path) -> None:
    part = part_of(file)
    parts = {name.split(".")[1] for name in imported(file) if name.startswith(f"{OURS}.")} - {part}
    if part in BELOW:
        assert parts <= BELOW[part], f"{name_of(file)} may not import {sorted(parts - BELOW[part])}"
    elif part not in ABOVE | {"__init__", "__main__"}:
        assert not parts & ABOVE, f"{name_of(file)} may not import {sorted(parts & ABOVE)}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_of_libraries(file: Path) -> None:
    libraries = {name.partition(".")[0] for name in imported(file)} - {OURS} - set(sys.stdlib_module_names)
    for library, owners in OWNERS.items():
        if library in libraries:
            assert name_of(file).startswith(owners), f"{name_of(file)} may not import {library}"
    bridge = name_of(file).startswith(OWNERS["peft"])
    if part_of(file) in TORCH_ONLY and not bridge:
        assert libraries <= ALLOWED_THERE, f"{name_of(file)} may not import {sorted(libraries - ALLOWED_THERE)}"


def test_the_walk_sees_imports(tmp_path: Path) -> None:
    """The test above would pass on an empty list too."""
    file = tmp_path / "file.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport a.b\nfrom c import d\nif TYPE_CHECKING:\n    import hidden\n"
        "def f():\n    from pera_lightning import state\n    import e\n",
        encoding="utf-8",
    )
    assert sorted(imported(file)) == ["a.b", "c", "e", "pera_lightning.injection.state", "typing"]
    assert {"errors", "adapters/base", "injection"} <= {name_of(file) for file in FILES}


def test_the_core_loads_no_framework() -> None:
    code = f"import sys, {OURS}.adapters, {OURS}.injection, {OURS}.state; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"lightning", "pytorch_lightning", "transformers", "timm", "peft", "diffusers", "datasets", "torchvision"}
    assert not heavy & set(loaded)


def test_the_package_itself_is_cheap() -> None:
    code = f"import sys, {OURS}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "lightning", "transformers"} & set(loaded)
