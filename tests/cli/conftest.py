"""Trained runs that several files of this folder export and merge; no test changes them.

Their imports wait for the fixtures, as everywhere in a conftest: Lightning, imported before pytest catches logs, keeps
its own from other loggers.
"""

import pytest


@pytest.fixture(scope="session")
def small_sets(tmp_path_factory):
    from tests.cli import trained_runs

    return trained_runs.small_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def llama_run(tmp_path_factory, llama, small_sets):
    from tests.cli import trained_runs

    return trained_runs.language_run(tmp_path_factory.mktemp("runs") / "llama", llama, small_sets)


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory, vit):
    from tests.cli import trained_runs

    return trained_runs.image_run(tmp_path_factory.mktemp("runs") / "vit", vit)


@pytest.fixture
def export(pera, tmp_path):
    from tests.cli import trained_runs

    return trained_runs.exporter(pera, tmp_path / "out")
