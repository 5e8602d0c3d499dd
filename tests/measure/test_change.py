"""Relative changes by hand."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.measure.change import output_change, relative_change


def test_relative_change_of_pytrees():
    before, after = {"a": np.array([3.0]), "b": [0.0, 4.0]}, {"a": np.array([3.0]), "b": [1.0, 4.0]}
    assert relative_change(before, after) == pytest.approx(1 / 5)


def test_zeros_have_an_absolute_change():
    assert relative_change(np.zeros(2), np.array([3.0, 4.0])) == 5


def test_output_change():
    x = jnp.array([[3.0, 4.0]])
    model = nn.Dense(2, use_bias=False)
    before, after = ({"params": {"kernel": scale * jnp.eye(2)}} for scale in (1, 1.5))
    assert output_change((model, before), (model, after), x) == pytest.approx(0.5)
