"""Every test of the models runs its programs once, so that optimising them does not pay."""

import pytest


@pytest.fixture(autouse=True)
def quick(quick_compilation):
    """Compiles without optimisation."""
