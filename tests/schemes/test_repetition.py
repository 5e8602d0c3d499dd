"""Learnable repetition as Chavan et al. publish it: formula, initialisation, counts in VGGs."""

import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paramshare
from paramshare import Plan, Repeat, Rule, Site
from paramshare.schemes.interface import Weights

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
SCALARS = {"swish": 2, "fourier": 6, "linear": 0}  # of each tile and remainder


def transformed(w: np.ndarray, scalars: np.ndarray, transform: str) -> np.ndarray:
    if transform == "linear":
        return w
    if transform == "fourier":  # a polynomial, despite its name
        return np.polynomial.polynomial.polyval(w, scalars)
    alpha, beta = scalars
    return alpha * w / (1 + np.exp(beta * w))


def reference(
    base: np.ndarray,
    shape: tuple[int, ...],
    scalars: dict[str, np.ndarray],
    transform: str = "swish",
) -> np.ndarray:
    """The paper's construction: tile by tile, then the remaining outputs, then the inputs."""
    if base.shape == shape:
        return base
    *cell, inputs, outputs = base.shape
    none = np.zeros(0)
    tiles_out, more_out = divmod(shape[-1], outputs)
    tiles_in, more_in = divmod(shape[-2], inputs)
    kernel = np.full((*cell, tiles_in * inputs, tiles_out * outputs), np.nan)
    for i, j in itertools.product(range(tiles_out), range(tiles_in)):
        tile = transformed(base, scalars["tiles"][i, j] if scalars else none, transform)
        kernel[..., j * inputs : (j + 1) * inputs, i * outputs : (i + 1) * outputs] = tile
    if more_out:
        slices = transformed(kernel[..., :more_out], scalars.get("outputs", none), transform)
        kernel = np.concatenate([kernel, slices], axis=-1)
    if more_in:
        slices = transformed(kernel[..., :more_in, :], scalars.get("inputs", none), transform)
        kernel = np.concatenate([kernel, slices], axis=-2)
    return kernel


def random_scalars(
    rng: np.random.Generator, base: tuple[int, ...], shape: tuple[int, ...], m: int
) -> dict[str, np.ndarray]:
    """A site's coefficients, with the shapes that the docstring of `Repeat` gives."""
    if base == shape or not m:
        return {}
    scalars = {"tiles": rng.normal(size=(shape[-1] // base[-1], shape[-2] // base[-2], m))}
    if shape[-1] % base[-1]:
        scalars["outputs"] = rng.normal(size=m)
    if shape[-2] % base[-2]:
        scalars["inputs"] = rng.normal(size=m)
    return scalars


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def test_the_reference_test_vector():
    """Computed by the reference in the layout (out, in, kh, kw)."""
    w_OxIxHxW = np.sin(0.1 * np.arange(2 * 3 * 3 * 3)).reshape(2, 3, 3, 3)
    x_BxCxHxW = np.cos(0.01 * np.arange(7 * 4 * 4)).reshape(1, 7, 4, 4)
    # (alpha, beta) of the tile of output i and input j at 2 i + j.
    pairs = np.stack([[0.5, -1.0, 2.0, 1.5], [1.0, 0.0, -1.0, 0.5]], axis=-1)
    scalars = {
        "tiles": pairs.reshape(2, 2, 2),
        "outputs": np.array([0.7, 0.3]),
        "inputs": np.array([-0.4, 0.9]),
    }
    with jax.enable_x64(True):
        scheme, site = Repeat(base=(3, 3, 3, 2)), Site("conv", (3, 3, 7, 5), "float64")
        base = jnp.asarray(w_OxIxHxW.transpose(2, 3, 1, 0))
        weights = Weights({"conv": base}, {"conv": arrays(scalars)})
        (kernel,) = scheme.expand(weights, (site,))
        assert kernel.dtype == jnp.float64
        x = jnp.asarray(x_BxCxHxW.transpose(0, 2, 3, 1))
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        assert y.shape == (1, 4, 4, 5)
        assert float(jnp.sum(y)) == pytest.approx(110.94453785974778, abs=1e-12)


def test_a_kernel_computed_by_hand():
    """alpha w / (1 + exp(beta w)): beta = 0 halves alpha w, beta > 0 shrinks positive weights."""
    scheme, site = Repeat(base=(1, 2)), Site("dense", (1, 4))
    scalars = {"tiles": jnp.asarray([[[3.0, 0.0]], [[1.0, math.log(3.0)]]])}
    weights = Weights({"dense": jnp.asarray([[1.0, -1.0]])}, {"dense": scalars})
    (kernel,) = scheme.expand(weights, (site,))
    np.testing.assert_allclose(kernel, [[1.5, -1.5, 1 / (1 + 3), -1 / (1 + 1 / 3)]], rtol=1e-6)


AXES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(0, 9))


@settings(deadline=None, max_examples=15, derandomize=True, database=None)
@given(
    cell=st.sampled_from([(), (1, 1), (3, 2)]),
    axes=AXES,
    transform=st.sampled_from(sorted(SCALARS)),
    seed=st.integers(0, 9),
)
def test_kernels_are_those_of_the_paper(cell, axes, transform, seed):
    """For any base and kernel, with and without remainders, and for equal shapes."""
    inputs, outputs, more_in, more_out = axes
    base, shape = (*cell, inputs, outputs), (*cell, inputs + more_in, outputs + more_out)
    rng = np.random.default_rng(seed)
    values, scalars = rng.normal(size=base), random_scalars(rng, base, shape, SCALARS[transform])
    scheme = Repeat(base=base, transform=transform, initial="paper")
    sites = (Site("a/kernel", shape, "float64"),)
    weights = Weights({"a.kernel": values}, {"a.kernel": scalars} if scalars else {})
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda: scheme.init(KEY, sites))
        assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, weights)
        (kernel,) = jax.jit(lambda weights: scheme.expand(weights, sites))(arrays(weights))
    expected = reference(values, shape, scalars, transform)
    # float64: a few roundings, relative to the largest entry. Polynomials applied two or three
    # times may make entries large.
    np.testing.assert_allclose(kernel, expected, rtol=1e-12, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("transform", SCALARS)
@pytest.mark.parametrize("how", [{"base": (3, 3, 4, 6)}, {"source": "a/kernel"}])
def test_equal_shapes_are_plain_sharing(transform, how):
    scheme = Repeat(transform=transform, initial="paper", **how)
    sites = tuple(Site(name, (3, 3, 4, 6)) for name in ("a/kernel", "b/kernel"))

    @jax.jit
    def results():
        weights = scheme.init(KEY, sites)
        return weights, scheme.expand(weights, sites)

    weights, kernels = results()
    assert weights.coefficients == {}
    bases = list(weights.bank.values()) if "base" in how else [weights.bank["a.kernel"]] * 2
    for kernel, base in zip(kernels, bases, strict=True):
        np.testing.assert_array_equal(kernel, base)


def test_a_kernel_with_one_equal_axis_is_transformed():
    """Only a kernel of the same shape is a plain copy; one tile and a remainder have scalars."""
    shapes = Repeat(base=(4, 3)).shapes((Site("a", (4, 5)),)).coefficients
    assert jax.tree.map(jnp.shape, shapes) == {"a": {"tiles": (1, 1, 2), "outputs": (2,)}}


def assert_uniform(values: Any, low: float, high: float):
    """In the range, and by Kolmogorov and Smirnov's test, which fails once in 8,000 draws."""
    x = np.sort(np.asarray(values, np.float64).ravel())
    assert low <= x[0] and x[-1] <= high
    uniform = (x - low) / (high - low)
    steps = np.arange(x.size + 1) / x.size
    assert max(np.max(steps[1:] - uniform), np.max(uniform - steps[:-1])) < 2.2 / math.sqrt(x.size)


@pytest.mark.parametrize("transform", ["swish", "fourier"])
def test_the_papers_initialisation_is_uniform(transform):
    """Bases are Xavier's, tiles narrow with their number, remainders are between 0 and 1."""
    base = (3, 3, 4, 6)
    sites = (Site("few", (3, 3, 9, 13)), Site("many", (3, 3, 16, 24)), Site("none", base))
    scheme = Repeat(base=base, transform=transform, initial="paper")
    draws = jax.jit(jax.vmap(lambda key: scheme.init(key, sites)))(jax.random.split(KEY, 500))
    scalars = draws.coefficients
    assert scalars["few"]["tiles"].shape == (500, 2, 2, SCALARS[transform])
    for site in sites:
        limit = math.sqrt(6 / (9 * (4 + 6)))
        assert_uniform(draws.bank[site.key], -limit, limit)
    assert set(scalars) == {"few", "many"}
    for name, n in (("few", 2 * 2), ("many", 4 * 4)):
        assert_uniform(scalars[name]["tiles"], -math.sqrt(6 / (n + 1)), math.sqrt(6 / (n + 1)))
    assert_uniform(scalars["few"]["outputs"], 0, 1)
    assert_uniform(scalars["few"]["inputs"], 0, 1)
    # Nothing is drawn twice: no two entries correlate over the 500 draws, by five standard errors.
    columns = [np.asarray(leaf).reshape(500, -1)[:, :4] for leaf in jax.tree.leaves(draws)]
    correlation = np.corrcoef(np.concatenate(columns, axis=1).T)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / math.sqrt(500)


WIDTHS = {
    f"{stage}_{i}": width
    for stage, width in enumerate((64, 128, 256, 512, 512), start=1)
    for i in (1, 2)
}
NAMES = list(WIDTHS)
REPEATS = {  # source: the convolutions that repeat it
    4: {"2_1": "2_2 3_1 3_2 4_1 4_2 5_1 5_2"},
    5: {"2_1": "3_1 4_1 5_1", "2_2": "3_2 4_2 5_2"},
    6: {"2_1": "3_2", "2_2": "4_1 5_1", "3_1": "4_2 5_2"},
    7: {"2_1": "4_1", "2_2": "4_2", "3_1": "5_1", "3_2": "5_2"},
    8: {"3_1": "4_2", "3_2": "5_1", "4_1": "5_2"},
    9: {"4_1": "5_1", "4_2": "5_2"},
    10: {"5_1": "5_2"},
}
LEARNED = {4: 252, 5: 176, 6: 96, 7: 88, 8: 28, 9: 4, 10: 0}
TOTAL = {4: 126_534, 6: 568_746, 8: 2_338_150, 10: 7_056_714}


@pytest.mark.parametrize("n", REPEATS)
def test_rep_vgg_has_the_published_parameter_counts(n):
    """The count of alphas and betas of rep_vgg_n, and its total for 10 classes."""
    inputs = dict(zip(NAMES, [3, *WIDTHS.values()], strict=False))
    sites = {name: Site(name, (3, 3, inputs[name], WIDTHS[name])) for name in NAMES}
    learned, bases, repeated = 0, 0, set()
    for source, targets in REPEATS[n].items():
        members = tuple(sites[name] for name in (source, *targets.split()))
        shapes = Repeat(source=source).shapes(members)
        assert jax.tree.map(jnp.shape, shapes.bank) == {source: sites[source].shape}
        learned += sum(leaf.size for leaf in jax.tree.leaves(shapes.coefficients))
        bases += sites[source].size
        repeated |= {source, *targets.split()}
    assert learned == LEARNED[n]
    private = sum(site.size for name, site in sites.items() if name not in repeated)
    others = 3 * sum(WIDTHS.values()) + 512 * 10 + 10  # biases and batch norm, classifier
    assert TOTAL.get(n) in (None, bases + private + learned + others)


class Net(nn.Module):
    """Two convolutions and two dense layers; `width` widens everything after the stem."""

    width: int = 1

    @nn.compact
    def __call__(self, x_BxHxWxC):
        x = nn.Conv(4, (3, 3), name="stem")(x_BxHxWxC)
        x = nn.relu(nn.Conv(3 * self.width + self.width // 2, (3, 3), name="conv")(x))  # 3, 7, 10
        x = nn.relu(nn.Dense(4 * self.width, name="hidden")(x.mean((1, 2))))
        return nn.Dense(5, name="classifier")(x)


X = jnp.ones((2, 6, 6, 2))


def test_like_takes_every_base_from_the_small_model():
    rule = Rule(".*/kernel", Repeat(like=Net(1), initial="paper"))
    shared = paramshare.share(Net(3), Plan(rule), X)
    variables = jax.jit(shared.init)(KEY, X)
    small = jax.eval_shape(Net(1).init, KEY, X)["params"]
    bank, coefficients = (
        variables["banks"]["shared"],
        variables["params"]["coefficients"]["shared"],
    )
    assert {name: leaf.shape for name, leaf in bank.items()} == {
        f"{layer}.kernel": small[layer]["kernel"].shape for layer in small
    }
    assert jax.tree.map(jnp.shape, dict(coefficients)) == {
        "conv.kernel": {
            "tiles": (3, 1, 2),
            "outputs": (2,),  # (4, 3) to (4, 10); the stem is (2, 4) in both
        },
        "hidden.kernel": {"tiles": (3, 3, 2), "inputs": (2,)},  # (3, 4) to (10, 12)
        "classifier.kernel": {"tiles": (1, 3, 2)},  # (4, 5) to (12, 5)
    }
    params: Any = jax.jit(shared.expand)(variables)["params"]
    plain = jax.eval_shape(Net(3).init, KEY, X)["params"]
    # Biases among them, at full size.
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, plain)
    for layer in small:
        scalars = jax.tree.map(np.asarray, dict(coefficients.get(f"{layer}.kernel", {})))
        base = np.asarray(bank[f"{layer}.kernel"])
        expected = reference(base, plain[layer]["kernel"].shape, scalars)
        # float32, a few roundings.
        np.testing.assert_allclose(params[layer]["kernel"], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(params["stem"]["kernel"], bank["stem.kernel"])


def test_the_small_model_gets_the_inputs_of_the_plan():
    """Here three channels, which the base of the stem follows."""
    x = jnp.ones((1, 6, 6, 3))
    plan = Plan(Rule("stem/kernel", Repeat(like=Net(), initial="paper")))
    layout, again = plan.resolve(Net(2), x), plan.resolve(Net(2), x)
    assert layout["shared"].trainable == (3 * 3 * 3 * 4, 0, 0)
    assert layout == again and hash(layout) == hash(again)
    assert str(layout["shared"].scheme) == "Repeat(like=Net)"


def test_a_layout_keeps_only_the_shapes_of_the_small_model():
    """A layout is hashable, even where the small model is not: a Sequential holds a list."""
    big, small = (nn.Sequential([nn.Dense(width), nn.Dense(width)]) for width in (8, 4))
    layout = Plan(Rule(".*/kernel", Repeat(like=small, initial="paper"))).resolve(
        big, jnp.ones((1, 8))
    )
    assert isinstance(hash(layout), int)


def test_all_layers_repeat_the_base_of_the_source():
    """The source's kernel is the base itself. The gradient of every layer reaches it."""
    scheme = Repeat(source="b/kernel", initial="paper")
    sites = (
        Site("b/kernel", (3, 3, 2, 3)),
        Site("c/kernel", (3, 3, 4, 6)),
        Site("d/kernel", (3, 3, 3, 4)),
        Site("e/kernel", (3, 3, 2, 3)),
    )

    def sums(weights):
        kernels = scheme.expand(weights, sites)
        return jnp.stack([jnp.sum(kernel) for kernel in kernels]), kernels

    @jax.jit
    def results():
        weights = scheme.init(KEY, sites)
        return weights, *jax.jacrev(sums, has_aux=True)(weights)

    weights, slopes, kernels = results()
    assert list(weights.bank) == ["b.kernel"]
    assert set(weights.coefficients) == {"c.kernel", "d.kernel"}
    base = np.asarray(weights.bank["b.kernel"])
    for site, kernel in zip(sites, kernels, strict=True):
        scalars = jax.tree.map(np.asarray, weights.coefficients.get(site.key, {}))
        expected = reference(base, site.shape, scalars)
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(slopes.bank["b.kernel"]) != 0)


class Step(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(self.width, name="dense")(x)), None


class Scanned(nn.Module):
    """A layer, then three layers in one stacked parameter."""

    width: int = 7
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="first")(x)
        layers = nn.scan(Step, {"params": self.axis}, split_rngs={"params": True}, length=3)
        return layers(self.width, name="layers")(x, None)[0]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("how", [{"base": (3, 2)}, {"source": "first/kernel"}])
def test_layers_stacked_by_scan(axis, how):
    """Each layer of the stack is a site, with its own base or (depth) that of an earlier layer."""
    model, x = Scanned(axis=axis), jnp.ones((2, 4))
    scheme = Repeat(initial="paper", **how)
    rules = [Rule("layers/dense/kernel", scheme, stack_axis=axis)]
    rules += [Rule("first/kernel", scheme)] if "source" in how else []
    shared = paramshare.share(model, Plan(*rules), x)
    variables = jax.jit(shared.init)(KEY, x)
    bank, coefficients = (
        variables["banks"]["shared"],
        variables["params"]["coefficients"]["shared"],
    )
    names = [f"layers.dense.kernel[{i}]" for i in range(3)]
    assert set(coefficients) == set(names)
    assert set(bank) == ({"first.kernel"} if "source" in how else set(names))
    params: Any = jax.jit(shared.expand)(variables)["params"]
    for i, name in enumerate(names):
        base = np.asarray(bank["first.kernel" if "source" in how else name])
        expected = reference(base, (7, 7), jax.tree.map(np.asarray, dict(coefficients[name])))
        kernel = np.asarray(params["layers"]["dense"]["kernel"]).take(i, axis)
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-7)
    output: Any = jax.jit(shared.apply)(variables, x)
    plain: Any = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_allclose(output, plain, rtol=1e-5, atol=1e-6)


def test_a_stacked_layer_can_be_the_source():
    scheme = Repeat(source="layers/dense/kernel[0]", initial="paper")
    plan = Plan(Rule("layers/dense/kernel", scheme, stack_axis=0))
    layout = plan.resolve(Scanned(), jnp.ones((2, 4)))
    assert layout["shared"].trainable == (49, 0, 0)


@pytest.mark.parametrize("axis", [0, 1])
def test_like_with_layers_stacked_by_scan(axis):
    scheme = Repeat(like=Scanned(3, axis), initial="paper")
    plan = Plan(Rule("layers/dense/kernel", scheme, stack_axis=axis))
    layout = plan.resolve(Scanned(7, axis), jnp.ones((2, 4)))
    assert layout["shared"].trainable == (3 * 9, 3 * (2 * 2 * 2 + 2 + 2), 0)
