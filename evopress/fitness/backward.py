"""One way forward through the model at a genome, and one or two back, block by block: what each unit gets for an error.

Weights need no gradient. What enters each block is kept on the way forward; on the way back each block is run again with gradients
of its hidden states, so that one block's activations are there at a time.

Shapes: b sequences, l tokens each, d hidden size, T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evopress.errors import EvoPressError
from evopress.fitness.gates import Gate, GatedHead
from evopress.fitness.measures import Measure, TopkKL, per_token, unfused
from evopress.levels.live import Live, block_at, part_held
from evopress.models.blocks import BlockModel
from evopress.models.dropping import contributions
from evopress.models.experts import kept_per_token
from evopress.models.head import Head
from evopress.models.slots import Slot
from evopress.units import Genome


class Entry(NamedTuple):
    """What a linear layer y = W x sees in a forward and backward pass."""

    entered: Tensor
    """x, [..., C]."""
    gradient: Tensor
    """Of the measure's sum, with respect to y: [..., R]."""
    num_sequences: int
    sequences: Tensor | None
    """Of every token the sequence that it is of, where they are not the leading dimension: an expert sees some tokens alone."""

    def of_weight(self) -> Tensor:
        """Return the gradient with respect to W, of all sequences together, float32 [R, C]."""
        return self.gradient.flatten(0, -2).float().T @ self.entered.flatten(0, -2).float()


_Taker = Callable[[Entry], None]
_Held = dict[tuple[int, str], Tensor]
"""What each slot gets for each error on each sequence, float64 [b] by the error and name."""


def attribution(entry: Entry, delta: Tensor) -> Tensor:
    """Return Σ ∂/∂y · Δ x over each sequence's tokens, [sequences].

    Args: delta: Δ, what an error adds to the weight, [R, C].
    """
    products = entry.gradient.float() * nn.functional.linear(entry.entered, delta).float()
    if entry.sequences is None:
        return products.reshape(entry.num_sequences, -1).sum(1).double()
    values = products.new_zeros(entry.num_sequences, dtype=torch.float64)
    return values.index_add_(0, entry.sequences, products.sum(1).double())


def backward_bytes(
    blocks: BlockModel, tokens: int, length: int, *, max_tokens_in_flight: int, chunk_tokens: int, errors: int = 1
) -> int:
    """Return the bytes at the peak of a pass, beside the levels: going back through a block, or the head.

    Those are the errors of a block's weights, what the block keeps of each token to go back, and the products of one linear's
    gradients in float32; or a chunk's logits, their logarithms, probabilities and gradients.

    Args:
        tokens: of all sequences.
        length: of one.
        errors: of each weight.
    """
    weights = max(sum(slot.weight.numel() for slot in blocks.slots(index).values()) for index in range(len(blocks.blocks)))
    itemsize, width, tokens = blocks.dtype.itemsize, blocks.inner_size, min(max_tokens_in_flight, tokens)
    kept = 7 * blocks.hidden_size + blocks.most_inside(4 * width, kept_per_token)
    block = errors * weights * itemsize + tokens * (itemsize * kept + 15 * width + blocks.scores_bytes(length))
    return max(block, 24 * min(chunk_tokens, tokens) * blocks.head().weight.shape[0])


class BackwardPass:
    """One forward and backward pass through the model at a genome, or two backward where modules are looked at."""

    def __init__(
        self,
        live: Live,
        genome: Genome | None,
        ids: Tensor,
        base: Tensor,
        measure: Measure,
        *,
        errors_of: Sequence[Genome] = (),
        score: Callable[[Entry, Tensor], Tensor] = attribution,
        see: Callable[[str, Entry], None] | None = None,
        uniform: Tensor | None = None,
        max_tokens_in_flight: int = 4096,
        chunk_tokens: int = 256,
    ) -> None:
        """Take the model and the text; see `attribution.derivatives`.

        Args:
            genome: where the model is; None: the dense one.
            errors_of: genomes whose levels' errors are scored, in blocks; none: those of the genome itself.
            score: what a unit of a block gets for an error, on each sequence.
            see: is shown what every unit of a block sees, by name, some sequences at a time; no errors are then looked at.
            uniform: numbers that draw the labels of a second way back, [b, l - 1], for modules and errors; None: there is none.
        """
        self.live, self.blocks, self.genome, self.measure = live, live.blocks, genome, unfused(measure)
        self.ids, self.base, self.chunk_tokens = ids, base, chunk_tokens
        self.errors_of, self.score, self.see = tuple(errors_of) or (genome,), score, see
        self.uniform = uniform
        batch = max(max_tokens_in_flight // ids.shape[1], 1)
        self.parts = [slice(start, start + batch) for start in range(0, len(ids), batch)]
        self.place = live.space.places
        self.found = torch.zeros(len(self.errors_of), len(ids), len(live.space), dtype=torch.float64)
        self.drawn = torch.zeros_like(self.found if uniform is not None else self.found[:0])
        """What units get for errors on the second way back, sums over tokens, [errors, b, units]."""
        self.scores = torch.zeros_like(self.found[0])
        self.adding: dict[int, tuple[str, str]] = {}
        """What adds to the residual stream, by block: they need not be alike."""

    def run(self) -> tuple[Tensor, Tensor]:
        """Go forward and back.

        Returns: per predicted token, what every unit gets for each error [errors, b, units], and of modules the mean squared
            derivative of the drawn labels' log likelihood, [b, units].

        Raises: EvoPressError if one is not finite.
        """
        with _frozen(self.blocks.model):
            entering = self._forward()
            gradients = self._head(entering.pop())
            for index in reversed(range(len(self.blocks.blocks))):
                self._block(index, entering.pop(), gradients)
            self._embedding(gradients[0])
        tokens = self.ids.shape[1] - 1
        first, second = self.found / tokens, self.scores**2 / tokens
        finite = torch.isfinite(first).all(0) & torch.isfinite(second)
        if not bool(finite.all()):
            row, unit = (int(i) for i in torch.nonzero(~finite)[0])
            raise EvoPressError(
                f"the attribution of {self.live.space.units[unit].name} is not finite on sequence {row}: look at the model's "
                "outputs at these levels (overflow in half precision, a damaged level), or use search/strategy=evolution"
            )
        return first, second

    def _levels(self, part: int | None) -> Genome | None:
        return None if part is None else self.live.levels_in(self.genome, part)

    @torch.no_grad()
    def _forward(self) -> list[Tensor]:
        """Return what enters each block, and what leaves the last one, [b, l, d] each in host memory."""
        with part_held(self.live, self.blocks.embedding_part, self._levels(self.blocks.embedding_part)):
            states = [torch.cat([self.blocks.embed(self.ids[part]).cpu() for part in self.parts])]
        for index in range(len(self.blocks.blocks)):
            if self.live.skips(self._levels(index)):
                states.append(states[-1])
                continue
            with block_at(self.live, index, self.genome):
                inputs = (states[-1][part].to(self.blocks.device) for part in self.parts)
                states.append(torch.cat([self.blocks.run(index, hidden).cpu() for hidden in inputs]))
        return states

    def _head(self, states: Tensor) -> list[Tensor]:
        """Measure, and return gradients with respect to what leaves the last block, [b, l, d] each.

        Those are of the measure's sums over each sequence and, where there are modules, of the drawn labels' log likelihoods.
        """
        dense, part = self.blocks.head(), self.blocks.head_part
        with part_held(self.live, part, self._levels(part)):
            head = self.blocks.head()
        delta = None if part is None else _or_none([head.weight - dense.weight.to(head.weight.device)])[0]
        gradients = [torch.empty_like(states) for _ in range(1 if self.uniform is None else 2)]
        for rows in self.parts:
            hidden = states[rows].to(self.blocks.device).requires_grad_()
            finished = self.blocks.finish(hidden, gradients=True)
            found, held = self._measure(finished.detach()[:, :-1], rows, head, dense, delta)
            for number, gradient in enumerate(gradients):
                at_end = torch.zeros_like(finished)
                at_end[:, :-1] = found[number]
                (into,) = torch.autograd.grad(finished, hidden, at_end, retain_graph=number + 1 < len(gradients))
                gradient[rows] = into.cpu()
            if delta is not None and part is not None:
                self._add(part, rows, held)
        return gradients

    def _measure(self, finished: Tensor, rows: slice, head: Head, dense: Head, delta: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Return gradients with respect to last hidden states [b, l - 1, d], and what the head holds on each sequence, [b]."""
        flat = finished.flatten(0, 1)
        base = self.base[rows, : self.ids.shape[1] - 1].flatten(0, 1)
        labels = self.ids[rows, 1:].reshape(-1).to(flat.device)
        draws = None if self.uniform is None else self.uniform[rows].reshape(-1).to(flat.device)
        gradients = [torch.empty_like(flat) for _ in range(1 if draws is None else 2)]
        held = torch.zeros(len(flat), device=flat.device)
        for start in range(0, len(flat), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            with torch.no_grad():
                reference = self.measure.reference(base[chunk].to(flat.device), labels[chunk], dense)
            hidden = flat[chunk].clone().requires_grad_()
            wanted, used = [hidden], head
            if delta is not None:
                gate = torch.ones(len(hidden), 1, device=flat.device, requires_grad=True)
                wanted, used = [hidden, gate], GatedHead(head.weight, head.bias, head.softcap, head.scale, delta=delta, gate=gate)
            with torch.enable_grad():
                total = per_token(self.measure, hidden, reference, used)[0].sum()
            found = torch.autograd.grad(total, wanted)
            gradients[0][chunk] = found[0]
            if delta is not None:
                held[chunk] = found[1][:, 0]
            if draws is not None:
                with torch.enable_grad():
                    total = _likelihood(self.measure, hidden, reference, head, draws[chunk])
                (gradients[1][chunk],) = torch.autograd.grad(total, hidden)
        return [gradient.view_as(finished) for gradient in gradients], held.view(finished.shape[:2]).double().sum(1)

    def _block(self, index: int, entering: Tensor, gradients: list[Tensor]) -> None:
        """Go back through block `index`: turn the gradients of what leaves it, [b, l, d], into those of what enters it.

        A module that is dropped is run for what it would add, of which nothing is added.
        """
        levels, modules = self._levels(index), self.live.modules_in(index)
        if not modules and self.live.skips(levels):
            return
        slots = [slot for slot in self.blocks.slots(index).values() if slot.name in self.place]
        with self.live.on_device(index):
            try:
                self.live.set_block(index, None)
                if self.uniform is not None and modules and index not in self.adding:
                    self.adding[index] = self._contributions(index, entering)
                held: _Held = {}
                takers = self._scoring(slots, self._deltas(index, slots), held) if self.see is None else _shown(slots, self.see)
                self.live.set_block(index, self.live.with_modules(index, levels))
                for rows in self.parts:
                    hidden = entering[rows].to(self.blocks.device).requires_grad_()
                    with _watched(slots, len(hidden), takers), self._gated(index, len(hidden)) as gates:
                        output = self.blocks.run(index, hidden, gradients=True)
                        for number, gradient in enumerate(gradients):
                            inputs = [hidden, *(gate.zeros for gate in gates if gate.zeros is not None)]
                            further = number + 1 < len(gradients)
                            into, *closed = torch.autograd.grad(
                                output, inputs, gradient[rows].to(output.device), retain_graph=further
                            )
                            found = self.scores if number else self.found[0]
                            for gate, unit in zip(gates, modules, strict=False):
                                if gate.zeros is not None:
                                    gate.take(closed.pop(0))
                                found[rows, unit] += gate.held.cpu()
                            gradient[rows] = into.cpu()
                            to = self.drawn if number else self.found
                            arrived = torch.stack(list(held.values())).cpu() if held else ()  # at once: each copy waits
                            for (error, name), values in zip(held, arrived, strict=True):
                                to[error, rows, self.place[name]] += values
                            held.clear()
            finally:
                self.live.restore_block(index)

    def _scoring(self, slots: Sequence[Slot], deltas: Sequence[Sequence[Tensor | None]], held: _Held) -> dict[str, _Taker]:
        """Return, by slot, what adds to `held` what its unit gets for each error on each sequence; none where there is no error.

        Args: deltas: of every error, by slot; None: nothing there.
        """

        def scoring(name: str, of_slot: dict[int, Tensor]) -> _Taker:
            def take(entry: Entry) -> None:
                for error, delta in of_slot.items():
                    values = self.score(entry, delta)
                    held[error, name] = held[error, name] + values if (error, name) in held else values

            return take

        of_slots = [
            {error: delta for error, each in enumerate(deltas) if (delta := each[i]) is not None} for i in range(len(slots))
        ]
        return {slot.name: scoring(slot.name, of_slot) for slot, of_slot in zip(slots, of_slots, strict=True) if of_slot}

    def _deltas(self, index: int, slots: Sequence[Slot]) -> list[list[Tensor | None]]:
        """Return what each error adds to the weights of a block that is dense, by slot; None: nothing."""
        dense, differences = [slot.weight for slot in slots], []
        for genome in self.errors_of:
            self.live.set_block(index, self.live.with_modules(index, self.live.levels_in(genome, index)))
            differences += [slot.weight - weight.to(slot.weight.device) for slot, weight in zip(slots, dense, strict=True)]
        found = iter(_or_none(differences))
        return [[next(found) for _ in slots] for _ in self.errors_of]

    def _contributions(self, index: int, entering: Tensor) -> tuple[str, str]:
        """Name what adds to the residual stream in a block that is whole."""
        hidden = entering[:1].to(self.blocks.device)
        return contributions(self.blocks.blocks[index], self.blocks.family, index, lambda: self.blocks.run(index, hidden))

    @contextmanager
    def _gated(self, index: int, num_sequences: int) -> Iterator[list[Gate]]:
        """Watch what a block's attention and MLP add, and let nothing be added by one that is dropped."""
        if index not in self.adding:
            yield []
            return
        assert self.genome is not None
        block, dropped = self.blocks.blocks[index], self.live.dropped_in(self.genome, index)
        gates = [Gate(bool(gone), num_sequences) for gone in dropped]
        hooks = [
            block.get_submodule(name).register_forward_hook(gate.forward)
            for name, gate in zip(self.adding[index], gates, strict=True)
        ]
        try:
            yield gates
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _embedding(self, gradient: Tensor) -> None:
        """Add what the embedding holds, from the gradient of what enters the first block, which is affine in its weight."""
        part = self.blocks.embedding_part
        if part is None:
            return
        for rows in self.parts:
            with part_held(self.live, part, self._levels(part)):
                level = self.blocks.embed(self.ids[rows])
            difference = level - self.blocks.embed(self.ids[rows])
            self._add(part, rows, (difference.double().cpu() * gradient[rows].double()).flatten(1).sum(1))

    def _add(self, part: int, rows: slice, values: Tensor) -> None:
        """Add to the one unit of a part outside the blocks; where head and embedding are tied, both add to it."""
        (name,) = self.blocks.slots(part)
        self.found[0, rows, self.place[name]] += values.cpu()


def _likelihood(measure: Measure, hidden: Tensor, reference: Any, head: Head, uniform: Tensor) -> Tensor:
    """Return the log likelihood, summed over tokens, of labels that the model draws: last hidden states [T, d], uniform [T]."""
    among_few = isinstance(measure, TopkKL)
    logq = torch.log_softmax(head.logits_of(hidden, reference[1]) if among_few else head.logits(hidden), dim=-1)
    heaped = logq.detach().exp().cumsum(-1)
    drawn = (heaped < uniform.to(heaped.dtype).unsqueeze(-1) * heaped[:, -1:]).sum(-1, keepdim=True)
    return logq.gather(-1, drawn.clamp(max=logq.shape[-1] - 1)).sum()


def _or_none(differences: Sequence[Tensor]) -> list[Tensor | None]:
    """Return differences, or None for those that are zero everywhere; the device is waited for once."""
    some = torch.stack([difference.any() for difference in differences]).tolist() if differences else []
    return [difference if any_of_it else None for difference, any_of_it in zip(differences, some, strict=True)]


def _shown(slots: Sequence[Slot], see: Callable[[str, Entry], None]) -> dict[str, _Taker]:
    return {slot.name: partial(see, slot.name) for slot in slots}


@contextmanager
def _watched(slots: Sequence[Slot], num_sequences: int, takers: Mapping[str, _Taker]) -> Iterator[None]:
    """Hand what each slot sees to its taker, on the way back; who has none is not looked at."""

    def watch(take: _Taker) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            entered, routed = inputs[0].detach(), getattr(module, "routed", None)
            sequences = None if routed is None else routed[0] // (routed[1] // num_sequences)
            output.register_hook(lambda gradient: take(Entry(entered, gradient, num_sequences, sequences)))

        return forward

    hooks = [slot.module.register_forward_hook(watch(takers[slot.name])) for slot in slots if slot.name in takers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no weight ask for a gradient for a moment."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()
