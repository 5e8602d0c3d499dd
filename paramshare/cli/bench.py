"""The command that measures time and memory."""

import argparse
import json
from typing import Any

from paramshare.cli.errors import CommandError
from paramshare.ops import FORMS

WHATS = ("step", "forward", "baked", "generation")  # as in training/bench.py, not loaded for --help


def add(command: Any) -> None:
    """Declares the command."""
    bench = command(
        "bench",
        _bench,
        "measure time and memory of networks, one against the other",
        description="Times networks in turn on random images or tokens. Ratios are to the last "
        "program of the table, medians over the rounds. A single network that shares parameters is "
        "compared with the plain one, and the making of kernels with a copy.",
    )
    bench.add_argument("names", nargs="+", metavar="NAME", help="of a network, such as swrn-28-2-2")
    bench.add_argument(
        "--what",
        nargs="+",
        choices=WHATS,
        default=["step"],
        help="a training step (the default), a forward pass, a forward pass of stored kernels, or "
        "making all kernels from the banks",
    )
    bench.add_argument("--batch-size", type=int, default=64, metavar="N")
    bench.add_argument(
        "--input-shape",
        type=int,
        nargs="+",
        metavar="N",
        help="height, width and channels of images, or the length of sequences of tokens",
    )
    bench.add_argument("--num-classes", type=int, metavar="N")
    bench.add_argument(
        "--bfloat16", action="store_true", help="compute in bfloat16; kernels are made in float32"
    )
    bench.add_argument("--devices", type=int, metavar="N", help="of a step; all by default")
    bench.add_argument("--mapping", choices=("pmap", "shard_map"), help="of a step")
    bench.add_argument(
        "--ops",
        nargs="+",
        choices=FORMS,
        default=["auto"],
        help="forms of operations; every network is measured with each",
    )
    bench.add_argument("--rounds", type=int, default=10, metavar="N", help="times of each program")
    bench.add_argument("--json", action="store_true", help="print JSON")


def _bench(args: argparse.Namespace, overrides: list[str]) -> int:
    from paramshare.training.bench import bench

    for option, value in (("--devices", args.devices), ("--mapping", args.mapping)):
        if value is not None and "step" not in args.what:
            raise CommandError(
                f"{option} is {value}, but concerns training steps only; leave it out, or add step "
                "to --what"
            )
    if args.bfloat16 and args.what == ["generation"]:
        raise CommandError(
            "--bfloat16 does not concern generation, which makes kernels in float32; leave it out"
        )
    results = []
    for what in args.what:
        result = bench(
            what,
            args.names,
            batch_size=args.batch_size,
            input_shape=tuple(args.input_shape) if args.input_shape else None,
            num_classes=args.num_classes,
            bfloat16=args.bfloat16,
            devices=args.devices,
            mapping=args.mapping or "pmap",
            forms=args.ops,
            rounds=args.rounds,
        )
        results.append(result)
        if not args.json:
            print(result, flush=True)
    if args.json:
        print(json.dumps([json.loads(result.as_json()) for result in results], indent=2))
    return 0
