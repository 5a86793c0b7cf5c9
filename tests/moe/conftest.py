import pytest

import tilefuse


@pytest.fixture
def repeats():
    """Runs that must agree to the bit: a hundred wherever threads run side by side."""

    def number(device):
        return 100 if device == "cuda" or tilefuse.backend() == "cpu" else 2

    return number
