"""Looped networks against the folded ones, there and back."""

import functools
import operator

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import (
    FilterBasis,
    Plan,
    PlanError,
    Repeat,
    Rule,
    Shared,
    Soft,
    Tied,
    count,
    create_model,
)
from paramshare.models import ResNet, WideResNet
from paramshare.transform.looped import Loop, LoopedStages
from paramshare.transform.looping import LoopError, loop, unloop

IMAGES = jax.random.normal(jax.random.key(5), (4, 8, 8, 3))
QUICKLY = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiles in half the time
BASIC = ("conv1/kernel", "conv2/kernel")


def drawn(shared: Shared, images=IMAGES):
    """Random variables, without the ones and zeros of initialisation; scales of both signs."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        names = [key.key for key in path]
        around = 1.0 if names[-1] in ("scale", "var") else 0.0
        size = (
            1.0
            if "coefficients" in names
            else np.sqrt(2 / np.prod(leaf.shape[-4:-1]))
            if leaf.ndim > 1
            else 0.1
        )
        return jnp.asarray(around + rng.normal(size=leaf.shape) * size, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(shared, images))


def shapes_of(shared, images=IMAGES):
    return jax.eval_shape(lambda x: shared.init(jax.random.key(0), x), images)


# The initialisation does not matter here, and "paper" needs no measurement of the model's own.
TIED = Tied(initial="paper")


def soft(templates: int) -> Soft:
    return Soft(templates, initial="paper")


def tied(pattern, layers: int, scaled: bool = True) -> Tied:
    return Tied(groups=tuple((pattern * layers)[:layers]), scaled=scaled, initial="paper")


def wide(depth: int, *schemes) -> Shared:
    """A WRN of 1, 2, 4 channels; a bank of the later convolutions of each stage with a scheme."""
    return shared_by_stage(WideResNet(depth, 1 / 16, 5), schemes)


def staged(blocks: tuple[int, ...], *schemes) -> Shared:
    """Stages of basic blocks with four channels; a bank of all later convolutions of each."""
    model = ResNet(blocks, (4,) * len(blocks), 5, stem="cifar", stem_width=4)
    return shared_by_stage(model, schemes)


def shared_by_stage(model: nn.Module, schemes) -> Shared:
    rules = [
        Rule(rf"stage{number}/block(?!1/)\d+/conv\d/kernel", scheme, bank=f"stage{number}")
        for number, scheme in enumerate(schemes, start=1)
        if scheme is not None
    ]
    return paramshare.share(model, Plan(*rules), IMAGES)


def bottleneck(blocks: int, **schemes) -> Shared:
    """One stage of bottlenecks; a bank for each convolution that has a scheme."""
    model = ResNet((blocks,), (2,), 5, bottleneck=True, stem="cifar", stem_width=4)
    rules = [
        Rule(rf"stage1/block(?!1/)\d+/{conv}/kernel", scheme, bank=f"stage1-{conv}")
        for conv, scheme in schemes.items()
    ]
    return paramshare.share(model, Plan(*rules), IMAGES)


def results(model, variables):
    """Outputs in training, new statistics, gradients of banks and parameters."""

    def loss(trained, statistics):
        y_BxC, state = model.apply(
            {**statistics, **trained}, IMAGES, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(y_BxC)), (y_BxC, state)

    trained = {name: value for name, value in variables.items() if name != "batch_stats"}
    statistics = {"batch_stats": variables["batch_stats"]}
    gradient, (output, state) = QUICKLY(jax.grad(loss, has_aux=True))(trained, statistics)
    return {"output": output, "variables": gradient | state}


def largest(tree) -> float:
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


NETS = {
    "one stage of two": lambda: staged((3, 3), tied((0, 1), 4), soft(2)),
    "three kernels take turns": lambda: staged((8,), tied((0, 1, 2), 14)),
    "bottlenecks": lambda: bottleneck(
        3, conv1=tied((0,), 2), conv2=tied((0,), 2, scaled=False), conv3=tied((0,), 2)
    ),
    "one bank of three repeats": lambda: bottleneck(
        6,
        conv1=tied((0, 1), 5),
        conv2=FilterBasis(shared=1, unique=1, initial="paper"),
        conv3=Tied(groups=(0, 1, 1, 1, 0), scaled=True, initial="paper"),
    ),
}


# Where the blocks of a longer body keep their arrays: test_where_everything_lies, test_looped.py.
@pytest.mark.parametrize("name", [name for name in NETS if name != "three kernels take turns"])
def test_a_loop_is_the_folded_network(name):
    shared = NETS[name]()
    variables = drawn(shared)
    expected = results(shared, variables)
    looped = loop(shared, variables, unroll=False)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes_of(looped.model), looped.variables)
    actual = results(looped.model, looped.variables)
    # Equal in exact arithmetic; float32 sums in another order, through up to 18 batch norms.
    np.testing.assert_allclose(actual["output"], expected["output"], rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(
        unloop(shared, actual["variables"]),
        expected["variables"],
        rtol=1e-3,
        atol=5e-4 * largest(expected["variables"]),
    )


@pytest.mark.parametrize("name", NETS)
def test_to_and_back_are_exact(name):
    shared = NETS[name]()
    variables = drawn(shared)
    before = jax.tree.map(np.array, variables)
    looped = loop(shared, variables)
    back = unloop(shared, looped.variables)
    chex.assert_trees_all_equal(back, variables)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    chex.assert_trees_all_equal(variables, before)  # not touched
    # Also from other values of the looped network, as after training it.
    changed = jax.tree.map(
        lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), looped.variables
    )
    again = loop(shared, unloop(shared, changed))
    chex.assert_trees_all_equal(again.variables, changed)
    assert again.report == looped.report
    assert count(looped.variables)["trainable"] == count(variables)["trainable"]


def test_where_everything_lies():
    shared = NETS["three kernels take turns"]()
    variables = drawn(shared)
    looped = loop(shared, variables, unroll=False)
    assert isinstance(looped.model, ResNet)  # and no Shared
    turns = ((0, 1), (2, 0), (1, 2))
    only = Loop(BASIC, turns * 2 + turns[:1])
    assert looped.model == shared.model.clone(stage=LoopedStages({"stage1": only}, unroll=False))
    (report,) = looped.report
    assert (report.name, report.blocks, report.loop, report.banks, report.note) == (
        "stage1",
        8,
        only,
        ("stage1",),
        "",
    )
    stage, bank = looped.variables["params"]["stage1"], shared.layout["stage1"]
    weights = shared.layout.weights(variables)["stage1"]
    assert isinstance(bank.scheme, Tied)
    kernels, scales = bank.scheme.kernels(weights.bank), bank.scheme.scales(weights, bank.sites)
    assert set(stage) == {"block1", "loop", "scales", "body", "remaining"}
    chex.assert_trees_all_equal(stage["loop"], {str(i): kernels[i] for i in range(3)})  # once
    np.testing.assert_array_equal(stage["scales"].ravel(), scales)
    private = variables["params"]["model"]["stage1"]
    for i in range(6):
        block = jax.tree.map(operator.itemgetter(i // 3), stage["body"][f"block{i % 3 + 1}"])
        chex.assert_trees_all_equal(block, private[f"block{i + 2}"])
    chex.assert_trees_all_equal(stage["remaining"]["block1"], private["block8"])
    lines = [line.split() for line in str(looped).splitlines()]
    assert lines[2] == ["stage1", "8", "3", "2", "1", "3", "14", "stage1"]


@pytest.mark.parametrize(
    ("stages", "scaled", "trainable"),
    [  # issue: two kernels and six signed scales in place of four templates and six rows of four
        (("stage2",), True, 24_959_248),
        (("stage2",), False, 24_959_242),
        (("stage2", "stage3"), True, 17_586_430),
        (("stage2", "stage3"), False, 17_586_418),
    ],
)
def test_counts_of_the_papers_network(stages, scaled, trainable):
    soft = create_model("swrn-28-10-4")
    shared = Shared(
        soft.model, soft.layout.with_schemes({name: tied((0, 1), 6, scaled) for name in stages})
    )
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    loops = []

    def variables():
        looped = loop(shared, shared.init(jax.random.key(0), jnp.zeros(x.shape)))
        loops.append(looped)
        return looped.variables

    shapes = jax.eval_shape(variables)
    assert count(shapes)["trainable"] == trainable
    (looped,) = loops
    assert isinstance(looped.model, Shared) and looped.model.layout.trainable == trainable
    assert set(looped.model.layout) == {"stage1", "stage2", "stage3"} - set(
        stages
    )  # soft banks stay banks
    kernels = [
        jax.tree.map(jnp.shape, shapes["params"]["model"][stage]["loop"]) for stage in stages
    ]
    assert kernels == [{"0": (3, 3, w, w), "1": (3, 3, w, w)} for w in (320, 640)[: len(stages)]]
    own = jax.eval_shape(lambda x: looped.model.init(jax.random.key(0), x), x)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes)


def test_of_a_network_folded_by_the_library():
    """With one template per stage every stage is a loop, and the outputs stay the same."""
    shared = create_model("swrn-22-1-1", input_shape=(8, 8, 3))
    assert isinstance(shared, Shared)
    variables = drawn(shared)
    folded = paramshare.fold(shared, variables, threshold=1)
    looped = loop(folded.shared, folded.variables, unroll=False)
    assert isinstance(looped.model, WideResNet) and dict(looped.model.stage.loops) == {
        f"stage{number}": Loop(BASIC, ((0, 0),) * 2) for number in (1, 2, 3)
    }
    assert count(looped.variables)["trainable"] == count(variables)["trainable"]
    expected = QUICKLY(shared.apply)(variables, IMAGES)
    np.testing.assert_allclose(
        QUICKLY(looped.model.apply)(looped.variables, IMAGES),
        expected,
        rtol=1e-4,
        atol=1e-4 * largest(expected),
    )


def test_banks_that_remain():
    """Each for the given reason; the remaining banks serve the stacked parameters."""
    shared = NETS["one bank of three repeats"]()
    looped = loop(shared, drawn(shared))
    (report,) = looped.report
    assert report.banks == ("stage1-conv1",)
    assert (
        "bank 'stage1-conv3' remains: its groups, 0 1 1 1 0, do not repeat from block to block"
        in report.note
    )
    assert "bank 'stage1-conv2' remains: its scheme is FilterBasis(shared=1" in report.note
    assert isinstance(looped.model, Shared)
    sites = [str(site) for site in looped.model.layout["stage1-conv3"].sites]
    assert sites == [
        *(f"stage1/body/block{b}/conv3/kernel[{i}]" for i in (0, 1) for b in (1, 2)),
        "stage1/remaining/block1/conv3/kernel",
    ]
    together = bottleneck(
        6, conv1=tied((0, 1), 5), conv2=tied((0,), 5), conv3=tied((0,), 5, scaled=False)
    )
    assert loop(together, drawn(together)).report[0].banks == (
        "stage1-conv1",
        "stage1-conv2",
        "stage1-conv3",
    )
    apart = bottleneck(
        7, conv1=tied((0, 1), 6), conv2=tied((0, 1, 2), 6)
    )  # each repeats, but together not within six blocks
    (report,) = loop(apart, drawn(apart)).report
    assert report.banks == ("stage1-conv1",)
    assert (
        report.note
        == "bank 'stage1-conv2' remains: its groups, 0 1 2 0 1 2, do not repeat from block to "
        "block together with 'stage1-conv1'"
    )


def plan_of(model, *rules) -> Shared:
    return paramshare.share(model, Plan(*rules), IMAGES)


STAGE = ResNet((4,), (4,), 5, stem="cifar", stem_width=4)
LOOPED = STAGE.clone(stage=LoopedStages({"stage1": Loop(("conv1/kernel",), ((0,),) * 3)}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: wide(16, tied((0, 1), 2), None, None),
            "stage1: blocks after the first: 1; nothing repeats; stage2: ",
        ),
        (
            lambda: wide(22, tied((0, 1, 2, 3), 4), None, None),
            "its groups, 0 1 2 3, do not repeat from block to block; stage2: no bank",
        ),
        (
            lambda: wide(22, soft(1), soft(1), soft(1)),
            r"stage1: bank 'stage1' remains: its scheme is Soft\(.*\), not Tied; fold it first",
        ),
        (
            lambda: plan_of(STAGE, Rule(r"stage1/block\d/conv2/kernel", TIED)),
            "its layers are not the same in every block of stage1 after the first",
        ),
        (
            lambda: plan_of(STAGE, Rule(r"stage1/block[34]/conv2/kernel", TIED)),
            "its layers are not the same in every block of stage1 after the first",
        ),
        (
            lambda: plan_of(
                STAGE,
                Rule(r"stage1/block[2-4]/conv1/kernel", TIED, bank="loop"),
                Rule(r"stage1/block[34]/conv2/kernel", soft(1), bank="two of three"),
            ),
            "bank 'two of three' makes 'conv2/kernel' of some blocks only",
        ),
        (
            lambda: plan_of(
                STAGE,
                Rule(r"stage1/block[2-4]/conv1/kernel", TIED, bank="loop"),
                Rule(
                    r"stage1/block[2-4]/conv2/kernel",
                    Repeat(base=(3, 3, 2, 2), initial="paper"),
                    bank="repeated",
                ),
            ),
            "bank 'repeated', Repeat.*, depends on the names of its layers",
        ),
        (lambda: plan_of(LOOPED, Rule(r"classifier/kernel", TIED)), "stage1: looped already"),
        (
            lambda: plan_of(nn.Sequential([nn.Conv(3, (1, 1))]), Rule(".*kernel", TIED)),
            r"a shared WideResNet or ResNet.*got Shared\(Sequential",
        ),
        (lambda: STAGE, "a shared WideResNet or ResNet .*; got ResNet"),
    ],
)
def test_nothing_to_loop(build, message):
    shared = build()
    variables = {"params": {}, "banks": {}}
    with pytest.raises(LoopError, match=message):
        loop(shared, variables)
    with pytest.raises(LoopError, match=message):
        unloop(shared, variables)


def test_variables_of_another_network():
    shared, other = staged((4,), tied((0, 1), 6)), staged((3,), tied((0, 1), 4))
    variables = drawn(shared)
    with pytest.raises(PlanError, match="no entry for bank 'stage1'"):
        loop(shared, {"params": variables["params"]})
    with pytest.raises(LoopError, match="no entry 'params/stage1'"):
        unloop(shared, variables)
    with pytest.raises(LoopError, match=r"stage1: scales must have shape \(3, 2\), got \(2, 2\)"):
        unloop(shared, loop(other, drawn(other)).variables)
    twice, thrice = (staged((n,), TIED) for n in (3, 4))
    with pytest.raises(
        LoopError,
        match=r"body/block1 has an array of shape \(2, 4\); .* the 3 iterations",
    ):
        unloop(thrice, loop(twice, drawn(twice)).variables)
