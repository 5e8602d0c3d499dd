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
# # Rotation equivariance is parameter sharing
# A convolution that is equivariant to rotations is an ordinary convolution whose kernels are made
# from few numbers through fixed templates. So it is a sharing scheme, `Steerable`, over a plain
# network. Here we look at its templates, turn an image and watch the features turn, and compare it
# with *learnable repetition*, which has as many parameters and knows nothing of rotations. This
# takes six minutes on two cores.
#
# Templates: Weiler & Cesa (NeurIPS 2019, arXiv:1911.08251). Networks and the question how much of
# the gain is repetition: Chavan et al. (ICIP 2021, arXiv:2101.05650).

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import paramshare
from paramshare.data import RotatedDigits
from paramshare.schemes.harmonics import harmonics
from paramshare.tasks.augment import turn

quick = "NOTEBOOK_QUICK" in os.environ  # for the tests

# %% [markdown]
# ## The templates
# A 5x5 kernel of the group C4 (quarter turns) is a mixture of eleven fixed functions: circular
# harmonics on rings of radius 0, 1 and 2. For each of the four rotations of an output field the
# functions are turned, and the learned coefficients stay the same.

# %%
basis = harmonics(5, order=4, frequencies=(0, 2, 2))
figure, axes = plt.subplots(4, 11, figsize=(11, 4))
for step in range(4):
    for function in range(11):
        axes[step, function].imshow(basis[step, :, :, function], cmap="RdBu", vmin=-1, vmax=1)
        axes[step, function].set_axis_off()
figure.suptitle("The functions of a 5x5 kernel (columns), turned by 0, 90, 180 and 270 degrees")
plt.show()

# %% [markdown]
# ## Turn the image, and the features turn
# `rotnet-c4` is a plain network of six convolutions whose kernels come from `Steerable`. Its
# channels come in fields of four, one channel for each rotation. Images of 28x28 have feature maps
# of even size throughout, so that its max-pools are exact, and the outputs for a turned image are
# the same.

# %%
equivariant = paramshare.create_model("rotnet-c4", input_shape=(28, 28, 1))
noise = jax.random.normal(jax.random.key(0), (1, 28, 28, 1))
variables = jax.jit(equivariant.init)(jax.random.key(1), noise)
outputs = jax.jit(equivariant.apply)
upright, turned = outputs(variables, noise), outputs(variables, jnp.rot90(noise, axes=(1, 2)))
print("largest output", float(jnp.abs(upright).max()))
print("largest difference for the turned image", float(jnp.abs(upright - turned).max()))
print(equivariant.describe().split("\n\n")[0])

# %% [markdown]
# ## Rotated digits
# Digits of scikit-learn, turned by any angle. Training images are turned anew in every epoch.

# %%
sizes = {"examples": 16, "tests": 8} if quick else {"examples": 1000, "tests": 1000}
data = RotatedDigits(**sizes, validation=0.0, size=28).load()
train_x, train_y = (jnp.asarray(x) for x in (data.train.input, data.train.label))
test_x, test_y = (jnp.asarray(x) for x in (data.test.input, data.test.label))
figure, axes = plt.subplots(1, 8, figsize=(10, 1.5))
for axis, image, label in zip(axes, data.train.input, data.train.label, strict=False):
    axis.imshow(image[..., 0], cmap="gray")
    axis.set_title(int(label))
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## Train three networks
# The plain baseline, the equivariant network, and `rotnet-c4-repeat`, which is as wide as the
# equivariant one and repeats the baseline's kernels with two learned scalars per copy.

# %%
rounds, batch = (1, 8) if quick else (12, 50)


def train(name: str):
    """A trained network, its variables, and its parameter count."""
    model = paramshare.create_model(name, input_shape=(28, 28, 1))
    variables = jax.jit(model.init)(jax.random.key(0), data.normalise(test_x[:1]))
    statistics = {"batch_stats": variables["batch_stats"]}
    weights = {key: value for key, value in variables.items() if key != "batch_stats"}
    steps = rounds * len(train_x) // batch
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, statistics, state, key, places):
        angle = jax.random.uniform(key, (batch,), minval=-180.0, maxval=180.0)
        images = data.normalise(turn(train_x[places], angle))

        def loss(weights):
            logits, changed = model.apply(
                {**weights, **statistics}, images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, train_y[places])
            return jnp.mean(losses), changed

        gradient, statistics = jax.grad(loss, has_aux=True)(weights)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, change), statistics, state

    for number in range(steps):
        key = jax.random.fold_in(jax.random.key(1), number)
        places = jax.random.choice(key, len(train_x), (batch,), replace=False)
        weights, statistics, state = step(weights, statistics, state, key, places)
    return model, {**weights, **statistics}


@jax.jit
def right(logits, labels):
    """The share of correct answers."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


names = ["rotnet"] if quick else ["rotnet", "rotnet-c4", "rotnet-c4-repeat"]
trained = {name: train(name) for name in names}
for name, (model, variables) in trained.items():
    logits = jax.jit(model.apply)(variables, data.normalise(test_x))
    count = paramshare.count(variables)["trainable"]
    print(f"{name:17} {count:9,} parameters, test accuracy {float(right(logits, test_y)):.1%}")

# %% [markdown]
# ## By angle
# The equivariant network answers alike for angles that differ by 90 degrees. The others have to
# learn every angle from examples.

# %%
angles = [90.0] if quick else [15.0 * step for step in range(13)]
few_x, few_y = test_x[:200], test_y[:200]
turn_all = jax.jit(lambda angle: data.normalise(turn(few_x, jnp.full(len(few_x), angle))))
for name, (model, variables) in trained.items():
    apply = jax.jit(model.apply)
    curve = [float(right(apply(variables, turn_all(angle)), few_y)) for angle in angles]
    plt.plot(angles, curve, "o-", label=name)
plt.xlabel("additional turn in degrees")
plt.ylabel("accuracy on 200 test images")
plt.legend()
plt.show()

# %% [markdown]
# One run of each says little, since accuracies also depend on the seed.
# `experiments/studies/rotated_digits.py` repeats the comparison over seeds, with networks that tell
# width, copying and learned scalars apart, and gives the share of the gain that each explains with
# its interval.
