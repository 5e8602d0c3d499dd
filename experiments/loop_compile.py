"""What a loop saves in compiling, and what it costs in running: `jax.lax.scan` against the same loop unrolled, by depth.

    python experiments/loop_compile.py

A residual network of two stages, the second with 10, 40 or 100 blocks that use two kernels in turn. For each depth and form the gradient
of a training step is compiled and run: seconds to trace, and to compile; instructions in the optimized program; milliseconds for the
forward pass and for the gradient. Times are the process's own (user and system, all threads), which change little when other work runs
beside it; of runs, the least of a few, and in brackets the clock's. About five minutes of processor time.
"""

import argparse
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paramshare.models import Loop, ResNet


def network(blocks: int, width: int, unroll: bool) -> ResNet:
    """One block, then one more and `blocks` that loop."""
    loop = Loop(("conv1/kernel", "conv2/kernel"), groups=((0, 1),) * blocks)
    return ResNet((1, 1 + blocks), (width, width), 10, stem="cifar", stem_width=width, loops=(None, loop), unroll=unroll)


def seconds(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Of the process and of the clock; and what the call returned."""
    process, clock = time.process_time(), time.perf_counter()
    value = jax.block_until_ready(call())
    return time.process_time() - process, time.perf_counter() - clock, value


def measure(blocks: int, width: int, size: int, batch: int, unroll: bool, repeats: int) -> dict[str, str]:
    """One row of the table."""
    model = network(blocks, width, unroll)
    x_BxHxWxC = jax.random.normal(jax.random.key(1), (batch, size, size, 3))
    variables = jax.jit(model.clone(unroll=False).init)(jax.random.key(0), x_BxHxWxC)  # the same for both forms

    def loss(params: Any, batch_stats: Any, x_BxHxWxC: jax.Array) -> tuple[jax.Array, Any]:
        y_BxC, state = model.apply({"params": params, "batch_stats": batch_stats}, x_BxHxWxC, train=True, mutable=["batch_stats"])
        return jnp.mean(y_BxC**2), state

    arguments = variables["params"], variables["batch_stats"], x_BxHxWxC
    forward = jax.jit(loss).lower(*arguments).compile()
    trace, _, lowered = seconds(lambda: jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arguments))
    compiling, _, compiled = seconds(lambda: lowered.compile())
    program = compiled.as_text() or ""
    row = {
        "blocks": str(blocks),
        "width": str(width),
        "form": "unrolled" if unroll else "scan",
        "trained numbers": f"{sum(leaf.size for leaf in jax.tree.leaves(variables['params'])):,}",
        "trace, s": f"{trace:.2f}",
        "compile, s": f"{compiling:.1f}",
        "instructions": f"{len(re.findall(r'^ +(?:ROOT )?%?[^ =]+ = ', program, re.MULTILINE)):,}",
        "whiles": str(len(re.findall(r" while\(", program))),
    }
    for name, step in (("forward", forward), ("gradient", compiled)):
        jax.block_until_ready(step(*arguments))
        times = [seconds(lambda step=step: step(*arguments))[:2] for _ in range(repeats)]
        row[f"{name}, ms (clock)"] = f"{1e3 * min(p for p, _ in times):.0f} ({1e3 * min(c for _, c in times):.0f})"
    return row


def main() -> None:
    """Runs what the command line says, and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[10, 40, 100])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--size", type=int, default=16, help="of the images; the second stage has half of it")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    known = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {known.size}x{known.size} images, batch {known.batch}\n")
    for number, blocks in enumerate(known.blocks):
        for unroll in (True, False):
            row = measure(blocks, known.width, known.size, known.batch, unroll, known.repeats)
            if number == 0 and unroll:
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            print(f"| {' | '.join(row.values())} |", flush=True)


if __name__ == "__main__":
    main()
