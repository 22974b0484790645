"""Calibration text on its way through the blocks: the activations that enter each, and their Hessians.

Only one block and its inputs are on the device at a time.

Shapes: N sequences of L tokens, d hidden size, C input columns of a linear.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evopress.compress.asymmetric import Lost, PairedSum, Seen
from evopress.compress.hessian import HessianSum
from evopress.errors import EvoPressError
from evopress.files import explained, make_folder, temporary_beside
from evopress.levels.hessians import BlockHessians, HessianStore
from evopress.levels.passage import Passage, room_for_activations
from evopress.models.blocks import BlockModel
from evopress.models.experts import ExpertLinear
from evopress.progress import track

logger = logging.getLogger(__name__)
LEAST_TOKENS = 128
"""Of calibration text that an expert must have seen to be compressed by its own Hessian."""


class _AllSeen(Exception):
    """All inputs of a block have been seen, so that its forward may end."""


def complete_hessians(
    store: HessianStore, blocks: BlockModel, tokens: Tensor, *, batch_tokens: int = 4096, activations: str = "memory"
) -> None:
    """Compute what is missing or damaged of a store, in one walk over the blocks up to the last such one.

    Args:
        blocks: the dense model; given back as it was.
        tokens: calibration token ids int64 [N, L], those that the store is of.
        activations: where they live between blocks: "memory" (of the host) or "disk".
    """
    missing = [index for index in range(len(blocks.blocks)) if index not in store]
    if not missing:
        return
    make_folder(store.folder)
    batch = max(batch_tokens // tokens.shape[1], 1)
    buffer = activations_of(store.folder, activations, blocks, tokens, batch)
    for index in track(range(missing[-1] + 1), "computing Hessians"):
        with blocks.on_device(index):
            if index in missing:
                store.write(index, collect_hessians(blocks, index, buffer, batch, advance=index < missing[-1]))
            else:
                propagate(blocks, index, buffer, batch, {})


def activations_of(folder: Path, where: str, blocks: BlockModel, tokens: Tensor, batch: int) -> Tensor:
    """Return the hidden states that enter the first block, [N, L, d], in memory or in a file that nobody else sees."""
    shape = (*tokens.shape, blocks.hidden_size)
    if where == "disk":
        count = tokens.numel() * blocks.hidden_size
        buffer = _mapped(temporary_beside(folder / "activations"), count, blocks.dtype).reshape(shape)
    else:
        buffer = room_for_activations(shape, blocks.dtype, blocks.device)
    finite = []
    for start in range(0, len(tokens), batch):
        embedded = blocks.embed(tokens[start : start + batch])
        finite.append(torch.isfinite(embedded).all())
        buffer[start : start + batch] = embedded.to(buffer.device)
    if (broken := _first_not_finite(finite, batch, len(tokens))) is not None:
        raise EvoPressError(f"the embedding is not finite, first on {broken}: {blocks.advice}")
    return buffer


def collect_hessians(blocks: BlockModel, index: int, buffer: Tensor, batch: int, *, advance: bool = False) -> BlockHessians:
    """Run block `index` over activations [N, L, d] and sum one Hessian per distinct input, not per linear.

    Linears that are handed the same tensor (q, k and v; gate and up) share the first one's Hessian.

    Args: advance: replace the activations by what the dense block makes of them, in the same forward. Otherwise the forward ends,
        from the second batch on, with the last of these inputs: what the block would make of it is nobody's.

    Raises: EvoPressError if an activation is not finite, with the unit's name and the first sequences.
    """
    blocks.prepare(buffer.shape[1])  # not under the hooks
    linears = blocks.linears(index)
    owners: dict[str, str] = {}
    sums: dict[str, HessianSum] = {}
    # Tokens that experts have seen; they are called with what is routed to them, or not at all.
    experts: dict[str, Any] = {name: 0 for name, linear in linears.items() if isinstance(linear, ExpertLinear)}
    alive: list[tuple[str, Tensor]] = []  # inputs of this forward, held so that no address is used twice

    def caught(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            owner = next((o for o, seen in alive if seen.data_ptr() == x.data_ptr() and seen.shape == x.shape), name)
            assert owners.setdefault(name, owner) == owner, f"{name} shares its input with {owner} in one batch only"
            if owner == name:
                alive.append((name, x))
                # OPT hands its MLP [b·l, d]; n counts sequences, so give them back their axis.
                X = x.reshape(len(current) if name not in experts else 1, -1, x.shape[-1])
                if name in experts:
                    experts[name] += x.any(-1).sum() if module.routed is None else len(x)
                sums.setdefault(name, HessianSum(x.shape[-1], device=x.device)).add(X)
                if not advance and start and len(alive) == len(sums) and not experts:
                    raise _AllSeen

        return hook

    handles = [module.register_forward_pre_hook(caught(name)) for name, module in linears.items()]
    finite: list[Tensor] = []  # what is not finite inside a block is not so where it ends; read once, so that no batch waits for it
    try:
        passage = Passage(buffer, batch, blocks.device)
        for start, current in passage:
            try:
                output = blocks.run(index, current)
            except _AllSeen:
                output = alive[-1][1]
            finite.append(torch.isfinite(output).all())
            if advance:
                passage.put(start, output)
            alive.clear()
    finally:
        for handle in handles:
            handle.remove()
    idle = [name for name in linears if name not in owners and name not in experts]
    if idle:
        raise EvoPressError(
            f"{idle[0]} was never called in its block's forward: its family's adapter names a module that is not used"
        )
    if (where := _first_not_finite(finite, batch, len(buffer))) is not None:
        broken = next((name for name, linear in linears.items() if not bool(torch.isfinite(linear.weight).all())), None)
        unit = next((owner for owner, total in sums.items() if not total.finite), None)
        what = f"the input activations of {unit} are" if unit else f"the output of {blocks.block_name(index)} is"
        what = what if broken is None else f"the weight of {broken} is"
        raise EvoPressError(f"{what} not finite, first on {where}: {blocks.advice}")
    _pool_experts(experts, owners, sums)
    hessians = {}
    for owner, total in sums.items():
        try:
            hessians[owner] = total.result()
        except EvoPressError as error:
            raise type(error)(f"{', '.join(name for name in linears if owners[name] == owner)}: {error}") from None
    return BlockHessians(owners, hessians)


def _pool_experts(experts: Mapping[str, Any], owners: dict[str, str], sums: dict[str, HessianSum]) -> None:
    """Give experts that saw few tokens one Hessian of all experts of their layer, and say so."""
    layers: dict[tuple[str, str], list[str]] = {}
    for name in experts:
        outer, _, part = name.rpartition(".")
        layers.setdefault((outer.rpartition(".")[0], part), []).append(name)
    for (layer, part), names in layers.items():
        few = [name for name in names if experts[name] < LEAST_TOKENS]
        if not few:
            continue
        seen = [sums[name] for name in names if name in sums]
        if not seen:
            raise EvoPressError(f"no calibration token reached an expert of {layer}: use more text (data.calibration_tokens)")
        together = HessianSum.together(seen)
        for name in few:
            sums.pop(name, None)
            owners[name] = few[0]
        sums[few[0]] = together
        numbers = [name.removeprefix(f"{layer}.").partition(".")[0] for name in few]
        logger.warning(
            "%s: %d of %d experts saw fewer than %d calibration tokens (%s) and get the mean Hessian of all for their %s",
            *(layer, len(few), len(names), LEAST_TOKENS, ", ".join(numbers[:8]) + (", ..." if len(numbers) > 8 else ""), part),
        )


def head_hessian(blocks: BlockModel, buffer: Tensor, batch: int) -> BlockHessians:
    """Sum the Hessian of the head's inputs, from activations [N, L, d] that left the last block; theirs are as they were.

    Raises: EvoPressError if one is not finite.
    """
    assert blocks.head_part is not None
    (name,) = blocks.slots(blocks.head_part)
    total: HessianSum | None = None
    finite = []
    for _, current in Passage(buffer, batch, blocks.device):
        last = blocks.finish(current)
        finite.append(torch.isfinite(last).all())
        total = HessianSum(last.shape[-1], device=last.device) if total is None else total
        total.add(last)
    if (where := _first_not_finite(finite, batch, len(buffer))) is not None:
        raise EvoPressError(f"the last hidden states are not finite, first on {where}: {blocks.advice}")
    assert total is not None
    try:
        return BlockHessians({name: name}, {name: total.result()})
    except EvoPressError as error:
        raise type(error)(f"{name}: {error}") from None


def collect_lost(
    blocks: BlockModel, index: int, name: str, dense: Tensor, buffer: Tensor, batch: int, weights: Mapping[str, Tensor]
) -> Lost:
    """Sum what one input of a block, or the head's, has lost: as it is, against as it is with weights in their places.

    Both forwards of the block end where that input is seen.

    Args:
        name: a linear that has that input.
        dense: activations [N, L, d] that enter the dense block.
        buffer: those that enter it in the compressed model; both are as they were afterwards.
        weights: of the compressed block, by unit.
    """
    total = PairedSum()
    adding = _adding(blocks, index, dense[:batch].to(blocks.device))
    walks = (Passage(each, batch, blocks.device) for each in (dense, buffer))
    for (_, exact), (_, current) in zip(*walks, strict=True):
        own = _seen_at(blocks, index, name, exact, adding)
        with weights_placed(blocks, index, weights):
            total.add(own, _seen_at(blocks, index, name, current, adding))
    return total.result()


def _seen_at(blocks: BlockModel, index: int, name: str, state: Tensor, adding: tuple[str, str] | None) -> Seen:
    """Return what a linear of a block, or the head, has where `state` enters the block, or has left the last.

    Args: adding: the two linears whose outputs the block adds to what enters it, in this order.
    """
    if index == blocks.head_part:
        return Seen(blocks.finish(state))
    linears, stream, inputs = blocks.linears(index), [state], []

    def added(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        stream.append(stream[-1] + output.reshape(state.shape))

    def caught(module: Any, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])
        raise _AllSeen

    handles = [linears[name].register_forward_pre_hook(caught)]
    handles += [linears[each].register_forward_hook(added) for each in adding or () if each != name]
    try:
        with suppress(_AllSeen):
            blocks.run(index, state)
    finally:
        for handle in handles:
            handle.remove()
    # OPT hands its MLP [b·l, d]; n counts sequences.
    return Seen(inputs[0].reshape(*state.shape[:2], -1), stream[-1] if adding is not None and name in adding else None)


def _adding(blocks: BlockModel, index: int, state: Tensor) -> tuple[str, str] | None:
    """Return the last linears of a block's attention and MLP where it adds just their outputs to what enters it, else None.

    Blocks that normalise these first, or have other parts, do not.
    """
    if index >= len(blocks.blocks):
        return None
    linears = blocks.linears(index)
    attention = [name for name in linears if blocks.is_of_attention(name)]
    others = [name for name in linears if name not in attention]
    if not attention or not others:
        return None
    outputs = []
    names = (attention[-1], others[-1])
    handles = [linears[name].register_forward_hook(lambda module, args, output: outputs.append(output)) for name in names]
    try:
        left = blocks.run(index, state)
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != 2 or any(output.numel() != state.numel() for output in outputs):
        return None
    together = state + outputs[0].reshape(state.shape) + outputs[1].reshape(state.shape)
    return names if bool((together - left).norm() <= 0.02 * (left - state).norm()) else None


@contextmanager
def weights_placed(blocks: BlockModel, index: int, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold weights in the slots of a part; what was there is there again afterwards."""
    slots = blocks.slots(index)
    before = {name: slots[name].weight for name in weights}
    try:
        for name, weight in weights.items():
            slots[name].put(weight.to(blocks.device))
        yield
    finally:
        for name, weight in before.items():
            slots[name].put(weight)


def propagate(blocks: BlockModel, index: int, buffer: Tensor, batch: int, decoded: Mapping[str, Tensor]) -> None:
    """Replace activations [N, L, d] by what block `index` makes of them, with these weights in place of the dense ones."""
    with weights_placed(blocks, index, decoded):
        finite = []
        passage = Passage(buffer, batch, blocks.device)
        for start, current in passage:
            output = blocks.run(index, current)
            finite.append(torch.isfinite(output).all())
            passage.put(start, output)
    if (where := _first_not_finite(finite, batch, len(buffer))) is not None:
        compressed = ", at the level that activations leave through," if decoded else ""
        raise EvoPressError(
            f"the output of {blocks.block_name(index)}{compressed} is not finite, first on {where}: {blocks.advice}"
        )


def _mapped(path: Path, count: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor in a file that is gone when the tensor is, or the process, however that ends.

    Raises: EvoPressError if the disk has no room. It is taken here: a mapped file that finds none later ends the process.
    """
    try:
        with path.open("xb") as file:
            _take_room(file.fileno(), count * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise explained(error, path) from error
    except RuntimeError as error:  # torch's own, on opening or mapping
        raise EvoPressError(f"{path} cannot be mapped ({str(error).splitlines()[0]}): use level_db.activations=memory") from error
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _take_room(descriptor: int, size: int) -> None:
    """Fill a new file with zeros that have their place on the disk."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:  # not every system has it, nor every file system
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
        zeros = bytes(2**20)
        for start in range(0, size, len(zeros)):
            os.write(descriptor, zeros[: size - start])


def _first_not_finite(finite: list[Tensor], batch: int, count: int) -> str | None:
    """Name the first batch of sequences that is not finite, given a flag, bool [], for each of them; None if all are."""
    flags = torch.stack(finite).tolist() if finite else []
    if all(flags):
        return None
    first = flags.index(False) * batch
    return f"calibration sequences {first} to {min(first + batch, count) - 1}"
