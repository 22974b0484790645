"""A second pass along a genome: fitted to the compressed model's own inputs, kept where a judge says so, and never lost."""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evopress.compress.compressor import Compressor
from evopress.compress.hessian import HessianSum
from evopress.compress.sparse import PruneTo
from evopress.compress.sparsegpt import SparseGPT
from evopress.errors import EvoPressError
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import base_states
from evopress.fitness.population import PopulationEvaluator, measure_sums
from evopress.fitness.suffix import SuffixLoss
from evopress.levels import refine
from evopress.levels.build import ensure_database
from evopress.levels.live import LiveModel
from evopress.levels.plan import WalkSettings
from evopress.levels.refine import ensure_refined, inexact_units, refined_units, steps_of
from evopress.levels.store import MANIFEST, LevelDatabase, block_file
from evopress.levels.union import LevelUnion
from evopress.models.blocks import BlockModel
from evopress.models.loading import load_pretrained
from evopress.models.tiny import make_tiny
from evopress.units import EMBEDDING, HEAD

BLOCKS = 3
SPARSE = SparseGPT(sparsity=0.5, step=40, num_levels=1, dtype_bits=32)


class FakeJudge:
    """Finds the blocks better that it was told to, and notes what it is asked."""

    def __init__(self, better: set[int]) -> None:
        self.better, self.now = better, 1.0
        self.asked: list[tuple[str, int, int]] = []

    def loss(self, index, weights) -> float:
        self.asked.append(("loss", index, len(weights)))
        return self.now * (0.5 if weights and index in self.better else 2.0 if weights else 1.0)

    def advance(self, index, weights) -> None:
        self.asked.append(("advance", index, len(weights)))
        if weights and index in self.better:
            self.now *= 0.5


@pytest.fixture(scope="module")
def blocks(tiny_blocks):
    return tiny_blocks("llama", num_blocks=BLOCKS)


@pytest.fixture(scope="module")
def ids(tokens):
    return tokens(8, 16)


@pytest.fixture(scope="module", params=["quant", "sparsity"])
def case(request, tmp_path_factory, build_settings, blocks, ids, compressor):
    """A live model with its database, the compressor that made it, and a genome of several levels."""
    made_by: Compressor = compressor if request.param == "quant" else SPARSE
    propagate = "3" if request.param == "quant" else None
    settings = build_settings(
        tmp_path_factory.mktemp("db"), method=request.param, propagate=propagate, recipe={"of": request.param}
    )
    database, _ = ensure_database(settings, blocks, ids, made_by)
    genome = tuple(i % 3 for i in range(len(database.space)))
    return LiveModel(blocks, LevelUnion([database])), database, made_by, genome


@pytest.fixture
def settings(tmp_path):
    return WalkSettings(root=tmp_path / "refined", recipe={"a": 1}, batch_tokens=64)


def refined_of(settings, case, ids, better=frozenset(range(BLOCKS)), judge=None):
    live, database, compressor, genome = case
    judge = judge or FakeJudge(set(better))
    return ensure_refined(settings, live, database, genome, ids, compressor, lambda: judge), judge


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def levels_at(database, genome):
    return [database.read(i, level).decode() for i, level in enumerate(genome)]


def test_it_is_what_the_obvious_walk_makes(settings, case, ids, weights_digest):
    """The twin holds the whole model at what it has made so far and sums each unit's Hessian by hooks, one unit at a time."""
    live, database, compressor, genome = case
    model, names = live.blocks.model, [unit.name for unit in database.space.units]
    dense = {name: model.get_submodule(name).weight.data for name in names}
    before = weights_digest(model)
    refined, _ = refined_of(settings, case, ids)
    assert weights_digest(model) == before, "the model is given back as it was"

    now = dict(zip(names, levels_at(database, genome), strict=True))
    for index in range(BLOCKS):
        here = [i for i, unit in enumerate(database.space.units) if unit.block == index]
        sums = {i: HessianSum(dense[names[i]].shape[1]) for i in here}
        handles = [
            model.get_submodule(names[i]).register_forward_pre_hook(lambda module, args, total=sums[i]: total.add(args[0]))
            for i in here
        ]
        try:
            for name, weight in now.items():
                model.get_submodule(name).weight.data = weight
            with torch.no_grad():
                model(input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
            for name, weight in dense.items():
                model.get_submodule(name).weight.data = weight
        for i in here:
            level = database.space.units[i].levels[genome[i]]
            every = compressor.compress({names[i]: dense[names[i]]}, sums[i].result())[names[i]]
            now[names[i]] = every[genome[i]].payload.decode()
            found = refined.read(i, 0).decode()
            assert refined.space.units[i].levels == (level,)
            same = (found - now[names[i]]).abs() <= 1e-4 * now[names[i]].abs().max()
            assert same.float().mean() > 0.97, "codes at the edge of rounding may differ"
            now[names[i]] = found
    assert not all(
        torch.equal(a, b) for a, b in zip(levels_at(refined, (0,) * len(genome)), levels_at(database, genome), strict=True)
    )


def test_corrected_it_is_what_the_obvious_walk_makes(settings, case, ids, weights_digest):
    """The twin holds whole models, the dense one and the one made so far, and sees what enters one linear after the other."""
    live, database, compressor, genome = case
    model, units = live.blocks.model, database.space.units
    dense = {unit.name: model.get_submodule(unit.name).weight.data for unit in units}
    before = weights_digest(model)
    refined, _ = refined_of(replace(settings, recipe={"correction": 0.5}, correction=0.5), case, ids)
    assert weights_digest(model) == before, "the model is given back as it was"

    def entering(name, weights):
        """Return what enters a linear, and what a linear that adds to the stream adds to."""
        block, _, kind = name.rpartition(".")
        before = {"o_proj": f"{block.rpartition('.')[0]}.input_layernorm"}
        before["down_proj"] = f"{block.rpartition('.')[0]}.post_attention_layernorm"
        seen: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(where).register_forward_pre_hook(lambda module, args, where=where: seen.update({where: args[0]}))
            for where in (name, *([before[kind]] if kind in before else []))
        ]
        try:
            for each, weight in weights.items():
                model.get_submodule(each).weight.data = weight
            with torch.no_grad():
                model(input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
            for each, weight in dense.items():
                model.get_submodule(each).weight.data = weight
        rows = [seen[where].reshape(-1, seen[where].shape[-1]).double() for where in (name, before.get(kind)) if where]
        return rows[0], rows[1] if len(rows) > 1 else None

    now = dict(zip(dense, levels_at(database, genome), strict=True))
    groups: dict[tuple[int, str], list[int]] = {}
    for i, unit in enumerate(units):
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(unit.kind, unit.kind)
        groups.setdefault((unit.block, shared), []).append(i)
    for (index, _), members in groups.items():
        (x, stream), (compressed, lossy) = (entering(units[members[0]].name, weights) for weights in (dense, now))
        H = compressed.T @ compressed * (2 / len(ids))
        damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
        for i in members:
            W = dense[units[i].name].double()
            wanted = (W @ (x - compressed).T if stream is None else W @ (x - compressed).T + (stream - lossy).T) @ compressed
            V = W + 0.5 * torch.linalg.solve(damped, (2 / len(ids)) * wanted.T).T
            every = compressor.compress({units[i].name: V.float()}, H.float())[units[i].name]
            made, found = every[genome[i]].payload.decode(), refined.read(i, 0).decode()
            assert ((found - made).abs() <= 1e-3 * made.abs().max()).float().mean() > 0.97, (index, units[i].kind)
            now[units[i].name] = found
    plain, _ = refined_of(settings, case, ids)
    assert not all(
        torch.equal(a, b) for a, b in zip(*(levels_at(each, (0,) * len(genome)) for each in (plain, refined)), strict=True)
    )


def test_what_the_judge_does_not_like_is_the_databases_bit_for_bit(settings, case, ids):
    _, database, _, genome = case
    before = tree(database.folder)
    refined, judge = refined_of(settings, case, ids, better={1})
    assert [(step.block, step.kept, step.before, step.after) for step in steps_of(refined)] == [
        (0, False, 1.0, 2.0),
        (1, True, 1.0, 0.5),
        (2, False, 0.5, 1.0),
    ]
    old, new = levels_at(database, genome), levels_at(refined, (0,) * len(genome))
    for unit, a, b in zip(database.space.units, old, new, strict=True):
        assert unit.block == 1 or torch.equal(a, b)
    assert any(not torch.equal(a, b) for unit, a, b in zip(database.space.units, old, new, strict=True) if unit.block == 1)
    assert [(what, index) for what, index, _ in judge.asked] == [
        *(("loss", 0), ("loss", 0), ("advance", 0), ("loss", 1), ("advance", 1), ("loss", 2)),
    ]
    assert tree(database.folder) == before, "the level database stays as it was"
    assert refined.space.units == refined_units(database, genome)


@pytest.mark.parametrize(("before", "after", "kept"), [(1.0, 1.0, False), (1.0, float("nan"), False), (float("nan"), 5.0, True)])
def test_equal_is_not_better_and_no_number_is_worse_than_any(settings, case, ids, before, after, kept):
    class Fixed(FakeJudge):
        def loss(self, index, weights) -> float:
            return after if weights else before

    refined, _ = refined_of(settings, case, ids, judge=Fixed(set()))
    assert steps_of(refined)[0].kept is kept
    assert json.loads((refined.folder / MANIFEST).read_text())["steps"][0]["kept"] is kept


def test_a_union_with_the_database_holds_the_model_at_it(settings, case, ids):
    live, database, _, genome = case
    refined, _ = refined_of(settings, case, ids)
    union = LevelUnion([database, refined])
    moved = union.genome_of_last((0,) * len(genome))
    assert union.space.cost(moved) == database.space.cost(genome)
    assert union.space.stored_bits(moved) == database.space.stored_bits(genome)
    both = LiveModel(live.blocks, union)
    with both.applied(moved):
        weights = [live.blocks.model.get_submodule(unit.name).weight.data.clone() for unit in union.space.units]
    assert all(torch.equal(a, b) for a, b in zip(weights, levels_at(refined, (0,) * len(genome)), strict=True))


def test_it_is_reused_and_not_asked_again(settings, case, ids):
    refined, _ = refined_of(settings, case, ids)
    before = tree(refined.folder)

    class Never(FakeJudge):
        def __init__(self) -> None:
            raise AssertionError("nothing is left to judge")

    live, database, compressor, genome = case
    ensure_refined(settings, live, database, genome, ids, compressor, Never)
    assert tree(refined.folder) == before


@pytest.mark.parametrize("where", range(BLOCKS + 1))
@pytest.mark.parametrize("activations", ["memory", "disk"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(where, activations, settings, case, ids, tmp_path, monkeypatch):
    whole, _ = refined_of(settings, case, ids, better={0, 2})
    expected = tree(whole.folder)
    again = WalkSettings(root=tmp_path / "again", recipe=settings.recipe, batch_tokens=64, activations=activations)
    written: list[int] = []
    write = refine.write_block

    def dying(folder, index, *args):
        if index == where:
            raise KeyboardInterrupt
        written.append(index)
        return write(folder, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(refine, "write_block", dying)
        if where == BLOCKS:
            patch.setattr(refine, "write_manifest", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            refined_of(again, case, ids, better={0, 2})
    (refine.folder_of(again, case[1]) / ".block-001.safetensors.1-aa.tmp").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(refine, "write_block", lambda folder, index, *args: written.append(index) or write(folder, index, *args))
        found, _ = refined_of(again, case, ids, better={0, 2})
    assert sorted(written) == list(range(BLOCKS)), "no block twice"
    assert tree(found.folder) == expected
    assert steps_of(found) == steps_of(whole)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "both beside it", "manifest", "steps"])
def test_damage_is_noticed_and_mended(damage, settings, case, ids):
    whole, _ = refined_of(settings, case, ids, better={0, 1})
    expected = tree(whole.folder)
    path = whole.folder / block_file(1)
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "both beside it":  # what comes after it is judged by a model that has it
        for beside in (0, 2):
            (whole.folder / block_file(beside)).unlink()
    elif damage == "manifest":
        (whole.folder / MANIFEST).write_bytes(b"{}")
    else:  # a manifest of levels alone, as a database's is
        manifest = json.loads((whole.folder / MANIFEST).read_text())
        refine.write_manifest(
            whole.folder,
            **{key: manifest[key] for key in ("method", "fingerprint", "recipe")},
            entries=[
                {**file, "units": [u for u in manifest["units"] if u["block"] == file["block"]]} for file in manifest["files"]
            ],
        )
    if damage != "steps":
        with pytest.raises(EvoPressError):
            LevelDatabase.open(whole.folder)
    mended, _ = refined_of(settings, case, ids, better={0, 1})
    assert tree(mended.folder) == expected


def test_a_journal_of_other_refined_levels_is_not_believed(settings, case, ids, tmp_path, monkeypatch):
    other = WalkSettings(root=tmp_path / "other", recipe={"a": 2}, batch_tokens=64)
    with monkeypatch.context() as patch:
        patch.setattr(refine, "write_manifest", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            refined_of(other, case, ids, better=set())
    whole, _ = refined_of(settings, case, ids)
    expected = tree(whole.folder)
    shutil.rmtree(whole.folder)
    shutil.copytree(refine.folder_of(other, case[1]), whole.folder)
    found, _ = refined_of(settings, case, ids)
    assert tree(found.folder) == expected


def test_units_at_a_level_that_is_their_weight_are_left_alone(settings, blocks, ids, build_settings, tmp_path):
    """A level that keeps all is the weight itself; a block of such levels is not even measured."""
    names = [name for index in range(BLOCKS) for name in blocks.linears(index)]
    sizes = {name: blocks.model.get_submodule(name).weight.numel() for name in names}
    ladder = PruneTo(pruner=SPARSE, kept={name: (sizes[name], sizes[name] // 2) for name in names})
    database, _ = ensure_database(build_settings(tmp_path, propagate=None, recipe={"of": "exact"}), blocks, ids, ladder)
    first = [unit.name for unit in database.space.units if unit.block == 0]
    genome = tuple(0 if unit.name in first or unit.kind == "q_proj" else 1 for unit in database.space.units)
    assert inexact_units(database, genome) == {
        unit.name for unit, level in zip(database.space.units, genome, strict=True) if level == 1
    }
    judge = FakeJudge(set(range(BLOCKS)))
    live = LiveModel(blocks, LevelUnion([database]))
    refined = ensure_refined(settings, live, database, genome, ids, ladder, lambda: judge)
    assert [index for what, index, _ in judge.asked if what == "loss"] == [1, 1, 2]
    assert [(step.kept, step.before) for step in steps_of(refined)] == [(False, None), (True, 1.0), (True, 0.5)]
    for i, unit in enumerate(database.space.units):
        if genome[i] == 0:
            assert torch.equal(refined.read(i, 0).decode(), blocks.model.get_submodule(unit.name).weight.data)
    assert inexact_units(database, (0,) * len(genome)) == set()


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(settings, case, ids, monkeypatch):
    replace, calls = os.replace, []

    def full(source, target):
        calls.append(target)
        if block_file(1) in str(target):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(EvoPressError, match=r"the disk is full while writing .*block-001"):
            refined_of(settings, case, ids)
    left = [path.name for path in refine.folder_of(settings, case[1]).iterdir()]
    assert sorted(left) == [block_file(0), "journal.jsonl"]
    found, _ = refined_of(settings, case, ids)
    assert len(steps_of(found)) == BLOCKS


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_its_own_comes_last_and_an_embedding_stays(tied, settings, ids, tokens, build_settings, tmp_path, compressor):
    pretrained = load_pretrained(make_tiny(tmp_path / "model", num_blocks=2, tied=tied), dtype="float32")
    blocks = BlockModel(pretrained.model, pretrained.family, include=("blocks", HEAD, EMBEDDING))
    database, _ = ensure_database(build_settings(tmp_path), blocks, ids, compressor)
    live = LiveModel(blocks, LevelUnion([database]))
    genome = (2,) * len(database.space)
    heldout = tokens(4, 16, seed=9)
    evaluator = PopulationEvaluator(live)
    base = base_states(evaluator, heldout, batch_tokens=64)

    def measured(*genomes):
        sums, count = measure_sums(evaluator, genomes, heldout, base, KLDivergence())
        return (sums[:, 0] / count).tolist()

    told: list[float] = []

    class Eager(SuffixLoss):
        """Measures all, and finds whatever is new better."""

        def loss(self, index, weights) -> float:
            told.append(super().loss(index, weights))
            return -float(index) if weights else 0.0

    judge = Eager(live, genome, heldout, base=base, measure=KLDivergence())
    assert judge.loss(0, {}) == 0.0
    assert told.pop() == pytest.approx(measured(genome)[0], rel=1e-5)
    refined = ensure_refined(settings, live, database, genome, ids, compressor, lambda: judge)
    kept = [step.kept for step in steps_of(refined)]
    assert kept == ([False, True, False] if tied else [False, True, True, False])  # the first is only as good as what was there
    old, new = levels_at(database, genome), levels_at(refined, (0,) * len(genome))
    changed = {unit.kind for unit, a, b in zip(database.space.units, old, new, strict=True) if not torch.equal(a, b)}
    assert (HEAD in changed) is not tied
    assert EMBEDDING not in changed
    union = LevelUnion([database, refined])
    evaluator = PopulationEvaluator(LiveModel(blocks, union))
    assert told[-1] == pytest.approx(measured(union.genome_of_last((0,) * len(genome)))[0], rel=1e-5)
