"""What stages count by what they take before they begin: tokens, forwards, memory, and seconds where the machine was probed.

What each takes it says itself, beside its work. Tokens and disk are exact but for what only the run itself can tell: OWL's levels,
of which some may be the same or there already. Zero-shot questions are counted by some of each task. Memory is what the largest
buffers take, beside the model. What is there already counts as done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

from evopress.baselines.baseline import Planned
from evopress.compress.compressor import Compressor
from evopress.fitness.backward import backward_bytes
from evopress.fitness.population import evaluation_bytes
from evopress.levels.live import block_bytes, decoding_bytes, enough_to_keep
from evopress.levels.modules import modules_of
from evopress.levels.plan import BuildNeeds
from evopress.ranks import batch_within_share, largest_shard, processes
from evopress.resources import Needs
from evopress.search.strategy import Asks, Attribution, Searching, backward_tokens
from evopress.stages.probe import Speed
from evopress.units import Budget, Space
from evopress.workspace import Workspace

_SHARED = 0.8
"""Share of the block work that is left where candidates share their prefixes, at 5 to 16 of them (DESIGN, section 4)."""


def planned_for(workspace: Workspace, space: Space, budget: Budget) -> Planned:
    """Return what baselines are told before anything is built; reads the search text."""
    return Planned(space, budget, search_tokens=workspace.search_tokens.numel())


class Planner:
    """What is known of a run before its stages begin, which are counted in their order: an earlier one may serve those after it."""

    def __init__(
        self,
        workspace: Workspace,
        space: Space,
        budget: Budget,
        build: BuildNeeds | None,
        searching: Searching,
        asks: Sequence[Asks] | None,
        speed: Speed | None,
        *,
        after: Planner | None = None,
    ) -> None:
        """Take what is known.

        Args: after: of another budget, which has been counted: what does not depend on the budget is there.
        """
        self.workspace, self.space, self.budget, self.build = workspace, space, budget, build
        self.searching, self.asks, self.speed = searching, asks, speed
        self.settings = workspace.settings
        self.num_blocks = len(workspace.blocks.blocks)
        self.modules = workspace.method.weights is None
        self.based: bool = after is not None and after.based
        """Whether the dense model's states of the search text are there."""
        self.measured: set[str] = set() if after is None else after.measured
        """Names of the passes whose numbers are kept (`Pass.shared`)."""
        self.seen: bool = bool(build is not None and build.units) or (after is not None and after.seen)
        """Whether the Hessians of dense activations are there after the level database is, where they are kept."""
        self.kept = 0
        """Bytes of the dense model's states on held-out text that stay."""

    @property
    def planned(self) -> Planned:
        """What baselines are told."""
        return planned_for(self.workspace, self.space, self.budget)

    def needs(self, stage: str, what: str, **more: Any) -> Needs:
        """Begin to count what a stage takes whose time can be told."""
        return Needs(stage, what, seconds=0.0 if self.speed else None, **more)

    def add(self, needs: Needs, tokens: int, block_tokens: float, seconds: Callable[[Speed], float]) -> None:
        """Add work."""
        needs.tokens += tokens
        needs.block_tokens += block_tokens
        if self.speed is not None:
            needs.seconds = (needs.seconds or 0.0) + seconds(self.speed)

    def build_levels(self, needs: Needs, build: BuildNeeds, *, times: float = 1.0) -> None:
        """Add the walk over the blocks and the compression of what is missing of a database.

        Args: times: what a block's compression takes, in that of the run's own levels.
        """
        self.add(
            needs,
            build.tokens * bool(build.forwards),
            build.tokens * build.forwards,
            lambda speed: (
                build.tokens * (build.walked * speed.hessians + (build.forwards - build.walked) * speed.block)
                + build.num_blocks * build.compressing * speed.compress * times
                + sum(speed.outside.get(unit.name, 0.0) for unit in build.units)
            ),
        )

    def build_further(self, needs: Needs, name: str, compressor: Compressor) -> int:
        """Add levels that are built beside the run's, none of which is there, and return how many a weight has, at most.

        One takes as long as one of the run's own does on average.
        """
        space, build = self.workspace.databases.plan_further(name, compressor, seen=self.seen)
        self.seen = True
        mine, own = (sum(unit.size * len(unit.levels) for unit in each.whole.units) for each in (space, self.space))
        self.build_levels(needs, build, times=mine / own)
        folder = self.workspace.databases.root
        needs.disk[folder] = needs.disk.get(folder, 0) + build.disk_bytes
        needs.memory = max(needs.memory, self._bases + build.memory_bytes)
        needs.device = max(needs.device, build.device_bytes)
        return max(len(unit.levels) for unit in space.units)

    def base(self, needs: Needs) -> None:
        """Add the dense model's last hidden states of the search text, once for all stages."""
        if not self.based:
            _, tokens = self.mine(1, self.workspace.search_tokens.numel())
            self.add(needs, tokens, tokens * self.num_blocks, lambda speed: tokens * self.num_blocks * speed.block)
        self.based = True

    def mine(self, candidates: int, tokens: int, *, split: bool = True, alone: bool = False) -> tuple[int, int]:
        """Return how many candidates, on how many tokens each, one process measures, of those that share it the busiest.

        Args:
            split: where there are more processes than parts of the text, they share the candidates too (`MinibatchFitness`).
            alone: they share nothing.
        """
        if alone:
            return candidates, tokens
        length = min(self.workspace.search_tokens.shape[1], tokens)
        rows, most = -(-tokens // length), max(self.settings.fitness.max_tokens_in_flight // length, 1)
        columns = max(min(processes() // -(-rows // batch_within_share(rows, most)), candidates), 1) if split else 1
        return -(-candidates // columns), min(largest_shard(rows, most) * length, tokens)

    def score(self, needs: Needs, candidates: int, tokens: int, *, times: int = 1, together: int | None = None) -> None:
        """Add the evaluation of candidates on so many tokens each, so many times, as `mine` says how many."""
        plain = self.settings.fitness.evaluator == "plain"
        share = 1.0 if plain or candidates == 1 else _SHARED
        if self.modules and modules_of(self.space.units[0]):  # what is dropped is not run
            share *= 1.0 - (self.settings.sparsity or 0.0)
        whole = candidates * tokens * times
        forwards = share * whole * self.num_blocks
        references = math.ceil(candidates / (together or candidates)) * tokens * times
        self.add(
            needs,
            whole,
            forwards,
            lambda speed: forwards * speed.block + references * speed.reference + whole * speed.head,
        )

    def attribute(
        self, needs: Needs, ask: Asks, *, shared_by: Callable[[int], int] | None = None, errors: int = 1, beside: int = 0
    ) -> None:
        """Add attributions: each block forward, then forward again and backward; what enters each block is held meanwhile.

        Where modules can be dropped, and in expansions, there is one more way back.

        Args:
            shared_by: takes how many sequences there are, and says how many the busiest process has, of a pass that goes back
                once; None: the strategy's attributions.
            errors: of each weight, whose products with what enters it take about what a forward does.
            beside: bytes that are held in host memory then.
        """
        blocks, fitness, (available, length) = self.workspace.blocks, self.settings.fitness, self.workspace.search_tokens.shape
        rows = min(max(Attribution.sequences, -(-ask.tokens // length)), available)
        own = shared_by or (lambda count: largest_shard(count, max(fitness.max_tokens_in_flight * count // ask.tokens, 1)))
        mine = -(-ask.tokens * own(rows) // rows)
        tokens = mine * ask.times
        gates = shared_by is None and self.workspace.method.modules is not None
        counted = backward_tokens(gates or ask.expansion)
        # An expansion has the products on both ways back.
        forwards = (counted + errors * (2 if ask.expansion else 1)) * tokens * self.num_blocks
        self.add(
            needs,
            counted * tokens,
            forwards,
            lambda speed: forwards * speed.block + tokens * (speed.reference + counted * speed.head),
        )
        length = min(self.workspace.search_tokens.shape[1], mine)
        there = backward_bytes(
            blocks,
            mine,
            length,
            max_tokens_in_flight=fitness.max_tokens_in_flight,
            chunk_tokens=fitness.chunk_tokens,
            errors=errors,
        )
        # What enters each block and leaves the last one, gradients, and the base of these sequences.
        held = (self.num_blocks + (4 if gates or ask.expansion else 3)) * self.states(mine)
        self.put(needs, there + self.levels_kept + self._carried, host=self._bases + held + beside)

    def hold(self, needs: Needs, candidates: int, tokens: int, *, apart: bool = False, given: bool = True) -> None:
        """Let the stage's peak be at least that of evaluating candidates on so many tokens each.

        Args:
            apart: no forward has two candidates.
            given: the dense model's states are there already.
        """
        blocks, fitness = self.workspace.blocks, self.settings.fitness
        plain = fitness.evaluator == "plain"
        measured = evaluation_bytes(
            blocks,
            candidates,
            tokens,
            min(self.workspace.search_tokens.shape[1], tokens),
            max_tokens_in_flight=fitness.max_tokens_in_flight,
            chunk_tokens=fitness.chunk_tokens,
            decoding=self._decoding,
            apart=apart,
            plain=plain,
        )
        heads = [unit for unit in self.space.units if unit.block == blocks.head_part]
        measured += sum(min(len(unit.levels), candidates) * unit.size * blocks.dtype.itemsize for unit in heads)
        measured += max(self.levels_kept, self._decoded if plain else 0)
        measured += self._carried
        minibatch = 2 * given * self.states(tokens)  # of the base, drawn and without the last positions
        self.put(needs, measured, host=self._bases + minibatch)

    def hold_decoded(self, needs: Needs, *, beside: int = 0) -> None:
        """Let the stage's peak be at least that of the whole model at a genome; or of one block, where each is carried in its turn.

        Args: beside: bytes that are taken there then.
        """
        if self.workspace.blocks.offload:
            self.put(needs, self.levels_kept + self._carried + max(self._decoding, beside), host=self._bases)
        else:
            there = self._decoded if not self.based else max(self._decoded, self.levels_kept)
            self.put(needs, there + max(self._decoding, beside), host=self._bases)

    def hold_written(self, needs: Needs, parts: Collection[int], *, beside: int, file_bytes: int) -> None:
        """Let the stage's peak be at least that of some parts of the model as a checkpoint has them: their levels in host memory.

        Args:
            beside: bytes that are taken where the levels are, or the model where it has none.
            file_bytes: of all that is written of these parts, which is copied from a GPU first.
        """
        blocks, units = self.workspace.blocks, self.space.whole.units
        size = 0 if self.modules else sum(unit.size for unit in units if unit.block in parts) * blocks.dtype.itemsize
        on_host = self.workspace.device.type == "cpu"
        if on_host or blocks.offload:
            kept = self.levels_kept if on_host and self.based else 0
            needs.memory = max(needs.memory, self._bases + max(size, kept) + max(self._decoding, beside))
        else:
            there = beside if self.modules else self.levels_kept + self._decoding
            self.put(needs, there, host=self._bases + file_bytes + (0 if self.modules else beside))

    def put(self, needs: Needs, size: int, *, host: int = 0) -> None:
        """Let a stage's peak be at least so much on the compute device, and in host memory beside it."""
        on_host = self.workspace.device.type == "cpu"
        needs.memory = max(needs.memory, host + (size if on_host else 0))
        needs.device = max(needs.device, 0 if on_host else size)

    def states(self, tokens: int) -> int:
        """Return the bytes of a hidden state of each of so many tokens."""
        return tokens * self.workspace.blocks.hidden_size * self.workspace.blocks.dtype.itemsize

    @property
    def _bases(self) -> int:
        """Bytes of the dense model's last states that are held: of the search text, and of held-out text."""
        return self.kept + (self.states(self.workspace.search_tokens.numel()) if self.based else 0)

    @property
    def _carried(self) -> int:
        """Bytes of the largest block where blocks lie on the host and are carried to the device."""
        blocks = self.workspace.blocks
        return max(blocks.carried_bytes(index) for index in range(self.num_blocks)) if blocks.offload else 0

    @property
    def levels_kept(self) -> int:
        """Bytes of decoded levels that stay between switches, or of those in place."""
        itemsize, kept = self.workspace.blocks.dtype.itemsize, self.settings.level_db.cache_bytes
        if self.modules:
            return 0
        kept = enough_to_keep(self.space, itemsize, self.workspace.device) if kept is None else kept
        kept = min(kept, max(len(unit.levels) for unit in self.space.units) * self.space.size * itemsize)
        return max(kept, block_bytes(self.space, itemsize))

    @property
    def _decoded(self) -> int:
        """Bytes of all units at one genome, beside the dense ones, which stay."""
        return 0 if self.modules else self.space.size * self.workspace.blocks.dtype.itemsize

    @property
    def _decoding(self) -> int:
        """Bytes that decoding the largest unit takes, the decoded weight included."""
        return 0 if self.modules else decoding_bytes(max(unit.size for unit in self.space.units), self.workspace.blocks.dtype)
