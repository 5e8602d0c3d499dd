"""`metrics.jsonl`: valid JSON always, and read whatever has happened to it."""

import json

import pytest

from paramshare.training.metrics import MetricsFile, read_metrics

GOOD = [{"kind": "train", "step": 1, "loss": 0.5}, {"kind": "epoch", "step": 4, "epoch": 1}]


@pytest.mark.parametrize(
    "damage",
    [
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[1]",
        b"null",
        b'{"step": 3}',
        b'{"kind": "other", "step": 3}',
        b'{"kind": ["train"], "step": 3}',
        b'{"kind": "train", "step": "3"}',
        b'{"kind": "train", "step": true}',
        b'{"kind": "epoch", "step": 3}',
        b'{"kind": "epoch", "step": 3, "epoch": "1"}',
        b'{"kind": "similarity", "step": 3, "epoch": 1.5}',
        b'{"kind": "train", "step": -1}',
        b'{"kind": "train", "step": 1' + b"0" * 400 + b"}",
        b'{"kind": "train", "step": 1' + b"0" * 5000 + b"}",
    ],
)
def test_damaged_lines_are_skipped(tmp_path, damage):
    lines = [json.dumps(line).encode() for line in GOOD]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0], damage, lines[1], damage]))
    assert read_metrics(tmp_path / "metrics.jsonl") == GOOD


@pytest.mark.parametrize("value", ["null", '"NaN"', "NaN", "[1]", "true", "1" + "0" * 400])
def test_values_that_are_no_finite_numbers_are_left_out(tmp_path, value):
    (tmp_path / "metrics.jsonl").write_text(f'{{"kind": "train", "step": 1, "a": {value}, "b": 2}}')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "train", "step": 1, "b": 2}]


def test_what_is_not_finite_is_written_as_null(tmp_path):
    metrics = MetricsFile(tmp_path, 0)
    metrics.write("epoch", 4, epoch=1, score=float("nan"))
    metrics.write("similarity", 4, epoch=1, matrices={"b": [[1.0, float("inf")], [0.5, 1.0]]})
    metrics.close()

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert lines[0]["score"] is None and lines[1]["matrices"] == {"b": [[1.0, None], [0.5, 1.0]]}


def test_damaged_lines_are_counted_when_a_run_resumes(tmp_path, capsys):
    lines = [json.dumps(line) for line in GOOD]
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "{", "[", lines[1], '{"ki']))
    MetricsFile(tmp_path, 4).close()
    assert "2 damaged lines are left out" in capsys.readouterr().err
    assert read_metrics(tmp_path / "metrics.jsonl") == GOOD


def test_resuming_keeps_lines_as_they_are(tmp_path):
    text = '{"kind": "train",  "step": 1, "loss": null}'
    (tmp_path / "metrics.jsonl").write_text(f'{text}\n{{"kind": "train", "step": 3}}\n{{"ki')
    MetricsFile(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == f"{text}\n"
