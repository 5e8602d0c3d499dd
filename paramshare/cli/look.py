"""Commands that look at networks and runs: eval, models, summary."""

import argparse
import json
import pathlib
from typing import Any

from paramshare.cli.errors import CommandError


def add(command: Any) -> None:
    """Declares the commands."""
    evaluate = command("eval", _eval, "evaluate a trained network")
    evaluate.add_argument("workdir", metavar="WORKDIR", help="of a training run")
    evaluate.add_argument("--split", choices=("test", "validation", "train"), default="test")
    evaluate.add_argument("--checkpoint", choices=("last", "best"), default="last", help="the last state, or the one that validation chose")

    models = command("models", _models, "list networks by name")
    models.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as 'swrn-*'")

    summary = command("summary", _summary, "layers, banks, counts, multiply-adds and bytes of a network")
    summary.add_argument("name", metavar="NAME|WORKDIR", help="a network by name, or the folder of a training run")
    summary.add_argument("--num-classes", type=int, default=None)
    summary.add_argument("--input-shape", type=int, nargs=3, default=None, metavar=("H", "W", "C"))
    summary.add_argument("--stem", default=None, help="'imagenet' or 'cifar', for networks that have both")
    summary.add_argument("--json", action="store_true", help="as JSON")


def _eval(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.training.config import ConfigError
    from paramshare.training.derive import trained
    from paramshare.training.evaluation import make_evaluate

    run, variables, step = trained(known.workdir, known.checkpoint)
    source = getattr(run.data, known.split)
    if not len(source):
        raise ConfigError(
            f"data set {run.data.name!r} has no {known.split} images in this run (data.validation={run.config.data.validation})"
        )
    about = {"model": run.config.model.name, "data": run.data.name, "split": known.split, "checkpoint": known.checkpoint, "step": step}
    print(json.dumps(about | make_evaluate(run)(variables, source)))
    return 0


def _models(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.zoo import FAMILIES, list_models

    names = list_models(known.pattern)
    if not names:
        raise CommandError(f"no model matches {known.pattern!r}; `paramshare models` lists them all")
    for family in FAMILIES:
        mine = [name for name in names if name in family.examples]
        if mine:
            print(f"{family.form}: {family.about}")
            print("".join(f"  {name}\n" for name in mine), end="")
    return 0


def _summary(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.analysis.cost import cost
    from paramshare.shared import Shared
    from paramshare.zoo import create_model, default_input_shape

    if (pathlib.Path(known.name) / "config.json").is_file():
        from paramshare.training.run import prepare
        from paramshare.training.workdir import stored_config

        if known.num_classes or known.input_shape or known.stem:
            raise CommandError(f"{known.name} is a run, which knows its images and classes; leave out --num-classes, --input-shape, --stem")
        run = prepare(stored_config(pathlib.Path(known.name)))
        name, model, shape, optimizer = run.config.model.name, run.model, run.data.image_shape, run.optimizer
    else:
        name, optimizer = known.name, None
        shape = tuple(known.input_shape) if known.input_shape else default_input_shape(name, known.stem)
        model = create_model(name, known.num_classes, shape, **({"stem": known.stem} if known.stem else {}))
    found = cost(model, shape, optimizer)
    if known.json:
        print(found.as_json())
        return 0
    print(f"{name}, images of {'x'.join(map(str, shape))}\n")
    if isinstance(model, Shared):
        print(model.describe(), end="\n\n")
    print(found)
    return 0
