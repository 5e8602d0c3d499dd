"""Commands that make a new run of a trained one: fold, convert."""

import argparse
import dataclasses
import json
import pathlib
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paramshare.cli.errors import CommandError
from paramshare.cli.train import override

if TYPE_CHECKING:
    from paramshare.training.run import Run

CHECKPOINTS = ("last", "best")


def add(command: Any) -> None:
    """Declares the commands."""
    fold = command("fold", _fold, "tie the similar layers of a trained network; OPTIONS of train set how it goes on", overrides=True)
    fold.add_argument("workdir", metavar="WORKDIR", help="of a training run of a shared network")
    fold.add_argument("--output", metavar="DIR", help="a new workdir for the folded network, to evaluate or to train on; none only reports")
    fold.add_argument("--threshold", type=float, default=0.9, help="the similarity from which layers are tied, in (0, 1]; .9 unless given")
    fold.add_argument("--drop-scales", action="store_true", help="do not keep a signed scale a layer")
    fold.add_argument("--banks", nargs="+", default=None, metavar="BANK", help="only these banks (regular expressions over whole names)")
    fold.add_argument("--by", choices=("coefficients", "kernels"), default="coefficients", help="what layers are compared by")
    _common(fold)

    convert = command("convert", _convert, "give a trained network's weights to another network of the same layers", overrides=True)
    convert.add_argument("workdir", metavar="WORKDIR", help="of a training run, dense or shared")
    convert.add_argument("--model", required=True, metavar="NAME", help="the network to convert to, such as swrn-28-10-2 from wrn-28-10")
    convert.add_argument("--output", metavar="DIR", help="a new workdir for the converted network: evaluate it, or train it on")
    _common(convert)


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", choices=CHECKPOINTS, default="last", help="the last state, or the one that validation chose")
    command.add_argument("--reestimate", type=int, default=0, metavar="N", help="fit batch statistics anew, on N training batches")
    command.add_argument("--fine-tune", type=int, default=0, metavar="N", help="train it on in DIR: N epochs, from a tenth of the rate")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def _trained(known: argparse.Namespace) -> tuple["Run", dict[str, Any], int]:
    from paramshare.training.derive import trained

    if known.output and pathlib.Path(known.output).exists():  # before minutes are spent
        raise CommandError(f"{known.output} exists; give --output a folder that does not")
    if known.fine_tune < 0 or (known.fine_tune and not known.output):
        raise CommandError(f"--fine-tune {known.fine_tune}; give the number of epochs, or 0 for none, and --output DIR to train in")
    if known.reestimate < 0:
        raise CommandError(f"--reestimate {known.reestimate}; give the number of batches, or 0 for none")
    return trained(known.workdir, known.checkpoint)


def _fold(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.analysis.folding import fold
    from paramshare.shared import Shared
    from paramshare.training.run import tied_text

    run, variables, step = _trained(known)
    if not isinstance(run.model, Shared):
        raise CommandError(
            f"{run.config.model.name} shares nothing, so there is nothing to fold; `paramshare convert "
            f"{shlex.quote(known.workdir)} --model NAME` gives its weights to a shared network"
        )
    folded = fold(
        run.model,
        variables,
        _image(run),
        threshold=known.threshold,
        scale=not known.drop_scales,
        banks=known.banks,
        by=known.by,
        train=False,
    )
    if not known.json:
        print(folded, end="\n\n")
    tied = [tied_text(folded.shared.layout[bank.name]) for bank in folded.banks if not bank.note]
    told = {"threshold": folded.threshold, "scales": not known.drop_scales, "banks": [dataclasses.asdict(bank) for bank in folded.banks]}
    if not folded.changed:
        if known.json:
            print(json.dumps(told))
        else:
            print("nothing was folded" + (f"; {known.output} was not made" if known.output else ""))
        return 0
    kept = [entry for entry in run.config.model.tied if entry.rpartition("=")[0] not in {text.rpartition("=")[0] for text in tied}]
    fresh = _prepared(run, known, rest, tied=(*kept, *tied))
    return _finish(known, run, fresh, variables, folded.variables, told, step)


def _convert(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.analysis.conversion import bake, convert
    from paramshare.analysis.factorise import factorise
    from paramshare.shared import Shared
    from paramshare.training.derive import training_images

    run, variables, step = _trained(known)
    target = _prepared(run, known, rest, name=known.model, tied=())
    dense = bake(run.model, variables) if isinstance(run.model, Shared) else variables
    told: dict[str, Any] = {"model": known.model}
    fresh = dense
    if isinstance(target.model, Shared):
        if getattr(target.model.model, "rank", 0) and not getattr(_plain(run.model), "rank", 0):
            converted = factorise(target.model, dense, next(training_images(run, 1)))
        else:
            converted = convert(target.model, dense, _image(run), train=False)
        fresh = converted.variables
        told["banks"] = [dataclasses.asdict(bank) for bank in converted.banks]
        if not known.json:
            print(converted, end="\n\n")
    return _finish(known, run, target, variables, fresh, told, step)


def _plain(model: Any) -> Any:
    return getattr(model, "model", model)


def _image(run: "Run") -> Any:
    """One test image, normalised."""
    import jax.numpy as jnp

    from paramshare.training.data import normalise

    return normalise(jnp.asarray(run.data.test[0]["image"])[None], run.data.mean, run.data.std)


def _prepared(run: "Run", known: argparse.Namespace, rest: list[str], **model: Any) -> "Run":
    """The new run: the old one's configuration with another network, and the command line's overrides."""
    from paramshare.training.derive import fine_tuning, with_model
    from paramshare.training.run import prepare

    config = with_model(run.config, **model)
    return prepare(override(fine_tuning(config, known.fine_tune) if known.fine_tune else config, rest, "CONFIG"))


def _finish(
    known: argparse.Namespace,
    run: "Run",
    fresh: "Run",
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    told: dict[str, Any],
    step: int,
) -> int:
    """Measures the new network beside the old one, tells, and makes its workdir."""
    from paramshare.analysis.report import SCORES
    from paramshare.shared import count
    from paramshare.training.derive import begin, check_variables, training_images
    from paramshare.training.evaluation import make_evaluate
    from paramshare.training.loop import fit
    from paramshare.training.run import prepare

    after = check_variables(fresh, after)
    batches = 0
    if known.reestimate:
        from paramshare.analysis.batch_statistics import reestimate

        alone = dataclasses.replace(fresh.config, model=dataclasses.replace(fresh.config.model, sync_batch_norm=False))
        images = list(training_images(run, known.reestimate))
        after, batches = reestimate(prepare(alone).model, after, images, train=True), len(images)
    found = {
        name: make_evaluate(its)(variables, run.data.test) for name, its, variables in (("before", run, before), ("after", fresh, after))
    }
    counts = {"before": count(before)["trainable"], "after": count(after)["trainable"]}
    told = {"command": known.command, "workdir": str(known.workdir), "checkpoint": known.checkpoint, "step": step} | told
    told |= {"reestimated_batches": batches, "trainable": counts, "test": found}
    if known.output:
        begin(fresh, after, known.output, told)
    if known.fine_tune:
        result = fit(fresh, known.output, quiet=known.json)
        told["test"]["fine_tuned"] = result["last"]["test"]
    if known.json:
        print(json.dumps(told))
        return 0
    score = run.data.task.score
    for name, its in found.items():
        trainable = counts.get(name, counts["after"])
        print(f"{name.replace('_', '-'):<14} {trainable:,} trainable, test {SCORES[score]} {its[score]:.2%}, loss {its['loss']:.4f}")
    if known.output:
        on = "" if known.fine_tune else f"; train it on with: paramshare train --workdir {shlex.quote(known.output)}"
        print(f"workdir        {known.output}{on}")
    return 0
