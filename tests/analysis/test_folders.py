"""Folders appear whole, or not at all, and nothing that others wrote is lost."""

import pytest

from paramshare.analysis.folders import written_whole


class NotWritten(Exception):
    pass


def test_the_folder_appears_at_the_end(tmp_path):
    with written_whole(tmp_path / "deep" / "new", NotWritten) as fresh:
        (fresh / "file").write_text("content")
        assert not (tmp_path / "deep" / "new").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    assert (tmp_path / "deep" / "new" / "file").read_text() == "content"


@pytest.mark.parametrize(("reason", "raised"), [(OSError(28, "No space left"), NotWritten), (KeyError("a"), KeyError)])
def test_nothing_is_left_of_a_failure(tmp_path, reason, raised):
    """What has nothing to do with files is raised as it is; so is an interrupt."""
    for its, wanted in ((reason, raised), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(wanted), written_whole(tmp_path / "new", NotWritten) as fresh:
            (fresh / "file").write_text("content")
            raise its
        assert not list(tmp_path.iterdir())


def test_what_others_wrote_stays(tmp_path):
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(NotWritten, match="below cannot be written"), written_whole(tmp_path / "file" / "below", NotWritten):
        pass
    with pytest.raises(NotWritten, match="new cannot be written"), written_whole(tmp_path / "new", NotWritten):
        (tmp_path / "new").mkdir()  # meanwhile
        (tmp_path / "new" / "file").write_text("theirs")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["file", "new", "new/file"]
