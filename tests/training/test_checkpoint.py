"""Checkpoints are restored bit for bit, or an error names the folder."""

import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from paramshare.training.checkpoint import CheckpointError, Checkpoints

TREE = {
    "a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7,
    "b": {"c": jnp.int32(3), "d": jnp.bool_(True)},
}


def saved(folder: pathlib.Path, steps=(1, 2, 3), keep=2) -> pathlib.Path:
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            tree = {"a": TREE["a"] + step, "b": TREE["b"] | {"c": TREE["b"]["c"] + step}}
            checkpoints.save(step, tree, {"step": step, "best": 0.1 + 0.2})
    return folder


def test_a_restored_tree_is_the_saved_one(tmp_path):
    with Checkpoints(saved(tmp_path / "c")) as checkpoints:
        assert checkpoints.latest == 3
        tree, notes = checkpoints.restore(TREE)
        older, _ = checkpoints.restore(TREE, 2)
    np.testing.assert_array_equal(tree["a"], TREE["a"] + 3)
    assert tree["a"].dtype == np.float32 and tree["b"]["c"] == 6 and tree["b"]["d"]
    assert notes == {"step": 3, "best": 0.1 + 0.2}
    assert older["b"]["c"] == 5


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path / "c", range(1, 6))
    assert {p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()} == {"4", "5"}


def test_reading_creates_no_folder(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpoints.restore(TREE)
    assert not (tmp_path / "none").exists()


def test_an_existing_step_is_left_as_it_is(tmp_path):
    with Checkpoints(saved(tmp_path / "c")) as checkpoints:
        checkpoints.save(3, TREE, {"step": -1})
        assert checkpoints.restore(TREE)[1]["step"] == 3


@pytest.mark.parametrize("damage", ["truncate", "remove arrays", "remove metadata"])
def test_an_unreadable_checkpoint_is_named(tmp_path, damage):
    step = saved(tmp_path / "c") / "3"
    if damage == "truncate":
        for file in [f for f in step.rglob("*") if f.is_file()]:
            file.write_bytes(file.read_bytes()[:3])
    elif damage == "remove arrays":
        shutil.rmtree(step / "state")
    else:
        for file in step.rglob("_METADATA"):
            file.unlink()
        for file in step.rglob("manifest.ocdbt"):
            file.unlink()
    with (
        Checkpoints(tmp_path / "c") as checkpoints,
        pytest.raises(
            CheckpointError,
            match=r"3 cannot be read, or is of another model .*; remove that folder",
        ),
    ):
        checkpoints.restore(TREE)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # inside Orbax
def test_no_flipped_bit_changes_what_is_restored(tmp_path):
    """Many of the bits that Orbax stores are values that it does not check."""
    rng, folder = np.random.default_rng(0), tmp_path / "c"
    tree = {"a": rng.normal(size=(200, 50)).astype(np.float32), "b": np.arange(500)}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, tree, {"step": 1})
    files = [f for f in (folder / "1").rglob("*") if f.is_file() and f.stat().st_size]
    refused = 0
    for trial in range(60):
        # Every second time in the arrays.
        file = max(files, key=lambda f: f.stat().st_size) if trial % 2 else rng.choice(files)
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            with Checkpoints(folder) as checkpoints:
                restored, notes = checkpoints.restore(tree)
            assert notes == {"step": 1}
            assert all(restored[name].tobytes() == tree[name].tobytes() for name in tree)
        except CheckpointError:
            refused += 1
        file.write_bytes(content)
    assert refused > 10


def test_checkpoints_without_digests_are_read(tmp_path, monkeypatch):
    """As they were written before digests were stored."""
    monkeypatch.setattr(ocp.args, "JsonSave", lambda notes, s=ocp.args.JsonSave: s(notes["notes"]))
    with Checkpoints(saved(tmp_path / "c")) as checkpoints:
        assert checkpoints.restore(TREE)[1] == {"step": 3, "best": 0.1 + 0.2}


@pytest.mark.parametrize(
    "other",
    [{"a": jnp.zeros((3, 2)), "b": TREE["b"]}, {"a": TREE["a"]}, {**TREE, "e": jnp.zeros(2)}],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, other):
    with Checkpoints(saved(tmp_path / "c")) as checkpoints, pytest.raises(CheckpointError):
        checkpoints.restore(other)
