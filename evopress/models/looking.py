"""Learn from a running model what its module tree does not tell.

Which linears are called, and in what order; what blocks and their modules return; what blocks get beside their hidden states.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evopress.errors import EvoPressError
from evopress.models.calls import LOOK, Call, Form, returned
from evopress.models.experts import ExpertLinear, named_linear
from evopress.models.families import Family

if TYPE_CHECKING:
    from evopress.models.blocks import BlockModel

_OF_EXPERT = re.compile(r"(^|\.)\d+\.\w+$")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What a look at a model has shown."""

    family: Family
    form: Form
    """Of its hidden states."""
    by_batch: bool
    """What blocks get beside their hidden states depends on the number of sequences."""


@torch.no_grad()
def look_at(blocks: BlockModel) -> Found:
    """Run a model on two short sequences, once with its blocks and three times without.

    Raises: EvoPressError if the blocks are not called once each in their order, or get what cannot lie beside hidden states.
    """
    ids = torch.arange(2 * LOOK, device=blocks.device).reshape(2, LOOK) % 11 + 1
    seen = _Seen(blocks)
    with ExitStack() as hooked:
        for index, block in enumerate(blocks.blocks):
            parts = blocks.family.parts(index)
            for name in parts.linears:
                linear = named_linear(block, name)
                assert linear is not None
                if isinstance(linear, ExpertLinear):  # is called where a token goes there
                    seen.order[index].append(name)
                    continue
                hook = linear.register_forward_pre_hook(seen.linear(index, name))
                hooked.callback(hook.remove)
            for name in (*parts.attention, *parts.mlp):
                handle = block.get_submodule(name).register_forward_hook(seen.module(index, name))
                hooked.callback(handle.remove)
        with blocks.replaced_forwards([seen.through(index) for index in range(len(blocks.blocks))]):
            blocks.decoder(input_ids=ids, use_cache=False)
    family = seen.family()
    form = seen.form()
    return Found(family, form, _arguments(blocks, family, form, ids))


class _Seen:
    """What shows in one forward of the whole model."""

    def __init__(self, blocks: BlockModel) -> None:
        self.blocks = blocks
        self.called: list[int] = []
        self.order: list[list[str]] = [[] for _ in blocks.blocks]
        self.returns: list[dict[str, int]] = [{} for _ in blocks.blocks]
        self.shapes: set[tuple[int, ...]] = set()

    def through(self, index: int) -> Callable[..., Any]:
        """Return a forward that runs block `index` as it is and notes that it does."""
        own = self.blocks.blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.called.append(index)
            self.shapes.add(tuple(Call.of(args, kwargs)[0].shape))
            with self.blocks.on_device(index):
                output = own(*args, **kwargs)
            self.returns[index][""] = returned(output)
            return output

        return forward

    def linear(self, index: int, name: str) -> Callable[..., None]:
        """Return a hook that notes that a linear is called."""
        return lambda module, args: self.order[index].append(name)

    def module(self, index: int, name: str) -> Callable[..., None]:
        """Return a hook that notes what a module returns."""
        return lambda module, args, output: self.returns[index].__setitem__(name, returned(output))

    def family(self) -> Family:
        """Return the model's family with what was seen."""
        family = self.blocks.family
        if self.called != list(range(len(self.blocks.blocks))):
            times = Counter(self.called)
            odd = next((i for i in range(len(self.blocks.blocks)) if times[i] != 1), None)
            what = "in another order" if odd is None else f"{times[odd]} times (the block {self.blocks.block_name(odd)})"
            raise EvoPressError(f"{family.name} calls blocks {what} in one forward, expected each once: choose another model")
        idle = {
            f"{index}.{name}": "never called"
            for index, found in enumerate(self.order)
            for name in family.parts(index).linears
            if name not in found
        }
        by_block = tuple(
            replace(parts, linears=_experts_last(found), returns=back)
            for parts, found, back in zip(family.by_block, self.order, self.returns, strict=True)
        )
        return replace(family, linears=by_block[0].linears, by_block=by_block, dense={**family.dense, **idle})

    def form(self) -> Form:
        """Return the form of the hidden states."""
        form = Form.of(sorted(self.shapes)[0]) if len(self.shapes) == 1 else None
        if form is None:
            shapes = " or ".join(str(list(shape)) for shape in sorted(self.shapes))
            raise EvoPressError(
                f"the hidden states of {self.blocks.family.name} between blocks have the shape {shapes} for 2 sequences of {LOOK} "
                f"tokens, expected [2, {LOOK}, hidden size]: choose another model"
            )
        return form


def _experts_last(names: Sequence[str]) -> tuple[str, ...]:
    """Return names as they were called, each once, those of experts, which come first here, at the end."""
    distinct = list(dict.fromkeys(names))
    return (*(name for name in distinct if not _OF_EXPERT.search(name)), *(name for name in distinct if _OF_EXPERT.search(name)))


def _arguments(blocks: BlockModel, family: Family, form: Form, ids: Tensor) -> bool:
    """Tell whether what blocks get depends on how many sequences there are; note in the form what depends on the tokens."""
    by_batch = False
    alone, together, others = (blocks.capture(tokens, family) for tokens in (ids[:1], ids, ids.flip(1) + 3))
    for index, calls in enumerate(zip(alone, together, others, strict=True)):
        one, two, three = (call.tensors() for call in calls)
        for place, (a, b) in enumerate(zip(two, three, strict=True)):
            if a.shape == b.shape and torch.equal(a, b):
                continue
            if a.shape[:2] != ids.shape or a.shape != b.shape or a.dtype != blocks.dtype:
                raise EvoPressError(
                    f"{blocks.block_name(index)} of this {family.name} takes another input that depends on the tokens, of shape "
                    f"{list(a.shape)}, beside its hidden states: choose another model"
                )
            form.sides[index, place] = tuple(a.shape[2:])
        by_batch |= [each.shape for each in one] != [each.shape for each in two]
    return by_batch


def say(blocks: BlockModel) -> None:
    """Say what was found by looking at a model."""
    family = blocks.family
    kinds = Counter(
        "/".join(type(block.get_submodule(name)).__name__ for name in (*parts.attention, *parts.mlp))
        for block, parts in zip(blocks.blocks, family.by_block, strict=True)
    )
    units = sum(slot.weight.numel() for index in range(len(blocks.blocks)) for slot in blocks.slots(index).values())
    whole = sum(parameter.numel() for block in blocks.blocks for parameter in block.parameters())
    dense = Counter(family.dense.values())
    logger.info(
        "model: %s has no adapter of its own; found %d blocks in %s (%s), %.1f%% of their weights in linears%s",
        family.name,
        len(blocks.blocks),
        family.prefix,
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        100 * units / whole,
        "; dense: " + ", ".join(f"{count} {why}" for why, count in dense.items()) if dense else "",
    )
