"""The papers' networks: exact numbers of trainable parameters and of multiply-adds."""

import itertools
import random
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import paramshare
from paramshare import Shared
from paramshare.models import PathNet
from paramshare.schemes import Ring, Soft, Tied
from paramshare.zoo import FAMILIES, default_input_shape, options_of

# The stem follows from the size of the images.
SMALL_IMAGES = {"num_classes": 100, "input_shape": (32, 32, 3)}

# Trainable parameters, from the papers' tables and public code.
COUNTS = {
    "": {
        # Soft sharing.
        "wrn-28-10": 36_479_194,
        "swrn-28-10-1": 12_287_212,
        "swrn-28-10-2": 17_125_630,
        "swrn-28-10-4": 26_802_466,
        "swrn-28-10-6": 36_479_302,
        "swrn-28-14-2": 33_537_790,
        "swrn-28-18-2": 55_414_014,
        "swrn-40-8-8": 29_555_402,
        "wrn-16-1": 175_066,
        "swrn-16-1-1": 126_688,
        "wrn-50-2": 68_883_240,
        "swrn-50-2-1": 39_703_372,
        "swrn-50-2-2": 57_807_728,
        "swrn-50-2-3": 62_067_592,
        "swrn-50-2-5": 68_883_366,
        "swrn-50-2-9": 68_883_366,  # templates are capped at the number of layers
        "pathnet-20-32": 185_697,
        "spathnet-20-32-20": 186_097,
        "spathnet-20-32-1": 185_697 - 19 * 9_216 + 20,
        # Filter bases.
        "resnet20": 269_722,
        "resnet32": 464_154,
        "resnet56": 853_018,
        "resnet32-s8u1": 150_666,
        "resnet32-s16u1": 197_258,
        "resnet32-s16u1-double": 245_642,
        "resnet56-s8u1": 201_850,
        "resnet56-s16u1": 270_842,
        "resnet56-s16u1-double": 319_226,
        "resnet34": 21_797_672,
        "resnet34-s32u1": 8_196_056,
        "resnet34-s32u1-double": 9_762_776,
        "resnet34-s48u1-double": 11_786_968,
        "resnet50": 25_557_032,
        "resnet50-shared": 20_506_664,
        "resnet50-sharedpp": 18_262_056,
        "resnet101": 44_549_160,
        "resnet101-shared": 29_471_784,
        "resnet101-sharedpp": 22_770_728,
        "mobilenetv2": 3_507_272,
        "mobilenetv2-shared": 3_243_080,
        "mobilenetv2-sharedpp": 2_978_888,
        "densenet121": 7_978_856,  # torchvision's
        "resnext50": 25_028_904,  # torchvision's
        # Learnable repetition.
        "vgg4": 114_378,
        "vgg6": 559_178,
        "vgg8": 2_333_514,
        "vgg11": 9_416_010,
        "rep-vgg-4": 126_534,
        "rep-vgg-6": 568_746,
        "rep-vgg-8": 2_338_150,
        "rep-vgg-10": 7_056_714,
        "resnet16-1": 175_258,
        "resnet16-2": 692_122,
        "resnet16-4": 2_749_786,
        "resnet16-8": 10_963_162,
        "resnet16-1-repeat": 175_802,
        "resnet16-4-repeat": 183_498,
        "resnet16-8-repeat": 194_042,
        "resnet16-10-repeat": 199_626,
        "resnet18-x1-repeat": 11_694_248,
        "resnet18-x2-repeat": 12_225_088,
        "resnet18-x4-repeat": 13_278_328,
        # Rotated digits: the baseline, the repeated and the equivariant networks.
        "rotnet": 340_309,
        "rotnet-c4-repeat": 352_987,
        "rotnet-c8-repeat": 360_963,
        "rotnet-c16-repeat": 372_179,
        "rotnet-c4": 304_154,
        "rotnet-c8": 305_098,
        "rotnet-c16": 301_746,
        # Rings: one convolution layer's worth of parameters, and what is not shared.
        "resnet18-rpg": 2_891_304,
        "resnet34-rpg": 2_898_728,
    },
    "CIFAR-100": {
        "swrn-28-10-2": 17_183_320,
        "resnet18": 11_220_132,
        "resnet34": 21_328_292,
        "resnet34-s8u1": 5_865_428,
        "resnet34-s16u1": 6_485_844,
        "resnet34-s32u1": 7_726_676,
        "resnet34-s16u0": 6_201_508,
        "resnet34-s0u16": 9_510_052,
        "densenet121": 7_048_548,  # without a batch norm after the stem: 128 fewer
        "densenet121-s16u1": 5_084_504,
        "resnext50": 23_177_124,
        "resnext50-s64u4": 19_333_380,
        "mobilenetv2": 2_428_004,
        "mobilenetv2-shared": 2_163_812,
        "mobilenetv2-sharedpp": 1_899_620,
    },
}
# Multiply-adds of the convolutions, from the papers' tables.
MULTIPLY_ADDS = {
    "": {
        "resnet34-s48u1-double": 3_248_996_352,
        "resnet50": 4_087_136_256,
        "resnet50-shared": 4_087_136_256,
        "resnet50-sharedpp": 4_087_136_256,
        "mobilenetv2": 312_339_328,
        "mobilenetv2-shared": 312_339_328,
        "mobilenetv2-sharedpp": 312_339_328,
        "vgg11": 228_261_888,
        **{f"rep-vgg-{n}": 228_261_888 for n in range(4, 11)},
    },
    "CIFAR-100": {"resnet34": 1_159_397_376, "resnet34-s32u1": 772_472_832},
}
# Coefficients of repeated VGGs, for 4 to 10 convolutions.
VGG_COEFFICIENTS = (252, 176, 96, 88, 28, 4, 0)
# (depth, classes, stem): (generated parameters, convolutions in the ring, private parameters).
RINGS = {
    (18, 1000, "imagenet"): (11_157_504, 19, 532_008),
    (34, 1000, "imagenet"): (21_258_240, 35, 539_432),
    (18, 10, "cifar"): (11_157_504, 19, 16_458),
    (18, 100, "cifar"): (11_157_504, 19, 62_628),
    (34, 10, "cifar"): (21_258_240, 35, 23_882),
    (34, 100, "cifar"): (21_258_240, 35, 70_052),
}
# Of families without a published count the first name is built too; transformers have a file of
# their own.
FIRST = {
    family.examples[0]
    for family in FAMILIES
    if family.examples and not family.form.startswith(("vit", "decoder"))
}
CASES = [
    *[("", name) for name in sorted(FIRST | COUNTS[""].keys() | MULTIPLY_ADDS[""].keys())],
    *[("CIFAR-100", name) for name in COUNTS["CIFAR-100"]],
]


@pytest.mark.parametrize(("images", "name"), CASES, ids=[f"{name}{o}" for o, name in CASES])
def test_named_network(network, images, name):
    options: dict[str, Any] = SMALL_IMAGES if images else {}
    trace = network(name, **options)
    shape = options.get("input_shape", default_input_shape(name))
    classes = options.get("num_classes", 1000 if shape[0] == 224 else 10)
    if name.startswith("hourglass"):
        stages = int(name[len("hourglass")])
        assert trace.outputs == ((1, stages, shape[0] // 4, shape[1] // 4, 17), jnp.float32)
    elif name.startswith("retinanet"):
        assert {name: (shape[0], shape[2]) for name, (shape, _) in trace.outputs.items()} == {
            "logits": (1, 80),
            "offsets": (1, 4),
            "anchors": (1, 4),
        }
    elif name.startswith(("heads-", "networks-")):
        outputs = {task: shape for task, (shape, _) in trace.outputs.items()}
        assert outputs == {"angle": (1, 1), "digit": (1, 10), "place": (1, 2)}
    else:
        per_cell = "pathnet" in name
        assert trace.outputs == ((1, *shape[:2]) if per_cell else (1, classes), jnp.float32)
    assert trace.collections == {"params", "batch_stats"}
    promises = re.search(
        r"^s|-s\d+u|-shared|-rpg|^rep-|-repeat|-loop-|-towers|-tied|rotnet-c\d+(?!-wide)", name
    )
    assert isinstance(trace.model, Shared) == (bool(promises) and "-s0u" not in name)
    if isinstance(trace.model, Shared):
        assert trace.model.layout.plain == trace.plain
    if (count := COUNTS[images].get(name)) is not None:
        assert trace.trainable == count
    if (work := MULTIPLY_ADDS[images].get(name)) is not None:
        assert trace.convolutions == work


def test_every_published_figure_is_tested():
    for table in (COUNTS, MULTIPLY_ADDS):
        for images, rows in table.items():
            assert {(images, name) for name in rows} <= set(CASES)


@pytest.mark.parametrize(("depth", "classes", "stem"), RINGS)
def test_rings(network, depth, classes, stem):
    generated, convolutions, private = RINGS[depth, classes, stem]
    options = {} if stem == "imagenet" else {"num_classes": classes, "stem": stem}
    trace = network(f"resnet{depth}-rpg", **options)
    (bank,) = trace.model.layout.banks
    assert isinstance(bank.scheme, Ring)
    assert (bank.name, bank.dense, len(bank.sites)) == ("ring", generated, convolutions)
    assert (trace.plain, trace.model.layout.private) == (generated + private, private)
    assert trace.trainable == 2_359_296 + private


@pytest.mark.parametrize(("n", "coefficients"), list(enumerate(VGG_COEFFICIENTS, start=4)))
def test_coefficients_of_repeated_vggs(network, n, coefficients):
    assert count_variables(network(f"rep-vgg-{n}").model, (32, 32, 3)) == {
        "banks": sum(bank.sites[0].size for bank in network(f"rep-vgg-{n}").model.layout.banks),
        "coefficients": coefficients,
        "private": network(f"rep-vgg-{n}").model.layout.private,
        "trainable": network(f"rep-vgg-{n}").trainable,
    }


@pytest.mark.parametrize(
    "name",
    [
        "swrn-16-1-1",
        "swrn-50-2-1",
        "resnet20-s16u1",
        "resnet32-s16u1-double",
        "resnet50-shared",
        "mobilenetv2-sharedpp",
        "resnet20-rpg-10000",
        "resnet16-4-repeat",
        "spathnet-10-16-10",
        "pathnet-10-16-loop-1",
        "hourglass2-64-tied",
    ],
)
def test_the_variables_are_those_that_the_layout_counts(network, name):
    trace = network(name)
    counts = count_variables(trace.model, default_input_shape(name))
    assert counts["trainable"] == trace.trainable


def test_size_of_a_ring():
    named = paramshare.create_model("resnet18-rpg-50000", num_classes=10, stem="cifar")
    assert isinstance(named, Shared)
    assert named.layout.trainable == 50_000 + 16_458
    options = {"num_classes": 10, "stem": "cifar", "ring_size": 50_000}
    assert paramshare.create_model("resnet18-rpg", **options) == named


def count_variables(model: Any, shape: tuple[int, ...]) -> dict[str, int]:
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return paramshare.count(jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x))


def wide(depth: int, width: float, k: int | None, classes: int, channels: int = 3) -> int:
    """Trainable parameters of a wide residual network, by a closed formula.

    `depth` = 6 n + 4; a and b are the channels before and of a stage; L = 2 (n - 1) layers share k
    templates.
    """
    n = (depth - 4) // 6
    widths = [16, int(16 * width), int(32 * width), int(64 * width)]
    layers, total = 2 * (n - 1), 9 * channels * 16
    for a, b in itertools.pairwise(widths):
        shared = 9 * b * b * layers if k is None else 9 * b * b * k + k * layers
        private = 9 * a * b + 9 * b * b + (a * b if a != b else 0)
        total += private + 2 * a + 2 * b + 4 * b * (n - 1) + shared
    return total + 2 * widths[3] + widths[3] * classes + classes


@pytest.mark.parametrize("seed", range(2))
def test_the_closed_formula_for_any_legal_arguments(network, seed):
    draw = random.Random(seed)
    depth, k = 6 * draw.randint(2, 4) + 4, draw.randint(1, 12)
    width = draw.choice([1, 2, 5, 0.5, 1.25, 2.5])
    classes, channels = draw.randint(1, 200), draw.choice([1, 3])
    shape = (draw.randint(8, 40), draw.randint(8, 40), channels)
    options = {"num_classes": classes, "input_shape": shape}
    for name, templates in ((f"wrn-{depth}-{width}", None), (f"swrn-{depth}-{width}-{k}", k)):
        count = network(name, **options).trainable
        assert count == wide(depth, width, templates, classes, channels)


def test_the_least_depth(network):
    assert network("wrn-10-3").trainable == wide(10, 3, None, 10)


@pytest.mark.parametrize(
    ("depth", "width", "period", "ring"), [(6, 16, 3, 2_304), (4, 8, 4, 100), (2, 4, 1, 500)]
)
def test_path_nets_by_their_formulas(network, depth, width, period, ring):
    """First and last layer, scale and bias of every batch norm, and the kernels."""
    private, kernel = 2 * width + 2 * width * depth + width + 1, 9 * width * width
    name = f"pathnet-{depth}-{width}"
    assert network(name).trainable == private + kernel * depth
    groups = tuple(i % period for i in range(depth))
    for shares, shared, scheme in (
        (f"s{name}-{period}", (kernel + depth) * period, Soft(period, initial="paper")),
        (f"{name}-loop-{period}", kernel * period, Tied(groups=groups, initial="paper")),
        (f"{name}-rpg-{ring}", ring, Ring(ring, initial="paper")),
    ):
        trace = network(shares)
        (bank,) = trace.model.layout.banks
        assert trace.trainable == private + shared
        assert bank.scheme == scheme
        assert [site.path for site in bank.sites] == [
            f"layer{i + 1}/conv/kernel" for i in range(depth)
        ]


@pytest.mark.parametrize(("stages", "width", "joints"), [(2, 64, 14), (3, 8, 5)])
def test_hourglasses_by_their_formulas(network, stages, width, joints):
    """Kernels of hourglasses of depth 4, which share; stem, batch norms and heatmaps, which do not.

    A residual block from a to b channels has three convolutions and batch norms.
    """

    def kernels(a: int, b: int) -> int:
        return a * b // 2 + 9 * (b // 2) ** 2 + b // 2 * b + (a * b if a != b else 0)

    def norms(a: int, b: int) -> int:
        return 2 * a + 4 * (b // 2)

    quarter, middle = width // 4, width // 2
    blocks = ((quarter, middle), (middle, middle), (middle, width))
    stem = 147 * quarter + 2 * quarter + sum(kernels(*x) + norms(*x) for x in blocks)
    hourglass = 14 * kernels(width, width) + width**2
    stage = 14 * norms(width, width) + 2 * width + (width + 1) * joints
    merges = (stages - 1) * (width**2 + joints * width)
    private = stem + stages * stage + merges
    name, ring = f"hourglass{stages}-{width}", 30 * stages
    for suffix, shared in (
        ("", stages * hourglass),
        ("-tied", hourglass),
        (f"-rpg-{ring}", ring),
        (f"-stage-rpg-{ring}", ring),
    ):
        trace = network(name + suffix, num_classes=joints)
        assert trace.trainable == private + shared
        assert trace.plain == private + stages * hourglass


@pytest.mark.parametrize(
    "name", ["pathnet-4-8", "spathnet-4-8-2", "pathnet-4-8-loop-2", "pathnet-4-8-rpg-100"]
)
def test_path_nets_take_their_options(name):
    # Flax's BatchNorm adds float32 statistics to bfloat16 images.
    with jax.numpy_dtype_promotion("standard"):
        model = paramshare.create_model(name, 1, (9, 7, 2), dtype=jnp.bfloat16, axis_name="device")
    plain = model.model if isinstance(model, Shared) else model
    assert plain == PathNet(4, 8, dtype=jnp.bfloat16, axis_name="device")
    assert options_of(name) == ("dtype", "axis_name") and default_input_shape(name) == (32, 32, 2)
