"""What of a model at a genome is written: its weights under their names in the file, each read as it is stored, in its turn.

Blocks that are dropped whole are left out, those that stay are numbered anew. An attention or MLP that alone is dropped stays in
its place: its linears are integers that are all zeros, or, where no group of the format divides their rows, its output projection
is dense zeros and the others are as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from evopress.compress.compressor import Payload
from evopress.compress.gptq import Dense, Quantized
from evopress.errors import EvoPressError
from evopress.export.exporter import INTEGERS, Export, Form
from evopress.export.tensors_file import Entry, Section, write_sections
from evopress.levels.modules import ATTENTION, MLP, dropped_modules
from evopress.models.blocks import BlockModel
from evopress.models.dropping import without_dropped
from evopress.models.experts import ExpertLinear
from evopress.units import is_module

WEIGHTS = "model.safetensors"


def mismatch(form: Form) -> EvoPressError:
    """Return the error that a weight is stored otherwise than its form says."""
    return EvoPressError(f"{form} does not match what the level database stores: remove the database, it is then rebuilt")


@dataclass(frozen=True)
class Weight:
    """A weight that will be written."""

    name: str
    """Of its module, in the model as it is written."""
    shape: tuple[int, int]
    form: Form
    read: Callable[[], Payload]
    """Reads it from the level database, packed."""
    transposed: bool = False
    """The model, and its checkpoint, hold it as [C, R], as GPT-2's do."""

    def integers(self) -> Quantized:
        """Read a weight of integers.

        Raises: EvoPressError if it is stored otherwise than its form says.
        """
        payload = self.read()
        if not isinstance(payload, Quantized) or payload.bits != self.form.bits:
            raise mismatch(self.form)
        return payload

    def dense_section(self, dtype: torch.dtype) -> Section:
        """Return what writes a weight as it is, in a dtype and as the model holds it."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return Section((Entry(f"{self.name}.weight", dtype, shape),), lambda: [self._dense().to(dtype)])

    def _dense(self) -> torch.Tensor:
        payload = self.read()
        if not isinstance(payload, Dense):
            raise mismatch(self.form)
        return payload.weight.T if self.transposed else payload.weight


@contextmanager
def shape_of(export: Export) -> Iterator[None]:
    """Hold the model in the shape in which it is written: without the blocks that are dropped whole."""
    live = export.live
    dropped = [live.dropped_in(export.genome, index) for index in range(len(live.blocks.blocks))]
    with without_dropped(live.blocks, dropped) if any(map(any, dropped)) else nullcontext():
        yield


def modules_dropped(export: Export) -> list[Sequence[int]]:
    """Return for every block that is written whether its attention and its MLP are dropped, as 0 or 1 each."""
    live = export.live
    dropped = [live.dropped_in(export.genome, index) for index in range(len(live.blocks.blocks))]
    return [both for both in dropped if not all(both)]


def weights_of(export: Export, *, zeros: Callable[[int], Form | None]) -> list[Weight]:
    """Return the weights that a genome says something of, in no order; the model is to be in the shape in which it is written.

    Args: zeros: the form of a dropped module's linear, by its columns; None: the format has no group for it.
    """
    blocks, space = export.live.blocks, export.live.space
    gone = dropped_modules(space, export.genome)
    names = {id(module): name for name, module in export.model.named_modules()}
    slots = {name: slot for part in blocks.parts for name, slot in blocks.slots(part).items()}
    found = []
    for index, (unit, form) in enumerate(zip(space.units, export.forms, strict=True)):
        if not is_module(unit) and isinstance(slots[unit.name].module, ExpertLinear):
            raise EvoPressError(f"{unit.name} is an expert's, which this format is not written for: use export=[dequantized]")
        if is_module(unit) or (name := names.get(id(slots[unit.name].module))) is None:  # in a block that is gone
            continue
        if unit.is_outside or (unit.block, _module_of(blocks, unit.name)) not in gone:
            rows, columns = slots[unit.name].weight.shape
            read = partial(export.levels.read, index, export.genome[index])
            found.append(Weight(name, (rows, columns), form, read, isinstance(slots[unit.name].module, Conv1D)))
    for block in range(len(blocks.blocks)):
        for inner, slot in blocks.slots(block).items():
            written, (rows, columns) = names.get(id(slot.module)), slot.weight.shape
            if written and (block, _module_of(blocks, inner)) in gone and (as_zeros := zeros(columns)) is not None:
                found.append(Weight(written, (rows, columns), as_zeros, partial(_zeros, rows, columns, as_zeros)))
    return found


def names_in_checkpoint(model: Any) -> dict[str, str]:
    """Return what a checkpoint calls a model's tensors, by their names in the model: transformers renames some when it loads them.

    Raises: EvoPressError if a checkpoint has one of them otherwise, as part of another or in several.
    """
    blank = {name: torch.empty_like(tensor, device="meta") for name, tensor in _tensors(model).items()}
    there = {id(tensor): name for name, tensor in revert_weight_conversion(model, blank).items()}
    for name, tensor in blank.items():
        if id(tensor) not in there:
            raise EvoPressError(
                f"checkpoints of {model.config.model_type} have no {name}, which transformers makes of other tensors when it "
                "loads them"
            )
    return {name: there[id(tensor)] for name, tensor in blank.items()}


def packed_sections(
    export: Export,
    pack: Callable[[Weight], Section],
    *,
    groups: Sequence[int],
    dtype: torch.dtype | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[Section], dict[str, Form]]:
    """Return a file's tensors in the model's order, and the forms of those that are packed, by the names of their modules.

    Args:
        pack: makes the section of integers.
        groups: sizes that the format has, for a dropped module's linears.
        dtype: of what is not packed; None: its own.
        names: what the file calls tensors, by their names in the model, where it calls them otherwise.
    """
    fewest = min((form.bits for form in export.forms if form.kind == INTEGERS), default=4)
    sections: dict[str, Section] = {}
    forms: dict[str, Form] = {}
    for weight in weights_of(export, zeros=zeros_in(groups, fewest)):
        if weight.form.kind == INTEGERS:
            forms[_module_in(names, weight.name)] = weight.form
            sections[f"{weight.name}.weight"] = pack(weight)
        else:
            sections[f"{weight.name}.weight"] = weight.dense_section(dtype or export.model.dtype)
    return in_order(export.model, sections, dtype=dtype, names=names), forms


def _module_in(names: Mapping[str, str], module: str) -> str:
    """Return what a file calls a module of the model."""
    return names.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")


def in_order(
    model: nn.Module,
    sections: Mapping[str, Section],
    *,
    dtype: torch.dtype | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> list[Section]:
    """Return a section for everything that the model has, in its order, a tied weight once; what has none is as it is.

    Args:
        sections: by the name of the parameter in whose place they are.
        dtype: of what has none; None: its own.
        names: what the file calls tensors, by their names in the model, where it calls them otherwise.
    """
    seen: set[int] = set()
    found = []
    for name, tensor in _tensors(model).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name in sections:
            found.append(_called(sections[name], name, names.get(name, name)))
            continue
        kept = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        found.append(
            Section(
                (Entry(names.get(name, name), kept, tuple(tensor.shape)),),
                lambda tensor=tensor, kept=kept: [tensor.data.to(kept)],  # type: ignore[misc]
            )
        )
    return found


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return everything that a model has, by name, tied weights under each of theirs."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **model.state_dict(keep_vars=True)}


def _called(section: Section, name: str, other: str) -> Section:
    """Return the section in a parameter's place as it is written where that has another name."""
    if name == other:
        return section
    before, after = name.rpartition(".")[0], other.rpartition(".")[0]
    entries = (replace(entry, name=after + entry.name.removeprefix(before)) for entry in section.entries)
    return Section(tuple(entries), section.make)


def write_model(
    folder: Path, export: Export, sections: Sequence[Section], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write weights, configuration and tokenizer; the model is to be in the shape in which it is written."""
    write_sections(folder / WEIGHTS, sections, metadata)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if export.model.can_generate():
        export.model.generation_config.save_pretrained(folder)
    export.tokenizer.save_pretrained(folder)


def hub_config(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the config.json that transformers writes of a model in a dtype, without what says how its weights are packed."""
    config = {key: value for key, value in json.loads(model.config.to_json_string()).items() if key != "quantization_config"}
    return config | {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}


def unquantized(model: nn.Module, packed: Collection[str], names: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Return the names of a model's linears that are not packed, in its order.

    Args:
        packed: names of those that are, as the file has them.
        names: what the file calls tensors, by their names in the model, where it calls them otherwise.
    """
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return [name for name in (_module_in(names, name) for name in linears) if name not in packed]


def zeros_in(groups: Sequence[int], bits: int) -> Callable[[int], Form | None]:
    """Return what gives a dropped module's linear its form: integers of so many bits in the largest group that divides its rows."""

    def form_of(columns: int) -> Form | None:
        group_size = next((size for size in sorted(groups, reverse=True) if columns % size == 0), None)
        return None if group_size is None else Form("a dropped module", "zeros", INTEGERS, bits, group_size)

    return form_of


def _module_of(blocks: BlockModel, name: str) -> str:
    return ATTENTION if blocks.is_of_attention(name) else MLP


def _zeros(rows: int, columns: int, form: Form) -> Quantized:
    scales = torch.zeros(rows, columns // form.group_size, dtype=torch.float16)
    return Quantized(torch.zeros(rows, columns, dtype=torch.uint8), scales, scales.to(torch.int16), form.bits, torch.float16)
