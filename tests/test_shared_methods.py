"""A `Shared` in place of its model: methods by name and as functions, properties, attributes."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paramshare
from paramshare import Plan, PlanError, Rule, Soft

KEY, X = jax.random.key(0), jnp.ones((2, 8))


class Base(nn.Module):
    """Layers made in `setup`, used by several methods and a property, as in many libraries."""

    width: int = 8
    kind: ClassVar[str] = "encoder"

    def setup(self):
        self.layers = [nn.Dense(self.width) for _ in range(3)]
        self.scale = self.param("scale", nn.initializers.constant(2.0), ())

    def encode(self, x, *, twice: bool = False):
        for layer in self.layers:
            x = layer(x)
        return 2 * x if twice else x

    @property
    def factor(self):
        return self.scale

    @property
    def features(self):
        return self.width

    @property
    def activation(self):
        return nn.relu

    def __call__(self, x):
        return self.encode(x)


class Model(Base):
    """A method of its own, and one of its base class in another form."""

    def encode(self, x, *, twice: bool = False):
        return -super().encode(x, twice=twice)

    def decode(self, x):
        return self.encode(x) + self.scale


@pytest.fixture(scope="module")
def shared() -> Any:
    return paramshare.share(Model(), Plan(Rule(r"layers_\d/kernel", Soft(2))), X)


@pytest.fixture(scope="module")
def variables(shared) -> Any:
    return shared.init(KEY, X)


@pytest.mark.parametrize("method", ["encode", "decode", Model.encode, Model.decode, Base.encode])
def test_methods_are_called_by_name_or_as_functions(shared, variables, method):
    dense = shared.expand(variables)
    expected = shared.model.apply(dense, X, method=method)
    np.testing.assert_allclose(shared.apply(variables, X, method=method), expected, rtol=1e-6)
    bound = shared.bind(variables)
    if not isinstance(method, str) and method is not Base.encode:
        actual = shared.apply(variables, X, method=getattr(bound, method.__name__))
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_functions_take_arguments_by_name_and_initialize(shared, variables):
    twice = shared.apply(variables, X, twice=True, method=Model.encode)
    np.testing.assert_allclose(twice, 2 * shared.apply(variables, X, method="encode"), rtol=1e-6)
    again = shared.init(KEY, X, method=Model.decode)
    outputs, once_more = shared.init_with_output(KEY, X, method=Model.decode)
    assert outputs.shape == (2, 8)
    for values in (again, once_more):
        assert jax.tree.all(jax.tree.map(np.array_equal, values, variables))


def test_functions_of_other_modules_see_the_shared_module(shared, variables):
    def outside(module, x):
        return module.encode(x), module.factor, module.kind, type(module)

    encoded, factor, kind, owner = shared.apply(variables, X, method=outside)
    np.testing.assert_allclose(encoded, shared.apply(variables, X), rtol=1e-6)
    assert (float(factor), kind, owner) == (2.0, "encoder", paramshare.Shared)


def test_properties_and_attributes_are_those_of_the_model(shared, variables):
    assert (shared.features, shared.width, shared.kind) == (8, 8, "encoder")
    assert float(shared.bind(variables).factor) == 2.0
    assert shared.activation is shared.bind(variables).activation is nn.relu  # not called
    with pytest.raises(AttributeError, match="no method or attribute 'size', and neither"):
        _ = shared.size
    assert not hasattr(shared, "layers")  # made by setup: the model's own


def test_recurrent_cells_can_be_shared():
    """`nn.RNN` reads a property of its cell and calls two methods; it must pass the banks on."""
    cell, x = nn.LSTMCell(8), jnp.ones((2, 5, 8))
    carry = cell.initialize_carry(KEY, (2, 8))
    shared: Any = paramshare.share(cell, Plan(Rule(r"h./kernel", Soft(2))), carry, X)
    rnn: Any = nn.RNN(shared, variable_broadcast=("params", "banks"))
    variables = rnn.init(KEY, x)
    assert paramshare.count(variables)["banks"] == 2 * 64
    inner = {name: value["cell"] for name, value in variables.items()}
    plain: Any = nn.RNN(cell)
    expected = plain.apply({"params": {"cell": shared.expand(inner)["params"]}}, x)
    np.testing.assert_allclose(rnn.apply(variables, x), expected, rtol=1e-6)


class Wrapper:
    """As HuggingFace's models hold their module."""

    module = Model()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), r"the NNX module Linear; use paramshare\.nnx\.share"),
        (Wrapper(), r"a Wrapper; pass the module that it holds, its attribute \.module"),
        (3, "int 3"),
        (np.zeros(1000), "a ndarray"),
    ],
    ids=["nnx", "wrapper", "number", "array"],
)
def test_other_things_are_refused_in_one_line_with_advice(model, message):
    with pytest.raises(PlanError, match=f"takes a Flax linen module, got {message}") as caught:
        paramshare.share(model, Plan(Rule(".*", Soft(1))), X)
    assert len(str(caught.value)) < 160 and "\n" not in str(caught.value)
