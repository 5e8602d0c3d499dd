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
# # Sharing a few templates across many layers
#
# A network with seven convolutions learns to read digits. Six of them own no kernel.
# Each mixes two shared templates with its own coefficients. After training we compare the
# coefficients to see which layers use the same kernel.
#
# Open this file in Jupyter (`pip install ".[train,notebooks]"`, then `jupyter lab`), or run it as
# a script. It takes about a minute.

# %%
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import paramshare

digits = load_digits()
images = jnp.asarray(digits.images[..., None], jnp.float32) / 16
labels = jnp.asarray(digits.target)
train_x, train_y, test_x, test_y = images[:1437], labels[:1437], images[1437:], labels[1437:]

fig, axes = plt.subplots(1, 10, figsize=(10, 1.2))
for axis, image in zip(axes, digits.images, strict=False):
    axis.imshow(image, cmap="gray_r")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## A plain Flax model
# The model knows nothing about sharing.


# %%
class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(32, (3, 3), name="stem")(x)
        for i in range(6):
            y = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"bn{i}")(x)
            x = x + nn.Conv(32, (3, 3), use_bias=False, name=f"conv{i}")(nn.relu(y))
        return nn.Dense(10, name="classifier")(nn.relu(x).mean((1, 2)))


# %% [markdown]
# ## A plan, and the same model shared
# The plan says which parameters come out of which bank. `share` resolves it against the model.

# %%
plan = paramshare.Plan(paramshare.Rule(r"conv\d/kernel", paramshare.Soft(templates=2)))
shared = paramshare.share(Net(), plan, train_x[:1])
print(shared.describe())

# %% [markdown]
# `shared` is an ordinary Flax module. Its trainable parameters are in two collections: `banks`,
# and `params`, which holds the mixing coefficients and the layers' private parameters.

# %%
variables = shared.init(jax.random.key(0), train_x[:1])
print(paramshare.count(variables))
jax.tree.map(
    jnp.shape, {"banks": variables["banks"], "coefficients": variables["params"]["coefficients"]}
)

# %% [markdown]
# ## Train it with optax

# %%
trained = {name: variables[name] for name in ("banks", "params")}
statistics = variables["batch_stats"]
optimizer = optax.adam(3e-3)
state = optimizer.init(trained)


@jax.jit
def step(trained, statistics, state, x, y):
    def loss_fn(trained):
        logits, new = shared.apply(
            {**trained, "batch_stats": statistics}, x, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]

    (loss, statistics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(trained, updates), statistics, state, loss


rng = np.random.default_rng(0)
losses, similarities = [], [paramshare.similarity(shared, trained)["shared"]]
for _ in range(1 if "NOTEBOOK_QUICK" in os.environ else 12):
    order = rng.permutation(len(train_x))
    for i in range(0, len(order) - 63, 64):
        batch = order[i : i + 64]
        trained, statistics, state, loss = step(
            trained, statistics, state, train_x[batch], train_y[batch]
        )
        losses.append(float(loss))
    similarities.append(paramshare.similarity(shared, trained)["shared"])

logits = shared.apply({**trained, "batch_stats": statistics}, test_x)
accuracy = float((logits.argmax(-1) == test_y).mean())
print(f"test accuracy {accuracy:.1%} on {len(test_y)} digits")

# %% [markdown]
# ## Which layers have become alike?
# An entry near 1 means that two layers use the same kernel up to a scale. If a pattern of layers
# repeats, the network has become recurrent. With two templates, off-diagonal entries average 0.58
# by chance before training. So compare the two maps instead of looking for bright entries.

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
left.semilogy(losses)
left.set(title="training loss", xlabel="step")
for axis, matrix, title in (
    (middle, similarities[0], "similarity before"),
    (right, similarities[-1], "similarity after"),
):
    image = axis.imshow(matrix, vmin=0, vmax=1)
    axis.set(title=title, xlabel="layer", ylabel="layer")
fig.colorbar(image, ax=right)
plt.show()

# %% [markdown]
# ## Back to a dense network
# `expand` computes all kernels. The plain model gives the same outputs with them.

# %%
dense = shared.expand({**trained, "batch_stats": statistics})
difference = jnp.abs(Net().apply(dense, test_x) - logits).max()
print(f"largest difference of outputs: {difference:.1e}")
assert difference < 1e-4 * jnp.abs(logits).max()

# %% [markdown]
# ## The same by name, from the command line
# `swrn-DEPTH-WIDTH-TEMPLATES` names a wide residual network with soft sharing. `paramshare train
# experiments/recipes/quickstart.py --workdir runs/quickstart` trains one with augmentation, a
# learning-rate schedule and checkpoints, on all devices.

# %%
print(paramshare.list_models("swrn-*"))
print(paramshare.create_model("swrn-28-10-2").describe().split("\n\n")[0])
