"""Who may import whom: the layers of the package, held by walking its imports; its folders are read from the tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pera_lightning

ROOT = Path(pera_lightning.__file__).parent
OURS = "pera_lightning"

# Every folder and file of the package, lower layers first. Whoever stands in one row may import from rows above it
# and from itself, never from another of its row. Imports for type checkers count too.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("files", "validation"),
    ("pretrained",),
    ("adapters",),
    ("injection",),
    ("merging",),
    ("export",),
    ("training", "data"),
    ("tasks",),
    ("cli",),
)
LEVEL = {part: level for level, row in enumerate(LAYERS) for part in row}
TORCH_ONLY = {"errors", "validation", "adapters", "injection", "merging"}
ALLOWED_THERE = {"torch", "safetensors", "numpy"}
# Heavy libraries, and the only places that may import them (inside functions too).
OWNERS: dict[str, tuple[str, ...]] = {
    "timm": ("tasks/image_classification/", "export/timm"),
    "diffusers": ("tasks/dreambooth/", "export/diffusers"),
    "peft": ("export/peft",),
}

FILES = sorted(ROOT.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").as_posix()


MODULES = {".".join((OURS, *name_of(file).split("/"))).removesuffix(".__init__"): file for file in FILES}


def part_of(name: str) -> str:
    """The first name below the package, of a dotted name: ``pera_lightning.data.splits`` belongs to ``data``."""
    return name.split(".")[1] if "." in name else ""


def imported(file: Path) -> list[str]:
    """Dotted names that a file imports, anywhere in it, for type checkers too."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            # `from folder import x` may mean the module folder.x
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.append(inner if inner in MODULES or node.module == OURS else str(node.module))
    return names


def forbidden(name: str, file: Path) -> list[str]:
    """What a module imports of this package and may not."""
    own, wrong = part_of(name), []
    for other in imported(file):
        if not other.startswith(f"{OURS}."):
            continue
        if own == "" or other == f"{OURS}.__version__":
            continue
        # A public name of the package means the module that defines it.
        other = pera_lightning._NAMES.get(other.removeprefix(f"{OURS}."), other)
        part = part_of(other)
        assert part in LEVEL, f"{name} imports {other}, which has no layer"
        across_tasks = (
            own == part == "tasks" and len(other.split(".")) > 2 and other.split(".")[2] != name.split(".")[2]
        )
        if across_tasks or (part != own and LEVEL[part] >= LEVEL[own]):
            wrong.append(other)
    return wrong


def test_every_part_has_a_layer() -> None:
    parts = {name_of(file).partition("/")[0] for file in FILES} - {"__init__"}
    assert parts <= set(LEVEL), f"no layer is given for {sorted(parts - set(LEVEL))}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_of_parts(name: str) -> None:
    wrong = forbidden(name, MODULES[name])
    assert not wrong, f"{name} may not import {wrong}"


def test_there_is_no_circle() -> None:
    graph = {name: {other for other in imported(file) if other in MODULES} for name, file in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", MODULES)
def test_imports_of_libraries(name: str) -> None:
    file = MODULES[name]
    libraries = {other.partition(".")[0] for other in imported(file)} - {OURS} - set(sys.stdlib_module_names)
    for library, owners in OWNERS.items():
        if library in libraries:
            assert name_of(file).startswith(owners), f"{name} may not import {library}"
    if part_of(name) in TORCH_ONLY and not name_of(file).startswith(OWNERS["peft"]):
        assert libraries <= ALLOWED_THERE, f"{name} may not import {sorted(libraries - ALLOWED_THERE)}"


def test_the_walk_sees_imports(tmp_path: Path) -> None:
    """The tests above would pass on an empty list too."""
    file = tmp_path / "file.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport a.b\nfrom c import d\nif TYPE_CHECKING:\n    import seen\n"
        "def f():\n    from pera_lightning.training import callback\n    import e\n",
        encoding="utf-8",
    )
    assert sorted(imported(file)) == ["a.b", "c", "e", "pera_lightning.training.callback", "seen", "typing"]
    assert forbidden("pera_lightning.data.splits", file) == ["pera_lightning.training.callback"]
    file.write_text("from pera_lightning.tasks.dreambooth.data import DreamBoothDataModule\n", encoding="utf-8")
    assert forbidden("pera_lightning.tasks.causal_lm.data", file) == ["pera_lightning.tasks.dreambooth.data"]
    assert not forbidden("pera_lightning.tasks.dreambooth.module", file)
    file.write_text("from pera_lightning import DreamBoothModule, inject\n", encoding="utf-8")
    assert forbidden("pera_lightning.data.splits", file) == ["pera_lightning.tasks.dreambooth.module"]
    assert {"pera_lightning.errors", "pera_lightning.adapters.base"} <= set(MODULES)


def test_the_core_loads_no_framework() -> None:
    code = f"import sys; from {OURS} import adapters, inject, load_adapter, merge; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    heavy = {"lightning", "pytorch_lightning", "transformers", "timm", "peft", "diffusers", "datasets", "torchvision"}
    assert not heavy & set(loaded)


def test_the_package_itself_is_cheap() -> None:
    code = f"import sys, {OURS}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "lightning", "transformers"} & set(loaded)
