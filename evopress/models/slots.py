"""Places in a model that can hold a compressed weight.

Those inside the blocks are linears; GPT-2's hold their weight transposed. Outside them are the embedding and the head; where these
are tied they are one place, and both see whatever is put there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evopress.errors import EvoPressError
from evopress.units import EMBEDDING, HEAD


@dataclass(frozen=True)
class Slot:
    """A place in a model whose weight can be observed, read and put."""

    name: str
    """Full module name: "model.layers.0.self_attn.q_proj"."""
    kind: str
    """Last part of the name: "q_proj"; outside the blocks "embedding" (a tied head's too) or "head"."""
    module: Any
    """The module that owns the weight; what is observed are its inputs."""

    @property
    def weight(self) -> Tensor:
        """The weight that is in place, [R, C]."""
        weight: Tensor = self.module.weight.data
        return weight.T if isinstance(self.module, Conv1D) else weight

    def put(self, weight: Tensor) -> None:
        """Put another weight in place, a reference to it, for all modules that share the parameter."""
        self.module.weight.data = weight.T if isinstance(self.module, Conv1D) else weight


def shape_of(module: Any) -> tuple[int, int]:
    """Return a linear's outputs and inputs."""
    rows, columns = Slot("", "", module).weight.shape
    return rows, columns


def outside_slots(model: Any, include: Sequence[str]) -> list[Slot]:
    """Return the slots outside the blocks that `include` names, the head before the embedding, a tied weight once.

    Raises: EvoPressError if the model's embedding or head is no plain one.
    """
    if not {EMBEDDING, HEAD} & set(include):
        return []
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        what = f"{names.get(embedding, 'embedding')} is a {type(embedding).__name__}, its head a {type(head).__name__}"
        raise EvoPressError(
            f"this model's {what}: only a plain embedding and a plain linear head can be compressed; use method.include=[blocks]"
        )
    if head.weight is embedding.weight:
        return [Slot(names[embedding], EMBEDDING, embedding)]
    found = {HEAD: Slot(names[head], HEAD, head), EMBEDDING: Slot(names[embedding], EMBEDDING, embedding)}
    return [slot for kind, slot in found.items() if kind in include]
