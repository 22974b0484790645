"""Several processes and one database: they take turns, the dead hold up nobody, and no clock matters."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from faults import tree
from tally import record

from evopress.errors import EvoPressError
from evopress.levels import build, locking
from evopress.levels.build import ensure_database
from evopress.levels.hessians import HessianStore
from evopress.levels.store import MANIFEST

fork = multiprocessing.get_context("fork")
PATIENCE = 120.0
"""Seconds that a child gets on a busy machine."""


@pytest.fixture(scope="module")
def llama(tiny_blocks):
    return tiny_blocks("llama", num_blocks=3)


@pytest.fixture(scope="module")
def ids(tokens):
    return tokens(4, 16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, build_settings, llama, ids, compressor) -> dict[str, bytes | str]:
    settings = build_settings(tmp_path_factory.mktemp("whole"))
    ensure_database(settings, llama, ids, compressor)
    return tree(settings.folder)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError("the other process never came so far")
        time.sleep(0.005)


@contextmanager
def children(*works: Callable[[], object]) -> Iterator[list[BaseProcess]]:
    """Run functions in forked children, none of which outlives the test."""
    started: list[BaseProcess] = [fork.Process(target=work) for work in works]
    try:
        for child in started:
            child.start()
        yield started
    finally:
        for child in started:
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
            child.join()


def note(path: Path, *words: Any) -> None:
    """Append a line to a file that several processes share."""
    with path.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_processes_that_want_one_database_build_it_once(
    count, tmp_path, build_settings, llama, ids, compressor, whole, monkeypatch
):
    settings, log = build_settings(tmp_path / "root", lock_timeout=PATIENCE), tmp_path / "log"
    compress, attempt = build._compress_part, locking._taken

    def compressing(blocks: Any, index: int, *args: Any) -> Any:
        until(lambda: sum(line[0] == "waits" for line in lines(log)) == count - 1)  # so that they surely meet
        note(log, "compresses", index)
        return compress(blocks, index, *args)

    def attempting(lock: Any) -> bool:
        got = attempt(lock)
        if not got:
            note(log, "waits", os.getpid())
        return got

    monkeypatch.setattr(build, "_compress_part", compressing)
    monkeypatch.setattr(locking, "_taken", attempting)

    def work() -> None:
        database, reused = ensure_database(settings, llama, ids, compressor)
        note(log, "reused" if reused else "built", database.fingerprint)

    with children(*[work] * count) as processes:
        for process in processes:
            process.join(timeout=PATIENCE)
        codes = [process.exitcode for process in processes]
    seen = Counter(tuple(line) for line in lines(log) if line[0] != "waits")
    expected = Counter({("compresses", str(index)): 1 for index in range(3)})
    expected |= Counter({("built", settings.fingerprint): 1, ("reused", settings.fingerprint): count - 1})
    good = codes == [0] * count and seen == expected and tree(settings.folder) == whole
    record("processes that build one database at once", injected=count, survived=count if good else 0, lost=0 if good else count)
    assert codes == [0] * count
    assert seen == expected
    assert tree(settings.folder) == whole


@contextmanager
def stopped_in_block(settings: Any, index: int, llama: Any, ids: Any, compressor: Any, log: Path) -> Iterator[BaseProcess]:
    """A child that holds the lock and waits for ever in a block."""
    compress = build._compress_part

    def compressing(blocks: Any, at: int, *args: Any) -> Any:
        if at == index:
            note(log, "there")
            time.sleep(PATIENCE)
        return compress(blocks, at, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compress_part", compressing)
        with children(lambda: ensure_database(settings, llama, ids, compressor)) as (child,):
            patch.undo()  # the child has its own copy
            until(lambda: lines(log) != [])
            yield child


@pytest.mark.parametrize("index", [0, 2])
def test_the_lock_of_a_dead_process_holds_up_nobody(
    index, tmp_path, build_settings, llama, ids, compressor, whole, monkeypatch, caplog
):
    settings = build_settings(tmp_path / "root", lock_timeout=0.2)
    with stopped_in_block(settings, index, llama, ids, compressor, tmp_path / "log") as child:
        with pytest.raises(EvoPressError, match=r"another process has held .*\.lock for 0\.2 s: end it, or use another"):
            ensure_database(settings, llama, ids, compressor)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert settings.folder.with_name(f"{settings.folder.name}.lock").exists()
        built = []
        compress = build._compress_part
        monkeypatch.setattr(build, "_compress_part", lambda b, i, *args: built.append(i) or compress(b, i, *args))
        caplog.clear()
        ensure_database(settings, llama, ids, compressor)  # with no time to wait
    good = built == list(range(index, 3)) and tree(settings.folder) == whole
    record("the lock of a process that was killed", injected=1, survived=int(good), lost=int(not good))
    assert built == list(range(index, 3))
    assert tree(settings.folder) == whole
    assert "waiting for another run" not in caplog.text


def test_a_lock_file_that_lies_around_is_no_lock(tmp_path, build_settings, llama, ids, compressor, whole):
    settings = build_settings(tmp_path, lock_timeout=0.2)
    settings.folder.parent.mkdir(parents=True)
    lock = settings.folder.with_name(f"{settings.folder.name}.lock")
    lock.write_text("1 elsewhere")
    os.utime(lock, (2**33, 2**33))  # of a machine whose clock is wrong
    ensure_database(settings, llama, ids, compressor)
    assert tree(settings.folder) == whole


def test_builds_that_share_a_store_of_hessians_do_not_spoil_it(tmp_path, build_settings, llama, ids, compressor):
    """Databases of two recipes are built at once from dense activations; each keeps every block's Hessians."""
    root = tmp_path / "root"
    store = HessianStore(root / "tiny" / f"hessians-{'5' * 16}")
    several = [
        build_settings(root, propagate=None, recipe={"number": number}, hessians=store, lock_timeout=PATIENCE)
        for number in range(2)
    ]
    with children(
        *[lambda settings=settings: ensure_database(settings, llama, ids, compressor) for settings in several]
    ) as processes:
        for process in processes:
            process.join(timeout=PATIENCE)
        assert [process.exitcode for process in processes] == [0, 0]
    assert all(index in store for index in range(3))
    alone = build_settings(tmp_path / "alone", propagate=None, recipe={"number": 0})
    ensure_database(alone, llama, ids, compressor)
    blocks = [{name: data for name, data in tree(settings.folder).items() if name != MANIFEST} for settings in (alone, *several)]
    assert blocks[0] == blocks[1] == blocks[2]
    record("processes that build databases from one store of Hessians", injected=2, survived=2)


class BackwardClock:
    """A clock that is an hour earlier at each look."""

    def __init__(self) -> None:
        self.now = time.time()
        self.looks = 0

    def time(self) -> float:
        self.now -= 3600.0
        self.looks += 1
        return self.now

    def time_ns(self) -> int:
        return int(self.time() * 1e9)


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, build_settings, llama, ids, compressor, whole, monkeypatch):
    settings, clock = build_settings(tmp_path / "root", lock_timeout=PATIENCE), BackwardClock()
    compress = build._compress_part

    def crashing(blocks: Any, index: int, *args: Any) -> Any:
        for path in settings.folder.iterdir():  # all that is there is of the future
            os.utime(path, (2**33, 2**33))
        if index == 2:
            raise KeyboardInterrupt
        return compress(blocks, index, *args)

    monkeypatch.setattr(time, "time", clock.time)
    monkeypatch.setattr(time, "time_ns", clock.time_ns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compress_part", crashing)
        with pytest.raises(KeyboardInterrupt):
            ensure_database(settings, llama, ids, compressor)
    ensure_database(settings, llama, ids, compressor)
    good = tree(settings.folder) == whole
    for path in settings.folder.iterdir():
        os.utime(path, (0, 0))
    good = good and ensure_database(settings, llama, ids, compressor)[1]
    record("a clock that goes backwards during a build", injected=1, survived=int(good), lost=int(not good))
    assert good


def test_a_clock_that_goes_backwards_ends_no_wait_early_or_late(tmp_path, build_settings, llama, ids, compressor, monkeypatch):
    settings, clock = build_settings(tmp_path / "root", lock_timeout=0.3), BackwardClock()
    with stopped_in_block(settings, 0, llama, ids, compressor, tmp_path / "log"):
        monkeypatch.setattr(time, "time", clock.time)
        with pytest.raises(EvoPressError, match="another process has held"):
            ensure_database(settings, llama, ids, compressor)
    record("a clock that goes backwards during a build", injected=1, survived=1)
