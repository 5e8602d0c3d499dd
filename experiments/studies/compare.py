"""Trains several networks with one configuration and several seeds, and writes a table.

    python experiments/studies/compare.py CONFIG --models NAME ... --seeds 0 1 2 --out DIR

Further options override the configuration. A NAME in quotes can carry its own overrides:
"resnet20-s16u1 --penalty.orthogonality 10". Every run has its own workdir in DIR. The table is
printed and written to DIR/table.md. If the task has several measures, a second table gives the mean
of each, with the 95% interval of the t distribution over the seeds.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence

import sweep

from paramshare.cli import run_command
from paramshare.report.path_pictures import interval
from paramshare.tasks import Measure
from paramshare.training.result import Result
from paramshare.training.run import prepare


def main() -> None:
    """Runs the study that the command line describes."""
    parser = sweep.parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", required=True)
    args, config = sweep.parse(parser)
    configs = {}
    for label in args.models:
        name, *overrides = shlex.split(label)
        configs[label] = sweep.with_network(config, name, overrides)
    results = sweep.run(configs, args.seeds, args.out)
    first = next(iter(results.values()))[0]
    rows = []
    for label, runs in results.items():
        last = [run.last_score for run in runs]
        selected = [run.selected_score for run in runs if run.selected_score is not None]
        rows.append(
            [
                label,
                f"{runs[0].counts['trainable']:,}",
                sweep.mean_and_std(last, first.score.format_spec),
                sweep.mean_and_std(selected, first.score.format_spec),
                ", ".join(map(first.score.format, last)),
            ]
        )
    score = f"test {first.score.title}, last epoch, mean of {len(args.seeds)} seeds (std)"
    head = ["network", "trainable", score, "chosen by validation", "each seed"]
    text = sweep.table(head, rows)
    if len(first.last.measures) > 1:
        measures = first.measures or prepare(configs[args.models[0]]).task.measures
        text += "\n\n" + every_measure(results, measures)
    sweep.publish(args.out, text, sweep.provenance(first))


def every_measure(results: Mapping[str, Sequence[Result]], measures: Sequence[Measure]) -> str:
    """A table of all measures of the test set after the last epoch."""
    rows = []
    for label, runs in results.items():
        row = [label]
        for measure in measures:
            mean, half = interval([run.last.measures[measure.name] for run in runs])
            interval_text = f" ± {measure.format(half)}" if len(runs) > 1 else ""
            row.append(measure.format(mean) + interval_text)
        rows.append(row)
    return sweep.table(["test, last epoch", *(measure.title for measure in measures)], rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
