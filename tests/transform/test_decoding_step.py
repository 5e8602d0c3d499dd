"""A decoding step with its cache: cost, and export for one batch size."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare.measure.cost import cost
from paramshare.transform.export import export_program
from paramshare.transform.variables_file import ExportError, flat

TOKENS = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)


@pytest.fixture(autouse=True)
def _lenient_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_a_step_is_exported_with_its_cache():
    model = paramshare.create_model("decoder-2-16-tied", 11, (8,), heads=2, length=8)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    first, decoding = TOKENS[:, :1], {"decode": True, "mutable": ["cache"]}
    shapes = jax.eval_shape(lambda v: model.apply(v, first, **decoding)[1], variables)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    stored = flat({**variables, **empty})
    program = export_program(model, {**variables, **empty}, first, batch=2, **decoding)
    call = jax.export.deserialize(bytearray(program)).call
    steps = []
    for token in TOKENS.T:
        outputs: Any = call(stored, token[:, None])
        steps.append(outputs.pop("0"))
        stored |= {path.removeprefix("1/"): leaf for path, leaf in outputs.items()}
    expected: Any = model.apply(variables, TOKENS)
    np.testing.assert_allclose(np.concatenate(steps, 1), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ExportError, match="of any batch size with these variables"):
        export_program(model, {**variables, **empty}, first, **decoding)
    # A step attends to the whole cache: two products of 8 keys for each layer, head and feature.
    more = cost(model, first, **decoding).use - cost(model, first).use
    assert more == 2 * 2 * (8 - 1) * 16 * len(first)
