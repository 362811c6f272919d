"""What the tests of the data share; tests of fits have a fixture of the same name, with photographs of their own."""

import pytest


@pytest.fixture
def photos(tmp_path):
    """A folder of three small photographs."""
    from tests.tasks.dreambooth.data_helpers import fill  # not above: pytest's capture does not survive Lightning there

    return fill(tmp_path / "sks", 3)
