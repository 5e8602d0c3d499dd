"""A small set of real images, and a small network that compiles in a second."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from paramshare import Plan, Rule, Soft, share
from paramshare.data import Dataset, from_arrays
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Optimizer, Schedule
from paramshare.training.state import AXIS


class Small(nn.Module):
    """Four 3x3 convolutions with batch norm."""

    axis_name: str | None = AXIS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        for i in range(4):
            x = nn.Conv(8, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{i}")(x)
            axis_name = None if self.is_initializing() else self.axis_name
            x = nn.relu(
                nn.BatchNorm(
                    not train, momentum=0.9, dtype=self.dtype, axis_name=axis_name, name=f"bn{i}"
                )(x)
            )
        return nn.Dense(10, name="classifier")(x.astype(jnp.float32).mean((1, 2)))


class Streamed:
    """The examples of a source, read through grain instead of as arrays."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


@pytest.fixture(scope="session")
def streamed() -> type[Streamed]:
    return Streamed


@pytest.fixture(scope="session")
def make_network():
    """A function of `Small`'s options: `Small`, its last three kernels under `Soft(2)` or plain."""

    def make(plain: bool = False, **options) -> nn.Module:
        plan = Plan(Rule("conv[1-3]/kernel", Soft(2)))
        return (
            Small(**options)
            if plain
            else share(Small(**options), plan, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
        )

    return make


@pytest.fixture(scope="session")
def network(make_network) -> nn.Module:
    return make_network()


@pytest.fixture(autouse=True, scope="session")
def _lenient_promotion():
    # optax's schedules multiply integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _programs(equal_runs_share_programs):
    """Most tests train a network several times."""


@pytest.fixture(scope="session")
def digits() -> Dataset:
    images: Any = load_digits()
    image, label = (images.images * 15).astype(np.uint8)[..., None], images.target
    return from_arrays(
        (image[:320], label[:320]),
        (image[320:421], label[320:421]),
        name="some digits",
        validation=0.2,
    )


@pytest.fixture(scope="session")
def config() -> Config:
    return Config(
        model=Model("swrn-16-1-1"),
        augment=Augment(pad_crop=1),
        optimizer=Optimizer(learning_rate=0.05),
        schedule=Schedule("cosine"),
        epochs=2,
        batch_size=64,
        log_every=1,
    )
