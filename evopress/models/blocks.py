"""Run a causal language model block by block.

What enters the first block, and what every block gets beside its hidden states (masks, rotary embeddings, positions), is captured
from the model's own forward, so that it is the model's whatever the family.

Shapes: b sequences, l tokens each, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from evopress.endings import is_out_of_memory
from evopress.errors import EvoPressError, reason_of
from evopress.models.calls import Call, Form, as_returned, first_of, returned
from evopress.models.experts import (
    ExpertLinear,
    calls_of_experts,
    chosen_share,
    held_per_token,
    kind_of,
    linears_of,
    look_again,
    loop,
    named_linear,
    together,
)
from evopress.models.families import Family, Parts
from evopress.models.head import Head, scale_of, softcap_of
from evopress.models.looking import look_at, say
from evopress.models.outline import is_linear
from evopress.models.routing import expert_layer
from evopress.models.slots import Slot, outside_slots
from evopress.units import BLOCKS, EMBEDDING


@dataclass(frozen=True)
class ExpertShape:
    """What a layer of experts is called and how many there are."""

    name: str
    """Full name of the module that holds them: "model.layers.0.mlp.experts"."""
    count: int
    chosen: int
    """How many of them a token is sent to."""
    size: int
    """Weights of one expert, biases and its row of the router included."""


@dataclass(frozen=True)
class BlockShape:
    """What a block is called and how many weights its parts have, biases included."""

    name: str
    """Full module name: "model.layers.0"."""
    attention: int = 0
    mlp: int = 0
    size: int = 0
    """Of the whole block, norms included."""
    kinds: tuple[str, ...] = ("attention", "mlp")
    """Which of them it has."""
    experts: ExpertShape | None = None
    """Its layer of experts, where it has one whose router is found."""


def bytes_of(module: nn.Module) -> int:
    """Return the bytes of a module's parameters, of a shared one once."""
    return sum(parameter.nbytes for parameter in module.parameters())


@contextmanager
def by_blocks(family: Family) -> Iterator[None]:
    """Turn whatever a model raises when its blocks are first called alone into one sentence; too little memory stays what it is."""
    try:
        yield
    except EvoPressError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise EvoPressError(
            f"running {family.name} block by block failed ({reason_of(error)}): this model or this version of "
            f"transformers calls its blocks in a way that the adapter does not know; {_instead(family)}"
        ) from error


def _instead(family: Family) -> str:
    return "choose another model" if family.is_found else "use fitness.evaluator=plain, or another model"


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
        self.known_as: Any = None
        """See `ranks.Known`."""
        self.device = torch.device(device)
        self.offload = offload and self.device.type != "cpu"
        self.decoder: nn.Module = model.get_submodule(family.decoder)
        self.blocks: list[nn.Module] = list(self.decoder.get_submodule(family.blocks).children())
        self._prefix = family.prefix
        self._outside = outside_slots(model, include)
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._by_batch = False  # what blocks get beside their hidden states depends on the number of sequences
        self._form: Form | None = None
        self._fused: list[Callable[..., Any]] | None = None
        if next(model.parameters()).is_meta:  # an outline, of which shapes alone are asked
            return
        self._place()
        if family.is_found:
            loop(model)
            found = look_at(self)
            self.family, self._form, self._by_batch = found.family, found.form, found.by_batch
            say(self)

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
        """Numbers that pass from block to block for a token; more than the model's own where several streams run side by side."""
        if self._form is not None:
            return self._form.size
        config: Any = self.model.config
        return int(config.get_text_config().hidden_size)

    @property
    def inner_size(self) -> int:
        """Width of the widest MLP, as the model's config has it; four times the hidden size where it does not say."""
        config: Any = self.model.config
        text = config.get_text_config()
        width = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * self.hidden_size
        return max(width) if isinstance(width, (list, tuple)) else int(width)  # Gemma 3n has one for each block

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
        return {name: Slot(name, kind_of(name, linear), linear) for name, linear in self.linears(part).items()}

    def reads(self) -> dict[str, float]:
        """Return the share of a slot's weight, or of an expert, that a token reads, by name, where that is not all of it."""
        text: Any = self.model.config.get_text_config()  # type: ignore[operator,union-attr]
        slots = [slot for part in self.parts for slot in self.slots(part).values()]
        found = {slot.name: chosen_share(text, slot.module.count) for slot in slots if isinstance(slot.module, ExpertLinear)}
        for shape in self.shapes():
            if (each := shape.experts) is not None:
                found |= {f"{each.name}.{expert}": each.chosen / each.count for expert in range(each.count)}
        if self.embedding_part not in (None, self.head_part):
            found |= {slot.name: 1 / len(slot.weight) for slot in slots if slot.kind == EMBEDDING}
        return found

    def is_of_attention(self, name: str) -> bool:
        """Tell whether a block's slot of this name lies in the attention, not in the MLP."""
        if not name.startswith(f"{self._prefix}."):
            return False
        index, _, inner = name.removeprefix(f"{self._prefix}.").partition(".")
        return self.family.parts(int(index)).is_of_attention(inner)

    def shapes(self) -> list[BlockShape]:
        """Return the names and sizes of all blocks."""
        text: Any = self.model.config.get_text_config()  # type: ignore[operator,union-attr]
        return [_shape(f"{self._prefix}.{i}", block, self.family.parts(i), text) for i, block in enumerate(self.blocks)]

    @cached_property
    def widest(self) -> int:
        """Most inputs of a linear in the blocks; they never change, and a mixture of experts has tens of thousands of linears."""
        return max(slot.weight.shape[1] for index in range(len(self.blocks)) for slot in self.slots(index).values())

    def forward_bytes(self, tokens: int, length: int) -> int:
        """Return the bytes that a block's forward over so many tokens takes at its peak, its output included, by its widths.

        That is in the MLP, where its two inner products are multiplied: what it is added to, its input, and three times its width;
        or in its experts, of which one may be handed all tokens; or in attention that holds its scores.

        Args: length: of a sequence.
        """
        inside = self.most_inside(3 * self.inner_size, held_per_token)
        scores = self.scores_bytes(length)
        itemsize = self.dtype.itemsize
        return tokens * max((2 * self.hidden_size + inside) * itemsize, 8 * self.hidden_size * itemsize + scores)

    def scores_bytes(self, length: int) -> int:
        """Return the bytes of a token's attention scores in sequences of a length; 0 where attention does not hold them.

        A model without attention, such as Mamba, has no heads.
        """
        config: Any = self.model.config.get_text_config()  # type: ignore[operator,union-attr]
        if config._attn_implementation != "eager":
            return 0
        heads = getattr(config, "num_attention_heads", 0)
        return length * heads * (4 + 2 * 4)  # GPT-OSS's, Gemma 2's: as they are, masked, as probabilities

    def most_inside(self, mlp: int, of_experts: Callable[[nn.Module, Any], int]) -> int:
        """Return the most numbers of a token inside a block: those in an MLP, or in a layer of experts."""
        config: Any = self.model.config
        layers = (module for block in self.blocks for module in block.modules() if linears_of(module))
        return max([mlp, *(of_experts(layer, config.get_text_config()) for layer in layers)])

    def linears(self, index: int) -> dict[str, Any]:
        """Return block `index`'s units: full module name to module, in the order of the computation; for weights see `slots`.

        Raises: EvoPressError if a module that the family promises is missing or no plain linear layer.
        """
        found: dict[str, Any] = {}
        for name in self.family.parts(index).linears:
            full = f"{self._prefix}.{index}.{name}"
            module = named_linear(self.blocks[index], name)
            if not (is_linear(module) if self.family.is_found else type(module) is nn.Linear):
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
            look_again(block)
            yield block
        finally:
            for tensor, data in at_home:
                tensor.data = data
            look_again(block)

    def carried_bytes(self, index: int) -> int:
        """Return the bytes that a dense block's `on_device` puts beside what lies on the compute device."""
        if not self.offload or index >= len(self.blocks):
            return 0
        return sum(each.nbytes for each in self.blocks[index].parameters())

    def _carried(self, data: Tensor) -> Tensor:
        """Return a copy on the compute device."""
        return data.to(self.device)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the first block, [b, l, d], for token ids int64 [b, l]."""
        caught: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> Tensor:
            caught.append(Call.of(args, kwargs)[0].detach())  # a hook of gradient checkpointing lets it ask for gradients
            raise _Stop

        if self._form is not None and self._form.sides:
            calls = self.capture(ids.to(self.device), entering=caught)
            return self._form.packed(caught[0], [call.tensors() for call in calls])
        with self.replaced_forwards([stop]):
            try:
                self.decoder(input_ids=ids.to(self.device), use_cache=False)
            except _Stop:
                return caught[0] if self._form is None else self._form.packed(caught[0])
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
            call = self._captured(*hidden.shape[:2])[index]
        if fused and self._fused is None:
            self._fused = [torch.compile(block, dynamic=True) for block in self.blocks]
        block = self._fused[index] if fused and self._fused is not None else self.blocks[index]
        if self._form is None:
            output = call.run(block, hidden)
            return first_of(output)
        inside, beside = self._form.unpacked(hidden)
        output = self._form.with_sides(call, index, beside).run(block, inside)
        return self._form.again(first_of(output), beside)

    def finish(self, hidden: Tensor, *, gradients: bool = False) -> Tensor:
        """Apply what follows the last block (final norm, OPT's projection): [b, l, d] to the last hidden state."""
        with torch.set_grad_enabled(gradients):
            if self.family.is_found:
                return self._finish_as_decoder(hidden)
            for name in self.family.after_blocks:
                module = getattr(self.decoder, name, None)
                if module is not None:
                    hidden = module(hidden)
        return hidden

    def _finish_as_decoder(self, hidden: Tensor) -> Tensor:
        """Let the decoder itself do what it does after its last block, with blocks that do nothing before that."""
        if self._form is not None:
            hidden, _ = self._form.unpacked(hidden)
            batch, length = self._form.batch_and_length(hidden)
        else:
            batch, length = hidden.shape[:2]
        stubs = [self._returning(index) for index in range(len(self.blocks) - 1)]
        stubs.append(self._returning(len(self.blocks) - 1, hidden))
        ids = torch.zeros(batch, length, dtype=torch.int64, device=self.device)
        with self.replaced_forwards(stubs):
            output: Tensor = self.decoder(input_ids=ids, use_cache=False)[0]
        return output

    def _returning(self, index: int, instead: Tensor | None = None) -> Callable[..., Any]:
        """Return a forward that gives back what enters block `index`, or something else, in the form that the block does."""
        count = self.family.parts(index).returns.get("", 0)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return as_returned(Call.of(args, kwargs)[0] if instead is None else instead, count)

        return forward

    def prepare(self, length: int) -> None:
        """Capture what the blocks get for sequences of `length` tokens; runs a block on zeros, so do it before hooking modules."""
        self._captured(1, length)

    def _captured(self, batch: int, length: int) -> list[Call]:
        """What each block gets beside its hidden states, for sequences of `length` tokens, captured once per length.

        Captured with a batch of one, of which masks and rotary embeddings broadcast over larger ones (`self_check` compares), or
        with as many sequences as there are where a look at the model has shown that it matters.
        """
        key = (batch if self._by_batch else 1, length)
        if key not in self._calls:
            if len(self._calls) >= 8:  # cut sequences come in few lengths; do not hold masks of forgotten ones
                self._calls.clear()
            self._calls[key] = self.capture(torch.zeros(key, dtype=torch.int64, device=self.device))
        return self._calls[key]

    def capture(self, ids: Tensor, family: Family | None = None, *, entering: list[Tensor] | None = None) -> list[Call]:
        """Return what each block gets beside its hidden states, for token ids int64 [b, l].

        Args:
            family: what is known of the model; None: what it was wrapped with.
            entering: takes the hidden states that enter the first block.
        """
        family = family or self.family
        counts = [family.parts(index).returns.get("", 0) for index in range(len(self.blocks))]
        if not family.is_found:
            first: list[Call] = []

            def stop(*args: Any, **kwargs: Any) -> Tensor:
                first.append(Call.of(args, kwargs)[1])
                raise _Stop

            with self.replaced_forwards([stop]):
                try:
                    self.decoder(input_ids=ids, use_cache=False)
                except _Stop:
                    pass
            with self.on_device(0):
                hidden = torch.zeros(*ids.shape, self.hidden_size, dtype=self.dtype, device=self.device)
                counts = [returned(first[0].run(self.blocks[0], hidden))] * len(self.blocks)
        calls: list[Call] = []

        def record(count: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = Call.of(args, kwargs)
                if entering is not None and not calls:
                    entering.append(hidden.detach())
                calls.append(call)
                return as_returned(hidden, count)

            return forward

        with self.replaced_forwards([record(count) for count in counts]):
            self.decoder(input_ids=ids, use_cache=False)
        return calls

    @contextmanager
    def replaced_forwards(self, forwards: list[Callable[..., Any]]) -> Iterator[None]:
        """Let the first blocks' forwards be these functions for a moment."""
        blocks = self.blocks[: len(forwards)]
        before = [block.__dict__.get("forward") for block in blocks]
        try:
            for block, forward in zip(blocks, forwards, strict=True):
                block.forward = forward
            yield
        finally:
            for block, own in zip(blocks, before, strict=True):
                if own is None:
                    block.__dict__.pop("forward", None)
                else:  # of a dropped block
                    block.forward = own

    def head(self) -> Head:
        """Return the projection from last hidden states to logits, with the weight that is in place now."""
        config: Any = self.model.config
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        text = config.get_text_config()
        return Head(weight=output.weight.data, bias=getattr(output, "bias", None), softcap=softcap_of(text), scale=scale_of(text))

    @torch.no_grad()
    def self_check(self, *, length: int = 24, full_length: int | None = None) -> float:
        """Compare block-by-block logits with the whole model's on two short made-up sequences; return the largest difference.

        What enters a block is run in two pieces, the second sequence before the first, as a search does: nothing that a model
        keeps between calls may show. The whole model gets the same two pieces: in bfloat16 some CPUs' products of 24 rows and of
        48 differ by so much that logits of the same model are 6% apart.

        Args: full_length: compare the last hidden states of one sequence of so many tokens, too: windows and switches of
            positional embeddings only show there.

        Raises: EvoPressError if the logits are not finite, or if they differ by more than rounding explains.
        """
        vocabulary = self.head().weight.shape[0]
        ids = (torch.arange(2 * length, device=self.device).reshape(2, length) * 7919 + 11) % vocabulary
        hidden = self._through(ids)
        mine = self.head().logits(self.finish(hidden))
        if not bool(torch.isfinite(mine).all()):
            what, _ = self.where_non_finite(ids) or ("the logits", 0)
            raise EvoPressError(f"the model's logits are not finite in {self.dtype}, first {what}: {self.advice}")
        if self.offload:  # the whole model does not fit the device, so there is nothing to compare with
            return 0.0
        with calls_of_experts(self.model) as calls:
            whole = torch.cat([self.model(input_ids=each[None], use_cache=False).logits for each in ids]).float()
        difference = self._compare(mine, whole, "logit")
        # Layer by layer on the same tokens: a rounding that sends one of them to another expert would change all that follows.
        with together(self.model):
            for layer, given, named, made in calls:
                self._compare(made.float(), layer(*given, **named).float(), "experts' output")
        if full_length is not None and full_length > length:
            ids = (torch.arange(full_length, device=self.device)[None] * 7919 + 11) % vocabulary
            hidden = self.finish(self._through(ids))
            self._compare(hidden, self.decoder(input_ids=ids, use_cache=False)[0], f"last hidden state of {full_length} tokens")
        return difference

    def _through(self, ids: Tensor) -> Tensor:
        """Return what leaves the last block, the last sequence run before the others."""
        hidden = self.embed(ids)
        for index in range(len(self.blocks)):
            with self.on_device(index):
                last = self.run(index, hidden[-1:])
                hidden = torch.cat([self.run(index, hidden[:-1]), last]) if len(hidden) > 1 else last
        return hidden

    def _compare(self, mine: Tensor, whole: Tensor, what: str) -> float:
        """Return the largest difference, or raise EvoPressError where rounding does not explain it."""
        difference, scale = float((mine - whole).abs().max()), float(whole.abs().max())
        tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}[self.dtype]
        if mine.shape != whole.shape or difference > tolerance * max(scale, 1.0):
            raise EvoPressError(
                f"running {self.family.name} block by block changes its {what}s by {difference:.3g} (largest {scale:.3g}): "
                "this model or this version of transformers calls its blocks in a way that the adapter does not know; "
                f"{_instead(self.family)}"
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


def _shape(name: str, block: nn.Module, parts: Parts, config: Any) -> BlockShape:
    beside = [each for each in parts.around_mlp if is_linear(block.get_submodule(each))]
    attention, mlp = (sum(_num_parameters(block, each) for each in names) for names in (parts.attention, (*parts.mlp, *beside)))
    experts = None
    if layer := expert_layer(block):
        parameters = (each for name_ in (layer.name, layer.router) for each in block.get_submodule(name_).parameters())
        of_all = sum(parameter.numel() for parameter in parameters if parameter.shape[0] == layer.count)
        chosen = round(chosen_share(config, layer.count) * layer.count)
        experts = ExpertShape(f"{name}.{layer.name}", layer.count, chosen, of_all // layer.count)
    return BlockShape(name, attention=attention, mlp=mlp, size=_num_parameters(block, ""), kinds=parts.kinds, experts=experts)


def _num_parameters(block: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in block.get_submodule(name).parameters())
