"""Plans: which parameters a rule takes, in which order, without a device; and every way in which a plan can be wrong."""

import os
import pickle
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from paramshare import Layout, Plan, PlanError, Rule, Soft

X = jax.ShapeDtypeStruct((2, 8), jnp.float32)


class Stack(nn.Module):
    """Eight to eight, `depth` times, and one odd layer."""

    depth: int = 4
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(nn.Dense) if self.remat else nn.Dense
        for i in range(1, self.depth + 1):
            x = dense(8, name=f"block{i}")(x)
        return nn.Dense(3, name="odd")(x)


class OutOfOrder(nn.Module):
    """Defined in one order, called in another, one layer twice."""

    def setup(self):
        self.a, self.b, self.c = nn.Dense(8), nn.Dense(8), nn.Dense(8)

    def __call__(self, x):
        return self.b(self.a(self.b(self.c(x))))


def paths(layout: Layout, bank: str = "shared") -> list[str]:
    return [str(site) for site in layout[bank].sites]


def kernels(pattern: str = r"block\d+/kernel", **options) -> Rule:
    return Rule(pattern, Soft(2), **options)


def test_the_first_rule_that_matches_takes_a_parameter():
    layout = Plan(kernels(r"block[12]/kernel", bank="early"), kernels(r"block\d/kernel", bank="rest")).resolve(Stack(), X)
    assert list(layout) == ["early", "rest"]
    assert paths(layout, "early") == ["block1/kernel", "block2/kernel"]
    assert paths(layout, "rest") == ["block3/kernel", "block4/kernel"]
    assert layout.private == 4 * 8 + 8 * 3 + 3


def test_patterns_match_whole_paths():
    layout = Plan(kernels(r"block1/k.*")).resolve(Stack(12), X)
    assert paths(layout) == ["block1/kernel"]  # neither block10/kernel nor block1/bias


def test_named_groups_name_banks():
    layout = Plan(Rule(r"block(?P<n>[12])/(?P<what>kernel|bias)", Soft(1), bank="{what}-{n}")).resolve(Stack(), X)
    assert sorted(layout) == ["bias-1", "bias-2", "kernel-1", "kernel-2"]


def test_two_rules_may_feed_one_bank():
    layout = Plan(kernels("block3/kernel"), Rule(paths=("block1/kernel",), scheme=Soft(2))).resolve(Stack(), X)
    assert paths(layout) == ["block1/kernel", "block3/kernel"]  # in layer order all the same


@pytest.mark.parametrize("listed", ["block2/kernel", ["block2/kernel"], ("block4/kernel", "block2/kernel")])
def test_lists_of_paths(listed):
    found = paths(Plan(Rule(paths=listed, scheme=Soft(1))).resolve(Stack(), X))
    assert found == sorted([listed] if isinstance(listed, str) else listed)


@pytest.mark.parametrize("remat", [False, True])
def test_sites_stand_in_the_order_of_calls(remat):
    assert paths(Plan(kernels()).resolve(Stack(23, remat), X)) == [f"block{i}/kernel" for i in range(1, 24)]


def test_order_is_of_calls_not_of_definitions():
    assert paths(Plan(kernels(".*/kernel")).resolve(OutOfOrder(), X)) == ["c/kernel", "b/kernel", "a/kernel"]


def test_numbered_parameters_of_one_module_stand_in_the_order_of_their_numbers():
    class Chain(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(12):
                x = x @ self.param(f"w{i}", nn.initializers.he_normal(), (8, 8))
            return x

    assert paths(Plan(kernels(r"w\d+")).resolve(Chain(), X)) == [f"w{i}" for i in range(12)]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stacked_parameter_is_a_site_a_layer(axis):
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
    assert {site.shape for site in layout["shared"].sites} == {(8, 8)}
    assert layout.plain == 5 * (64 + 8)


class Integers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("steps", lambda key: jnp.zeros((1, 8), jnp.int32)).astype(x.dtype)


RULES = {
    "neither pattern nor paths": (lambda: Rule(scheme=Soft(1)), "either a pattern or a list of paths"),
    "pattern and paths": (lambda: Rule("a", Soft(1), paths=("a",)), "either a pattern or a list of paths"),
    "no scheme": (lambda: Rule("a"), "scheme must be a sharing scheme"),
    "a class for a scheme": (lambda: Rule("a", Soft), "scheme must be a sharing scheme"),  # type: ignore[arg-type]
    "a path twice": (lambda: Rule(paths=("a/b", "c", "a/b"), scheme=Soft(1)), "'a/b' is listed twice"),
    "no regular expression": (lambda: Rule("block(", Soft(1)), r"Rule\('block\('\).*not a regular expression"),
    "a group that is not there": (lambda: Rule(r"(?P<stage>a)", Soft(1), bank="{level}"), r"'\{level\}' asks for 'level'.*\['stage'\]"),
    "a group by number": (lambda: Rule(r"(a)", Soft(1), bank="{}"), "named groups"),
    "a brace left open": (lambda: Rule(r"(a)", Soft(1), bank="{stage"), "named groups"),
    "a plan of no rules": (lambda: Plan(), "at least one rule"),
    "a plan of no rule": (lambda: Plan("block"), "made of rules, got 'block'"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", RULES)
def test_rules_that_cannot_be(case):
    make, said = RULES[case]
    with pytest.raises(PlanError, match=said):
        make()


ODD = Rule(r"block1/kernel|odd/kernel", Soft(1))
PLANS = {
    "nothing matched": (Plan(kernels(r"blok\d/kernel")), r"Rule\('blok.*matches no parameter.*nearest: 'block"),
    "a parameter's scope alone": (Plan(kernels(r"block1")), "the whole path must match"),
    "path missing": (Plan(Rule(paths=("block7/kernel",), scheme=Soft(1))), "no parameter 'block7/kernel'; nearest: 'block"),
    "path taken": (Plan(kernels(), Rule(paths=("block2/kernel",), scheme=Soft(1), bank="b")), "lists 'block2/kernel', but .* comes first"),
    "all taken": (Plan(kernels(), kernels("block2/.ernel", bank="b")), r"only parameters that earlier rules take, such as 'block2/kernel'"),
    "unequal shapes": (Plan(ODD), r"bank 'shared'.*block1/kernel is \(8, 8\) and odd/kernel is \(8, 3\)"),
    "two schemes": (Plan(kernels("block1/kernel"), Rule("block2/kernel", Soft(1))), r"both draw on bank 'shared', through .*=2.* and .*=1"),
    "empty bank name": (Plan(Rule(r"block1/kernel(?P<s>.*)", Soft(1), bank="{s}")), "bank named ''"),
    "slash in bank name": (Plan(Rule(r"(?P<s>block1/kernel)", Soft(1), bank="{s}")), "bank named 'block1/kernel'"),
    "unset group": (Plan(Rule(r"(?P<s>stem)?block1/kernel", Soft(1), bank="x{s}")), "without setting its group 's'"),
    "stacked too deep": (Plan(kernels(stack_axis=2)), r"stacked along axis 2, but its shape is \(8, 8\)"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_that_do_not_fit(case):
    plan, said = PLANS[case]
    with pytest.raises(PlanError, match=said) as caught:
        plan.resolve(Stack(), X)
    assert "\n" not in str(caught.value)


def test_integers_are_not_shared():
    with pytest.raises(PlanError, match="'steps', whose dtype is int32"):
        Plan(Rule("steps", Soft(1))).resolve(Integers(), X)


def test_a_model_without_parameters():
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


def test_a_banks_draw_depends_on_the_key_and_its_name_alone():
    early, late = kernels("block[12]/kernel", bank="early"), kernels("block[34]/kernel", bank="late")
    key = jax.random.key(0, impl="rbg")  # compiles faster than the default
    (banks, coefficients), (alone, _) = (Plan(*rules).resolve(Stack(), X).init(key) for rules in ((early, late), (late,)))
    assert jnp.array_equal(banks["late"]["templates"], alone["late"]["templates"])
    assert not jnp.allclose(banks["early"]["templates"], banks["late"]["templates"])
    assert not jnp.allclose(jnp.abs(coefficients["early"]), jnp.abs(coefficients["late"]))


def test_describe_adds_up():
    layout = Plan(kernels()).resolve(Stack(), X)
    lines = layout.describe().splitlines()
    trained = 2 * 64 + 4 * 2
    assert lines[2].split() == ["shared", "Soft(templates=2)", "4", "8x8", str(trained), str(4 * 64 - trained)]
    assert lines[4].split() == ["total", "4", str(layout.plain - 4 * 64 + trained), str(4 * 64 - trained)]
    assert lines[-4:] == [f"  block{i}/kernel" for i in range(1, 5)]


HUGE = """
import flax.linen as nn, jax, jax.numpy as jnp, paramshare
for name in ("swrn-28-18-2", "wrn-28-18", "swrn-50-2-2"):
    paramshare.create_model(name)
model = nn.Sequential([nn.Dense(1_000_000, use_bias=False), nn.Dense(1_000_000, use_bias=False)])  # 8 TB
x = jax.ShapeDtypeStruct((1, 1_000_000), jnp.float32)
shared = paramshare.share(model, paramshare.Plan(paramshare.Rule(".*", paramshare.Soft(1))), x)
variables = jax.eval_shape(lambda x: shared.init(jax.random.key(0), x), x)
shared.describe()
print(paramshare.count(variables)["trainable"])
"""


def test_resolving_needs_no_device():
    """On a platform that is not there, JAX fails at the first touch of a device."""
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", HUGE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(10**12 + 2), done.stderr
    touched = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, check=False)
    assert touched.returncode != 0
