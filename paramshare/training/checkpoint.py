"""Checkpoints by Orbax: the newest states, and the one that validation chose."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

KEPT = 2  # of the newest states: one may turn out unreadable


class CheckpointError(ValueError):
    """A checkpoint is missing, unreadable, or of another model."""


class Checkpoints:
    """Pytrees of arrays with a few numbers beside them, one folder a step, written whole or not at all.

    Every process calls every method; the first one writes.

    Args:
      folder: made when the first checkpoint is written.
      keep: how many to keep.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int = KEPT):
        self.folder = pathlib.Path(folder).absolute()
        self.keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._open().latest_step() if self.folder.exists() else None

    @property
    def steps(self) -> list[int]:
        """The steps that are kept, in rising order."""
        return sorted(self._open().all_steps()) if self.folder.exists() else []

    def save(self, step: int, tree: Any, notes: dict[str, Any], *, wait: bool = False) -> None:
        """Writes a state and its notes (JSON). Copies it first, then goes on in the background unless told to wait.

        A step that is already there is left as it is: runs are reproducible, so it holds the same numbers.
        """
        manager = self._open()
        if step not in manager.all_steps():
            # Host copies: the next training step may take over the memory of these arrays.
            arrays = jax.tree.map(np.array, jax.device_get(tree))
            manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), notes=ocp.args.JsonSave(notes)))
        if wait:
            manager.wait_until_finished()

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          like: a pytree of arrays or `jax.ShapeDtypeStruct`s: the shapes and dtypes to be found.
          step: which; None for the newest.

        Returns:
          The pytree, of NumPy arrays, and the notes.

        Raises:
          CheckpointError: if it cannot be read, or holds other shapes; the folder is named.
        """
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.folder}; train first")
        place = self.folder / str(step)
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        try:
            self._open().wait_until_finished()
            found = self._open().restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like), notes=ocp.args.JsonRestore()))
            tree, notes = found["state"], found["notes"]
        except Exception as error:  # Orbax and its storage raise whatever the damage leads them to
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"checkpoint {place} cannot be read, or is of another model ({type(error).__name__}: {reason}); "
                "remove that folder to go on from an earlier one, or use a new workdir"
            ) from error
        for (path, wanted), leaf in zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(tree), strict=True):
            if np.shape(leaf) != wanted.shape:
                raise CheckpointError(
                    f"checkpoint {place} holds {jax.tree_util.keystr(path)} of shape {np.shape(leaf)}, the model wants {wanted.shape}"
                )
        return jax.tree.map(np.asarray, tree), notes

    def drop_after(self, step: int) -> None:
        """Removes what is kept of later steps; Orbax would write no earlier step beside them."""
        for later in self.steps:
            if later > step:
                self._open().delete(later)

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            if self.folder.exists() and not self.folder.is_dir():
                raise CheckpointError(f"{self.folder} is a file where a folder of checkpoints should be; remove it, or use a new workdir")
            options = ocp.CheckpointManagerOptions(max_to_keep=self.keep, create=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager


def read_json(path: pathlib.Path) -> Any:
    """A JSON object from a file; `CheckpointError` if it is not whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove it, and the same command makes it anew") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} does not hold what a run leaves there; remove it, and the same command makes it anew")
    return found
