"""`paramshare compress`."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from paramshare.cli.derive import (
    EPILOG,
    add_common_options,
    derive_run,
    describe,
    load_source,
    target_run,
)
from paramshare.cli.errors import CommandError
from paramshare.storage import is_new, run_path

if TYPE_CHECKING:
    from paramshare.training.config import Compression
    from paramshare.training.run import Run
    from paramshare.transform.packing import Packed


def add(command: Any) -> None:
    """Declares the command."""
    compress = command(
        "compress",
        _compress,
        "prune and quantise the banks of a trained network, and store it packed",
        takes_overrides=True,
        epilog=f"{EPILOG} Rerun the same command to resume fine-tuning.",
    )
    compress.add_argument("workdir", metavar="WORKDIR", help="run of a shared network")
    compress.add_argument(
        "--bits", type=int, metavar="N", help="round each parameter to one of 2^N levels, N 2 to 8"
    )
    compress.add_argument(
        "--method",
        choices=("kmeans", "uniform"),
        default="kmeans",
        help="levels: a codebook by k-means (the default), or a uniform grid",
    )
    compress.add_argument(
        "--prune",
        type=float,
        default=0.0,
        metavar="P",
        help="set this fraction of each bank's parameters to 0, in [0, 1)",
    )
    compress.add_argument(
        "--gradual",
        action="store_true",
        help="prune over the first half of fine-tuning instead of at once; without --bits",
    )
    compress.add_argument(
        "--banks",
        nargs="+",
        default=[],
        metavar="BANK",
        help="compress only these banks (regular expressions that match whole names)",
    )
    add_common_options(compress)


def _compress(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.shared import Shared
    from paramshare.training.compression import further, pack_run
    from paramshare.training.workdir import stored_variables
    from paramshare.transform.compress import (
        banks_table,
        compressed_banks,
        prune,
        quantise,
    )
    from paramshare.transform.packing import PACKED

    asked, resume = _settings(args), _is_begun(args)
    run, variables, step = load_source(args, overrides, resume=resume)
    if not isinstance(run.model, Shared):
        raise CommandError(
            f"{run.config.model.name} shares no weights, so it has no banks to compress; give the "
            "run of a shared network"
        )
    settings = further(run.config.compression, asked)
    target = target_run(dataclasses.replace(run.config, compression=settings), args, overrides)
    settings = target.config.compression
    shared, start = run.model, variables
    if not settings.gradual:
        start = prune(shared, start, settings.prune, settings.banks)
    if settings.bits is not None:
        shared, start = quantise(shared, start, settings.bits, settings.method, settings.banks)
    if resume:
        _check_same(args.output, target)
    details = dataclasses.asdict(settings)
    derived = derive_run(args, run, variables, target, start, step, details, resume=resume)
    final = derived.variables
    if args.output:
        final, step = stored_variables(run_path(args.output), target.shapes, "last")
    assert isinstance(target.model, Shared)
    final, packed = pack_run(target.model, final, run_path(args.output) if args.output else None)
    banks = compressed_banks(variables, final)
    if args.json:
        about = {"banks": [dataclasses.asdict(bank) for bank in banks], "bytes": packed.as_json()}
        print(json.dumps(derived.as_json() | about))
        return 0
    print(banks_table(banks), end="\n\n")
    print(describe(derived, args))
    print(describe_bytes(packed, f"{args.output}/{PACKED}" if args.output else ""))
    return 0


def _settings(args: argparse.Namespace) -> "Compression":
    """The options as a configuration."""
    from paramshare.training.config import Compression

    if args.bits is not None and not 2 <= args.bits <= 8:
        raise CommandError(f"--bits is {args.bits}; it must be from 2 to 8")
    if not 0 <= args.prune < 1:
        raise CommandError(f"--prune is {args.prune:g}; it must be a fraction in [0, 1)")
    if args.bits is None and not args.prune:
        raise CommandError("nothing to do; give --bits, --prune or both")
    if args.gradual and (not args.prune or args.bits is not None or not args.fine_tune):
        raise CommandError(
            "--gradual prunes while the network is fine-tuned; it needs --prune and --fine-tune, "
            "and no --bits: quantise the pruned run afterwards"
        )
    return Compression(args.bits, args.method, args.prune, args.gradual, tuple(args.banks))


def _is_begun(args: argparse.Namespace) -> bool:
    """Whether the output is a run that this command has begun from the same variables."""
    from paramshare.training.workdir import stored_origin

    if args.output is None or is_new(run_path(args.output)):
        return False
    origin = stored_origin(run_path(args.output))
    expected = ("compress", str(args.workdir), args.checkpoint)
    return tuple(map(origin.get, ("command", "workdir", "checkpoint"))) == expected


def _check_same(output: str, target: "Run") -> None:
    from paramshare.training.workdir import differences, stored_config

    changed = differences(run_path(output), target, stored_config(run_path(output)))
    if changed:
        raise CommandError(
            f"{output} was begun with other options ({'; '.join(changed)}); give --output a folder "
            "that does not exist, or the same options"
        )


def describe_bytes(packed: "Packed", file: str = "") -> str:
    """Two lines: bytes of the arrays, and of the packed file."""
    sizes = packed.as_json()
    lines = []
    for name, title in (("arrays", "float32"), ("packed", "packed")):
        parts = ", ".join(f"{x} {size:,}" for x, size in sizes[name].items() if x != "total")
        lines.append(f"{title:<14} {sizes[name]['total']:,} bytes ({parts})")
    return "\n".join(lines) + (f" in {file}" if file else "")
