"""`paramshare export`."""

import argparse
import json
import os
import pathlib
import shlex
from typing import Any

from paramshare.cli.errors import CommandError

FORMS = ("trained", "baked", "looped")


def add(command: Any) -> None:
    """Declares the command."""
    export = command("export", _export, "write a trained network as a program and a file of numbers that run without paramshare")
    export.add_argument("workdir", metavar="WORKDIR", help="of a training run")
    export.add_argument("--output", metavar="DIR", required=True, help="a new folder for program, variables and how to run them")
    export.add_argument(
        "--form",
        choices=FORMS,
        default="trained",
        help="as it was trained, banks and all: few numbers, kernels are made in the program; with every kernel written out; or, of a "
        "folded run, with its loops",
    )
    export.add_argument("--checkpoint", choices=("last", "best"), default="last", help="the last state, or the one that validation chose")


def _export(known: argparse.Namespace, rest: list[str]) -> int:
    from paramshare.analysis.conversion import bake
    from paramshare.analysis.export import ABOUT, export
    from paramshare.analysis.looping import loop
    from paramshare.shared import Shared, count
    from paramshare.training.derive import trained

    if pathlib.Path(known.output).exists():
        raise CommandError(f"{known.output} exists; give --output a folder that does not")
    run, variables, step = trained(known.workdir, known.checkpoint)
    model = run.model
    if known.form != "trained" and not isinstance(model, Shared):
        raise CommandError(f"{run.config.model.name} shares nothing, so there is nothing to bake or to loop; leave out --form")
    if isinstance(model, Shared) and known.form == "baked":
        model, variables = model.model, bake(model, variables)
    elif isinstance(model, Shared) and known.form == "looped":
        looped = loop(model, variables, unroll=False)  # whatever this machine would choose
        model, variables = looped.model, looped.variables
        print(looped, end="\n\n")
    folder = export(model, variables, known.output, run.data.image_shape, mean=run.data.mean, std=run.data.std, train=False)
    height, width, channels = run.data.image_shape
    sizes = json.loads((folder / ABOUT).read_text())["output"]["shape"][1:]
    logits = "x".join(map(str, sizes)) + (" logits, one a cell" if sizes == [height, width] else " logits")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{run.config.model.name} ({known.form}), {known.checkpoint} state, step {step:,}: {count(variables)['trainable']:,} numbers")
    print(f"folder         {known.output}, {size:,} bytes; takes uint8 images of {height}x{width}x{channels}, gives {logits}")
    script = shlex.quote(os.path.join(known.output, "run.py"))
    files = "IMAGES.npy" if len(sizes) == 1 else "IMAGES.npy LOGITS.npy"
    print(f"run it with    python {script} {files} (jax, flatbuffers and numpy are all it needs)")
    return 0
