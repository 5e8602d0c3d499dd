"""Folders and files appear completely or not at all, and other files are left alone."""

import os
import pathlib
import resource
import shutil
import subprocess
import sys

import pytest

from paramshare.storage import (
    StorageError,
    check_room,
    json_text,
    local_path,
    read_json,
    write_text,
    written_whole,
)


def test_the_folder_appears_at_the_end(tmp_path):
    with written_whole(tmp_path / "deep" / "new") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "deep" / "new").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    assert (tmp_path / "deep" / "new" / "file").read_text() == "content"


@pytest.mark.parametrize(
    ("reason", "raised"),
    [
        (OSError(28, "No space left"), StorageError),
        (KeyError("a"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_nothing(tmp_path, reason, raised):
    """Errors that have nothing to do with files are raised as they are."""
    with pytest.raises(raised), written_whole(tmp_path / "new") as folder:
        (folder / "file").write_text("content")
        raise reason
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_kept(tmp_path):
    (tmp_path / "file").write_text("other")
    with (
        pytest.raises(StorageError, match="below cannot be written"),
        written_whole(tmp_path / "file" / "below"),
    ):
        pass
    with (
        pytest.raises(StorageError, match="new cannot be written"),
        written_whole(tmp_path / "new"),
    ):
        (tmp_path / "new").mkdir()  # meanwhile
        (tmp_path / "new" / "file").write_text("other")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["file", "new", "new/file"]


@pytest.mark.parametrize("reason", [OSError("interrupted"), KeyboardInterrupt()])
def test_a_text_replaces_the_file_at_once(tmp_path, monkeypatch, reason):
    path = tmp_path / "file"
    write_text(path, "first")
    write_text(path, "é")
    assert path.read_bytes() == "é".encode() and list(tmp_path.iterdir()) == [path]

    def fail(*args):
        raise reason

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        write_text(path, "half")
    assert path.read_text(encoding="utf-8") == "é" and list(tmp_path.iterdir()) == [path]


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to("victim")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "link").read_text() == "new" and not (tmp_path / "link").is_symlink()


def test_the_umask_is_respected(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
        with written_whole(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder")]
    assert modes == [0o640, 0o750]


def test_what_a_killed_process_left_is_removed(tmp_path):
    """What a live process, or another program, has there is kept."""
    killed = """if True:
        import os, pathlib, sys
        from paramshare.storage import written_whole
        with written_whole(pathlib.Path(sys.argv[1])) as folder:
            (folder / "file").write_text("half")
            os._exit(9)
    """
    for name in ("new", "file"):
        subprocess.run([sys.executable, "-c", killed, tmp_path / name], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".new-of-mine").mkdir()
    with written_whole(tmp_path / "new") as live:
        write_text(tmp_path / "file", "text")
        with written_whole(tmp_path / "new"):
            assert live.is_dir()
        assert live.is_dir()
        shutil.rmtree(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new-of-mine", "file", "new"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "'' is not a valid path"),
        ("a\0b", "is not a valid path"),
        ("gs://bucket/run", "'gs://bucket/run' is a URL"),
        (pathlib.Path("s3://bucket/run"), "'s3://bucket/run' is a URL"),
        ("a/" + "b" * 256, "has a name of 256 bytes"),
        ("é" * 128, "has a name of 256 bytes"),
        ("a/" * 2100, "4200 characters"),
    ],
)
def test_paths_that_are_none(path, words):
    with pytest.raises(StorageError, match=words) as caught:
        local_path(path)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("path", ["a", "/a/b:c", "C:/run", "a" * 255])
def test_paths(path):
    assert local_path(path) == pathlib.Path(path)


def test_room_for_a_file_is_checked_before_it_is_written(tmp_path):
    check_room(tmp_path, 1000)
    with pytest.raises(StorageError, match=r"\(No space left on device\); free some space"):
        check_room(tmp_path, 2**62)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError, match=r"\(File too large\); raise the limit"):
            check_room(tmp_path, 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_json_has_no_nan():
    assert (
        json_text({"a": [1.5, float("nan")], "b": float("inf")}) == '{"a": [1.5, null], "b": null}'
    )


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff", b"[" * 10**6])
def test_json_that_cannot_be_read_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(KeyError, match=r"a\.json .*; remove it"):
        read_json(tmp_path / "a.json", KeyError, "remove it")
    (tmp_path / "a.json").write_text('{"a": ' + "[" * 900 + "]" * 900 + ', "sha256": "1"}')
    with pytest.raises(KeyError, match="has changed since it was written"):
        read_json(tmp_path / "a.json", KeyError, "")
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "a.json", KeyError, "") == {"a": [1]}
