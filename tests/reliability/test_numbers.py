"""Numbers that are not finite, matrices that cannot be factored, budgets that leave nothing to do: each ends, and says where."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import toy_search
from torch import Tensor
from toy_search import budget_of, quant_space

from evopress.compress.compressor import with_errors
from evopress.compress.gptq import GPTQ
from evopress.compress.hessian import HessianSum, SingularHessianError, inverse_factor
from evopress.errors import EvoPressError
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import MinibatchFitness, base_states
from evopress.fitness.population import PopulationEvaluator
from evopress.levels import build, compressing
from evopress.levels.build import ensure_database
from evopress.levels.hessians import BlockHessians
from evopress.levels.live import LiveModel
from evopress.search.constraint import EXCHANGES
from evopress.search.evolution import Evolution, SearchSettings
from evopress.search.initial import initial_candidates, random_mix
from evopress.search.mutation import LevelSwitch
from evopress.search.strategy import run_search
from evopress.stages.searchable import check_switches
from evopress.units import Budget, Genome, Level, Space, Unit

NAN, INF = math.nan, math.inf
SETTINGS = replace(toy_search.SETTINGS, generations=30)


def evolution_of(bits: float = 4, settings: SearchSettings = SETTINGS, seed: int = 0) -> Evolution:
    space = quant_space([2] * 8)
    first, second = np.random.default_rng(seed).spawn(2)
    return Evolution(space, budget_of(space, bits), settings, rng_initial=first, rng_mutation=second)


# A candidate that is not finite


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_it_loses_and_is_counted_whatever_the_number_of_survivors(broken: float) -> None:
    evolution = evolution_of()
    offspring = evolution.ask().genomes
    assert evolution.tell([broken, 5.0, broken, broken, 3.0, broken, broken, broken]) is None
    question = evolution.ask()
    assert question.genomes == (offspring[4], offspring[1])  # two of the four that may go on
    assert evolution.tell([1.0, broken]) is None
    question = evolution.ask()
    assert question.genomes == (evolution.parent, offspring[4])
    record = evolution.tell([2.0, 1.0])
    assert record is not None and record.accepted and record.genome == offspring[4]
    assert record.non_finite == record.to_dict()["non_finite"] == evolution.non_finite == 7
    assert [stage.survivors for stage in record.stages] == [(4, 1), (0,), (1,)]
    json.dumps(record.to_dict(), allow_nan=False)


def test_a_generation_without_one_says_nothing_of_it() -> None:
    evolution = evolution_of(settings=replace(SETTINGS, survivors=[1], tokens=[8]))
    evolution.ask()
    record = evolution.tell([1.0] * 9)
    assert record is not None and "non_finite" not in record.to_dict()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_loses_all_offspring_leaves_the_parent(stage: int) -> None:
    evolution = evolution_of()
    parent, record, counts = evolution.parent, None, []
    for index in range(3):
        question = evolution.ask()
        counts.append(len(question.genomes))
        assert (question.genomes == (parent,)) == (index > stage)
        record = evolution.tell([NAN] * len(question.genomes) if index == stage else [1.0] * len(question.genomes))
    assert record is not None and not record.accepted and record.genome == parent == evolution.parent
    assert record.fitness == record.parent_fitness == 1.0
    assert record.non_finite == counts[stage]
    assert counts[stage + 1 :] == [1] * (2 - stage)
    assert evolution.ask().genomes != (parent,)  # the search goes on


def test_a_finite_parent_stays_where_the_last_stage_loses_the_others() -> None:
    evolution = evolution_of(settings=replace(SETTINGS, survivors=[1], tokens=[8]))
    parent = evolution.parent
    evolution.ask()
    record = evolution.tell([2.0] + [NAN] * 8)
    assert record is not None and record.genome == parent and record.non_finite == 8


@pytest.mark.parametrize(
    ("lost", "sentence"), [(0, "the 1 candidates in generation 1 on 40"), (2, "the 3 candidates in generation 1 on 160")]
)
def test_a_generation_with_nothing_finite_stops_with_a_sentence(lost: int, sentence: str) -> None:
    evolution = evolution_of()
    for _ in range(lost):
        evolution.tell([1.0] * len(evolution.ask().genomes))
    if lost < 2:  # the parent comes in with the next stage
        evolution.tell([NAN] * len(evolution.ask().genomes))
    count = len(evolution.ask().genomes)
    with pytest.raises(EvoPressError, match=f"{sentence} tokens is nan, not a finite number"):
        evolution.tell([NAN] * count)


def test_initial_candidates_that_are_all_not_finite_stop_the_search() -> None:
    evolution = evolution_of(bits=2.5)
    count = len(evolution.ask().genomes)
    with pytest.raises(EvoPressError, match=f"{count} candidates in generation 0 on 20 tokens is nan"):
        evolution.tell([NAN] * count)


def only(parent: Genome) -> Callable[..., list[float]]:
    """Return a fitness that is finite for one genome."""
    return lambda genomes, *, tokens: [1.0 if genome == parent else NAN for genome in genomes]


def where_first_stays(parent: Genome) -> Callable[..., list[float]]:
    """Return a fitness that is finite for genomes whose first unit is as in this one, which is the fittest of all."""
    return lambda genomes, *, tokens: [float(genome != parent) if genome[0] == parent[0] else NAN for genome in genomes]


def test_generations_that_lose_all_offspring_are_bounded_also_across_a_resumed_run() -> None:
    whole = evolution_of()
    with pytest.raises(
        EvoPressError, match=r"no offspring kept a finite fitness .* in 10 generations \(to 10, 8 offspring each\): "
    ):
        run_search(whole, only(whole.parent))
    first = evolution_of()
    fitness = only(first.parent)
    while first.generation < 6:
        first.tell(fitness(first.ask().genomes, tokens=0))
    second = evolution_of(seed=5)
    second.restore(json.loads(json.dumps(first.state())))
    with pytest.raises(EvoPressError, match=r"in 10 generations \(to 10,"):
        run_search(second, fitness)
    assert second.non_finite == whole.non_finite == 80


def test_the_count_is_told_once_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    evolution = evolution_of()
    parent, records = evolution.parent, []
    with caplog.at_level(logging.WARNING):
        assert run_search(evolution, where_first_stays(parent), on_generation=records.append) == parent
    (line,) = caplog.messages
    assert evolution.non_finite == sum(record.non_finite for record in records) > 0
    assert line.startswith(f"{evolution.non_finite} candidates of this search lost")
    caplog.clear()
    run_search(evolution_of(), lambda genomes, *, tokens: [1.0] * len(genomes))
    assert not caplog.messages


@pytest.fixture(scope="module")
def sequences(tokens: Callable[..., Tensor]) -> Tensor:
    return tokens(6, 16, seed=3)


def fitness_on(live: LiveModel, sequences: Tensor, base: Tensor) -> MinibatchFitness:
    return MinibatchFitness(PopulationEvaluator(live), sequences, rng=np.random.default_rng(0), base=base, measure=KLDivergence())


def test_a_level_that_is_not_finite_is_named_once_with_its_sequence(
    tiny_blocks: Callable[..., Any], live_model: Callable[..., LiveModel], sequences: Tensor, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch, weights_digest: Callable[..., str],
) -> None:  # fmt: skip
    live = live_model("llama")
    base = base_states(PopulationEvaluator(live), sequences, batch_tokens=64)
    broken = LiveModel(live.blocks, live.levels)
    decoded = LiveModel._weight
    monkeypatch.setattr(
        LiveModel, "_weight", lambda self, unit, level, device: decoded(self, unit, level, device) * (NAN if level == 2 else 1.0)
    )
    sound = (0,) * len(broken.space)
    genomes = [sound, (*sound[:5], 2, *sound[6:]), (2, *sound[1:])]
    before = weights_digest(live.blocks.model)
    fitness = fitness_on(broken, sequences, base)
    with caplog.at_level(logging.WARNING):
        values = [fitness(genomes, tokens=40) for _ in range(2)]
    assert all(math.isfinite(value[0]) and math.isnan(value[1]) and math.isnan(value[2]) for value in values)
    (line,) = caplog.messages
    assert f"the weight {broken.space.units[5].name}" in line
    assert "search sequence" in line
    assert weights_digest(live.blocks.model) == before


def test_a_dense_model_that_is_not_finite_is_named_with_its_sequence(
    tiny_blocks: Callable[..., Any], live_model: Callable[..., LiveModel], sequences: Tensor
) -> None:
    live = live_model("llama")
    base = base_states(PopulationEvaluator(live), sequences, batch_tokens=64)
    blocks = tiny_blocks("llama", num_blocks=4)
    blocks.model.lm_head.weight.data[7] = 3e38
    fitness = fitness_on(LiveModel(blocks, live.levels), sequences, base)
    with pytest.raises(
        EvoPressError, match=r"logits are not finite on search sequence \d, first the logits: check the model's weights"
    ):
        fitness([(0,) * len(live.space)], tokens=96)


# Activations, weights and Hessians while a level database is built


def test_an_embedding_that_is_not_finite_names_the_sequences(
    tmp_path: Path,
    build_settings: Callable[..., Any],
    tiny_blocks: Callable[..., Any],
    tokens: Callable[..., Tensor],
    compressor: GPTQ,
) -> None:
    blocks, ids = tiny_blocks("llama"), tokens(6, 16).clamp(max=200)
    ids[5, 3] = 250
    blocks.model.get_input_embeddings().weight.data[250] = INF
    with pytest.raises(EvoPressError, match=r"the embedding is not finite, first on calibration sequences 4 to 5: "):
        ensure_database(build_settings(tmp_path), blocks, ids, compressor)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("propagate", ["3", None])
def test_activations_that_overflow_name_the_unit_that_they_enter(
    propagate: str | None, tmp_path: Path, build_settings: Callable[..., Any], tiny_blocks: Callable[..., Any],
    tokens: Callable[..., Tensor], compressor: GPTQ,
) -> None:  # fmt: skip
    blocks = tiny_blocks("llama", dtype="float16")
    overflowing(blocks)
    with pytest.raises(EvoPressError) as caught:
        ensure_database(build_settings(tmp_path, propagate=propagate), blocks, tokens(6, 16), compressor)
    sentence = str(caught.value)
    assert "input activations of model.layers.1.mlp.down_proj are not finite" in sentence
    assert "first on calibration sequences 0 to 3" in sentence and "model.dtype=bfloat16" in sentence


def overflowing(blocks: Any, index: int = 1) -> None:
    """Let the product of gate and up be more than float16 holds, and less than bfloat16 does."""
    for name, linear in blocks.linears(index).items():
        if name.endswith(("gate_proj", "up_proj")):
            linear.weight.data *= 2000.0


def test_the_self_check_names_the_block_that_overflows(tiny_blocks: Callable[..., Any]) -> None:
    blocks = tiny_blocks("llama", dtype="float16")
    blocks.self_check()
    overflowing(blocks)
    with pytest.raises(EvoPressError, match=r"first the output of model\.layers\.1: use model\.dtype=bfloat16"):
        blocks.self_check()
    wide = tiny_blocks("llama", dtype="bfloat16")
    overflowing(wide)
    wide.self_check()
    wide.linears(0)["model.layers.0.mlp.up_proj"].weight.data[0, 0] = NAN
    with pytest.raises(EvoPressError, match=r"first the weight model\.layers\.0\.mlp\.up_proj\.weight: check the model's weights"):
        wide.self_check()


def test_levels_that_activations_leave_through_are_looked_at(
    tmp_path: Path, build_settings: Callable[..., Any], tiny_blocks: Callable[..., Any], tokens: Callable[..., Tensor],
    compressor: GPTQ, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    compress = build._compress_part

    def broken(*args: Any) -> tuple[Any, dict[str, Tensor]]:
        compressed, placed = compress(*args)
        return compressed, {name: weight * INF for name, weight in placed.items()}

    monkeypatch.setattr(build, "_compress_part", broken)
    with pytest.raises(
        EvoPressError, match=r"output of model\.layers\.0, at the level .* not finite, first on calibration sequences 0"
    ):
        ensure_database(build_settings(tmp_path), tiny_blocks("llama"), tokens(6, 16), compressor)


@dataclass(frozen=True)
class Broken:
    """A payload that does not decode to finite weights."""

    codec: ClassVar[str] = "none"

    def decode(self) -> Tensor:
        return torch.tensor([[1.0, INF]])


def test_a_level_that_does_not_decode_to_finite_weights_is_named() -> None:
    with pytest.raises(EvoPressError, match=r"level 1 of q has no finite error: .*method\.scale_dtype=float32"):
        with_errors([replace_with(torch.ones(1, 2)), Broken()], torch.ones(1, 2), torch.eye(2), name="q")
    with pytest.raises(EvoPressError, match="level 0 of q_proj has no finite error"):
        GPTQ(bits=(4,), group_size=None).compress(
            {"q_proj": torch.full((2, 4), 1e30) * torch.arange(8).reshape(2, 4)}, torch.eye(4)
        )


def replace_with(W: Tensor) -> Any:
    """Return a payload that decodes to W."""
    return type("Whole", (), {"codec": "none", "decode": lambda self: W})()


def test_a_hessian_that_is_not_finite_is_not_taken_for_a_singular_one() -> None:
    H = torch.eye(3)
    H[1, 1] = INF
    with pytest.raises(EvoPressError, match="its Hessian is not finite") as caught:
        inverse_factor(H, damping=0.01)
    assert not isinstance(caught.value, SingularHessianError)
    total = HessianSum(2)
    total.add(torch.full((1, 1, 2), 3e19))  # finite; its square is not
    assert not total.finite


def with_eigenvalue(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second block's Hessians have mean diagonal 1 and this least eigenvalue."""
    collect = compressing.collect_hessians

    def collected(blocks: Any, index: int, *args: Any, **kwargs: Any) -> BlockHessians:
        real = collect(blocks, index, *args, **kwargs)
        return (
            real
            if index == 0
            else BlockHessians(real.owners, {name: indefinite(len(H), least) for name, H in real.hessians.items()})
        )

    monkeypatch.setattr(compressing, "collect_hessians", collected)


def indefinite(columns: int, least: float) -> Tensor:
    Q = torch.linalg.qr(torch.randn(columns, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    eigenvalues = torch.full((columns,), (columns - least) / (columns - 1), dtype=torch.float64)
    eigenvalues[0] = least
    return (Q @ torch.diag(eigenvalues) @ Q.T).float()


def test_a_hessian_that_three_dampings_do_not_cure_names_its_units_and_leaves_the_blocks_before(
    tmp_path: Path, build_settings: Callable[..., Any], tiny_blocks: Callable[..., Any], tokens: Callable[..., Tensor],
    compressor: GPTQ, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with_eigenvalue(-100.0, monkeypatch)
    settings = build_settings(tmp_path, propagate=None)
    with pytest.raises(SingularHessianError, match=r"layers\.1\.self_attn\.q_proj, .*k_proj, .*v_proj: .* damping 10 of the mean"):
        ensure_database(settings, tiny_blocks("llama"), tokens(6, 16), compressor)
    assert [path.name for path in settings.folder.glob("*.safetensors")] == ["block-000.safetensors"]
    assert not (settings.folder / "manifest.json").exists()


@pytest.mark.parametrize(("least", "damping"), [(-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_the_damping_that_a_hessian_took_is_in_the_manifest(
    least: float, damping: float, tmp_path: Path, build_settings: Callable[..., Any], tiny_blocks: Callable[..., Any],
    tokens: Callable[..., Tensor], compressor: GPTQ, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with_eigenvalue(least, monkeypatch)
    database, _ = ensure_database(build_settings(tmp_path, propagate=None), tiny_blocks("llama"), tokens(6, 16), compressor)
    used = {unit["block"]: {level["damping"] for level in unit["levels"]} for unit in database.manifest["units"]}
    assert used[0] == {0.01}
    assert list(used[1]) == [pytest.approx(damping)]


# Budgets that leave nothing to do


def drop_space(num_units: int, num_excluded: int) -> Space:
    keep, drop = Level("keep", 1, "keep", 0), Level("drop", 0, "drop", 0)
    return Space(
        "drop",
        tuple(Unit(f"blocks.{i}", i, "block", 1, (keep,) if i < num_excluded else (keep, drop)) for i in range(num_units)),
    )


STUCK = {
    "a single unit": (quant_space([4]), 4.0),
    "units of different sizes": (quant_space([1, 2, 4]), 4.0),
    "everything at the lowest level": (quant_space([1, 1, 1]), 2.0),
    "everything at the highest level": (quant_space([1, 1, 1]), 6.0),
    "one level": (quant_space([1, 1, 1], bits=(3,)), 3.0),
    "everything is excluded but what is dropped": (drop_space(6, 4), 4 / 6),
}


@pytest.mark.parametrize("exchange", [name for name in EXCHANGES if name != "any"])
@pytest.mark.parametrize("case", STUCK)
def test_a_budget_without_a_legal_switch_ends_with_a_sentence(case: str, exchange: str) -> None:
    space, target = STUCK[case]
    budget = Budget(round(target * space.size), target, "on average")
    settings = replace(SETTINGS, exchange=exchange)
    if exchange in ("none", "fit") and case == "units of different sizes":
        check_switches(space, budget, settings)  # within the budget, which is a legal switch
        return
    with pytest.raises(EvoPressError, match=r"no other genome from the current one in 100 attempts .* choose a target"):
        check_switches(space, budget, settings)
    evolution = Evolution(space, budget, settings, rng_initial=np.random.default_rng(0), rng_mutation=np.random.default_rng(0))
    with pytest.raises(EvoPressError, match="no other genome"):
        run_search(evolution, lambda genomes, *, tokens: [1.0] * len(genomes))


def test_a_stuck_mix_is_no_reason_to_refuse_a_search_that_another_one_can_begin() -> None:
    space = quant_space([1, 1, 2, 1], bits=(2, 1))
    budget = Budget(7, 1.4, "bits per weight")
    mixes = initial_candidates(space, budget, num_candidates=6, rng=np.random.default_rng(0))
    switch = LevelSwitch(space, budget)
    stuck = []
    for mix in mixes:
        try:
            switch(mix, np.random.default_rng(0))
        except EvoPressError:
            stuck.append(mix)
    assert 0 < len(stuck) < len(mixes)
    for first in range(len(mixes)):  # whichever comes first

        class Turned(Evolution):
            def ask(self, first: int = first) -> Any:
                question = super().ask()
                if question.stage < 0:
                    question = replace(question, genomes=question.genomes[first:] + question.genomes[:first])
                    self._question = question
                return question

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("evopress.stages.searchable.Evolution", Turned)
            check_switches(space, budget, SETTINGS)


def test_levels_that_cost_the_same_do_not_loop_for_ever() -> None:
    equal = Unit("a", 0, "q", 1, tuple(Level(str(i), cost, str(i), 0) for i, cost in enumerate((3, 2, 2, 1))))
    fixed = Unit("b", 0, "q", 1, (Level("0", 4, "0", 0),))
    with pytest.raises(EvoPressError, match=r"budget 5: every level must cost less"):
        random_mix(Space("quant", (equal, fixed)), Budget(5, 2.5, "bits per weight"), np.random.default_rng(0))
