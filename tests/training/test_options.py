"""Options of the training loop: validations, checkpoints, callbacks, profiles."""

import dataclasses
import gzip
import json

import jax
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


def test_which_checkpoints_are_kept(run_of, tmp_path):
    fit(run_of(checkpoint_steps=1, keep_last=3, keep_every=4), tmp_path / "run", quiet=True)
    with Checkpoints(tmp_path / "run/checkpoints") as newest:
        assert newest.steps == [4, 6, 7, 8]


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
    stored, step = stored_variables(tmp_path / "run", run.shapes)
    assert step == 5
    jax.tree.map(
        lambda a, b: (a == b).all() or pytest.fail("another state"), stored, moments[-1][3]
    )
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
