"""What identifies a run: digests of what the network computes, beside sizes and settings."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from paramshare.training.run import _training_digest, check_model
from paramshare.training.state import training_trace

SETTINGS = {"mask": np.ones((1, 64), np.float32), "training": 1.0, "scale": 0.301}


class Coded(nn.Module):
    """Equal modules, whose code depends on globals."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(10)(x.reshape(len(x), -1) * jnp.asarray(SETTINGS["mask"]))
        return y * SETTINGS["scale"] * (SETTINGS["training"] if train else 1.0)


def digest(data) -> str:
    return check_model(Coded(), "coded", data)[2]


def test_constants_training_code_literals_and_the_task_are_part_of_the_digest(digits, monkeypatch):
    first = digest(digits)
    assert digest(digits) == first
    other = np.ones((1, 64), np.float32)
    other[0, 5] = 0
    for name, value in (("mask", other), ("training", 2.0), ("scale", 0.304)):
        with monkeypatch.context() as patch:
            patch.setitem(SETTINGS, name, value)
            _training_digest.cache_clear()  # code does not change while a process runs
            training_trace.cache_clear()
            assert digest(digits) != first, name
    smoothed = dataclasses.replace(digits, task=digits.task.with_label_smoothing(0.5))
    assert digest(smoothed) != first
