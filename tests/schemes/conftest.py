"""What tests of several schemes measure by."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def rows() -> Callable[[Any], np.ndarray]:
    """(n, P): the filters of a kernel (..., n), in double precision."""
    return lambda kernel: np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1]).T


@pytest.fixture(scope="session")
def assert_he_normal() -> Callable[[Any, float], None]:
    """The first four moments are those of N(0, variance), within five standard errors of each."""

    def check(values: Any, variance: float):
        numbers = np.asarray(values, np.float64).ravel() / math.sqrt(variance)
        for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(np.mean(numbers**power) - moment) < 5 * math.sqrt(spread / numbers.size)

    return check
