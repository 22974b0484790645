import errno
import json
import logging
import os
import re
import shutil
import signal
import tempfile
import threading
import weakref
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from database_literal import captured_inputs, output_errors

from evopress import resources
from evopress.compress import gptq
from evopress.compress.compressor import Working
from evopress.compress.gptq import GPTQ
from evopress.compress.hessian import SingularHessianError
from evopress.errors import EvoPressError
from evopress.files import sha256_file
from evopress.levels import build, locking, passage, plan
from evopress.levels.build import ensure_database
from evopress.levels.calibration import collect_hessians, weights_placed
from evopress.levels.plan import database_bytes, plan_space
from evopress.levels.store import MANIFEST, LevelDatabase, block_file, encoded, write_block

CLEAN = {MANIFEST, *(block_file(i) for i in range(3))}


@pytest.fixture(scope="module")
def ids(tokens):
    return tokens(6, 16)


@pytest.fixture(scope="module")
def llama(tiny_blocks):
    return tiny_blocks("llama", num_blocks=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, build_settings, llama, ids, compressor):
    """A database of three blocks, built without a break; not to be changed."""
    settings = build_settings(tmp_path_factory.mktemp("whole"))
    _, reused = ensure_database(settings, llama, ids, compressor)
    assert not reused
    return settings.folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def copied(tmp_path, whole, build_settings):
    """Return settings whose folder holds a copy of the whole database."""
    settings = build_settings(tmp_path)
    settings.folder.parent.mkdir(parents=True)
    shutil.copytree(whole, settings.folder)
    return settings


@pytest.fixture
def compressed_blocks(monkeypatch):
    """Record the indices of the blocks that are compressed."""
    seen = []
    compress = build._compress_part

    def recording(blocks, index, *args):
        seen.append(index)
        return compress(blocks, index, *args)

    monkeypatch.setattr(build, "_compress_part", recording)
    return seen


class CrashError(Exception):
    """Stands for anything that ends a process."""


def crash_after(monkeypatch, name, calls):
    """Let a function of the build raise after it has worked `calls` times."""
    function, count = getattr(build, name), 0

    def crashing(*args, **kwargs):
        nonlocal count
        if count == calls:
            raise CrashError
        count += 1
        return function(*args, **kwargs)

    monkeypatch.setattr(build, name, crashing)


# What is planned


def test_the_space_is_planned_from_shapes_alone(tiny_blocks, monkeypatch, compressor):
    blocks = tiny_blocks("phi3", num_blocks=2)
    monkeypatch.setattr(blocks, "run", None)
    space = plan_space(blocks, compressor, method="quant")
    assert [unit.name for unit in space.units[:4]] == [
        f"model.layers.0.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    assert [(unit.block, unit.kind, unit.size) for unit in space.units[5:7]] == [(1, "o_proj", 1024), (1, "gate_up_proj", 4096)]
    assert space.units[0].levels == compressor.levels((64, 32))
    assert database_bytes(space) == sum(level.stored_bits for unit in space.units for level in unit.levels) / 8


def test_settings_that_fit_no_unit_are_refused_by_its_name(llama):
    with pytest.raises(EvoPressError, match=r"model\.layers\.0\.self_attn\.q_proj: group size 128 does not divide the 32"):
        plan_space(llama, GPTQ(group_size=128), method="quant")


def test_corrected_levels_make_good_what_units_before_have_lost(
    tmp_path, whole, build_settings, llama, ids, compressor, monkeypatch
):
    """Of the first block q, k and v have lost nothing; the outputs of all blocks come closer; killed and resumed it is the same."""
    settings = replace(build_settings(tmp_path, propagate="2", recipe={"correction": 0.5}), correction=0.5)
    plain, _ = ensure_database(build_settings(tmp_path, propagate="2", recipe={"correction": 0}), llama, ids, compressor)
    with monkeypatch.context() as patch:
        crash_after(patch, "write_block", 2)
        with pytest.raises(CrashError):
            ensure_database(settings, llama, ids, compressor)
    database, _ = ensure_database(settings, llama, ids, compressor)
    at_once, _ = ensure_database(replace(settings, root=tmp_path / "again"), llama, ids, compressor)
    assert contents(database.folder) == contents(at_once.folder)
    uniform = [len(unit.levels) - 1 for unit in database.space.units]
    names = [unit.name for unit in plain.space.units]
    old, new = ([each.read(i, level).decode() for i, level in enumerate(uniform)] for each in (plain, database))
    assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)][:4] == [True, True, True, False]

    def left(weights):
        placed, hidden = dict(zip(names, weights, strict=True)) if weights else {}, llama.embed(ids)
        for index in range(3):
            with weights_placed(llama, index, {name: placed[name] for name in llama.slots(index) if name in placed}):
                hidden = llama.run(index, hidden)
        return hidden

    assert (left(new) - left(())).norm() < 0.95 * (left(old) - left(())).norm()


def test_a_level_to_propagate_that_does_not_exist_is_refused(tmp_path, build_settings, llama, ids, compressor):
    with pytest.raises(EvoPressError, match=r"propagate_bits=7 is no level of .*4, 3, 2"):
        ensure_database(build_settings(tmp_path, propagate="7"), llama, ids, compressor)


# What is built


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "gemma3_text", "opt"])
def test_one_hessian_per_distinct_input(family, tiny_blocks, tmp_path, build_settings, ids, compressor, monkeypatch):
    factors = []
    inverse_factor = gptq.inverse_factor
    monkeypatch.setattr(gptq, "inverse_factor", lambda H, **kwargs: factors.append(len(H)) or inverse_factor(H, **kwargs))
    blocks = tiny_blocks(family, num_blocks=2)
    ensure_database(build_settings(tmp_path), blocks, ids, compressor)
    assert factors == [32, 32, 32, 64] * 2


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt"])
def test_hessians_are_those_of_the_whole_models_activations(family, tiny_blocks, ids):
    blocks = tiny_blocks(family, num_blocks=1)
    for name, parameter in blocks.model.named_parameters():
        if name.endswith("bias"):  # so that even an input of zeros would leave a trace
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    collected = collect_hessians(blocks, 0, blocks.embed(ids), 4)
    owners, hessians = collected.owners, collected.hessians
    assert len(hessians) == len(set(owners.values())) == 4
    assert not any(linear._forward_pre_hooks for linear in blocks.linears(0).values())
    for name, X in captured_inputs(blocks, 0, ids).items():
        expected = (X.double().T @ X.double() * (2 / len(ids))).float()
        torch.testing.assert_close(hessians[owners[name]], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("propagate", ["3", None])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "opt"])
def test_errors_are_those_computed_from_activations(family, propagate, tiny_blocks, tmp_path, build_settings, ids, compressor):
    blocks = tiny_blocks(family, num_blocks=3)
    database, _ = ensure_database(build_settings(tmp_path, propagate=propagate), blocks, ids, compressor)
    literal = output_errors(
        blocks,
        ids,
        lambda unit, level: database.read(unit, level).decode(),
        propagate=None if propagate is None else 1,
        num_levels=3,
    )
    for unit, mine, direct in zip(database.space.units, database.errors, literal, strict=True):
        assert mine == pytest.approx(direct, rel=2e-3), unit.name  # float32, and a KV cache or none, differ by rounding
    assert [level["damping"] for level in database.manifest["units"][0]["levels"]] == [0.01] * 3


def test_what_is_stored_is_what_the_compressor_returned(whole, llama, ids, compressor):
    database = LevelDatabase.open(whole)
    hidden = llama.embed(ids)
    linears = llama.linears(0)
    collected = collect_hessians(llama, 0, hidden, 4)
    owners, hessians = collected.owners, collected.hessians
    for owner in hessians:
        weights = {name: linears[name].weight.detach() for name in linears if owners[name] == owner}
        for name, levels in compressor.compress(weights, hessians[owner]).items():
            unit = [u.name for u in database.space.units].index(name)
            for level, result in enumerate(levels):
                assert torch.equal(database.read(unit, level).decode(), result.payload.decode())
                assert database.errors[unit][level] == result.error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decoded_weights_have_the_dtype_of_the_model(dtype, tiny_blocks, tmp_path, build_settings, ids, compressor):
    blocks = tiny_blocks("llama", num_blocks=1, dtype=dtype)
    database, _ = ensure_database(build_settings(tmp_path), blocks, ids, compressor)
    assert database.read(0, 0).decode().dtype == getattr(torch, dtype)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back(fails, tiny_blocks, tmp_path, build_settings, ids, compressor, weights_digest, monkeypatch):
    blocks = tiny_blocks("llama", num_blocks=3)
    before = weights_digest(blocks.model)
    if fails:
        crash_after(monkeypatch, "write_block", 2)
        with pytest.raises(CrashError):
            ensure_database(build_settings(tmp_path), blocks, ids, compressor)
    else:
        ensure_database(build_settings(tmp_path), blocks, ids, compressor)
    assert weights_digest(blocks.model) == before


def test_batches_change_errors_only_by_rounding(tmp_path, whole, build_settings, llama, ids, compressor):
    one_by_one, _ = ensure_database(build_settings(tmp_path, batch_tokens=1), llama, ids, compressor)
    for mine, others in zip(one_by_one.errors, LevelDatabase.open(whole).errors, strict=True):
        assert mine == pytest.approx(others, rel=0.02)


def test_activations_on_disk_give_the_same_bytes(tmp_path, whole, build_settings, llama, ids, compressor):
    settings = build_settings(tmp_path, activations="disk")
    ensure_database(settings, llama, ids, compressor)
    assert contents(settings.folder) == contents(whole)


def test_a_singular_hessian_names_its_units(tmp_path, build_settings, llama, ids, compressor, monkeypatch):
    def refuse(H, **kwargs):
        raise SingularHessianError("its Hessian has no Cholesky factor")

    monkeypatch.setattr(gptq, "inverse_factor", refuse)
    with pytest.raises(SingularHessianError, match=r"layers\.0\.self_attn\.q_proj, .*v_proj: its Hessian"):
        ensure_database(build_settings(tmp_path), llama, ids, compressor)


def test_activations_that_are_not_finite_name_their_units(tmp_path, build_settings, tiny_blocks, ids, compressor):
    blocks = tiny_blocks("llama", num_blocks=2)
    blocks.linears(0)["model.layers.0.mlp.down_proj"].weight.data[0, 0] = float("inf")
    with pytest.raises(EvoPressError, match=r"down_proj.*not finite"):
        ensure_database(build_settings(tmp_path), blocks, ids, compressor)
    with pytest.raises(EvoPressError, match=r"layers\.0.*down_proj is not finite, first on calibration sequences 0 to 3:"):
        ensure_database(build_settings(tmp_path, propagate=None), blocks, ids, _IgnoresWeights(compressor))


class _IgnoresWeights:
    """Compresses ones in place of the weights, so that a broken weight reaches the next block's activations."""

    def __init__(self, inner):
        self.inner = inner
        self.levels = inner.levels

    def compress(self, weights, H):
        return self.inner.compress({name: torch.ones_like(W) for name, W in weights.items()}, H)


# What is reused


def test_a_second_call_reuses_without_a_forward(copied, llama, ids, compressor, whole, monkeypatch):
    for name in ("run", "embed"):
        monkeypatch.setattr(llama, name, None)
    database, reused = ensure_database(copied, llama, ids, compressor)
    assert reused
    assert database.fingerprint == copied.fingerprint
    assert contents(copied.folder) == contents(whole)


def test_the_folder_depends_on_the_recipe_and_on_nothing_else(tmp_path, build_settings):
    settings = build_settings(tmp_path)
    others = {"batch_tokens": 1, "activations": "disk", "lock_timeout": 1.0}
    assert replace(settings, **others).folder == settings.folder
    assert replace(settings, recipe={**settings.recipe, "model": "other"}).folder != settings.folder
    assert settings.folder == tmp_path / "tiny" / f"quant-{settings.fingerprint}"


@pytest.mark.parametrize(
    ("name", "calls"),
    [(name, calls) for name in ("write_block", "append") for calls in range(3)] + [("propagate", 0), ("propagate", 1)],
)
def test_an_interrupted_build_goes_on_and_ends_with_the_same_bytes(
    name, calls, tmp_path, whole, build_settings, llama, ids, compressor, compressed_blocks
):
    settings = build_settings(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, name, calls)
        with pytest.raises(CrashError):
            ensure_database(settings, llama, ids, compressor)
    assert not (settings.folder / MANIFEST).exists()
    compressed_blocks.clear()
    _, reused = ensure_database(settings, llama, ids, compressor)
    assert not reused
    finished = calls + (name == "propagate")  # blocks in the journal
    assert compressed_blocks == list(range(finished, 3))
    assert contents(settings.folder) == contents(whole)


def test_a_build_interrupted_before_its_manifest_computes_nothing_again(
    tmp_path, whole, build_settings, llama, ids, compressor, compressed_blocks
):
    settings = build_settings(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, "write_manifest", 0)
        with pytest.raises(CrashError):
            ensure_database(settings, llama, ids, compressor)
    compressed_blocks.clear()
    ensure_database(settings, llama, ids, compressor)
    assert compressed_blocks == []
    assert contents(settings.folder) == contents(whole)


def test_a_killed_build_goes_on(tmp_path, whole, build_settings, llama, ids, compressor, compressed_blocks):
    """Kill a process while it writes its second line of the journal, activations on disk."""
    settings = build_settings(tmp_path)
    append = build.append

    def killed(path, entry):
        if entry["block"] == 1:
            with path.open("a") as file:
                file.write('{"block": 1, "file": "block-0')
            (path.parent / ".block-002.safetensors.1.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        append(path, entry)

    child = os.fork()
    if child == 0:
        try:
            build.append = killed
            ensure_database(build_settings(tmp_path, activations="disk"), llama, ids, compressor)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = contents(settings.folder)
    assert {block_file(0), block_file(1), "journal.jsonl"} < set(left)
    assert [name for name in left if name.endswith(".tmp")] == [".block-002.safetensors.1.tmp"]  # no activations
    ensure_database(settings, llama, ids, compressor)
    assert compressed_blocks == [1, 2]
    assert contents(settings.folder) == contents(whole)


def test_a_build_killed_twice_keeps_what_both_finished(tmp_path, whole, build_settings, llama, ids, compressor, compressed_blocks):
    settings = build_settings(tmp_path)
    for calls in (1, 1):
        with pytest.MonkeyPatch.context() as patch:
            crash_after(patch, "propagate", calls)
            with pytest.raises(CrashError):
                ensure_database(settings, llama, ids, compressor)
        with (settings.folder / "journal.jsonl").open("a") as file:
            file.write('{"block": 2, "file": "bl')  # cut off, with no end of line
        crashed = list(compressed_blocks)
    assert crashed == [0, 1]
    with pytest.MonkeyPatch.context() as patch:
        crash_after(patch, "write_manifest", 0)
        with pytest.raises(CrashError):
            ensure_database(settings, llama, ids, compressor)
    ensure_database(settings, llama, ids, compressor)
    assert compressed_blocks == [0, 1, 2]
    assert contents(settings.folder) == contents(whole)


# What is damaged


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
@pytest.mark.parametrize("index", [0, 2])
def test_a_damaged_block_is_named_and_built_again(damage, index, copied, whole, llama, ids, compressor, compressed_blocks, caplog):
    path = copied.folder / block_file(index)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data[:-9] if damage == "cut" else data)
    if damage == "remove":
        path.unlink()
    with caplog.at_level(logging.WARNING):
        _, reused = ensure_database(copied, llama, ids, compressor)
    assert not reused
    assert str(path) in caplog.text
    assert compressed_blocks == [index]
    assert contents(copied.folder) == contents(whole)


@pytest.mark.parametrize("name", [MANIFEST, block_file(1)])
def test_damage_where_nothing_can_be_written_is_named(name, copied, llama, ids, compressor, monkeypatch):
    """A group's levels that another user owns, who would not hear of it."""

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    data = bytearray((copied.folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (copied.folder / name).write_bytes(data)
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    said = rf"^{re.escape(str(copied.folder / name))} .*and it cannot be built again: .* cannot be written .*choose a folder"
    with pytest.raises(EvoPressError, match=said):
        ensure_database(copied, llama, ids, compressor)
    (copied.folder / MANIFEST).unlink()
    with pytest.raises(EvoPressError, match=rf"^{re.escape(str(copied.folder))} cannot be written"):  # never finished: no damage
        ensure_database(copied, llama, ids, compressor)


def test_two_damaged_blocks_are_both_named(copied, whole, llama, ids, compressor, compressed_blocks, caplog):
    for index in (0, 1):
        (copied.folder / block_file(index)).write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        ensure_database(copied, llama, ids, compressor)
    assert all(block_file(index) in caplog.text for index in (0, 1))
    assert compressed_blocks == [0, 1]
    assert contents(copied.folder) == contents(whole)


@pytest.mark.parametrize("text", ["", "{}", "no manifest"])
def test_a_damaged_manifest_is_named_and_everything_built_again(text, copied, whole, llama, ids, compressor, caplog):
    (copied.folder / MANIFEST).write_text(text)
    with caplog.at_level(logging.WARNING):
        _, reused = ensure_database(copied, llama, ids, compressor)
    assert not reused
    assert str(copied.folder / MANIFEST) in caplog.text
    assert contents(copied.folder) == contents(whole)


def test_a_journal_full_of_rubbish_is_passed_over(copied, whole, llama, ids, compressor, compressed_blocks):
    (copied.folder / MANIFEST).unlink()
    lines = ["", "{", "[]", "3", '{"block": 0}', '{"block": "0", "file": 1, "bytes": 1, "sha256": 1, "units": 1}']
    (copied.folder / "journal.jsonl").write_text("\n".join(lines))
    ensure_database(copied, llama, ids, compressor)
    assert compressed_blocks == [0, 1, 2]
    assert contents(copied.folder) == contents(whole)


def test_a_database_of_a_newer_version_is_refused_and_kept(copied, llama, ids, compressor):
    manifest = json.loads((copied.folder / MANIFEST).read_text())
    (copied.folder / MANIFEST).write_text(json.dumps(manifest | {"schema": 99, "new": 1}))
    before = contents(copied.folder)
    with pytest.raises(EvoPressError, match="schema 99"):
        ensure_database(copied, llama, ids, compressor)
    assert contents(copied.folder) == before


# Who may build, and where


def test_two_builders_at_once_give_one_database(tmp_path, whole, build_settings, tiny_blocks, ids, compressor, compressed_blocks):
    settings = build_settings(tmp_path)
    models = [tiny_blocks("llama", num_blocks=3) for _ in range(2)]
    results = []

    def work(blocks):
        results.append(ensure_database(settings, blocks, ids, compressor))

    threads = [threading.Thread(target=work, args=(blocks,)) for blocks in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(reused for _, reused in results) == [False, True]
    assert compressed_blocks == [0, 1, 2]
    assert contents(settings.folder) == contents(whole)


def test_a_lock_that_is_never_freed_is_an_error(tmp_path, build_settings, llama, ids, compressor):
    from filelock import FileLock

    settings = build_settings(tmp_path, lock_timeout=0.2)
    settings.folder.parent.mkdir(parents=True)
    with (
        FileLock(settings.folder.with_name(f"{settings.folder.name}.lock")),
        pytest.raises(EvoPressError, match=r"another process has held .*\.lock for 0\.2 s"),
    ):
        ensure_database(settings, llama, ids, compressor)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "choose a folder that you may write to"), (errno.EROFS, "choose a folder")],
)
@pytest.mark.parametrize("where", ["mkdir", "probe", "block", "journal", "lock"])
def test_a_folder_that_cannot_be_written_is_one_sentence(
    code, sentence, where, tmp_path, build_settings, llama, ids, compressor, monkeypatch
):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    if where == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    elif where == "probe":
        monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    elif where == "block":
        monkeypatch.setattr(os, "replace", fail)
    elif where == "journal":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(locking, "_taken", fail)
    with pytest.raises(EvoPressError, match=sentence):
        ensure_database(build_settings(tmp_path), llama, ids, compressor)


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_too_little_disk_is_refused_before_any_forward(activations, tmp_path, build_settings, llama, ids, compressor, monkeypatch):
    needed = database_bytes(plan_space(llama, compressor, method="quant"))
    settings = build_settings(tmp_path, activations=activations)
    monkeypatch.setattr(llama, "run", None)
    monkeypatch.setattr(llama, "embed", None)
    free = needed - 1 if activations == "memory" else int(needed * 1.03)  # enough but for the activations
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    with pytest.raises(EvoPressError, match=r"the level database needs .*B of disk but .*B free: .*method.levels"):
        ensure_database(settings, llama, ids, compressor)


def test_too_little_memory_is_refused_before_any_forward(tmp_path, build_settings, llama, ids, compressor, monkeypatch):
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(100_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "run", None)
        patch.setattr(llama, "embed", None)
        with pytest.raises(EvoPressError, match=r"kB of memory but 100 kB are free: .*activations=disk"):
            ensure_database(build_settings(tmp_path), llama, ids, compressor)


def test_activations_on_disk_take_no_memory(tmp_path, build_settings, llama, tokens, compressor, monkeypatch):
    many = tokens(2048, 128)  # 32 MB of activations
    on_disk = build_settings(tmp_path, activations="disk")
    available = plan.planned(on_disk, llama, many, compressor)[1].memory_bytes
    assert available < 2**24
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(available))
    monkeypatch.setattr(build, "_build", lambda *args: (_ for _ in ()).throw(CrashError))
    with pytest.raises(EvoPressError, match="of memory"):
        ensure_database(build_settings(tmp_path), llama, many, compressor)
    with pytest.raises(CrashError):  # past the preflight
        ensure_database(on_disk, llama, many, compressor)


def test_the_dense_walk_of_a_corrected_build_stays_dense(tmp_path, build_settings, llama, ids, compressor, monkeypatch):
    seen, propagate = {}, build.propagate

    def spied(blocks, index, buffer, batch, weights, **more):
        seen.setdefault(id(buffer), []).append(bool(weights))
        return propagate(blocks, index, buffer, batch, weights, **more)

    monkeypatch.setattr(build, "propagate", spied)
    settings = replace(build_settings(tmp_path, propagate="2", recipe={"correction": 0.5}), correction=0.5)
    ensure_database(settings, llama, ids, compressor)
    assert sorted(map(any, seen.values())) == [False, True], "one walk has compressed weights, the other none"


def test_planning_looks_at_a_block_a_few_times(tmp_path, build_settings, tiny_blocks, ids, compressor, monkeypatch):
    blocks, seen = tiny_blocks("llama", num_blocks=8), []
    monkeypatch.setattr(blocks, "linears", lambda index, find=blocks.linears: seen.append(index) or find(index))
    plan.planned(build_settings(tmp_path), blocks, ids, compressor)
    assert all(seen.count(index) <= 4 for index in range(8))


def test_units_that_are_encoded_one_by_one_are_written_as_all_of_a_block_are(whole, llama, ids, compressor, tmp_path):
    hessians = collect_hessians(llama, 0, llama.embed(ids), 4)
    made, slots = {}, llama.slots(0)
    for owner, H in hessians.hessians.items():
        alike = {name: slot.weight for name, slot in slots.items() if hessians.owners[name] == owner}
        made |= compressor.compress(alike, H)
    units = {unit.name: unit for unit in plan_space(llama, compressor, method="quant").units}
    write_block(tmp_path, 0, [encoded({name: made[name] for name in slots}, units)], list(slots))
    assert sha256_file(tmp_path / block_file(0)) == sha256_file(whole / block_file(0))


@pytest.mark.parametrize("propagate", [None, "3"])
def test_what_was_made_of_an_input_is_given_up_before_the_next(propagate, tmp_path, build_settings, llama, ids, monkeypatch):
    made, hessians, left = [], [], []

    class Watched(GPTQ):
        def compress(self, weights, H):
            if next(iter(weights)).endswith("q_proj"):  # the next block
                made.clear(), hessians.clear()
            else:
                left.append((sum(payload() is not None for payload in made), sum(H() is not None for H in hessians)))
            results = super().compress(weights, H)
            made.extend(weakref.ref(level.payload) for levels in results.values() for level in levels)
            hessians.append(weakref.ref(H))
            return results

    ensure_database(build_settings(tmp_path, propagate=propagate), llama, ids, Watched(bits=(4, 3, 2), group_size=16))
    units = (3, 4, 6)  # of the inputs before the second, the third and the last one
    assert left == [(0 if propagate is None else count, 0) for count in units] * 3


def test_what_is_given_up_is_not_planned(build_settings, tmp_path, llama, ids):
    class Large(GPTQ):
        working = Working(unpacked=lambda level, size: 2**20)

    def bytes_of(propagate):
        settings = build_settings(tmp_path, propagate=propagate)
        return plan.planned(settings, llama, ids, Large(bits=(4, 3, 2), group_size=16))[1].memory_bytes / 2**20

    assert 9 < bytes_of(None) < 10, "the three levels of the three units that share the first input"
    assert 10 < bytes_of("3") < 11, "of the two that share the third, beside one level of the four units before"


def test_where_both_walks_activations_lie_is_asked_once_and_as_it_is_planned(
    tmp_path, build_settings, llama, ids, compressor, monkeypatch
):
    asked = {"plan": [], "passage": []}
    for module in (plan, passage):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "stay_on_device", lambda size, device, name=name: asked[name].append(size) or False)
    settings = replace(build_settings(tmp_path, propagate="2", recipe={"correction": 0.5}), correction=0.5)
    ensure_database(settings, llama, ids, compressor)
    assert asked["plan"] == asked["passage"] == [2 * ids.numel() * llama.hidden_size * 4]
