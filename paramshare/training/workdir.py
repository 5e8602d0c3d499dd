"""The folder of a run: the configuration and facts that identify it, and the states it holds."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from paramshare.errors import ParamshareError, warn
from paramshare.storage import (
    in_bucket,
    is_temporary,
    not_written,
    read_json,
    run_path,
    write_json,
    write_text,
)
from paramshare.training import config as configs
from paramshare.training.checkpoint import CheckpointError, Checkpoints
from paramshare.training.config import Config, ConfigError
from paramshare.training.optimizer import learning_rate, optimizer
from paramshare.training.result import RunFacts
from paramshare.training.run import Run, named_network
from paramshare.training.state import State, init_state

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG = "config.json"
FACTS = "identity.json"
ORIGIN = "origin.json"  # only in a workdir that was made from another run
RESULT = "result.json"
LOCK = ".lock"  # names the process that trains here


def claim(workdir: pathlib.Path, run: Run) -> None:
    """Stores the configuration in a workdir, or checks that the folder holds this run.

    Raises:
      ConfigError: if the folder holds another run or unrelated files; nothing is changed then.
      CheckpointError: if a file in it cannot be read.
    """
    facts = workdir / FACTS
    if (workdir / CONFIG).is_file():
        changed = differences(workdir, run, stored_config(workdir))
        if changed:
            raise ConfigError(
                f"workdir {workdir} holds a run of another configuration ({'; '.join(changed)}); "
                "use a new --workdir, or the same settings, data and code"
            )
        if jax.process_index() == 0:
            if not facts.is_file():
                warn(f"{facts} is missing; it is written again, without a check of data and code")
                run.facts.write(facts)
            elif RunFacts.read(facts).jax != run.facts.jax:
                run.facts.write(facts)  # with another version, from here on
        return
    if jax.process_index() != 0:
        return  # the first process creates it
    if workdir.exists() and (not workdir.is_dir() or not all(map(_is_leftover, workdir.iterdir()))):
        raise ConfigError(f"workdir {workdir} is not empty and holds no run; use a new --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(workdir, error) from None
    run.facts.write(facts)
    write_json(workdir / CONFIG, json.loads(configs.to_json(run.config)))


def _is_leftover(path: pathlib.Path) -> bool:
    """Whether a file may be what a claim that was killed left."""
    return (
        path.name in (FACTS, LOCK, ORIGIN)
        or is_temporary(path, FACTS)
        or is_temporary(path, CONFIG)
    )


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds a workdir for one training. The operating system frees it when the process ends.

    The folder is created if it does not exist, and removed if it is empty in the end. Of several
    processes, the first one holds it.

    Raises:
      ConfigError: naming the process that trains there already.
    """
    if fcntl is None or jax.process_index() != 0:
        yield
        return
    path = workdir / LOCK
    if in_bucket(workdir):
        if path.exists():
            holder = path.read_text().strip()
            warn(
                f"{workdir} is being trained by {holder}, or that process was killed; a bucket has "
                "no locks: do not train there twice at once"
            )
        write_text(path, f"{_this_process()}, {secrets.token_hex(4)}\n")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(workdir, error) from None
    while True:
        try:  # without following a link, whose target would be truncated
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise not_written(path, error) from None
        file = os.fdopen(number, "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ConfigError(
                f"workdir {workdir} is being trained by {holder}; wait until it ends, stop it, or "
                "use a new --workdir"
            ) from None
        except OSError as error:  # some network disks have no locks
            warn(f"{workdir} cannot be locked ({error.strerror}); do not train there twice at once")
            break
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its holder removed it just now
    try:
        with contextlib.suppress(OSError):  # a full disk; the lock holds without the name
            file.truncate(0)
            file.write(f"{_this_process()}\n")
            file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # it is not empty
            workdir.rmdir()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def differences(workdir: pathlib.Path, run: Run, config: Config) -> list[str]:
    """How a run differs from the one of a workdir with this configuration; empty if it does not.

    Names settings; where they are equal, the data and the network's code.

    Raises:
      CheckpointError: if the stored facts cannot be read.
    """
    changed = configs.differences(run.config, config)
    if changed or not (workdir / FACTS).is_file():
        return changed
    return run.facts.differences(stored_facts(workdir))


def write_origin(workdir: pathlib.Path, origin: Mapping[str, Any]) -> None:
    """Notes what the first state of a workdir was made from."""
    write_json(workdir / ORIGIN, origin)


def stored_origin(workdir: pathlib.Path) -> dict[str, Any]:
    """What `write_origin` noted; {} for a run that started from initial values.

    Raises:
      CheckpointError: if the note cannot be read.
    """
    path = workdir / ORIGIN
    remedy = "make the run again in a new workdir"
    return read_json(path, CheckpointError, remedy) if path.is_file() else {}


def check_origin(workdir: pathlib.Path) -> None:
    """Checks that a workdir without checkpoints may start from initial values.

    Raises:
      CheckpointError: if it was made from another run, so that its first checkpoint is missing.
    """
    origin = stored_origin(workdir)
    if origin:
        raise CheckpointError(
            f"{workdir} was made from {origin.get('workdir')} by "
            f"`paramshare {origin.get('command')}`, but its first checkpoint is missing; "
            "remove the folder and run that command again"
        )


def stored_config(workdir: pathlib.Path) -> Config:
    """The configuration of a workdir.

    Raises:
      ConfigError: if the folder holds no run, or a damaged configuration.
    """
    path = run_path(workdir) / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{workdir} holds no run (no {CONFIG}); give the --workdir of a training run"
        )
    value = read_json(path, ConfigError, "restore it, or train again in a new workdir")
    try:
        return configs.from_json(json.dumps(value))
    except ParamshareError as error:
        raise ConfigError(f"{path}: {error}") from None


def stored_facts(workdir: pathlib.Path) -> RunFacts:
    """The facts of a workdir's run; `CheckpointError` if they cannot be read."""
    return RunFacts.read(workdir / FACTS)


def stored_variables(
    workdir: pathlib.Path, shapes: State, checkpoint: str = "last"
) -> tuple[dict[str, Any], int]:
    """The variables that a workdir holds, and their step.

    Args:
      workdir: the workdir of a training run.
      shapes: the run's state, as arrays or `jax.ShapeDtypeStruct`s.
      checkpoint: "last" for the newest state, "best" for the epoch selected by validation, "ema"
        for the moving average in the newest state.

    Raises:
      ConfigError: if the run has selected no epoch, or keeps no average.
      CheckpointError: if there is no state, or it cannot be read.
    """
    best = checkpoint == "best"
    if checkpoint == "ema" and shapes.ema is None:
        raise ConfigError(
            f"run {workdir} keeps no moving average (`train --ema`); use --checkpoint last"
        )
    with Checkpoints(workdir / ("best" if best else "checkpoints")) as checkpoints:
        step = checkpoints.latest
        if best and step is None:
            raise ConfigError(
                f"run {workdir} has selected no epoch by validation; use --checkpoint last"
            )
        tree, _ = checkpoints.restore(shapes.variables if best else shapes, step)
    variables = tree if best else tree.ema if checkpoint == "ema" else tree.variables
    return variables, int(step or 0)


def stored_network(workdir: pathlib.Path) -> tuple[Config, RunFacts, nn.Module]:
    """The configuration, facts and network of a workdir; does not load the data set.

    Raises:
      ConfigError: if the folder holds no run.
      CheckpointError: if its facts cannot be read.
      ModelError: if the network is not one of the zoo's.
    """
    config, facts = stored_config(workdir), stored_facts(workdir)
    return config, facts, named_network(config, facts.network_options, facts.input_shape)


def network_variables(
    workdir: pathlib.Path,
    config: Config,
    facts: RunFacts,
    model: nn.Module,
    checkpoint: str = "last",
) -> tuple[dict[str, Any], int]:
    """The variables of a network that `stored_network` built, and their step.

    Raises:
      ConfigError, CheckpointError: as `stored_variables`.
    """
    rule = optimizer(config, learning_rate(config, 1))
    ema = config.ema is not None
    shapes = jax.eval_shape(lambda: init_state(model, rule, facts.example, config.seed, ema))
    return stored_variables(workdir, shapes, checkpoint)
