"""A trace of a few steps of training."""

import pathlib
import shutil
import tempfile
import time
from typing import Any

import jax

from paramshare.errors import one_line, warn
from paramshare.storage import StorageError, in_bucket, write_bytes

SKIPPED, TRACED = 3, 10  # steps: the first ones compile


class Profile:
    """Traces steps `SKIPPED` to `SKIPPED + TRACED` of a training; a context manager.

    Writes what TensorBoard's profiler reads, and `perfetto_trace.json.gz` for ui.perfetto.dev. Of
    several processes the first one writes.

    Args:
      folder: where to write.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self._steps, self._tracing = folder, 0, False
        self._traces = folder  # the profiler writes to this machine only
        if in_bucket(folder):
            self._traces = pathlib.Path(tempfile.mkdtemp(prefix="profile-"))

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._tracing:
            self._stop()
        elif self._steps < SKIPPED and jax.process_index() == 0:
            warn(f"nothing was traced, since there were only {self._steps} steps")

    def step(self, state: Any) -> float:
        """Call it after each step, with its result; returns the seconds that tracing took."""
        self._steps += 1
        if jax.process_index() != 0 or self._steps not in (SKIPPED, SKIPPED + TRACED):
            return 0.0
        jax.block_until_ready(state)
        begin = time.monotonic()
        if self._steps == SKIPPED:
            self._start()
        else:
            self._stop()
        return time.monotonic() - begin

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions would drown the rest
        try:
            jax.profiler.start_trace(
                str(self._traces), create_perfetto_trace=True, profiler_options=options
            )
        except (OSError, RuntimeError) as error:
            warn(f"no trace: {one_line(error)}")
        else:
            self._tracing = True

    def _stop(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
            if self._traces != self.folder:
                for file in filter(pathlib.Path.is_file, self._traces.rglob("*")):
                    name = file.relative_to(self._traces).as_posix()
                    write_bytes(self.folder / name, file.read_bytes())
                shutil.rmtree(self._traces)
        except (OSError, RuntimeError, StorageError) as error:
            warn(f"no trace: {one_line(error)}")
            return
        print(f"trace          {self.folder} (TensorBoard, or ui.perfetto.dev)", flush=True)
