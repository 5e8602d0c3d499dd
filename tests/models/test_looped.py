"""Stages with loops against the same stages written out, and what is compiled of them."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.models import Loop, ModelError, ResNet, WideResNet

IMAGES = jax.random.normal(jax.random.key(5), (4, 8, 8, 3))
BASIC = ("conv1/kernel", "conv2/kernel")
QUICKLY = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
NETS = {
    "basic": {},
    "biased": {"bias": True},
    "bottleneck": {"bottleneck": True},
    "factored": {"rank": 2},
}


def net(loop: Loop, kind: str = "basic", **options) -> ResNet:
    """One stage of four channels, with this loop."""
    return ResNet((loop.blocks + 1,), (4,), 5, stem="cifar", stem_width=4, loops=(loop,), **NETS[kind], **options)


def drawn(model, images=IMAGES):
    """Variables of a model, all of them at random, scales of both signs: no fresh network's ones and zeros."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if path[-1].key in ("scale", "var") else 0.0
        size = 1.0 if path[-1].key == "scales" else np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 2 else 0.1
        return jnp.asarray(around + rng.normal(size=leaf.shape) * size, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images))


def written_out(model: ResNet, variables):
    """The same network without loops, and its variables, by the stage's docstring."""
    (loop,) = model.loops
    assert loop is not None
    trees = {name: dict(tree) for name, tree in variables.items()}
    held = trees["params"]["stage1"]
    split = loop.iterations * loop.length
    for tree in trees.values():
        stage = tree["stage1"]
        tree["stage1"] = {"block1": stage["block1"]}
        for i in range(loop.blocks):
            if i < split:
                own = jax.tree.map(lambda leaf: leaf[i // loop.length], stage["body"][f"block{1 + i % loop.length}"])  # noqa: B023
            else:
                own = stage["rest"][f"block{1 + i - split}"]
            tree["stage1"][f"block{i + 2}"] = {name: dict(value) for name, value in own.items()}
    for i, row in enumerate(loop.groups):
        for path, group in zip(loop.paths, row, strict=True):
            kernel = held["kernels"][str(group)]
            if path in loop.scaled_paths:
                kernel = kernel * held["scales"][i, loop.scaled_paths.index(path)]
            module, name = path.split("/")
            trees["params"]["stage1"][f"block{i + 2}"].setdefault(module, {})[name] = kernel
    return model.clone(loops=()), trees


def evaluated(model, variables, x) -> Any:
    return model.apply(variables, x)


def results(model, variables, through=lambda model, variables: (model, variables)):
    """Outputs in training, new statistics, and the gradient by `variables`, of the network that `through` makes."""

    def loss(params, rest):
        its, full = through(model, rest | {"params": params})
        y_BxC, state = its.apply(full, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y_BxC)), (y_BxC, state)

    rest = {name: value for name, value in variables.items() if name != "params"}
    gradient, (output, state) = QUICKLY(jax.grad(loss, has_aux=True))(variables["params"], rest)
    return {"gradient": gradient, "output": output, "state": state}


@pytest.mark.parametrize(
    ("kind", "loop", "forms"),
    [
        ("basic", Loop(BASIC, ((0, 0),) * 3), "both"),  # a period of one convolution
        ("biased", Loop(BASIC, ((0, 1),) * 2, scaled=False), "scan"),
        ("basic", Loop(BASIC, (((0, 1), (2, 0), (1, 2)) * 3)[:7], scaled=(False, True)), "both"),  # of three, and a block is left
        ("basic", Loop(("conv2/kernel",), ((0,), (1,)) * 2 + ((0,),)), "scan"),  # conv1 is each block's own
        ("bottleneck", Loop(("conv1/kernel", "conv2/kernel", "conv3/kernel"), ((0, 1, 2),) * 2), "scan"),
        ("factored", Loop(("basis1/kernel", "basis2/kernel"), ((0, 1),) * 2), "scan"),
    ],
)
def test_scan_and_unrolled_are_the_network_written_out(kind, loop, forms):
    model = net(loop, kind)
    variables = drawn(model)
    assert len(variables["params"]["stage1"]["kernels"]) == loop.kernels
    wanted = results(model, variables, through=written_out)
    for unroll in (False, True) if forms == "both" else (False,):
        found = results(model.clone(unroll=unroll), variables)
        full = QUICKLY(lambda v: written_out(model, v)[1])({**variables, **found["state"]})
        found["state"] = {name: full[name] for name in found["state"]}
        for what in wanted:
            # Equal in exact arithmetic; float32 sums in another order, through up to 15 batch norms over 256 numbers each.
            chex.assert_trees_all_close(found[what], wanted[what], rtol=2e-4, atol=2e-4 * largest(wanted[what]))


def test_in_evaluation():
    model = net(Loop(BASIC, (((0, 1), (1, 0)) * 3)[:5]))
    variables = drawn(model)
    wanted = QUICKLY(lambda v, x: evaluated(*written_out(model, v), x))(variables, IMAGES)
    for unroll in (False, True):
        found = QUICKLY(functools.partial(evaluated, model.clone(unroll=unroll)))(variables, IMAGES)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def largest(tree) -> float:
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


def program(model) -> str:
    """What a training step's gradient compiles to."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)

    def loss(params, rest, x):
        y_BxC, state = model.apply(rest | {"params": params}, x, train=True, mutable=["batch_stats"])
        return jnp.sum(y_BxC**2), state

    rest = {"batch_stats": variables["batch_stats"]}
    return QUICKLY(jax.grad(loss, has_aux=True)).lower(variables["params"], rest, x).compile().as_text() or ""


def instructions(text: str) -> int:
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE))


def whiles(text: str) -> int:
    return len(re.findall(r" while\(", text))


def test_the_program_of_a_loop_does_not_grow():
    few, many = (program(net(Loop(BASIC, ((0, 1),) * n), unroll=False)) for n in (4, 40))
    assert whiles(few) == whiles(many) == 2  # forward and backward
    assert instructions(few) == instructions(many) > 100


def test_the_program_of_an_unrolled_loop_does():
    few, many = (program(net(Loop(BASIC, ((0, 1),) * n), unroll=True)) for n in (2, 4))
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
    model = ResNet((5,), (32,), 5, stem="cifar", stem_width=4, loops=(Loop(BASIC, ((0, 1), (2, 0)) * 2),))
    stage = QUICKLY(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]["stage1"]
    assert set(stage) == {"block1", "body", "kernels", "scales"}  # and no rest
    for kernel in stage["kernels"].values():
        assert kernel.shape == (3, 3, 32, 32)
        assert float(jnp.std(kernel)) == pytest.approx(np.sqrt(2 / 288), rel=0.03)  # 9,216 draws: 0.7 % standard error
    for a, b in ("01", "02", "12"):
        assert not np.allclose(stage["kernels"][a], stage["kernels"][b])
    np.testing.assert_array_equal(stage["scales"], np.ones((4, 2)))
    norms = {name: {"bias": jnp.zeros((2, 32)), "scale": jnp.ones((2, 32))} for name in ("bn1", "bn2")}
    chex.assert_trees_all_equal(stage["body"], {"block1": norms, "block2": norms})


def test_one_loop_changes_nothing_elsewhere():
    model = WideResNet(22, 1, loops=(None, None, Loop(BASIC, ((0, 1),) * 2)))
    looped, plain = (jax.eval_shape(lambda x, m=m: m.init(jax.random.key(0), x), IMAGES) for m in (model, model.clone(loops=())))
    for name in ("params", "batch_stats"):
        assert set(looped[name]) == set(plain[name])
        assert {k: v for k, v in looped[name].items() if k != "stage3"} == {k: v for k, v in plain[name].items() if k != "stage3"}
        assert set(plain[name]["stage3"]) == {"block1", "block2", "block3"}
    assert jax.eval_shape(functools.partial(evaluated, model), looped, IMAGES).shape == (4, 10)


def test_statistics_over_devices():
    """With `axis_name`, two devices with half the images each do what one does with all."""
    loop = Loop(BASIC, ((0, 1),) * 3)
    alone = net(loop, unroll=False)
    together = net(loop, unroll=False, axis_name="devices")
    variables = drawn(alone)
    wanted, state = QUICKLY(lambda v, x: alone.apply(v, x, train=True, mutable=["batch_stats"]))(variables, IMAGES)
    halves = IMAGES.reshape(2, 2, *IMAGES.shape[1:])
    mapped = jax.pmap(lambda x: together.apply(variables, x, train=True, mutable=["batch_stats"]), "devices", devices=jax.devices()[:2])
    found, states = mapped(halves)
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)  # float32 means in another order, seven times
    for device in range(2):
        chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[device], states), state, rtol=1e-4, atol=1e-5)  # noqa: B023


def test_bfloat16():
    with jax.numpy_dtype_promotion("standard"):  # which Flax's batch norm counts on
        _bfloat16()


def _bfloat16():
    model = net(Loop(BASIC, ((0, 1),) * 2), dtype=jnp.bfloat16, unroll=False)
    variables = drawn(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    found, wanted = (QUICKLY(m.apply)(variables, IMAGES) for m in (model, model.clone(dtype=jnp.float32)))
    np.testing.assert_allclose(found, wanted, atol=0.1 * largest(wanted))  # 8 bits, seven layers


def test_patterns():
    loop = Loop(BASIC, ((0, 1), (2, 0), (1, 2)) * 2 + ((0, 1), (2, 0)))
    assert (loop.length, loop.iterations, loop.rest, loop.kernels) == (3, 2, ((0, 1), (2, 0)), 3)
    written: Any = ("conv1/kernel", [[0], [0]])
    assert Loop(*written) == Loop(("conv1/kernel",), ((0,), (0,)), scaled=(True,))
    assert hash(loop) == hash(Loop(BASIC, loop.groups))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((), ((),) * 2), "different parameters"),
        ((("a", "a"), ((0, 0),) * 2), "different parameters"),
        ((BASIC, ()), "whole numbers"),
        ((BASIC, ((0,), (0,))), r"as many as there are paths \(2\)"),
        ((BASIC, ((0, 1), (0, "1"))), "whole numbers"),
        ((BASIC, 3), "whole numbers"),
        ((BASIC, ((1, 0), (1, 0))), "1 comes early"),
        ((BASIC, ((0, -1), (0, -1))), "-1 comes early"),
        ((BASIC, ((0, 1), (0, 1)), "yes"), "scaled='yes'"),
        ((BASIC, ((0, 1), (0, 1)), (True,)), "one of them for each of the 2 paths"),
        ((BASIC, ((0, 1),)), "no pattern of blocks comes twice"),
        ((BASIC, ((0, 1), (2, 3))), "no pattern of blocks comes twice"),
        ((BASIC, ((0, 1), (2, 3), (0, 1))), "no pattern of blocks comes twice"),  # once and a half
    ],
)
def test_patterns_that_cannot_be(arguments, says):
    with pytest.raises(ModelError, match=says):
        Loop(*arguments)


TWICE = Loop(BASIC, ((0, 1),) * 2)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (WideResNet(22, 1, loops=(TWICE,)), "loops has 1 entries, but there are 3 stages"),
        (WideResNet(22, 1, loops=(TWICE, None, "x")), "a Loop, or None"),  # type: ignore[arg-type]
        (WideResNet(22, 1, loops=TWICE), "a Loop, or None"),  # type: ignore[arg-type]
        (WideResNet(22, 1, loops=(TWICE, None, None), unroll="no"), "unroll='no'"),  # type: ignore[arg-type]
        (WideResNet(28, 1, loops=(None, TWICE, None)), "stage 2 is for 2 blocks, but 3 follow the first one of 4"),
        (ResNet((3,), (4,), loops=(None, None)), "loops has 2 entries, but there are 1 stages"),
        (ResNet((3,), (4,), loops=(Loop(("conv3/kernel",), ((0,), (0,))),)), r"no parameter 'conv3/kernel'; it has \['bn1/bias'"),
        (ResNet((3,), (4,), loops=(Loop(("conv1",), ((0,), (0,))),)), r"'conv1' of this stage's blocks is no parameter"),
        (ResNet((3,), (4,), bottleneck=True, loops=(Loop(BASIC, ((0, 0),) * 2),)), r"\(1, 1, 16, 4\) to conv2/kernel of shape"),
    ],
)
def test_networks_that_cannot_be(model, says):
    with pytest.raises(ModelError, match=says):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x), IMAGES)


def test_variables_of_another_network():
    plain = drawn(ResNet((3,), (4,), 5, stem="cifar", stem_width=4))
    with pytest.raises(ModelError, match="stage1: the variables are not those of a stage of 2 x 1 blocks, 2 kernels"):
        net(TWICE).apply(plain, IMAGES)
