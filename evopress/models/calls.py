"""What passes between a model's blocks: what they are called with, what they return, and hidden states in one form for all.

Shapes: b sequences, l tokens each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LOOK = 6
"""Tokens of the two sequences that a model is looked at with."""


@dataclass(frozen=True)
class Call:
    """What a block was called with, its hidden states taken out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None = None
    """Keyword of the hidden states; None: they come first."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """Take the hidden states out of what a block is called with."""
        if args:
            return args[0], cls(args[1:], kwargs)
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return kwargs[name], cls((), {key: value for key, value in kwargs.items() if key != name}, name)

    def run(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        """Call a block on other hidden states."""
        if self.name is not None:
            return block(**{self.name: hidden}, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Return all tensors among the arguments, those inside tuples, lists and dictionaries too."""
        return list(_tensors((self.args, self.kwargs)))

    def replaced(self, others: Mapping[int, Tensor]) -> Call:
        """Return the call with other tensors at some of their places."""
        places = itertools.count()

        def copied(value: Any) -> Any:
            if isinstance(value, Tensor):
                return others.get(next(places), value)
            if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
                return type(value)(copied(each) for each in value)
            if type(value) is dict:
                return {key: copied(each) for key, each in value.items()}
            return value

        args, kwargs = copied(self.args), copied(self.kwargs)
        return replace(self, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Form:
    """How hidden states of any shape, and what else of the tokens a block gets, are laid out as one [b, l, size]."""

    axis: int
    """Of the sequences in the model's own hidden states; that of the tokens is the next."""
    rest: tuple[int, ...]
    """Their other axes."""
    sides: dict[tuple[int, int], tuple[int, ...]]
    """Block and place among its tensors, to the axes beside those of sequences and tokens: Gemma 4's inputs per layer."""

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Form | None:
        """Return the form of hidden states of 2 sequences of `LOOK` tokens; None: these axes are not found."""
        axis = next((i for i in range(len(shape) - 1) if shape[i : i + 2] == (2, LOOK)), None)
        return None if axis is None else cls(axis, shape[:axis] + shape[axis + 2 :], {})

    @property
    def own(self) -> int:
        """Numbers of the hidden states alone."""
        return math.prod(self.rest)

    @property
    def size(self) -> int:
        """All numbers of a token."""
        return self.own + sum(math.prod(shape) for shape in self.sides.values())

    def packed(self, hidden: Tensor, tensors: Sequence[Sequence[Tensor]] = ()) -> Tensor:
        """Lay out the model's own hidden states, and every block's tensors of which some are of the tokens."""
        flat = hidden.movedim((self.axis, self.axis + 1), (0, 1)).flatten(2)
        return self.again(hidden, torch.cat([tensors[i][place].flatten(2) for i, place in self.sides], -1)) if self.sides else flat

    def again(self, hidden: Tensor, beside: Tensor) -> Tensor:
        """Lay out other hidden states with the same beside them."""
        flat = hidden.movedim((self.axis, self.axis + 1), (0, 1)).flatten(2)
        return torch.cat([flat, beside], -1) if self.sides else flat

    def unpacked(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the model's own hidden states, and the rest of [b, l, size]."""
        inside, beside = state[..., : self.own], state[..., self.own :]
        return inside.reshape(*state.shape[:2], *self.rest).movedim((0, 1), (self.axis, self.axis + 1)), beside

    def batch_and_length(self, hidden: Tensor) -> tuple[int, int]:
        """Return the sequences of the model's own hidden states, and their tokens."""
        return hidden.shape[self.axis], hidden.shape[self.axis + 1]

    def with_sides(self, call: Call, index: int, beside: Tensor) -> Call:
        """Return a block's call with what is of the tokens taken from beside the hidden states."""
        found, start = {}, 0
        for (block, place), shape in self.sides.items():
            end = start + math.prod(shape)
            if block == index:
                found[place] = beside[..., start:end].reshape(*beside.shape[:2], *shape)
            start = end
        return call.replaced(found) if found else call


def as_returned(hidden: Tensor, count: int) -> Any:
    """Return hidden states alone, or as the first of a tuple of so many values, of a list where the number is negative."""
    values = (hidden, *[None] * (abs(count) - 1))
    return values if count > 0 else list(values) if count else hidden


def returned(output: Any) -> int:
    """Return how many values a tuple has, as a negative number those of a list; 0 for a tensor."""
    return len(output) if isinstance(output, tuple) else -len(output) if isinstance(output, list) else 0


def first_of(output: Any) -> Tensor:
    """Return the hidden states of what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (list, tuple, dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
