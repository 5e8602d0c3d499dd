"""Learnable repetition as Chavan et al. publish it: the formula, tile by tile, its initialisation, its counts in VGGs."""

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

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
NUMBERS = {"swish": 2, "fourier": 6, "linear": 0}


def transformed(w: np.ndarray, numbers: np.ndarray, transform: str) -> np.ndarray:
    if transform == "linear":
        return w
    if transform == "fourier":  # a polynomial, despite its name
        return np.polynomial.polynomial.polyval(w, numbers)
    alpha, beta = numbers
    return alpha * w / (1 + np.exp(beta * w))


def by_hand(base: np.ndarray, shape: tuple[int, ...], numbers: dict[str, np.ndarray], transform: str = "swish") -> np.ndarray:
    """The paper's construction, copy by copy: tiles, then the outputs left over, then the inputs left over."""
    if base.shape == shape:
        return base
    (*cell, inputs, outputs), nothing = base.shape, np.zeros(0)
    (tiles_out, rest_out), (tiles_in, rest_in) = divmod(shape[-1], outputs), divmod(shape[-2], inputs)
    kernel = np.full((*cell, tiles_in * inputs, tiles_out * outputs), np.nan)
    for i, j in itertools.product(range(tiles_out), range(tiles_in)):
        tile = transformed(base, numbers["tiles"][i, j] if numbers else nothing, transform)
        kernel[..., j * inputs : (j + 1) * inputs, i * outputs : (i + 1) * outputs] = tile
    if rest_out:
        rest = transformed(kernel[..., :rest_out], numbers.get("outputs", nothing), transform)
        kernel = np.concatenate([kernel, rest], axis=-1)
    if rest_in:
        rest = transformed(kernel[..., :rest_in, :], numbers.get("inputs", nothing), transform)
        kernel = np.concatenate([kernel, rest], axis=-2)
    return kernel


def random_numbers(rng: np.random.Generator, base: tuple[int, ...], shape: tuple[int, ...], m: int) -> dict[str, np.ndarray]:
    """What a site learns beside its base: of the shapes that the docstring gives."""
    if base == shape or not m:
        return {}
    numbers = {"tiles": rng.normal(size=(shape[-1] // base[-1], shape[-2] // base[-2], m))}
    if shape[-1] % base[-1]:
        numbers["outputs"] = rng.normal(size=m)
    if shape[-2] % base[-2]:
        numbers["inputs"] = rng.normal(size=m)
    return numbers


def arrays(tree: Any) -> Any:
    return jax.tree.map(jnp.asarray, tree)


def test_the_reference_test_vector():
    """Computed by the reference in (out, in, kh, kw); all layouts are turned here."""
    w_OxIxHxW = np.sin(0.1 * np.arange(2 * 3 * 3 * 3)).reshape(2, 3, 3, 3)
    x_BxCxHxW = np.cos(0.01 * np.arange(7 * 4 * 4)).reshape(1, 7, 4, 4)
    pairs = np.stack([[0.5, -1.0, 2.0, 1.5], [1.0, 0.0, -1.0, 0.5]], axis=-1)  # (alpha, beta) of tile (out i, in j) at 2 i + j
    numbers = {"tiles": pairs.reshape(2, 2, 2), "outputs": np.array([0.7, 0.3]), "inputs": np.array([-0.4, 0.9])}
    with jax.enable_x64(True):
        scheme, site = Repeat(base=(3, 3, 3, 2)), Site("conv", (3, 3, 7, 5), "float64")
        base = jnp.asarray(w_OxIxHxW.transpose(2, 3, 1, 0))
        (kernel,) = scheme.expand({"conv": base}, {"conv": arrays(numbers)}, (site,))
        assert kernel.dtype == jnp.float64
        x = jnp.asarray(x_BxCxHxW.transpose(0, 2, 3, 1))
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"))
        assert y.shape == (1, 4, 4, 5)
        assert float(jnp.sum(y)) == pytest.approx(110.94453785974778, abs=1e-12)


def test_the_first_tile_by_pencil():
    """alpha w / (1 + exp(beta w)): with beta = 0 half of alpha w; and a positive beta weakens positive weights."""
    scheme, site = Repeat(base=(1, 2)), Site("dense", (1, 4))
    numbers = {"tiles": jnp.asarray([[[3.0, 0.0]], [[1.0, math.log(3.0)]]])}
    (kernel,) = scheme.expand({"dense": jnp.asarray([[1.0, -1.0]])}, {"dense": numbers}, (site,))
    np.testing.assert_allclose(kernel, [[1.5, -1.5, 1 / (1 + 3), -1 / (1 + 1 / 3)]], rtol=1e-6)


AXES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(0, 9))


@settings(deadline=None, max_examples=30, derandomize=True, database=None)
@given(cell=st.sampled_from([(), (1, 1), (3, 2)]), axes=AXES, transform=st.sampled_from(sorted(NUMBERS)), seed=st.integers(0, 9))
def test_kernels_are_the_papers_tile_by_tile(cell, axes, transform, seed):
    """Any base into any target, remainders and equal shapes included, dense kernels and convolutions, every transform."""
    inputs, outputs, more_in, more_out = axes
    base, shape = (*cell, inputs, outputs), (*cell, inputs + more_in, outputs + more_out)
    rng = np.random.default_rng(seed)
    weights, numbers = rng.normal(size=base), random_numbers(rng, base, shape, NUMBERS[transform])
    scheme, sites = Repeat(base=base, transform=transform), (Site("a/kernel", shape, "float64"),)
    with jax.enable_x64(True):
        bank, coefficients = jax.eval_shape(lambda: scheme.init(KEY, sites))
        assert {name: leaf.shape for name, leaf in bank.items()} == {"a.kernel": base}
        learned = {"a.kernel": numbers} if numbers else {}
        assert jax.tree.map(np.shape, coefficients) == jax.tree.map(np.shape, learned)
        bank, own = {"a.kernel": jnp.asarray(weights)}, arrays(learned)
        (kernel,) = jax.jit(lambda bank, own: scheme.expand(bank, own, sites))(bank, own)
    wanted = by_hand(weights, shape, numbers, transform)
    # float64: a few roundings of numbers that the polynomial, twice or three times over, may make large; relative to the largest.
    np.testing.assert_allclose(kernel, wanted, rtol=1e-12, atol=1e-13 * np.abs(wanted).max())


@pytest.mark.parametrize("transform", NUMBERS)
@pytest.mark.parametrize("how", [{"base": (3, 3, 4, 6)}, {"source": "a/kernel"}])
def test_equal_shapes_are_plain_sharing(transform, how):
    scheme, sites = Repeat(transform=transform, **how), (Site("a/kernel", (3, 3, 4, 6)), Site("b/kernel", (3, 3, 4, 6)))
    bank, coefficients = scheme.init(KEY, sites)
    assert coefficients == {}
    bases = list(bank.values()) if "base" in how else [bank["a.kernel"]] * 2
    for kernel, base in zip(scheme.expand(bank, coefficients, sites), bases, strict=True):
        np.testing.assert_array_equal(kernel, base)


def test_one_equal_axis_still_transforms():
    """The whole shape decides: one tile, of two numbers, where a remainder is all that is added."""
    sites = (Site("a", (4, 5)),)
    _, coefficients = Repeat(base=(4, 3)).init(KEY, sites)
    assert jax.tree.map(jnp.shape, coefficients) == {"a": {"tiles": (1, 1, 2), "outputs": (2,)}}


def assert_uniform(values: Any, low: float, high: float):
    """Inside the range, and as Kolmogorov and Smirnov would have it: beyond 2.2 / sqrt(n) once in 8,000 draws."""
    x = np.sort(np.asarray(values, np.float64).ravel())
    assert low <= x[0] and x[-1] <= high
    uniform = (x - low) / (high - low)
    steps = np.arange(x.size + 1) / x.size
    assert max(np.max(steps[1:] - uniform), np.max(uniform - steps[:-1])) < 2.2 / math.sqrt(x.size)


@pytest.mark.parametrize("transform", ["swish", "fourier"])
def test_everything_starts_uniform(transform):
    """Bases are Xavier's; a tile's range narrows with the number of tiles; remainders are between 0 and 1."""
    base = (3, 3, 4, 6)
    sites = (Site("few", (3, 3, 9, 13)), Site("many", (3, 3, 16, 24)), Site("none", base))
    bank, numbers = jax.jit(jax.vmap(lambda key: Repeat(base=base, transform=transform).init(key, sites)))(jax.random.split(KEY, 500))
    assert numbers["few"]["tiles"].shape == (500, 2, 2, NUMBERS[transform])
    for site in sites:
        assert_uniform(bank[site.path], -math.sqrt(6 / (9 * (4 + 6))), math.sqrt(6 / (9 * (4 + 6))))
    assert set(numbers) == {"few", "many"}
    for name, n in (("few", 2 * 2), ("many", 4 * 4)):
        assert_uniform(numbers[name]["tiles"], -math.sqrt(6 / (n + 1)), math.sqrt(6 / (n + 1)))
    assert_uniform(numbers["few"]["outputs"], 0, 1)
    assert_uniform(numbers["few"]["inputs"], 0, 1)
    # Nothing is drawn twice: no two numbers of the 500 draws go together, by five standard errors.
    columns = [np.asarray(leaf).reshape(500, -1)[:, :4] for leaf in jax.tree.leaves((bank, numbers))]
    likeness = np.corrcoef(np.concatenate(columns, axis=1).T) - np.eye(sum(column.shape[1] for column in columns))
    assert np.abs(likeness).max() < 5 / math.sqrt(500)


WIDTHS = {f"{stage}_{i}": width for stage, width in enumerate((64, 128, 256, 512, 512), start=1) for i in (1, 2)}
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
def test_rep_vgg_learns_the_published_numbers(n):
    """Alpha and beta of rep_vgg_n, and its total for 10 classes, from the shapes of its convolutions alone."""
    inputs = dict(zip(NAMES, [3, *WIDTHS.values()], strict=False))
    sites = {name: Site(name, (3, 3, inputs[name], WIDTHS[name])) for name in NAMES}
    learned, bases, repeated = 0, 0, set()
    for source, targets in REPEATS[n].items():
        bank, numbers = jax.eval_shape(
            lambda s=source, t=targets: Repeat(source=s).init(KEY, tuple(sites[name] for name in (s, *t.split())))
        )
        assert {name: leaf.shape for name, leaf in bank.items()} == {source: sites[source].shape}
        learned += sum(leaf.size for leaf in jax.tree.leaves(numbers))
        bases += sites[source].size
        repeated |= {source, *targets.split()}
    assert learned == LEARNED[n]
    private = sum(site.size for name, site in sites.items() if name not in repeated)
    rest = 3 * sum(WIDTHS.values()) + 512 * 10 + 10  # biases and batch norm, classifier
    assert TOTAL.get(n) in (None, bases + private + learned + rest)


class Net(nn.Module):
    """Two convolutions and two dense layers, wider on request behind the stem."""

    width: int = 1

    @nn.compact
    def __call__(self, x_BxHxWxC):
        x = nn.Conv(4, (3, 3), name="stem")(x_BxHxWxC)
        x = nn.relu(nn.Conv(3 * self.width + self.width // 2, (3, 3), name="conv")(x))  # 3, 7, 10
        x = nn.relu(nn.Dense(4 * self.width, name="hidden")(x.mean((1, 2))))
        return nn.Dense(5, name="classifier")(x)


X = jnp.ones((2, 6, 6, 2))


def test_like_takes_every_base_from_the_small_model():
    shared = paramshare.share(Net(3), Plan(Rule(".*/kernel", Repeat(like=Net(1)))), X)
    variables = jax.jit(shared.init)(KEY, X)
    small = jax.eval_shape(Net(1).init, KEY, X)["params"]
    bank, own = variables["banks"]["shared"], variables["params"]["coefficients"]["shared"]
    assert {name: leaf.shape for name, leaf in bank.items()} == {f"{layer}.kernel": small[layer]["kernel"].shape for layer in small}
    assert jax.tree.map(jnp.shape, dict(own)) == {
        "conv.kernel": {"tiles": (3, 1, 2), "outputs": (2,)},  # (4, 3) to (4, 10); the stem is (2, 4) in both
        "hidden.kernel": {"tiles": (3, 3, 2), "inputs": (2,)},  # (3, 4) to (10, 12)
        "classifier.kernel": {"tiles": (1, 3, 2)},  # (4, 5) to (12, 5)
    }
    params: Any = jax.jit(shared.expand)(variables)["params"]
    plain = jax.eval_shape(Net(3).init, KEY, X)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, plain)  # biases full-size among them
    for layer in small:
        numbers = jax.tree.map(np.asarray, dict(own.get(f"{layer}.kernel", {})))
        wanted = by_hand(np.asarray(bank[f"{layer}.kernel"]), plain[layer]["kernel"].shape, numbers)
        np.testing.assert_allclose(params[layer]["kernel"], wanted, rtol=1e-5, atol=1e-7)  # float32, a few roundings
    np.testing.assert_array_equal(params["stem"]["kernel"], bank["stem.kernel"])


def test_like_is_bound_to_the_inputs_of_the_plan():
    """The small model is traced with the plan's inputs: here three channels, and the stem's base follows."""
    x = jnp.ones((1, 6, 6, 3))
    layout = Plan(Rule("stem/kernel", Repeat(like=Net()))).resolve(Net(2), x)
    assert layout["shared"].trainable == (3 * 3 * 3 * 4, 0)
    assert layout == Plan(Rule("stem/kernel", Repeat(like=Net()))).resolve(Net(2), x)
    assert hash(layout) == hash(Plan(Rule("stem/kernel", Repeat(like=Net()))).resolve(Net(2), x))
    assert str(layout["shared"].scheme) == "Repeat(like=Net)"


def test_like_leaves_no_more_than_shapes_in_a_layout():
    """A layout is a value, whatever the small model is made of: a Sequential holds a list."""
    big, small = (nn.Sequential([nn.Dense(width), nn.Dense(width)]) for width in (8, 4))
    layout = Plan(Rule(".*/kernel", Repeat(like=small))).resolve(big, jnp.ones((1, 8)))
    assert isinstance(hash(layout), int)


def test_depth_repeats_one_base_in_all_layers():
    """The source's kernel is the base itself, and every layer's gradient reaches it."""
    scheme = Repeat(source="b/kernel")
    sites = (Site("b/kernel", (3, 3, 2, 3)), Site("c/kernel", (3, 3, 4, 6)), Site("d/kernel", (3, 3, 3, 4)), Site("e/kernel", (3, 3, 2, 3)))
    bank, own = jax.jit(lambda: scheme.init(KEY, sites))()
    assert list(bank) == ["b.kernel"]
    assert set(own) == {"c.kernel", "d.kernel"}
    base = np.asarray(bank["b.kernel"])
    for site, kernel in zip(sites, jax.jit(lambda b, c: scheme.expand(b, c, sites))(bank, own), strict=True):
        numbers = jax.tree.map(np.asarray, own.get(site.path.replace("/", "."), {}))
        np.testing.assert_allclose(kernel, by_hand(base, site.shape, numbers), rtol=1e-5, atol=1e-7)
    sums = jax.jit(jax.jacrev(lambda b: jnp.stack([jnp.sum(kernel) for kernel in scheme.expand(b, own, sites)])))(bank)
    assert np.all(np.asarray(sums["b.kernel"]) != 0)


class Step(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(self.width, name="dense")(x)), None


class Scanned(nn.Module):
    """A layer, and three in one stacked parameter behind it."""

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
    """Every layer of the stack is a site: with a base of its own, or (depth) a repetition of an earlier layer's (4, 7)."""
    model, x = Scanned(axis=axis), jnp.ones((2, 4))
    rules = [Rule("layers/dense/kernel", Repeat(**how), stack_axis=axis)]
    rules += [Rule("first/kernel", Repeat(**how))] if "source" in how else []
    shared = paramshare.share(model, Plan(*rules), x)
    variables = jax.jit(shared.init)(KEY, x)
    bank, own = variables["banks"]["shared"], variables["params"]["coefficients"]["shared"]
    names = [f"layers.dense.kernel[{i}]" for i in range(3)]
    assert set(own) == set(names)
    assert set(bank) == ({"first.kernel"} if "source" in how else set(names))
    params: Any = jax.jit(shared.expand)(variables)["params"]
    for i, name in enumerate(names):
        base = np.asarray(bank["first.kernel" if "source" in how else name])
        kernel = by_hand(base, (7, 7), jax.tree.map(np.asarray, dict(own[name])))
        np.testing.assert_allclose(jnp.take(params["layers"]["dense"]["kernel"], i, axis), kernel, rtol=1e-5, atol=1e-7)
    output: Any = shared.apply(variables, x)
    wanted: Any = model.apply({"params": params}, x)
    np.testing.assert_allclose(output, wanted, rtol=1e-5, atol=1e-6)


def test_a_stacked_layer_may_be_the_source():
    layout = Plan(Rule("layers/dense/kernel", Repeat(source="layers/dense/kernel[0]"), stack_axis=0)).resolve(Scanned(), jnp.ones((2, 4)))
    assert layout["shared"].trainable == (49, 0)


@pytest.mark.parametrize("axis", [0, 1])
def test_like_with_layers_stacked_by_scan(axis):
    plan = Plan(Rule("layers/dense/kernel", Repeat(like=Scanned(3, axis)), stack_axis=axis))
    layout = plan.resolve(Scanned(7, axis), jnp.ones((2, 4)))
    assert layout["shared"].trainable == (3 * 9, 3 * (2 * 2 * 2 + 2 + 2))
