"""Evaluate a whole population block by block, every shared prefix once (DESIGN section 4).

Offspring differ from their parent in a handful of units. Candidates whose genomes agree up to a block share the hidden state that
leaves it; the weights of a block's assignment are put in place once for all states that need them. Where the embedding is a unit,
candidates with another level of it start from another state; where the head is one, each candidate's logits come from its own.

Shapes: b sequences, l tokens each, d hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from evopress.compress.compressor import free_bytes
from evopress.fitness.measures import Measure, per_token
from evopress.levels.live import Live, part_held
from evopress.levels.passage import SHARE_OF_DEVICE
from evopress.models.blocks import BlockModel
from evopress.progress import within
from evopress.ranks import launched
from evopress.units import Genome

_T = TypeVar("_T")
_BESIDE = 3
"""States that are held beside those of all models at most: as they enter a block, leave it, and are joined or finished."""
_IN_BLOCKS = 0.5
"""Of the time that measuring takes, for how far it is: the rest goes into logits, more of it in small models than in large ones."""
PER_LOGIT = 16
"""Bytes that a measure takes for a logit of a chunk: float32 logits, logarithms, probabilities, and those of the last chunk."""
MOST_ON_HOST = 2**30
"""Bytes of hidden states of one walk, where the device is the host."""


class Evaluator(Protocol):
    """Measures genomes on token ids; None stands for the dense model."""

    live: Live
    known_as: Any
    """See `ranks.Known`."""

    def final_states(
        self, genomes: Sequence[Genome | None], ids: Tensor, *, apart: int | None = None
    ) -> tuple[list[int], list[Tensor]]:
        """Return the distinct last hidden states [b, l, d], a list that may be emptied, and for each genome the index of its own.

        Args:
            ids: int64 [b, l].
            apart: sequences to a forward, which has one genome's rows alone; None: as many rows as there is room for.
        """

    def alone(self, num_sequences: int, length: int) -> bool:
        """Tell whether a genome's states on so many sequences of a length are the same to the bit, whatever is asked beside it."""


class PopulationEvaluator:
    """The fast way: block by block over the whole population."""

    def __init__(self, live: Live, *, max_tokens_in_flight: int = 4096, fused: bool = False) -> None:
        """Take the model.

        Args:
            max_tokens_in_flight: tokens per forward of one block; bounds memory, changes results only by rounding.
            fused: run the blocks through torch.compile.
        """
        self.live = live
        self.max_tokens_in_flight = max_tokens_in_flight
        self.fused = fused
        self.known_as: Any = None
        self.num_block_tokens = 0
        """Tokens times blocks computed so far."""

    @torch.no_grad()
    def final_states(
        self, genomes: Sequence[Genome | None], ids: Tensor, *, apart: int | None = None
    ) -> tuple[list[int], list[Tensor]]:
        live, blocks = self.live, self.live.blocks
        embeddings, state_of = _distinct([_levels_in(live, genome, blocks.embedding_part) for genome in genomes])
        states: list[Tensor | None] = []
        for embedding in embeddings:
            with part_held(live, blocks.embedding_part, embedding):
                states.append(blocks.embed(ids))
        for index in range(len(blocks.blocks)):
            children: dict[tuple[int, Genome | None], int] = {}
            parents_of: dict[Genome | None, list[int]] = defaultdict(list)
            for candidate, genome in enumerate(genomes):
                edge = (state_of[candidate], live.levels_in(genome, index))
                if edge not in children:
                    children[edge] = len(children)
                    parents_of[edge[1]].append(edge[0])
                state_of[candidate] = children[edge]
            uses = [0] * len(states)
            for parent, _ in children:
                uses[parent] += 1
            following: list[Tensor | None] = [None] * len(children)
            for levels in [levels for levels in parents_of if live.skips(levels)]:
                for parent in parents_of.pop(levels):
                    following[children[parent, levels]] = states[parent]
                    uses[parent] -= 1
            if parents_of:
                with live.on_device(index):
                    try:
                        for levels, parents in parents_of.items():
                            live.set_block(index, levels)
                            self._advance(index, levels, parents, states, following, children, uses, apart)
                    finally:
                        live.restore_block(index)
            states = following
            within((index + 1) / len(blocks.blocks) * _IN_BLOCKS)
        finished = []
        while states:  # each goes when it has been finished
            state = states.pop(0)
            assert state is not None
            finished.append(blocks.finish(state))
        return state_of, finished

    def alone(self, num_sequences: int, length: int) -> bool:
        """See `Evaluator`: where a forward has room for one state, it has no other's rows."""
        return launched() or self._together(num_sequences, length) == 1

    def _together(self, num_sequences: int, length: int) -> int:
        """Return how many states of so many sequences go through a block together."""
        return max(max(self.max_tokens_in_flight // length, 1) // num_sequences, 1)

    def _advance(
        self,
        index: int,
        levels: Genome | None,
        parents: list[int],
        states: list[Tensor | None],
        following: list[Tensor | None],
        children: dict[tuple[int, Genome | None], int],
        uses: list[int],
        apart: int | None,
    ) -> None:
        """Run one assignment of block `index` over all states that need it, several states to a forward; free used-up parents."""
        b, length = next(state for state in states if state is not None).shape[:2]
        per_forward = apart or max(self.max_tokens_in_flight // length, 1)  # sequences
        together = 1 if apart else self._together(b, length)  # states
        for start in range(0, len(parents), together):
            group = parents[start : start + together]
            inputs = [states[parent] for parent in group]
            hidden = torch.cat([state for state in inputs if state is not None])
            del inputs
            outputs = [self.live.blocks.run(index, part, fused=self.fused) for part in hidden.split(per_forward)]
            self.num_block_tokens += hidden.shape[0] * length
            joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
            del hidden, outputs  # before the next forward
            for parent, output in zip(group, joined.split(b), strict=True):
                following[children[parent, levels]] = output
                uses[parent] -= 1
                if not uses[parent]:
                    states[parent] = None


def walked_together(blocks: BlockModel, models: int, length: int, batch: int) -> int:
    """Return how many sequences go through all blocks in one walk, a multiple of `batch`.

    That is a batch; or where a walk carries the blocks to the device, as many as there is room for, of so many models' states.
    """
    if not blocks.offload:
        return batch
    room = free_bytes(blocks.device) * SHARE_OF_DEVICE if blocks.device.type == "cuda" else MOST_ON_HOST
    held = (models + _BESIDE) * length * blocks.hidden_size * blocks.dtype.itemsize  # for each sequence
    return max(int(room // held) // batch, 1) * batch


def measure_sums(
    evaluator: Evaluator,
    genomes: Sequence[Genome | None],
    ids: Tensor,
    base: Tensor | None,
    measure: Measure,
    *,
    chunk_tokens: int = 256,
) -> tuple[Tensor, int]:
    """Sum a measure over the predicted tokens of sequences, for every genome.

    The last position of each sequence has no next token and is left out, as in the authors' code.

    Args:
        ids: token ids int64 [b, l], l ≥ 2.
        base: the base model's last hidden states [b, l', d], l' ≥ l; None takes the first genome's. Its head is the dense one.
        chunk_tokens: tokens whose logits exist at a time.

    Returns: sums float64 [genomes, measures] on the host, and the number of tokens summed over.
    """
    (sums,) = measure_parts(evaluator, genomes, ids, base, measure, chunk_tokens=chunk_tokens)
    return sums, ids[:, 1:].numel()


def measure_parts(
    evaluator: Evaluator,
    genomes: Sequence[Genome | None],
    ids: Tensor,
    base: Tensor | None,
    measure: Measure,
    *,
    chunk_tokens: int = 256,
    apart: int | None = None,
) -> Tensor:
    """Sum a measure as `measure_sums`, over so many sequences at a time as are `apart`.

    A part's numbers are then the same to the bit, whatever else is measured. None: all sequences are one part.

    Returns: sums float64 [parts, genomes, measures] on the host.
    """
    end_of, ends, chunks = _by_chunks(evaluator, genomes, ids, base, measure, chunk_tokens, apart)
    tokens = (apart or len(ids)) * (ids.shape[1] - 1)
    # Sums stay where the measures are: reading one makes the host wait for the device.
    sums: list[list[Tensor | None]] = [[None] * ends for _ in range(0, len(ids), apart or len(ids))]
    for i, chunk, values in chunks:
        of_part, number = sums[chunk.start // tokens], values.sum(-1, dtype=torch.float64)
        so_far = of_part[i]
        of_part[i] = number if so_far is None else so_far + number
    return torch.stack([torch.stack([total for total in of_part if total is not None]) for of_part in sums]).cpu()[:, end_of]


def measure_sequences(
    evaluator: Evaluator,
    genomes: Sequence[Genome | None],
    ids: Tensor,
    base: Tensor | None,
    measure: Measure,
    *,
    chunk_tokens: int = 256,
    apart: int | None = None,
) -> Tensor:
    """Sum a measure over the predicted tokens of each sequence, for every genome; otherwise as `measure_sums`.

    Returns: sums float64 [genomes, measures, b] on the host, each over l - 1 tokens.
    """
    end_of, ends, chunks = _by_chunks(evaluator, genomes, ids, base, measure, chunk_tokens, apart)
    sums = torch.zeros(ends, len(measure.names), ids.shape[0], dtype=torch.float64)
    sequence_of = torch.arange(ids.shape[0]).repeat_interleave(ids.shape[1] - 1)
    for i, chunk, values in chunks:
        sums[i].index_add_(1, sequence_of[chunk], values.cpu().double())
    return sums[end_of]


def _by_chunks(
    evaluator: Evaluator,
    genomes: Sequence[Genome | None],
    ids: Tensor,
    base: Tensor | None,
    measure: Measure,
    chunk_tokens: int,
    apart: int | None,
) -> tuple[list[int], int, Iterator[tuple[int, slice, Tensor]]]:
    """Return each genome's end, a last hidden state under the levels of a head, how many ends there are, and what is measured.

    That is an iterator of (end, tokens, float32 [measures, T]).
    """
    live, part = evaluator.live, evaluator.live.blocks.head_part
    dense = live.blocks.head()
    state_of, states = evaluator.final_states(genomes, ids, apart=apart)
    levels = [_levels_in(live, genome, part) for genome in genomes]
    ends, end_of = _distinct(list(zip(state_of, levels, strict=True)))
    heads = {}
    for head_levels in dict.fromkeys(levels):
        with part_held(live, part, head_levels):
            heads[head_levels] = live.blocks.head()
    device = states[0].device
    labels = ids[:, 1:].reshape(-1).to(device)
    flat: list[Tensor] = []
    while states:  # without their last positions they are copies
        flat.append(states.pop(0)[:, :-1].flatten(0, 1))
    flat_base = flat[state_of[0]] if base is None else base[:, : ids.shape[1] - 1].reshape(-1, base.shape[-1])

    def measured() -> Iterator[tuple[int, slice, Tensor]]:
        with torch.no_grad():
            for chunk in _chunks(labels.numel(), chunk_tokens, within=apart and apart * (ids.shape[1] - 1)):
                reference = measure.reference(flat_base[chunk].to(device), labels[chunk], dense)
                for i, (state, head_levels) in enumerate(ends):
                    yield i, chunk, per_token(measure, flat[state][chunk], reference, heads[head_levels])
                del reference  # before the next chunk's
                within(_IN_BLOCKS + (1 - _IN_BLOCKS) * chunk.stop / labels.numel())

    return end_of, len(ends), measured()


def evaluation_bytes(
    blocks: BlockModel,
    candidates: int,
    tokens: int,
    length: int,
    *,
    max_tokens_in_flight: int,
    chunk_tokens: int,
    decoding: int = 0,
    apart: bool = False,
    plain: bool = False,
) -> int:
    """Return the bytes at the peak of measuring distinct candidates, beside their levels: on the way, at its end, or at the logits.

    Args:
        tokens: that each is measured on at a time, in sequences of a length.
        decoding: bytes that decoding a level takes.
        apart: no forward has two candidates.
        plain: one candidate goes through the whole model after the other.
    """
    state = tokens * blocks.hidden_size * blocks.dtype.itemsize
    most = max(max_tokens_in_flight // length, 1) * length  # tokens of a forward
    together = 1 if apart or plain else min(max(most // tokens, 1), candidates)
    forward = blocks.forward_bytes(min(most, together * tokens), length)
    # What has entered or left the block, and beside it what a forward takes together, in and out, and joined if it comes in parts.
    walked = candidates * state + max(2 * together * state + forward, (2 if plain else 3) * state if tokens > most else 0)
    itemsize = blocks.dtype.itemsize
    decoded = (candidates + 1) * state + decoding
    ended = (candidates + (2 if itemsize == 4 else 4)) * state  # the final norm computes in float32
    logits = PER_LOGIT * min(chunk_tokens, tokens) * blocks.head().weight.shape[0]
    return max(decoded, walked, ended, candidates * state + logits)


def _chunks(count: int, size: int, *, within: int | None) -> Iterator[slice]:
    """Cut `count` tokens into chunks, none of which goes over a multiple of `within`."""
    within = within or count
    for begin in range(0, count, within):
        end = min(begin + within, count)
        yield from (slice(start, min(start + size, end)) for start in range(begin, end, size))


def _levels_in(live: Live, genome: Genome | None, part: int | None) -> Genome | None:
    """Return a genome's levels of a part outside the blocks; None where that is dense or no unit."""
    return None if part is None else live.levels_in(genome, part)


def _distinct(values: Sequence[_T]) -> tuple[list[_T], list[int]]:
    """Return the distinct values in the order of their first appearance, and each value's place among them."""
    places = {value: index for index, value in enumerate(dict.fromkeys(values))}
    return list(places), [places[value] for value in values]
