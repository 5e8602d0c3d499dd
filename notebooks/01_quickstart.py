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
# # Many layers on few parameters
#
# A network of seven convolutions learns to read digits. Six of them own no kernel: they mix two shared templates, each layer in
# its own proportions. After training we look at those proportions and ask which layers have become the same.
#
# Open this file as a notebook with `pip install ".[notebooks]"` and `jupyter lab`, or run it as a script. It takes about a minute.

# %%
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
# It knows nothing of sharing.


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
# The plan says which parameters come out of which bank. `share` resolves it against the model, before any array exists.

# %%
plan = paramshare.Plan(paramshare.Rule(r"conv\d/kernel", paramshare.Soft(templates=2)))
shared = paramshare.share(Net(), plan, train_x[:1])
print(shared.describe())

# %% [markdown]
# `shared` is an ordinary Flax module. What is trained lives in two collections: `banks`, and `params` with the mixing coefficients
# beside the layers' private parameters.

# %%
variables = shared.init(jax.random.key(0), train_x[:1])
print(paramshare.count(variables))
jax.tree.map(jnp.shape, {"banks": variables["banks"], "coefficients": variables["params"]["coefficients"]})

# %% [markdown]
# ## Train it, with nothing but optax

# %%
trained = {name: variables[name] for name in ("banks", "params")}
statistics = variables["batch_stats"]
optimizer = optax.adam(3e-3)
state = optimizer.init(trained)


@jax.jit
def step(trained, statistics, state, x, y):
    def loss_fn(trained):
        logits, new = shared.apply({**trained, "batch_stats": statistics}, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]

    (loss, statistics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(trained, updates), statistics, state, loss


rng = np.random.default_rng(0)
losses, similarities = [], [paramshare.similarity(shared, trained)["shared"]]
for _ in range(12):
    order = rng.permutation(len(train_x))
    for i in range(0, len(order) - 63, 64):
        batch = order[i : i + 64]
        trained, statistics, state, loss = step(trained, statistics, state, train_x[batch], train_y[batch])
        losses.append(float(loss))
    similarities.append(paramshare.similarity(shared, trained)["shared"])

logits = shared.apply({**trained, "batch_stats": statistics}, test_x)
accuracy = float((logits.argmax(-1) == test_y).mean())
print(f"test accuracy {accuracy:.1%} on {len(test_y)} digits")

# %% [markdown]
# ## Which layers have become alike?
# An entry near 1: two layers use the same kernel, up to a scale. Where whole patterns repeat, the network has become recurrent.
# Two templates leave six layers little room: before training, entries off the diagonal are 0.58 in the mean, by chance. So look at
# what has changed, not at what is bright.

# %%
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
left.semilogy(losses)
left.set(title="training loss", xlabel="step")
for axis, matrix, title in ((middle, similarities[0], "similarity before"), (right, similarities[-1], "similarity after")):
    shown = axis.imshow(matrix, vmin=0, vmax=1)
    axis.set(title=title, xlabel="layer", ylabel="layer")
fig.colorbar(shown, ax=right)
plt.show()

# %% [markdown]
# ## Back to a dense network
# `expand` writes the kernels out: variables for the plain model, with the same outputs.

# %%
dense = shared.expand({**trained, "batch_stats": statistics})
difference = jnp.abs(Net().apply(dense, test_x) - logits).max()
print(f"largest difference of outputs: {difference:.1e}")
assert difference < 1e-4 * jnp.abs(logits).max()

# %% [markdown]
# ## The same, by name and by command
# Wide residual networks with soft sharing go by `swrn-depth-width-templates`;
# `paramshare train experiments/quickstart.py --workdir runs/quickstart`
# trains one with augmentation, schedules, checkpoints and several devices.

# %%
print(paramshare.list_models("swrn-*"))
print(paramshare.create_model("swrn-28-10-2").describe().split("\n\n")[0])
