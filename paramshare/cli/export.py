"""`paramshare export`."""

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from typing import Any

from paramshare.cli.errors import CommandError
from paramshare.cli.parsing import add_checkpoint
from paramshare.storage import is_new, local_path

FORMS = ("trained", "baked", "looped")


def add(command: Any) -> None:
    """Declares the command."""
    export = command(
        "export",
        _export,
        "write a trained network as a program and a file of parameters that run without paramshare",
    )
    export.add_argument("workdir", metavar="WORKDIR", help="of a training run")
    export.add_argument(
        "--output",
        metavar="DIR",
        required=True,
        help="a new folder for the program, the parameters and a script that runs them",
    )
    export.add_argument(
        "--form",
        choices=FORMS,
        default="trained",
        help="trained (the default): with its banks, so that the file is small and the program "
        "computes the kernels; baked: with every kernel stored; looped: a folded run, with loops",
    )
    export.add_argument(
        "--predictions",
        action="store_true",
        help="return what the outputs stand for, such as boxes and scores, in pixels of the inputs "
        "(without the mirror images that evaluation of poses averages over)",
    )
    add_checkpoint(export)


def _export(args: argparse.Namespace, overrides: list[str]) -> int:
    import jax
    import numpy as np

    from paramshare.shared import Shared, count
    from paramshare.training.derive import load_run
    from paramshare.transform.compress import finalise
    from paramshare.transform.conversion import bake
    from paramshare.transform.export import ABOUT, export
    from paramshare.transform.looping import loop

    if not is_new(local_path(args.output)):
        raise CommandError(f"{args.output} exists; give --output a folder that does not exist")
    run, variables, step = load_run(args.workdir, args.checkpoint)
    model, packed = run.model, run.config.compression.active and args.form == "trained"
    if isinstance(model, Shared):
        model, variables = finalise(model, variables)  # a compressed run stores rounded numbers
    if args.form != "trained" and not isinstance(model, Shared):
        raise CommandError(
            f"{run.config.model.name} shares no weights, so there is nothing to bake or to loop; "
            "leave out --form"
        )
    if isinstance(model, Shared) and args.form == "baked":
        model, variables = model.model, bake(model, variables)
    elif isinstance(model, Shared) and args.form == "looped":
        looped = loop(model, variables, unroll=False)  # the same program on every machine
        model, variables = looped.model, looped.variables
        print(looped, end="\n\n")
    example = np.asarray(run.data.test[0]["input"])
    inputs = jax.ShapeDtypeStruct((1, *example.shape), example.dtype)
    mean, std = run.data.mean, run.data.std
    options: dict[str, Any] = {"mean": mean, "std": std, "train": False}
    if args.predictions:
        options["predict"] = lambda outputs: run.task.predict(outputs, run.data.input_shape)
    folder = export(model, variables, args.output, inputs, packed=packed, **options)
    about = json.loads((folder / ABOUT).read_text())
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{run.config.model.name} ({args.form}), {args.checkpoint} state, step {step:,}: "
        f"{count(variables)['trainable']:,} trainable parameters"
    )
    takes, gives = _describe(about["inputs"]), _describe(about["outputs"])
    print(f"folder         {args.output}, {size:,} bytes; takes {takes}, gives {gives}")
    script = shlex.quote(os.path.join(args.output, "run.py"))
    print(f"run it with    python {script} (needs jax, flatbuffers and numpy; prints its usage)")
    return 0


def _describe(arrays: Mapping[str, Any]) -> str:
    """Names, dtypes and shapes of inputs or outputs."""
    return ", ".join(
        f"{name} ({array['dtype']} {'x'.join(map(str, array['shape'][1:]))})"
        for name, array in arrays.items()
    )
