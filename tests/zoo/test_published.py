"""The papers' networks: trainable numbers and multiply-adds to the last one, and which sites share which bank."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import paramshare
from paramshare import ModelError, Shared
from paramshare.analysis.cost import cost
from paramshare.models import PathNet
from paramshare.schemes import FilterBasis, Ring, Soft, Tied
from paramshare.zoo import default_input_shape, options_of

SMALL = {"num_classes": 100, "stem": "cifar"}

# Trainable numbers in the specs' tables, from the papers' public code. (name, options): number
BASIS = {
    "": {
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
    },
    "CIFAR-100": {
        "resnet18": 11_220_132,
        "resnet34": 21_328_292,
        "resnet34-s8u1": 5_865_428,
        "resnet34-s16u1": 6_485_844,
        "resnet34-s32u1": 7_726_676,
        "resnet34-s16u0": 6_201_508,
        "resnet34-s0u16": 9_510_052,
        "densenet121": 7_048_548,
        "densenet121-s16u1": 5_084_504,
        "resnext50": 23_177_124,
        "resnext50-s64u4": 19_333_380,
        "mobilenetv2": 2_428_004,
        "mobilenetv2-shared": 2_163_812,
        "mobilenetv2-sharedpp": 1_899_620,
    },
}
REPETITION = {
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
}
# (depth, classes, stem): (generated T, convolutions in the ring, private, total)
RINGS = {
    (18, 1000, "imagenet"): (11_157_504, 19, 532_008, 11_689_512),
    (34, 1000, "imagenet"): (21_258_240, 35, 539_432, 21_797_672),
    (18, 10, "cifar"): (11_157_504, 19, 16_458, 11_173_962),
    (18, 100, "cifar"): (11_157_504, 19, 62_628, 11_220_132),
    (34, 10, "cifar"): (21_258_240, 35, 23_882, 21_282_122),
    (34, 100, "cifar"): (21_258_240, 35, 70_052, 21_328_292),
}
# Spec of soft sharing: networks for shortest paths on grids, with k templates for 20 layers
PATHS = {"pathnet-20-32": 185_697, "spathnet-20-32-20": 186_097, "spathnet-20-32-1": 185_697 - 19 * 9_216 + 20}
CASES = [
    *[(name, SMALL if where else {}, wanted) for where, rows in BASIS.items() for name, wanted in rows.items()],
    *[(name, {}, wanted) for name, wanted in (REPETITION | PATHS).items()],
]


def images(name: str, **options) -> jax.ShapeDtypeStruct:
    shape = (32, 32, 3) if options.get("stem") == "cifar" else default_input_shape(name)
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def variables(name: str, model: Any = None, **options):
    model = model or paramshare.create_model(name, **options)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images(name, **options))


def shared(name: str, **options) -> Shared:
    model = paramshare.create_model(name, **options)
    assert isinstance(model, Shared)
    return model


@pytest.mark.parametrize(("name", "options", "wanted"), CASES, ids=[f"{name}-{o.get('num_classes', '')}" for name, o, _ in CASES])
def test_trainable_numbers(name, options, wanted):
    model = paramshare.create_model(name, **options)
    assert paramshare.count(variables(name, model, **options))["trainable"] == wanted
    if isinstance(model, Shared):  # what the layout says is what is there
        assert model.layout.trainable == wanted


@pytest.mark.parametrize(("depth", "classes", "stem"), RINGS)
def test_rings(depth, classes, stem):
    generated, convolutions, private, total = RINGS[depth, classes, stem]
    options = {"num_classes": classes, "stem": stem}
    c = cost(shared(f"resnet{depth}-rpg", **options), images(f"resnet{depth}-rpg", **options).shape[1:])
    assert (c.generated, c.plain, c.counts["private"]) == (generated, total, private)
    assert c.counts == {"banks": 2_359_296, "coefficients": 0, "private": private, "trainable": 2_359_296 + private}
    model = shared(f"resnet{depth}-rpg-50000", **options)
    assert [type(bank.scheme) for bank in model.layout.banks] == [Ring]
    assert len(model.layout["ring"].sites) == convolutions
    assert model.layout.trainable == 50_000 + private
    assert shared(f"resnet{depth}-rpg", ring_size=50_000, **options).layout == model.layout


def test_one_layers_worth():
    assert shared("resnet18-rpg").layout.trainable == 2_891_304
    assert shared("resnet34-rpg").layout.trainable == 2_898_728


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("resnet34", SMALL, 1_159_397_376),
        ("resnet34-s32u1", SMALL, 772_472_832),
        ("resnet34-s48u1-double", {}, 3_248_996_352),
        ("resnet50", {}, 4_087_136_256),
        ("resnet50-shared", {}, 4_087_136_256),
        ("resnet50-sharedpp", {}, 4_087_136_256),
        ("mobilenetv2", {}, 312_339_328),
        ("mobilenetv2-shared", {}, 312_339_328),
        ("mobilenetv2-sharedpp", {}, 312_339_328),
        ("vgg11", {}, 228_261_888),
        *[(f"rep-vgg-{n}", {}, 228_261_888) for n in range(4, 11)],
    ],
)
def test_multiply_adds_of_convolutions(name, options, wanted):
    assert cost(paramshare.create_model(name, **options), images(name, **options).shape[1:]).convolutions == wanted


@pytest.mark.parametrize(("n", "wanted"), list(enumerate((252, 176, 96, 88, 28, 4, 0), start=4)))
def test_learned_numbers_of_repeated_vggs(n, wanted):
    assert paramshare.count(variables(f"rep-vgg-{n}"))["coefficients"] == wanted


def test_who_shares_in_a_factored_network():
    layout = shared("resnet34-s32u1").layout
    assert [(bank.name, bank.scheme) for bank in layout.banks] == [(f"stage{g + 1}", FilterBasis(32 * 2**g, 2**g)) for g in range(4)]
    for bank, blocks in zip(layout.banks, (3, 4, 6, 3), strict=True):  # single: both convolutions of every block but the first
        assert [site.path for site in bank.sites] == [f"{bank.name}/block{b}/basis{i}/kernel" for b in range(2, blocks + 1) for i in (1, 2)]
    double = shared("resnet34-s32u1-double").layout
    assert [(bank.scheme.shared, bank.scheme.bases) for bank in double.banks] == [(32 * 2**g, 2) for g in range(4)]  # type: ignore[attr-defined]
    assert [bank.sites for bank in double.banks] == [bank.sites for bank in layout.banks]


def test_orthonormal_start_of_a_whole_network():
    model = shared("resnet34-s32u1", **SMALL)
    banks, coefficients = model.layout.init(jax.random.key(0))
    trained = {"banks": banks, "params": {"coefficients": coefficients}}
    assert float(paramshare.orthogonality(trained)) < 1e-10
    assert float(paramshare.orthogonality(trained, unique=True)) > 1e-3  # only shared filters are drawn so


def test_floors_of_the_penalty():
    """Where filters outnumber their own numbers, orthonormal columns are the best there is."""
    drawn = {"banks": shared("resnet50-sharedpp").layout.init(jax.random.key(0))[0]}  # as it starts; the 3x3s add nothing
    assert float(paramshare.orthogonality(drawn, "stage.-conv2", "stage.-conv3")) == pytest.approx(5.17004e-4, rel=2e-6)
    mobile = shared("mobilenetv2-shared").layout.banks  # which starts from plain kernels
    columns = {bank.name: Tied(orthonormal=True).init(jax.random.key(0), bank.sites)[0] for bank in mobile}
    assert float(paramshare.orthogonality({"banks": columns})) == pytest.approx(1.224181e-3, rel=2e-6)


def test_which_stages_of_a_mobilenet_share():
    assert list(shared("mobilenetv2-shared").layout) == [f"stage{g}-expand" for g in (3, 4, 5, 6)]
    assert set(shared("mobilenetv2-sharedpp").layout) == {f"stage{g}-{conv}" for g in (3, 4, 5, 6) for conv in ("expand", "project")}
    assert [len(bank.sites) for bank in shared("mobilenetv2-shared").layout.banks] == [2, 3, 2, 2]


@pytest.mark.parametrize(("depth", "width", "period", "ring"), [(20, 32, 1, 18_432), (10, 16, 3, 2_304), (4, 8, 4, 100)])
def test_path_nets_by_their_formulas(depth, width, period, ring):
    """First and last layer, two numbers a channel of every batch norm, and the kernels."""
    private, kernel = 2 * width + 2 * width * depth + width + 1, 9 * width * width
    name = f"pathnet-{depth}-{width}"
    assert paramshare.count(variables(name))["trainable"] == private + kernel * depth
    for shares, numbers, scheme in (
        (f"s{name}-{period}", (kernel + depth) * period, Soft(period)),
        (f"{name}-loop-{period}", kernel * period, Tied(groups=tuple(i % period for i in range(depth)), fan="fan_in")),
        (f"{name}-rpg-{ring}", ring, Ring(ring)),
    ):
        layout = shared(shares).layout
        assert layout.trainable == paramshare.count(variables(shares))["trainable"] == private + numbers
        assert [bank.scheme for bank in layout.banks] == [scheme]
        assert [site.path for site in layout.banks[0].sites] == [f"layer{i + 1}/conv/kernel" for i in range(depth)]


@pytest.mark.parametrize("name", ["pathnet-4-8", "spathnet-4-8-2", "pathnet-4-8-loop-2", "pathnet-4-8-rpg-100"])
def test_path_nets_take_their_options(name):
    with jax.numpy_dtype_promotion("standard"):  # Flax's BatchNorm adds float32 statistics to bfloat16 images
        model = paramshare.create_model(name, 1, (9, 7, 2), dtype=jnp.bfloat16, axis_name="device")
    plain = model.model if isinstance(model, Shared) else model
    assert plain == PathNet(4, 8, dtype=jnp.bfloat16, axis_name="device")
    assert options_of(name) == ("dtype", "axis_name") and default_input_shape(name) == (32, 32, 2)
    assert paramshare.create_model(name) == paramshare.create_model(name, num_classes=1)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34-s32u1", "mobilenetv2", "densenet121", "resnext50-s64u4", "resnet18-rpg", "resnet18-x2-repeat"]
)
def test_the_stem_follows_the_images(name):
    def stem(**options) -> str:
        model = paramshare.create_model(name, **options)
        return getattr(model.model if isinstance(model, Shared) else model, "stem")  # noqa: B009

    assert "stem" in options_of(name)
    assert (stem(), stem(input_shape=(224, 224, 3)), stem(input_shape=(64, 64, 3))) == ("imagenet",) * 3
    assert (stem(stem="cifar"), stem(input_shape=(32, 32, 3)), stem(input_shape=(28, 63, 1))) == ("cifar",) * 3
    assert stem(input_shape=(32, 32, 3), stem="imagenet") == "imagenet"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("resnet34-s0u0", {}, "resnet34-s0u0: a basis of no filters"),
        ("resnet34-s600u0", {}, "600"),
        ("resnet32-s200u1", {}, "201"),
        ("resnet32-s100u1-double", {}, "shares 200 filters.* a filter of stage1/block2/basis1/kernel has 144 numbers"),
        ("resnet8-s16u1", {}, "one block a stage has nothing to share"),
        ("resnet21", {}, r"depth 6 n \+ 2 .*got 21, nearest are 20 and 26"),
        ("resnet18-rpg-0", {}, r"Ring\(size=0\): size must be an integer, 1 or more"),
        ("resnet18-rpg", {"ring_size": 0}, r"Ring\(size=0\)"),
        ("rep-vgg-11", {}, "rep-vgg-4 to rep-vgg-10.*got 11"),
        ("vgg3", {}, "depth.*3"),
        ("resnet16-0.5-repeat", {}, "at least as wide.*0.5"),
        ("resnet50-s16u1", {}, "malformed|nearest|names are of the form|factored"),
        ("resnext50-s64u3", {}, "resnext50-s64u3: .*4"),
        ("resnet20", {"stem": "cifar"}, "resnet20 has no option 'stem'; its options are dtype, axis_name"),
        ("resnet18", {"stem": "mnist"}, "resnet18: stem='mnist'"),
        ("vgg12", {}, "vgg12: .*12"),
        ("vgg11", {"input_shape": (8, 8, 1)}, "vgg11: .*8"),
        ("vgg11", {"input_shape": 5}, "vgg11: input_shape=5"),
        ("vgg11", {"input_shape": ("a", 1, 2)}, "vgg11: input_shape="),
        ("vgg11", {"num_classes": "ten"}, "vgg11: num_classes=ten"),
        ("vgg11", {"num_classes": 10.0}, "vgg11: num_classes=10.0"),
        ("vgg11", {"dtype": "foo"}, "vgg11: .*foo"),
        (
            "resnet20-rpg",
            {},
            "no network 'resnet20-rpg'; names of the form resnet{depth}-rpg are: .*resnet18-rpg; nearest: .*resnet20-rpg-10000",
        ),
        *[
            (name, {"num_classes": 10}, f"{name}: num_classes=10; a path net gives one number a cell: leave it out")
            for name in ("pathnet-4-8", "spathnet-4-8-2", "pathnet-4-8-loop-1", "pathnet-4-8-rpg-9")
        ],
        ("pathnet-4-8-loop-5", {}, "pathnet-4-8-loop-5: 5 kernels cannot take turns in 4 layers; take a number from 1 to 4"),
        ("pathnet-4-8-loop-0", {}, "0 kernels cannot take turns"),
        ("pathnet-4-0", {}, "pathnet-4-0: depth=4, width=0; a path net has a layer and a channel or more"),
        ("spathnet-4-8-0", {}, r"Soft\(templates=0\)"),
        ("pathnet-4-8-rpg-0", {}, r"Ring\(size=0\)"),
        ("pathnet-4", {}, r"malformed model name 'pathnet-4'; names are of the form pathnet-\{depth\}-\{width\}"),
        ("resnet18-shared", {}, "no network 'resnet18-shared'.* bottleneck networks .* resnet50-shared"),
    ],
)
def test_networks_that_cannot_be(name, options, said):
    with pytest.raises(ModelError) as caught:
        paramshare.create_model(name, **options)
    assert re.search(said, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
