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
# # Shortest paths: can a network learn an algorithm, and how far does it get?
# A grid with obstacles and two points. Which cells lie on a shortest path between them? An algorithm answers by doing the same small step
# again and again: spread from the points, cell by cell. A convolutional network with twenty different layers *can* do that; one whose
# layers share their kernels is built for it. Savarese & Maire (ICLR 2019, arXiv:1902.09701) report that sharing makes such
# networks learn faster, and extrapolate better to problems unlike those that they were trained on. Here is their experiment at half the
# size, with one seed of four networks, in ten minutes on two cores. (Five seeds, with intervals: `experiments/results/shortest_paths.md`.)

# %%
import dataclasses
import itertools
import os
import pathlib

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import paramshare
from paramshare.analysis.batch_statistics import reestimate
from paramshare.analysis.deepening import deepen
from paramshare.analysis.path_pictures import painted
from paramshare.training.config import Config, Data, Model, Optimizer, Penalty, Schedule
from paramshare.training.data import Curriculum, normalise
from paramshare.training.data.grids import Grids, apart
from paramshare.training.derive import trained, training_images
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.metrics import read_metrics

# %% [markdown]
# ## The problem
# Problems are a pure function of a seed and a number. White cells are free, dark ones obstacles, the two points are blue; green is the
# answer: *all* cells on *any* shortest path, one step being up, down, left or right.

# %%
images, targets = Grids(16, 16, window=11, density=0.2).draw(seed=0, indices=range(5))
fig, axes = plt.subplots(1, 5, figsize=(13, 2.8), layout="constrained")
for axis, image, target in zip(axes, images, targets, strict=True):
    axis.imshow(painted(image, target, target))
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Four networks, one curriculum
# Ten 3x3 convolutions of 16 channels, each with batch norm, ReLU and a skip over it. They differ in where the ten kernels come from:
#
# * **CNN**: from nowhere else, ten kernels.
# * **SCNN**: each mixed from a bank of ten templates. As many numbers, and 100 coefficients.
# * **SCNN, recurrence**: the same, with a penalty on layers that are not alike.
# * **hard loop**: one kernel, used ten times.
#
# First the points lie within 3 x 3 cells of each other, then 5, 7, 9, 11: five phases. Data on both sides is fixed, so a run that has
# finished is read, not trained again.

# %%
quick = "SHORTEST_PATHS_QUICK" in os.environ  # only to see that it runs
depth, width, examples, tests, epochs = (3, 4, 32, 20, 5) if quick else (10, 16, 1000, 500, 60)
config = Config(
    data=Data(
        "grids",
        validation=0.2,
        curriculum=Curriculum(16, windows=(3, 5, 7, 9, 11), examples=examples, tests=tests, far_windows=(16,), far_sizes=(32,)),
    ),
    optimizer=Optimizer("adam", learning_rate=0.01, weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=epochs,
    batch_size=32,
    checkpoint_every=12,
)
networks = {
    "CNN": (f"pathnet-{depth}-{width}", 0.0),
    "SCNN": (f"spathnet-{depth}-{width}-{depth}", 0.0),
    "SCNN, recurrence": (f"spathnet-{depth}-{width}-{depth}", 0.01),
    "hard loop": (f"pathnet-{depth}-{width}-loop-1", 0.0),
}
found = {}
for label, (name, recurrence) in networks.items():
    workdir = pathlib.Path("runs") / f"03-{examples}" / label.replace(", ", "-").replace(" ", "-")
    result = train(dataclasses.replace(config, model=Model(name), penalty=Penalty(recurrence=recurrence)), workdir)
    run, variables, _ = trained(workdir)
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "epoch"]
    found[label] = (run, variables, lines, result)
    print(f"{label}: {result['counts']['trainable']:,} trainable numbers, {result['seconds']:.0f} s")

# %% [markdown]
# ## Who adapts faster?
# F1 over cells, on validation problems of the current phase. A dotted line is a change of phase: points move farther apart.

# %%
fig, axis = plt.subplots(figsize=(10, 4), layout="constrained")
for label, (_, _, lines, _) in found.items():
    axis.plot([line["epoch"] for line in lines], [line["validation_f1"] for line in lines], label=label)
for line, following in itertools.pairwise(lines):
    if line["phase"] != following["phase"]:
        axis.axvline(line["epoch"] + 0.5, color="0.6", linestyle=":")
axis.set(xlabel="epoch", ylabel="F1", ylim=(0, 1))
axis.grid(alpha=0.3)
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## And who gets farther?
# Test sets beyond the curriculum: points anywhere on the grid; a grid of four times the area, with points as far apart as trained on, and
# anywhere; more obstacles.

# %%
kinds = list(found["CNN"][3]["last"]["others"])
print(f"{'F1':<18}" + "".join(f"{kind:>20}" for kind in kinds[4:]))
for label, (*_, result) in found.items():
    print(f"{label:<18}" + "".join(f"{result['last']['others'][kind]['f1']:>20.3f}" for kind in kinds[4:]))

# %% [markdown]
# Problems of these sets, with points farther apart than trained on (but for the first), and with as many cells on a path as is usual among
# those. Green was found, yellow missed, red is no path.

# %%
rows = ["window 11", "window 16", "size 32, window 32"]
fig, axes = plt.subplots(len(rows), 1 + len(found), figsize=(13, 8), layout="constrained")
for line, kind in zip(axes, rows, strict=True):
    source = found["CNN"][0].data.others[kind]
    some = np.flatnonzero((apart(source.image) > 11) | (kind == rows[0]))
    middle = some[np.argsort(source.label[some].sum(axis=(1, 2)), kind="stable")[len(some) // 2]]
    image, target = source.image[middle], source.label[middle]
    shown = {"shortest paths": target}
    for label, (run, variables, *_) in found.items():
        shown[label] = run.model.apply(variables, normalise(jnp.asarray(image[None]), run.data.mean, run.data.std))[0] > 0
    for axis, (label, cells) in zip(line, shown.items(), strict=True):
        axis.imshow(painted(image, target, cells))
        axis.set(title=label if kind == rows[0] else "", xticks=[], yticks=[])
    line[0].set_ylabel(kind)
plt.show()

# %% [markdown]
# ## Fold the network that was encouraged
# Where layers have become alike, they are one layer: `fold` ties them, with a signed scale each.

# %%
run, variables, *_ = found["SCNN, recurrence"]
folded = paramshare.fold(run.model, variables, threshold=0.9)
print(folded)
again = make_evaluate(dataclasses.replace(run, model=folded.shared))
for kind in rows:
    before = found["SCNN, recurrence"][3]["last"]["others"][kind]["f1"]
    print(f"{kind:<20} F1 {before:.3f} before, {again(folded.variables, run.data.others[kind])['f1']:.3f} folded")

# %% [markdown]
# ## Run the loop for longer
# A loop can run for more iterations than it was trained for. Farther points want more steps: does it help? Each iteration has batch norms
# of its own, so something has to be decided: here the middle one is repeated, 1 2 3 3 3 4 5, and the batch statistics, which were those
# of other activations, are gathered anew from training problems. Nothing is trained.

# %%
run, variables, *_ = found["hard loop"]
print(f"{'F1 after':<22}" + "".join(f"{kind:>22}" for kind in rows))
for iterations in (depth, depth + 2, depth + 5):
    deeper, its = deepen(run.model, variables, iterations, how="middle")
    if iterations > depth:
        its = reestimate(deeper, its, training_images(run, 16))
    evaluate = make_evaluate(dataclasses.replace(run, model=deeper))
    print(f"{iterations:>2} iterations         " + "".join(f"{evaluate(its, run.data.others[kind])['f1']:>22.3f}" for kind in rows))

# %% [markdown]
# And the CNN, whose layers are no loop, with its middle layer repeated in the same way?

# %%
run, variables, *_ = found["CNN"]
deeper, its = deepen(run.model, variables, depth + 2, how="middle")
its = reestimate(deeper, its, training_images(run, 16))
evaluate = make_evaluate(dataclasses.replace(run, model=deeper))
print(f"CNN, {depth + 2} layers        " + "".join(f"{evaluate(its, run.data.others[kind])['f1']:>22.3f}" for kind in rows))

# %% [markdown]
# One seed shows how it is done, and little more. With five seeds, intervals and the other schemes:
# ```
# python experiments/shortest_paths_compare.py experiments/shortest_paths_reduced.py --out runs/paths --processes 2
# ```
