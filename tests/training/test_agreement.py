"""What processes compare before they compute together; the answers of the others are made up."""

import json

import jax
import pytest

from paramshare.training import processes
from paramshare.training.config import ConfigError
from paramshare.training.processes import ProcessError, agree, check_shared, united, versions


@pytest.fixture
def others(monkeypatch):
    """Sets what two other processes answer to each exchange; the first process is this one."""

    def answer(*texts: str) -> None:
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        monkeypatch.setattr(processes, "exchange", lambda text: [text, *texts])

    return answer


def test_a_single_process_agrees_with_itself(tmp_path):
    agree({"seed": 1})
    check_shared(tmp_path / "nothing")
    with pytest.raises(KeyError), united():
        raise KeyError("a")


def test_differences_are_named(others):
    others(json.dumps({"seed": 1, "jax": "1"}), json.dumps({"seed": 2, "jax": "0.9"}))
    with pytest.raises(ProcessError) as caught:
        agree({"seed": 1, "jax": "1", "data": "ab"})
    assert "seed is 1 in process 0 and 2 in process 2" in str(caught.value)
    assert "jax is '1' in process 0 and '0.9' in process 2" in str(caught.value)
    assert "data is 'ab' in process 0 and None in process 1" in str(caught.value)
    others(*[json.dumps({"seed": 1})] * 2)
    agree({"seed": 1})


def test_a_failure_in_another_process_is_raised_here_with_its_exit_code(others):
    others(json.dumps(["", 2]), json.dumps(["the disk is full", 7]))
    with pytest.raises(ProcessError, match="process 2 of 3: the disk is full") as caught, united():
        pass
    assert caught.value.exit_code == 7


def test_a_failure_here_is_the_same_line(others):
    others(json.dumps(["", 2]), json.dumps(["", 2]))
    with pytest.raises(ProcessError, match="process 0 of 3: epochs is 0") as caught, united():
        raise ConfigError("epochs is 0")
    assert caught.value.exit_code == 2
    with pytest.raises(KeyError), united():  # a mistake of ours keeps its traceback
        raise KeyError("a")


def test_a_workdir_that_another_process_does_not_see(others, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 7")
    others("", "")
    with pytest.raises(ProcessError, match=r"run is not shared: process 1 does not see"):
        check_shared(tmp_path / "run" / ".lock")


def test_versions_are_of_what_is_installed():
    assert versions()["version of jax"] == jax.__version__
