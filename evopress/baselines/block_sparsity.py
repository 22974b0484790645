"""Baselines that give all units of a block the same sparsity, by scores of blocks; of a few spreads that of the best perplexity."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from evopress.baselines.baseline import WEIGHTS, Baseline, Pass, Planned, Problem, check_hessians
from evopress.compress.compressor import Compressor
from evopress.compress.sparse import PruneTo, SparsityLevels, kept_at
from evopress.errors import EvoPressError
from evopress.settings import RunSettings
from evopress.units import BLOCKS, Genome

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A way to divide sparsity over blocks."""

    scores: Sequence[float]
    """Of every block; the higher one keeps more."""
    lambda_: float
    """λ, the greatest deviation from the target, in sparsity."""
    label: str
    """For people: "λ = 0.1, M = 5"."""


@dataclass(frozen=True)
class BlockSparsity(Baseline):
    """The candidate with the least perplexity on calibration text.

    It is in levels of the run's database followed by those of a second one, which is pruned as the first is.
    """

    tokens: int
    """Calibration tokens whose perplexity chooses."""
    serves = (WEIGHTS,)
    name: ClassVar[str]
    """Of its row, and of its levels' folder."""
    num_candidates: ClassVar[int]

    def check(self, run: RunSettings) -> None:
        """See `Baseline`."""
        if run.method.name != "sparsity":
            raise EvoPressError(
                f"baseline {self.name} supports method sparsity only, not {run.method.name}: leave it out of baselines.names"
            )
        if run.method.include != [BLOCKS]:
            raise EvoPressError(
                f"baseline {self.name} supports method.include=[blocks] only, not {run.method.include}: leave it out of "
                "baselines.names, or change method.include"
            )
        check_hessians(run, self.name)
        if not 2 <= self.tokens <= run.data.calibration_tokens:
            raise EvoPressError(
                f"baselines.owl_tokens={self.tokens} is out of range: expected 2 to data.calibration_tokens="
                f"{run.data.calibration_tokens}; change one of them"
            )

    def passes(self, plan: Planned) -> list[Pass]:
        """See `Baseline`."""
        return [Pass(self.num_candidates + 1, self.tokens)]

    def further(self, plan: Planned, compressor: Compressor) -> Compressor:
        """See `Baseline`: every candidate may have a level of its own of every weight, on average at the target."""
        assert isinstance(compressor, SparsityLevels)
        count, kept = self.num_candidates, {}
        for unit in plan.space.whole.units:
            most = min(kept_at(unit.size, plan.budget.target) + count // 2, unit.size)
            kept[unit.name] = range(most, max(most - count, -1), -1)
        return PruneTo(pruner=compressor, kept=kept)

    @abstractmethod
    def candidates(self, problem: Problem) -> list[Candidate]:
        """Return what is to be tried."""

    def find(self, problem: Problem) -> dict[str, Genome]:
        """See `Baseline`."""
        blocks, pruner = problem.blocks, problem.compressor()
        assert isinstance(pruner, SparsityLevels)
        problem.hessians()  # which the levels are pruned by
        tried = self.candidates(problem)
        logger.info("%s: a grid of %d", self.name, len(tried))
        slots = [blocks.slots(index) for index in range(len(blocks.blocks))]
        sizes = [[slot.weight.numel() for slot in block.values()] for block in slots]
        names = [name for block in slots for name in block]
        place = {name: i for i, name in enumerate(names)}
        whole = problem.space.whole.units
        tied = [[place[whole[i].name] for i in indices] for indices in problem.space.members if len(indices) > 1]
        kept_by_candidate = []
        for each in tried:
            kept = kept_in_blocks(each.scores, sizes, sparsity=problem.budget.target, lambda_=each.lambda_, tied=tied)
            kept_by_candidate.append([count for block in kept for count in block])
        choices = {name: sorted({kept[i] for kept in kept_by_candidate}, reverse=True) for i, name in enumerate(names)}
        levels = problem.add_levels(self.name, PruneTo(pruner=pruner, kept=choices))
        genomes = [
            levels.genome_of_last(tuple(choices[name].index(count) for name, count in zip(names, kept, strict=True)))
            for kept in kept_by_candidate
        ]
        text = problem.calibration_tokens
        scores = problem.measure(genomes, text[: max(self.tokens // text.shape[1], 1)], what=f"the grid of {self.name}")
        best = min(range(len(tried)), key=lambda i: scores[i].perplexity)
        logger.info("%s: %s is best on calibration text (perplexity %.2f)", self.name, tried[best].label, scores[best].perplexity)
        return {self.name: genomes[best]}


def block_sparsities(scores: Sequence[float], sizes: Sequence[Sequence[int]], *, sparsity: float, lambda_: float) -> list[float]:
    """Map scores of blocks to one sparsity for each: s - r + mean(r), r = 2λ · (score - min) / (max - min).

    The mean is weighted by the blocks' weights, so the average over weights is s. Differs from OWL's code where that leaves
    [0, 1): there sparsities are clipped to 0 below, and above so that the block's smallest unit keeps one weight; mean(r) is
    replaced by the one number with which the clipped sparsities average s. Equal scores give s everywhere.

    Args:
        scores: of every block; the higher one keeps more.
        sizes: weights of the units of every block.
        sparsity: target s in (0, 1).
        lambda_: λ, greatest deviation, 0 or more.

    Raises: EvoPressError if λ is negative, a score is not finite, or s is above what these clipped sparsities can average.
    """
    if not lambda_ >= 0.0:
        raise EvoPressError(
            f"a lambda of {lambda_:g} is out of range: expected the greatest deviation from the sparsity, 0 or more"
        )
    score = np.asarray(scores, dtype=np.float64)
    if len(score) != len(sizes) or not np.isfinite(score).all():
        raise EvoPressError(
            f"the scores of blocks {list(scores)} must be one finite number for each of {len(sizes)} blocks: check the model's "
            "weights, and its activations on the calibration text"
        )
    share = np.array([sum(block) for block in sizes], dtype=np.float64)
    share /= share.sum()
    most = np.array([1.0 - 1.0 / min(block) for block in sizes])
    if sparsity > share @ most:
        raise EvoPressError(f"sparsity={sparsity:g} leaves units without a weight: choose at most {share @ most:g}")
    spread = score.max() - score.min()
    r = 2.0 * lambda_ * (score - score.min()) / spread if spread else np.zeros_like(score)
    low = high = float(share @ r)
    if (sparsity - r + low < 0.0).any() or (sparsity - r + high > most).any():
        low, high = -1.0, 1.0 + float(r.max())  # all blocks clipped to 0, all to most
        for _ in range(100):  # halving ends at the resolution of a double
            middle = (low + high) / 2.0
            if share @ np.clip(sparsity - r + middle, 0.0, most) < sparsity:
                low = middle
            else:
                high = middle
    return [float(value) for value in np.clip(sparsity - r + high, 0.0, most)]


def kept_in_blocks(
    scores: Sequence[float],
    sizes: Sequence[Sequence[int]],
    *,
    sparsity: float,
    lambda_: float,
    tied: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """Return the weights that every unit of every block keeps, as many in all as uniform sparsity keeps.

    Each unit gets its block's share rounded down; the weights then missing go one each to the units that lost the largest fractions
    and are not full yet. Units that are tied have one size, and keep the same: where a weight for each is more than is missing, a
    few stay missing.

    Args, errors: as `block_sparsities`.
        tied: positions of units that go together, all units counted through; those that none names are alone.
    """
    sparsities = block_sparsities(scores, sizes, sparsity=sparsity, lambda_=lambda_)
    flat = [size for block in sizes for size in block]
    ideal = [(1.0 - s) * size for s, block in zip(sparsities, sizes, strict=True) for size in block]
    kept = [min(math.floor(x), size) for x, size in zip(ideal, flat, strict=True)]
    missing = sum(kept_at(size, sparsity) for size in flat) - sum(kept)
    named = {i for together in tied for i in together}
    groups = [list(together) for together in tied] + [[i] for i in range(len(flat)) if i not in named]
    groups.sort(key=lambda together: (kept[together[0]] - ideal[together[0]], together[0]))
    while missing:  # a unit is off by a weight and a half at most, so a few turns end it
        before, step = missing, 1 if missing > 0 else -1
        for together in groups[::step]:
            # Above the target all that is needed is taken back, below it no more is given than is missing.
            fits = missing * step >= len(together) if step > 0 else missing < 0
            if fits and 0 <= kept[together[0]] + step <= flat[together[0]]:
                for i in together:
                    kept[i] += step
                missing -= step * len(together)
        if missing == before:
            assert named, "the uniform target keeps more weights than there are"
            break
    units = iter(kept)
    return [[next(units) for _ in block] for block in sizes]
