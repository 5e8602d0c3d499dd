"""The parent of `train --distributed`: what it passes on of its child's standard error."""

import argparse
import collections
import os

import pytest

from paramshare.cli import supervise
from paramshare.cli.errors import CommandError
from paramshare.data import DataError

LOG = b"E1127 14:11:02.933929   16381 service.cc:1549] unhealthy:\n1\nThe tasks have crashed.\n"


@pytest.mark.parametrize(
    ("printed", "passed"),
    [
        (b"a line\nanother\n", b"a line\nanother\n"),
        (b"\r 5% 3 img/s\r 9% 4 img/s", b"\r 5% 3 img/s\r 9% 4 img/s"),
        (LOG + b"paramshare: lost\n", b"paramshare: lost\n"),
        (b"W1127 14:11:02.9   163 a.cc:1] x\nTraceback (most\n  K\n", b"Traceback (most\n  K\n"),
        (b"I1127 14:11:02.9   163 a.cc:1] x\nskipped 40 files\n", b"skipped 40 files\n"),
    ],
)
def test_lines_of_the_runtime_are_kept_back_and_no_others(capfdbinary, printed, passed):
    read, write = os.pipe()
    os.write(write, printed)
    os.close(write)
    log: collections.deque[bytes] = collections.deque()
    with os.fdopen(read, "rb") as stream:
        supervise._relay(stream, log, [False])
    assert capfdbinary.readouterr().err == passed


def test_an_error_of_ours_is_not_taken_for_a_lost_peer():
    with pytest.raises(DataError, match="heartbeat"), supervise.leave_lost_peers():
        raise DataError("there is no data set 'heartbeat'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_timeout": 0}, "--init-timeout is 0; it must be 1 to"),
        ({"heartbeat_timeout": 10**20}, "it must be 1 to 1,000,000 seconds"),
        ({"coordinator": "a:1"}, "go together, with --distributed"),
        ({"coordinator": "a:99999", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 0, "process_id": 0}, "--num-processes is 0"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "must be from 0 to 1"),
    ],
)
def test_options_that_do_not_fit(options, words):
    defaults = {"coordinator": None, "num_processes": None, "process_id": None}
    args = argparse.Namespace(
        **({"distributed": True, "init_timeout": 300, "heartbeat_timeout": 20} | defaults | options)
    )
    with pytest.raises(CommandError, match=words):
        supervise.check_options(args)
