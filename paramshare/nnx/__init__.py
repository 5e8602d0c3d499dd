"""Parameter sharing for NNX modules, with the plans, schemes and layouts of `paramshare`.

>>> import jax, jax.numpy as jnp, optax, paramshare, paramshare.nnx
>>> from flax import nnx
>>> class MLP(nnx.Module):
...     def __init__(self, rngs):
...         self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(6)])
...     def __call__(self, x):
...         for layer in self.layers:
...             x = x + nnx.relu(layer(x))
...         return x

Six kernels come from two templates; biases stay private:

>>> plan = paramshare.Plan(paramshare.Rule(r"layers/\\d/kernel", paramshare.Soft(templates=2)))
>>> shared = paramshare.nnx.share(MLP(nnx.Rngs(0)), plan)
>>> paramshare.nnx.count(shared)
{'banks': 512, 'coefficients': 12, 'private': 96, 'trainable': 620}

It trains as any module does:

>>> decayed = paramshare.nnx.decay_mask(shared)  # everything but coefficients
>>> optimizer = nnx.Optimizer(shared, optax.adamw(1e-2, mask=decayed), wrt=nnx.Param)
>>> @nnx.jit
... def step(model, optimizer, x):
...     loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
...     optimizer.update(model, grads)
...     return loss
>>> x = jax.random.normal(jax.random.key(1), (8, 16))
>>> losses = [step(shared, optimizer, x) for _ in range(20)]
>>> bool(losses[-1] < 0.5 * losses[0])
True

Which layers came to agree, and the plain module with its weights written out:

>>> paramshare.nnx.similarity(shared)["shared"].shape
(6, 6)
>>> plain = paramshare.nnx.bake(shared)
>>> bool(jnp.allclose(plain(x), shared(x), atol=1e-5))
True
"""

from paramshare.nnx.shared import Bank, Coefficient, Own, Shared, share
from paramshare.nnx.transforms import (
    bake,
    convert,
    count,
    decay_mask,
    fold,
    orthogonality,
    recurrence,
    similarity,
)

__all__ = [
    "Bank",
    "Coefficient",
    "Own",
    "Shared",
    "bake",
    "convert",
    "count",
    "decay_mask",
    "fold",
    "orthogonality",
    "recurrence",
    "share",
    "similarity",
]
