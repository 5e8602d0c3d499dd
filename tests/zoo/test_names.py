"""Names, options and errors of the named networks."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import paramshare
from paramshare import ModelError, Shared
from paramshare.zoo import FAMILIES, default_input_shape, options_of


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("swrn-50-2-?", ["swrn-50-2-1", "swrn-50-2-2", "swrn-50-2-3"]),
        ("wrn-*-2", ["wrn-101-2", "wrn-16-2", "wrn-50-2"]),
        ("wrn-28-1[0-9]", ["wrn-28-10"]),
        ("nothing*", []),
        ("", []),
    ],
)
def test_patterns(pattern, names):
    assert paramshare.list_models(pattern) == names


def test_all_names_are_listed_once_in_order():
    names = paramshare.list_models()
    assert names == sorted(set(names))
    examples = [name for family in FAMILIES for name in family.examples]
    assert sorted(examples) == names
    for family in FAMILIES:  # a name's first family that has its form and accepts its arguments
        assert all(family.parse(name) is not None for name in family.examples)
        assert all(options_of(name) == family.options for name in family.examples)
        assert all(default_input_shape(name) == family.input_shape for name in family.examples)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrm-28-10", "unknown model 'wrm-28-10'; nearest: .*wrn-28-10"),
        ("xyz", "unknown model 'xyz'"),
        ("", "unknown model ''"),
        ("wrn-28", r"malformed model name 'wrn-28'.*wrn-\{depth\}-\{width\}, such as wrn-16-1"),
        ("wrn-28-10-", "malformed"),
        ("wrn-28-10-2", "malformed"),
        ("swrn-28-10", "malformed.*swrn-{depth}-{width}-{templates}, such as swrn-16-1-1"),
        ("swrn-28-10-1.5", "malformed"),
        ("wrn--28-10", "malformed"),
        ("wrn-28-10\n", "malformed"),
        ("wrn-२८-10", "malformed|unknown"),
        ("wrn-27-10", r"wrn-27-10: .*depth .* 6 n \+ 4.*got 27, the nearest are 22 and 28"),
        ("wrn-28-0", "wrn-28-0: a widening factor must be positive"),
        ("wrn-28-1.03", "wrn-28-1.03: a widening factor .* multiple of 1/16; got 1.03"),
        ("wrn-50-0", "wrn-50-0: a widening factor"),
        ("swrn-10-3-1", "swrn-10-3-1: .*the least depth is 16"),
        ("swrn-28-10-0", r"swrn-28-10-0: Soft\(templates=0"),
        ("resnet34-s0u0", "resnet34-s0u0: .*without filters"),
        ("resnet34-s600u0", "600"),
        ("resnet32-s200u1", "201"),
        ("resnet32-s100u1-double", "200 filters.*stage1/block2/basis1/kernel.*144"),
        ("resnet8-s16u1", "nothing to share"),
        ("resnet50-s16u1", "there is no network"),
        ("resnet21", r"6 n \+ 2 .*got 21, the nearest are 20 and 26"),
        ("resnet18-rpg-0", r"Ring\(size=0"),
        ("resnet20-rpg", "no network 'resnet20-rpg'.*resnet18-rpg; nearest: .*resnet20-rpg-10000"),
        ("resnet18-shared", "no network 'resnet18-shared'.*bottlenecks.*resnet50-shared"),
        ("resnet16-0.5-repeat", "at least 1; got 0.5"),
        ("resnext50-s64u3", "resnext50-s64u3: .*multiple of 4"),
        ("rep-vgg-11", "rep-vgg-4 to rep-vgg-10.*got 11"),
        ("vgg3", "vgg3: the depth .*got 3"),
        ("rotnet-c5", "rotnet-c5: the group of a rotnet must be c4, c8 or c16; got c5"),
        ("rotnet-c2-repeat", "got c2"),
        ("pathnet-4-8-loop-5", "pathnet-4-8-loop-5: .* 1 to 4; got 5"),
        ("pathnet-4-8-loop-0", "got 0"),
        ("vit-12-384-17", "images of 224x224 cannot be cut into patches of 17x17"),
        ("vit-12-384", r"malformed.*vit-\{depth\}-\{width\}-\{patch\}.*, such as vit-12-192-16"),
        ("vit-2-200-16", "heads=3 must divide the width of a ViT, 200"),
        ("vit-2-64.5-16", "number of features; got 64.5"),
        ("decoder-6-128-cycle-7", "6 blocks must be 1 to 6 long; got 7"),
        ("decoder-6-128-cycle-0", "got 0"),
        ("decoder-0-128", "decoder-0-128: depth of a decoder .* got depth=0"),
        ("decoder-6-128-soft-0", r"Soft\(templates=0"),
        ("decoder-6-128-rpg-0", r"Ring\(size=0"),
        ("pathnet-4-0", "pathnet-4-0: .*at least 1; got depth=4, width=0"),
    ],
)
def test_illegal_names(name, message):
    with pytest.raises(ModelError) as caught:
        paramshare.create_model(name)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg4", {"num_classes": 0}, "num_classes=0"),
        ("vgg4", {"num_classes": 10**400}, "it must be an integer of at least 1 and at most"),
        ("vgg4", {"input_shape": (32, 10**20, 3)}, "each at least 1 and at most 1,000,000,000"),
        ("wrn-28-" + "9" * 20, {}, "unknown model .*at most 9 digits"),
        ("wrn-28-0." + "9" * 300, {}, "at most 9 digits"),
        ("wrn-28-" + "9" * 5000, {}, "at most 9 digits"),
        ("swrn-1006-1-2", {}, "swrn-1006-1-2: depth must be at most 1,000"),
        ("densenet121", {"form": "keras"}, "form='keras'; the form must be"),
        ("resnet50", {"form": "paper"}, "resnet50 has no option 'form'"),
        ("vgg4", {"num_classes": "ten"}, "vgg4: num_classes='ten'"),
        ("vgg4", {"num_classes": 10.0}, "vgg4: num_classes=10.0"),
        ("vgg4", {"input_shape": (32, 32)}, r"input_shape=\(32, 32\)"),
        ("vgg4", {"input_shape": (32, 0, 3)}, r"input_shape=\(32, 0, 3\)"),
        ("vgg4", {"input_shape": 5}, "input_shape=5"),
        ("vgg4", {"input_shape": (32,)}, r"must be \(height, width, channels\) of images"),
        ("decoder-2-8", {"input_shape": (8, 8, 3)}, r"it must be \(length,\) of tokens"),
        ("decoder-2-8", {"heads": 3}, "decoder-2-8: heads=3 must divide"),
        ("decoder-2-8", {"axis_name": "i"}, "decoder-2-8 has no option 'axis_name'"),
        ("vit-2-8-8", {"kv_heads": 1}, "vit-2-8-8 has no option 'kv_heads'"),
        ("vgg4", {"input_shape": ("a", 1, 2)}, "input_shape="),
        ("vgg11", {"input_shape": (8, 8, 1)}, "vgg11: images of 8x8 are too small"),
        ("rotnet", {"input_shape": (23, 29, 1)}, "rotnet: images are 23x29; .*at least 24 pixels"),
        ("vgg4", {"dtype": "foo"}, "vgg4: .*foo"),
        (
            "vgg4",
            {"colour": "red"},
            "vgg4 has no option 'colour'; its options are dtype, axis_name",
        ),
        ("resnet20", {"stem": "cifar"}, "resnet20 has no option 'stem'"),
        ("resnet18", {"stem": "mnist"}, "resnet18: stem='mnist'"),
        ("resnet18-rpg", {"ring_size": 0}, r"Ring\(size=0"),
        *[
            (
                name,
                {"num_classes": 10},
                f"{name}: num_classes=10; a path net has one output per cell",
            )
            for name in ("pathnet-4-8", "spathnet-4-8-2", "pathnet-4-8-loop-1", "pathnet-4-8-rpg-9")
        ],
    ],
)
def test_illegal_options(name, options, message):
    with pytest.raises(ModelError) as caught:
        paramshare.create_model(name, **options)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_reach_the_model():
    # Flax's BatchNorm subtracts float32 means from float16 images.
    with jax.numpy_dtype_promotion("standard"):
        model = paramshare.create_model("swrn-16-1-1", dtype=jnp.float16, axis_name="device")
    assert isinstance(model, Shared)
    plain: Any = model.model
    assert (plain.dtype, plain.axis_name, plain.num_classes) == (jnp.float16, "device", 10)


def test_the_stem_follows_the_images():
    def stem(**options) -> str:
        model: Any = paramshare.create_model("resnet18", **options)
        return model.stem

    assert "stem" in options_of("resnet18")
    assert {stem(), stem(input_shape=(64, 64, 3))} == {"imagenet"}
    assert {stem(stem="cifar"), stem(input_shape=(28, 63, 1))} == {"cifar"}
    assert stem(input_shape=(32, 32, 3), stem="imagenet") == "imagenet"


@pytest.mark.parametrize(
    "name",
    ["densenet121", "mobilenetv2", "pathnet-2-2", "resnet8", "rotnet-c4", "vgg4", "wrn-16-1"],
)
def test_any_batch_size_can_be_exported(name):
    """One of each model: the size of a batch is a variable of the traced program."""
    shape = default_input_shape(name)
    if shape[0] == 224:
        shape = (32, 32, 3)
    model: Any = paramshare.create_model(name, input_shape=shape)
    (batch,) = jax.export.symbolic_shape("batch")
    one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), one)
    images = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    assert jax.eval_shape(model.apply, variables, images).shape[0] == batch
