"""Work that several processes share: the same bits on any number of them, errors on all, none outlives another."""

from __future__ import annotations

import math
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed  # before processes are forked: it takes a second

from evopress import ranks
from evopress.compress.hessian import HessianSum
from evopress.data.minibatch import Minibatch
from evopress.errors import EvoPressError
from evopress.evaluation.heldout import measure_held_out
from evopress.evaluation.zero_shot import answering
from evopress.fitness.measures import KLDivergence
from evopress.fitness.minibatch import MinibatchFitness, base_states
from evopress.fitness.population import PopulationEvaluator
from evopress.fitness.scales import Learning, ScaleLearner
from evopress.fitness.suffix import SuffixLoss
from evopress.levels.build import ensure_database
from evopress.levels.calibration import _joined
from evopress.levels.live import LiveModel
from evopress.levels.plan import WalkSettings
from evopress.levels.refine import ensure_refined
from evopress.levels.scaled import ScaledLevels
from evopress.models.tiny import byte_tokenizer
from evopress.stages.needs import Planner

try:
    import lm_eval.models.huggingface  # noqa: F401 - before processes are forked, too

    HAS_TASKS = True
except ImportError:  # an extra
    HAS_TASKS = False
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


def on(count: int, folder: Path, work: Callable[[Path], None], find: Callable[[Any], Any]) -> list[tuple[int, str]]:
    """Do work on so many processes, the first of which leads, with the environment that torchrun gives them.

    Returns: exit code, or minus a signal, and what went wrong, of each.
    """
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        if pid := os.fork():
            children.append(pid)
            continue
        code, said = 1, ""
        try:  # from here on a child of the test, which ends in any case
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            ranks.begin()
            if rank:
                ranks.follow(find)
            else:
                work(folder)
            ranks.end()
            code = 0
        except EvoPressError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException:
            said = traceback.format_exc()
        finally:
            (folder / f"said-{rank}").write_text(said)
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    said = [folder / f"said-{rank}" for rank in range(count)]
    return [(code, path.read_text() if path.exists() else "") for code, path in zip(codes, said, strict=True)]


class Case:
    """A tiny model, of which every process has its own."""

    def __init__(self, blocks: Any, compressor: Any, settings: Callable[[Path], Any], ids: Callable[..., Any]) -> None:
        self.blocks, self.compressor, self.settings = blocks, compressor, settings
        self.calibration, self.search = ids(11, 16), ids(10, 16, seed=1)
        blocks.known_as = ("blocks",)
        self._opened: dict[Any, Any] = {}
        self._levels: Path | None = None

    def find(self, key: Any) -> Any:
        """Return what is known by a word, opened when it is first asked for."""
        word, *rest = key
        if word == "case":
            self._levels = rest[0]
            return self
        return self.blocks if word == "blocks" else self.opened(word)

    def opened(self, word: str) -> Any:
        if word not in self._opened:
            make = {"evaluator": self._evaluator, "fitness": self._fitness, "tasks": self._answering}[word]
            self._opened[word] = make()
        return self._opened[word]

    def _answering(self) -> Any:
        answers = answering(self.opened("evaluator").live, byte_tokenizer(), 2, "auto")
        answers.known_as = ("tasks",)
        return answers

    def _evaluator(self) -> PopulationEvaluator:
        database, _ = ensure_database(self.settings(self._levels), self.blocks, self.calibration, self.compressor)
        evaluator = PopulationEvaluator(LiveModel(self.blocks, database), max_tokens_in_flight=48)
        evaluator.known_as = ("evaluator",)
        return evaluator

    def _fitness(self) -> MinibatchFitness:
        return MinibatchFitness(
            self.opened("evaluator"),
            self.search,
            rng=np.random.default_rng(0),
            base=base_states(self.opened("evaluator"), self.search, batch_tokens=48),
            measure=KLDivergence(),
            chunk_tokens=7,
            max_tokens_in_flight=48,
            known_as=("fitness",),
        )

    @property
    def known_as(self) -> Any:
        return "case", self._levels

    @ranks.collective
    def open(self) -> None:
        self.opened("fitness")

    @ranks.collective
    def refine(self, genome: tuple[int, ...], correction: float) -> None:
        live, settings = self.opened("evaluator").live, self.settings(self._levels)
        how = WalkSettings(root=self._levels, recipe={"correction": correction}, batch_tokens=48, correction=correction)
        database, _ = ensure_database(settings, self.blocks, self.calibration, self.compressor)

        def judge() -> SuffixLoss:
            base = self.opened("fitness").base
            return SuffixLoss(live, genome, self.search, base=base, measure=KLDivergence(), chunk_tokens=7, max_tokens_in_flight=48)

        refined = ensure_refined(how, live, database, genome, self.calibration, self.compressor, judge)
        levels, base = ScaledLevels(refined), self.opened("fitness").base
        learner = ScaleLearner(self.blocks, levels, self.search, base, Learning(1, 0.01), max_tokens_in_flight=48, chunk_tokens=7)
        learner.learn(self._levels / "learning.safetensors")
        ranks.on_rank_zero(lambda: levels.write(self._levels / "learned", {"learned": 1}, {}))

    def work(self, folder: Path) -> None:
        """Build, measure and write down what was found."""
        self._levels = folder / "levels"
        ensure_database(self.settings(self._levels), self.blocks, self.calibration, self.compressor)
        self.open()
        fitness, space = self.opened("fitness"), self.opened("evaluator").live.space
        rng = np.random.default_rng(1)
        genomes = [tuple(rng.integers(3, size=len(space)).tolist()) for _ in range(5)]
        found = [
            fitness.base,
            fitness(genomes, tokens=100),  # six sequences and a rest
            fitness(genomes, tokens=16),  # fewer sequences than processes
            fitness.attribute(genomes[0], tokens=96, sequences=6),
            fitness.expand(genomes[0], tokens=96, sequences=6),
            [
                score.by_sequence
                for score in measure_held_out(self.opened("evaluator"), genomes[:2], self.search[:3], batch_tokens=48)
            ],
        ]
        if HAS_TASKS:
            asked, answers = np.random.default_rng(2), self.opened("tasks")
            questions = [asked.integers(200, size=size).tolist() for size in asked.integers(3, 14, size=7)]
            ends = [asked.integers(200, size=size).tolist() for size in (1, 1, 1, 3)]  # the first three are read off one forward
            requests = [(("", ""), question, end) for question in questions for end in ends]
            for answers.genome in (genomes[1], None):
                found.append(answers._loglikelihood_tokens(requests))
        self.refine(genomes[0], correction=0.5)
        corrected = replace(self.settings(self._levels), correction=0.25, propagate="3", recipe={"corrected": True})
        ensure_database(corrected, self.blocks, self.calibration, self.compressor)
        torch.save(found, folder / "found.pt")


@pytest.fixture
def case(tiny_blocks, compressor, build_settings, tokens) -> Case:
    return Case(tiny_blocks("llama", num_blocks=2), compressor, build_settings, tokens)


def found_in(folder: Path) -> tuple[list[Any], dict[str, bytes]]:
    root = folder / "levels"
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
    levels = {str(path.relative_to(root)): path.read_bytes() for path in files}
    return torch.load(folder / "found.pt", weights_only=True), levels


def test_any_number_of_processes_finds_the_same_to_the_bit(case: Case, tmp_path: Path) -> None:
    """Levels, refined and corrected ones too, last hidden states, fitnesses, attributions, held-out numbers, answers to tasks.

    One process that torchrun starts is such a number.
    """
    for count in (1, 2, 4):
        assert on(count, tmp_path / str(count), case.work, case.find) == [(0, "")] * count
    (base, *numbers), levels = found_in(tmp_path / "1")
    for count in (2, 4):
        (other, *others), other_levels = found_in(tmp_path / str(count))
        assert torch.equal(base, other) and numbers == others and levels == other_levels
    case.work(tmp_path / "plain")  # without torchrun: by rounding
    (plain, *others), _ = found_in(tmp_path / "plain")
    torch.testing.assert_close(plain, base)
    assert others[0] == pytest.approx(numbers[0], rel=1e-3) and others[1] == pytest.approx(numbers[1], rel=1e-3)
    assert not HAS_TASKS or others[-1] == numbers[-1] != numbers[-2]  # the dense model's: batches are not cut


def test_where_one_process_is_killed_the_others_end_with_a_sentence(case: Case, tmp_path: Path) -> None:
    def find(key: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return case.find(key)

    first, killed, *others = on(4, tmp_path / "four", case.work, find)
    assert killed == (-signal.SIGKILL, "") and len(others) == 2
    for code, said in (first, *others):
        assert code == 1 and said.startswith("LostError: another process of this run has ended") and "\n" not in said


class Asked:
    """Something that all processes have."""

    known_as = ("asked",)

    @ranks.collective
    def ask(self, who: int, error: type[Exception] | None) -> list[int]:
        """Return the numbers of all processes, unless that of one of them is an error."""

        def work() -> int:
            rank = int(os.environ["RANK"])
            if rank == who and error is not None:
                raise error(f"a matter of process {rank}")
            return rank

        assert ranks.size() == 2
        return ranks.on_all_ranks(work)


def test_an_error_of_one_process_is_raised_by_the_first_and_all_go_on(tmp_path: Path) -> None:
    def work(folder: Path) -> None:
        assert ranks.size() == 1  # outside of what is shared
        subject.ask(0, None)
        with pytest.raises(EvoPressError, match=r"^a matter of process 1$"):
            subject.ask(1, EvoPressError)
        with pytest.raises(RuntimeError, match="process 1: ValueError: a matter"):
            subject.ask(1, ValueError)
        with pytest.raises(ValueError, match="a matter of process 0"):
            subject.ask(0, ValueError)
        assert subject.ask(0, None) == [0, 1]

    subject = Asked()
    assert on(2, tmp_path / "two", work, lambda key: subject) == [(0, "")] * 2


@pytest.mark.parametrize(("count", "says"), [(3, "3 processes, expected 1, 2, 4 or 8"), (16, "16 processes")])
def test_other_numbers_of_processes_are_refused(count: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(EvoPressError, match=says):
        ranks.begin()
    assert not ranks.launched()


@pytest.mark.parametrize("count", [1, 2, 5, 8, 11, 64])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_what_is_said_of_the_busiest_process_is_what_it_does(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def most(work_of: Callable[[], int]) -> int:
        """Return the most that one of the processes has."""
        found = []
        for rank in range(size):
            monkeypatch.setattr(ranks, "_world", ranks._World(rank, size, depth=1))
            found.append(work_of())
        return max(found)

    def measured(candidates: int, in_flight: int) -> int:
        fitness: Any = SimpleNamespace(max_tokens_in_flight=in_flight)
        parts = list(MinibatchFitness._parts(fitness, Minibatch(tuple(range(count)), (16,) * count)))
        of = min(max(size // len(parts), 1), candidates)
        tokens = [len(rows) * length * len(ranks.shard(candidates, of=of, number=n)) for rows, length in parts for n in range(of)]
        return sum(tokens[place] for place in ranks.shard(len(tokens)))

    assert most(lambda: sum(map(len, ranks.shares(count)))) == ranks.largest_shard(count)
    for candidates, in_flight in ((1, 16), (6, 16), (6, 64)):
        planner: Any = SimpleNamespace(
            workspace=SimpleNamespace(search_tokens=torch.empty(64, 16)),
            settings=SimpleNamespace(fitness=SimpleNamespace(max_tokens_in_flight=in_flight)),
        )
        said = math.prod(Planner.mine(planner, candidates, 16 * count))
        assert said == most(partial(measured, candidates, in_flight))


def test_sums_of_shares_are_added_in_one_tree() -> None:
    """Of eight numbers that float32 rounds: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), on one process."""
    values = torch.tensor([1e8, 1.0, -1e8, 3.0, 7e7, 5.0, -7e7, 9.0])
    added = ranks.InPairs[dict[str, HessianSum]](_joined)
    for value in values:
        share = HessianSum(1)
        share.total.fill_(value)
        added.add({"unit": share})
    expected = values
    while len(expected) > 1:
        expected = expected[0::2] + expected[1::2]
    assert added.total["unit"].total.item() == expected.item() != values.sum().item()


def test_processes_that_are_given_different_commands_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tasks of one srun may be, each with a seed of its own."""
    begin = ranks.begin

    def begun() -> None:
        monkeypatch.setattr("sys.argv", ["evopress", f"seed={os.environ['RANK']}"])
        begin()

    monkeypatch.setattr(ranks, "begin", begun)
    ends = on(2, tmp_path / "two", lambda folder: None, lambda key: None)
    assert [code for code, _ in ends] == [1, 1]
    assert all("the 2 processes of this run have different commands" in said for _, said in ends)


@pytest.mark.parametrize(
    ("told", "asked_for", "is_first"),
    [
        ({}, False, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False, True),  # a script of sbatch, or a shell of salloc
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, False, True),  # srun -n 1
        (
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PTY_PORT": "1", "tty": ""},
            False,
            True,
        ),  # srun -n 2 --pty bash
        (
            {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PTY_PORT": "1", "SLURM_PROCID": "1"},
            True,
            False,
        ),  # in it: srun -n 2
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, True, False),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SUBMITIT_EXECUTOR": "slurm"}, False, True),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, True, True),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1"}, True, False),
    ],
)
def test_several_processes_are_asked_for_by_torchrun_and_by_srun(
    told: dict[str, str], asked_for: bool, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {"TORCHELASTIC_RUN_ID", "SUBMITIT_EXECUTOR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    for name in ours | {name for name in os.environ if name.startswith("SLURM_")}:
        monkeypatch.setenv(name, "")  # to be given back
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: "tty" in told))
    for name, value in ({"SLURM_JOB_ID": "7", "SLURM_LOCALID": told.get("SLURM_PROCID", "0")} | told if told else told).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert (ranks.asked_for(), ranks.is_first()) == (asked_for, is_first)
    assert dict(os.environ) == before, "to ask changes nothing"
