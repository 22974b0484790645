import logging
from pathlib import Path

import pytest
from filelock import FileLock

from evopress.errors import EvoPressError
from evopress.levels.locking import alone_in, clear, lock_of

LEFT = (".manifest.json.12-ab.tmp", ".tmpXYZ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, and what a process that was killed has left in it."""
    folder = tmp_path / "drop-0"
    folder.mkdir()
    for name in ("manifest.json", *LEFT):
        (folder / name).write_text("{}")
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_writer_removes_what_a_killed_one_left(folder: Path) -> None:
    with alone_in(folder):
        assert names(folder) == {"manifest.json"}
        with pytest.raises(EvoPressError, match=r"another process has held .*drop-0\.lock for 0 s"), alone_in(folder, timeout=0.0):
            pass
    with alone_in(folder, timeout=0.0):  # given back
        pass


def test_only_what_is_named_is_removed(folder: Path) -> None:
    with alone_in(folder, temporaries=(".tmp*",)):
        assert names(folder) == {"manifest.json", LEFT[0]}


def test_a_folder_is_cleared_unless_another_process_is_at_work_there(folder: Path) -> None:
    with FileLock(lock_of(folder)):
        clear(folder)
        assert names(folder) == {"manifest.json", *LEFT}
    clear(folder)
    assert names(folder) == {"manifest.json"}


def test_nothing_is_locked_where_there_is_nothing_to_clear(folder: Path) -> None:
    for name in LEFT:
        (folder / name).unlink()
    clear(folder)
    assert not lock_of(folder).exists()  # so that a folder which may only be read can be opened


def test_waiting_is_said_once_there_is_someone_to_wait_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with alone_in(folder, waiting="waiting for another"):
        assert not caplog.text
        with pytest.raises(EvoPressError), alone_in(folder, timeout=0.0, waiting="waiting for another"):
            pass
    assert "waiting for another" in caplog.text
