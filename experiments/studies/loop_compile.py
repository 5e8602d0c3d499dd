"""What a loop saves in compilation and costs at run time: `jax.lax.scan` against unrolled.

    python experiments/studies/loop_compile.py

A residual network of two stages; the second has 10, 40 or 100 blocks that use two kernels in turn.
For each depth and form the gradient of a training step is compiled and run. The table shows seconds
to trace and to compile, instructions in the optimized program, and milliseconds for the forward
pass and for the gradient. Times are CPU times of the process (user and system, all threads), which
change little when other work runs beside it; run times are the minimum of a few, with the minimum
wall time in brackets. About five minutes of CPU time.
"""

import argparse
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paramshare import count
from paramshare.models import ResNet
from paramshare.transform.looped import Loop, LoopedStages


def network(blocks: int, width: int, unroll: bool) -> ResNet:
    """A stage of one block, then a stage of one block and `blocks` more in a loop."""
    loop = Loop(("conv1/kernel", "conv2/kernel"), groups=((0, 1),) * blocks)
    return ResNet(
        (1, 1 + blocks),
        (width, width),
        10,
        stem="cifar",
        stem_width=width,
        stage=LoopedStages({"stage2": loop}, unroll=unroll),
    )


def seconds(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds, wall seconds, and what the call returned."""
    process, clock = time.process_time(), time.perf_counter()
    value = jax.block_until_ready(call())
    return time.process_time() - process, time.perf_counter() - clock, value


def measure(
    blocks: int, width: int, size: int, batch: int, unroll: bool, repeats: int
) -> dict[str, str]:
    """One row of the table."""
    model = network(blocks, width, unroll)
    x_BxHxWxC = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    # Both forms have the same variables.
    variables = jax.jit(network(blocks, width, unroll=False).init)(jax.random.key(0), x_BxHxWxC)

    def loss(params: Any, batch_stats: Any, x_BxHxWxC: jax.Array) -> tuple[jax.Array, Any]:
        y_BxC, state = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x_BxHxWxC,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean(y_BxC**2), state

    arguments = variables["params"], variables["batch_stats"], x_BxHxWxC
    forward = jax.jit(loss).lower(*arguments).compile()
    trace, _, lowered = seconds(
        lambda: jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arguments)
    )
    compiling, _, compiled = seconds(lambda: lowered.compile())
    program = compiled.as_text() or ""
    row = {
        "blocks": str(blocks),
        "width": str(width),
        "form": "unrolled" if unroll else "scan",
        "trainable parameters": f"{count(variables)['trainable']:,}",
        "trace, s": f"{trace:.2f}",
        "compile, s": f"{compiling:.1f}",
        "instructions": f"{len(re.findall(r'^ +(?:ROOT )?%?[^ =]+ = ', program, re.MULTILINE)):,}",
        "whiles": str(len(re.findall(r" while\(", program))),
    }
    for name, step in (("forward", forward), ("gradient", compiled)):
        jax.block_until_ready(step(*arguments))
        times = [seconds(lambda step=step: step(*arguments))[:2] for _ in range(repeats)]
        row[f"{name}, ms (clock)"] = (
            f"{1e3 * min(p for p, _ in times):.0f} ({1e3 * min(c for _, c in times):.0f})"
        )
    return row


def main() -> None:
    """Measures what the command line asks for and prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 40, 100])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument(
        "--size", type=int, default=16, help="side of the images; the second stage has half of it"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"{args.size}x{args.size} images, batch {args.batch}\n"
    )
    for number, blocks in enumerate(args.blocks):
        for unroll in (True, False):
            row = measure(blocks, args.width, args.size, args.batch, unroll, args.repeats)
            if number == 0 and unroll:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(row.values())} |", flush=True)


if __name__ == "__main__":
    main()
