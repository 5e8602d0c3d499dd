"""Indices are computed once, whatever they move."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare import ops
from paramshare.schemes.permutation import Permutation


@pytest.mark.parametrize("form", ops.FORMS)
def test_indices_are_unchanged(form):
    with ops.form(form):
        index = jax.jit(lambda: ops.computed_first(Permutation(12, 3)()))()
    np.testing.assert_array_equal(index, Permutation(12, 3)())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's compiler for CPUs")
def test_a_compiled_gather_does_not_contain_the_arithmetic_of_its_indices():
    def move(x):
        return jnp.take(x.reshape(-1, 8), ops.computed_first(Permutation(90, 3)()), axis=0)

    text = str(jax.jit(move).lower(jnp.ones(720)).compile().as_text())
    computations = re.findall(r"^%?\w[^\n]*\{\n.*?^\}", text, re.MULTILINE | re.DOTALL)
    (gather,) = (each for each in computations if " gather(" in each)
    assert " multiply(" not in gather
