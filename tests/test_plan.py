"""Plans: which parameters a rule matches, in which order, without a device; invalid plans."""

import os
import pickle
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree

from paramshare import Layout, Plan, PlanError, Rule, Soft, Tied

X = jax.ShapeDtypeStruct((2, 8), jnp.float32)
SOFT = Soft(2, initial="paper")  # measures no initializers


class Stack(nn.Module):
    """`depth` layers from eight to eight, then a layer of another shape."""

    depth: int = 4
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        for i in range(1, self.depth + 1):
            x = dense(8, name=f"block{i}")(x)
        return nn.Dense(3, name="odd")(x)


class OutOfOrder(nn.Module):
    """Layers called in another order than defined, one of them twice."""

    def setup(self):
        self.a, self.b, self.c = nn.Dense(8), nn.Dense(8), nn.Dense(8)

    def __call__(self, x):
        return self.b(self.a(self.b(self.c(x))))


def paths(layout: Layout, bank: str = "shared") -> list[str]:
    return [str(site) for site in layout[bank].sites]


def kernels(pattern: str = r"block\d+/kernel", **options) -> Rule:
    return Rule(pattern, SOFT, **options)


def test_a_parameter_follows_the_first_rule_that_matches():
    layout = Plan(
        kernels(r"block[12]/kernel", bank="early"), kernels(r"block\d/kernel", bank="late")
    ).resolve(Stack(), X)
    assert list(layout) == ["early", "late"]
    assert paths(layout, "early") == ["block1/kernel", "block2/kernel"]
    assert paths(layout, "late") == ["block3/kernel", "block4/kernel"]
    assert layout.private == 4 * 8 + 8 * 3 + 3


def test_patterns_match_whole_paths():
    layout = Plan(kernels(r"block1/k.*")).resolve(Stack(12), X)
    assert paths(layout) == ["block1/kernel"]  # neither block10/kernel nor block1/bias


def test_named_groups_name_banks():
    rule = Rule(r"block(?P<n>[12])/(?P<what>kernel|bias)", SOFT, bank="{what}-{n}")
    layout = Plan(rule).resolve(Stack(), X)
    assert sorted(layout) == ["bias-1", "bias-2", "kernel-1", "kernel-2"]


def test_two_rules_may_use_one_bank():
    plan = Plan(kernels("block3/kernel"), Rule(paths=("block1/kernel",), scheme=SOFT))
    layout = plan.resolve(Stack(), X)
    assert paths(layout) == ["block1/kernel", "block3/kernel"]  # in layer order, not rule order


@pytest.mark.parametrize(
    "listed", ["block2/kernel", ["block2/kernel"], ("block4/kernel", "block2/kernel")]
)
def test_lists_of_paths(listed):
    layout = Plan(Rule(paths=listed, scheme=SOFT)).resolve(Stack(), X)
    assert paths(layout) == sorted([listed] if isinstance(listed, str) else listed)


@pytest.mark.parametrize("remat", [False, True])
def test_sites_are_in_the_order_of_calls(remat):
    layout = Plan(kernels()).resolve(Stack(11, remat), X)
    assert paths(layout) == [f"block{i}/kernel" for i in range(1, 12)]


def test_order_is_of_calls_not_of_definitions():
    layout = Plan(kernels(".*/kernel")).resolve(OutOfOrder(), X)
    assert paths(layout) == ["c/kernel", "b/kernel", "a/kernel"]


def test_numbered_parameters_of_one_module_are_in_the_order_of_their_numbers():
    class Chain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(12):
                x = x @ self.param(f"w{i}", nn.initializers.he_normal(), (8, 8))
            return x

    assert paths(Plan(kernels(r"w\d+")).resolve(Chain(), X)) == [f"w{i}" for i in range(12)]


@pytest.mark.parametrize("axis", [0, 1])
def test_every_layer_of_a_stacked_parameter_is_a_site(axis):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            class Step(nn.Module):
                @nn.compact
                def __call__(self, carry, _):
                    return nn.Dense(8, name="dense")(carry), None

            step = nn.scan(Step, {"params": axis}, split_rngs={"params": True}, length=5)
            return step(name="layers")(x, None)[0]

    layout = Plan(kernels("layers/dense/kernel", stack_axis=axis)).resolve(Scanned(), X)
    assert paths(layout) == [f"layers/dense/kernel[{i}]" for i in range(5)]
    assert [site.key for site in layout["shared"].sites][:1] == ["layers.dense.kernel[0]"]
    assert {site.shape for site in layout["shared"].sites} == {(8, 8)}
    assert layout.plain == 5 * (64 + 8)


RULES = {
    "neither pattern nor paths": (lambda: Rule(scheme=SOFT), "either a pattern or a list of paths"),
    "pattern and paths": (
        lambda: Rule("a", SOFT, paths=("a",)),
        "either a pattern or a list of paths",
    ),
    "no scheme": (lambda: Rule("a"), "scheme must be a sharing scheme"),
    "a class for a scheme": (
        lambda: Rule("a", Soft),  # type: ignore[arg-type]
        "scheme must be a sharing scheme",
    ),
    "a path twice": (
        lambda: Rule(paths=("a/b", "c", "a/b"), scheme=SOFT),
        "'a/b' is listed twice",
    ),
    "no regular expression": (
        lambda: Rule("block(", SOFT),
        r"Rule\('block\('\).*not a regular expression",
    ),
    "an unknown group": (
        lambda: Rule(r"(?P<stage>a)", SOFT, bank="{level}"),
        r"cannot format the bank name '\{level\}'.*\['stage'\]",
    ),
    "a group by number": (lambda: Rule(r"(a)", SOFT, bank="{}"), "named groups"),
    "a brace left open": (lambda: Rule(r"(a)", SOFT, bank="{stage"), "named groups"),
    "a bank that is no string": (
        lambda: Rule(".*", SOFT, bank=3),  # type: ignore[arg-type]
        "pattern, bank and paths must be strings, got .*3",
    ),
    "axes that are no integers": (
        lambda: Rule(".*", SOFT, in_axes=(0, "a")),  # type: ignore[arg-type]
        r"in_axes must be axes such as \(0, 1\), got \(0, 'a'\)",
    ),
    "an output axis that is no integer": (
        lambda: Rule(".*", SOFT, out_axes=1.0),  # type: ignore[arg-type]
        r"out_axes must be axes such as \(0, 1\), got 1.0",
    ),
    "a stack axis that is no integer": (
        lambda: Rule(".*", SOFT, stack_axis="0"),  # type: ignore[arg-type]
        "stack_axis must be an integer, got '0'",
    ),
    "a plan without rules": (lambda: Plan(), "at least one rule"),
    "a plan of a string": (
        lambda: Plan("block"),  # type: ignore[arg-type]
        "takes rules .*, got 'block'",
    ),
}


@pytest.mark.parametrize("case", RULES)
def test_invalid_rules_are_refused(case):
    make, message = RULES[case]
    with pytest.raises(PlanError, match=message):
        make()


PLANS = {
    "nothing matched": (
        Plan(kernels(r"blok\d/kernel")),
        r"Rule\('blok.*matches no parameter.*nearest: 'block",
    ),
    "a scope instead of a parameter": (Plan(kernels(r"block1")), "the whole path must match"),
    "a missing path": (
        Plan(Rule(paths=("block7/kernel",), scheme=SOFT)),
        "no parameter 'block7/kernel'; nearest: 'block",
    ),
    "a path that an earlier rule takes": (
        Plan(kernels(), Rule(paths=("block2/kernel",), scheme=SOFT, bank="b")),
        r"lists 'block2/kernel', but the earlier Rule\('block",
    ),
    "all parameters taken": (
        Plan(kernels(), kernels("block2/.ernel", bank="b")),
        r"only parameters that earlier rules take, such as 'block2/kernel'",
    ),
    "unequal shapes": (
        Plan(kernels(r"block1/kernel|odd/kernel")),
        r"bank 'shared'.*block1/kernel is \(8, 8\) and odd/kernel is \(8, 3\)",
    ),
    "two schemes": (
        Plan(kernels("block1/kernel"), Rule("block2/kernel", Soft(1, initial="paper"))),
        r"both use bank 'shared', with .*=2.* and .*=1",
    ),
    "an empty bank name": (
        Plan(kernels(r"block1/kernel(?P<s>.*)", bank="{s}")),
        "bank named ''",
    ),
    "a slash in a bank name": (
        Plan(kernels(r"(?P<s>block1/kernel)", bank="{s}")),
        "bank named 'block1/kernel'",
    ),
    "a bank named like the model": (Plan(kernels(bank="model")), "or be 'model'"),
    "an unset group": (
        Plan(kernels(r"(?P<s>stem)?block1/kernel", bank="x{s}")),
        "uses group 's', but that group matched nothing",
    ),
    "a stack axis too large": (
        Plan(kernels(stack_axis=2)),
        r"stack_axis=2, but 'block1/kernel' has shape \(8, 8\)",
    ),
    "an axis too large": (
        Plan(kernels(in_axes=(2,))),
        r"Rule\('block.*block1/kernel of shape \(8, 8\) has in_axes=\(2,\).*from 0 to 1",
    ),
    "a negative axis": (Plan(kernels(out_axes=-1)), r"out_axes=\(-1,\); they must be different"),
    "an axis for inputs and outputs": (
        Plan(kernels(in_axes=(1,))),
        r"in_axes=\(1,\) and out_axes=\(1,\); they must be different",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_do_not_fit_are_refused(case):
    plan, message = PLANS[case]
    with pytest.raises(PlanError, match=message) as caught:
        plan.resolve(Stack(), X)
    assert "\n" not in str(caught.value)


def test_integer_parameters_cannot_be_shared():
    class Integers(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.param("steps", lambda _: jnp.zeros((1, 8), jnp.int32)).astype(x.dtype)

    with pytest.raises(PlanError, match="steps has dtype int32"):
        Plan(Rule("steps", SOFT)).resolve(Integers(), X)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(PlanError, match="Sequential has no parameters"):
        Plan(kernels()).resolve(nn.Sequential([nn.relu]), X)


def test_layouts_are_values():
    plan, same = Plan(kernels()), Plan(kernels())
    assert (plan, hash(plan)) == (same, hash(same))
    first, second = plan.resolve(Stack(), X), same.resolve(Stack(), X)
    assert (first, hash(first)) == (second, hash(second))
    assert pickle.loads(pickle.dumps(first)) == first
    assert first != plan.resolve(Stack(5), X)
    with pytest.raises(KeyError):
        first["stage1"]


def test_schemes_can_be_replaced_by_bank():
    layout = Plan(kernels()).resolve(Stack(), X)
    tied = Tied(groups=(0, 1, 0, 1))
    replaced = layout.with_schemes({"shared": tied})
    assert (replaced["shared"].scheme, replaced["shared"].sites) == (tied, layout["shared"].sites)
    with pytest.raises(PlanError, match=r"no bank 'b'; the banks are \['shared'\]"):
        layout.with_schemes({"b": tied})
    with pytest.raises(PlanError, match=r"bank 'shared': .*groups for 2 sites"):
        layout.with_schemes({"shared": Tied(groups=(0, 1))})


def test_a_banks_initialization_depends_only_on_the_key_and_its_name():
    early = kernels("block[12]/kernel", bank="early")
    late = kernels("block[34]/kernel", bank="late")
    key = jax.random.key(0, impl="rbg")  # compiles faster than the default
    (banks, params), (alone, _) = (
        Plan(*rules).resolve(Stack(), X).init(key) for rules in ((early, late), (late,))
    )
    early_bank, late_bank, alone_bank = map(
        ravel_pytree, (banks["early"], banks["late"], alone["late"])
    )
    assert jnp.array_equal(late_bank[0], alone_bank[0])
    assert not jnp.allclose(early_bank[0], late_bank[0])
    rows = params["coefficients"]
    first, third = rows["early"]["block1.kernel"], rows["late"]["block3.kernel"]
    assert not jnp.allclose(jnp.abs(first), jnp.abs(third))


def test_describe_adds_up():
    layout = Plan(kernels()).resolve(Stack(), X)
    lines = layout.describe().splitlines()
    trained = 2 * 64 + 4 * 2
    scheme = "Soft(templates=2)"
    saved = str(4 * 64 - trained)
    assert lines[2].split() == ["shared", scheme, "4", "8x8", str(trained), saved]
    assert lines[4].split() == ["total", "4", str(layout.plain - 4 * 64 + trained), saved]
    assert lines[-4:] == [f"  block{i}/kernel" for i in range(1, 5)]


HUGE = """
import flax.linen as nn, jax, jax.numpy as jnp, paramshare
for name in ("swrn-28-18-2", "wrn-28-18", "swrn-50-2-2"):
    paramshare.create_model(name)
# 8 TB
model = nn.Sequential([nn.Dense(1_000_000, use_bias=False), nn.Dense(1_000_000, use_bias=False)])
x = jax.ShapeDtypeStruct((1, 1_000_000), jnp.float32)
scheme = paramshare.Soft(1, initial="paper")
shared = paramshare.share(model, paramshare.Plan(paramshare.Rule(".*", scheme)), x)
variables = jax.eval_shape(lambda x: shared.init(jax.random.key(0), x), x)
shared.describe()
print(paramshare.count(variables)["trainable"])
try:
    jax.devices()
except RuntimeError:
    print("no device")
"""


def test_without_measurement_resolving_needs_no_device():
    """On a platform that does not exist, JAX fails at the first use of a device."""
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    command = [sys.executable, "-c", HUGE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == [str(10**12 + 2), "no device"], done.stderr
