"""A kill, a full disk or a damaged level in the middle of an export, in every format: what was there before is there, whole."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evopress.errors import EvoPressError
from evopress.export.exporter import Export, write_export
from evopress.export.named import make_exporters
from evopress.levels.live import LiveModel
from evopress.levels.store import DamagedDatabaseError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="what is killed is a forked child")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_child(work: Callable[[], object]) -> str:
    """Do work in a forked child; return its error, how it was killed, or that it was done."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()

    def tell() -> None:
        try:
            work()
            its.send("done")
        except EvoPressError as error:
            its.send(str(error))

    child = context.Process(target=tell)
    child.start()
    child.join(timeout=60)
    return str(mine.recv()) if child.exitcode == 0 else signal.Signals(-(child.exitcode or 0)).name


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def with_event(export: Export, happens: Callable[[], None], *, at: int) -> Export:
    """Let something happen when so many levels have been read."""
    levels, count = export.levels, 0

    class Levels:
        folder, space = levels.folder, levels.space

        def read(self, unit: int, level: int, device: Any = "cpu") -> Any:
            nonlocal count
            count += 1
            if count == at:
                happens()
            return levels.read(unit, level, device)

    return replace(export, live=LiveModel(export.live.blocks, Levels(), cache_bytes=0))


def damaged() -> None:
    raise DamagedDatabaseError("block-00001.safetensors cannot be read: start again")


def no_room(work: Callable[[], object], *, size: int) -> None:
    """Work where no file may be larger than some bytes: whatever writes it, the system refuses the next one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    work()


def half_removed(path: Any, ignore_errors: bool = False) -> None:
    """Remove a file of what is to be removed, and die."""
    if found := sorted(path.rglob("*.*")) if Path(path).is_dir() else []:
        found[0].unlink()
        kill()


@pytest.mark.parametrize("what", ["dequantized", "mlx", "gguf", "compressed_tensors", "gptq"])
def test_what_was_there_stays_whole_and_the_next_export_is_as_ever(
    what: str, exported: Callable[..., Export], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, exporter, folder = exported(packed=True), make_exporters([what], {})[what], tmp_path / what
    reference = tree(write_export(exporter, folder, export))
    largest = max(len(content) for content in reference.values())
    other = replace(export, provenance={"another": 1})  # what would be written in its place
    for happens, sentence in ((kill, "SIGKILL"), (damaged, "block-00001.safetensors cannot be read")):
        broken = with_event(other, happens, at=12)
        assert sentence in in_child(lambda broken=broken: write_export(exporter, folder, broken))
        assert tree(folder) == reference, "what was there before"
    for size in (largest // 2, 100):
        full = in_child(lambda size=size: no_room(lambda: write_export(exporter, folder, other), size=size))
        assert f"{folder} cannot be written" in full or "disk is full" in full
        assert tree(folder) == reference
        assert [path.name for path in tmp_path.iterdir()] == [what]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half_removed)
        assert in_child(lambda: write_export(exporter, folder, other)) == "SIGKILL"
    assert tree(folder).keys() == reference.keys(), "the new one, or the older, whole"
    assert tree(write_export(exporter, folder, export)) == reference
    assert [path.name for path in tmp_path.iterdir()] == [what]
