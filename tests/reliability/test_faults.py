"""Every call to the disk fails: one sentence, nothing half-written is believed, the next run ends with the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from faults import KINDS, NO_ACCESS, READ_ONLY, FaultyDisk, Kind, is_temporary, spread, tree
from tally import record

from evopress.data.tokens import token_sequences
from evopress.errors import EvoPressError
from evopress.files import write_atomically
from evopress.levels import build, locking
from evopress.levels.build import ensure_database
from evopress.levels.calibration import complete_hessians
from evopress.levels.hessians import HessianStore
from evopress.levels.modules import ensure_modules
from evopress.levels.plan import BuildSettings
from evopress.levels.store import MANIFEST, block_file
from evopress.models.tiny import byte_tokenizer
from evopress.units import Level, Space, Unit

PLAIN = 16
"""Cases of each scenario in the plain suite; the slow form has all."""


@dataclass
class Scenario:
    """Something that writes below a folder, from a given state of it; `blocks` are those that were compressed."""

    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    blocks: list[int] = field(default_factory=list)
    sweeps: bool = False
    """Whether the next run removes what the disk did not let the failed one remove."""
    known: Callable[[Path], set[int]] | None = None
    """Blocks that need not be compressed again, given what a failed run left."""
    needed: bool = True
    """Whether nothing goes on without its files; else it does where they may only be read."""


@pytest.fixture(scope="module")
def llama(tiny_blocks):
    return tiny_blocks("llama", num_blocks=2)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """Thousands of builds: syncs are counted and may fail, but no disk is waited for, and no lock for long."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(locking, "LOCK_TIMEOUT", 0.5)


def nothing(root: Path) -> None:
    pass


@pytest.fixture
def scenario(request, tmp_path, llama, tokens, compressor, build_settings, monkeypatch) -> Scenario:
    ids = tokens(4, 16)

    def building(*, damaged: bool = False, **changes: object) -> Scenario:
        def settings(root: Path, **more: object) -> BuildSettings:
            kept = HessianStore(root / "tiny" / f"hessians-{'5' * 16}") if "propagate" in changes else None
            return build_settings(root, hessians=kept, lock_timeout=0.5, **changes, **more)

        def prepare(root: Path) -> None:
            if damaged:
                ensure_database(settings(root), llama, ids, compressor)
                folder = settings(root).folder
                (folder / block_file(1)).write_bytes((folder / block_file(1)).read_bytes()[:-1] + b"?")

        def known(root: Path) -> set[int]:
            folder = settings(root).folder
            if (folder / MANIFEST).exists():
                whole = reference[str((folder / block_file(1)).relative_to(root))]
                return {0} | ({1} if (folder / block_file(1)).read_bytes() == whole else set())
            lines = (folder / "journal.jsonl").read_text().split("\n")[:-1] if (folder / "journal.jsonl").exists() else []
            was_there = {0} if damaged else set()  # what an earlier run finished is never lost
            return was_there | {json.loads(line)["block"] for line in lines}

        scenario = Scenario(prepare, lambda root: ensure_database(settings(root), llama, ids, compressor), sweeps=True, known=known)
        compress = build._compress_part
        monkeypatch.setattr(build, "_compress_part", lambda b, i, *args: scenario.blocks.append(i) or compress(b, i, *args))
        reference.update(clean(scenario, tmp_path / "reference"))
        return scenario

    reference: dict[str, bytes | str] = {}
    store = "hessians"
    levels = (Level("keep", 1, "keep", 0), Level("drop", 0, "drop", 0))
    space = Space("drop", tuple(Unit(f"layers.{i}.mlp", i, "mlp", 4, levels) for i in range(2)))
    return {
        "a level database": lambda: building(),
        "a level database with its Hessians, activations on disk": lambda: building(propagate=None, activations="disk"),
        "a level database with a damaged block": lambda: building(damaged=True),
        "Hessians alone": lambda: Scenario(
            nothing, lambda root: complete_hessians(HessianStore(root / store), llama, ids, activations="disk")
        ),
        "a manifest of modules": lambda: Scenario(
            nothing, lambda root: ensure_modules(root, model_name="tiny", method="drop", recipe={"a": 1}, space=space) and None
        ),
        "a token cache": lambda: Scenario(nothing, lambda root: cached(root), needed=False),
        "a file written over another": lambda: Scenario(
            lambda root: (root / "file").write_text("old" * 50),
            lambda root: write_atomically(root / "file", lambda path: path.write_text("new" * 70)),
        ),
    }[request.param]()


SCENARIOS = (
    "a level database",
    "a level database with its Hessians, activations on disk",
    "a level database with a damaged block",
    "Hessians alone",
    "a manifest of modules",
    "a token cache",
    "a file written over another",
)


class Text:
    name = "text"

    def identity(self) -> dict[str, str]:
        return {"text": "made up"}

    def documents(self, split: str) -> Iterator[str]:
        yield from ("some text, " * 20, "and some more. " * 20)


def cached(root: Path) -> None:
    found = token_sequences(Text(), "search", byte_tokenizer(), sequence_length=8, num_tokens=64, cache_dir=root / "tokens")
    assert found.shape == (8, 8) and found[0, 0] == byte_tokenizer()("s")["input_ids"][0]


def clean(scenario: Scenario, root: Path) -> dict[str, bytes | str]:
    root.mkdir()
    scenario.prepare(root)
    scenario.act(root)
    return tree(root)


def what_went_wrong(scenario: Scenario, root: Path, disk: FaultyDisk, reference: dict[str, bytes | str]) -> str | None:
    """Let one call fail, look at what is left, go on with a sound disk, and say what is not as it should be."""
    root.mkdir()
    scenario.prepare(root)
    before = tree(root)
    try:
        with disk.installed():
            scenario.act(root)
        failed = False
    except EvoPressError as error:
        failed = True
        if "\n" in str(error) or len(str(error)) < 30 or ": " not in str(error):
            return f"no sentence: {error}"
    except Exception as error:
        return f"a traceback: {type(error).__name__}: {error}"
    left = tree(root)
    for name, content in left.items():
        if not is_temporary(name) and not name.endswith("journal.jsonl") and content not in (reference.get(name), before.get(name)):
            return f"{name} is half-written"
    removable = not disk.kind.lasts and disk.calls[disk.at or 0] != "remove"
    if any(map(is_temporary, left)) and removable:
        return f"left behind: {[name for name in left if is_temporary(name)]}"
    without = not scenario.needed and disk.kind in (READ_ONLY, NO_ACCESS)
    if not failed and not without and {name: left[name] for name in left if removable or not is_temporary(name)} != reference:
        return "it said nothing, but its files are not those of a clean run"
    known = scenario.known(root) if scenario.known else None
    scenario.blocks.clear()
    try:
        scenario.act(root)
    except Exception as error:
        return f"the next run fails: {type(error).__name__}: {error}"
    after = {name: content for name, content in tree(root).items() if (scenario.sweeps and failed) or not is_temporary(name)}
    if after != reference:
        return f"the next run ends with other files: {[n for n in {*after, *reference} if after.get(n) != reference.get(n)]}"
    if known is not None and scenario.blocks != [index for index in range(2) if index not in known]:
        return f"the next run compressed the blocks {scenario.blocks} although {known} were there"
    return None


def inject(scenario: Scenario, root: Path, *, most: int | None) -> list[str]:
    """Let each call fail in each way, or `most` of them; return what went wrong."""
    reference = clean(scenario, root / "clean")
    counting = FaultyDisk(root / "counted")
    counting.root.mkdir()
    scenario.prepare(counting.root)
    with counting.installed():
        scenario.act(counting.root)
    assert tree(counting.root) == reference
    assert len(counting.calls) > 5
    cases: list[tuple[int, Kind]] = [(at, kind) for at in range(len(counting.calls)) for kind in KINDS]
    wrong = []
    cases = cases if most is None else spread(cases, most)
    for at, kind in cases:
        found = what_went_wrong(scenario, root / "trial", FaultyDisk(root / "trial", kind, at), reference)
        if found:
            wrong.append(f"call {at} ({counting.calls[at]}), {kind.name}: {found}")
        shutil.rmtree(root / "trial")
    return [f"{len(cases)}", *wrong]


@pytest.mark.parametrize("scenario", SCENARIOS, indirect=True)
def test_any_call_may_fail(scenario, tmp_path, request):
    count, *wrong = inject(scenario, tmp_path, most=PLAIN)
    record("a disk that fails at a call (plain form)", injected=int(count), survived=int(count) - len(wrong), lost=len(wrong))
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, indirect=True)
def test_every_call_may_fail_in_every_way(scenario, tmp_path, request):
    count, *wrong = inject(scenario, tmp_path, most=None)
    name = request.node.callspec.params["scenario"]
    record(f"every call to the disk fails, {name}", injected=int(count), survived=int(count) - len(wrong), lost=len(wrong))
    assert not wrong


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Return a function that makes a disk of so many bytes, or resizes it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: int) -> Path:
        options = f"size={size}" if not folder.is_mount() else f"remount,size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="a disk of its own needs mount")
@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_a_disk_that_is_really_full(activations, small_disk, tmp_path, llama, tokens, compressor, build_settings, monkeypatch):
    ids = tokens(32, 64)  # a quarter of a megabyte of activations
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12))  # as if others took it
    reference = tmp_path / "reference"
    ensure_database(build_settings(reference), llama, ids, compressor)
    needed = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    needed += 32 * 64 * 32 * 4 if activations == "disk" else 0
    sizes = [*range(2**14, needed, 2**14)]
    wrong = []
    for size in sizes:
        root = small_disk(size)
        settings = build_settings(root, activations=activations)
        ended = in_child(lambda settings=settings: ensure_database(settings, llama, ids, compressor))
        if "the disk is full" not in ended:
            wrong.append(f"{size} bytes: {ended}")
        small_disk(2**23)
        ensure_database(settings, llama, ids, compressor)
        if tree(root) != tree(reference):
            wrong.append(f"{size} bytes: the next run ends with other files")
        subprocess.run(["umount", str(root)], check=True)
    record(
        "a disk that is really full while a level database is built",
        injected=len(sizes),
        survived=len(sizes) - len(wrong),
        lost=len(wrong),
    )
    assert not wrong


def in_child(work: Callable[[], object]) -> str:
    """Do work in a forked child, which a mapped file may end; return its error, or how it ended."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()

    def tell() -> None:
        try:
            work()
            its.send("no error")
        except EvoPressError as error:
            its.send(str(error))

    child = context.Process(target=tell)
    child.start()
    child.join(timeout=120)
    if child.is_alive():
        child.kill()
        return "it hangs"
    return str(mine.recv()) if child.exitcode == 0 else f"it died: {child.exitcode}"
