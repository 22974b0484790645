"""Count what the stages of a run take: tokens, forwards, bytes on disk, memory, and seconds where the machine was probed.

Tokens and disk are exact but for what only the run itself can tell (OWL's levels, zero-shot questions). Memory is what the largest
buffers take, beside the model. What is there already counts as done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from evopress.baselines.baseline import Baseline, Pass, Planned
from evopress.baselines.named import make_baselines
from evopress.data.tokens import tokens_digest
from evopress.errors import EvoPressError
from evopress.fitness.attribution import attribution_bytes
from evopress.fitness.population import evaluation_bytes, walked_together
from evopress.levels.live import decoding_bytes, enough_to_keep
from evopress.levels.modules import modules_of
from evopress.levels.plan import CORRECTED_FORWARDS, BuildNeeds, batch_of, part_bytes
from evopress.reporting.records import read_json
from evopress.room import Needs
from evopress.search.initial import uniform_genome
from evopress.search.strategy import NEIGHBOURS_TOGETHER, Asks, Searching, backward_tokens
from evopress.settings import STAGES
from evopress.stages.baselines import baselines_as_asked, read_baselines
from evopress.stages.probe import Speed
from evopress.units import Budget, Space
from evopress.workspace import MOST_KEPT_BYTES, Workspace

_SHARED = 0.8
"""Share of the block work that is left where candidates share their prefixes, at 5 to 16 of them (DESIGN, section 4)."""
_REPORT_BYTES = 4 * 2**20
_RECORD_BYTES = 400


class Planner:
    """Counts what each stage takes."""

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
        based: bool = False,
    ) -> None:
        self.workspace, self.space, self.budget, self.build = workspace, space, budget, build
        self.searching, self.asks, self.speed = searching, asks, speed
        self.settings = workspace.settings
        self.num_blocks = len(workspace.blocks.blocks)
        self.modules = workspace.method.weights is None
        self.kept = 0  # bytes of the dense model's states on held-out text
        self.based = (
            based  # whether an earlier stage, or the run of another budget, computed the dense model's states of the search text
        )

    def stages(self) -> Iterator[Needs]:
        """Yield what every stage that will run takes, in their order; a level database that is missing is built for any of them."""
        asked = [stage for stage in STAGES if stage in self.settings.stages]
        if self.built_first:
            needs = self._database()
            needs.what += ", first"
            yield needs
        for stage in asked:
            yield getattr(self, f"_{stage}")()

    @property
    def built_first(self) -> bool:
        """Tell whether a level database must be built though the run was not asked to."""
        return bool("database" not in self.settings.stages and self.build is not None and self.build.units)

    def _database(self) -> Needs:
        build, speed = self.build, self.speed
        if build is None:
            return Needs("database", "no weights to store", seconds=0.0 if speed else None)
        if not build.units:
            return Needs("database", f"there: {self.num_blocks} blocks", seconds=0.0 if speed else None)
        tokens, seconds = self.workspace.calibration_tokens.numel(), None
        if speed is not None:
            seconds = tokens * (build.walked * speed.hessians + (build.forwards - build.walked) * speed.block)
            seconds += build.num_blocks * speed.compress
            seconds += sum(speed.outside.get(unit.name, 0.0) for unit in build.units)
        needs = build.in_folder(self.workspace.database_root)
        return replace(needs, tokens=tokens, block_tokens=tokens * build.forwards, seconds=seconds)

    def _baselines(self) -> Needs:
        settings = self.settings.baselines
        if baselines_as_asked(self.workspace) is not None:
            return Needs("baselines", "found before", seconds=0.0 if self.speed else None)
        needs = Needs("baselines", ", ".join(settings.names) or "none", seconds=0.0 if self.speed else None)
        baselines = make_baselines(settings).values()
        for each in self._passes(baselines):
            if each.on_search_text:
                self._base(needs)
            if each.backward:
                self._attribute(needs, Asks("", each.tokens, times=each.genomes))
            else:
                self._score(needs, each.genomes, each.tokens, together=each.together)
            if each.together is not None:
                self._hold(needs, min(each.genomes, each.together), min(self.settings.fitness.max_tokens_in_flight, each.tokens))
        for what in (baseline.not_counted for baseline in baselines if baseline.not_counted):
            needs.what += f" ({what} not counted)"
        self._hold(needs, settings.num_random, settings.random_tokens)
        return needs

    def _passes(self, baselines: Iterable[Baseline]) -> list[Pass]:
        """Return the passes of baselines, of those that are made once the one with the most genomes."""
        passes = [each for baseline in baselines for each in baseline.passes(self._planned)]
        most = {each.shared: each for each in sorted(passes, key=lambda each: each.genomes)}
        return [each for each in passes if each.shared is None or each is most[each.shared]]

    @property
    def _planned(self) -> Planned:
        return Planned(self.space, self.budget, search_tokens=self.workspace.search_tokens.numel())

    def _search(self) -> Needs:
        searching, asks, zero = self.searching, self.asks or (), 0.0 if self.speed else None
        if not asks:
            return Needs("search", f"done: {searching.num_generations} generations", seconds=zero)
        later = [ask for ask in asks if not ask.initial]
        milestones = max((ask.times for ask in later if ask.milestone), default=0)
        generations = milestones + max((ask.times for ask in later if not ask.milestone), default=0)
        most = "at most " if milestones else ""
        needs = Needs("search", f"{most}{generations} of {searching.num_generations} generations", seconds=zero)
        self._base(needs)
        if every := self.settings.evaluation.every:
            self._held_out(needs, milestones + (generations - milestones) // every + 1)
        for ask in asks:
            candidates = ask.candidates_of(len(self.space))
            if ask.attribution:
                self._attribute(needs, ask)
            elif not ask.initial or uniform_genome(self.space, self.budget) is None:
                together = NEIGHBOURS_TOGETHER + 1 if ask.neighbours else None
                self._score(needs, candidates, ask.tokens, times=ask.times, together=together)
            if not ask.initial:
                self._hold(needs, min(candidates, NEIGHBOURS_TOGETHER + 1) if ask.neighbours else candidates, ask.tokens)
        per_record = _RECORD_BYTES + 4 * len(self.space) + 24 * sum(ask.candidates_of(len(self.space)) for ask in later)
        per_record += 24 * len(self.space) if milestones else 0
        needs.disk = {self.workspace.run_dir: generations * per_record}
        return needs

    def _attribute(self, needs: Needs, ask: Asks) -> None:
        """Add attributions: each block forward, then forward again and backward; what enters each block is held meanwhile.

        Where modules can be dropped, there is one more way back.
        """
        tokens, blocks = ask.tokens * ask.times, self.workspace.blocks
        gates = self.workspace.method.modules is not None
        counted = backward_tokens(gates)
        needs.tokens += counted * tokens
        needs.block_tokens += (counted + 1.0) * tokens * self.num_blocks
        if needs.seconds is not None and self.speed is not None:
            by_blocks = (counted + 1) * self.num_blocks * self.speed.block
            needs.seconds += tokens * (by_blocks + self.speed.reference + counted * self.speed.head)
        fitness, state = self.settings.fitness, ask.tokens * blocks.hidden_size * blocks.dtype.itemsize
        there = attribution_bytes(
            blocks, ask.tokens, max_tokens_in_flight=fitness.max_tokens_in_flight, chunk_tokens=fitness.chunk_tokens
        )
        # What enters each block and leaves the last one, gradients, and the base of these sequences.
        self._put(needs, there + self._levels_kept, host=self._bases + state * (self.num_blocks + (4 if gates else 3)))

    def _held_out(self, needs: Needs, times: int) -> None:
        """Add the measurements on held-out text, and the dense model's states there, which are kept where they are few."""
        tokens = next(iter(self.workspace.evaluation_data.values())).numel()
        tokens = min(tokens, self.settings.evaluation.every_tokens or tokens)
        kept = tokens * self.workspace.blocks.hidden_size * self.workspace.blocks.dtype.itemsize
        if kept > MOST_KEPT_BYTES:
            self._score(needs, 2, tokens, times=times)
        else:
            self._score(needs, 1, tokens, times=times + 1)
            self.kept = kept

    def _refine(self) -> Needs:
        """Calibration text through each block, more often where weights are corrected; candidates through what comes after."""
        zero = 0.0 if self.speed else None
        if not self.workspace.refines:
            return Needs("refine", "nothing: modules are dropped", seconds=zero)
        if (steps := self._refined_before()) is not None:
            return Needs("refine", f"done: {steps} blocks", seconds=zero)
        workspace, speed, n = self.workspace, self.speed, self.num_blocks
        tokens, judged = workspace.calibration_tokens.numel(), workspace.refine_tokens.numel()
        corrected = self.settings.refine.correction > 0
        forwards = 2.0 + (CORRECTED_FORWARDS if corrected else 0)  # of the calibration text through each block
        suffixes = n + n * (n + 1) // 2 + n  # the genome as it was found, the candidates, the blocks that are settled
        needs = Needs(
            "refine",
            f"{n} blocks anew",
            less_memory="use fewer calibration tokens (data.calibration_tokens), level_db.activations=disk, "
            "or leave refine out of stages",
            tokens=tokens + (n + 2) * judged,
            block_tokens=forwards * n * tokens + (n + suffixes) * judged,
            disk={workspace.run_dir: self._stored_bytes()},
        )
        if speed is not None:
            per_level = speed.compress / max(len(unit.levels) for unit in self.space.units)
            needs.seconds = (
                n * (tokens * (speed.hessians + (forwards - 1) * speed.block) + per_level) + (n + suffixes) * judged * speed.block
            )
            needs.seconds += (n + 1) * judged * (speed.head + speed.reference)
        itemsize, hidden = workspace.blocks.dtype.itemsize, workspace.blocks.hidden_size
        walking = tokens * hidden * itemsize * (2 if corrected else 1)
        in_memory = self.settings.level_db.activations == "memory"
        if not in_memory:
            needs.disk[workspace.run_dir] += walking
        self._hold(needs, 1, min(self.settings.fitness.max_tokens_in_flight, judged))
        held = 3 * judged * hidden * itemsize + (walking if in_memory else 0)
        batch = batch_of(workspace.calibration_tokens, self.settings.level_db.batch_tokens)
        ones = [replace(unit, levels=unit.levels[:1]) for unit in self.space.units if unit.block == 0]
        self._put(needs, part_bytes(workspace.blocks, ones, workspace.compressor, batch=batch, corrects=corrected), host=held)
        return needs

    def _refined_before(self) -> int | None:
        """Return the blocks of refined levels that are there, whole by their names; None if the stage has to work."""
        folder = self.workspace.run_dir
        if self.asks:
            return None
        for path in (folder / "refined").glob("*/manifest.json"):
            try:
                recipe, blocks = (
                    read_json(path)["recipe"],
                    sum(file["block"] < self.num_blocks for file in read_json(path)["files"]),
                )
                genome = [unit["level"] for unit in read_json(folder / "genome.json")["units"]]
                if recipe["genome"] == genome and recipe["decided_by"] == tokens_digest(self.workspace.refine_tokens):
                    return blocks
            except (EvoPressError, KeyError, TypeError):
                continue  # the stage says what is wrong with it
        return None

    def _stored_bytes(self) -> int:
        """Return the bytes that a genome's levels take at the budget: between those of the least and the most."""
        least, most = self.space.least_cost, self.space.greatest_cost
        share = (self.budget.total - least) / max(most - least, 1)
        ends = [sum(unit.levels[i].stored_bits for unit in self.space.units) for i in (-1, 0)]
        return math.ceil((ends[0] + share * (ends[1] - ends[0])) / 8)

    def _evaluate(self) -> Needs:
        models = 1 + self._num_genomes()
        data = self.workspace.evaluation_data
        tokens = sum(sequences.numel() for sequences in data.values())
        needs = Needs("evaluate", f"{models} models on {', '.join(data)}", seconds=0.0 if self.speed else None)
        if self.settings.evaluation.tasks:
            needs.what += " (zero-shot tasks not counted)"
            self._hold_decoded(needs)
        self._score(needs, models, tokens)
        length = max(sequences.shape[1] for sequences in data.values())
        batch = max(self.settings.fitness.max_tokens_in_flight // length, 1)
        together = walked_together(self.workspace.blocks, models, length, batch) * length
        self._hold(needs, models, min(together, tokens), apart=True, given=False)  # models that differ in every block
        return needs

    def _export(self) -> Needs:
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.workspace.pretrained.model.parameters())
        needs = Needs(
            "export",
            "checkpoint",
            disk={self.workspace.run_dir: size},
            less_memory="leave export out of stages, or use a machine with more memory",
        )
        self._hold_decoded(needs)
        if self.workspace.device.type != "cpu" and not self.workspace.blocks.offload:
            self._put(needs, 0, host=size)  # what is written is copied first
        return needs

    def _report(self) -> Needs:
        return Needs("report", "tables, figures, page", disk={self.workspace.run_dir: _REPORT_BYTES})

    def _num_genomes(self) -> int:
        """Return how many genomes will be there to evaluate."""
        folder, count = self.workspace.run_dir, 0
        if "baselines" in self.settings.stages:
            count = sum(baseline.num_genomes(self._planned) for baseline in make_baselines(self.settings.baselines).values())
        elif (folder / "baselines.json").exists():
            count = len(read_baselines(folder / "baselines.json")["genomes"])
        refined = "refine" in self.settings.stages and self.workspace.refines
        count += (self.settings.genome is not None) + refined
        return count + ("search" in self.settings.stages or (folder / "genome.json").exists())

    def _base(self, needs: Needs) -> None:
        """Add the dense model's last hidden states of the search text, once for all stages."""
        if not self.based:
            tokens = self.workspace.search_tokens.numel()
            needs.tokens += tokens
            needs.block_tokens += tokens * self.num_blocks
            if needs.seconds is not None and self.speed is not None:
                needs.seconds += tokens * self.num_blocks * self.speed.block
        self.based = True

    def _score(self, needs: Needs, candidates: int, tokens: int, *, times: int = 1, together: int | None = None) -> None:
        """Add the evaluation of candidates on so many tokens each, so many times."""
        plain = self.settings.fitness.evaluator == "plain"
        share = 1.0 if plain or candidates == 1 else _SHARED
        if self.modules and modules_of(self.space.units[0]):  # what is dropped is not run
            share *= 1.0 - (self.settings.sparsity or 0.0)
        forwards = share * candidates * tokens * self.num_blocks * times
        needs.tokens += candidates * tokens * times
        needs.block_tokens += forwards
        if needs.seconds is not None and self.speed is not None:
            references = math.ceil(candidates / (together or candidates)) * tokens * times
            needs.seconds += forwards * self.speed.block + references * self.speed.reference
            needs.seconds += candidates * tokens * times * self.speed.head

    def _hold(self, needs: Needs, candidates: int, tokens: int, *, apart: bool = False, given: bool = True) -> None:
        """Let the stage's peak be at least that of evaluating candidates on so many tokens each.

        Args:
            apart: no forward has two candidates.
            given: the dense model's states are there already.
        """
        blocks, fitness = self.workspace.blocks, self.settings.fitness
        itemsize, plain = blocks.dtype.itemsize, fitness.evaluator == "plain"
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
        measured += sum(min(len(unit.levels), candidates) * unit.size * itemsize for unit in heads)
        measured += max(self._levels_kept, self._decoded if plain else 0)
        if blocks.offload:
            measured += max(blocks.carried_bytes(index) for index in range(self.num_blocks))
        minibatch = 2 * given * tokens * blocks.hidden_size * itemsize  # of the base, drawn and without the last positions
        self._put(needs, measured, host=self._bases + minibatch)

    @property
    def _bases(self) -> int:
        """Bytes of the dense model's last states that are held: of the search text, and of held-out text."""
        blocks = self.workspace.blocks
        tokens = self.workspace.search_tokens.numel() if self.based else 0
        return tokens * blocks.hidden_size * blocks.dtype.itemsize + self.kept

    @property
    def _levels_kept(self) -> int:
        """Bytes of decoded levels that stay between switches."""
        itemsize, kept = self.workspace.blocks.dtype.itemsize, self.settings.level_db.cache_bytes
        if self.modules:
            return 0
        kept = enough_to_keep(self.space, itemsize, self.workspace.device) if kept is None else kept
        return min(kept, max(len(unit.levels) for unit in self.space.units) * self.space.size * itemsize)

    @property
    def _decoded(self) -> int:
        """Bytes of all units at one genome, beside the dense ones, which stay."""
        return 0 if self.modules else self.space.size * self.workspace.blocks.dtype.itemsize

    @property
    def _decoding(self) -> int:
        """Bytes that decoding the largest unit takes, the decoded weight included."""
        return 0 if self.modules else decoding_bytes(max(unit.size for unit in self.space.units), self.workspace.blocks.dtype)

    def _hold_decoded(self, needs: Needs) -> None:
        """Let the stage's peak be at least that of the whole model at a genome: where its blocks lie, they are decoded."""
        if self.workspace.blocks.offload:
            needs.memory = max(needs.memory, self._decoded + self._decoding)
        else:
            there = self._decoded if not self.based else max(self._decoded, self._levels_kept)
            self._put(needs, there + self._decoding, host=self._bases)

    def _put(self, needs: Needs, size: int, *, host: int = 0) -> None:
        """Let a stage's peak be at least so much on the compute device, and in host memory beside it."""
        on_host = self.workspace.device.type == "cpu"
        needs.memory = max(needs.memory, host + (size if on_host else 0))
        needs.device = max(needs.device, 0 if on_host else size)
