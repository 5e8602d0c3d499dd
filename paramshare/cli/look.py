"""Commands that inspect networks and runs: eval, models, summary."""

import argparse
import json
from typing import Any

from paramshare.cli.errors import CommandError
from paramshare.cli.parsing import add_checkpoint
from paramshare.storage import run_path

MOST = 10**6  # devices


def add(command: Any) -> None:
    """Declares the commands."""
    evaluate = command("eval", _eval, "evaluate a trained network")
    evaluate.add_argument("workdir", metavar="WORKDIR", help="of a training run")
    evaluate.add_argument("--split", choices=("test", "validation", "train"), default="test")
    add_checkpoint(evaluate)

    models = command("models", _models, "list networks by name")
    models.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as 'swrn-*'")

    summary = command(
        "summary", _summary, "show layers, banks, parameters, multiply-adds and bytes of a network"
    )
    summary.add_argument(
        "name", metavar="NAME|WORKDIR", help="name of a network, or folder of a run"
    )
    summary.add_argument("--num-classes", type=int)
    summary.add_argument(
        "--input-shape",
        type=int,
        nargs="+",
        metavar="N",
        help="height, width and channels of images, or the length of sequences of tokens",
    )
    summary.add_argument(
        "--stem", help="'imagenet' or 'cifar', for networks that can be built with either"
    )
    summary.add_argument(
        "--form", help="'paper' (the default) or 'torchvision', for MobileNetV2 and DenseNet"
    )
    summary.add_argument(
        "--devices", type=int, metavar="N", help="show bytes of each of N devices too"
    )
    summary.add_argument("--json", action="store_true", help="print JSON")


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.training.derive import load_run
    from paramshare.training.evaluation import make_evaluate

    run, variables, step = load_run(args.workdir, args.checkpoint)
    source = getattr(run.data, args.split)
    if not len(source):
        raise CommandError(
            f"data set {run.data.name!r} has no {args.split} examples in this run; "
            "choose another --split"
        )
    about = {
        "model": run.config.model.name,
        "data": run.data.name,
        "split": args.split,
        "checkpoint": args.checkpoint,
        "step": step,
    }
    print(json.dumps(about | make_evaluate(run)(variables, source).as_json()))
    return 0


def _models(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.zoo import FAMILIES, list_models

    names = list_models(args.pattern)
    if not names:
        raise CommandError(f"no model matches {args.pattern!r}; `paramshare models` lists all")
    for family in FAMILIES:
        examples = [name for name in names if name in family.examples]
        if examples:
            print(f"{family.form}: {family.about}")
            print("".join(f"  {name}\n" for name in examples), end="")
    return 0


def _summary(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.measure.cost import cost
    from paramshare.shared import Shared

    if args.devices is not None and not 1 <= args.devices <= MOST:
        raise CommandError(f"--devices is {args.devices}; it must be 1 to {MOST:,}")
    options = {
        "--num-classes": args.num_classes,
        "--input-shape": args.input_shape,
        "--stem": args.stem,
        "--form": args.form,
    }
    if (run_path(args.name) / "config.json").is_file():
        from paramshare.training.optimizer import learning_rate, optimizer
        from paramshare.training.workdir import stored_network

        given = [option for option, value in options.items() if value is not None]
        if given:
            raise CommandError(
                f"{args.name} is a run with a network of its own; leave out {', '.join(given)}"
            )
        config, facts, model = stored_network(run_path(args.name))
        name, example = config.model.name, facts.example
        rule = optimizer(config, learning_rate(config, 1))
    else:
        from paramshare.zoo import create_model, default_input_shape, input_of

        name, rule = args.name, None
        shape = tuple(args.input_shape or default_input_shape(name, args.stem))
        forms = {"stem": args.stem, "form": args.form}
        given = {option: value for option, value in forms.items() if value is not None}
        model = create_model(name, args.num_classes, shape, **given)
        example = input_of(name, shape)
    result = cost(model, example, optimizer=rule, devices=args.devices)
    if args.json:
        print(result.as_json())
        return 0
    sizes, tokens = "x".join(map(str, example.shape[1:])), example.dtype.kind in "iu"
    print(f"{name}, {f'sequences of {sizes} tokens' if tokens else f'images of {sizes}'}\n")
    if isinstance(model, Shared):
        print(model.describe(), end="\n\n")
    print(result)
    return 0
