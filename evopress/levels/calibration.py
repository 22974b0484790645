"""Calibration text on its way through the blocks: the activations that enter each, and their Hessians.

Only one block and its inputs are on the device at a time.

Shapes: N sequences of L tokens, d hidden size, C input columns of a linear.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from evopress.compress.asymmetric import Lost, PairedSum, Seen
from evopress.compress.hessian import HessianSum, ProductSum
from evopress.errors import EvoPressError, first_line
from evopress.files import explained, make_folder, temporary_beside
from evopress.levels.hessians import BlockHessians, HessianStore
from evopress.levels.passage import Passage, room_for_activations
from evopress.models.blocks import BlockModel
from evopress.models.experts import ExpertLinear
from evopress.progress import track
from evopress.ranks import InPairs, batch_within_share, collective, on_all_ranks, on_rank_zero, shares, sum_over_ranks

logger = logging.getLogger(__name__)
Sum = TypeVar("Sum", bound=ProductSum)
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
    if missing:
        make_folder(store.folder)
        _complete(blocks, store, missing, tokens, batch_tokens, activations)


@collective
def _complete(
    blocks: BlockModel, store: HessianStore, missing: Sequence[int], tokens: Tensor, batch_tokens: int, activations: str
) -> None:
    batch, mine = batch_within_share(len(tokens), max(batch_tokens // tokens.shape[1], 1)), shares(len(tokens))
    (room,) = room_for_walks(store.folder, activations, blocks, tokens, mine)
    buffer = activations_of(room, blocks, tokens, batch, mine)
    for index in track(range(missing[-1] + 1), "computing Hessians"):
        with blocks.on_device(index):
            if index in missing:
                hessians = collect_hessians(blocks, index, buffer, batch, advance=index < missing[-1], mine=mine)
                on_rank_zero(partial(store.write, index, hessians))
            else:
                propagate(blocks, index, buffer, batch, {}, mine=mine)


def room_for_walks(
    folder: Path, where: str, blocks: BlockModel, tokens: Tensor, mine: Sequence[range] | None = None, *, walks: int = 1
) -> list[Tensor]:
    """Return room for the hidden states [n, L, d] of each of some walks, in memory or in a file that nobody else sees.

    All of them lie in the same place, of which is decided once: whoever plans asks about all of them, too.

    Args: mine: as in `activations_of`.
    """
    count = len(tokens) if mine is None else mine[-1].stop - mine[0].start
    shape = (walks, count, tokens.shape[1], blocks.hidden_size)
    if where == "disk":
        whole = _mapped(temporary_beside(folder / "activations"), math.prod(shape), blocks.dtype).reshape(shape)
    else:
        whole = room_for_activations(shape, blocks.dtype, blocks.device)
    return list(whole)


def activations_of(buffer: Tensor, blocks: BlockModel, tokens: Tensor, batch: int, mine: Sequence[range] | None = None) -> Tensor:
    """Put the hidden states that enter the first block into a buffer [n, L, d], and return it.

    Args: mine: see `shares`: those sequences alone; None: all, which are one share.
    """
    mine = [range(len(tokens))] if mine is None else list(mine)
    tokens = tokens[mine[0].start : mine[-1].stop]

    def fill() -> None:
        finite = []
        for start in range(0, len(tokens), batch):
            embedded = blocks.embed(tokens[start : start + batch])
            finite.append((mine[0].start + start, torch.isfinite(embedded).all()))
            buffer[start : start + batch] = embedded.to(buffer.device)
        if (broken := _first_not_finite(finite, batch, buffer, mine)) is not None:
            raise EvoPressError(f"the embedding is not finite, first on {broken}: {blocks.advice}")

    on_all_ranks(fill)
    return buffer


def collect_hessians(
    blocks: BlockModel,
    index: int,
    buffer: Tensor,
    batch: int,
    *,
    advance: bool = False,
    mine: Sequence[range] | None = None,
) -> BlockHessians:
    """Run block `index` over activations [N, L, d] and sum one Hessian per distinct input, not per linear.

    Linears that are handed the same tensor (q, k and v; gate and up) share the first one's Hessian.

    Args:
        advance: replace the activations by what the dense block makes of them, in the same forward. Otherwise the forward ends,
            once the inputs are known, with the last of them: what the block would make of it is nobody's.
        mine: see `shares`: the activations are those of these sequences, and each share is summed for itself; None: all are one.

    Raises: EvoPressError if an activation is not finite, with the unit's name and the first sequences.
    """
    blocks.prepare(buffer.shape[1])  # not under the hooks
    linears = blocks.linears(index)
    owners: dict[str, str] = {}
    sums: dict[str, HessianSum] = {}  # of the share at hand
    # Tokens that experts have seen; they are called with what is routed to them, or not at all.
    experts: dict[str, Any] = {name: 0 for name, linear in linears.items() if isinstance(linear, ExpertLinear)}
    alive: list[tuple[str, Tensor]] = []  # inputs of this forward, held so that no address is used twice
    inputs = 0  # in a forward, once one has ended
    current = buffer  # the batch at hand

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
                if not advance and len(alive) == inputs and not experts:
                    raise _AllSeen

        return hook

    total = InPairs[dict[str, HessianSum]](_joined)
    # What is not finite inside a block is not so where it ends; read once, so that no batch waits for it.
    finite: list[tuple[int, Tensor]] = []

    def walk() -> None:
        nonlocal current, inputs
        handles = [module.register_forward_pre_hook(caught(name)) for name, module in linears.items()]
        try:
            for first_row, passage in _passages(buffer, batch, blocks, mine):
                for start, current in passage:
                    try:
                        output = blocks.run(index, current)
                    except _AllSeen:
                        output = alive[-1][1]
                    finite.append((first_row + start, torch.isfinite(output).all()))
                    if advance:
                        passage.put(start, output)
                    inputs = len(alive)
                    alive.clear()
                total.add(dict(sums))
                sums.clear()
        finally:
            for handle in handles:
                handle.remove()
        if (where := _first_not_finite(finite, batch, buffer, mine)) is not None:
            broken = next((name for name, linear in linears.items() if not bool(torch.isfinite(linear.weight).all())), None)
            unit = next((owner for owner, each_sum in total.total.items() if not each_sum.finite), None)
            what = f"the input activations of {unit} are" if unit else f"the output of {blocks.block_name(index)} is"
            what = what if broken is None else f"the weight of {broken} is"
            raise EvoPressError(f"{what} not finite, first on {where}: {blocks.advice}")

    on_all_ranks(walk)
    found = _of_all(total, blocks.device)
    seen = on_all_ranks(lambda: (owners, {name: int(count) for name, count in experts.items()}))
    owners = {name: owner for theirs, _ in seen for name, owner in theirs.items()}
    hessians: dict[str, Tensor] = {}

    def finish() -> None:
        idle = [name for name in linears if name not in owners and name not in experts]
        if idle:
            raise EvoPressError(
                f"{idle[0]} is not used in its block's forward, so it has no calibration inputs: choose another model"
            )
        _pool_experts({name: sum(counts[name] for _, counts in seen) for name in experts}, owners, found)
        for owner in list(found):  # each sum goes when its Hessian is there
            hessians[owner] = _result(found.pop(owner), [name for name in linears if owners[name] == owner])

    on_all_ranks(finish)
    return BlockHessians(owners, hessians)


def _joined(sums: dict[str, Sum], others: dict[str, Sum]) -> dict[str, Sum]:
    """Add sums to those of the same names."""
    for name, total in others.items():
        if name in sums:
            sums[name].join(total)
        else:
            sums[name] = total
    return sums


def _of_all(added: InPairs[dict[str, Sum]], device: torch.device) -> dict[str, Sum]:
    """Return the sums over all shares of all processes, on each of them; the shares have them no more."""
    sums = added.total
    told = on_all_ranks(lambda: {name: (type(total), total.widths, total.num_sequences) for name, total in sums.items()})
    found = {}
    for name, (kind, widths, _) in {name: about for theirs in told for name, about in theirs.items()}.items():
        found[name] = sums.pop(name) if name in sums else kind(*widths, device=device)
        found[name].num_sequences = sum(theirs[name][2] for theirs in told if name in theirs)
        sum_over_ranks(found[name].total)
    return found


def _passages(buffer: Tensor, batch: int, blocks: BlockModel, mine: Sequence[range] | None) -> Iterator[tuple[int, Passage]]:
    """Yield a walk over each share of activations, with the place of its first sequence among all."""
    mine = [range(len(buffer))] if mine is None else mine
    for those in mine:
        rows = buffer[those.start - mine[0].start : those.stop - mine[0].start]
        yield those.start, Passage(rows, batch, blocks.device)


def _result(total: HessianSum, names: Sequence[str]) -> Tensor:
    try:
        return total.result()
    except EvoPressError as error:
        raise type(error)(f"{', '.join(names)}: {error}") from None


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


def head_hessian(blocks: BlockModel, buffer: Tensor, batch: int, *, mine: Sequence[range] | None = None) -> BlockHessians:
    """Sum the Hessian of the head's inputs, from activations [N, L, d] that left the last block; theirs are as they were.

    Args: mine: as in `collect_hessians`.

    Raises: EvoPressError if one is not finite.
    """
    assert blocks.head_part is not None
    (name,) = blocks.slots(blocks.head_part)
    total = InPairs[dict[str, HessianSum]](_joined)
    finite: list[tuple[int, Tensor]] = []

    def walk() -> None:
        for first_row, passage in _passages(buffer, batch, blocks, mine):
            sums: dict[str, HessianSum] = {}
            for start, current in passage:
                last = blocks.finish(current)
                finite.append((first_row + start, torch.isfinite(last).all()))
                sums.setdefault(name, HessianSum(last.shape[-1], device=last.device)).add(last)
            total.add(sums)
        if (where := _first_not_finite(finite, batch, buffer, mine)) is not None:
            raise EvoPressError(f"the last hidden states are not finite, first on {where}: {blocks.advice}")

    on_all_ranks(walk)
    found = _of_all(total, blocks.device)
    hessians: dict[str, Tensor] = {}
    on_all_ranks(lambda: hessians.update({name: _result(found[name], [name])}))
    return BlockHessians({name: name}, hessians)


def collect_lost(
    blocks: BlockModel,
    index: int,
    name: str,
    dense: Tensor,
    buffer: Tensor,
    batch: int,
    weights: Mapping[str, Tensor],
    adding: tuple[str, str] | None,
    *,
    mine: Sequence[range] | None = None,
) -> Lost:
    """Sum what one input of a block, or the head's, has lost: as it is, against as it is with weights in their places.

    Both forwards of the block end where that input is seen.

    Args:
        name: a linear that has that input.
        dense: activations [N, L, d] that enter the dense block.
        buffer: those that enter it in the compressed model; both are as they were afterwards.
        weights: of the compressed block, by unit.
        adding: what `adding_linears` returned.
        mine: as in `collect_hessians`.
    """
    total = InPairs[dict[str, ProductSum]](_joined)

    def walk() -> None:
        walks = (_passages(activations, batch, blocks, mine) for activations in (dense, buffer))
        for passages in zip(*walks, strict=True):
            paired = PairedSum()
            for (_, exact), (_, current) in zip(*(passage for _, passage in passages), strict=True):
                own = _seen_at(blocks, index, name, exact, adding)
                with weights_placed(blocks, index, weights):
                    paired.add(own, _seen_at(blocks, index, name, current, adding))
            total.add(paired.sums)

    on_all_ranks(walk)
    found = PairedSum(_of_all(total, blocks.device))
    lost: list[Lost] = []
    on_all_ranks(lambda: lost.append(found.result()))
    return lost[0]


def _seen_at(blocks: BlockModel, index: int, name: str, state: Tensor, adding: tuple[str, str] | None) -> Seen:
    """Return what a linear of a block, or the head, has where `state` enters the block, or has left the last.

    Args: adding: the two linears whose outputs the block adds to what enters it, in this order; None: it does something else.
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


def adding_linears(blocks: BlockModel, index: int, state: Tensor) -> tuple[str, str] | None:
    """Return the last linears of a block's attention and MLP where it adds just their outputs to what enters it, else None.

    Blocks that normalise these first, or have other parts, do not.

    Args: state: what enters the dense block, [b, L, d].
    """
    state = state.to(blocks.device)
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


def propagate(
    blocks: BlockModel,
    index: int,
    buffer: Tensor,
    batch: int,
    decoded: Mapping[str, Tensor],
    *,
    mine: Sequence[range] | None = None,
) -> None:
    """Replace activations [N, L, d] by what block `index` makes of them, with these weights in place of the dense ones.

    Args: mine: as in `collect_hessians`.
    """

    def walk() -> None:
        with weights_placed(blocks, index, decoded):
            finite = []
            for first_row, passage in _passages(buffer, batch, blocks, mine):
                for start, current in passage:
                    output = blocks.run(index, current)
                    finite.append((first_row + start, torch.isfinite(output).all()))
                    passage.put(start, output)
        if (where := _first_not_finite(finite, batch, buffer, mine)) is not None:
            compressed = ", at the level that activations leave through," if decoded else ""
            raise EvoPressError(
                f"the output of {blocks.block_name(index)}{compressed} is not finite, first on {where}: {blocks.advice}"
            )

    on_all_ranks(walk)


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
        raise EvoPressError(f"{path} cannot be mapped ({first_line(error)}): use level_db.activations=memory") from error
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


def _first_not_finite(finite: Sequence[tuple[int, Tensor]], batch: int, buffer: Tensor, mine: Sequence[range] | None) -> str | None:
    """Name the first batch that is not finite, given each one's first sequence and a flag, bool []; None if all are."""
    flags = torch.stack([flag for _, flag in finite]).tolist() if finite else []
    if all(flags):
        return None
    first_row = finite[flags.index(False)][0]
    end = next((those.stop for those in mine or () if first_row in those), len(buffer))
    return f"calibration sequences {first_row} to {min(first_row + batch, end) - 1}"
