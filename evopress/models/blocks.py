"""Run a causal language model block by block.

What enters the first block, and what every block gets beside its hidden states (masks, rotary embeddings, positions), is captured
from the model's own forward, so that it is the model's whatever the family.

Shapes: b sequences, l tokens each, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evopress.errors import EvoPressError
from evopress.models.families import Family
from evopress.models.slots import Slot, outside_slots
from evopress.units import BLOCKS


@dataclass(frozen=True)
class _Call:
    """What a block was called with, its hidden states taken out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class BlockShape:
    """What a block is called and how many weights its parts have, biases included."""

    name: str
    """Full module name: "model.layers.0"."""
    attention: int = 0
    mlp: int = 0
    size: int = 0
    """Of the whole block, norms included."""


class _Stop(Exception):
    """Leaves the model's forward once the wanted input is captured."""


class BlockModel:
    """A causal language model whose blocks are called one at a time, each on the compute device only while it is needed."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        device: torch.device | str = "cpu",
        offload: bool = False,
        include: Sequence[str] = (BLOCKS,),
    ) -> None:
        """Wrap a model in evaluation mode; weights stay the model's own.

        Args:
            device: where the computation runs.
            offload: keep the blocks in host memory and move each to the device while it runs (models larger than the device).
            include: what of the model has slots: "blocks", and "head" or "embedding" beside them.

        Raises: EvoPressError if the embedding or the head is to be included and is no plain one.
        """
        self.model = model
        self.family = family
        self.device = torch.device(device)
        self.offload = offload and self.device.type != "cpu"
        self.decoder: nn.Module = model.get_submodule(family.decoder)
        self.blocks: list[nn.Module] = list(self.decoder.get_submodule(family.blocks).children())
        self._prefix = f"{family.decoder}.{family.blocks}"
        self._outside = outside_slots(model, include)
        self._calls: dict[int, list[_Call]] = {}
        self._fused: list[Callable[..., Any]] | None = None
        self._place()

    def _place(self) -> None:
        if not self.offload:
            self.model.to(self.device)
            return
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor.data = tensor.data.to(self.device)  # in place, so that tied weights stay tied

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)  # type: ignore[union-attr,arg-type]

    @property
    def parts(self) -> range:
        """Indices of all that has slots: the blocks, then the head, then the embedding, as far as these are included."""
        return range(len(self.blocks) + len(self._outside))

    @property
    def head_part(self) -> int | None:
        """The part whose slot the head's weight is in, tied or not; None: it is not included."""
        return self._part_of(self.model.get_output_embeddings())  # type: ignore[operator]

    @property
    def embedding_part(self) -> int | None:
        """The part whose slot the embedding's weight is in, tied or not; None: it is not included."""
        return self._part_of(self.model.get_input_embeddings())  # type: ignore[operator]

    def _part_of(self, module: Any) -> int | None:
        found = (i for i, slot in enumerate(self._outside, len(self.blocks)) if slot.module.weight is module.weight)
        return next(found, None)

    def slots(self, part: int) -> dict[str, Slot]:
        """Return the slots of a part by their names: a block's linears in the order of the computation, or the one outside them.

        Raises: EvoPressError as `linears`.
        """
        if part >= len(self.blocks):
            slot = self._outside[part - len(self.blocks)]
            return {slot.name: slot}
        return {name: Slot(name, name.rsplit(".", 1)[-1], linear) for name, linear in self.linears(part).items()}

    def is_of_attention(self, name: str) -> bool:
        """Tell whether a block's slot of this name lies in the attention, not in the MLP."""
        inner = name.removeprefix(f"{self._prefix}.").partition(".")[2]
        return inner.startswith(f"{self.family.attention}.")

    def shapes(self) -> list[BlockShape]:
        """Return the names and sizes of all blocks."""
        return [
            BlockShape(
                f"{self._prefix}.{index}",
                attention=_num_parameters(block, self.family.attention),
                mlp=sum(_num_parameters(block, name) for name in (self.family.mlp, *_linears(self.family.around_mlp, block))),
                size=_num_parameters(block, ""),
            )
            for index, block in enumerate(self.blocks)
        ]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Return block `index`'s units: full module name to module, in the order of the computation.

        Raises: EvoPressError if a module that the family promises is missing or no plain linear layer.
        """
        found: dict[str, nn.Linear] = {}
        for name in self.family.linears:
            full = f"{self._prefix}.{index}.{name}"
            try:
                module = self.blocks[index].get_submodule(name)
            except AttributeError:
                module = None
            if type(module) is not nn.Linear:
                kind = "missing" if module is None else f"a {type(module).__name__}"
                raise EvoPressError(
                    f"{full} is {kind}, expected a plain linear layer as in other {self.family.name} models: mixture-of-experts "
                    "and other special blocks are not supported"
                )
            found[full] = module
        return found

    @contextmanager
    def on_device(self, index: int, *, dense: bool = True) -> Iterator[nn.Module]:
        """Hold block `index` on the compute device, where the parts outside the blocks always are.

        What lies in host memory stays there, untouched, and is the block's again afterwards: nothing travels back.

        Args: dense: with its linears' weights; False leaves them empty there, for whoever gives the block levels.
        """
        if index >= len(self.blocks):
            yield self._outside[index - len(self.blocks)].module
            return
        block = self.blocks[index]
        if not self.offload:
            yield block
            return
        left_out = set() if dense else {id(linear.weight) for linear in self.linears(index).values()}
        at_home = [(tensor, tensor.data) for tensor in (*block.parameters(), *block.buffers())]
        try:
            for tensor, data in at_home:
                tensor.data = data.new_empty(0, device=self.device) if id(tensor) in left_out else self._carried(data)
            yield block
        finally:
            for tensor, data in at_home:
                tensor.data = data

    def _carried(self, data: Tensor) -> Tensor:
        """Return a copy on the compute device."""
        return data.to(self.device)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the first block, [b, l, d], for token ids int64 [b, l]."""
        caught: list[Tensor] = []

        def stop(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            caught.append(hidden)
            raise _Stop

        with self._replaced_forwards([stop]):
            try:
                self.decoder(input_ids=ids.to(self.device), use_cache=False)
            except _Stop:
                return caught[0]
        raise AssertionError("the decoder never called its first block")

    def run(self, index: int, hidden: Tensor, *, fused: bool = False, gradients: bool = False) -> Tensor:
        """Run block `index` on hidden states [b, l, d] and return [b, l, d]; the block must be on the device.

        Args:
            fused: through torch.compile, compiled once for all blocks; hooks on the block's modules are then not called.
            gradients: let torch record what is needed to go back.
        """
        with torch.set_grad_enabled(gradients):
            return self._run(index, hidden, fused=fused)

    def _run(self, index: int, hidden: Tensor, *, fused: bool) -> Tensor:
        with torch.no_grad():
            call = self._captured(hidden.shape[1])[index]
        if fused and self._fused is None:
            self._fused = [torch.compile(block, dynamic=True) for block in self.blocks]
        block = self._fused[index] if fused and self._fused is not None else self.blocks[index]
        output = block(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def finish(self, hidden: Tensor, *, gradients: bool = False) -> Tensor:
        """Apply what follows the last block (final norm, OPT's projection): [b, l, d] to the last hidden state."""
        with torch.set_grad_enabled(gradients):
            for name in self.family.after_blocks:
                module = getattr(self.decoder, name, None)
                if module is not None:
                    hidden = module(hidden)
        return hidden

    def prepare(self, length: int) -> None:
        """Capture what the blocks get for sequences of `length` tokens; runs a block on zeros, so do it before hooking modules."""
        self._captured(length)

    def _captured(self, length: int) -> list[_Call]:
        """What each block gets beside its hidden states, for sequences of `length` tokens, captured once per length.

        Captured with a batch of one; masks and rotary embeddings broadcast over larger batches (`self_check` compares).
        """
        if length not in self._calls:
            if len(self._calls) >= 8:  # cut sequences come in few lengths; do not hold masks of forgotten ones
                self._calls.clear()
            ids = torch.zeros(1, length, dtype=torch.int64, device=self.device)
            first: list[_Call] = []

            def stop(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                first.append(_Call(args, kwargs))
                raise _Stop

            with self._replaced_forwards([stop]):
                try:
                    self.decoder(input_ids=ids, use_cache=False)
                except _Stop:
                    pass
            with self.on_device(0):
                hidden = torch.zeros(1, length, self.hidden_size, dtype=self.dtype, device=self.device)
                returns_tuple = isinstance(self.blocks[0](hidden, *first[0].args, **first[0].kwargs), tuple)
            calls: list[_Call] = []

            def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                calls.append(_Call(args, kwargs))
                return (hidden,) if returns_tuple else hidden

            with self._replaced_forwards([record] * len(self.blocks)):
                self.decoder(input_ids=ids, use_cache=False)
            self._calls[length] = calls
        return self._calls[length]

    @contextmanager
    def _replaced_forwards(self, forwards: list[Callable[..., Any]]) -> Iterator[None]:
        """Let the first blocks' forwards be these functions for a moment."""
        blocks = self.blocks[: len(forwards)]
        before = [block.__dict__.get("forward") for block in blocks]
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block, own in zip(blocks, before, strict=True):
                if own is None:
                    del block.forward
                else:  # of a dropped block
                    block.forward = own

    def head(self) -> Head:
        """Return the projection from last hidden states to logits, with the weight that is in place now."""
        config = self.model.config
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        return Head(
            weight=output.weight.data, bias=getattr(output, "bias", None), softcap=getattr(config, "final_logit_softcapping", None)
        )

    @torch.no_grad()
    def self_check(self, *, length: int = 24) -> float:
        """Compare block-by-block logits with the whole model's on two short made-up sequences; return the largest difference.

        Raises: EvoPressError if the logits are not finite, or if they differ by more than rounding explains.
        """
        vocabulary = self.head().weight.shape[0]
        ids = (torch.arange(2 * length, device=self.device).reshape(2, length) * 7919 + 11) % vocabulary
        hidden = self.embed(ids)
        for index in range(len(self.blocks)):
            with self.on_device(index):
                hidden = self.run(index, hidden)
        mine = self.head().logits(self.finish(hidden))
        if not bool(torch.isfinite(mine).all()):
            what, _ = self.where_non_finite(ids) or ("the logits", 0)
            raise EvoPressError(f"the model's logits are not finite in {self.dtype}, first {what}: {self.advice}")
        if self.offload:  # the whole model does not fit the device, so there is nothing to compare with
            return 0.0
        whole = self.model(input_ids=ids, use_cache=False).logits.float()
        difference = float((mine - whole).abs().max())
        scale = float(whole.abs().max())
        tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}[self.dtype]
        if difference > tolerance * max(scale, 1.0):
            raise EvoPressError(
                f"running {self.family.name} block by block changes its logits by {difference:.3g} (largest logit {scale:.3g}): "
                "this version of transformers calls the blocks in a way the adapter does not know; use fitness.evaluator=plain"
            )
        return difference

    @torch.no_grad()
    def where_non_finite(self, ids: Tensor) -> tuple[str, int] | None:
        """Name what first is not finite, a weight or else a block's output, and the first of the sequences, token ids int64 [b, l].

        None if all is finite. One sequence at a time and slow: for error messages only.
        """
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                return f"the weight {name}", 0
        for row, sequence in enumerate(ids.split(1)):
            if (what := self._where_non_finite(sequence)) is not None:
                return what, row
        return None

    def _where_non_finite(self, ids: Tensor) -> str | None:
        hidden = self.embed(ids)
        if not bool(torch.isfinite(hidden).all()):
            return "the embedding"
        for index in range(len(self.blocks)):
            with self.on_device(index):
                hidden = self.run(index, hidden)
            if not bool(torch.isfinite(hidden).all()):
                return f"the output of {self.block_name(index)}"
        return None if bool(torch.isfinite(self.head().logits(self.finish(hidden))).all()) else "the logits"

    def block_name(self, index: int) -> str:
        """Return a block's full module name: "model.layers.0"."""
        return f"{self._prefix}.{index}"

    @property
    def advice(self) -> str:
        """Say what to do about numbers that are not finite."""
        wider = "use model.dtype=bfloat16 or model.dtype=float32, or " if self.dtype == torch.float16 else ""
        return f"{wider}check the model's weights"


def _num_parameters(block: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in block.get_submodule(name).parameters())


def _linears(names: tuple[str, ...], block: nn.Module) -> list[str]:
    return [name for name in names if isinstance(block.get_submodule(name), nn.Linear)]


@dataclass(frozen=True)
class Head:
    """The projection from last hidden states to logits, with Gemma 2's soft-capping where the model has it."""

    weight: Tensor
    """[V, d], the model's dtype."""
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [..., V] of last hidden states [..., d]; the product runs in the model's dtype."""
        return self.scores(hidden).float()

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of last hidden states [..., d] in the model's dtype."""
        return self._capped(nn.functional.linear(hidden, self.weight, self.bias))

    def logits_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return float32 logits [T, k] of k tokens int64 [T, k] only, from last hidden states [T, d]."""
        logits = torch.einsum("td,tkd->tk", hidden, self.weight[tokens])
        return self._capped(logits if self.bias is None else logits + self.bias[tokens]).float()

    def _capped(self, logits: Tensor) -> Tensor:
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits
