"""RetinaNet: published size, levels, heads that all levels share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from paramshare import create_model
from paramshare.models import ModelError, ResNet, RetinaNet
from paramshare.models.layers import nearest
from paramshare.zoo.residual import resnet

TINY = ResNet((1, 1, 1), (4, 4, 8), num_classes=None, stem="cifar", stem_width=4)


def shapes(model, size=64, **options):
    x = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, **options), x)


def test_it_has_the_size_of_torchvisions():
    """34,014,999 for 91 classes, where batch norms are frozen and do not count."""
    _, variables = shapes(RetinaNet(resnet(50, num_classes=None), num_classes=91), 256)
    leaves: Any = flatten_dict(variables["params"], sep="/")
    size = sum(leaf.size for path, leaf in leaves.items() if "bn" not in path)
    assert size == 34_014_999


@pytest.mark.parametrize(("name", "strides"), [("resnet18", (8, 128)), ("resnet20", (4, 64))])
def test_levels_run_from_the_third_last_stage_over_five_octaves(name, strides):
    model = create_model(f"retinanet-{name}-head8x1", 3, (128, 192, 3))
    x = jax.ShapeDtypeStruct((1, 128, 192, 3), jnp.float32)
    outputs, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), x)
    places = sum(-(-128 // s) * -(-192 // s) for s in (strides[0] * 2**k for k in range(5)))
    assert outputs["logits"].shape == (1, 9 * places, 3)
    assert outputs["offsets"].shape == outputs["anchors"].shape == (1, 9 * places, 4)


def test_anchors_lie_where_the_features_look():
    """A changed pixel changes the outputs of anchors around it, and none of the finest far away."""
    model = RetinaNet(TINY, 2, width=4, depth=1)

    @jax.jit
    def run(place):
        x = jax.random.normal(jax.random.key(0), (1, 48, 48, 3))
        x = jnp.concatenate([x, x.at[0, place[1], place[0]].add(5.0)])
        return model.init_with_output(jax.random.key(1), x)[0]

    outputs = jax.device_get(run(jnp.array([8, 40])))
    finest = 48 * 48 * 9
    changed = np.any(np.diff(outputs["logits"], axis=0)[0, :finest], axis=-1)
    anchor = outputs["anchors"][0, :finest]
    distance = np.max(np.abs((anchor[:, :2] + anchor[:, 2:]) / 2 - [[8, 40]]), axis=-1)
    assert changed[distance < 2].all() and not changed[distance > 36].any()


def test_initially_every_class_is_improbable_everywhere():
    model = RetinaNet(TINY, 5, width=4, depth=2)
    run = jax.jit(lambda x: model.init_with_output(jax.random.key(0), x)[0])
    outputs = run(jnp.ones((1, 32, 32, 3)))
    np.testing.assert_allclose(jax.nn.sigmoid(outputs["logits"]), 0.01, atol=2e-3)


def test_all_levels_share_the_heads():
    _, variables = shapes(RetinaNet(TINY, 5, width=4, depth=2))
    params = variables["params"]
    assert set(params) == {"backbone", "pyramid", "classes", "boxes"}
    assert set(params["classes"]) == {"conv1", "conv2", "predict"}


def test_feature_maps_are_enlarged_by_repetition_to_any_size():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    for rows, columns in (((0, 0, 1, 1), (0, 0, 1, 1, 2, 2)), ((0, 0, 1), (0, 0, 1, 1, 2))):
        expected = np.asarray(x)[:, rows][:, :, columns]
        np.testing.assert_array_equal(nearest(x, (len(rows), len(columns))), expected)


def test_sharing_carries_over_from_the_backbone():
    plain = create_model("resnet20-s16u1", input_shape=(32, 32, 3))
    model = create_model("retinanet-resnet20-s16u1-towers2", 3, (64, 64, 3))
    banks = {bank.name: bank for bank in model.layout.banks}
    for bank in plain.layout.banks:
        there = banks[bank.name]
        assert [site.path for site in there.sites] == [f"backbone/{s.path}" for s in bank.sites]
        assert there.trainable == bank.trainable
    assert {site.path for site in banks["towers"].sites} == {
        f"{head}/conv{n}/kernel" for head in ("classes", "boxes") for n in (1, 2, 3, 4)
    }


def test_towers_of_no_templates_are_refused():
    with pytest.raises(ModelError, match="templates=0"):
        create_model("retinanet-resnet20-towers0", 3, (64, 64, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (RetinaNet(ResNet(), 3), "num_classes=1000"),
        (RetinaNet(ResNet((1, 1), (4, 4), None), 3), "at least three"),
        (RetinaNet(TINY, 0), "num_classes=0"),
        (RetinaNet(TINY, 3, coarsest="middle"), "'output' or 'input'"),
    ],
)
def test_bad_attributes(model, message):
    with pytest.raises(ModelError, match=message):
        shapes(model)


@pytest.mark.parametrize("name", ["retinanet-resnet21", "retinanet-resnet20-head0x2"])
def test_bad_names(name):
    with pytest.raises(ModelError, match="retinanet"):
        create_model(name, 3, (64, 64, 3))
