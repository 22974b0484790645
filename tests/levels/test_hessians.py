"""Hessians on disk: what comes back, what is computed again, and that nothing else changes."""

import errno
import json
import logging
from collections import namedtuple

import pytest
import torch
from safetensors import SafetensorError

from evopress import resources
from evopress.compress.sparsegpt import SparseGPT
from evopress.errors import EvoPressError
from evopress.levels import compressing, store
from evopress.levels.build import ensure_database
from evopress.levels.calibration import collect_hessians, complete_hessians
from evopress.levels.hessians import BlockHessians, HessianStore
from evopress.levels.plan import database_bytes, plan_space


@pytest.fixture(scope="module")
def ids(tokens):
    return tokens(6, 16)


@pytest.fixture
def llama(tiny_blocks):
    return tiny_blocks("llama", num_blocks=3)


@pytest.fixture
def forwards(llama, monkeypatch):
    """Record the blocks that activations pass."""
    seen = []
    run = llama.run
    monkeypatch.setattr(llama, "run", lambda index, states: seen.append(index) or run(index, states))
    return seen


@pytest.fixture
def hessians(tmp_path):
    return HessianStore(tmp_path / "hessians")


def at(sparsity):
    return SparseGPT(sparsity=sparsity, step=40, num_levels=2, dtype_bits=32)


@pytest.fixture
def settings(tmp_path, build_settings, hessians):
    """Make the settings of a sparsity's database, with the store or without."""

    def of(sparsity, *, kept=True, propagate=None, **changes):
        root = tmp_path / ("with" if kept else "without")
        recipe = {"sparsity": sparsity, "propagate": propagate}
        return build_settings(
            root, propagate=propagate, method="sparsity", recipe=recipe, hessians=hessians if kept else None, **changes
        )

    return of


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_block_comes_back_as_it_was(hessians):
    H = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    block = BlockHessians({"q": "q", "k": "q", "o": "o"}, {"q": H, "o": H.T[:3, :3]})
    assert 1 not in hessians and not hessians.has_record(1)
    hessians.write(1, block)
    assert 1 in hessians and hessians.has_record(1) and 0 not in hessians
    back = hessians.read(1)
    assert back.owners == block.owners
    assert all(torch.equal(back.hessians[owner], block.hessians[owner]) for owner in ("q", "o"))
    assert sorted(path.name for path in hessians.folder.iterdir()) == ["block-001.json", "block-001.safetensors"]


@pytest.mark.parametrize("spoiled", ["a bit", "no file", "no record", "rubbish", "a list", "another schema"])
def test_a_block_that_is_not_whole_does_not_count(spoiled, hessians, caplog):
    hessians.write(0, BlockHessians({"q": "q"}, {"q": torch.eye(3)}))
    file, record = hessians.folder / "block-000.safetensors", hessians.folder / "block-000.json"
    if spoiled == "a bit":
        damage(file)
    elif spoiled == "no file":
        file.unlink()
    elif spoiled == "no record":
        record.unlink()
    else:
        other = json.dumps(json.loads(record.read_text()) | {"schema": 2})
        record.write_text({"rubbish": "{", "a list": "[]", "another schema": other}[spoiled])
    with caplog.at_level(logging.WARNING):
        assert 0 not in hessians
    assert (str(file) in caplog.text) == (spoiled == "a bit")


def test_a_further_sparsity_runs_no_block(settings, llama, ids, forwards, monkeypatch):
    ensure_database(settings(0.5), llama, ids, at(0.5))
    assert set(forwards) == {0, 1, 2}
    forwards.clear()
    monkeypatch.setattr(llama, "embed", None)
    _, reused = ensure_database(settings(0.6), llama, ids, at(0.6))
    assert not reused
    assert forwards == []


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_databases_are_the_same_bytes_with_and_without_a_store(activations, settings, llama, ids):
    for sparsity in (0.5, 0.6):  # the second from kept Hessians
        mine, plain = settings(sparsity, activations=activations), settings(sparsity, kept=False)
        ensure_database(mine, llama, ids, at(sparsity))
        ensure_database(plain, llama, ids, at(sparsity))
        assert contents(mine.folder) == contents(plain.folder)


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 2)])
def test_damaged_blocks_alone_are_computed_again(lost, settings, hessians, llama, ids, forwards, monkeypatch):
    ensure_database(settings(0.5), llama, ids, at(0.5))
    whole = contents(hessians.folder)
    for index in lost:
        damage(hessians.folder / f"block-{index:03d}.safetensors")
    forwards.clear()
    collected = []
    monkeypatch.setattr(
        compressing, "collect_hessians", lambda b, i, *a, **k: collected.append(i) or collect_hessians(b, i, *a, **k)
    )
    mine = settings(0.6)
    ensure_database(mine, llama, ids, at(0.6))
    assert collected == list(lost)
    assert set(forwards) == set(range(lost[-1] + 1))  # no block after the last that is lost
    assert contents(hessians.folder) == whole
    plain = settings(0.6, kept=False)
    ensure_database(plain, llama, ids, at(0.6))
    assert contents(mine.folder) == contents(plain.folder)


def test_activations_through_a_level_leave_the_store_alone(settings, hessians, llama, ids, forwards):
    mine, plain = settings(0.5, propagate="0"), settings(0.5, propagate="0", kept=False)
    ensure_database(mine, llama, ids, at(0.5))
    assert not hessians.folder.exists()
    ensure_database(settings(0.6), llama, ids, at(0.6))  # dense ones are kept now, and are others
    forwards.clear()
    ensure_database(settings(0.7, propagate="0"), llama, ids, at(0.7))
    assert set(forwards) == {0, 1, 2}
    ensure_database(plain, llama, ids, at(0.5))
    assert contents(mine.folder) == contents(plain.folder)


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_a_store_is_completed_where_a_database_left_none(
    activations, settings, hessians, llama, ids, forwards, weights_digest, tmp_path
):
    ensure_database(settings(0.5), llama, ids, at(0.5))
    whole, before = contents(hessians.folder), weights_digest(llama.model)
    other = HessianStore(tmp_path / "other")
    for store_ in (other, hessians):
        if store_ is hessians:
            (hessians.folder / "block-001.json").unlink()
        forwards.clear()
        complete_hessians(store_, llama, ids, batch_tokens=64, activations=activations)
        assert set(forwards) == ({0, 1, 2} if store_ is other else {0, 1})
        assert contents(store_.folder) == whole
    forwards.clear()
    complete_hessians(hessians, llama, ids)
    assert forwards == []
    assert weights_digest(llama.model) == before


Usage = namedtuple("Usage", "total used free")


def test_room_for_hessians_is_asked_for_before_any_forward(settings, llama, ids, forwards, monkeypatch):
    levels = database_bytes(plan_space(llama, at(0.5), method="sparsity"))
    at_most = 3 * 4 * (6 * 32**2 + 64**2)  # as if no two linears shared their input
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(10**12, 0, int(1.02 * (levels + at_most)) - 100))
    with pytest.raises(EvoPressError, match="B free"):
        ensure_database(settings(0.5), llama, ids, at(0.5))
    assert forwards == []
    ensure_database(settings(0.5, kept=False), llama, ids, at(0.5))


def test_a_disk_that_fills_up_is_one_sentence(settings, llama, ids, monkeypatch):
    def full(tensors, path):
        raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(EvoPressError, match=r"disk is full while writing .*hessians.block-000"):
        ensure_database(settings(0.5), llama, ids, at(0.5))
