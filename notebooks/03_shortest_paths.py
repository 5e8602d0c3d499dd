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
# # Shortest paths: can a network learn an algorithm?
# Take a grid with obstacles and two points. Which cells lie on a shortest path between the points?
# An algorithm answers by repeating one small step: spread from the points, cell by cell. A
# convolutional network with twenty different layers *can* do that. A network whose layers share
# their kernels is built for it. Savarese & Maire (ICLR 2019, arXiv:1902.09701) report that sharing
# makes such networks learn faster and extrapolate better to unseen kinds of problems.
#
# This notebook repeats their experiment at half the size, with one seed of four networks, in ten
# minutes on two cores. `experiments/results/shortest_paths.md` has five seeds and intervals.

# %%
import dataclasses
import itertools
import os
import pathlib

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import paramshare
from paramshare.data import Curriculum, Grids
from paramshare.data.grid_problems import GridProblems, smallest_window
from paramshare.report.path_pictures import painted
from paramshare.training.config import Config, Model, Optimizer, Penalty, Schedule
from paramshare.training.derive import load_run, training_inputs
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.metrics import read_metrics
from paramshare.transform.batch_statistics import reestimate
from paramshare.transform.deepening import deepen

# %% [markdown]
# ## The problem
# Each problem is a pure function of a seed and an index. White cells are free, dark cells are
# obstacles, and the two points are blue. Green is the answer: *all* cells on *any* shortest path,
# where a step goes up, down, left or right.

# %%
images, targets = GridProblems(16, 16, window=11, density=0.2).draw(seed=0, indices=range(5))
fig, axes = plt.subplots(1, 5, figsize=(13, 2.8), layout="constrained")
for axis, image, target in zip(axes, images, targets, strict=True):
    axis.imshow(painted(image, target, target))
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Four networks, one curriculum
# Each network has ten 3x3 convolutions of 16 channels, each with batch norm, ReLU and a skip
# connection. They differ in where the ten kernels come from:
#
# * **CNN**: ten independent kernels.
# * **SCNN**: each kernel is mixed from a bank of ten templates: as many weights, and 100
#   coefficients.
# * **SCNN, recurrence**: the same, with a penalty on layers that are not similar.
# * **hard loop**: one kernel, used ten times.
#
# The curriculum has five phases: the points lie within a square of 3, 5, 7, 9 and 11 cells. If you
# run the notebook again, finished runs are read instead of trained.

# %%
quick = "NOTEBOOK_QUICK" in os.environ  # for the tests
depth, width, examples, tests, epochs = (2, 4, 32, 20, 5) if quick else (10, 16, 1000, 500, 60)
config = Config(
    data=Grids(
        validation=0.2,
        curriculum=Curriculum(
            16,
            windows=(3, 5, 7, 9, 11),
            examples=examples,
            tests=tests,
            far_windows=(16,),
            far_sizes=(32,),
        ),
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
if quick:
    del networks["SCNN"]
runs = {}
for label, (name, recurrence) in networks.items():
    workdir = pathlib.Path("runs") / f"03-{examples}" / label.replace(", ", "-").replace(" ", "-")
    result = train(
        dataclasses.replace(config, model=Model(name), penalty=Penalty(recurrence=recurrence)),
        workdir,
    )
    run, variables, _ = load_run(workdir)
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "epoch"]
    runs[label] = (run, variables, lines, result)
    count = result.counts["trainable"]
    print(f"{label}: {count:,} trainable parameters, {result.seconds:.0f} s")

# %% [markdown]
# ## Who adapts faster?
# F1 over cells, on validation problems of the current phase. Dotted lines mark the changes of
# phase, where the points move farther apart.

# %%
fig, axis = plt.subplots(figsize=(10, 4), layout="constrained")
for label, (_, _, lines, _) in runs.items():
    axis.plot(
        [line["epoch"] for line in lines], [line["validation_f1"] for line in lines], label=label
    )
for line, following in itertools.pairwise(lines):
    if line["phase"] != following["phase"]:
        axis.axvline(line["epoch"] + 0.5, color="0.6", linestyle=":")
axis.set(xlabel="epoch", ylabel="F1", ylim=(0, 1))
axis.grid(alpha=0.3)
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## And who gets farther?
# These test sets lie beyond the curriculum: points anywhere on the grid; a grid of four times the
# area, with points as near as in training and with points anywhere; and more obstacles.

# %%
kinds = list(runs["CNN"][3].others)[4:]
print(f"{'F1':<18}" + "".join(f"{kind:>20}" for kind in kinds))
for label, (*_, result) in runs.items():
    scores = (result.others[kind].measures["f1"] for kind in kinds)
    print(f"{label:<18}" + "".join(f"{score:>20.3f}" for score in scores))

# %% [markdown]
# One problem of each set, with the median number of path cells. In all rows but the first, the
# points lie farther apart than in training. Green cells are found, yellow ones missed, and red
# ones are not on a path.

# %%
rows = ["window 11", "window 16", "size 32, window 32"]
fig, axes = plt.subplots(len(rows), 1 + len(runs), figsize=(13, 8), layout="constrained")
for line, kind in zip(axes, rows, strict=True):
    data = runs["CNN"][0].data
    source = data.others[kind]
    some = np.flatnonzero((smallest_window(source.input) > 11) | (kind == rows[0]))
    middle = some[np.argsort(source.label[some].sum(axis=(1, 2)), kind="stable")[len(some) // 2]]
    image, target = source.input[middle], source.label[middle]
    panels = {"shortest paths": target}
    for label, (run, variables, *_) in runs.items():
        panels[label] = run.model.apply(variables, data.normalise(jnp.asarray(image[None])))[0] > 0
    for axis, (label, cells) in zip(line, panels.items(), strict=True):
        axis.imshow(painted(image, target, cells))
        axis.set(title=label if kind == rows[0] else "", xticks=[], yticks=[])
    line[0].set_ylabel(kind)
plt.show()

# %% [markdown]
# ## Fold the network trained with the penalty
# Layers that have become alike are one layer. `fold` ties them; each keeps a signed scale.

# %%
run, variables, _, result = runs["SCNN, recurrence"]
folded = paramshare.fold(run.model, variables, threshold=0.9)
print(folded)
evaluate = make_evaluate(dataclasses.replace(run, model=folded.shared))
for kind in rows:
    before = result.others[kind].measures["f1"]
    after = evaluate(folded.variables, run.data.others[kind]).measures["f1"]
    print(f"{kind:<20} F1 {before:.3f} before, {after:.3f} folded")

# %% [markdown]
# ## Run the loop for longer
# A loop can run for more iterations than in training. Points that are farther apart need more
# steps, so does this help? Each iteration has its own batch norms. Here the middle one is
# repeated, 1 2 3 3 3 4 5, and batch statistics are re-estimated on training problems. Nothing is
# trained.


# %%
def f1_of_deeper(label, layers):
    run, variables, *_ = runs[label]
    deeper, deeper_variables = deepen(run.model, variables, layers, how="middle")
    if layers > depth:
        deeper_variables = reestimate(deeper, deeper_variables, training_inputs(run, 16))
    evaluate = make_evaluate(dataclasses.replace(run, model=deeper))
    return [evaluate(deeper_variables, run.data.others[kind]).measures["f1"] for kind in rows]


print(f"{'F1 after':<22}" + "".join(f"{kind:>22}" for kind in rows))
for iterations in (depth, depth + 2, depth + 5):
    scores = f1_of_deeper("hard loop", iterations)
    print(f"{f'{iterations} iterations':<22}" + "".join(f"{score:>22.3f}" for score in scores))

# %% [markdown]
# The CNN's layers are not a loop. What happens if its middle layer is repeated in the same way?

# %%
scores = f1_of_deeper("CNN", depth + 2)
print(f"{f'CNN, {depth + 2} layers':<22}" + "".join(f"{score:>22.3f}" for score in scores))

# %% [markdown]
# One seed shows how this works, but not much more. With five seeds, intervals and the other
# schemes:
# ```
# python experiments/studies/shortest_paths_compare.py \
#     experiments/recipes/shortest_paths_reduced.py --out runs/paths --processes 2
# ```
