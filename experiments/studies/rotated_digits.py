"""How much of the gain of rotation-equivariant networks is repetition of weights?

    python experiments/studies/rotated_digits.py experiments/recipes/rotated_digits_small.py \\
        --data.path FOLDER_OR_FILE --groups 4 8 --seeds 0 1 2 3 4 --out runs/rotated

Trains the plain baseline and, for each group C_N of --groups, the equivariant network and networks
of about its width with about as many parameters as the baseline: kernels repeated by learned
scalars (`repeat`, the paper's), by a learned factor (`scaled`, soft sharing of one template by the
copies) or as they are (`tiled`), or generated from one ring (`rpg`); and a plain network of that
width (`wide`), which has about as many multiply-adds as the equivariant one and many more
parameters. Further options override the configuration. Every run has its own workdir in DIR; rerun
the study to continue it, also with more --arms, --groups or --seeds.

Writes DIR/table.md: accuracies with 95% intervals of the t distribution over the seeds, and the
share of the equivariant network's gain that each network reaches, (network - baseline) /
(equivariant - baseline), with 95% intervals by Fieller's theorem on differences within a seed. The
digits and their angles are the same for all seeds, so that intervals are those of training. Draws
DIR/rotated_digits.png, the errors, and DIR/digits.png, some training images.
"""

import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sweep

from paramshare.cli import run_command
from paramshare.report.path_pictures import interval
from paramshare.report.pictures import blank, save
from paramshare.training.config import Config, ConfigError
from paramshare.zoo.rotation import equivariant_rot_net

BASELINE = "rotnet"
ARMS = {
    "repeat": "repeated, learned scalars",
    "scaled": "repeated, learned factors",
    "tiled": "repeated, nothing learned",
    "rpg": "one ring",
    "wide": "plain, as wide",
}
CLAIM = 0.4  # Chavan et al.: up to 40% of the gain
Interval = tuple[float, float]


def main() -> None:
    """Runs the study that the command line describes."""
    parser = sweep.parser(__doc__ or "", seeds=range(5))
    parser.add_argument("--groups", nargs="+", type=int, default=[4, 8], metavar="N")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    args, config = sweep.parse(parser)
    if unknown := set(args.arms) - set(ARMS):
        raise ConfigError(
            f"--arms has {', '.join(sorted(unknown))}; the arms are {', '.join(ARMS)}"
        )
    for order in args.groups:
        equivariant_rot_net(order)  # an unknown group is an error before anything is trained
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError(f"--seeds is {args.seeds}; give every seed once")
    arms = [arm for arm in ARMS if arm in args.arms]
    names = {BASELINE: "plain baseline"}
    for order in args.groups:
        names[_name(order)] = f"C{order}: equivariant"
        names |= {_name(order, arm): f"C{order}: {ARMS[arm]}" for arm in arms}
    configs = {name: sweep.with_network(config, name) for name in names}
    results = sweep.run(configs, args.seeds, args.out)
    scores = {name: [run.last_score for run in runs] for name, runs in results.items()}
    rows = []
    for name, title in names.items():
        mean, half = interval(scores[name])
        each = ", ".join(f"{score:.2%}" for score in scores[name])
        trainable = f"{results[name][0].counts['trainable']:,}"
        rows.append([title, f"`{name}`", trainable, f"{mean:.2%} ± {half:.2%}", each])
    head = ["network", "name", "trainable", f"test accuracy, {len(args.seeds)} seeds", "each seed"]
    text = sweep.table(head, rows)
    rows = []
    for order in args.groups:
        gain = differences(scores[_name(order)], scores[BASELINE])
        mean, half = interval(gain)
        rows.append([names[_name(order)], f"{mean:+.2%} ± {half:.2%}", "1"])
        for arm in arms:
            difference = differences(scores[_name(order, arm)], scores[BASELINE])
            mean, half = interval(difference)
            share = shown(difference, gain)
            rows.append([names[_name(order, arm)], f"{mean:+.2%} ± {half:.2%}", share])
    text += "\n\n" + sweep.table(["network", "gain over the baseline", "share of the gain"], rows)
    if "repeat" in arms:
        verdicts = []
        for order in args.groups:
            repeated, equivariant = (
                differences(scores[_name(order, arm)], scores[BASELINE]) for arm in ("repeat", "")
            )
            verdicts.append(f"C{order}: {verdict(repeated, equivariant)}")
        text += f"\n\nThe paper's share of repetition, up to {CLAIM:.2f}: {'; '.join(verdicts)}."
    picture = args.out / "rotated_digits.png"
    draw({names[name]: interval(values) for name, values in scores.items()}, picture)
    draw_digits(config, args.out / "digits.png")
    sweep.publish(args.out, text, sweep.provenance(results[BASELINE][0]))
    print(f"pictures       {picture}, {args.out / 'digits.png'}")


def _name(order: int, arm: str = "") -> str:
    return f"{BASELINE}-c{order}" + (f"-{arm}" if arm else "")


def differences(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    """The differences of two networks' scores, seed by seed."""
    return [score - other for score, other in zip(scores, others, strict=True)]


def fieller(
    numerator: Sequence[float], denominator: Sequence[float], confidence: float = 0.95
) -> Interval | None:
    """The confidence interval of the ratio of two means, from pairs of values.

    All ratios r for which the mean of numerator - r denominator is not significantly different from
    0 (Fieller, "Some problems in interval estimation", 1954). None if the mean of the denominator
    itself is not: the interval is not bounded then; and for a single pair.

    Example:
      >>> low, high = fieller([1.0, 1.1, 0.9], [2.0, 2.1, 1.9])
      >>> round(low, 3), round(high, 3)
      (0.429, 0.555)
      >>> fieller([1.0, 1.1, 0.9], [1.0, -1.0, 0.1]) is None
      True
    """
    from scipy.stats import t  # installed with jax

    count = len(numerator)
    if count < 2:
        return None
    mean = np.mean(numerator), np.mean(denominator)
    (var_a, cov), (_, var_b) = np.cov(numerator, denominator) / count
    square = t.ppf((1 + confidence) / 2, count - 1) ** 2
    # (a - r b)^2 <= t^2 (var_a - 2 r cov + r^2 var_b), a quadratic inequality for r.
    leading = mean[1] ** 2 - square * var_b
    if leading <= 0:
        return None
    middle = mean[0] * mean[1] - square * cov
    root = math.sqrt(max(middle**2 - leading * (mean[0] ** 2 - square * var_a), 0.0))
    return float((middle - root) / leading), float((middle + root) / leading)


def shown(numerator: Sequence[float], denominator: Sequence[float]) -> str:
    """The ratio of two means with its interval, as text."""
    mean = float(np.mean(denominator))
    if mean <= 0:
        return "there is no gain to share"
    ratio = f"{float(np.mean(numerator)) / mean:.2f}"
    if len(numerator) < 2:
        return f"{ratio} (one seed: no interval)"
    limits = fieller(numerator, denominator)
    if limits is None:
        return f"{ratio} (no bounded interval: the equivariant gain is not significant)"
    return f"{ratio} ({limits[0]:.2f} to {limits[1]:.2f})"


def verdict(numerator: Sequence[float], denominator: Sequence[float]) -> str:
    """Where the paper's share lies beside the interval of the measured one."""
    limits = fieller(numerator, denominator)
    if np.mean(denominator) <= 0 or limits is None:
        return "not decided, for lack of a bounded interval"
    if limits[0] <= CLAIM <= limits[1]:
        return "inside the interval"
    return f"{'below' if limits[0] > CLAIM else 'above'} the interval"


def draw(accuracies: Mapping[str, Interval], file: pathlib.Path) -> None:
    """Draws errors with their intervals, a row for each network."""
    figure, axes = blank(1, 1, (7.0, 0.8 + 0.3 * len(accuracies)))
    axis = np.ravel(axes)[0]
    for row, (label, (mean, half)) in enumerate(accuracies.items()):
        colour = "#d1495b" if label.endswith("equivariant") else "#3b3b3b"
        colour = "#2155a3" if "learned scalars" in label else colour
        half = 0.0 if math.isnan(half) else half
        axis.errorbar(
            100 * (1 - mean), -row, xerr=100 * half, fmt="o", color=colour, capsize=3, markersize=5
        )
    axis.set_yticks([-row for row in range(len(accuracies))], list(accuracies))
    axis.set_ylim(0.5 - len(accuracies), 0.5)
    axis.set_xlabel("test error in %, mean and 95% interval over the seeds")
    axis.grid(axis="x", color="#dddddd")
    save(figure, file)


def draw_digits(config: Config, file: pathlib.Path, count: int = 24) -> None:
    """Draws the first training images with their labels."""
    images: Any = config.data.load(config.seed).train
    figure, axes = blank(2, count // 2, (count // 2, 2.4))
    for axis, image, label in zip(np.ravel(axes), images.input, images.label, strict=False):
        axis.imshow(image[..., 0], cmap="gray")
        axis.set_title(str(int(label)), fontsize=9)
    for axis in np.ravel(axes):
        axis.set_axis_off()
    save(figure, file)


if __name__ == "__main__":
    sys.exit(run_command(main))
