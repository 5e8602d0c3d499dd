"""Looped networks against the folded ones that they are made of, to and back."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Plan, PlanError, Repeat, Rule, Shared, Soft, Tied, count, create_model
from paramshare.analysis.looping import LoopError, loop, unloop
from paramshare.models import Loop, ResNet, WideResNet

IMAGES = jax.random.normal(jax.random.key(5), (4, 8, 8, 3))
QUICKLY = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
BASIC = ("conv1/kernel", "conv2/kernel")


def drawn(shared: Shared, images=IMAGES):
    """Variables at random: scales of both signs, no fresh network's ones and zeros."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        names = [key.key for key in path]
        around = 1.0 if names[-1] in ("scale", "var") else 0.0
        size = 1.0 if "coefficients" in names else np.sqrt(2 / np.prod(leaf.shape[-4:-1])) if leaf.ndim > 1 else 0.1
        return jnp.asarray(around + rng.normal(size=leaf.shape) * size, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(shared, images))


def shapes_of(shared, images=IMAGES):
    return jax.eval_shape(lambda x: shared.init(jax.random.key(0), x), images)


def tied(pattern, layers: int, scaled: bool = True) -> Tied:
    return Tied(groups=tuple((pattern * layers)[:layers]), scaled=scaled)


def wide(depth: int, *schemes) -> Shared:
    """A WRN of 1, 2 and 4 channels; a bank of all later convolutions of each stage that has a scheme."""
    model = WideResNet(depth, 1 / 16, 5)
    rules = [
        Rule(rf"stage{number}/block(?!1/)\d+/conv\d/kernel", scheme, bank=f"stage{number}")
        for number, scheme in enumerate(schemes, start=1)
        if scheme is not None
    ]
    return paramshare.share(model, Plan(*rules), IMAGES)


def basic(blocks: int, scheme) -> Shared:
    """One stage of basic blocks, with a bank of all later convolutions."""
    model = ResNet((blocks,), (4,), 5, stem="cifar", stem_width=4)
    return paramshare.share(model, Plan(Rule(r"stage1/block(?!1/)\d+/conv\d/kernel", scheme, bank="stage1")), IMAGES)


def bottleneck(blocks: int, **schemes) -> Shared:
    """One stage of bottlenecks; a bank for each convolution that has a scheme."""
    model = ResNet((blocks,), (2,), 5, bottleneck=True, stem="cifar", stem_width=4)
    rules = [Rule(rf"stage1/block(?!1/)\d+/{conv}/kernel", scheme, bank=f"stage1-{conv}") for conv, scheme in schemes.items()]
    return paramshare.share(model, Plan(*rules), IMAGES)


def results(model, variables):
    """Outputs in training, new statistics, gradients of banks and parameters."""

    def loss(trained, rest):
        y_BxC, state = model.apply({**rest, **trained}, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y_BxC)), (y_BxC, state)

    trained = {name: value for name, value in variables.items() if name != "batch_stats"}
    rest = {"batch_stats": variables["batch_stats"]}
    gradient, (output, state) = QUICKLY(jax.grad(loss, has_aux=True))(trained, rest)
    return {"output": output, "variables": gradient | state}


def largest(tree) -> float:
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


NETS = {
    "two stages of three": lambda: wide(22, tied((0, 1), 4), Soft(2), tied((0,), 4, scaled=False)),
    "three kernels take turns": lambda: basic(8, tied((0, 1, 2), 14)),
    "bottlenecks": lambda: bottleneck(4, conv1=tied((0,), 3), conv2=tied((0,), 3, scaled=False), conv3=tied((0,), 3)),
    "one bank of three repeats": lambda: bottleneck(
        6, conv1=tied((0, 1), 5), conv2=Tied(groups=(0, 1, 1, 1, 0), scaled=True), conv3=Soft(2)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_a_loop_is_the_folded_network(name):
    shared = NETS[name]()
    variables = drawn(shared)
    wanted = results(shared, variables)
    forms = [False, True] if name == "bottlenecks" else [False]  # tests/models/test_looped.py has more of unrolled ones
    for unroll in forms:
        looped = loop(shared, variables, unroll=unroll)
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes_of(looped.model), looped.variables)
        found = results(looped.model, looped.variables)
        # Equal in exact arithmetic; float32 sums in another order, through up to 16 batch norms.
        np.testing.assert_allclose(found["output"], wanted["output"], rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_close(
            QUICKLY(functools.partial(unloop, shared))(found["variables"]),
            wanted["variables"],
            rtol=1e-3,
            atol=5e-4 * largest(wanted["variables"]),
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
    # Also from numbers of the looped network's own, as after training it.
    own = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), looped.variables)
    again = loop(shared, unloop(shared, own))
    chex.assert_trees_all_equal(again.variables, own)
    assert again.report == looped.report
    assert count(looped.variables)["trainable"] == count(variables)["trainable"]


def test_where_everything_lies():
    shared = NETS["three kernels take turns"]()
    variables = drawn(shared)
    looped = loop(shared, variables, unroll=False)
    assert isinstance(looped.model, ResNet)  # and no Shared
    turns = ((0, 1), (2, 0), (1, 2))
    assert looped.model == shared.model.clone(loops=(Loop(BASIC, turns * 2 + turns[:1]),), unroll=False)
    (report,) = looped.report
    assert (report.name, report.blocks, report.loop, report.banks, report.note) == ("stage1", 8, looped.model.loops[0], ("stage1",), "")
    stage, bank = looped.variables["params"]["stage1"], variables["banks"]["stage1"]["kernels"]
    assert set(stage) == {"block1", "kernels", "scales", "body", "rest"}
    chex.assert_trees_all_equal(stage["kernels"], {str(i): bank[i] for i in range(3)})  # once
    np.testing.assert_array_equal(stage["scales"].ravel(), variables["params"]["coefficients"]["stage1"])
    private = variables["params"]["model"]["stage1"]
    for i in range(6):
        own = jax.tree.map(lambda leaf: leaf[i // 3], stage["body"][f"block{i % 3 + 1}"])  # noqa: B023
        chex.assert_trees_all_equal(own, private[f"block{i + 2}"])
    chex.assert_trees_all_equal(stage["rest"]["block1"], private["block8"])
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
    shared = Shared(soft.model, soft.layout.with_schemes({name: tied((0, 1), 6, scaled) for name in stages}))
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    found = []

    def variables():
        looped = loop(shared, shared.init(jax.random.key(0), jnp.zeros(x.shape)))
        found.append(looped)
        return looped.variables

    shapes = jax.eval_shape(variables)
    assert count(shapes)["trainable"] == trainable
    (looped,) = found
    assert isinstance(looped.model, Shared) and looped.model.layout.trainable == trainable
    assert set(looped.model.layout) == {"stage1", "stage2", "stage3"} - set(stages)  # soft banks stay banks
    kernels = [jax.tree.map(jnp.shape, shapes["params"]["model"][stage]["kernels"]) for stage in stages]
    assert kernels == [{"0": (3, 3, w, w), "1": (3, 3, w, w)} for w in (320, 640)[: len(stages)]]
    own = jax.eval_shape(lambda x: looped.model.init(jax.random.key(0), x), x)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes)


def test_of_a_network_folded_by_the_library():
    """One template a stage: loops by construction, at no change of the outputs."""
    shared = create_model("swrn-22-1-1", input_shape=(8, 8, 3))
    assert isinstance(shared, Shared)
    variables = drawn(shared)
    folded = paramshare.fold(shared, variables, threshold=1)
    looped = loop(folded.shared, folded.variables)
    assert isinstance(looped.model, WideResNet) and looped.model.loops == (Loop(BASIC, ((0, 0),) * 2),) * 3
    assert count(looped.variables)["trainable"] == count(variables)["trainable"]
    wanted = QUICKLY(shared.apply)(variables, IMAGES)
    np.testing.assert_allclose(QUICKLY(looped.model.apply)(looped.variables, IMAGES), wanted, rtol=1e-4, atol=1e-4 * largest(wanted))


def test_banks_that_stay():
    """Each for the reason given; and the banks that remain draw for the stacked parameters."""
    shared = NETS["one bank of three repeats"]()
    looped = loop(shared, drawn(shared))
    (report,) = looped.report
    assert report.banks == ("stage1-conv1",)
    assert "bank 'stage1-conv2' stays: its groups, 0 1 1 1 0, do not repeat from block to block;" in report.note
    assert "bank 'stage1-conv3' stays: it is under Soft(templates=2), not Tied; fold it first" in report.note
    assert isinstance(looped.model, Shared)
    sites = [str(site) for site in looped.model.layout["stage1-conv3"].sites]
    assert sites == [
        *(f"stage1/body/block{b}/conv3/kernel[{i}]" for i in (0, 1) for b in (1, 2)),
        "stage1/rest/block1/conv3/kernel",
    ]
    together = bottleneck(6, conv1=tied((0, 1), 5), conv2=tied((0,), 5), conv3=Tied(groups=(0, 0, 0, 0, 0)))
    assert loop(together, drawn(together)).report[0].banks == ("stage1-conv1", "stage1-conv2", "stage1-conv3")
    apart = bottleneck(7, conv1=tied((0, 1), 6), conv2=tied((0, 1, 2), 6))  # each repeats, but together not within six blocks
    (report,) = loop(apart, drawn(apart)).report
    assert report.banks == ("stage1-conv1",)
    assert (
        report.note == "bank 'stage1-conv2' stays: its groups, 0 1 2 0 1 2, do not repeat from block to block together with 'stage1-conv1'"
    )


def plan_of(model, *rules) -> Shared:
    return paramshare.share(model, Plan(*rules), IMAGES)


STAGE = ResNet((4,), (4,), 5, stem="cifar", stem_width=4)
LOOPED = ResNet((4,), (4,), 5, stem="cifar", stem_width=4, loops=(Loop("conv1/kernel", ((0,),) * 3),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: wide(16, tied((0, 1), 2), None, None), "stage1: 1 blocks behind the first; nothing comes twice; stage2: "),
        (lambda: wide(22, tied((0, 1, 2, 3), 4), None, None), "its groups, 0 1 2 3, do not repeat from block to block; stage2: no bank"),
        (
            lambda: wide(22, Soft(1), Soft(1), Soft(1)),
            r"stage1: bank 'stage1' stays: it is under Soft\(templates=1\), not Tied; fold it first",
        ),
        (lambda: plan_of(STAGE, Rule(r"stage1/block\d/conv2/kernel", Tied())), "not the same ones of each block behind stage1's first"),
        (lambda: plan_of(STAGE, Rule(r"stage1/block[34]/conv2/kernel", Tied())), "not the same ones of each block behind stage1's first"),
        (
            lambda: plan_of(
                STAGE,
                Rule(r"stage1/block[2-4]/conv1/kernel", Tied(), bank="loop"),
                Rule(r"stage1/block[34]/conv2/kernel", Soft(1), bank="two of three"),
            ),
            "bank 'two of three' draws 'conv2/kernel' in some of the blocks only",
        ),
        (
            lambda: plan_of(
                STAGE,
                Rule(r"stage1/block[2-4]/conv1/kernel", Tied(), bank="loop"),
                Rule(r"stage1/block[2-4]/conv2/kernel", Repeat(base=(3, 3, 2, 2)), bank="repeated"),
            ),
            "bank 'repeated', under Repeat.*, goes by the names of its layers",
        ),
        (lambda: plan_of(LOOPED, Rule(r"classifier/kernel", Tied())), "stage1: looped already"),
        (
            lambda: plan_of(nn.Sequential([nn.Conv(3, (1, 1))]), Rule(".*kernel", Tied())),
            r"a shared WideResNet or ResNet.*got Shared\(Sequential",
        ),
        (lambda: STAGE, "a shared WideResNet or ResNet, folded with `paramshare.fold`; got ResNet"),
    ],
)
def test_nothing_to_loop(build, says):
    shared = build()
    variables = {"params": {}, "banks": {}}
    with pytest.raises(LoopError, match=says):
        loop(shared, variables)
    with pytest.raises(LoopError, match=says):
        unloop(shared, variables)


def test_variables_of_another_network():
    shared, other = basic(4, tied((0, 1), 6)), basic(3, tied((0, 1), 4))
    variables = drawn(shared)
    with pytest.raises(PlanError, match="no entry for bank 'stage1'"):
        loop(shared, {"params": variables["params"]})
    with pytest.raises(LoopError, match="no entry 'params/stage1'"):
        unloop(shared, variables)
    with pytest.raises(LoopError, match=r"stage1: scales are of shape \(2, 2\), the loop wants \(3, 2\)"):
        unloop(shared, loop(other, drawn(other)).variables)
    twice, thrice = (basic(n, Tied()) for n in (3, 4))
    with pytest.raises(LoopError, match=r"body/block1 holds an array of shape \(2, 4\), not one for each of 3 iterations"):
        unloop(thrice, loop(twice, drawn(twice)).variables)
