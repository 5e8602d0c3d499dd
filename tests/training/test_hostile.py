"""Files from strangers: nothing that is read is a pickle, and no name leads out of a folder."""

import pickle
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest

from paramshare.training.checkpoint import CheckpointError, Checkpoints
from paramshare.transform.export import export
from paramshare.transform.variables_file import ExportError, load_variables, save_variables

TREE = {"a": np.arange(6.0, dtype=np.float32), "b": {"c": np.ones((2, 3), np.float32)}}


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


@pytest.fixture
def victim(tmp_path):
    file = tmp_path / "victim"
    with open(tmp_path / "check", "wb") as check:
        pickle.dump(Hostile(file), check)
    pickle.loads((tmp_path / "check").read_bytes()).close()
    assert file.exists()  # the weapon works
    file.unlink()
    return file


def test_a_pickle_among_variables_is_not_loaded(tmp_path, victim):
    np.savez(tmp_path / "v.npz", a=np.array([Hostile(victim)], object))
    with pytest.raises(ExportError, match=r"cannot be read as an \.npz file of variables"):
        load_variables(tmp_path / "v.npz")
    (tmp_path / "v.npz").write_bytes(pickle.dumps(Hostile(victim)))  # `numpy.load` would load it
    with pytest.raises(ExportError, match=r"cannot be read as an \.npz file of variables"):
        load_variables(tmp_path / "v.npz")
    assert not victim.exists()


def test_a_pickle_in_a_checkpoint_is_not_loaded(tmp_path, victim):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, TREE, {"epoch": 1})
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    assert len(files) > 5
    refused = 0
    for file in files:
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(Hostile(victim)))
        try:
            with Checkpoints(folder) as checkpoints:
                restored, _ = checkpoints.restore(TREE)
            jax.tree.map(np.testing.assert_array_equal, restored, TREE)  # the file does not matter
        except CheckpointError:
            refused += 1
        file.write_bytes(content)
    assert refused >= 3 and not victim.exists()


def test_nothing_that_is_written_or_read_is_a_pickle(tmp_path, monkeypatch):
    class Small(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x)

    x = np.ones((1, 3), np.float32)
    variables = Small().init(jax.random.key(0), x)

    def forbidden(*args, **options):
        raise AssertionError("pickle is used")

    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, forbidden)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, variables, {}, wait=True)
        checkpoints.restore(variables)
    save_variables(variables, tmp_path / "v.npz")
    load_variables(tmp_path / "v.npz")
    folder = export(Small(), variables, tmp_path / "exported", x, mean=None, std=None)
    for file in (tmp_path / "v.npz", folder / "variables.npz"):
        with np.load(file, allow_pickle=False) as stored:
            assert all(stored[name].dtype.kind == "f" for name in stored.files)


def test_names_that_climb_lead_nowhere(tmp_path):
    """Names of arrays are keys of a dictionary; they never become paths of files."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    names = {"../../escaped": np.zeros(1), str(tmp_path / "absolute"): np.zeros(1)}
    np.savez(inner / "v.npz", **names)  # pyright: ignore[reportArgumentType]
    before = sorted(tmp_path.rglob("*"))
    tree = load_variables(inner / "v.npz")
    with pytest.raises(ExportError, match="contains a slash"):
        save_variables({"../escaped": np.zeros(1)}, inner / "w.npz")
    with Checkpoints(inner / "c") as checkpoints:
        checkpoints.save(1, tree, {"../notes": 1}, wait=True)
        assert checkpoints.restore(tree)[1] == {"../notes": 1}
    shutil.rmtree(inner / "c")
    assert sorted(tmp_path.rglob("*")) == before
