"""Runs that start from the variables of another run, which were folded or converted."""

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from paramshare.data import eval_batches
from paramshare.models.resnet import is_factored
from paramshare.shared import Shared, count
from paramshare.storage import is_new, run_path, written_whole
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import Config, ConfigError, Penalty, Schedule
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import fit
from paramshare.training.penalty import misfits, without
from paramshare.training.result import Evaluation
from paramshare.training.run import Run, prepare
from paramshare.training.state import TRAINABLE, first_state
from paramshare.training.tied import tied_text
from paramshare.training.workdir import (
    claim,
    differences,
    stored_config,
    stored_variables,
    write_origin,
)
from paramshare.transform.batch_statistics import reestimate
from paramshare.transform.conversion import Converted, bake, convert
from paramshare.transform.factorise import factorise
from paramshare.transform.folding import Folded


@dataclasses.dataclass(frozen=True)
class Derived:
    """A run that starts from the variables of another one.

    Attributes:
      run: the new run.
      variables: where it starts.
      before: the source run on the test set.
      after: the new run on the test set, before any training.
      fine_tuned: the new run on the test set, after fine-tuning; None without.
      trainable: number of trainable parameters, "before" and "after".
      reestimated_batches: training batches from which batch statistics were re-estimated.
      origin: what a workdir notes of where it comes from, as JSON values.
    """

    run: Run
    variables: dict[str, Any]
    before: Evaluation
    after: Evaluation
    fine_tuned: Evaluation | None
    trainable: dict[str, int]
    reestimated_batches: int
    origin: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The origin, with the test measures after fine-tuning."""
        if self.fine_tuned is None:
            return self.origin
        test = self.origin["test"] | {"fine_tuned": self.fine_tuned.as_json()}
        return self.origin | {"test": test}


def derive(
    source: Run,
    source_variables: Mapping[str, Any],
    run: Run,
    variables: Mapping[str, Any],
    *,
    reestimate_batches: int = 0,
    workdir: str | pathlib.Path | None = None,
    origin: Mapping[str, Any] | None = None,
    fine_tune: bool = False,
    resume: bool = False,
    before: Evaluation | None = None,
    quiet: bool = False,
) -> Derived:
    """Evaluates a network made from a trained one, and starts a run from it.

    Args:
      source: the trained run.
      source_variables: the variables of `source.model`.
      run: the new run, as `prepare` returns it; its configuration says how it is fine-tuned.
      variables: the variables of `run.model`, made from the source's.
      reestimate_batches: re-estimate batch statistics on this many training batches; 0 for none.
      workdir: a new folder for the run; None only evaluates.
      origin: what to note in the workdir (`origin.json`) beside what is measured, as JSON values.
      fine_tune: train the run to the end.
      resume: continue in `workdir` if it exists.
      before: the evaluation of the source, if it is known already.
      quiet: show no progress bar.

    Raises:
      ConfigError: if the variables do not fit, the workdir exists and `resume` is off, or there is
        no workdir to fine-tune in.
    """
    if fine_tune and workdir is None:
        raise ConfigError("fine-tuning needs a workdir, got None; give a folder to train in")
    if workdir is not None and not resume:
        _check_absent(run_path(workdir))
    variables, batches = check_variables(run, variables), 0
    if reestimate_batches:
        inputs = list(training_inputs(source, reestimate_batches))
        variables, batches = _reestimate(run, variables, inputs), len(inputs)
    before = before or make_evaluate(source)(source_variables, source.data.test)
    after = make_evaluate(run)(variables, source.data.test)
    trainable = {
        "before": count(source_variables)["trainable"],
        "after": count(variables)["trainable"],
    }
    notes = dict(origin or {}) | {
        "reestimated_batches": batches,
        "trainable": trainable,
        "test": {"before": before.as_json(), "after": after.as_json()},
    }
    fine_tuned = None
    if workdir is not None:
        if not (resume and run_path(workdir).exists()):
            begin(run, variables, workdir, notes)
        if fine_tune:
            fine_tuned = fit(run, workdir, quiet=quiet).last
    return Derived(run, variables, before, after, fine_tuned, trainable, batches, notes)


def load_run(
    workdir: str | pathlib.Path, checkpoint: str = "last"
) -> tuple[Run, dict[str, Any], int]:
    """Loads a run and its variables from a workdir.

    Args:
      workdir: the workdir of a training run.
      checkpoint: "last" for the newest state, "best" for the epoch selected by validation, "ema"
        for the moving average in the newest state.

    Returns:
      The run, its variables, and their step.

    Raises:
      ConfigError: if the folder holds no run, the run has no such checkpoint, or the data or the
        network's code have changed since.
      CheckpointError: if the checkpoint cannot be read.
    """
    workdir = run_path(workdir)
    config = stored_config(workdir)
    run = prepare(config)
    changed = differences(workdir, run, config)
    if changed:
        raise ConfigError(
            f"{workdir} was trained on other data or with other code ({'; '.join(changed)}); "
            "restore them, or train again in a new workdir"
        )
    return run, *stored_variables(workdir, run.shapes, checkpoint)


def begin(
    run: Run, variables: Mapping[str, Any], workdir: str | pathlib.Path, origin: Mapping[str, Any]
) -> None:
    """Creates a workdir whose first checkpoint, at step 0, has these variables.

    `train` then starts from them. The folder is written completely or not at all. Other processes
    have no part in it.

    Args:
      run: what is trained there.
      variables: the variables of `run.model`.
      workdir: a folder that does not exist.
      origin: where the variables come from, stored as `origin.json`.

    Raises:
      ConfigError: if the folder exists, or the variables do not fit the model.
      StorageError: if it cannot be written.
    """
    workdir = run_path(workdir)
    _check_absent(workdir)
    variables = check_variables(run, variables)
    trainable = {name: variables[name] for name in TRAINABLE if name in variables}
    collections = {name: value for name, value in variables.items() if name not in TRAINABLE}
    state = first_state(trainable, collections, run.optimizer, run.config.ema is not None)
    with written_whole(workdir) as folder:
        write_origin(folder, origin)  # first: without it the run would start from initial values
        claim(folder, run)
        with Checkpoints(folder / "checkpoints", alone=True) as checkpoints:
            checkpoints.save(0, state, {}, wait=True)


def with_arrays_of(
    run: Run, variables: Mapping[str, Any], patterns: Sequence[str]
) -> tuple[dict[str, Any], list[str], int]:
    """Initial variables of a run, some of them replaced by those of another network.

    Args:
      run: the run; its seed gives the other initial values.
      variables: the variables of a network.
      patterns: regular expressions; arrays whose whole path, such as "params/model/conv1/kernel",
        matches one of them are taken.

    Returns:
      The variables of `run.model`, the paths that were taken, and the number of all arrays.

    Raises:
      ConfigError: if a pattern matches nothing, or an array is missing or has another shape.
    """
    initial: dict[str, Any] = flatten_dict(run.init().variables, sep="/")
    given: dict[str, Any] = flatten_dict(dict(variables), sep="/")
    taken = []
    for pattern in patterns:
        try:
            paths = [path for path in initial if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from None
        if not paths:
            near = difflib.get_close_matches(pattern, initial, n=3, cutoff=0.0)
            raise ConfigError(
                f"{pattern!r} matches no array of {run.config.model.name}, such as "
                f"{', '.join(map(repr, near))}"
            )
        taken += paths
    for path in dict.fromkeys(taken):
        expected = initial[path]
        found = given[path].shape if path in given else "missing"
        if found != expected.shape:
            raise ConfigError(
                f"{path} is {found} in the variables to start from, but {expected.shape} in "
                f"{run.config.model.name}; choose other arrays"
            )
        initial[path] = jnp.asarray(given[path], expected.dtype)
    return unflatten_dict(initial, sep="/"), list(dict.fromkeys(taken)), len(initial)


def _check_absent(workdir: pathlib.Path) -> None:
    if not is_new(workdir):
        raise ConfigError(f"{workdir} exists; give a folder that does not exist")


def check_variables(run: Run, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The collections of the variables that a run's state holds.

    Raises:
      ConfigError: if they are not the model's; names the first leaf that differs.
    """
    expected = run.shapes.variables
    variables = {name: value for name, value in variables.items() if name in expected}

    def describe(tree: Any) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                f"{leaf.shape} {jnp.dtype(leaf.dtype)}"
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    needs, has = describe(expected), describe(variables)
    for path in sorted({*needs, *has}, reverse=True):  # params first
        if needs.get(path) != has.get(path):
            raise ConfigError(
                f"the variables do not fit {run.config.model.name}: {path} is "
                f"{has.get(path, 'missing')}, but the network needs {needs.get(path, 'nothing')}; "
                "choose a network with the same layers"
            )
    return variables


def training_inputs(run: Run, batches: int) -> Iterator[jax.Array]:
    """The first batches of the training set, normalised and not augmented.

    Yields fewer batches if the set is smaller. With several training phases, takes the last one.
    """
    size, source = run.config.batch_size, run.data.of_phase("train", run.data.phases - 1)
    whole = min(batches, len(source) // size)
    for _, batch in zip(range(whole), eval_batches(source, size), strict=False):
        yield run.data.normalise(jnp.asarray(batch["input"]))


def _reestimate(run: Run, variables: Mapping[str, Any], inputs: list[jax.Array]) -> dict[str, Any]:
    """Re-estimates batch statistics, on one device."""
    model = dataclasses.replace(run.config.model, sync_batch_norm=False)
    single = prepare(dataclasses.replace(run.config, model=model))
    return reestimate(single.model, variables, inputs, train=True)


def one_input(run: Run) -> jax.Array:
    """The first test input, normalised, as a batch of one."""
    return run.data.normalise(jnp.asarray(run.data.test[0]["input"])[None])


def convert_variables(
    source: Run, variables: Mapping[str, Any], run: Run
) -> tuple[dict[str, Any], Converted | None]:
    """Converts the variables of a trained run into those of another network with the same layers.

    Args:
      source: the trained run, plain or shared.
      variables: the variables of `source.model`.
      run: the run of the target network, plain or shared.

    Returns:
      Variables of `run.model`, and a report of the banks; None if the target is a plain network.

    Raises:
      ConversionError: if the networks do not fit.
    """
    dense = bake(source.model, variables) if isinstance(source.model, Shared) else dict(variables)
    if not isinstance(run.model, Shared):
        return dense, None
    if _is_factored(run.model) and not _is_factored(source.model):
        conversion = factorise(run.model, dense, next(training_inputs(source, 1)))
    else:
        conversion = convert(run.model, dense, one_input(source), train=False)
    return conversion.variables, conversion


def _is_factored(model: nn.Module) -> bool:
    return is_factored(model.model if isinstance(model, Shared) else model)


def with_ties(config: Config, folded: Folded) -> Config:
    """The configuration of a folded network: `model.tied` names the banks that were folded."""
    tied = [tied_text(folded.shared.layout[bank.name]) for bank in folded.banks if not bank.note]
    banks = {text.rpartition("=")[0] for text in tied}
    before = [text for text in config.model.tied if text.rpartition("=")[0] not in banks]
    return with_model(config, tied=(*before, *tied))


def with_model(config: Config, **fields: Any) -> Config:
    """A configuration with another network, without the penalties that do not apply to it.

    Args:
      config: the configuration of a run.
      **fields: fields of `config.model` to change.

    Raises:
      ConfigError, ModelError, PlanError: if there is no such network.
    """
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
    run = prepare(dataclasses.replace(config, penalty=Penalty()))
    reasons = misfits(config.penalty, run.model, run.shapes.variables)
    return dataclasses.replace(config, penalty=without(config.penalty, *reasons))


def fine_tuning(config: Config, epochs: int = 1) -> Config:
    """A configuration that trains for a few more epochs.

    The learning rate follows half a cosine from a tenth of the old one down to zero. With several
    training phases, only the last one is used.
    """
    rate = config.optimizer.learning_rate / 10
    return dataclasses.replace(
        config,
        epochs=epochs,
        data=config.data.last_phase(),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
        schedule=Schedule("cosine"),
    )
