"""Shares a Flax model of HuggingFace's transformers, unmodified.

    pip install "transformers<5"                   # the last versions with Flax models
    python experiments/studies/huggingface.py      # BERT and GPT-2 with random weights, offline
    python experiments/studies/huggingface.py --pretrained gpt2    # downloads weights

For each model: which weights recur, a plan without regular expressions, and three checks. The
shared network equals its written-out form in the original class; a network converted from the
original's weights at full rank equals the original; and it trains.
"""

import argparse
import os
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import paramshare
from paramshare import ParamshareError, Plan, Relaxed, Soft, Tied
from paramshare.cli import run_command

os.environ["USE_TORCH"] = "0"
SMALL = {"num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4}


def main() -> None:
    """Shares each model and prints what was checked."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--pretrained", metavar="NAME", help="a model of the hub, instead")
    args = parser.parse_args()
    try:
        import transformers  # pyright: ignore[reportMissingImports]
        from transformers import FlaxAutoModel  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ParamshareError(f'{error}; pip install "transformers<5"') from None
    print(f"transformers {transformers.__version__}, jax {jax.__version__}")
    if args.pretrained:
        check(FlaxAutoModel.from_pretrained(args.pretrained))
        return
    bert = transformers.BertConfig(vocab_size=100, intermediate_size=128, **SMALL)
    gpt2 = transformers.GPT2Config(vocab_size=100, n_layer=6, n_embd=64, n_head=4)
    for config in (bert, gpt2):
        check(FlaxAutoModel.from_config(config, seed=0, input_shape=(1, 8)))


def check(hub_model: Any) -> None:
    """Shares the Linen module inside a model of the hub."""
    module, dense = hub_model.module, {"params": hub_model.params}
    tokens = jnp.arange(16).reshape(2, 8)
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(8), tokens.shape)
    inputs = (tokens, ones, positions)
    if "Bert" in type(module).__name__:  # it also takes the types of tokens
        inputs = (tokens, ones, 0 * ones, positions)
    options: dict[str, Any] = {"deterministic": True, "return_dict": False}

    def outputs(model: nn.Module, variables: Any) -> jax.Array:
        return jax.jit(lambda v: model.apply(v, *inputs, **options))(variables)[0]

    def shared(scheme: Any) -> paramshare.Shared:
        plan = Plan.blocks(module, *inputs, scheme=scheme, **options)
        return paramshare.share(module, plan, *inputs, **options)

    print(f"\n{type(hub_model).__name__}, {count(dense):,} parameters")
    print(paramshare.sites(module, *inputs, **options))
    soft = shared(Soft(templates=2))
    variables = jax.jit(lambda key: soft.init(key, *inputs, **options))(jax.random.key(0))
    print(f"shared by Soft(2): {count(variables):,} parameters, {len(soft.layout)} banks")
    difference = outputs(soft, variables) - outputs(module, soft.expand(variables))
    report("from its written-out form", difference)
    full = shared(Relaxed(Tied(), rank=10**6))
    converted = paramshare.convert(full, dense)
    report("converted at full rank, from the original", outputs(full, converted.variables)
           - outputs(module, dense))  # fmt: skip
    for rank in (1, 8):
        relaxed = shared(Relaxed(Tied(), rank))
        converted = paramshare.convert(relaxed, dense)
        errors = [bank.kernel_error for bank in converted.banks]
        size = count(converted.variables)
        print(
            f"relaxed to rank {rank}: {size:,} parameters, kernels off by {max(errors):.2f} at most"
        )

    def loss(variables: Any) -> jax.Array:
        return jnp.mean((soft.apply(variables, *inputs, **options)[0] - 1.0) ** 2)  # pyright: ignore

    optimizer = optax.adam(1e-3)
    state, losses = optimizer.init(variables), []
    step = jax.jit(jax.value_and_grad(loss))
    for _ in range(5):
        value, gradient = step(variables)
        updates, state = optimizer.update(gradient, state)
        variables = optax.apply_updates(variables, updates)
        losses.append(float(value))
    print(f"five steps of Adam: loss {losses[0]:.3f} to {losses[-1]:.3f}")


def count(variables: Any) -> int:
    """The number of parameters."""
    return paramshare.count(variables)["trainable"]


def report(what: str, difference: jax.Array) -> None:
    """Prints the largest entry of a difference of outputs."""
    print(f"largest difference {what}: {np.abs(difference).max():.1e}")


if __name__ == "__main__":
    sys.exit(run_command(main))
