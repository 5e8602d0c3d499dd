"""Stages with loops against the same stages written out, and what is compiled of them."""

import functools
import operator
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import ResNet, WideResNet
from paramshare.models.layers import Stage
from paramshare.transform.looped import Loop, LoopedStages, LoopError

IMAGES = jax.random.normal(jax.random.key(5), (4, 8, 8, 3))
BASIC = ("conv1/kernel", "conv2/kernel")
QUICKLY = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiles in half the time
NETS = {
    "basic": {},
    "biased": {"bias": True},
    "bottleneck": {"bottleneck": True},
    "factored": {"rank": 2},
}


def net(loop: Loop, kind: str = "basic", unroll: bool | None = None, **options) -> ResNet:
    """One stage of four channels, with this loop."""
    blocks, stage = (loop.blocks + 1,), LoopedStages({"stage1": loop}, unroll)
    options = NETS[kind] | options
    return ResNet(blocks, (4,), 5, stem="cifar", stem_width=4, stage=stage, **options)


def loop_of(model: ResNet) -> Loop:
    ((name, loop),) = model.stage.loops  # pyright: ignore[reportFunctionMemberAccess]
    assert name == "stage1"
    return loop


def drawn(model, images=IMAGES):
    """Random variables, without the ones and zeros of initialisation; scales of both signs."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        size = (
            1.0
            if path[-1].key == "scales"
            else np.sqrt(2 / np.prod(leaf.shape[:-1]))
            if leaf.ndim > 2
            else 0.1
        )
        return jnp.asarray(around + rng.normal(size=leaf.shape) * size, jnp.float32)

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    )


def written_out(model: ResNet, variables):
    """The same network without loops, and its variables, by the stage's docstring."""
    loop = loop_of(model)
    trees = {name: dict(tree) for name, tree in variables.items()}
    held = trees["params"]["stage1"]
    split = loop.iterations * loop.length
    for tree in trees.values():
        stage = tree["stage1"]
        tree["stage1"] = {"block1": stage["block1"]}
        for i in range(loop.blocks):
            if i < split:
                take = operator.itemgetter(i // loop.length)
                block = jax.tree.map(take, stage["body"][f"block{1 + i % loop.length}"])
            else:
                block = stage["remaining"][f"block{1 + i - split}"]
            tree["stage1"][f"block{i + 2}"] = {name: dict(value) for name, value in block.items()}
    for i, row in enumerate(loop.groups):
        for path, group in zip(loop.paths, row, strict=True):
            kernel = held["loop"][str(group)]
            if path in loop.scaled_paths:
                kernel = kernel * held["scales"][i, loop.scaled_paths.index(path)]
            module, name = path.split("/")
            trees["params"]["stage1"][f"block{i + 2}"].setdefault(module, {})[name] = kernel
    return model.clone(stage=Stage), trees


def evaluated(model, variables, x) -> Any:
    return model.apply(variables, x)


def results(model, variables, through=lambda model, variables: (model, variables)):
    """Training outputs, new statistics and the gradient, of the network that `through` makes."""

    def loss(params, non_params):
        network, full = through(model, non_params | {"params": params})
        y_BxC, state = network.apply(full, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y_BxC)), (y_BxC, state)

    non_params = {name: value for name, value in variables.items() if name != "params"}
    gradient, (output, state) = QUICKLY(jax.grad(loss, has_aux=True))(
        variables["params"], non_params
    )
    return {"gradient": gradient, "output": output, "state": state}


@pytest.mark.parametrize(
    ("kind", "loop", "forms"),
    [
        ("basic", Loop(BASIC, ((0, 0),) * 2), "scan"),  # a period of one convolution
        # a body of two blocks, and one block after the loop
        ("basic", Loop(BASIC, (((0, 1), (2, 0)) * 3)[:5], scaled=(False, True)), "both"),
        # conv1 stays private; a bias beside a shared kernel. Bottlenecks are in test_looping.py.
        ("biased", Loop(("conv2/kernel",), ((0,),) * 2, scaled=False), "scan"),
        ("factored", Loop(("basis1/kernel", "basis2/kernel"), ((0, 1),) * 2), "scan"),
    ],
)
def test_scan_and_unrolled_are_the_network_written_out(kind, loop, forms):
    model = net(loop, kind)
    variables = drawn(model)
    assert len(variables["params"]["stage1"]["loop"]) == loop.kernels
    expected = results(model, variables, through=written_out)
    for unroll in (False, True) if forms == "both" else (False,):
        actual = results(net(loop, kind, unroll), variables)
        full = QUICKLY(lambda v: written_out(model, v)[1])({**variables, **actual["state"]})
        actual["state"] = {name: full[name] for name in actual["state"]}
        for what in expected:
            # Equal in exact arithmetic; float32 sums in another order, through 11 batch norms.
            chex.assert_trees_all_close(
                actual[what], expected[what], rtol=2e-4, atol=2e-4 * largest(expected[what])
            )


def test_in_evaluation():
    loop = Loop(BASIC, (((0, 1), (1, 0)) * 3)[:5])
    model = net(loop)
    variables = drawn(model)
    expected = QUICKLY(lambda v, x: evaluated(*written_out(model, v), x))(variables, IMAGES)
    for unroll in (False, True):
        actual = QUICKLY(functools.partial(evaluated, net(loop, unroll=unroll)))(variables, IMAGES)
        np.testing.assert_allclose(
            actual, expected, rtol=1e-4, atol=1e-5
        )  # float32 sums in another order


def largest(tree) -> float:
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


def program(model: nn.Module, gradient: bool) -> str:
    """The compiled program of a forward pass in training, or of its gradient."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)

    def loss(params, statistics, x):
        variables = {"params": params, "batch_stats": statistics}
        y_BxC, state = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y_BxC**2), state

    step = QUICKLY(jax.grad(loss, has_aux=True) if gradient else loss)
    return step.lower(variables["params"], variables["batch_stats"], x).compile().as_text() or ""


def instructions(text: str) -> int:
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))


def whiles(text: str) -> int:
    return len(re.findall(r" while\(", text))


def test_the_program_of_a_loop_has_constant_size():
    few, many = (program(net(Loop(BASIC, ((0, 1),) * n), unroll=False), True) for n in (4, 40))
    assert whiles(few) == whiles(many) == 2  # forward and backward
    assert instructions(few) == instructions(many) > 100


def test_the_program_of_an_unrolled_loop_grows():
    few, many = (program(net(Loop(BASIC, ((0, 1),) * n), unroll=True), False) for n in (2, 4))
    assert whiles(few) == whiles(many) == 0
    assert instructions(many) > 1.3 * instructions(few)


def test_the_backend_decides_where_no_one_else_does(monkeypatch):
    loop = Loop(BASIC, ((0, 1),) * 2)

    def scans() -> bool:
        lowered = jax.jit(lambda v, x: net(loop).apply(v, x)).lower(drawn(net(loop)), IMAGES)
        return "stablehlo.while" in lowered.as_text()

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not scans()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert scans()


def test_initial_values():
    """As every layer would draw its own: He's."""
    stages = LoopedStages({"stage1": Loop(BASIC, ((0, 1), (2, 0)) * 2)})
    model = ResNet((5,), (32,), 5, stem="cifar", stem_width=4, stage=stages)
    stage = QUICKLY(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]["stage1"]
    assert set(stage) == {"block1", "body", "loop", "scales"}  # and none remaining
    for kernel in stage["loop"].values():
        assert kernel.shape == (3, 3, 32, 32)
        assert float(jnp.std(kernel)) == pytest.approx(
            np.sqrt(2 / 288), rel=0.03
        )  # 9,216 draws: 0.7 % standard error
    for a, b in ("01", "02", "12"):
        assert not np.allclose(stage["loop"][a], stage["loop"][b])
    np.testing.assert_array_equal(stage["scales"], np.ones((4, 2)))
    norms = {
        name: {"bias": jnp.zeros((2, 32)), "scale": jnp.ones((2, 32))} for name in ("bn1", "bn2")
    }
    chex.assert_trees_all_equal(stage["body"], {"block1": norms, "block2": norms})


def test_one_loop_changes_nothing_elsewhere():
    model = WideResNet(22, 1, stage=LoopedStages({"stage3": Loop(BASIC, ((0, 1),) * 2)}))
    looped, plain = (
        jax.eval_shape(lambda x, m=m: m.init(jax.random.key(0), x), IMAGES)
        for m in (model, model.clone(stage=Stage))
    )
    for name in ("params", "batch_stats"):
        assert set(looped[name]) == set(plain[name])
        assert {k: v for k, v in looped[name].items() if k != "stage3"} == {
            k: v for k, v in plain[name].items() if k != "stage3"
        }
        assert set(plain[name]["stage3"]) == {"block1", "block2", "block3"}
    assert jax.eval_shape(functools.partial(evaluated, model), looped, IMAGES).shape == (4, 10)


def test_statistics_over_devices():
    """With `axis_name`, two devices with half the images each do what one does with all."""
    loop = Loop(BASIC, ((0, 1),) * 3)
    alone = net(loop, unroll=False)
    together = net(loop, unroll=False, axis_name="devices")
    variables = drawn(alone)
    expected, state = QUICKLY(lambda v, x: alone.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, IMAGES
    )
    halves = IMAGES.reshape(2, 2, *IMAGES.shape[1:])
    mapped = jax.pmap(
        lambda x: together.apply(variables, x, train=True, mutable=["batch_stats"]),
        "devices",
        devices=jax.devices()[:2],
    )
    actual, states = mapped(halves)
    np.testing.assert_allclose(
        actual.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4
    )  # float32 means in another order, seven times
    for device in range(2):
        chex.assert_trees_all_close(
            jax.tree.map(operator.itemgetter(device), states), state, rtol=1e-4, atol=1e-5
        )


def test_bfloat16():
    with jax.numpy_dtype_promotion("standard"):  # which Flax's batch norm counts on
        _bfloat16()


def _bfloat16():
    model = net(Loop(BASIC, ((0, 1),) * 2), dtype=jnp.bfloat16, unroll=False)
    variables = drawn(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    actual, expected = (
        QUICKLY(m.apply)(variables, IMAGES) for m in (model, model.clone(dtype=jnp.float32))
    )
    np.testing.assert_allclose(
        actual, expected, atol=0.1 * largest(expected)
    )  # 8 bits, seven layers


def test_patterns():
    loop = Loop(BASIC, ((0, 1), (2, 0), (1, 2)) * 2 + ((0, 1), (2, 0)))
    assert (loop.length, loop.iterations, loop.remaining, loop.kernels) == (
        3,
        2,
        ((0, 1), (2, 0)),
        3,
    )
    written: Any = ("conv1/kernel", [[0], [0]])
    assert Loop(*written) == Loop(("conv1/kernel",), ((0,), (0,)), scaled=(True,))
    assert hash(loop) == hash(Loop(BASIC, loop.groups))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), ((),) * 2), "distinct parameters of a block"),
        ((("a", "a"), ((0, 0),) * 2), "paths"),
        ((BASIC, ()), "a row of 2 integers"),
        ((BASIC, ((0,), (0,))), "a row of 2 integers"),
        ((BASIC, ((0, 1), (0, "1"))), "a row of 2 integers"),
        ((BASIC, 3), "a row of 2 integers"),
        ((BASIC, ((1, 0), (1, 0))), "in the order of"),
        ((BASIC, ((0, -1), (0, -1))), "-1"),
        ((BASIC, ((0, 1), (0, 1)), "yes"), "scaled='yes'"),
        ((BASIC, ((0, 1), (0, 1)), (True,)), "scaled="),
        ((BASIC, ((0, 1),)), "no pattern of blocks"),
        ((BASIC, ((0, 1), (2, 3))), "no pattern of blocks"),
        ((BASIC, ((0, 1), (2, 3), (0, 1))), "no pattern of blocks"),  # occurs one and a half times
    ],
)
def test_patterns_that_cannot_be(arguments, message):
    with pytest.raises(LoopError, match=message):
        Loop(*arguments)


TWICE = Loop(BASIC, ((0, 1),) * 2)


def test_builders_of_stages():
    stages = LoopedStages({"stage2": TWICE}, unroll=False)
    assert stages == LoopedStages((("stage2", TWICE),), unroll=False)
    assert hash(stages) == hash(LoopedStages((("stage2", TWICE),), unroll=False))
    assert stages != LoopedStages({"stage2": TWICE}) != LoopedStages()
    for loops in (TWICE, (TWICE, None), {"stage1": "x"}, {1: TWICE}, 3):
        with pytest.raises(LoopError, match="map names of stages to Loops"):
            LoopedStages(loops)  # pyright: ignore[reportArgumentType]
    with pytest.raises(LoopError, match="unroll='no'"):
        LoopedStages({}, unroll="no")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            WideResNet(28, 1, stage=LoopedStages({"stage2": TWICE})),
            "the loop of stage2 is for 2 blocks, but the stage has 3 after the first",
        ),
        (net(Loop(("conv3/kernel",), ((0,), (0,)))), "no parameter 'conv3/kernel'; it has .*bn1"),
        (net(Loop(("conv1",), ((0,), (0,)))), "no parameter 'conv1'; it has .*conv1/kernel"),
        (
            net(Loop(BASIC, ((0, 0),) * 2), "bottleneck"),
            r"\(1, 1, 16, 4\) to conv2/kernel of shape",
        ),
    ],
)
def test_networks_that_cannot_be(model, message):
    with pytest.raises(LoopError, match=message):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x), IMAGES)


def test_variables_of_another_network():
    plain = drawn(ResNet((3,), (4,), 5, stem="cifar", stem_width=4))
    with pytest.raises(
        LoopError,
        match="stage1: the variables do not belong to a stage of 2 x 1 blocks, 2 kernels",
    ):
        net(TWICE).apply(plain, IMAGES)
