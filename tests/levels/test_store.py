import errno
import json
import os
import re

import pytest
import torch
from safetensors import SafetensorError

from evopress import json_files
from evopress.compress.gptq import GPTQ
from evopress.errors import EvoPressError
from evopress.levels import store
from evopress.levels.store import MANIFEST, DamagedDatabaseError, LevelDatabase, encoded, fingerprint, write_block, write_manifest
from evopress.units import Unit

GPTQ_8_TO_1 = GPTQ(bits=(8, 5, 3, 2, 1), group_size=8)


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.fixture
def written(tmp_path):
    """Write a database of two blocks with two units each; return its folder and the compressor's own results."""
    results, entries = {}, []
    for block in range(2):
        weights = {f"layers.{block}.{kind}": random_weight(6, 16, block) for kind in ("up", "up_proj")}
        compressed = GPTQ_8_TO_1.compress(weights, torch.eye(16))
        units = {n: Unit(n, block, n.rsplit(".", 1)[-1], 96, GPTQ_8_TO_1.levels((6, 16))) for n in weights}
        entries.append(write_block(tmp_path, block, [encoded(compressed, units)], list(compressed)))
        results |= compressed
    write_manifest(tmp_path, method="quant", fingerprint="f" * 16, recipe={"a": 1}, entries=entries)
    return tmp_path, results


def rewrite_manifest(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_what_is_read_is_bit_for_bit_what_the_compressor_returned(written):
    folder, results = written
    database = LevelDatabase.open(folder)
    assert [unit.name for unit in database.space.units] == list(results)
    for i, (name, levels) in enumerate(results.items()):
        assert database.space.units[i].block == int(name.split(".")[1])
        assert database.space.units[i].levels == GPTQ_8_TO_1.levels((6, 16))
        assert database.errors[i] == [level.error for level in levels]
        for j, level in enumerate(levels):
            decoded = database.read(i, j).decode()
            assert decoded.dtype == torch.bfloat16
            assert torch.equal(decoded, level.payload.decode())
    assert database.num_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_a_level_is_found_without_a_look_at_all_that_its_file_has(written):
    """A block of a mixture of experts has thousands of tensors: each of them is looked at when the file is opened."""

    class Key(str):
        looks = 0

        def startswith(self, *args):
            Key.looks += 1
            return super().startswith(*args)

        def rpartition(self, separator):
            Key.looks += 1
            return super().rpartition(separator)

    class File:
        def __init__(self, file):
            self.file = file

        def keys(self):
            return map(Key, self.file.keys())

        def get_tensor(self, name):
            return self.file.get_tensor(name)

    folder, results = written
    database = LevelDatabase.open(folder)
    for block in range(2):
        database._files[block] = File(store.safe_open(folder / store.block_file(block), framework="pt"))
    for i, levels in enumerate(results.values()):
        for j, level in enumerate(levels):
            assert torch.equal(database.read(i, j).decode(), level.payload.decode())
    assert Key.looks == sum(len(database._files[block].file.keys()) for block in range(2))


def test_packed_levels_take_what_their_stored_bits_say(written):
    folder, _ = written
    database = LevelDatabase.open(folder)
    stored = sum(level.stored_bits for unit in database.space.units for level in unit.levels) // 8
    header = 0
    for path in folder.glob("*.safetensors"):
        header += 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) - header == stored


def test_equal_content_is_equal_bytes(written, tmp_path_factory):
    folder, results = written
    other = tmp_path_factory.mktemp("other")
    units = {u.name: u for u in LevelDatabase.open(folder).space.units if u.block == 1}
    write_block(other, 1, [encoded({name: results[name] for name in units}, units)], list(units))
    name = store.block_file(1)
    assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_files_have_the_modes_that_other_files_have(written):
    folder, _ = written
    plain = folder / "plain"
    plain.write_text("")
    assert {path.stat().st_mode for path in folder.iterdir()} == {plain.stat().st_mode}


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_a_damaged_file_is_named(written, damage):
    folder, _ = written
    path = folder / store.block_file(1)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    path.write_bytes({"cut": data[:-5], "grow": data + b"x"}.get(damage, data))
    if damage == "remove":
        path.unlink()
    with pytest.raises(DamagedDatabaseError, match=re.escape(str(path))):
        LevelDatabase.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"schema": 1}', '{"schema": "x"}', "[" * 100_000, "\udcff"])
def test_a_file_that_is_no_manifest_is_damage(written, text):
    folder, _ = written
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DamagedDatabaseError, match=re.escape(MANIFEST)):
        LevelDatabase.open(folder)


def test_no_manifest_no_database(written):
    folder, _ = written
    (folder / MANIFEST).unlink()
    with pytest.raises(DamagedDatabaseError, match=re.escape(MANIFEST)):
        LevelDatabase.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["units"][0]["levels"][0].update(error=0.0),
        lambda m: m["units"][1].update(name="other"),
        lambda m: m["units"][0]["levels"][1].update(cost=1),
        lambda m: m["files"][0].update(bytes=3),
        lambda m: m["recipe"].update(a=2),
        lambda m: m.pop("recipe"),
        lambda m: m.update(digest="0" * 64),
    ],
)
def test_a_changed_number_in_the_manifest_is_damage(written, change):
    folder, _ = written
    rewrite_manifest(folder, change)
    with pytest.raises(DamagedDatabaseError, match=re.escape(MANIFEST)):
        LevelDatabase.open(folder)


def test_a_newer_schema_is_refused_not_rebuilt(written):
    folder, _ = written
    rewrite_manifest(folder, lambda m: m.update(schema=2, new=1))
    with pytest.raises(EvoPressError, match=r"schema 2.*update evopress") as caught:
        LevelDatabase.open(folder)
    assert not isinstance(caught.value, DamagedDatabaseError)


def test_a_file_that_breaks_after_opening_is_named(written):
    folder, _ = written
    database = LevelDatabase.open(folder)
    (folder / store.block_file(0)).write_bytes(b"broken")
    with pytest.raises(DamagedDatabaseError, match=re.escape(store.block_file(0))):
        database.read(0, 0)


def test_the_fingerprint_depends_on_all_of_the_recipe_and_on_no_order():
    recipe = {"model": {"digest": "a", "dtype": "bfloat16"}, "bits": [4, 3], "damping": 0.01}
    assert fingerprint(recipe) == fingerprint(dict(reversed(recipe.items())))
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(recipe))
    changes = [{"model": {"digest": "b", "dtype": "bfloat16"}}, {"bits": [3, 4]}, {"damping": 0.02}, {"more": None}]
    assert len({fingerprint(recipe | change) for change in [{}, *changes]}) == 5


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot be written"), (errno.EACCES, "cannot be written"), (errno.EIO, "disk")],
)
@pytest.mark.parametrize("where", ["save", "replace"])
def test_a_failing_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, code, sentence, where):
    def fail(*args: object) -> None:
        if where == "save":  # safetensors has an error of its own
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store, "save_file", fail) if where == "save" else monkeypatch.setattr(os, "replace", fail)
    weights = {"layers.0.up": random_weight(6, 16, 0)}
    units = {"layers.0.up": Unit("layers.0.up", 0, "up", 96, GPTQ_8_TO_1.levels((6, 16)))}
    with pytest.raises(EvoPressError, match=sentence):
        write_block(tmp_path, 0, [encoded(GPTQ_8_TO_1.compress(weights, torch.eye(16)), units)], list(units))
    assert list(tmp_path.iterdir()) == []


def test_memory_that_runs_out_is_no_damage(written, monkeypatch):
    folder, _ = written
    database = LevelDatabase.open(folder)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(store, "safe_open", full)
    with pytest.raises(torch.OutOfMemoryError):
        database.read(0, 0)


def test_a_manifest_may_have_more_values_than_other_files(written, monkeypatch):
    folder, _ = written
    monkeypatch.setattr(json_files, "MAX_VALUES", 10)
    assert len(LevelDatabase.open(folder).space) == 4
    monkeypatch.setattr(store, "_MANIFEST_VALUES", 10)
    with pytest.raises(DamagedDatabaseError, match="more than 10 values"):
        LevelDatabase.open(folder)
