"""Zero-shot accuracy through lm-eval, on the live model at several genomes (paper section 4, Tables 2, 3, 14 to 16).

The paper does not say which accuracy it reports. Its numbers are lm-eval's plain `acc` for all five tasks, not normalised by length
(`acc_norm`): dense Mistral-7B-v0.3 has 60.9 on HellaSwag in Table 2, where its `acc_norm` is about 80. So `acc` it is, here too.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from evopress.data.special_tokens import leading_ids
from evopress.errors import EvoPressError
from evopress.evaluation.tasks import num_questions, tasks_in, undisturbed
from evopress.fitness.population import MOST_ON_HOST
from evopress.levels.live import Live, block_at, part_held
from evopress.models import attention
from evopress.models.blocks import BlockModel
from evopress.progress import counted, track
from evopress.ranks import collective, map_shards, size
from evopress.units import Genome

logger = logging.getLogger(__name__)

_Request = tuple[tuple[str, str], list[int], list[int]]
"""As lm-eval has it: texts, and the tokens of context and continuation."""


@dataclass(frozen=True)
class TaskScore:
    """A genome's answers to one task."""

    correct: tuple[bool, ...]
    """Of each question, in the task's order: whether the likeliest answer is the right one."""

    @property
    def num_questions(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy, as lm-eval computes it; NaN for a single question."""
        n, p = len(self.correct), self.accuracy
        return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan


@dataclass(frozen=True)
class ZeroShot:
    """A genome's answers to all tasks."""

    tasks: Mapping[str, TaskScore]

    @property
    def mean(self) -> float:
        """Mean of the tasks' accuracies, each task counting the same (the paper's "Avg")."""
        return sum(score.accuracy for score in self.tasks.values()) / len(self.tasks)

    @property
    def mean_stderr(self) -> float:
        """Standard error of the mean, from those of the tasks."""
        return math.sqrt(sum(score.stderr**2 for score in self.tasks.values())) / len(self.tasks)

    def flip_rates(self, dense: ZeroShot) -> dict[str, float]:
        """Return, by task, the share of questions whose answer was right and is now wrong, or was wrong and is now right.

        Source: "Accuracy is Not All You Need" (arXiv:2407.09141): answers change both ways, which the accuracy does not show.
        """
        return {
            task: sum(a != b for a, b in zip(score.correct, dense.tasks[task].correct, strict=True)) / score.num_questions
            for task, score in self.tasks.items()
        }

    def as_row(self, dense: ZeroShot | None) -> dict[str, Any]:
        """Return what a row of `result.json` says, flips against the dense model only where that is another."""
        row: dict[str, Any] = {
            "zero_shot": {task: score.accuracy for task, score in self.tasks.items()},
            "zero_shot_stderr": {task: score.stderr for task, score in self.tasks.items()},
            "zero_shot_questions": {task: score.num_questions for task, score in self.tasks.items()},
            "zero_shot_mean": self.mean,
            "zero_shot_mean_stderr": self.mean_stderr,
        }
        if dense is not None and dense is not self:
            flips = self.flip_rates(dense)
            row |= {"flip_rate": sum(flips.values()) / len(flips), "flip_rate_by_task": flips}
        return row


def measure_zero_shot(
    live: Live,
    tokenizer: PreTrainedTokenizerBase,
    genomes: Mapping[str, Genome | None],
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    bos: str = "auto",
    known_as: Any = None,
    keep: Callable[[str, ZeroShot], None] = lambda name, answers: None,
) -> dict[str, ZeroShot]:
    """Let the model answer tasks at named genomes (None: the dense model), all of them the same questions.

    With bos="auto" the numbers are those of `lm_eval --model hf` on the exported checkpoint with the same tasks, limit and batch
    size: prompts, tokenization, batches and attention are the same. They do not depend on how many processes share the batches.

    Args:
        live: a model that can be held at a genome; it is the dense one again afterwards.
        tasks: as `load_tasks` returns them.
        limit: the first questions of each task only; None: all.
        batch_size: sequences per forward.
        bos: what every prompt begins with, as `leading_ids` takes it; lm-eval's way is "auto".
        known_as: see `ranks.Known`, of what `answering` makes of the same.
        keep: gets a genome's name and answers when it has given them all.

    Raises: EvoPressError if a batch does not fit the device.
    """
    questions = sum(num_questions(task, limit) for task in tasks.values())
    logger.info("zero-shot: %s on %d questions of %s", counted(len(genomes), "model"), questions, ", ".join(tasks))
    scores = {}
    # Made before lm-eval is silenced: a progress line keeps the stream that it starts with.
    progress = _Progress(len(genomes) * questions, "zero-shot")
    lm = answering(live, tokenizer, batch_size, bos)
    lm.known_as = known_as
    with contextlib.closing(progress), undisturbed():
        for done, (name, genome) in enumerate(genomes.items()):
            lm.genome, lm.on_share = genome, lambda share, done=done: progress.move_to(int((done + share) * questions))
            scores[name] = _answers(lm, tasks, limit)
            keep(name, scores[name])
    return scores


def _answers(lm: Any, tasks: Mapping[str, Any], limit: int | None) -> ZeroShot:
    """Ask a model at the genome that it is to have."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    parts = {part.task_name: part for task in tasks.values() for part in tasks_in(task)}
    for task in parts.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # anew each time: the same examples for all genomes, where a task has any
    with undisturbed():  # what a task draws, too
        # No bootstrap: the standard error of an accuracy is known.
        results = evaluate(lm, {"tasks": parts}, limit=limit, bootstrap_iters=0)
    assert results is not None
    scores = {}
    for name, task in tasks.items():
        of_parts = (_of_questions(results["samples"][part.task_name]) for part in tasks_in(task))
        scores[name] = TaskScore(tuple(bool(sample["acc"]) for samples in of_parts for sample in samples))
    return ZeroShot(scores)


def _of_questions(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return a task's samples in the order of its questions: those of its first filter, where it has several."""
    return sorted((sample for sample in samples if sample["filter"] == samples[0]["filter"]), key=lambda sample: sample["doc_id"])


@collective
def _likelihoods(lm: Any, genome: Genome | None, requests: Sequence[_Request]) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each continuation at a genome, and whether it is the likeliest one; batches are shared."""
    batches = _batches(requests, lm.batch_size)
    mixed = [batch for number in range(size()) for batch in batches[number :: size()]]  # long ones come first

    def asked(mine: Sequence[list[int]]) -> list[tuple[int, tuple[float, bool]]]:
        lm.genome, places = genome, [place for batch in mine for place in batch]
        with undisturbed(), _transformers_attention(lm.model), _held(lm.live, genome):
            try:
                return list(zip(places, lm.ask([requests[place] for place in places]), strict=True))
            except AssertionError as error:
                raise EvoPressError(
                    "lm-eval cannot score a question of these tasks, with an answer of no token or of more than the model has "
                    "positions: leave tasks out until it is found, or the last questions by evaluation.task_limit"
                ) from error
            except torch.OutOfMemoryError as error:
                raise EvoPressError(
                    f"evaluation.task_batch_size={lm.batch_size} sequences do not fit the memory of {lm.device}: lower it"
                ) from error

    found = dict(answer for answers in map_shards(mixed, asked) for answer in answers)
    return [found[place] for place in range(len(requests))]


def _batches(requests: Sequence[_Request], batch_size: int) -> list[list[int]]:
    """Return the places of requests by the batches that lm-eval asks them in.

    Those that differ in their last token alone are asked once; long ones come first. Whole batches are the same among fewer.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, (_, context, continuation) in enumerate(requests):
        alike.setdefault((*context, *continuation[:-1]), []).append(place)

    def order(places: list[int]) -> tuple[int, list[int]]:
        _, context, continuation = requests[max(places, key=lambda place: len(requests[place][2]))]
        return -len(context) - len(continuation), context + continuation

    groups = sorted(alike.values(), key=order)
    starts = range(0, len(groups), batch_size)
    return [[place for places in groups[start : start + batch_size] for place in places] for start in starts]


def answering(live: Live, tokenizer: PreTrainedTokenizerBase, batch_size: int, bos: str) -> Any:
    """Return lm-eval's adapter of transformers models around a live model; it answers at its `genome`."""
    from lm_eval.models.huggingface import HFLM

    blocks, leading = live.blocks, list(leading_ids(tokenizer, bos))

    class LiveLM(HFLM):  # type: ignore[misc, unused-ignore]
        """Computes the logits of a model that may be larger than its device, and tells how far it is."""

        known_as: Any = None
        genome: Genome | None = None
        on_share: Callable[[float], None] = staticmethod(lambda share: None)
        """Called with the share of this process's requests that are answered, in [0, 1]."""

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **settings: Any) -> list[int]:
            ids: list[int] = super().tok_encode(string, add_special_tokens, **settings)
            if add_special_tokens is None and ids[: len(leading)] != leading:  # a BOS that the tokenizer does not add
                return leading + ids
            return ids

        def _loglikelihood_tokens(self, requests: list[_Request], *args: Any, **settings: Any) -> Any:
            return _likelihoods(self, self.genome, requests)

        def ask(self, requests: list[_Request]) -> Any:
            """Answer requests by the model as it is."""
            self._done, self._num_requests = 0, len(requests)
            if blocks.offload:  # asked twice: first for the batches alone, so that a block is carried once for many of them
                self._noted: list[Tensor] | None = []
                super()._loglikelihood_tokens(requests, disable_tqdm=True)
                self._coming, self._noted = _walked(live, self.genome, self._noted), None
            return super()._loglikelihood_tokens(requests, disable_tqdm=True)

        @torch.no_grad()
        def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            if blocks.offload and self._noted is not None:
                self._noted.append(inps)
                return inps.new_zeros((), dtype=torch.float32).expand(*inps.shape, blocks.head().weight.shape[0])
            self._done += len(inps)
            self.on_share(min(self._done / self._num_requests, 1.0))
            if not blocks.offload:
                logits: Tensor = self.model(inps, use_cache=False).logits
                return logits
            asked, hidden = next(self._coming)
            assert torch.equal(asked, inps), "lm-eval asks the same in the same order"
            return blocks.head().logits(blocks.finish(hidden))

    # lm-eval gives the tokenizer a padding token, which must not get into the exported one.
    own, add_bos = copy.deepcopy(tokenizer), False if bos == "false" else None
    with undisturbed():
        lm = LiveLM(pretrained=blocks.model, tokenizer=own, batch_size=batch_size, add_bos_token=add_bos)
    lm.live = live
    return lm


@contextlib.contextmanager
def _held(live: Live, genome: Genome | None) -> Iterator[None]:
    """Hold a model at a genome; where blocks are carried to the device, what is outside of them, and `_walked` each in its turn."""
    if not live.blocks.offload:
        with live.applied(genome):
            yield
        return
    with contextlib.ExitStack() as held:
        for part in live.blocks.parts[len(live.blocks.blocks) :]:
            held.enter_context(part_held(live, part, live.levels_in(genome, part)))
        yield


def _walked(live: Live, genome: Genome | None, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of ids with what leaves the last block; each is carried to the device, and decoded, once for many of them."""
    blocks = live.blocks
    for those in _together(blocks, batches):
        states = [blocks.embed(ids).cpu() for ids in those]
        for index in range(len(blocks.blocks)):
            with block_at(live, index, genome):
                states = [blocks.run(index, state.to(blocks.device)).cpu() for state in states]
        for ids in those:
            yield ids, states.pop(0).to(blocks.device)


def _together(blocks: BlockModel, batches: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide batches so that the hidden states of each part take `MOST_ON_HOST` bytes, or are those of one batch."""
    part: list[Tensor] = []
    held = 0
    for ids in batches:
        size = ids.numel() * blocks.hidden_size * blocks.dtype.itemsize
        if part and held + size > MOST_ON_HOST:
            yield part
            part, held = [], 0
        part.append(ids)
        held += size
    if part:
        yield part


@contextlib.contextmanager
def _transformers_attention(model: Any) -> Iterator[None]:
    """Let a model that attends by our own `causal_chunks` do it as transformers does by default, as lm-eval alone would.

    The two differ by rounding, which in bfloat16 is enough to turn an answer.
    """
    ours = model.config._attn_implementation == attention.NAME
    if ours:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours:
            model.set_attn_implementation(attention.NAME)


class _Progress:
    """How many of all questions are answered."""

    def __init__(self, total: int, what: str) -> None:
        self._items = cast(Generator[int], track(range(total), what))
        self._at = -1
        self.move_to(0)

    def move_to(self, position: int) -> None:
        while self._at < position and next(self._items, None) is not None:
            self._at += 1

    def close(self) -> None:
        self._items.close()
