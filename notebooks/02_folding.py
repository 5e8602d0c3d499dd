# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Folding: from soft sharing to a real loop
# With soft sharing, every layer mixes its kernel from shared templates. If two layers mix them
# alike, they are one layer used twice: the network has become recurrent. Here we train a network
# twice, without and with a penalty that encourages recurrence. Then we tie the similar layers and
# run them as a real loop. This takes two minutes on two cores.
#
# The idea is from Savarese & Maire (ICLR 2019, arXiv:1902.09701). How layers are grouped and
# folded is this library's own choice.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import paramshare

digits = load_digits()
x = (digits.images[..., None].astype(np.float32) - 4.9) / 6.0
train_x, train_y, test_x, test_y = x[:1440], digits.target[:1440], x[1440:], digits.target[1440:]
if quick := "NOTEBOOK_QUICK" in os.environ:  # for the tests
    train_x, train_y, test_x, test_y = train_x[:30], train_y[:30], test_x[:30], test_y[:30]

# %% [markdown]
# ## A network with as many templates as layers
# `swrn-28-0.5-6` has three stages. In each, six convolutions share six templates, so nothing
# forces two layers to use the same kernel.

# %%
name = "swrn-22-0.5-1" if quick else "swrn-28-0.5-6"
shared = paramshare.create_model(name, input_shape=(8, 8, 1))
start = jax.jit(shared.init)(jax.random.key(0), train_x[:1])
print(shared.describe().split("\n\n")[0])

# %% [markdown]
# ## Train it twice
# The penalty `recurrence` is small if all layers of a bank are similar. Its weight is the only
# difference between the two runs.

# %%
optimizer = optax.adam(1e-2)


@jax.jit
def step(trained, statistics, state, weight, images, labels):
    def loss_fn(trained):
        variables = {**trained, "batch_stats": statistics}
        logits, new = shared.apply(variables, images, train=True, mutable=["batch_stats"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss + weight * paramshare.recurrence(shared, trained), new["batch_stats"]

    gradient, statistics = jax.grad(loss_fn, has_aux=True)(trained)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(trained, updates), statistics, state


def train(weight, epochs=10):
    trained, statistics = {name: start[name] for name in ("banks", "params")}, start["batch_stats"]
    state, rng, snapshots = (
        optimizer.init(trained),
        np.random.default_rng(0),
        [paramshare.similarity(shared, start)],
    )
    for _ in range(epochs):
        order = rng.permutation(len(train_x))
        for i in range(0, len(order), 60):
            batch = order[i : i + 60]
            trained, statistics, state = step(
                trained, statistics, state, weight, train_x[batch], train_y[batch]
            )
        snapshots.append(paramshare.similarity(shared, trained))
    return {**trained, "batch_stats": statistics}, snapshots


def accuracy(model, variables):
    return float((jax.jit(model.apply)(variables, test_x).argmax(-1) == test_y).mean())


runs = {"left alone": train(0.0), "encouraged": train(0.1)}
for name, (variables, _) in runs.items():
    print(f"{name}: test accuracy {accuracy(shared, variables):.1%}")

# %% [markdown]
# ## Watch the layers become alike
# Stage 2 after epochs 0, 1, 3, 6 and 10. A bright off-diagonal entry means that two layers use one
# kernel, up to a signed scale.

# %%
fig, axes = plt.subplots(2, 5, figsize=(13, 5.4), layout="constrained")
for row, (name, (_, snapshots)) in zip(axes, runs.items(), strict=True):
    for axis, epoch in zip(row, (0, 1, 3, 6, 10), strict=True):
        image = axis.imshow(snapshots[epoch]["stage2"], vmin=0, vmax=1)
        axis.set(title=f"{name}, epoch {epoch}", xticks=[], yticks=[])
fig.colorbar(image, ax=axes, label="|cosine| of coefficients")
plt.show()

# %% [markdown]
# ## Fold
# Layers with a similarity of at least 0.9 get one kernel, and each keeps a signed scale. The
# report lists the banks that stay as they are.

# %%
for name, (variables, _) in runs.items():
    folded = paramshare.fold(shared, variables, test_x, threshold=0.9, train=False)
    print(f"{name}\n{folded}")
    before, after = accuracy(shared, variables), accuracy(folded.shared, folded.variables)
    print(f"test accuracy  {before:.1%} before, {after:.1%} after\n")

# %% [markdown]
# ## A real loop
# `loop` turns the folded network into a plain Flax model whose stages are loops. It stores each
# kernel once, and batch norms once per iteration. On a CPU, loops are unrolled by default, since a
# compiled loop over convolutions trains slowly there. With `unroll=False` the program has a
# `while`.

# %%
looped = paramshare.loop(folded.shared, folded.variables, unroll=False)
print(looped)
before, after = (
    paramshare.count(variables)["trainable"]
    for variables in (runs["encouraged"][0], looped.variables)
)
print(f"{after:,} trainable parameters, {before:,} before")
program = jax.jit(looped.model.apply).lower(looped.variables, test_x).compile().as_text()
print(f"the program has {program.count(' while(')} loops")
outputs, expected = (
    jax.jit(model.apply)(variables, test_x)
    for model, variables in (
        (looped.model, looped.variables),
        (folded.shared, folded.variables),
    )
)
difference = jnp.abs(outputs - expected).max()
print(f"largest difference of outputs from the folded network's: {difference:.1e}")

# %% [markdown]
# ## The same from the command line
# ```
# paramshare train experiments/recipes/quickstart.py --workdir runs/loop \
#     --model.name swrn-28-1-6 --penalty.recurrence 0.1
# paramshare similarity runs/loop
# paramshare fold runs/loop --threshold 0.9 --output runs/folded --fine-tune 1
# paramshare export runs/folded --form looped --output folded-program
# ```
