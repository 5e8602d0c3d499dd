"""Options of the training loop: validations, checkpoints, callbacks, profiles."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest

from paramshare.training import loop
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import fit, fit_together
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare
from paramshare.training.signals import Interrupted
from paramshare.training.workdir import stored_variables

ONE = jax.devices()[:1]


@pytest.fixture
def run_of(config, digits, network):
    """A function of changed settings: a run of 8 steps in 2 epochs."""

    def prepared(**changes):
        settings = dataclasses.replace(config, **changes)
        return prepare(settings, model=network, data=digits, devices=ONE)

    return prepared


def test_validation_within_an_epoch_can_select_it(run_of, tmp_path):
    """So the best variables may be those of any validated step."""
    run = run_of(validate_steps=3, keep_last=8, checkpoint_steps=1)
    result = fit(run, tmp_path / "run", quiet=True)
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    validated = {line["step"]: line for line in lines if "validation_accuracy" in line}
    assert {step: line["kind"] for step, line in validated.items()} == {
        3: "validation",
        4: "epoch",
        6: "validation",
        8: "epoch",
    }
    with Checkpoints(tmp_path / "run/checkpoints") as newest:
        state, _ = newest.restore(run.shapes, 6)
    evaluation = make_evaluate(run)(state.variables, run.data.validation)
    assert validated[6]["validation_accuracy"] == evaluation.measures["accuracy"]
    assert validated[6]["validation_loss"] == evaluation.loss
    scores = {step: line["validation_accuracy"] for step, line in validated.items()}
    best = min(scores, key=lambda step: (-scores[step], step))
    assert stored_variables(tmp_path / "run", run.shapes, "best")[1] == best
    assert result.selected and result.selected.validation == scores[best]


def test_a_validation_that_is_due_is_not_left_out_at_the_end_of_an_epoch(run_of, tmp_path):
    fit(run_of(validate_steps=4, validate_every=2), tmp_path / "run", quiet=True)
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [x["step"] for x in lines if "validation_loss" in x] == [4, 8]


def test_which_checkpoints_are_kept(run_of, tmp_path):
    fit(run_of(checkpoint_steps=1, keep_last=3, keep_every=4), tmp_path / "run", quiet=True)
    with Checkpoints(tmp_path / "run/checkpoints") as newest:
        assert newest.steps == [4, 6, 7, 8]
    fit(run_of(keep_last=1, keep_every=3), tmp_path / "other", quiet=True)
    with Checkpoints(tmp_path / "other/checkpoints") as newest:
        assert newest.steps == [3, 6, 8]


def test_lines_of_metrics_do_not_depend_on_where_a_run_was_interrupted(run_of, tmp_path):
    """Also if that was between two lines."""

    def stop(moment):
        if moment.kind == "validation" and moment.step == 5:
            moment.stop()

    options = {"log_every": 3, "validate_steps": 5, "checkpoint_every": 9}
    whole = fit(run_of(**options), tmp_path / "whole", quiet=True)
    with pytest.raises(Interrupted):
        fit(run_of(**options), tmp_path / "run", quiet=True, callbacks=[stop])
    resumed = fit(run_of(**options), tmp_path / "run", quiet=True)
    expected = (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == expected
    assert resumed.metrics == whole.metrics


def test_checkpoints_by_the_clock(run_of, tmp_path, monkeypatch):
    """Of the first process; at lines of metrics."""
    monkeypatch.setattr(loop, "exchange", lambda text: [json.dumps(60.0 * (len(text) > 0))])
    config = {"checkpoint_minutes": 1.0, "checkpoint_every": 9, "log_every": 3, "keep_last": 9}
    fit(run_of(**config), tmp_path / "run", quiet=True)
    with Checkpoints(tmp_path / "run/checkpoints") as newest:
        assert newest.steps == [3, 4, 6, 8]


def test_callbacks_see_what_is_written_and_can_stop(run_of, tmp_path):
    moments = []

    def watch(moment):
        variables = moment.variables()
        moments.append((moment.kind, moment.step, dict(moment.metrics), variables))
        if moment.kind == "line" and moment.step == 5:
            moment.stop()

    run = run_of(log_every=1)
    with pytest.raises(Interrupted, match="interrupted at step 5 of 8; state saved"):
        fit(run, tmp_path / "run", quiet=True, callbacks=[watch])
    assert [moment[:2] for moment in moments] == [
        *(("line", step) for step in (1, 2, 3, 4)),
        ("epoch", 4),
        ("line", 5),
    ]
    with Checkpoints(tmp_path / "run/checkpoints") as newest:
        assert newest.steps == [4, 5]
        for moment in (moments[-2], moments[-1]):  # the first of them before two more steps
            stored, _ = newest.restore(run.shapes, moment[1])
            jax.tree.map(np.testing.assert_array_equal, moment[3], stored.variables)
    first, last = moments[0][3], moments[-1][3]
    assert not np.array_equal(*(jax.tree.leaves(each)[0] for each in (first, last)))
    lines = [
        line
        for line in read_metrics(tmp_path / "run/metrics.jsonl")
        if line["kind"] in ("train", "epoch")
    ]
    for (_, step, metrics, _), line in zip(moments, lines, strict=True):
        assert {"kind": line["kind"], "step": step, **metrics} == line

    moments.clear()
    result = fit(run, tmp_path / "run", quiet=True, callbacks=[watch])
    assert moments[-1][:3] == ("end", 8, result.as_json())


def test_a_profile_is_a_trace_that_perfetto_reads(run_of, tmp_path, capsys):
    fit_together([run_of()], [tmp_path / "run"], quiet=True, profile=True)
    (trace,) = (tmp_path / "run/profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [str(event.get("name")) for event in events]
    assert any("fusion" in name for name in names)  # operations of the compiled step, by name
    assert f"trace          {tmp_path / 'run/profile'}" in capsys.readouterr().out
    fit_together([run_of()], [tmp_path / "run"], quiet=True, profile=True)
    assert "nothing is traced: the run in" in capsys.readouterr().err
