"""Checkpoints, written and read with Orbax."""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from paramshare.errors import ParamshareError, without_logs
from paramshare.schemes.sliced import join
from paramshare.storage import (
    DIGEST,
    StorageError,
    absolute,
    check_room,
    in_bucket,
    not_written,
    run_path,
)
from paramshare.training.processes import exchange

SLICES = "slices"  # in the notes: the shapes of divided arrays, by path
KEPT = 2  # newest states to keep, in case one is unreadable
OVERHEAD = 2**17  # bytes of a checkpoint beside its arrays


class CheckpointError(ParamshareError):
    """A file of a workdir is missing or damaged, or belongs to another model."""


class Checkpoints:
    """Pytrees of arrays with JSON notes, one folder per step, written completely or not at all.

    Every process calls `save`, `wait` and `drop_after`, which wait for each other, and the first
    one writes. Reading concerns no other process and changes nothing on disk, so that any process
    may read while another one trains.

    Args:
      folder: created when the first checkpoint is written.
      keep: how many of the newest checkpoints to keep.
      period: keep checkpoints whose step is a multiple of it too; 0 for none.
      alone: this process writes, and the others do not call anything.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        keep: int = KEPT,
        period: int = 0,
        alone: bool = False,
    ):
        self.folder = absolute(run_path(folder))
        self.keep, self.period, self.alone = keep, period, alone
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: Any) -> None:
        manager, self._manager = self._manager, None
        if manager is None:
            return
        try:
            manager.wait_until_finished()
            manager.close()
        except Exception as error:
            if exception[0] is None:
                raise self._not_saved(error) from error

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, in ascending order."""
        self._check_folder()
        # Orbax renames the folder of a step once it is complete; in a bucket it adds a file.
        found = self.folder.iterdir() if self.folder.exists() else ()
        return sorted(
            int(path.name)
            for path in found
            if path.name.isdecimal() and path.is_dir() and ocp.utils.is_checkpoint_finalized(path)
        )

    def save(self, step: int, tree: Any, notes: dict[str, Any], *, wait: bool = False) -> None:
        """Writes a state and its notes.

        The arrays are copied first and written in the background. An existing step is left as it
        is: runs are reproducible, so it holds the same values. Of an array that is divided over
        devices along its first axis, every process writes its own part.

        Args:
          step: number of the checkpoint.
          tree: pytree of arrays; see `paramshare.training.slices` for divided ones.
          notes: JSON values.
          wait: return only when the checkpoint is on disk.

        Raises:
          CheckpointError: if this one or the one before cannot be written; what is on disk stays.
        """
        manager = self._writer()
        if step not in manager.all_steps():
            # Copies: the next training step may reuse the memory of these arrays.
            arrays = jax.tree.map(_copied, tree)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
            slices = {
                _name(path): leaf.shape
                for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
                if isinstance(leaf, jax.Array)
            }
            about = {"notes": notes, DIGEST: _digest(arrays, notes, slices)}
            try:  # also reports what failed in the background of the save before
                if jax.process_index() == 0 and not in_bucket(self.folder):
                    # Orbax reports a full disk in hundreds of lines, from several threads.
                    check_room(self.folder, size + size // 20 + OVERHEAD)
                manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(_fields(arrays)),
                        notes=ocp.args.JsonSave(about | ({SLICES: slices} if slices else {})),
                    ),
                )
            except Exception as error:
                raise self._not_saved(error) from error
        if wait:
            self.wait()

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
          like: a pytree of arrays or `jax.ShapeDtypeStruct`s with the expected shapes and dtypes.
          step: number of the checkpoint; None for the newest.

        Returns:
          The pytree, of NumPy arrays, and the notes.

        Raises:
          CheckpointError: if it cannot be read, holds other shapes, or is not what was saved; names
            the folder.
        """
        self.wait()
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"no checkpoint in {self.folder}; train first")
        place = self.folder / str(step)
        like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        try:
            with without_logs(), self._reader() as reader:
                read = functools.partial(reader.restore, step)
                notes = read(args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]
                slices = notes.get(SLICES, {}) if isinstance(notes, dict) else {}
                stored = jax.tree_util.tree_map_with_path(
                    lambda path, leaf: np.empty(slices.get(_name(path), leaf.shape), leaf.dtype),
                    like,
                )
                args = ocp.args.Composite(state=ocp.args.StandardRestore(_fields(stored)))
                tree = jax.tree.map(np.asarray, read(args=args)["state"])
            if dataclasses.is_dataclass(like):
                tree = type(like)(**tree)
            digest = _digest(tree, notes.get("notes"), slices) if isinstance(notes, dict) else ""
            tree = jax.tree_util.tree_map_with_path(
                lambda path, leaf, of: join(leaf, of.shape) if _name(path) in slices else leaf,
                tree,
                like,
            )
        except Exception as error:  # Orbax raises many types, depending on the damage
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"checkpoint {place} cannot be read, or is of another model "
                f"({type(error).__name__}: {reason}); "
                "remove that folder to resume from an earlier checkpoint, or use a new workdir"
            ) from error
        for (path, expected), leaf in zip(
            jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(tree), strict=True
        ):
            if np.shape(leaf) != expected.shape:
                raise CheckpointError(
                    f"checkpoint {place} holds {jax.tree_util.keystr(path)} of shape "
                    f"{np.shape(leaf)}, the model needs {expected.shape}; use a new workdir, "
                    "or the model of the run"
                )
        if isinstance(notes, dict) and not {"notes", DIGEST} & set(notes):
            return tree, notes  # written before digests were stored
        if not isinstance(notes, dict) or digest != notes.get(DIGEST):
            raise CheckpointError(
                f"checkpoint {place} is damaged: its values are not those that were saved; remove "
                "that folder to resume from an earlier checkpoint, or use a new workdir"
            )
        return tree, notes["notes"]

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints after `step`: while one exists, Orbax saves no earlier step."""
        for later in self.steps:
            if later > step:
                self._writer().delete(later)

    def wait(self) -> None:
        """Waits until all saved checkpoints are on disk.

        Raises:
          CheckpointError: if one cannot be written.
        """
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                raise self._not_saved(error) from error

    def _not_saved(self, error: Exception) -> CheckpointError:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return CheckpointError(
            f"no checkpoint can be written to {self.folder} "
            f"({error if isinstance(error, StorageError) else reason}); earlier checkpoints in "
            f"{self.folder.parent} are intact: rerun the same command to resume"
        )

    def _writer(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._check_folder()
            _quieten_tensorstore()
            # Two managers with the same names of barriers would take each other's for their own.
            name = f"{self.folder.parent.name}-{self.folder.name}"
            together = MultiprocessingOptions(barrier_sync_key_prefix=name)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep,
                keep_period=self.period or None,
                create=not self.alone,
                multiprocessing_options=_alone() if self.alone else together,
            )
            try:
                if self.alone:  # Orbax creates no folder for some of the processes
                    self.folder.mkdir(parents=True, exist_ok=True)
                with without_logs():
                    self._manager = ocp.CheckpointManager(self.folder, options=options)
            except OSError as error:
                raise not_written(self.folder, error) from error
        return self._manager

    def _reader(self) -> ocp.CheckpointManager:
        _quieten_tensorstore()
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=_alone())
        return ocp.CheckpointManager(self.folder, options=options)

    def _check_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is a file, but must be a folder of checkpoints; "
                "remove it, or use a new workdir"
            )


def _alone() -> MultiprocessingOptions:
    """Options of a manager that other processes have no part in."""
    if jax.process_count() == 1:
        return MultiprocessingOptions()
    me = jax.process_index()
    return MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone-{me}"
    )


@functools.cache
def _quieten_tensorstore() -> None:
    """Where one array cannot be read, the others report to a closed loop, in hundreds of lines."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return "ocdbt" not in str(error).lower()  # tensorstore's, which is raised as well

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(is_news)


def _fields(tree: Any) -> Any:
    """A state as a dictionary, without its empty fields, which older versions did not have."""
    if not dataclasses.is_dataclass(tree):
        return tree
    fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    return {name: value for name, value in fields.items() if value is not None}


def _copied(leaf: Any) -> Any:
    """A copy: on the host, or on its devices if it is divided over several."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
        return jax.jit(jnp.copy, out_shardings=leaf.sharding)(leaf)
    return np.array(jax.device_get(leaf))


def _digest(tree: Any, notes: Any, slices: Mapping[str, Any]) -> str:
    """A hash of the values of a state and of its notes.

    Divided arrays are hashed slice by slice, by the processes that hold the slices.
    """
    result = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    parts: dict[str, str] = {}  # by array and slice
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        head = f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode()
        if _name(path) not in slices:
            result.update(head + np.asarray(leaf).tobytes())
            continue
        of_slices = (
            [(shard.index[0].start or 0, shard.data[0]) for shard in leaf.addressable_shards]
            if isinstance(leaf, jax.Array)
            else enumerate(leaf)
        )
        for number, part in of_slices:
            digest = hashlib.sha256(head + np.asarray(part).tobytes())
            parts[f"{_name(path)} {number}"] = digest.hexdigest()
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
        parts = {
            name: part
            for text in exchange(json.dumps(parts))
            for name, part in json.loads(text).items()
        }
    if parts:
        result.update(json.dumps(parts, sort_keys=True).encode())
    return result.hexdigest()


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
