"""What disks, crashes and hands do to files of ours is seen and mended, or changes nothing: never a silently different level.

Flips are exhaustive in the slow form: every byte of a manifest, a journal, a record of Hessians and a token cache, one bit and all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from faults import spread, tree
from tally import record

from evopress.data.tokens import token_sequences
from evopress.errors import EvoPressError
from evopress.levels import build
from evopress.levels.build import ensure_database
from evopress.levels.calibration import complete_hessians
from evopress.levels.hessians import HessianStore
from evopress.levels.journal import journal_line
from evopress.levels.plan import BuildSettings
from evopress.levels.store import MANIFEST, DamagedDatabaseError, LevelDatabase, block_file, entries_of
from evopress.models.tiny import byte_tokenizer

JOURNAL = "journal.jsonl"
BLOCKS = 2

forms = pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sampled", "every"])


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    """No disk is waited for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def llama(tiny_blocks):
    return tiny_blocks("llama", num_blocks=BLOCKS)


@pytest.fixture(scope="module")
def ids(tokens):
    return tokens(4, 16)


@pytest.fixture(scope="module")
def made(tmp_path_factory, build_settings, llama, ids, compressor) -> Callable[[str], Path]:
    """Return the folder of a whole database of a recipe, which says another one by its name; not to be changed."""

    def of(name: str, **changes: object) -> Path:
        settings = build_settings(tmp_path_factory.mktemp("made"), **changes)
        ensure_database(settings, llama, ids, compressor)
        return settings.folder

    folders = {"whole": of("whole"), "another": of("another", propagate="2", recipe={"model": "tiny", "propagate": "2"})}
    return folders.__getitem__


@pytest.fixture
def settings(tmp_path, made, build_settings) -> BuildSettings:
    """Settings whose folder holds a copy of the whole database."""
    settings = build_settings(tmp_path / "copy")
    shutil.copytree(made("whole"), settings.folder)
    return settings


@pytest.fixture
def unfinished(settings, llama, ids, compressor) -> BuildSettings:
    """Settings whose folder holds a build that was killed before it wrote its manifest."""
    shutil.rmtree(settings.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "write_manifest", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ensure_database(settings, llama, ids, compressor)
    return settings


def flips(data: bytes, *, most: int | None) -> Iterator[tuple[str, bytes]]:
    """Flip every byte in turn, one bit of it and then all; `most` of these if not all."""
    cases = [(at, mask) for at in range(len(data)) for mask in (1 << at % 8, 0xFF)]
    for at, mask in cases if most is None else spread(cases, most):
        changed = bytearray(data)
        changed[at] ^= mask
        yield f"byte {at} ^ {mask:#04x}", bytes(changed)


def cuts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Cut a file off, at its ends and in between, or let it grow."""
    lengths = {0, 1, 2, 7, 8, 9, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1}
    yield from ((f"cut to {length} bytes", data[:length]) for length in sorted(lengths))
    yield from (("a byte more", data + b"\n"), ("twice", data + data), ("zeros", bytes(len(data))))


def survivors(kind: str, path: Path, cases: Iterable[tuple[str, bytes]], check: Callable[[], str | None]) -> None:
    """Write each damaged content to a file in turn, check, give back what was there, and count."""
    whole, injected, wrong = path.read_bytes(), 0, []
    for name, content in cases:
        path.write_bytes(content)
        injected += 1
        try:
            found = check()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found:
            wrong.append(f"{name}: {found}")
    path.write_bytes(whole)
    record(kind, injected=injected, survived=injected - len(wrong), lost=len(wrong))
    assert not wrong, f"{len(wrong)} of {injected}: {wrong[:5]}"


def survives_damage(of: str, path: Path, check: Callable[[], str | None], *, most: int | None) -> None:
    """Flip bytes of a file, at most so many of them, and cut it off or let it grow."""
    data = path.read_bytes()
    survivors(f"a byte flipped in a {of}", path, flips(data, most=most), check)
    survivors(f"a {of} cut off or grown", path, cuts(data), check)


# A finished database


@forms
def test_no_flip_in_a_manifest_changes_a_level(long, settings):
    """Either it is damage, which is built again, or the content is that of before: a space, or an E in a number."""
    path, before = settings.folder / MANIFEST, LevelDatabase.open(settings.folder).manifest

    def check() -> str | None:
        try:
            found = LevelDatabase.open(settings.folder)
        except DamagedDatabaseError:
            return None
        return None if found.manifest == before else "another content is believed"

    survives_damage("manifest", path, check, most=None if long else 120)


@forms
def test_a_database_with_a_flipped_manifest_ends_with_the_same_bytes(long, settings, made, llama, ids, compressor):
    path, before = settings.folder / MANIFEST, tree(made("whole"))
    data = path.read_bytes()
    schema = data.index(b'"schema": 1') + len('"schema": ')
    cases = [*flips(data, most=100 if long else 4), ("schema 9", data[:schema] + b"9" + data[schema + 1 :])]

    def check() -> str | None:
        database, reused = ensure_database(settings, llama, ids, compressor)
        after = tree(settings.folder)
        if reused:  # the same content in other bytes
            return None if database.manifest == json.loads(data) else "another content is believed"
        return None if after == before else "other bytes"

    survivors("a database built again after a flip in its manifest", path, cases, check)


@forms
def test_no_flip_in_a_block_file_is_believed(long, settings):
    def check() -> str | None:
        try:
            LevelDatabase.open(settings.folder)
        except DamagedDatabaseError as error:
            return None if str(path) in str(error) else f"another file is named: {error}"
        return "it is believed"

    for index in range(BLOCKS):
        path = settings.folder / block_file(index)
        survives_damage("block file", path, check, most=2000 if long else 40)


@forms
def test_damaged_block_files_end_with_the_same_bytes(long, settings, made, llama, ids, compressor):
    before = tree(made("whole"))

    def check() -> str | None:
        _, reused = ensure_database(settings, llama, ids, compressor)
        return None if not reused and tree(settings.folder) == before else "not built again as it was"

    for index in range(BLOCKS):
        path = settings.folder / block_file(index)
        cases = [*flips(path.read_bytes(), most=100 if long else 2), *spread([*cuts(path.read_bytes())], 13 if long else 2)]
        survivors("a database built again after damage to a block file", path, cases, check)


# Files in the place of others


def exchange(folder: Path) -> None:
    one, other = (folder / block_file(index) for index in range(2))
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def foreign_block(folder: Path, another: Path) -> None:
    shutil.copy(another / block_file(1), folder)


def foreign_manifest(folder: Path, another: Path) -> None:
    shutil.copy(another / MANIFEST, folder)


def foreign_database(folder: Path, another: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(another, folder)


def foreign_unfinished(folder: Path, another: Path) -> None:
    """A journal of another database, sound in itself, with the files it is of."""
    foreign_database(folder, another)
    entries = entries_of(json.loads((another / MANIFEST).read_bytes()))
    (folder / MANIFEST).unlink()
    for entry in entries.values():
        (folder / JOURNAL).open("a").write(journal_line(another / JOURNAL, entry))


def link_out(folder: Path, another: Path) -> None:
    """A link to a file with the very bytes, in a folder that another database may change."""
    shutil.copy(folder / block_file(1), another.parent / "outside")
    link(folder, another.parent / "outside")


def link(folder: Path, target: Path) -> None:
    (folder / block_file(1)).unlink()
    (folder / block_file(1)).symlink_to(target)


def pipe(folder: Path, another: Path) -> None:
    (folder / block_file(0)).unlink()
    os.mkfifo(folder / block_file(0))


PLACES: dict[str, Callable[[Path, Path], object]] = {
    "block files exchanged": lambda folder, another: exchange(folder),
    "a block file of another database": foreign_block,
    "a manifest of another database": foreign_manifest,
    "a whole other database": foreign_database,
    "another database's unfinished build": foreign_unfinished,
    "a link out of the folder, to the very bytes": link_out,
    "a link to another database's block file": lambda folder, another: link(folder, another / block_file(1)),
    "a link to nothing": lambda folder, another: link(folder, another / "nothing"),
    "a link to itself": lambda folder, another: link(folder, folder / block_file(1)),
    "a pipe": pipe,
    "text in a block file": lambda folder, another: (folder / block_file(0)).write_text("notes"),
    "text in the manifest": lambda folder, another: (folder / MANIFEST).write_text("notes"),
    "no manifest": lambda folder, another: (folder / MANIFEST).unlink(),
    "no block file": lambda folder, another: (folder / block_file(1)).unlink(),
    "no file": lambda folder, another: [path.unlink() for path in folder.iterdir()],
    "no folder": lambda folder, another: shutil.rmtree(folder),
}


@pytest.mark.parametrize("place", PLACES)
def test_files_in_the_place_of_others_are_made_again(place, settings, made, tmp_path, llama, ids, compressor):
    another, before = tmp_path / "others" / made("another").name, tree(made("whole"))
    shutil.copytree(made("another"), another)
    PLACES[place](settings.folder, another)
    outside = tree(tmp_path / "others")
    _, reused = ensure_database(settings, llama, ids, compressor)
    whole = not reused and tree(settings.folder) == before and tree(tmp_path / "others") == outside
    record("a file missing, exchanged, foreign or no file", injected=1, survived=int(whole), lost=int(not whole))
    assert whole


@pytest.mark.parametrize("name", [MANIFEST, block_file(1), JOURNAL])
def test_a_folder_in_the_place_of_a_file_is_named_and_left(name, settings, made, llama, ids, compressor):
    (settings.folder / name).unlink(missing_ok=True)
    (settings.folder / name).mkdir()
    (settings.folder / name / "mine").write_text("to be kept")
    if name == JOURNAL:
        (settings.folder / MANIFEST).unlink()
    left = tree(settings.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "embed", None)  # told before any work
        with pytest.raises(EvoPressError, match=f"{name} (is a folder|cannot be read)"):
            ensure_database(settings, llama, ids, compressor)
    assert tree(settings.folder) == left
    shutil.rmtree(settings.folder / name)
    ensure_database(settings, llama, ids, compressor)
    whole = tree(settings.folder) == tree(made("whole"))
    record("a folder in the place of a file", injected=1, survived=int(whole), lost=int(not whole))
    assert whole


def test_what_else_lies_in_the_folder_is_left_alone(settings, llama, ids, compressor):
    (settings.folder / "notes.txt").write_text("mine")
    (settings.folder / "more").mkdir()
    (settings.folder / "more" / "a").write_text("mine")
    assert ensure_database(settings, llama, ids, compressor)[1]
    (settings.folder / block_file(0)).unlink()
    ensure_database(settings, llama, ids, compressor)
    assert {"notes.txt", "more/a"} < set(tree(settings.folder))


@pytest.mark.parametrize("name", [MANIFEST, block_file(1)])
def test_what_cannot_be_read_now_is_not_thrown_away(name, settings, llama, ids, compressor):
    before, opened = tree(settings.folder), Path.open

    def broken(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == name:
            raise OSError(5, os.strerror(5), str(path))
        return opened(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", broken)
        with pytest.raises(EvoPressError, match=rf"{name} cannot be read \(Input/output error\): check the disk"):
            ensure_database(settings, llama, ids, compressor)
    assert tree(settings.folder) == before
    assert ensure_database(settings, llama, ids, compressor)[1]
    record("a file that cannot be read for a while", injected=1, survived=1)


# An unfinished build


@forms
def test_no_flip_in_a_journal_is_believed(long, unfinished):
    folder = unfinished.folder
    path, before = folder / JOURNAL, build._finished_blocks(folder, BLOCKS)
    assert sorted(before) == list(range(BLOCKS))

    def check() -> str | None:
        found = build._finished_blocks(folder, BLOCKS)
        return None if all(before.get(index) == entry for index, entry in found.items()) else "another content is believed"

    survives_damage("journal", path, check, most=None if long else 120)


@forms
def test_a_build_goes_on_past_a_damaged_journal(long, unfinished, made, llama, ids, compressor):
    path, before = unfinished.folder / JOURNAL, tree(made("whole"))
    data, finished = path.read_bytes(), tree(unfinished.folder)

    def check() -> str | None:
        ensure_database(unfinished, llama, ids, compressor)
        if tree(unfinished.folder) != before:
            return "other bytes"
        (unfinished.folder / MANIFEST).unlink()
        return None

    survivors("a build that goes on past damage to its journal", path, flips(data, most=60 if long else 3), check)
    assert tree(unfinished.folder) == finished


# Hessians


@pytest.fixture
def store(tmp_path, llama, ids) -> HessianStore:
    store = HessianStore(tmp_path / f"hessians-{'5' * 16}")
    complete_hessians(store, llama, ids)
    return store


@forms
def test_no_flip_in_a_store_of_hessians_is_believed(long, store):
    before = [store.read(index) for index in range(BLOCKS)]

    def check() -> str | None:
        if 0 not in store:
            return None
        found = store.read(0)
        same = found.owners == before[0].owners and all(
            torch.equal(H, before[0].hessians[owner]) for owner, H in found.hessians.items()
        )
        return None if same and set(found.hessians) == set(before[0].hessians) else "another content is believed"

    about, file = store.folder / "block-000.json", store.folder / "block-000.safetensors"
    survives_damage("record of Hessians", about, check, most=None if long else 120)
    survives_damage("file of Hessians", file, check, most=2000 if long else 40)


@pytest.mark.parametrize("swapped", [(".safetensors",), (".json",), (".safetensors", ".json")])
def test_exchanged_hessians_are_computed_again(swapped, store, llama, ids):
    before = tree(store.folder)
    for suffix in swapped:
        one, other = (store.folder / f"block-{index:03d}{suffix}" for index in range(2))
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
    assert not any(index in store for index in range(BLOCKS))
    complete_hessians(store, llama, ids)
    assert tree(store.folder) == before
    record("Hessians exchanged or of another text", injected=1, survived=1)


def test_hessians_of_another_text_are_computed_again(store, tmp_path, llama, tokens):
    other, ids = HessianStore(tmp_path / f"hessians-{'6' * 16}"), tokens(4, 16, seed=1)
    complete_hessians(other, llama, ids)
    before = tree(other.folder)
    shutil.rmtree(other.folder)
    shutil.copytree(store.folder, other.folder)
    complete_hessians(other, llama, ids)
    assert tree(other.folder) == before
    record("Hessians exchanged or of another text", injected=1, survived=1)


def test_records_of_hessians_without_a_digest_are_read(store):
    """Those of our first versions: nothing that is on users' disks is computed again."""
    about = store.folder / "block-000.json"
    old = {key: value for key, value in json.loads(about.read_bytes()).items() if key in ("schema", "owners", "sha256")}
    about.write_text(json.dumps(old))
    assert 0 in store


# Tokens


class Text:
    name = "text"

    def identity(self) -> dict[str, str]:
        return {"text": "made up"}

    def documents(self, split: str) -> Iterator[str]:
        yield "some text, " * 20


@forms
def test_no_flip_in_a_token_cache_changes_a_token(long, tmp_path):
    tokenizer = byte_tokenizer()

    def cached() -> torch.Tensor:
        return token_sequences(Text(), "search", tokenizer, sequence_length=8, num_tokens=64, cache_dir=tmp_path / "tokens")

    before = cached()
    (path,) = (tmp_path / "tokens").iterdir()

    def check() -> str | None:
        return None if torch.equal(cached(), before) and [*path.parent.iterdir()] == [path] else "other tokens"

    survives_damage("token cache", path, check, most=None if long else 60)
