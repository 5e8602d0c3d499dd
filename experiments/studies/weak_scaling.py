"""Weak scaling: time and communication of a step against the number of devices.

    python experiments/studies/weak_scaling.py --out runs/weak_scaling

Measured: a plain network, the same network with shared banks, and with its banks divided over the
devices (`--shard-banks`), on 1, 2, 4 and 8 devices that XLA makes of one CPU. The batch on each
device stays the same. Bytes of collective operations are read off the compiled program, bytes of
banks and their optimizer state off the arrays of a device.

On paper: the time of the collective operations of larger networks on 256 and 4,096 devices. A ring
all-reduce of n bytes sends 2 (D - 1) / D n bytes from each device, an all-gather and a
reduce-scatter (D - 1) / D n each. Divided by the published peak bandwidth of a device's links this
gives a lower bound; latency, contention and overlap with computation are left out.
"""

import argparse
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import sweep

VARIANTS = {
    "plain": ("wrn-16-1", False),
    "shared": ("swrn-16-1-2", False),
    "shared, banks divided": ("swrn-16-1-2", True),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter")
LARGE = {
    "wrn-28-10": ("wrn-28-10", False),
    "swrn-28-10-2": ("swrn-28-10-2", False),
    "swrn-28-10-2, banks divided": ("swrn-28-10-2", True),
}
# Published peak bandwidth of all links of one device, in one direction, in bytes per second.
LINKS = {
    "TPU v4, 2,400 Gbit/s": 2.4e12 / 8,
    "TPU v5p, 4,800 Gbit/s": 4.8e12 / 8,
    "InfiniBand NDR, 400 Gbit/s": 4e11 / 8,
}
SIZES = {"f32": 4, "bf16": 2, "pred": 1, "s32": 4, "f64": 8, "u32": 4}


def moved(text: str) -> dict[str, int]:
    """Bytes of the results of each collective operation in a compiled program."""
    totals: dict[str, int] = dict.fromkeys(COLLECTIVES, 0)
    for line in text.splitlines():
        found = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
        if found:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
                count = math.prod(int(n) for n in shape.split(",") if n)
                totals[found[2]] += SIZES[dtype] * count
    return totals


def measure(name: str, divided: bool, per_device: int, steps: int) -> dict[str, Any]:
    """In this process, on all devices that JAX has: one step, timed."""
    import jax
    import numpy as np

    from paramshare.data import ArraySource
    from paramshare.training.config import Config, Model, Schedule
    from paramshare.training.run import prepare
    from paramshare.training.slices import is_sliced
    from paramshare.training.step import make_train_step

    size = per_device * jax.device_count()
    config = Config(
        Model(name),
        schedule=Schedule("constant"),
        batch_size=size,
        mapping="shard_map",
        shard_banks=divided,
    )
    run = prepare(config)
    step = run.devices.map(make_train_step(run, 0), donate=True, divided=run.divided(run.shapes))
    state = run.place(run.init())
    assert isinstance(run.data.train, ArraySource)
    batch = run.devices.cut(run.data.train.take(np.arange(size)).arrays)
    text = jax.jit(step).lower(state, None, batch).compile().as_text() or ""
    banks = sum(
        leaf.addressable_shards[0].data.nbytes
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if is_sliced(path)
    )
    times = []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, None, batch))
        times.append(time.perf_counter() - begin)
    return {"banks": banks, "milliseconds": 1000 * sorted(times[2:])[steps // 2], **moved(text)}


def measured(per_device: int, steps: int) -> str:
    """The table of what was measured, each in a process of its own."""
    rows = []
    for label, (name, divided) in VARIANTS.items():
        for devices in (1, 2, 4, 8):
            command = [sys.executable, __file__, "--measure", name, str(int(divided))]
            command += ["--per-device", str(per_device), "--steps", str(steps)]
            flags = f"--xla_force_host_platform_device_count={devices}"
            env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            values = json.loads(output.stdout.splitlines()[-1])
            bytes_of = [f"{values[kind]:,}" for kind in COLLECTIVES]
            speed = f"{values['milliseconds']:.0f}"
            rows.append((label, devices, f"{values['banks']:,}", *bytes_of, speed))
            print(rows[-1], flush=True)
    head = ("network", "devices", "banks and optimizer state, bytes a device", *COLLECTIVES)
    return sweep.table((*head, "step, ms"), rows)


def on_paper() -> str:
    """The table of lower bounds of communication."""
    from paramshare.measure.cost import cost
    from paramshare.zoo import create_model

    rows = []
    for label, (name, divided) in LARGE.items():
        for devices in (256, 4096):
            whole = cost(create_model(name), (32, 32, 3), devices=devices)
            part = whole.divided if divided else {"all_reduce": whole.all_reduce}
            share = (devices - 1) / devices
            sent = share * (
                2 * part["all_reduce"] + part.get("all_gather", 0) + part.get("reduce_scatter", 0)
            )
            times = [f"{1000 * sent / speed:.2f}" for speed in LINKS.values()]
            rows.append((label, f"{devices:,}", f"{sent / 1e6:.1f}", *times))
    return sweep.table(
        ("network", "devices", "MB sent by each", *(f"{link}: ms" for link in LINKS)), rows
    )


def main() -> None:
    """Runs the study, or one measurement of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--per-device", type=int, default=16, help="examples on each device")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "DIVIDED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, divided = args.measure
        print(json.dumps(measure(name, divided == "1", args.per_device, args.steps)))
        return
    if args.out is None:
        parser.error("--out DIR is missing")
    args.out.mkdir(parents=True, exist_ok=True)
    tables = [measured(args.per_device, args.steps), on_paper()]
    sweep.publish(args.out, "\n\n".join(tables), sweep.provenance())


if __name__ == "__main__":
    main()
