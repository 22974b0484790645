"""How much of a genome's fitness each unit holds: one forward and one backward pass, block by block.

Let a unit's weight be W + s (Q - W), Q its level's and W the dense model's. Its attribution is the derivative of the measure with
respect to s at 1: a = ⟨∂KL/∂W, Q - W⟩ = Σ_t ∂KL/∂y_t · (Q - W) x_t for a linear y = W x. The KL divergence is close to quadratic in
s, so the unit holds about a/2 of it.

Weights need no gradient. What enters each block is kept on the way forward; on the way back each block is run again with gradients
of its hidden states, so that one block's activations are there at a time.

Shapes: b sequences, l tokens each, d hidden size, T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from evopress.errors import EvoPressError
from evopress.fitness.measures import KLDivergence, Measure
from evopress.levels.live import Live, part_held
from evopress.levels.refine import block_at
from evopress.models.blocks import Head
from evopress.models.slots import Slot
from evopress.units import Genome


def attribute(
    live: Live,
    genome: Genome,
    ids: Tensor,
    base: Tensor,
    measure: Measure,
    *,
    max_tokens_in_flight: int = 4096,
    chunk_tokens: int = 256,
) -> Tensor:
    """Return what each unit holds of a genome's measure on each sequence; the model is the dense one before and after.

    Args:
        ids: token ids int64 [b, l], l ≥ 2.
        base: the dense model's last hidden states [b, l', d], l' ≥ l, in host memory.
        measure: a measure with one number per token.
        max_tokens_in_flight: tokens per forward and backward of one block; bounds memory.
        chunk_tokens: tokens whose logits exist at a time.

    Returns: float64 [b, units] on the host, per predicted token; 0 for a unit whose level is the dense weight.
    Raises: EvoPressError if one is not finite.
    """
    live.space.check(genome)
    with _frozen(live.blocks.model):
        return _Pass(live, genome, ids, base, _unfused(measure), max_tokens_in_flight, chunk_tokens).run()


class _Pass:
    """One forward and backward pass."""

    def __init__(
        self, live: Live, genome: Genome, ids: Tensor, base: Tensor, measure: Measure, max_tokens_in_flight: int, chunk_tokens: int
    ) -> None:
        self.live, self.blocks, self.genome, self.measure = live, live.blocks, genome, measure
        self.ids, self.base, self.chunk_tokens = ids, base, chunk_tokens
        batch = max(max_tokens_in_flight // ids.shape[1], 1)
        self.parts = [slice(start, start + batch) for start in range(0, len(ids), batch)]
        self.place = {unit.name: index for index, unit in enumerate(live.space.units)}
        self.found = torch.zeros(len(ids), len(live.space), dtype=torch.float64)

    def run(self) -> Tensor:
        entering = self._forward()
        gradient = self._head(entering.pop())
        for index in reversed(range(len(self.blocks.blocks))):
            gradient = self._block(index, entering.pop(), gradient)
        self._embedding(gradient)
        if not bool(torch.isfinite(self.found).all()):
            row, unit = (int(i) for i in torch.nonzero(~torch.isfinite(self.found))[0])
            raise EvoPressError(
                f"what {self.live.space.units[unit].name} holds of the fitness is not a finite number on sequence {row}: look at "
                "the model's outputs at these levels (overflow in half precision, a damaged level), or search by evolution"
            )
        return self.found / (self.ids.shape[1] - 1)

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
            with block_at(self.live, index, self.genome, {}):
                inputs = (states[-1][part].to(self.blocks.device) for part in self.parts)
                states.append(torch.cat([self.blocks.run(index, hidden).cpu() for hidden in inputs]))
        return states

    def _head(self, states: Tensor) -> Tensor:
        """Measure, and return the gradient of the sums over each sequence with respect to what leaves the last block."""
        dense, part = self.blocks.head(), self.blocks.head_part
        with part_held(self.live, part, self._levels(part)):
            head = self.blocks.head()
        delta = None if part is None else _difference(head.weight, dense.weight)
        gradient = torch.empty_like(states)
        for rows in self.parts:
            hidden = states[rows].to(self.blocks.device).requires_grad_()
            finished = self.blocks.finish(hidden, gradients=True)
            at_end = torch.zeros_like(finished)
            at_end[:, :-1], held = self._measure(finished.detach()[:, :-1], rows, head, dense, delta)
            (into,) = torch.autograd.grad(finished, hidden, at_end)
            gradient[rows] = into.cpu()
            if delta is not None and part is not None:
                self._add(part, rows, held)
        return gradient

    def _measure(self, finished: Tensor, rows: slice, head: Head, dense: Head, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gradient with respect to last hidden states [b, l - 1, d], and what the head holds on each sequence, [b]."""
        flat = finished.flatten(0, 1)
        base = self.base[rows, : self.ids.shape[1] - 1].flatten(0, 1)
        labels = self.ids[rows, 1:].reshape(-1).to(flat.device)
        gradient, held = torch.empty_like(flat), torch.zeros(len(flat), device=flat.device)
        for start in range(0, len(flat), self.chunk_tokens):
            chunk = slice(start, start + self.chunk_tokens)
            with torch.no_grad():
                reference = self.measure.reference(base[chunk].to(flat.device), labels[chunk], dense)
            hidden = flat[chunk].clone().requires_grad_()
            wanted, used = [hidden], head
            if delta is not None:
                gate = torch.ones(len(hidden), 1, device=flat.device, requires_grad=True)
                wanted, used = [hidden, gate], _Gated(head.weight, head.bias, head.softcap, delta=delta, gate=gate)
            with torch.enable_grad():
                total = self.measure(hidden, reference, used)[0].sum()
            gradients = torch.autograd.grad(total, wanted)
            gradient[chunk] = gradients[0]
            if delta is not None:
                held[chunk] = gradients[1][:, 0]
        return gradient.view_as(finished), held.view(finished.shape[:2]).double().sum(1)

    def _block(self, index: int, entering: Tensor, gradient: Tensor) -> Tensor:
        """Go back through block `index`: from the gradient of what leaves it, [b, l, d], to that of what enters it."""
        levels = self._levels(index)
        if self.live.skips(levels):
            return gradient
        slots = list(self.blocks.slots(index).values())
        with self.live.on_device(index):
            try:
                self.live.set_block(index, None)
                dense = [slot.weight for slot in slots]
                self.live.set_block(index, levels)
                deltas = [_difference(slot.weight, weight) for slot, weight in zip(slots, dense, strict=True)]
                del dense
                for rows in self.parts:
                    hidden = entering[rows].to(self.blocks.device).requires_grad_()
                    with _watched(slots, deltas, len(hidden)) as held:
                        output = self.blocks.run(index, hidden, gradients=True)
                        (into,) = torch.autograd.grad(output, hidden, gradient[rows].to(output.device))
                    for name, values in held.items():
                        self.found[rows, self.place[name]] += values.cpu()
                    gradient[rows] = into.cpu()
            finally:
                self.live.restore_block(index)
        return gradient

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
        self.found[rows, self.place[name]] += values.cpu()


@dataclass(frozen=True)
class _Gated(Head):
    """A head whose difference to the dense one is multiplied by a gate a token, float32 [T, 1] of ones."""

    delta: Tensor | None = None
    """[V, d]."""
    gate: Tensor | None = None

    def scores(self, hidden: Tensor) -> Tensor:
        assert self.delta is not None and self.gate is not None
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return self._capped(logits + (self.gate - 1) * nn.functional.linear(hidden, self.delta))

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        assert self.delta is not None and self.gate is not None
        logits = torch.einsum("td,tkd->tk", hidden, self.weight[tokens])
        logits = logits + (self.gate - 1) * torch.einsum("td,tkd->tk", hidden, self.delta[tokens])
        return self._capped(logits if self.bias is None else logits + self.bias[tokens]).float()


def _unfused(measure: Measure) -> Measure:
    """Return the measure in the form that can be gone back through."""
    return replace(measure, fused=False) if isinstance(measure, KLDivergence) else measure


def _difference(level: Tensor, dense: Tensor) -> Tensor | None:
    """Return a level less the dense weight; None where they are the same."""
    difference = level - dense.to(level.device)
    return difference if bool(difference.any()) else None


@contextmanager
def _watched(slots: Sequence[Slot], deltas: Sequence[Tensor | None], num_sequences: int) -> Iterator[dict[str, Tensor]]:
    """Collect, on the way back, what each slot holds on each sequence, float64 [b] by name."""
    held: dict[str, Tensor] = {}

    def watch(name: str, delta: Tensor) -> Any:
        def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            entered = inputs[0].detach()

            def backward(gradient: Tensor) -> None:
                change = nn.functional.linear(entered, delta)
                values = (gradient.float() * change.float()).reshape(num_sequences, -1).sum(1).double()
                held[name] = held[name] + values if name in held else values

            output.register_hook(backward)

        return forward

    hooks = [
        slot.module.register_forward_hook(watch(slot.name, delta))
        for slot, delta in zip(slots, deltas, strict=True)
        if delta is not None
    ]
    try:
        yield held
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
