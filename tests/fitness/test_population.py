from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evopress.fitness.measures import HeldOut, KLDivergence, NegativeLogLikelihood, TopkKL
from evopress.fitness.plain import PlainEvaluator
from evopress.fitness.population import PopulationEvaluator, measure_sums

FAMILIES = ["llama", "gemma2", "gemma3_text", "opt"]  # gemma2 caps its logits softly; both Gemmas slide their windows


@dataclass(frozen=True)
class Case:
    """Four blocks, in float32, with their database, and a pool of genomes that share prefixes."""

    live: object
    ids: torch.Tensor
    base: torch.Tensor


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, live_model, tokens) -> Case:
    live = live_model(request.param, num_blocks=4)
    ids = tokens(3, 24, seed=7)
    _, states = PlainEvaluator(live).final_states([None], ids)
    return Case(live, ids, states[0])


def random_genomes(live, count, *, seed=0):
    """Draw a parent and offspring that differ from it in one to three units."""
    generator = torch.Generator().manual_seed(seed)

    def integer(below):
        return int(torch.randint(below, (1,), generator=generator))

    parent = [integer(3) for _ in range(len(live.space))]
    genomes = [tuple(parent)]
    while len(genomes) < count:
        child = list(parent)
        for _ in range(1 + integer(3)):
            child[integer(len(child))] = integer(3)
        genomes.append(tuple(child))
    return genomes


def num_prefixes(live, genomes):
    """Count the distinct prefixes of genomes, block by block."""
    per_block = [sum(unit.block == block for unit in live.space.units) for block in range(len(live.blocks.blocks))]
    prefixes = set()
    for genome in genomes:
        for block in range(len(per_block)):
            prefixes.add((block, None if genome is None else genome[: sum(per_block[: block + 1])]))
    return len(prefixes)


def fitness(evaluator, genomes, case, length, measure, **settings):
    ids = case.ids[:, :length]
    sums, count = measure_sums(evaluator, genomes, ids, case.base, measure, **settings)
    assert count == ids.shape[0] * (length - 1)
    return sums / count


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_population_evaluator_equals_the_plain_one(case, data):
    pool = [None, *random_genomes(case.live, 9, seed=data.draw(st.integers(0, 999)))]
    genomes = [pool[i] for i in data.draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=9))]
    length = data.draw(st.sampled_from([24, 24, 17, 5, 2]))
    in_flight = data.draw(st.sampled_from([1, 24, 60, 100, 4096]))
    fast = PopulationEvaluator(case.live, max_tokens_in_flight=in_flight)
    mine = fitness(fast, genomes, case, length, HeldOut())
    plain = fitness(PlainEvaluator(case.live), genomes, case, length, HeldOut())
    torch.testing.assert_close(mine[:, :2], plain[:, :2], rtol=1e-4, atol=1e-6)
    assert (mine[:, 2] - plain[:, 2]).abs().max() <= 1.01 / (3 * (length - 1))  # one token may have two equal logits
    assert mine[:, 0].argmin() in torch.where(plain[:, 0] == plain[:, 0].min())[0]
    for genome, kl in zip(genomes, mine[:, 0].tolist(), strict=True):
        if genome is None:
            assert abs(kl) < 1e-5
        else:
            assert kl > 1e-3
    assert fast.num_block_tokens == num_prefixes(case.live, genomes) * case.ids[:, :length].numel()


def test_every_distinct_prefix_is_computed_once(case, monkeypatch):
    genomes = [None, *random_genomes(case.live, 12)]
    genomes += [genomes[3], genomes[5], None]
    runs = []
    run = case.live.blocks.run
    monkeypatch.setattr(case.live.blocks, "run", lambda index, x, **way: runs.append(x.numel()) or run(index, x, **way))
    evaluator = PopulationEvaluator(case.live)
    state_of, states = evaluator.final_states(genomes, case.ids)
    assert len(states) == len(set(genomes)) == len(set(state_of))
    assert {genome: state_of[genomes.index(genome)] for genome in genomes} == dict(zip(genomes, state_of, strict=True))
    computed = num_prefixes(case.live, genomes)
    assert computed < 4 * len(set(genomes)), "these genomes share nothing, so nothing is shown"
    assert sum(runs) == computed * states[0].numel()
    assert evaluator.num_block_tokens == computed * case.ids.numel()


def test_one_switch_in_the_last_block_costs_one_more_block(case):
    parent = random_genomes(case.live, 1)[0]
    child = (*parent[:-1], (parent[-1] + 1) % 3)
    evaluator = PopulationEvaluator(case.live)
    evaluator.final_states([parent, child, parent], case.ids)
    assert evaluator.num_block_tokens == 5 * case.ids.numel()


def test_forwards_hold_no_more_tokens_than_allowed(case, monkeypatch):
    sizes = []
    run = case.live.blocks.run
    monkeypatch.setattr(case.live.blocks, "run", lambda i, x, **way: sizes.append(x.shape[0] * x.shape[1]) or run(i, x, **way))
    for limit in (24, 48, 150):
        sizes.clear()
        PopulationEvaluator(case.live, max_tokens_in_flight=limit).final_states(random_genomes(case.live, 6), case.ids)
        assert max(sizes) <= limit


def test_the_model_is_left_dense(case, weights_digest, monkeypatch):
    before = weights_digest(case.live.blocks.model)
    PopulationEvaluator(case.live).final_states(random_genomes(case.live, 4), case.ids)
    assert weights_digest(case.live.blocks.model) == before
    count, run = 0, case.live.blocks.run

    def failing(index, hidden, **way):
        nonlocal count
        count += 1
        if count == 6:
            raise RuntimeError
        return run(index, hidden, **way)

    monkeypatch.setattr(case.live.blocks, "run", failing)
    with pytest.raises(RuntimeError):
        PopulationEvaluator(case.live).final_states(random_genomes(case.live, 4), case.ids)
    assert weights_digest(case.live.blocks.model) == before


def test_final_states_give_the_models_own_logits(case):
    genome = random_genomes(case.live, 1)[0]
    head = case.live.blocks.head()
    for evaluator in (PlainEvaluator(case.live, max_tokens_in_flight=30), PopulationEvaluator(case.live)):
        for candidate in (None, genome):
            _, (state,) = evaluator.final_states([candidate], case.ids)
            with case.live.applied(candidate), torch.no_grad():
                whole = case.live.blocks.model(input_ids=case.ids, use_cache=False).logits
            torch.testing.assert_close(head.logits(state), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("measure", [KLDivergence(), TopkKL(5), NegativeLogLikelihood(), HeldOut()])
def test_the_chunk_size_changes_nothing_but_rounding(case, measure):
    genomes = random_genomes(case.live, 3)
    evaluator = PopulationEvaluator(case.live)
    expected = fitness(evaluator, genomes, case, 24, measure, chunk_tokens=10_000)
    for chunk_tokens in (1, 7, 128):
        mine = fitness(evaluator, genomes, case, 24, measure, chunk_tokens=chunk_tokens)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_without_a_base_the_first_genome_is_the_base(case):
    genome = random_genomes(case.live, 1)[0]
    evaluator = PopulationEvaluator(case.live)
    given, _ = measure_sums(evaluator, [genome], case.ids, case.base, KLDivergence())
    own, _ = measure_sums(evaluator, [None, genome], case.ids, None, KLDivergence())
    torch.testing.assert_close(own[1], given[0], rtol=1e-4, atol=1e-5)
    assert abs(float(own[0, 0])) < 1e-4
