"""Accuracy of rings whose slots are shuffled in blocks, which is faster than one by one.

    python experiments/studies/ring_blocks.py experiments/recipes/quickstart.py \\
        --model resnet14 --rings 341 1705 22906 --blocks 1 8 32 128 --out runs/ring_blocks

Further options override the configuration. All convolutions of the stages are generated from one
ring, as in `MODEL-rpg-SIZE`. Every run has its own workdir in DIR; rerun the study to continue it.
Writes DIR/table.md: means over seeds, and differences from blocks of 1, seed by seed, with 95%
intervals of the t distribution.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import sweep

from paramshare import Plan, Ring, Rule, create_model, share
from paramshare.cli import run_command
from paramshare.report.path_pictures import interval
from paramshare.training.loop import fit
from paramshare.training.result import Result
from paramshare.training.run import prepare

SITES = r"stage\d/block\d+/(conv\d|shortcut)/kernel"  # as in paramshare/zoo/ring.py


def main() -> None:
    """Runs the study that the command line describes."""
    parser = sweep.parser(__doc__ or "", seeds=range(5))
    parser.add_argument("--model", default="resnet14", help="a plain network")
    parser.add_argument("--rings", nargs="+", type=int, required=True, help="sizes")
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 8, 32, 128])
    args, base = sweep.parse(parser)
    base = sweep.with_network(base, args.model)
    results: dict[tuple[int, int], list[Result]] = {}
    for seed in args.seeds:
        for size in args.rings:
            for block in args.blocks:
                config = dataclasses.replace(base, seed=seed)
                run = prepare(config)
                shape, options = run.data.input_shape, run.task.network_options()
                plain = create_model(args.model, input_shape=shape, **options)
                ring = Ring(size, block=block, initial="paper")
                image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
                model = share(plain, Plan(Rule(SITES, ring, bank="ring")), image)
                named = prepare(config, model=model, data=run.data)
                workdir = args.out / f"ring{size}-block{block}-seed{seed}"
                results.setdefault((size, block), []).append(fit(named, workdir))
    rows = []
    for (size, block), runs in results.items():
        scores = [result.last_score for result in runs]
        first = [result.last_score for result in results[size, args.blocks[0]]]
        behind = [a - b for a, b in zip(scores, first, strict=True)]
        mean, half = interval(behind)
        difference = f"{mean:+.2%} ± {half:.2%}" if block != args.blocks[0] else ""
        each = ", ".join(f"{score:.2%}" for score in scores)
        rows.append([f"{size:,}", block, sweep.mean_and_std(scores), difference, each])
    head = ["ring", "block", "accuracy, mean (std)", f"against blocks of {args.blocks[0]}", "seeds"]
    last = next(iter(results.values()))[-1]
    sweep.publish(args.out, sweep.table(head, rows), sweep.provenance(last))


if __name__ == "__main__":
    sys.exit(run_command(main))
