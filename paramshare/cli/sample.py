"""`paramshare sample`."""

import argparse
from typing import Any

from paramshare.cli.errors import CommandError
from paramshare.cli.parsing import add_checkpoint

MOST = 10**6  # tokens


def add(command: Any) -> None:
    """Declares the command."""
    sample = command("sample", _sample, "let a network that was trained on text continue a prompt")
    sample.add_argument("workdir", metavar="WORKDIR", help="of a training run on text")
    sample.add_argument(
        "--prompt", help="the text to continue (default: a line break, or the first character)"
    )
    sample.add_argument(
        "--length", type=int, default=200, metavar="N", help="tokens to draw (default: 200)"
    )
    sample.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divides the logits: less is safer, 0 takes the likeliest token (default: 0.8)",
    )
    sample.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from the K likeliest tokens; 0, the default, for all",
    )
    sample.add_argument("--seed", type=int, default=0, metavar="SEED")
    add_checkpoint(sample)


def _sample(args: argparse.Namespace, overrides: list[str]) -> int:
    import jax
    import jax.numpy as jnp

    from paramshare.data import DataError
    from paramshare.models import sample
    from paramshare.shared import Shared
    from paramshare.training.derive import load_run
    from paramshare.transform.conversion import bake

    if not 1 <= args.length <= MOST:
        raise CommandError(f"--length is {args.length}; it must be 1 to {MOST:,} tokens")
    if not 0 <= args.temperature < float("inf"):
        raise CommandError(f"--temperature is {args.temperature}; it must be 0 or positive")
    if args.top_k < 0:
        raise CommandError(f"--top-k is {args.top_k}; it must be a number of tokens, or 0 for all")
    if not 0 <= args.seed < 2**32:
        raise CommandError(f"--seed is {args.seed}; it must be from 0 to 2^32 - 1")
    run, variables, _ = load_run(args.workdir, args.checkpoint)
    vocabulary = run.data.vocabulary
    if vocabulary is None:
        raise CommandError(
            f"{args.workdir} was trained on {run.data.name!r}, which is no text; sample from a run "
            "with --data.name text"
        )
    prompt = args.prompt
    if prompt is None:
        prompt = vocabulary.characters[0] if vocabulary.characters else "\n"
        prompt = "\n" if "\n" in vocabulary.characters else prompt
    if not prompt:
        raise CommandError("--prompt is empty; give at least one character, or leave it out")
    try:
        tokens = vocabulary.encode(prompt)
    except DataError as error:
        raise CommandError(f"--prompt: {error}") from None
    model = run.model
    if isinstance(model, Shared):  # kernels are made once, not for each token
        model, variables = model.model, bake(model, variables)
    drawn = sample(
        model,
        variables,
        jnp.asarray(tokens)[None],
        args.length,
        jax.random.key(args.seed),
        temperature=args.temperature,
        top_k=args.top_k,
    )
    print(prompt + vocabulary.decode(jax.device_get(drawn)[0]))
    return 0
