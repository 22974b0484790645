"""Weights that an engine runs as one matrix are one unit: of the space, of the live model, of errors, attributions and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evopress.currencies import CURRENCIES, DROP, QUANT
from evopress.engines import ENGINES, Shape, engine_of
from evopress.errors import EvoPressError
from evopress.fitness.attribution import attribute
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import base_states
from evopress.fitness.population import PopulationEvaluator
from evopress.levels.live import LiveModel
from evopress.levels.tied import TiedLevels, as_engine_has, tied
from evopress.models.blocks import BlockModel
from evopress.models.outline import outlined
from evopress.reporting.records import read_genome, read_json, write_genome
from evopress.units import Level, Space, Unit
from experiments.tiny_any import any_model

VLLM = ENGINES["vllm"]


def of_an_engine(live: LiveModel, name: str = "vllm") -> LiveModel:
    """Return a live model whose weights an engine ties."""
    columns = {slot.name: slot.weight.shape[1] for part in live.blocks.parts for slot in live.blocks.slots(part).values()}
    space = tied(as_engine_has(live.space, ENGINES[name], columns=columns, stored=32, written=16), ENGINES[name])
    return LiveModel(live.blocks, TiedLevels(live.levels, space))  # type: ignore[arg-type]


def mixed(space: Space) -> tuple[int, ...]:
    return tuple(index * 7 % 3 for index in range(len(space)))


@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_a_tied_model_computes_what_its_weights_at_the_same_levels_do(
    family: str, live_model: Callable[..., LiveModel], tokens: Callable[..., Tensor], weights_digest: Callable[..., str]
) -> None:
    live = live_model(family, num_blocks=2)
    before = weights_digest(live.blocks.model)
    engine = of_an_engine(live)
    per_block = {"llama": (7, 4), "opt": (6, 4), "phi3": (4, 4)}[family]
    assert (len(live.space), len(engine.space)) == tuple(2 * count for count in per_block)
    genome = mixed(engine.space)
    whole = engine.space.unfold(genome)
    assert engine.space.fold(whole) == genome and engine.space.whole.check(whole) == whole
    for currency in (None, *CURRENCIES.values()):
        one, other = engine.space.priced(currency), engine.space.whole.priced(currency)
        assert one.cost(genome) == other.cost(whole) and one.size == other.size
    ids, logits = tokens(2, 8, seed=2), []
    for each, levels in ((engine, genome), (live, whole)):
        with each.applied(levels):
            logits.append(each.blocks.model(input_ids=ids, use_cache=False).logits)
    assert torch.equal(*logits) and weights_digest(live.blocks.model) == before
    for index, unit in enumerate(engine.space.units):
        members = [live.levels.space.units.index(u) for u in live.space.units if engine.space.places[u.name] == index]
        assert unit.size == sum(live.space.units[i].size for i in members)
        assert engine.levels.errors[index] == pytest.approx([sum(live.levels.errors[i][k] for i in members) for k in range(3)])  # type: ignore[attr-defined]


def test_a_tied_unit_holds_what_its_weights_hold(live_model: Callable[..., LiveModel], tokens: Callable[..., Tensor]) -> None:
    live = live_model(num_blocks=2)
    engine, ids = of_an_engine(live), tokens(2, 8, seed=2)
    base = base_states(PopulationEvaluator(live), ids, batch_tokens=16)
    genome = mixed(engine.space)
    found = attribute(engine, genome, ids, base, KLDivergence())
    expected = attribute(live, engine.space.unfold(genome), ids, base, KLDivergence())
    for index, members in enumerate(engine.space.members):
        assert torch.allclose(found[:, index], expected[:, list(members)].sum(1), rtol=1e-12)
    assert max(map(len, engine.space.members)) == 3


def test_a_genome_file_speaks_of_weights(live_model: Callable[..., LiveModel], tmp_path: Path) -> None:
    """So that it is one of any engine, if it keeps that engine's rules."""
    live = live_model(num_blocks=2)
    space, files = of_an_engine(live).space, (tmp_path / "genome.json", tmp_path / "genome.txt")
    genome = mixed(space)
    write_genome(*files, space=space, genome=genome, database="0" * 16, budget=10**9)
    for path in files:
        assert read_genome(path, space) == genome and read_genome(path, live.space) == space.unfold(genome)
    assert [unit["name"] for unit in read_json(files[0])["units"]] == [unit.name for unit in live.space.units]
    free = tuple(index % 2 for index in range(len(live.space)))
    write_genome(*files, space=live.space, genome=free, database="0" * 16, budget=10**9)
    with pytest.raises(
        EvoPressError, match=r"q_proj at 4 bits and .*k_proj at 3 bits, which share one level here, .*qkv_proj: .*none"
    ):
        read_genome(files[1], space)


@pytest.mark.parametrize("name", [name for name, engine in ENGINES.items() if engine.bits])
def test_bytes_are_those_of_the_engine_s_file(name: str, live_model: Callable[..., LiveModel]) -> None:
    live = live_model(num_blocks=2)
    whole = of_an_engine(live, name).space.whole
    for unit, before in zip(whole.units, live.space.units, strict=True):
        columns = 64 if unit.kind == "down_proj" else 32
        for level, old in zip(unit.levels, before.levels, strict=True):
            shape = Shape(unit.size // columns, columns, int(level.key), unit.size // 16, 16)
            assert level.stored_bits == ENGINES[name].stored_bits(shape) and level.cost == old.cost
            assert (level.stored_bits == old.stored_bits) is (name == "mlx"), "ours are as large as MLX's"


def test_what_lies_in_a_dropped_module_is_free_where_it_is_tied() -> None:
    levels = tuple(Level(f"{bits} bits", 4 * bits, str(bits), 4 * bits, QUANT) for bits in (4, 2))
    modules = (Level("keep", 1, "keep", 0, DROP), Level("drop", 0, "drop", 0, DROP))
    units = [Unit(f"0.attn.{kind}_proj", 0, f"{kind}_proj", 4, levels) for kind in "qkvo"]
    units.append(Unit("0.attention", 0, "attention", 0, modules))
    space = tied(Space("joint", tuple(units), CURRENCIES["bytes"], (4, 4, 4, 4, None)), VLLM)
    assert [unit.name for unit in space.units] == ["0.attn.qkv_proj", "0.attn.o_proj", "0.attention"]
    assert space.inside == (2, 2, None)
    assert space.cost((0, 1, 0)) == 3 * 16 + 8 and space.cost((0, 1, 1)) == 0


@pytest.mark.parametrize(
    ("model_type", "block", "expected"),
    [
        ("qwen3_5_text", 0, ["in_proj_qkvz", "out_proj", "gate_up_proj", "down_proj"]),
        ("qwen3_5_text", 3, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("lfm2", 0, ["in_proj", "out_proj", "w13", "w2"]),
        ("lfm2", 1, ["qkv_proj", "out_proj", "w13", "w2"]),
    ],
)
def test_models_have_names_of_their_own_for_what_runs_as_one(model_type: str, block: int, expected: list[str]) -> None:
    model = any_model(model_type)
    levels = (Level("4 bits", 16, "4", 16, QUANT), Level("2 bits", 8, "2", 8, QUANT))
    slots = BlockModel(model, outlined(model)).slots(block)
    units = tuple(Unit(name, block, slot.kind, slot.weight.numel(), levels) for name, slot in slots.items())
    assert [unit.name.rpartition(".")[2] for unit in tied(Space("quant", units), VLLM).units] == expected


def test_weights_with_other_levels_cannot_be_tied_and_engines_have_names() -> None:
    four, two = Level("4 bits", 16, "4", 16, QUANT), Level("2 bits", 8, "2", 8, QUANT)
    units = (Unit("a.gate_proj", 0, "gate_proj", 4, (four, two)), Unit("a.up_proj", 0, "up_proj", 4, (four,)))
    with pytest.raises(
        EvoPressError, match=r"a.gate_proj and a.up_proj must share one level \(a.gate_up_proj\), but their available"
    ):
        tied(Space("quant", units), VLLM)
    assert engine_of("none") is None and engine_of("vllm") is VLLM
    with pytest.raises(EvoPressError, match="engine=vlm is unknown: choose one of none, mlx, vllm, gptqmodel"):
        engine_of("vlm")
