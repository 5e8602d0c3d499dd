"""Runs in a bucket of Google Cloud Storage, emulated on this machine."""

import json
import pathlib
import subprocess
import sys
import warnings

import chex
import pytest

from paramshare import storage
from paramshare.storage import StorageError, run_path
from paramshare.training.derive import load_run
from paramshare.training.result import Result
from paramshare.training.workdir import stored_variables


@pytest.fixture(scope="module", autouse=True)
def _bucket():
    server = subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).parent / "bucket_server.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    address = f"http://localhost:{server.stdout.readline().strip()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "a token")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would need credentials
        yield
    server.kill()
    server.communicate()


@pytest.fixture(scope="module")
def config_file(small_config_file) -> str:
    return small_config_file


@pytest.fixture(scope="module")
def trained(small_run) -> pathlib.Path:
    return small_run


@pytest.fixture(scope="module")
def in_bucket(config_file) -> str:
    """The workdir of a finished run in the bucket."""
    from paramshare.cli import main

    workdir = "gs://bucket/runs/first"
    words = ["train", config_file, "--workdir", workdir, "--checkpoint-steps", "1", "--profile"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sending a large body", ResourceWarning)  # gcsfs's
        assert main(words) == 0
    return workdir


def metrics(workdir) -> list[dict]:
    return [json.loads(x) for x in (run_path(workdir) / "metrics.jsonl").read_text().splitlines()]


def epochs(workdir) -> list[dict]:
    return [line for line in metrics(workdir) if line["kind"] == "epoch"]


def test_it_is_the_run_of_a_folder(in_bucket, trained):
    chex.assert_trees_all_equal(load_run(in_bucket)[1], load_run(trained)[1])
    chex.assert_trees_all_equal(load_run(in_bucket, "best")[1], load_run(trained, "best")[1])
    assert metrics(in_bucket) == metrics(trained)
    names = {path.name for path in run_path(in_bucket).iterdir()}
    assert names == {path.name for path in trained.iterdir()} | {"profile"}
    assert any((run_path(in_bucket) / "profile").iterdir())


def test_commands_read_it(in_bucket, trained, command, refused, config_file):
    assert command("eval", in_bucket) == command("eval", trained)
    assert command("summary", in_bucket) == command("summary", trained)
    assert f"report         {in_bucket}/report.html" in command("report", in_bucket)
    assert command("similarity", in_bucket).count(f"{in_bucket}/similarity") == 2
    assert "holds another network" in refused(
        *("train", config_file, "--workdir", "gs://bucket/other"),
        *("--init-from", in_bucket, "--model.name", "spathnet-4-3-2"),
    )


def test_what_a_killed_process_left(in_bucket, capsys, monkeypatch):
    """Orbax renames no folder in a bucket: one without this file is not complete."""
    from paramshare.cli import main, train

    monkeypatch.setattr(train, "report", lambda run, workdir, result: None)
    workdir, expected = run_path(in_bucket), load_run(in_bucket)[1]
    lines = epochs(in_bucket)
    (workdir / "checkpoints" / "4" / "commit_success.txt").unlink()
    (workdir / "result.json").unlink()
    (workdir / ".lock").write_text("process 1 on another machine\n")
    run, _, step = load_run(in_bucket)
    assert step == 3
    assert main(["train", "--workdir", in_bucket]) == 0
    assert "is being trained by process 1 on another machine, or that" in capsys.readouterr().err
    assert not (workdir / ".lock").exists()
    variables, step = stored_variables(workdir, run.shapes)
    assert step == 4
    chex.assert_trees_all_equal(variables, expected)
    assert epochs(in_bucket) == lines


def test_runs_are_made_from_it(in_bucket, trained, command, refused, config_file, monkeypatch):
    """Training itself would take no notice of where the first state comes from."""
    from paramshare.cli import train
    from paramshare.training import loop

    finished = Result.read(trained / "result.json")
    words = ("train", config_file, "--workdir", "gs://bucket/more", "--init-from", in_bucket)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit_together", lambda runs, workdirs, **_: [finished] * len(runs))
        patch.setattr(train, "report", lambda run, workdir, result: None)
        command(*words, "--epochs", 1)
    first, last = load_run("gs://bucket/more"), load_run(in_bucket)
    assert (first[2], last[2]) == (0, 4)
    chex.assert_trees_all_equal(first[1], last[1])
    assert "gs://bucket/more exists" in refused("fold", in_bucket, "--output", "gs://bucket/more")
    assert "give a folder of this machine" in refused("export", in_bucket, "--output", "gs://b/c")
    assert "event files cannot be written" in refused(
        "train", config_file, "--workdir", "gs://bucket/events", "--tensorboard"
    )


def test_buckets_that_cannot_be_used(monkeypatch, refused):
    assert "there is no bucket 'gs://nobody'" in refused("eval", "gs://nobody/run")
    assert "'gs://bucket' names no folder" in refused("train", "--workdir", "gs://bucket/")
    assert "gs://bucket/none holds no run" in refused("eval", "gs://bucket/none")
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StorageError, match=r'pip install "paramshare\[buckets\]"'):
        run_path("gs://another/run")
