"""A deepened network is the one that repeats the layers of the trained one."""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import PlanError, Shared
from paramshare.models import PathNet
from paramshare.models.layers import convolution
from paramshare.models.path_net import ResidualLayer
from paramshare.transform.deepening import HOW, DepthError, deepen, repeated

GRIDS = np.random.default_rng(0).normal(size=(3, 6, 5, 2)).astype(np.float32)


def trained(model: Any) -> Any:
    """Random variables that all differ, including the batch statistics of every layer."""
    rng = np.random.default_rng(1)

    def draw(leaf: Any) -> jax.Array:
        normal = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(
            normal if leaf.ndim > 1 else rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype
        )

    return jax.tree.map(
        draw, jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(GRIDS)))
    )


def by_hand(dense: Any, layers: tuple[int, ...]) -> jax.Array:
    """Applies these layers of `dense`, counted from 0, one after the other."""
    norm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
    params, statistics = dense["params"], dense["batch_stats"]
    x: Any = jnp.einsum("bhwi,io->bhwo", GRIDS, params["first"]["kernel"][0, 0])
    for name in (f"layer{number + 1}" for number in layers):
        x = ResidualLayer(convolution, norm, x.shape[-1]).apply(
            {"params": params[name], "batch_stats": statistics[name]}, x
        )
    return (
        jnp.einsum("bhwi,i->bhw", x, params["last"]["kernel"][0, 0, :, 0])
        + params["last"]["bias"][0]
    )


def assert_is(actual: tuple[PathNet, Any], dense: Any, layers: tuple[int, ...]) -> None:
    model, variables = actual
    assert type(model) is PathNet and model.depth == len(layers)
    expected, output = by_hand(dense, layers), cast(Any, model.apply(variables, GRIDS))
    np.testing.assert_allclose(
        output, expected, rtol=1e-4, atol=1e-4 * float(jnp.abs(expected).max())
    )  # float32
    initialized = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(GRIDS)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, initialized
    )  # all that the longer one has, and nothing besides


@pytest.mark.parametrize("how", HOW)
def test_layers_stay_in_order_and_the_remaining_ones_last(how):
    for layers in range(1, 8):
        for period in range(1, layers + 1):
            for more in range(5):
                have, remaining = divmod(layers, period)
                actual = repeated(layers, layers + more * period, period, how)
                assert len(actual) == layers + more * period
                assert actual[len(actual) - remaining :] == tuple(range(layers - remaining, layers))
                whole = np.array(actual[: len(actual) - remaining]).reshape(-1, period)
                np.testing.assert_array_equal(
                    whole - whole[:, :1], np.tile(np.arange(period), (have + more, 1))
                )  # iterations stay whole
                times = np.bincount(whole[:, 0] // period, minlength=have)
                assert (
                    (whole[:, 0] % period == 0).all()
                    and (np.diff(whole[:, 0]) >= 0).all()
                    and (times >= 1).all()
                )
                more_often = {"stretch": have, "middle": have // 2, "last": have - 1}[how]
                assert (
                    times.max() - times.min() <= 1
                    if how == "stretch"
                    else times[more_often] == 1 + more
                )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((3, 6, 1, "stretch"), (0, 0, 1, 1, 2, 2)),
        ((3, 6, 1, "middle"), (0, 1, 1, 1, 1, 2)),
        ((3, 6, 1, "last"), (0, 1, 2, 2, 2, 2)),
        ((4, 8, 2, "stretch"), (0, 1, 0, 1, 2, 3, 2, 3)),
        ((5, 9, 2, "stretch"), (0, 1, 0, 1, 2, 3, 2, 3, 4)),
        ((5, 9, 2, "middle"), (0, 1, 2, 3, 2, 3, 2, 3, 4)),
        ((3, 6, 3, "last"), (0, 1, 2, 0, 1, 2)),
    ],
)
def test_repetitions_written_out(arguments, expected):
    assert repeated(*arguments) == expected


def test_no_more_layers_are_the_same_function():
    shared = paramshare.create_model("spathnet-4-4-2", input_shape=(6, 5, 2))
    assert isinstance(shared, Shared)
    variables = trained(shared)
    plain, dense = shared.model, shared.expand(variables)
    for model, network_variables in ((shared, variables), (plain, dense)):
        same, actual = deepen(model, network_variables, 4)  # type: ignore[arg-type]
        assert same == plain
        outputs: list[Any] = [same.apply(actual, GRIDS), model.apply(network_variables, GRIDS)]
        np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)  # a kernel made elsewhere
    jax.tree.map(np.testing.assert_array_equal, deepen(plain, dense, 4)[1], dense)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "layers"),
    [("middle", (0, 1, 1, 1, 1, 2)), ("stretch", (0, 0, 1, 1, 2, 2)), ("last", (0, 1, 2, 2, 2, 2))],
    ids=HOW,
)
def test_a_hard_loop_runs_for_more_iterations(how, layers):
    """One kernel, but separate batch norms for each iteration: they follow their layer."""
    shared = paramshare.create_model("pathnet-3-4-loop-1", input_shape=(6, 5, 2))
    assert isinstance(shared, Shared)
    variables = trained(shared)
    dense = shared.expand(variables)
    actual = deepen(shared, variables, 6, how=how)
    assert_is(actual, dense, layers)
    kernels = [actual[1]["params"][f"layer{number}"]["conv"]["kernel"] for number in range(1, 7)]
    assert all(np.array_equal(kernel, kernels[0]) for kernel in kernels)


def test_a_folded_network_repeats_its_period():
    """Five layers that alternate between two kernels: the fifth stays last."""
    shared = paramshare.create_model("spathnet-5-4-2", input_shape=(6, 5, 2))
    assert isinstance(shared, Shared)
    variables = trained(shared)
    rows = jnp.array([[1.0, 0], [0, 1], [2, 0], [0, -1], [0.5, 0]])
    sites = shared.layout["layers"].sites
    variables["params"]["coefficients"]["layers"] = {
        site.key: row for site, row in zip(sites, rows, strict=True)
    }
    folded = paramshare.fold(shared, variables)
    assert folded.banks[0].period == 2
    actual = deepen(folded.shared, folded.variables, 9, period=2, how="last")
    assert_is(actual, shared.expand(variables), (0, 1, 2, 3, 2, 3, 2, 3, 4))


def test_options_of_the_network_stay():
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Flax's BatchNorm adds float32 statistics to bfloat16 images
        shared = paramshare.create_model(
            "pathnet-2-4-loop-1", input_shape=(6, 5, 2), dtype=jnp.bfloat16, axis_name="device"
        )
        assert isinstance(shared, Shared)
        variables = trained(shared)
    assert deepen(shared, variables, 5)[0] == PathNet(5, 4, dtype=jnp.bfloat16, axis_name="device")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "depth=3; the network has 4 layers, in iterations of 1: .* 4, 5,"),
        ({"depth": 7, "period": 2}, "depth=7; the network has 4 layers, in iterations of 2"),
        ({"depth": 6.0}, "depth=6.0"),
        ({"depth": 8, "period": 0}, "period=0; period must be an integer from 1 to 4"),
        ({"depth": 9, "period": 5}, "period=5"),
        ({"depth": 8, "period": 2.0}, "period=2.0"),
        ({"depth": 8, "how": "first"}, "how='first'; .* middle, stretch, last"),
    ],
    ids=str,
)
def test_impossible_depths(options, message):
    with pytest.raises(DepthError, match=message) as caught:
        deepen(PathNet(4, 4), {}, **options)
    assert "\n" not in str(caught.value)


def test_a_flag_is_no_number():
    """Although Python treats True as 1."""
    assert repeated(1, 1, 1) == (0,)
    for depth, period in ((True, 1), (1, True)):
        with pytest.raises(DepthError, match="=True"):
            repeated(1, depth, period)


def test_networks_that_cannot_be_run_for_longer():
    for name, kind in (("wrn-16-1", "WideResNet"), ("swrn-16-1-1", "WideResNet")):
        with pytest.raises(
            DepthError, match=f"only a PathNet can run with more layers; got {kind}"
        ):
            deepen(paramshare.create_model(name), {}, 20)  # type: ignore[arg-type]
    shared = paramshare.create_model("pathnet-2-4-loop-1", input_shape=(6, 5, 2))
    assert isinstance(shared, Shared)
    with pytest.raises(PlanError, match="layers"):
        deepen(shared, {"params": {}, "banks": {}}, 5)
