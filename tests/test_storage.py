"""Folders and files appear completely or not at all, and other files are left alone."""

import pytest

from paramshare.storage import read_json, write_text, written_whole


class NotWritten(Exception):
    pass


def test_the_folder_appears_at_the_end(tmp_path):
    with written_whole(tmp_path / "deep" / "new", NotWritten) as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "deep" / "new").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    assert (tmp_path / "deep" / "new" / "file").read_text() == "content"


@pytest.mark.parametrize(
    ("reason", "raised"),
    [
        (OSError(28, "No space left"), NotWritten),
        (KeyError("a"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_nothing(tmp_path, reason, raised):
    """Errors that have nothing to do with files are raised as they are."""
    with pytest.raises(raised), written_whole(tmp_path / "new", NotWritten) as folder:
        (folder / "file").write_text("content")
        raise reason
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_kept(tmp_path):
    (tmp_path / "file").write_text("other")
    with (
        pytest.raises(NotWritten, match="below cannot be written"),
        written_whole(tmp_path / "file" / "below", NotWritten),
    ):
        pass
    with (
        pytest.raises(NotWritten, match="new cannot be written"),
        written_whole(tmp_path / "new", NotWritten),
    ):
        (tmp_path / "new").mkdir()  # meanwhile
        (tmp_path / "new" / "file").write_text("other")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["file", "new", "new/file"]


def test_a_text_replaces_the_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "first")
    write_text(path, "é")
    assert path.read_bytes() == "é".encode() and list(tmp_path.iterdir()) == [path]

    def fail(*args):
        raise OSError("interrupted")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="interrupted"):
        write_text(path, "half")
    assert path.read_text(encoding="utf-8") == "é"


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff"])
def test_json_that_cannot_be_read_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(NotWritten, match=r"a\.json .*; remove it"):
        read_json(tmp_path / "a.json", NotWritten)
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "a.json", NotWritten) == {"a": [1]}
