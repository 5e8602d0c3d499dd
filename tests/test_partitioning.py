"""Banks of partitioned models are divided over a device mesh as the model's parameters are."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding

import paramshare
from paramshare import FilterBasis, Plan, PlanError, Relaxed, Ring, Rule, Soft, Tied
from paramshare.partitioning import is_box

X = jnp.ones((8, 16))
LOGICAL = (("embed", "data"), ("mlp", "model"), ("bank", ("data", "model")))


class Net(nn.Module):
    """Four residual MLPs, fully sharded: with names of mesh axes, or logical ones."""

    logical: bool = False

    @nn.compact
    def __call__(self, x):
        names = ("embed", "mlp") if self.logical else ("data", "model")
        mark = nn.with_logical_partitioning if self.logical else nn.with_partitioning

        def dense(features, names, name):
            init = mark(nn.initializers.lecun_normal(), names)
            return nn.Dense(features, use_bias=False, kernel_init=init, name=name)

        for i in range(4):
            up = dense(64, names, f"block{i}_up")(x)
            x = x + dense(16, names[::-1], f"block{i}_down")(nn.relu(up))
        return x


def mesh(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]).reshape(count // 2, 2), ("data", "model"))


def plan(scheme: Any, **options: Any) -> Plan:
    up = Rule(".*up/kernel", scheme, "up", **options)
    if isinstance(scheme, FilterBasis):
        return Plan(Rule(".*down/kernel", scheme, "down", **options))
    return Plan(up, Rule(".*down/kernel", scheme, "down", **options))


def placed(model: nn.Module, devices: Mesh) -> tuple[Any, Any]:
    """Variables of a model drawn where its own partition specs say, and these specs."""
    specs = nn.get_partition_spec(jax.eval_shape(model.init, jax.random.key(0), X))
    if getattr(model, "logical", False):
        specs = nn.logical_to_mesh(specs, LOGICAL)  # pyright: ignore
    shardings = jax.tree.map(lambda spec: NamedSharding(devices, spec), specs)
    if isinstance(devices, AbstractMesh):
        return jax.eval_shape(model.init, jax.random.key(0), X), shardings
    return jax.jit(model.init, out_shardings=shardings)(jax.random.key(0), X), shardings


def bytes_a_device(model: nn.Module, devices: Any) -> int:
    """Of variables, by their shardings; where the mesh has devices, it is also measured."""
    variables, shardings = placed(model, devices)
    pairs = zip(jax.tree.leaves(variables), jax.tree.leaves(shardings), strict=True)
    size = 4 * sum(math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in pairs)
    if isinstance(devices, Mesh):
        assert {bytes_of(variables, device) for device in devices.devices.flat} == {size}
    return size


def bytes_of(variables: Any, device: Any) -> int:
    shards = [s for leaf in jax.tree.leaves(variables) for s in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


SCHEMES = [Soft(2), Tied(), FilterBasis(8, 8), Ring(1024), Relaxed(Tied(), 1)]


@pytest.mark.parametrize("logical", [False, True], ids=["mesh axes", "logical axes"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_device_holds_less_than_of_the_plain_model(scheme, logical):
    """Flat banks of logically named models need a logical name that stands for all mesh axes."""
    model, options = Net(logical), {"partition": "bank"} if logical else {}
    shared = paramshare.share(model, plan(scheme, **options), X)
    banks = 4 * sum(bank.trainable[0] for bank in shared.layout.banks)
    whole = 4 * paramshare.count(jax.eval_shape(shared.init, jax.random.key(0), X))["trainable"]
    with nn.logical_axis_rules(LOGICAL):
        for devices in (mesh(4), AbstractMesh((4, 2), ("data", "model"))):
            held = bytes_a_device(shared, devices)
            assert held < bytes_a_device(model, devices)
            assert held <= banks / devices.size + (whole - banks)


def test_names_of_logically_named_models():
    """Whole kernels have the model's; flat banks that of the longest axis."""
    for scheme, names in ((Tied(), (None, "embed", "mlp")), (Soft(2), (None, "mlp"))):
        shared = paramshare.share(Net(logical=True), plan(scheme), X)
        (box,) = jax.eval_shape(shared.init, jax.random.key(0), X)["banks"]["up"].values()
        assert isinstance(box, nn.LogicallyPartitioned) and box.names == names


@pytest.mark.parametrize("scheme", [Soft(2), Relaxed(Tied(), 2)], ids=str)
def test_training_gives_the_numbers_of_one_device(scheme):
    shared = paramshare.share(Net(), plan(scheme), X)
    optimizer = optax.adam(1e-2)

    def step(variables, state):
        loss, grads = jax.value_and_grad(lambda v: jnp.mean(shared.apply(v, X) ** 2))(variables)  # pyright: ignore
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(variables, updates), state, loss

    def losses(variables, shardings):
        state = optimizer.init(variables)
        out = []
        run = jax.jit(step, out_shardings=shardings and (shardings, None, None))
        for _ in range(3):
            variables, state, loss = run(variables, state)
            out.append(float(loss))
        return out, variables

    # optax's Adam counts steps in integers.
    with jax.numpy_dtype_promotion("standard"):
        check_numbers(shared, losses)


def check_numbers(shared: Any, losses: Any) -> None:
    one, _ = losses(shared.init(jax.random.key(0), X), None)
    devices = mesh(4)
    with jax.set_mesh(devices):
        variables, shardings = placed(shared, devices)
        several, trained = losses(variables, shardings)
    np.testing.assert_allclose(several, one, rtol=1e-5)
    assert one[2] < one[0]
    assert bytes_of(trained, jax.devices()[0]) == bytes_of(variables, jax.devices()[0])
    restored = nn.meta.unbox(jax.device_get(trained))  # what a checkpoint without boxes holds
    np.testing.assert_allclose(
        shared.apply(restored, X), shared.apply(jax.device_get(trained), X), rtol=1e-5
    )


def test_a_rule_may_override_and_unnamed_models_have_no_boxes():
    def boxes(plan: Plan, model: nn.Module) -> dict[str, Any]:
        shapes = jax.eval_shape(paramshare.share(model, plan, X).init, jax.random.key(0), X)
        return {name: box for name, box in shapes["banks"].items()}

    kinds = boxes(plan(Soft(2), partition="data"), Net())
    assert kinds["up"]["templates"].names == (None, "data")
    assert not isinstance(
        boxes(plan(Soft(2), partition=()), Net())["up"]["templates"], nn.Partitioned
    )
    assert boxes(plan(Soft(2)), Net())["up"]["templates"].names == (None, ("data", "model"))
    assert boxes(plan(Tied()), Net())["down"]["kernels"].names == (None, "model", "data")
    plain = nn.Sequential([nn.Dense(16), nn.Dense(16)])
    assert not isinstance(
        boxes(Plan(Rule(".*kernel", Soft(1))), plain)["shared"]["templates"], nn.Partitioned
    )
    with pytest.raises(PlanError, match=r"partition must be names of axes, got \(1,\)"):
        Rule(".*", Soft(1), partition=(1,))  # pyright: ignore


def test_scanned_layers_drop_the_name_of_the_stack():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
            layer = nn.scan(
                lambda mdl, x: (nn.Dense(16, kernel_init=init, name="dense")(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.meta.PARTITION_NAME: "layers"},
            )
            return layer(self, x)[0]

    rule = Rule(".*kernel", Tied(), stack_axis=0)
    layout = Plan(rule).resolve(Scanned(), X)
    (bank,) = layout.banks
    assert bank.partition is not None and bank.partition.names == ("data", "model")


def test_banks_of_an_nnx_module_are_divided_too():
    from flax import nnx

    import paramshare.nnx

    class Layers(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
            self.layers = nnx.List(
                [nnx.Linear(16, 16, kernel_init=init, rngs=rngs) for _ in range(4)]
            )

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.relu(layer(x))
            return x

    with jax.set_mesh(mesh(4)):
        plain = Layers(nnx.Rngs(0))
        for scheme in (Soft(2), Tied()):
            shared = paramshare.nnx.share(plain, Plan(Rule(".*kernel", scheme)))
            (bank,) = jax.tree.leaves(nnx.state(shared, paramshare.nnx.Bank))
            assert bank.size == 4 * bank.addressable_shards[0].data.size
            specs = nnx.get_partition_spec(nnx.state(shared, paramshare.nnx.Bank))
            assert "model" in str(specs)
            np.testing.assert_allclose(
                shared(X), paramshare.nnx.bake(shared)(X), rtol=1e-5, atol=1e-6
            )
            assert bytes_of(nnx.state(shared), jax.devices()[0]) < bytes_of(
                nnx.state(plain), jax.devices()[0]
            )


def test_boxes_may_be_taken_off():
    """Unboxed variables convert and fold to unboxed ones, boxed ones to boxed ones."""
    shared = paramshare.share(Net(), plan(Tied()), X)
    dense = Net().init(jax.random.key(0), X)
    loose = nn.meta.unbox(dense)
    for variables, boxed in ((dense, True), (loose, False)):
        converted = paramshare.convert(shared, variables, X)
        leaves = jax.tree.leaves(converted.variables, is_leaf=is_box)
        assert all(map(is_box, leaves)) == any(map(is_box, leaves)) == boxed
    drawn = nn.meta.unbox(shared.init(jax.random.key(0), X))
    assert jax.tree.structure(paramshare.fold(shared, drawn).variables) == jax.tree.structure(drawn)
    paramshare.convert(shared, paramshare.bake(shared, drawn), X)
