"""Folding: networks made recurrent by hand fold to exactly that, and everything else is told as it is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import FilterBasis, FoldError, Plan, PlanError, Ring, Rule, Soft, Tied, create_model, fold
from paramshare.analysis.folding import Folded, group, period

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
SMALL = (8, 8, 3)
IMAGES = np.random.default_rng(0).normal(size=(4, *SMALL)).astype(np.float32)


def change(folded: Folded) -> float:
    assert folded.output_change is not None
    return folded.output_change


def recurrent(name: str, *stages: str, seed: int = 0, scales: bool = True, shape: tuple[int, int, int] = SMALL):
    """A soft-sharing network whose coefficients in some stages repeat with period 2, up to random signed scales."""
    shared: Any = create_model(name, input_shape=shape)
    variables = jax.jit(lambda: shared.init(KEY, jnp.zeros((1, *shape))))()
    rng = np.random.default_rng(seed)
    coefficients = {}
    for bank in shared.layout.banks:
        rows = np.asarray(variables["params"]["coefficients"][bank.name])
        if bank.name in stages:
            own = rng.uniform(0.5, 2, len(rows)) * rng.choice([-1, 1], len(rows)) if scales else np.ones(len(rows))
            rows = np.stack([own[i] * rows[i % 2] for i in range(len(rows))])
        coefficients[bank.name] = jnp.asarray(rows, jnp.float32)
    return shared, {**variables, "params": {**variables["params"], "coefficients": coefficients}}


@pytest.mark.parametrize("threshold", [0.9, 1.0])
def test_a_recurrent_network_folds_to_exactly_that(threshold):
    shared, variables = recurrent("swrn-28-0.25-4", "stage2", "stage3")
    folded = fold(shared, variables, IMAGES, threshold=threshold)
    assert [bank.period for bank in folded.banks] == [None, 2, 2]
    assert [bank.groups for bank in folded.banks[1:]] == [(0, 1, 0, 1, 0, 1)] * 2
    assert change(folded) < 1e-5
    outputs: Any = folded.shared.apply(folded.variables, IMAGES)
    np.testing.assert_allclose(outputs, shared.apply(variables, IMAGES), rtol=1e-5, atol=1e-5)
    for bank in folded.banks[1:]:
        assert bank.kernel_error < 1e-6  # float32
        assert np.mean(np.abs(bank.scales[::2])) == pytest.approx(1) and np.mean(np.abs(bank.scales[1::2])) == pytest.approx(1)
    assert folded.banks[0].note == "left: no two layers are that similar"
    assert folded.shared.layout["stage1"] == shared.layout["stage1"]
    # The folded network is an ordinary one: its own variables have its form, and what is counted is what is there.
    fresh = jax.eval_shape(lambda: folded.shared.init(KEY, jnp.zeros((1, *SMALL))))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, dict(folded.variables))
    assert paramshare.count(folded.variables)["trainable"] == folded.shared.layout.trainable == shared.layout.trainable - folded.saved


@pytest.mark.parametrize(
    ("stages", "scale", "trainable"),
    [  # issue: two kernels and six signed scales in place of four templates and six rows of four
        (("stage2",), True, 24_959_248),
        (("stage2",), False, 24_959_242),
        (("stage2", "stage3"), True, 17_586_430),
        (("stage2", "stage3"), False, 17_586_418),
    ],
)
def test_counts_of_the_papers_network(stages, scale, trainable):
    shared: Any = create_model("swrn-28-10-4")
    assert shared.layout.trainable == 26_802_466
    folded = shared.layout.with_schemes({name: Tied(groups=(0, 1, 0, 1, 0, 1), scaled=scale) for name in stages})
    assert folded.trainable == trainable


def test_the_papers_network_itself_folds():
    shared, variables = recurrent("swrn-28-10-4", "stage2", "stage3", shape=(32, 32, 3))
    folded = fold(shared, variables)
    assert paramshare.count(folded.variables)["trainable"] == 17_586_430
    assert max(bank.kernel_error for bank in folded.banks) < 1e-6
    assert paramshare.count(fold(shared, variables, scale=False).variables)["trainable"] == 17_586_418


def test_without_scales_a_kernel_has_its_groups_mean_length():
    shared, variables = recurrent("swrn-28-0.25-4", "stage2")
    folded = fold(shared, variables, scale=False)
    assert "stage2" not in folded.variables["params"]["coefficients"]
    lengths = [
        np.linalg.norm(kernel)
        for kernel in shared.layout["stage2"].scheme.expand(
            variables["banks"]["stage2"], variables["params"]["coefficients"]["stage2"], shared.layout["stage2"].sites
        )
    ]
    for number, kernel in enumerate(folded.variables["banks"]["stage2"]["kernels"]):
        assert np.linalg.norm(kernel) == pytest.approx(np.mean(lengths[number::2]), rel=1e-5)


def test_equal_layers_without_scales_fold_exactly():
    shared, variables = recurrent("swrn-28-0.25-4", "stage2", scales=False)
    folded = fold(shared, variables, IMAGES, scale=False, threshold=1)
    assert folded.banks[1].period == 2 and change(folded) < 1e-5


def test_a_group_is_best_served_by_its_leading_direction():
    """Noisy rows: no other representative and scales have a smaller squared error, in coefficients."""
    shared, variables = recurrent("swrn-28-0.25-4", "stage2")
    rows = variables["params"]["coefficients"]["stage2"]
    noisy = rows + 0.05 * jax.random.normal(KEY, rows.shape)
    variables["params"]["coefficients"]["stage2"] = noisy
    templates = jnp.asarray(np.linalg.qr(np.asarray(variables["banks"]["stage2"]["templates"]).T)[0].T)
    variables["banks"]["stage2"] = {"templates": templates}  # orthonormal: errors of kernels are errors of rows
    folded = fold(shared, variables, banks=["stage2"], threshold=0.5)
    assert folded.banks[1].groups == (0, 1, 0, 1, 0, 1)
    kernels = folded.shared.expand(folded.variables)["params"]
    found = sum(
        float(jnp.sum((kernels["stage2"][f"block{2 + i // 2}"][f"conv{1 + i % 2}"]["kernel"].ravel() - noisy[i] @ templates) ** 2))
        for i in range(6)
    )
    tails = [np.sum(np.linalg.svd(np.asarray(noisy[g::2], np.float64), compute_uv=False)[1:] ** 2) for g in (0, 1)]
    assert found == pytest.approx(sum(tails), rel=1e-4)


def test_one_template_is_a_loop_by_construction():
    shared: Any = create_model("swrn-16-1-1", input_shape=SMALL)
    variables = shared.init(KEY, jnp.zeros((1, *SMALL)))
    folded = fold(shared, variables, IMAGES, threshold=1)
    assert [(bank.groups, bank.period, bank.note) for bank in folded.banks] == [((0, 0), 1, "")] * 3
    assert folded.saved == 0  # one template and two coefficients are one kernel and two scales already


def test_folding_twice_changes_nothing_and_says_so():
    shared, variables = recurrent("swrn-28-0.25-4", "stage2")
    once = fold(shared, variables, banks=["stage2"])
    twice = fold(once.shared, once.variables, IMAGES)
    assert not twice.changed and twice.saved == 0 and twice.output_change == 0
    assert [bank.note for bank in twice.banks] == [
        "left: no two layers are that similar",
        "folded already",
        "left: no two layers are that similar",
    ]
    assert "folded already" in str(twice)
    assert twice.shared == once.shared
    jax.tree.map(np.testing.assert_array_equal, twice.variables, once.variables)
    # Scales can still be dropped.
    dropped = fold(once.shared, once.variables, scale=False, banks=["stage2"])
    assert dropped.saved == 6


def test_groups_as_you_want_them():
    shared: Any = create_model("swrn-28-0.25-4", input_shape=SMALL)
    variables = shared.init(KEY, jnp.zeros((1, *SMALL)))
    folded = fold(shared, variables, groups={"stage3": (7, 5, 7, 5, 7, 5)}, banks=["stage1"])
    assert [bank.note for bank in folded.banks[:2]] == ["left: no two layers are that similar", "not asked for"]
    assert folded.banks[2].groups == (0, 1, 0, 1, 0, 1) and folded.banks[2].kernel_error > 0.1
    with pytest.raises(FoldError, match=r"bank 'stage3' has 6 layers, but \(0, 1\) has 2 groups"):
        fold(shared, variables, groups={"stage3": (0, 1)})
    with pytest.raises(FoldError, match="no bank 'stage4'; the banks are"):
        fold(shared, variables, groups={"stage4": (0, 1)})


def test_what_would_cost_more_is_left():
    """Three groups of kernels are more than two templates."""
    shared: Any = create_model("swrn-28-0.25-2", input_shape=SMALL)
    variables = shared.init(KEY, jnp.zeros((1, *SMALL)))
    folded = fold(shared, variables, groups={"stage1": (0, 1, 2, 0, 1, 2)}, banks=["stage2"], threshold=1)
    size = shared.layout["stage1"].sites[0].size
    assert folded.banks[0].note == f"left: 3 kernels would be {3 * size + 6} numbers"
    assert folded.shared == shared and not folded.changed


def plain(scheme) -> tuple:
    import flax.linen as nn

    model = nn.Sequential([nn.Dense(6) for _ in range(5)])
    shared = paramshare.share(model, Plan(Rule("layers_[0-4]/kernel", scheme, bank="all")), jnp.ones((1, 6)))
    return shared, shared.init(KEY, jnp.ones((1, 6)))


def test_a_dense_network_folds_by_its_kernels():
    """Converted to as many templates as layers its coefficients are orthogonal, however alike its kernels are."""
    shared, variables = plain(Soft(5))
    site = shared.layout["all"].sites
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(2, 6, 6))
    dense = tuple(jnp.asarray((1 + i) * (-1) ** i * kernels[i % 2], jnp.float32) for i in range(5))
    bank, coefficients = shared.layout["all"].scheme.from_dense(dense, site)
    its = {**variables, "banks": {"all": bank}, "params": {**variables["params"], "coefficients": {"all": coefficients}}}
    assert not fold(shared, its).changed
    folded = fold(shared, its, jnp.ones((2, 6)), by="kernels")
    assert folded.banks[0].groups == (0, 1, 0, 1, 0) and change(folded) < 1e-5
    np.testing.assert_allclose(folded.banks[0].scales, [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3], rtol=1e-5)  # of one sign in each group


@pytest.mark.parametrize(("scheme", "groups"), [(FilterBasis(3, 3), (0, 1, 0, 1, 0)), (Ring(size=100, mode="tile"), (0,) * 5)], ids=str)
def test_other_schemes_fold_by_their_kernels(scheme, groups):
    """Unique filters that repeat every second layer; and a ring read from slot 0 by all, which is one kernel."""
    shared, variables = plain(scheme)
    if "coefficients" in variables["params"]:
        unique = variables["params"]["coefficients"]["all"]["unique"]
        variables["params"]["coefficients"]["all"]["unique"] = unique[np.array(groups)]
    folded = fold(shared, variables, jnp.ones((2, 6)), threshold=1)
    assert folded.banks[0].groups == groups and change(folded) < 1e-6
    assert isinstance(folded.shared.layout["all"].scheme, Tied) and folded.saved > 0


@pytest.mark.parametrize("scale", [True, False])
def test_a_network_of_banks_alone_folds(scale):
    """Nothing private: there is no `params`, before or without scales after."""
    import flax.linen as nn

    model = nn.Sequential([nn.Dense(6, use_bias=False) for _ in range(3)])
    shared = paramshare.share(model, Plan(Rule(".*/kernel", Ring(100, mode="tile"), bank="all")), jnp.ones((1, 6)))
    variables = shared.init(KEY, jnp.ones((1, 6)))
    assert "params" not in variables
    folded = fold(shared, variables, jnp.ones((2, 6)), scale=scale)
    assert change(folded) < 1e-6 and ("params" in folded.variables) == scale
    fresh = jax.eval_shape(lambda: folded.shared.init(KEY, jnp.ones((1, 6))))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, folded.variables)


def test_layers_of_several_shapes_are_left():
    import flax.linen as nn

    model = nn.Sequential([nn.Dense(6), nn.Dense(6), nn.Dense(3)])
    shared = paramshare.share(model, Plan(Rule(".*/kernel", Ring(20), bank="ring")), jnp.ones((1, 6)))
    folded = fold(shared, shared.init(KEY, jnp.ones((1, 6))))
    assert folded.banks[0].note == "left: layers of several shapes"
    with pytest.raises(FoldError, match="bank 'ring' cannot be folded: layers of several shapes"):
        fold(shared, shared.init(KEY, jnp.ones((1, 6))), banks=["ring"])


def test_complete_linkage_ties_only_what_is_similar_pair_by_pair():
    """A chain a ~ b ~ c whose ends are not alike makes no group of three."""
    angle = np.radians([0, 20, 40, 90])
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    similarity = np.abs(rows @ rows.T)
    assert group(similarity, np.cos(np.radians(25))) in ((0, 0, 1, 2), (0, 1, 1, 2))
    assert group(similarity, np.cos(np.radians(45))) == (0, 0, 0, 1)
    assert group(similarity, 1) == (0, 1, 2, 3)
    assert group(np.ones((3, 3)), 1) == (0, 0, 0)


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ((0, 0, 0), 1),
        ((0, 1, 0, 1), 2),
        ((0, 1, 2, 0, 1), 3),
        ((0, 1, 1), None),
        ((0, 1, 2), None),
        ((0,), None),
        ((0, 1, 0), 2),
        ((0, 0, 1), None),
    ],
)
def test_period(groups, wanted):
    assert period(groups) == wanted


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan"), "0.9", None, True])
def test_thresholds_lie_above_0_and_up_to_1(threshold):
    shared, variables = plain(Soft(2))
    with pytest.raises(FoldError, match="above 0 and up to 1"):
        fold(shared, variables, threshold=threshold)


def test_bad_input_is_told():
    shared, variables = plain(Soft(2))
    with pytest.raises(ValueError, match="by='rows'; layers are compared by 'coefficients' or by 'kernels'"):
        fold(shared, variables, by="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by='rows'"):
        paramshare.similarity(shared, variables, by="rows")  # type: ignore[arg-type]
    with pytest.raises(FoldError, match=r"'stage1' matches no bank; the banks are \['all'\]"):
        fold(shared, variables, banks=["stage1"])
    with pytest.raises(FoldError, match="not a regular expression"):
        fold(shared, variables, banks=["("])
    import flax.linen as nn

    lonely = paramshare.share(nn.Dense(3), Plan(Rule("kernel", Soft(1), bank="one")), jnp.ones((1, 6)))
    its = lonely.init(KEY, jnp.ones((1, 6)))
    with pytest.raises(FoldError, match="bank 'one' cannot be folded: one layer"):
        fold(lonely, its, banks=["one"])
    assert fold(lonely, its).banks[0].note == "left: one layer"
    _, its = plain(Soft(3))
    with pytest.raises(PlanError, match="same plan"):
        fold(shared, its)
    with pytest.raises(PlanError, match="no entry for bank 'all'"):
        fold(shared, {"params": variables["params"]["model"]})


def test_signs_that_are_dropped_are_counted():
    """Layers with W and -W, without scales: half of them get a kernel that points the wrong way."""
    shared, variables = plain(Soft(2))
    rows = jnp.asarray([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
    its = {**variables, "params": {**variables["params"], "coefficients": {"all": rows}}}
    folded = fold(shared, its, threshold=1, scale=False)
    assert folded.banks[0].flipped == 2 and folded.banks[0].kernel_error == pytest.approx(2)
    assert "2 layers lose a negative sign: keep scales" in str(folded)
    assert fold(shared, its, threshold=1).banks[0].flipped == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"groups": [0, 1]}, "give a dictionary from names of banks"),
        ({"groups": {"all": None}}, "bank 'all' has None; give a group for each layer"),
        ({"groups": {"all": [[0], [1], [0], [1], [0]]}}, "give a group for each layer"),
        ({"scale": 1}, "scale=1; it is True"),
    ],
    ids=str,
)
def test_odd_arguments_are_told(options, said):
    shared, variables = plain(Soft(2))
    with pytest.raises(FoldError, match=said):
        fold(shared, variables, **options)


def test_numbers_that_are_not_finite_are_told():
    shared, variables = plain(Soft(2))
    rows = variables["params"]["coefficients"]["all"].at[1, 0].set(jnp.nan)
    with pytest.raises(FoldError, match="bank 'all' holds numbers that are not finite"):
        fold(shared, {**variables, "params": {**variables["params"], "coefficients": {"all": rows}}})
    with pytest.raises(FoldError, match="fold takes a Shared"):
        fold(shared.model, variables)  # type: ignore[arg-type]
    assert fold(shared, variables, threshold=np.float32(0.5)).threshold == 0.5  # type: ignore[arg-type]
