"""What there is, and the one comparison of it with what work takes: on one process, and on several that share a machine."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from evopress.errors import EvoPressError
from evopress.resources import Needs, Room, check_room, disks

GB = 10**9
SEARCH = Needs("search", "", memory=3 * GB)


@pytest.mark.parametrize("offload", [False, True])
def test_what_is_followed_already_is_not_advised(offload: bool) -> None:
    with pytest.raises(EvoPressError, match="the stage search needs about 2 kB on cuda but 1 kB are free") as caught:
        check_room([Needs("search", "", device=2000)], [Room("here", GB, 1000, "cuda")], offload=offload)
    assert ("model.offload=true" in str(caught.value)) != offload


@pytest.mark.parametrize(
    ("needs", "rooms", "says"),
    [
        (SEARCH, [Room("a", 3 * GB)], None),
        (SEARCH, [Room("a", 6 * GB), Room("a", 6 * GB)], None),
        (SEARCH, [Room("a", 6 * GB), Room("a", 5 * GB)], "needs about 6 GB of memory for 2 processes on a but 5 GB are free"),
        (SEARCH, [Room("a", 3 * GB), Room("b", 3 * GB)], None),
        (SEARCH, [Room("a", 3 * GB), Room("b", 2 * GB)], "needs about 3 GB of memory for 1 process on b but 2 GB are free"),
        # The others have yet to load the model; the first one's is in use already.
        (
            SEARCH,
            [Room("a", 7 * GB), Room("a", 7 * GB, to_load=2 * GB)],
            "8 GB of memory for 2 processes on a, the model included,",
        ),
        (Needs("export", "", memory=3 * GB, alone=True), [Room("a", 3 * GB), Room("a", 3 * GB)], None),
        (Needs("search", "", device=2 * GB), [Room("a", GB, 2 * GB, "cuda:0"), Room("a", GB, 2 * GB, "cuda:1")], None),
        (
            Needs("search", "", device=2 * GB),
            [Room("a", GB, 2 * GB, "cuda:0"), Room("a", GB, 2 * GB, "cuda:1", to_load_there=GB)],
            "needs about 3 GB on cuda:1, the model included, but 2 GB are free",
        ),
    ],
)
def test_processes_share_the_memory_of_their_machine_and_have_a_device_each(
    needs: Needs, rooms: list[Room], says: str | None
) -> None:
    if says is None:
        check_room([needs], rooms)
        return
    with pytest.raises(EvoPressError) as caught:
        check_room([needs], rooms)
    assert str(caught.value).startswith("the stage search needs about") and says in str(caught.value)
    assert ("start fewer processes" in str(caught.value)) == ("2 processes" in says)


def test_what_is_written_is_added_up_by_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "a" / "not" / "there", tmp_path / "b"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    assert disks(folders) == [(folders, 1000)]
    check_room([Needs("database", "", disk={folders[0]: 500}), Needs("search", "", disk={folders[1]: 400})], [Room("a", 0)])
    with pytest.raises(EvoPressError, match=r"this run needs 1 kB of disk \(database 500 B, search 500 B\) but .* has 1 kB free"):
        check_room([Needs("database", "", disk={folders[0]: 500}), Needs("search", "", disk={folders[1]: 500})], [Room("a", 0)])
