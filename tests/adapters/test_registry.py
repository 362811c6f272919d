"""The register: duplicates, names, dotted paths, and specs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from torch import nn

from pera_lightning.adapters import AuroRA, Method, method_class, method_from_spec, register_method, registered_methods
from pera_lightning.errors import CheckpointError, PeraError, UnknownNameError


def test_the_documented_methods_are_registered() -> None:
    expected = {"LoRA", "PERA", "HiRA", "HiLoRA", "AuroRA", "LinearProbe", "FullFineTuning"}
    assert expected <= registered_methods().keys()


def test_a_second_method_of_one_name_is_refused() -> None:
    with pytest.raises(ValueError, match="AuroRA is registered already, by pera_lightning"):

        @register_method
        @dataclass(frozen=True, kw_only=True)
        class AuroRA(Method):
            def apply(self, model: nn.Module, *_: object) -> list[str]:
                return []

    assert register_method(registered_methods()["AuroRA"]) is registered_methods()["AuroRA"]


def test_the_register_cannot_be_changed_from_outside() -> None:
    registered_methods().clear()
    assert "LoRA" in registered_methods()


@pytest.mark.parametrize("name", ["AuroRA", "pera_lightning.adapters.AuroRA", "pera_lightning.adapters.aurora.AuroRA"])
def test_names_and_dotted_paths(name: str) -> None:
    assert method_class(name) is AuroRA


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Aurora", "'Aurora' does not exist; one of .*closest: AuroRA"),
        ("no_such_package.Method", "cannot be imported: No module named"),
        ("pera_lightning.adapters.Nothing", "cannot be imported"),
        ("collections.OrderedDict", "is not an adapter method"),
        (".LoRA", "cannot be imported"),
        ("..LoRA", "cannot be imported"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message) as caught:
        method_class(name)
    assert isinstance(caught.value, PeraError)


def test_a_spec_of_another_version() -> None:
    spec = AuroRA().spec()
    spec["init_args"]["curvature"] = 2
    with pytest.raises(CheckpointError, match="curvature"):
        method_from_spec(spec)
