"""A run that resumes at any step sees the examples that are left, in the same order."""

import dataclasses

import jax
import numpy as np
import pytest

from paramshare.training.program import inputs
from paramshare.training.run import prepare

ONE = jax.devices()[:1]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("path", ["in memory", "grain"])
def test_restored_at_every_step(config, digits, network, streamed, monkeypatch, path, processes):
    """Over two epochs of four steps; the parts of all processes make up the batch."""
    if path == "grain":
        digits = dataclasses.replace(digits, train=streamed(digits.train))
    run = prepare(config, model=network, data=digits, devices=ONE)
    monkeypatch.setattr(jax, "process_count", lambda: processes)

    def batches(process: int, start: int) -> list[dict[str, np.ndarray]]:
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return list(inputs([run], start))

    name, seen = ("index" if path == "in memory" else "label"), []
    for process in range(processes):
        whole = batches(process, 0)
        assert len(whole) == run.steps == 8
        for start in range(run.steps + 1):
            rest = batches(process, start)
            for batch, expected in zip(rest, whole[start:], strict=True):
                jax.tree.map(np.testing.assert_array_equal, batch, expected)
        seen.append([batch[name] for batch in whole])
    steps = [np.concatenate(parts) for parts in zip(*seen, strict=True)]
    assert {len(step) for step in steps} == {config.batch_size}
    if path == "in memory":
        for epoch in (steps[:4], steps[4:]):
            assert sorted(np.concatenate(epoch)) == list(range(256))
        assert not np.array_equal(np.concatenate(steps[:4]), np.concatenate(steps[4:]))
