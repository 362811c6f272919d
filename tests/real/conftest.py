"""The real model, made once for all tests that use it."""

from pathlib import Path

import pytest

from tests.real.smollm2 import build_smollm2


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_smollm2(tmp_path_factory.mktemp("smollm2"))
