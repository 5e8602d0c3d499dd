"""Folding: networks made recurrent by hand fold exactly, others as far as they are similar."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import (
    FilterBasis,
    FoldError,
    Plan,
    PlanError,
    Ring,
    Rule,
    Shared,
    Soft,
    Tied,
    create_model,
    fold,
)
from paramshare.transform.folding import Folded
from paramshare.transform.grouping import group
from paramshare.transform.looped import period

KEY = jax.random.key(0, impl="rbg")  # compiles faster than the default
IMAGES = np.random.default_rng(0).normal(size=(4, 5, 5, 3)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(2, 6)).astype(np.float32)
ALTERNATING = (0, 1, 0, 1, 0, 1)


class Net(nn.Module):
    """Three stages of six convolutions with batch norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="stem")(x)
        for stage in (1, 2, 3):
            for i in range(6):
                x = nn.Conv(4, (3, 3), use_bias=False, name=f"stage{stage}_conv{i}")(x)
                x = nn.relu(nn.BatchNorm(True, name=f"stage{stage}_bn{i}")(x))
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


@functools.cache
def soft() -> tuple[Shared, Any]:
    rule = Rule(r"(?P<stage>stage\d)_conv\d/kernel", Soft(4, initial="paper"), bank="{stage}")
    shared = paramshare.share(Net(), Plan(rule), IMAGES)
    return shared, jax.jit(shared.init)(KEY, IMAGES)


def with_rows(shared: Shared, variables: Any, rows: dict[str, Any]) -> Any:
    """The variables with other mixing coefficients, (L, k), in some banks."""
    coefficients = dict(variables["params"]["coefficients"])
    for name, rows_LxK in rows.items():
        sites = shared.layout[name].sites
        coefficients[name] = {
            site.key: jnp.asarray(row, jnp.float32)
            for site, row in zip(sites, rows_LxK, strict=True)
        }
    return {**variables, "params": {**variables["params"], "coefficients": coefficients}}


def rows_of(shared: Shared, variables: Any, name: str) -> np.ndarray:
    sites = shared.layout[name].sites
    return np.stack([variables["params"]["coefficients"][name][site.key] for site in sites])


def recurrent(*stages: str, scales: bool = True):
    """Coefficients in some stages repeat with period 2, up to random signed scales."""
    (shared, variables), rng, rows = soft(), np.random.default_rng(0), {}
    for name in stages:
        scales_L = rng.uniform(0.5, 2, 6) * rng.choice([-1, 1], 6) if scales else np.ones(6)
        two_rows = rows_of(shared, variables, name)[:2]
        rows[name] = scales_L[:, None] * two_rows[list(ALTERNATING)]
    return shared, with_rows(shared, variables, rows)


def change(folded: Folded) -> float:
    assert folded.output_change is not None
    return folded.output_change


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize("threshold", [0.9, 1.0])
def test_a_recurrent_network_folds_exactly(threshold):
    shared, variables = recurrent("stage2", "stage3")
    folded = fold(shared, variables, IMAGES, threshold=threshold)
    assert [bank.period for bank in folded.banks] == [None, 2, 2]
    assert [bank.groups for bank in folded.banks[1:]] == [ALTERNATING] * 2
    assert change(folded) < 1e-5
    for bank in folded.banks[1:]:
        assert bank.kernel_error < 1e-6  # float32
        for scales in (bank.scales[::2], bank.scales[1::2]):
            assert np.mean(np.abs(scales)) == pytest.approx(1)
    assert folded.banks[0].note == "not folded: no two layers are similar"
    assert folded.shared.layout["stage1"] == shared.layout["stage1"]
    # The folded network is an ordinary one: `init` gives variables of the same structure.
    reference = jax.eval_shape(lambda: folded.shared.init(KEY, jnp.zeros(IMAGES.shape)))
    assert shapes(reference) == shapes(folded.variables)
    trainable = paramshare.count(folded.variables)["trainable"]
    assert trainable == folded.shared.layout.trainable == shared.layout.trainable - folded.saved


def test_counts_of_the_papers_network():
    """Two kernels and six signed scales replace four templates and six rows of four."""
    shared: Any = create_model("swrn-28-10-4")
    assert shared.layout.trainable == 26_802_466
    for stages, scaled, trainable in (
        (("stage2",), True, 24_959_248),
        (("stage2",), False, 24_959_242),
        (("stage2", "stage3"), True, 17_586_430),
        (("stage2", "stage3"), False, 17_586_418),
    ):
        scheme = Tied(groups=ALTERNATING, scaled=scaled, initial="paper")
        folded = shared.layout.with_schemes(dict.fromkeys(stages, scheme))
        assert folded.trainable == trainable


def test_without_scales_a_kernel_has_its_groups_mean_length():
    shared, variables = recurrent("stage2")
    folded = fold(shared, variables, scale=False)
    assert "stage2" not in folded.variables["params"]["coefficients"]
    bank = shared.layout["stage2"]
    before = bank.scheme.expand(shared.layout.weights(variables)["stage2"], bank.sites)
    lengths = [np.linalg.norm(kernel) for kernel in before]
    (kernels_GxP,) = jax.tree.leaves(folded.variables["banks"]["stage2"])
    for number, kernel in enumerate(kernels_GxP):
        assert np.linalg.norm(kernel) == pytest.approx(np.mean(lengths[number::2]), rel=1e-5)


def test_equal_layers_without_scales_fold_exactly():
    folded = fold(*recurrent("stage2", scales=False), IMAGES, scale=False, threshold=1)
    assert folded.banks[1].period == 2 and change(folded) < 1e-5


def test_a_groups_kernel_is_its_leading_singular_vector():
    """Noisy rows: no other group kernel and scales have a smaller squared error."""
    shared, variables = recurrent("stage2")
    rows = rows_of(shared, variables, "stage2")
    noisy = rows + 0.05 * np.random.default_rng(2).normal(size=rows.shape)
    variables = with_rows(shared, variables, {"stage2": noisy})
    # Orthonormal templates: errors of kernels are errors of rows.
    orthonormal = lambda t_KxP: jnp.asarray(np.linalg.qr(np.asarray(t_KxP).T)[0].T)  # noqa: E731
    banks = variables["banks"]
    banks = {**banks, "stage2": jax.tree.map(orthonormal, banks["stage2"])}
    variables = {**variables, "banks": banks}
    folded = fold(shared, variables, banks=["stage2"], threshold=0.5)
    assert folded.banks[1].groups == ALTERNATING
    before = shared.expand(variables)["params"]
    after = folded.shared.expand(folded.variables)["params"]
    names = [f"stage2_conv{i}" for i in range(6)]
    error = sum(np.sum((before[x]["kernel"] - after[x]["kernel"]) ** 2) for x in names)
    tails = [np.sum(np.linalg.svd(noisy[g::2], compute_uv=False)[1:] ** 2) for g in (0, 1)]
    assert error == pytest.approx(sum(tails), rel=1e-4)


def test_one_template_makes_all_layers_equal():
    folded = fold(*dense_layers(Soft(1, initial="paper")), X, threshold=1)
    assert [(x.groups, x.period, x.note) for x in folded.banks] == [((0,) * 5, 1, "")]
    assert folded.saved == 0  # one template and five coefficients are one kernel and five scales
    assert change(folded) < 1e-6


def test_folding_twice_changes_nothing():
    shared, variables = recurrent("stage2")
    once = fold(shared, variables, banks=["stage2"])
    twice = fold(once.shared, once.variables, IMAGES)
    assert not twice.changed and twice.saved == 0 and twice.output_change == 0
    different = "not folded: no two layers are similar"
    assert [bank.note for bank in twice.banks] == [different, "already folded", different]
    assert "already folded" in str(twice)
    assert twice.shared == once.shared
    jax.tree.map(np.testing.assert_array_equal, twice.variables, once.variables)
    # Scales can still be dropped.
    dropped = fold(once.shared, once.variables, scale=False, banks=["stage2"])
    assert dropped.saved == 6


def test_given_groups():
    folded = fold(*soft(), groups={"stage3": (7, 5, 7, 5, 7, 5)}, banks=["stage1"])
    notes = [bank.note for bank in folded.banks]
    assert notes == ["not folded: no two layers are similar", "not selected", ""]
    assert folded.banks[2].groups == ALTERNATING and folded.banks[2].kernel_error > 0.1


def test_a_bank_is_not_folded_where_that_needs_more_parameters():
    """Three kernels are more than two templates."""
    shared, variables = dense_layers(Soft(2, initial="paper"))
    folded = fold(shared, variables, groups={"all": (0, 1, 2, 0, 1)})
    assert folded.banks[0].note == (
        f"not folded: 3 kernels would need {3 * 36 + 5} parameters, more than the {2 * 36 + 10} now"
    )
    assert folded.shared == shared and not folded.changed


@functools.cache
def dense_layers(
    scheme: Any, layers: int = 5, use_bias: bool = True
) -> tuple[Shared, dict[str, Any]]:
    model = nn.Sequential([nn.Dense(6, use_bias=use_bias) for _ in range(layers)])
    shared = paramshare.share(model, Plan(Rule(".*/kernel", scheme, bank="all")), X)
    return shared, dict(jax.jit(shared.init)(KEY, X))


def test_layers_that_are_not_called_in_the_order_of_their_names():
    """`Tied` numbers groups by path; the report lists layers as the model calls them."""

    class Called(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in "dbacf":
                x = nn.Dense(6, use_bias=False, name=name)(x)
            return x

    shared = paramshare.share(Called(), Plan(Rule(".*/kernel", Soft(2), bank="all")), X)
    variables: Any = dict(jax.jit(shared.init)(KEY, X))
    rows = {"d": (1.0, 0.0), "b": (0.0, 1.0), "a": (0.0, 2.0), "c": (-3.0, 0.0), "f": (0.0, 1.0)}
    coefficients = {f"{name}.kernel": jnp.array(row) for name, row in rows.items()}
    variables["params"] = {"coefficients": {"all": coefficients}}
    folded = fold(shared, variables, X)
    assert folded.banks[0].groups == (0, 1, 1, 0, 1) and change(folded) < 1e-5
    scheme: Any = folded.shared.layout["all"].scheme
    assert scheme.groups == (0, 0, 1, 1, 0)  # of a, b, c, d, f
    assert fold(folded.shared, folded.variables, by="weights").banks[0].note == "already folded"


def test_a_dense_network_folds_by_its_weights():
    """With as many templates as layers coefficients are orthogonal, however similar kernels are."""
    shared, variables = dense_layers(Soft(5))
    bank = shared.layout["all"]
    kernels = np.random.default_rng(0).normal(size=(2, 6, 6))
    dense = tuple(jnp.asarray((1 + i) * (-1) ** i * kernels[i % 2], jnp.float32) for i in range(5))
    weights = bank.scheme.from_dense(dense, bank.sites)
    params = {**variables["params"], "coefficients": {"all": weights.coefficients}}
    variables = {**variables, "banks": {"all": weights.bank}, "params": params}
    assert not fold(shared, variables).changed
    folded = fold(shared, variables, X, by="weights")
    assert folded.banks[0].groups == (0, 1, 0, 1, 0) and change(folded) < 1e-5
    # It still starts like the model's own initializer.
    reference = jax.eval_shape(lambda: folded.shared.init(KEY, X))
    assert shapes(reference) == shapes(folded.variables)
    assert folded.shared.layout["all"].scheme.measures_initializer
    # The two kernels have opposite signs, so that each group's scales have one sign.
    np.testing.assert_allclose(folded.banks[0].scales, [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3], rtol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "groups"),
    [
        (FilterBasis(3, 3, initial="paper"), (0, 1, 0, 1, 0)),
        (Ring(100, mode="tile", initial="paper"), (0,) * 5),
    ],
    ids=str,
)
def test_other_schemes_fold_by_their_weights(scheme, groups):
    """Unique filters that alternate; and a ring that all layers read from slot 0."""
    shared, variables = dense_layers(scheme)
    if "own" in variables["params"]:
        sites, own = shared.layout["all"].sites, variables["params"]["own"]["all"]
        own = {site.key: own[sites[g].key] for site, g in zip(sites, groups, strict=True)}
        variables = {**variables, "params": {**variables["params"], "own": {"all": own}}}
    folded = fold(shared, variables, X, threshold=1)
    assert folded.banks[0].groups == groups and change(folded) < 1e-6
    assert isinstance(folded.shared.layout["all"].scheme, Tied) and folded.saved > 0
    assert "own" not in folded.variables["params"]


@pytest.mark.parametrize("scale", [True, False])
def test_a_network_of_banks_alone_folds(scale):
    """Without private parameters there is no `params` before, nor after without scales."""
    shared, variables = dense_layers(
        Ring(100, mode="tile", initial="paper"), layers=3, use_bias=False
    )
    assert "params" not in variables
    folded = fold(shared, variables, X, scale=scale)
    assert change(folded) < 1e-6 and ("params" in folded.variables) == scale
    reference = jax.eval_shape(lambda: folded.shared.init(KEY, X))
    assert shapes(reference) == shapes(folded.variables)


def test_layers_of_several_shapes_are_not_folded():
    model = nn.Sequential([nn.Dense(6), nn.Dense(6), nn.Dense(3)])
    shared = paramshare.share(
        model, Plan(Rule(".*/kernel", Ring(20, initial="paper"), bank="ring")), X
    )
    variables = jax.jit(shared.init)(KEY, X)
    assert fold(shared, variables).banks[0].note == "not folded: layers of several shapes"
    with pytest.raises(FoldError, match="'ring' cannot be folded: layers of several shapes"):
        fold(shared, variables, banks=["ring"])


def test_one_layer_is_not_folded():
    shared = paramshare.share(
        nn.Dense(3), Plan(Rule("kernel", Soft(1, initial="paper"), bank="one")), X
    )
    variables = jax.jit(shared.init)(KEY, X)
    assert fold(shared, variables).banks[0].note == "not folded: one layer"
    with pytest.raises(FoldError, match="bank 'one' cannot be folded: one layer"):
        fold(shared, variables, banks=["one"])


def test_complete_linkage_ties_only_what_is_similar_pair_by_pair():
    """A chain a ~ b ~ c whose ends are not similar makes no group of three."""
    angle = np.radians([0, 20, 40, 90])
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    similarity = np.abs(rows @ rows.T)
    assert group(similarity, np.cos(np.radians(25))) in ((0, 0, 1, 2), (0, 1, 1, 2))
    assert group(similarity, np.cos(np.radians(45))) == (0, 0, 0, 1)
    assert group(similarity, 1) == (0, 1, 2, 3)
    assert group(np.ones((3, 3)), 1) == (0, 0, 0)


@pytest.mark.parametrize(
    ("groups", "expected"),
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
def test_period(groups, expected):
    assert period(groups) == expected


def test_lost_signs_are_counted():
    """Layers with W and -W, without scales: some get a kernel of the opposite sign."""
    shared, variables = dense_layers(Soft(2, initial="paper"))
    rows = [[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]]
    variables = with_rows(shared, variables, {"all": rows})
    folded = fold(shared, variables, threshold=1, scale=False)
    assert folded.banks[0].flipped == 2 and folded.banks[0].kernel_error == pytest.approx(2)
    assert "2 negative scales were dropped; keep scales" in str(folded)
    assert fold(shared, variables, threshold=1).banks[0].flipped == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *(
            ({"threshold": threshold}, FoldError, r"threshold=.* in \(0, 1\]")
            for threshold in (0, -0.1, 1.01, float("nan"), "0.9", None, True)
        ),
        ({"by": "rows"}, ValueError, "by='rows': must be 'coefficients' or 'weights'"),
        ({"banks": ["stage1"]}, FoldError, r"'stage1' matches no bank; the banks are \['all'\]"),
        ({"banks": ["("]}, FoldError, "not a regular expression"),
        ({"groups": [0, 1]}, FoldError, "must be a dictionary"),
        ({"groups": {"none": (0, 1)}}, FoldError, "no bank 'none'; the banks are"),
        ({"groups": {"all": None}}, FoldError, "bank 'all' got None; give one group per layer"),
        ({"groups": {"all": [[0], [1], [0], [1], [0]]}}, FoldError, "give one group per layer"),
        ({"groups": {"all": (0, 1)}}, FoldError, r"5 layers, but \(0, 1\) has 2 groups"),
        ({"scale": 1}, FoldError, "scale=1: must be True"),
    ],
    ids=str,
)
def test_illegal_arguments(options, error, message):
    with pytest.raises(error, match=message):
        fold(*dense_layers(Soft(2, initial="paper")), **options)


def test_numpy_thresholds_are_legal():
    folded = fold(*dense_layers(Soft(2, initial="paper")), threshold=np.float32(0.5))  # type: ignore[arg-type]
    assert folded.threshold == 0.5


def test_variables_that_do_not_fit():
    shared, variables = dense_layers(Soft(2, initial="paper"))
    with pytest.raises(PlanError, match="all"):
        fold(shared, dense_layers(Soft(3, initial="paper"))[1])
    with pytest.raises(PlanError, match="'all'"):
        fold(shared, {"params": variables["params"]["model"]})
    with pytest.raises(FoldError, match="fold takes a Shared"):
        fold(shared.model, variables)  # type: ignore[arg-type]
    rows = rows_of(shared, variables, "all").copy()
    rows[1, 0] = np.nan
    with pytest.raises(FoldError, match="bank 'all' has weights that are not finite"):
        fold(shared, with_rows(shared, variables, {"all": rows}))
