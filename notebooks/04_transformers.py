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
# # Share the blocks of a transformer
# The blocks of a transformer have the same shapes, and so they can share weights. Here we share a
# small decoder of text in six lines, train it, see which blocks came to agree, and convert a dense
# decoder into a *relaxed* recursive one: one block for all depths, plus a small difference of low
# rank for each (Bae et al., ICLR 2025, arXiv:2410.20672). This takes two minutes on two cores.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import paramshare
from paramshare.data import Text
from paramshare.models import sample

quick = "NOTEBOOK_QUICK" in os.environ  # for the tests
depth, width, steps = (3, 16, 3) if quick else (6, 96, 300)

# %% [markdown]
# ## The text
# Without a path, `Text` reads the descriptions of scikit-learn's data sets, forty thousand
# characters of English. Give it a file of your own: `Text(path="shakespeare.txt", length=64)`.

# %%
data = Text(length=64).load()
train, test = data.train, data.test
vocabulary = data.vocabulary
print(f"{len(train)} windows of 64 characters, {vocabulary.size} different characters")
print(vocabulary.decode(np.asarray(train.input[0])))

# %% [markdown]
# ## Share it
# `sites` shows which weights recur from block to block, and `Plan.blocks` gives each of them a
# bank. Embedding, norms and output layer stay private.

# %%
model = paramshare.create_model(f"decoder-{depth}-{width}", vocabulary.size, (64,), heads=4)
tokens = jnp.asarray(train.input[:1])
print(paramshare.sites(model, tokens))

# %%
scheme = paramshare.Soft(templates=2)
plan = paramshare.Plan.blocks(model, tokens, scheme=scheme, target_modules="all-linear")
shared = paramshare.share(model, plan, tokens)
start = jax.jit(shared.init)(jax.random.key(0), tokens)
print(shared.describe().split("\n\n")[0])

# %% [markdown]
# ## Train it
# In the loop that you already have. The plain decoder is trained beside it.


# %%
def train_it(network, variables, steps=steps, rate=3e-3):
    """Adam on random batches; returns the variables and the test loss in bits per character."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, max(steps, 1)))

    @jax.jit
    def step(variables, state, inputs, labels):
        def loss_fn(variables):
            logits = network.apply(variables, inputs, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        gradient = jax.grad(loss_fn)(variables)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state

    state, rng = optimizer.init(variables), np.random.default_rng(0)
    for _ in range(steps):
        batch = rng.integers(len(train), size=16)
        variables, state = step(variables, state, train.input[batch], train.label[batch])
    return variables, bits(network, variables)


def bits(network, variables):
    logits = jax.jit(network.apply)(variables, test.input)
    known = test.label >= 0  # the last window is filled up
    labels = np.where(known, test.label, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return float(losses[known].mean() / np.log(2))


dense, dense_bits = train_it(model, jax.jit(model.init)(jax.random.key(0), tokens))
trained, shared_bits = train_it(shared, start)
for name, variables, score in (("plain", dense, dense_bits), ("Soft(2)", trained, shared_bits)):
    count = paramshare.count(variables)["trainable"]
    print(f"{name:<8} {count:>9,} parameters, {score:.2f} bits per character")

# %% [markdown]
# ## Which blocks came to agree?
# Near 1, two blocks use the same kernel up to a scale; a dark square is a pair that could be folded
# into a loop.

# %%
matrices = paramshare.similarity(shared, trained)
fig, axes = plt.subplots(1, len(matrices), figsize=(2 * len(matrices), 2.4), layout="constrained")
for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
    image = axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    axis.set(title=name.split(".")[-2], xticks=[], yticks=[])
fig.colorbar(image, ax=axes, label="similarity of two blocks")
plt.show()

# %% [markdown]
# ## Convert the dense decoder
# `Tied()` alone averages the blocks, and the network forgets what it has learned. `Relaxed(Tied(),
# rank)` adds to each block the low-rank matrix that is nearest to what is missing. For comparison,
# soft sharing: its error falls only with whole templates. A third of the training repairs the
# damage. On so short a text all networks overfit, and smaller ones can end below the dense one.

# %%
schemes = {"Tied": paramshare.Tied(), "Soft(2)": scheme}
for rank in (2, 8) if quick else (4, 16, 48):
    schemes[f"Relaxed, rank {rank}"] = paramshare.Relaxed(paramshare.Tied(), rank)
print(f"{'':<18}{'parameters':>11}{'converted':>11}{'trained on':>12}   bits per character")
print(f"{'dense':<18}{paramshare.count(dense)['trainable']:>11,}{dense_bits:>11.2f}")
for name, other in schemes.items():
    plan = paramshare.Plan.blocks(model, tokens, scheme=other, target_modules="all-linear")
    network = paramshare.share(model, plan, tokens)
    converted = paramshare.convert(network, dense).variables
    _, after = train_it(network, converted, steps // 3, rate=1e-3)
    count = paramshare.count(converted)["trainable"]
    print(f"{name:<18}{count:>11,}{bits(network, converted):>11.2f}{after:>12.2f}")

# %% [markdown]
# ## Let it write
# With a cache of keys and values. So small a network, trained for a minute, gets words right and
# sentences wrong.

# %%
prompt = jnp.asarray(vocabulary.encode("The data set "))[None]
plain = paramshare.bake(shared, trained)  # kernels written out once, not for each character
drawn = sample(model, plain, prompt, 20 if quick else 200, jax.random.key(0), temperature=0.7)
print("The data set " + vocabulary.decode(np.asarray(drawn[0])))
