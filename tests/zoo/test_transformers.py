"""Named transformers: published sizes, what their blocks share, and that they compute the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paramshare
from paramshare import Shared
from paramshare.schemes import Relaxed, Ring, Soft, Tied
from paramshare.zoo import FAMILIES, input_of

NAMES = [
    name
    for family in FAMILIES
    if family.form.startswith(("vit", "decoder"))
    for name in family.examples
]
ATTENTION = [f"attention.{kernel}" for kernel in ("query", "key", "value", "out")]
MLPS = {"vit": ["mlp.up", "mlp.down"], "decoder": ["mlp.up", "mlp.gate", "mlp.down"]}


# timm's vit_small_patch16_224 and its like; a width of D has kernels of 12 D^2 in a block.
S, K = 22_050_664, 384**2
# An embedding and a head of 256 tokens, and norms; kernels of 4 D^2 + 3 * 352 D in a block.
D, A, M = 2 * 256 * 128 + 13 * 128, 4 * 128**2, 3 * 352 * 128
SIZES = {
    "vit-12-192-16": 5_717_416,
    "vit-12-384-16": S,
    "vit-12-768-16": 86_567_656,
    "vit-12-384-16-tied": S - 11 * 12 * K,
    "vit-12-384-16-cycle-3": S - 9 * 12 * K,
    "vit-12-384-16-soft-4": S - 8 * 4 * K + 4 * 12 * 4,
    "vit-12-384-16-softmlp-4": S - 8 * 8 * K + 2 * 12 * 4,
    "vit-12-384-16-softall-4": S - 8 * 12 * K + 6 * 12 * 4,
    "vit-12-384-16-rpg-100000": S - 12 * 12 * K + 100_000,
    "vit-12-384-16-relaxed-4": S - 11 * 12 * K + 12 * 4 * (4 * 2 * 384 + 2 * 5 * 384),
    "decoder-6-128": D + 6 * (A + M),
    "decoder-6-128-tied": D + A + M,
    "decoder-6-128-cycle-3": D + 3 * (A + M),
    "decoder-6-128-soft-4": D + 4 * A + 4 * 6 * 4 + 6 * M,
    "decoder-6-128-softmlp-4": D + 6 * A + 4 * M + 3 * 6 * 4,
    "decoder-6-128-softall-4": D + 4 * (A + M) + 7 * 6 * 4,
    "decoder-6-128-rpg-100000": D + 100_000,
    "decoder-6-128-relaxed-4": D + A + M + 6 * 4 * (4 * 2 * 128 + 3 * 480),
}


def test_every_name_is_in_the_table():
    assert set(NAMES) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    is_vit = name.startswith("vit")
    options: dict[str, Any] = {"class_token": True} if is_vit else {}
    model: Any = paramshare.create_model(name, scan=True, **options)  # quick to trace
    logits, variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False), input_of(name)
    )
    assert logits.shape == ((1, 1000) if is_vit else (1, 256, 256))
    assert paramshare.count(variables)["trainable"] == SIZES[name]
    assert isinstance(model, Shared) == (name.count("-") > (3 if is_vit else 2))


@pytest.mark.parametrize(
    ("kind", "depth", "scan"),
    [("vit-12-384-16", 12, True), ("decoder-6-128", 6, True), ("decoder-4-8", 4, False)],
)
def test_what_is_shared(kind, depth, scan):
    mlps = MLPS[kind.split("-")[0]]
    options: dict[str, Any] = {"class_token": True} if kind.startswith("vit") else {}

    def layout(way: str) -> Any:
        model: Any = paramshare.create_model(f"{kind}-{way}", scan=scan, **options)
        return model.layout

    for way, banks, scheme in (
        ("tied", ATTENTION + mlps, Tied()),
        ("cycle-2", ATTENTION + mlps, Tied(groups=(0, 1) * (depth // 2))),
        ("relaxed-2", ATTENTION + mlps, Relaxed(Tied(), 2)),
        ("soft-3", ATTENTION, Soft(3)),
        ("softmlp-3", mlps, Soft(3)),
        ("softall-3", ATTENTION + mlps, Soft(3)),
    ):
        found = layout(way)
        assert set(found) == set(banks)
        for bank in found.banks:
            part, kernel = bank.name.split(".")
            names = [f"blocks/{part}/{kernel}/kernel[{i}]" for i in range(depth)]
            names = (
                names if scan else [f"block{i}/{part}/{kernel}/kernel" for i in range(1, depth + 1)]
            )
            assert [str(site) for site in bank.sites] == names
            assert bank.scheme == scheme
    (ring,) = layout("rpg-500").banks
    sites = depth * len(ATTENTION + mlps)
    assert (ring.name, ring.scheme, len(ring.sites)) == ("ring", Ring(500), sites)


def test_decoding_of_a_shared_decoder():
    """With a cache, a shared decoder equals its dense form on the whole sequence."""
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 9)
    shared: Any = paramshare.create_model("decoder-2-4-soft-1", 9, (6,))
    variables = jax.jit(shared.init)(jax.random.key(0), tokens)
    whole = jax.jit(shared.model.apply)(shared.expand(variables), tokens)
    decode = jax.jit(lambda v, x: shared.apply(v, x, decode=True, mutable=["cache"]))
    parts, cache = [], {}
    for part in (tokens[:, :3], tokens[:, 3:]):
        logits, cache = decode(variables | dict(cache), part)
        parts.append(logits)
    assert int(cache["cache"]["model"]["position"]) == 6
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=2e-5, atol=2e-5)
