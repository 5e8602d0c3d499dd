"""Stacked hourglasses: sizes, resolutions, what stages share, gradients through all stages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paramshare import create_model
from paramshare.models import Hourglass, ModelError
from paramshare.models.hourglass import half
from paramshare.schemes import Ring, Tied


def shapes(model, size=(64, 64)):
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), x)


def kernels(width, depth):
    """Entries of the kernels of one hourglass: 3 depth + 2 residual blocks and a 1x1."""
    block = 2 * width * (width // 2) + 9 * (width // 2) ** 2
    return (3 * depth + 2) * block + width**2


@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 4), ("cifar", 2)])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (72, 88)])
def test_heatmaps_of_all_stages(stem, stride, size):
    model = Hourglass(3, 8, num_classes=5, depth=4, stem=stem)
    heatmaps, _ = shapes(model, size)
    assert heatmaps.shape == (2, 3, size[0] // stride, size[1] // stride, 5)
    assert heatmaps.dtype == jnp.float32


def test_all_hourglasses_have_the_same_kernels():
    _, variables = shapes(Hourglass(3, 8, num_classes=5, depth=2))
    leaves: dict[str, Any] = flatten_dict(variables["params"], sep="/")
    stages = [
        {
            path.removeprefix(f"stage{n}/hourglass/"): leaf.shape
            for path, leaf in leaves.items()
            if path.startswith(f"stage{n}/hourglass/")
        }
        for n in (1, 2, 3)
    ]
    assert stages[0] == stages[1] == stages[2]
    size = sum(np.prod(shape) for path, shape in stages[0].items() if path.endswith("/kernel"))
    assert size == kernels(8, 2)
    merged = [path for path in leaves if "merge" in path]
    assert sorted(merged) == [
        f"stage{n}/merge_{name}/kernel" for n in (1, 2) for name in ("features", "heatmaps")
    ]


@pytest.mark.slow
def test_later_stages_see_the_heatmaps_of_earlier_ones():
    """A change of the first stage's heatmaps, initially nearly 0, changes those of the second."""
    model = Hourglass(2, 4, num_classes=2, depth=1, stem="cifar")

    @jax.jit
    def run(shift):
        x = jax.random.normal(jax.random.key(1), (1, 8, 8, 3))
        variables = model.init(jax.random.key(0), x)
        predict = variables["params"]["stage1"]["predict"]
        predict["bias"] = predict["bias"] + shift
        return model.apply(variables, x)

    before, after = run(0.0), run(1.0)
    assert 0 < np.abs(before).max() < 0.05
    np.testing.assert_allclose(after[:, 0], before[:, 0] + 1, atol=1e-5)
    assert np.abs(after[:, 1] - before[:, 1]).max() > 1e-4


@pytest.mark.parametrize("shape", [(4, 6), (3, 4), (5, 1)])
def test_pooling_rounds_odd_sizes_up(shape):
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, *shape, 3)))
    pooled = np.asarray(half(jnp.asarray(x)))
    for i in range(-(-shape[0] // 2)):
        for j in range(-(-shape[1] // 2)):
            expected = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max(axis=(1, 2))
            np.testing.assert_array_equal(pooled[:, i, j], expected)


# --- Sharing


def layout(name, **options):
    return create_model(name, 5, (64, 64, 3), depth=2, **options).layout


def test_both_plans_of_rings_have_equally_many_parameters():
    one, several = layout("hourglass2-8-rpg-1000"), layout("hourglass2-8-stage-rpg-1000")
    assert [bank.name for bank in one.banks] == ["ring"]
    assert [bank.name for bank in several.banks] == ["stage1", "stage2"]
    assert one.banks[0].scheme == Ring(1000, initial="paper")
    assert {bank.scheme for bank in several.banks} == {Ring(500, initial="paper")}
    assert one.banks[0].dense == 2 * kernels(8, 2)
    assert one.private == several.private
    assert one.trainable == several.trainable == one.private + 1000
    # one stage's worth: as many as where all stages are tied
    tied = layout("hourglass2-8-tied")
    worth = layout(f"hourglass2-8-rpg-{kernels(8, 2)}")
    assert tied.trainable == worth.trainable and tied.private == one.private


def test_the_same_kernels_are_shared_in_every_plan():
    names = ("hourglass3-8-tied", "hourglass3-8-rpg-600", "hourglass3-8-stage-rpg-600")
    sites = [
        sorted(site.path for bank in layout(name).banks for site in bank.sites) for name in names
    ]
    assert sites[0] == sites[1] == sites[2]
    assert all("/hourglass/" in path for path in sites[0])
    assert len(sites[0]) == 3 * (3 * (3 * 2 + 2) + 1)


def test_tied_stages_have_the_same_kernels():
    model = create_model("hourglass2-8-tied", 5, (64, 64, 3), depth=1)
    for bank in model.layout.banks:
        assert bank.scheme == Tied(initial="paper")
        first, second = sorted(site.path for site in bank.sites)
        assert first.replace("stage1", "stage2") == second
    x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), shapes)
    dense = model.expand(variables)["params"]
    one, two = [dict[Any, Any](flatten_dict(dense[f"stage{n}"]["hourglass"])) for n in (1, 2)]
    assert one.keys() == two.keys()
    for path in one:  # batch norms are private
        assert np.array_equal(one[path], two[path]) == (path[-1] == "kernel")


def test_rings_of_stages_must_have_whole_sizes():
    with pytest.raises(
        ModelError, match=r"3 stages cannot have 1000 .* multiple of 3, such as 1002"
    ):
        create_model("hourglass3-8-stage-rpg-1000")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 0}, "stages .* 1 to 64; got 0"),
        ({"depth": 11}, "depth .* 1 to 10; got 11"),
        ({"width": 6}, "multiple of 4; got 6"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"stem": "vgg"}, "stem='vgg'"),
    ],
)
def test_bad_attributes(options, message):
    with pytest.raises(ModelError, match=message):
        shapes(Hourglass(**{"stages": 1, "width": 8, "depth": 1, **options}))


@pytest.mark.parametrize(
    "name",
    [f"hourglass{stages}-8{suffix}" for stages in (0, 65) for suffix in ("", "-tied", "-rpg-64")]
    + ["hourglass0-8-stage-rpg-64", "hourglass2-6", "hourglass2-8.5", "hourglass2-8-rpg-0"],
)
def test_bad_names(name):
    with pytest.raises(ModelError, match=name):
        create_model(name)
