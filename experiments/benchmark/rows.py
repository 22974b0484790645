"""What a part of the benchmark is given, and the rows of the table that it gives."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.benchmark.measure import Meter, Rates, Timing
from experiments.benchmark.sizes import Size
from experiments.benchmark.subject import Subject, load_subject
from experiments.benchmark.work import Product, total_flops

NAN = math.nan


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison; what does not apply is NaN or empty. Seconds are medians."""

    part: str
    case: str
    fast_seconds: float = NAN
    plain_seconds: float = NAN
    passes: int = 0
    """Timed passes of each path."""
    difference: float = NAN
    """Largest difference of the two results."""
    difference_of: str = ""
    same: str = ""
    """Whether both chose the same winners: yes or no."""
    fast_peak_bytes: float = NAN
    """Greatest resident memory of the process."""
    plain_peak_bytes: float = NAN
    fast_working_bytes: float = NAN
    """What the path itself adds to it."""
    plain_working_bytes: float = NAN
    fast_device_bytes: float = NAN
    plain_device_bytes: float = NAN
    fast_bytes: float = NAN
    """Of what is stored or read."""
    plain_bytes: float = NAN
    bytes_of: str = ""
    fast_tokens_per_second: float = NAN
    plain_tokens_per_second: float = NAN
    flops: float = NAN
    """Operations that the work needs."""
    limit_seconds: float = NAN
    """What they take at the measured rate of such matrix products."""
    products_share: float = NAN
    """Share of the fast path's time in matrix products and attention."""
    whole_seconds: float = NAN
    """The fast path for the whole model, where only some of its blocks were measured."""
    whole_plain_seconds: float = NAN
    note: str = ""
    error: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster the fast path is."""
        return self.plain_seconds / self.fast_seconds

    @property
    def limit_share(self) -> float:
        """Share of the machine's limit that the fast path reaches."""
        return self.limit_seconds / self.fast_seconds

    @property
    def fast_flops_per_second(self) -> float:
        return self.flops / self.fast_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, the derived ones last."""
        stored = {one.name: getattr(self, one.name) for one in fields(self)}
        return stored | {key: getattr(self, key) for key in ("ratio", "limit_share", "fast_flops_per_second")}

    @classmethod
    def of_dict(cls, values: Mapping[str, str]) -> Row:
        """Read a row of results.csv; columns that a row does not have are left out."""
        kinds = {one.name: one.type for one in fields(cls)}
        known = {key: value for key, value in values.items() if key in kinds}
        return cls(**{key: _read(value, str(kinds[key])) for key, value in known.items()})

    def needing(self, work: Sequence[Product], rates: Rates) -> Row:
        """Add what the work needs at least."""
        return replace(self, flops=total_flops(work), limit_seconds=rates.limit_seconds(work))


def _read(value: str, kind: str) -> Any:
    if kind == "str":
        return value
    return int(value or 0) if kind == "int" else float(value or "nan")


def compared(part: str, case: str, fast: Timing[Any], plain: Timing[Any], *, per: float = 1.0, **more: Any) -> Row:
    """Make a row of two timings.

    Args: per: how many things a pass does; the row has the seconds of one.
    """
    cuda = fast.device_bytes or plain.device_bytes
    return Row(
        part=part,
        case=case,
        fast_seconds=fast.seconds / per,
        plain_seconds=plain.seconds / per,
        passes=len(plain.samples),
        fast_peak_bytes=fast.peak_bytes,
        plain_peak_bytes=plain.peak_bytes,
        fast_working_bytes=fast.working_bytes,
        plain_working_bytes=plain.working_bytes,
        fast_device_bytes=fast.device_bytes if cuda else NAN,
        plain_device_bytes=plain.device_bytes if cuda else NAN,
        **more,
    )


@dataclass
class Bench:
    """What every part is given."""

    size: Size
    meter: Meter
    rates: Rates
    scratch: Path
    """A folder for databases, removed at the end."""
    seed: int = 0
    where: list[dict[str, Any]] = field(default_factory=list)
    """Rows of where_time_goes.csv."""
    growth: list[dict[str, Any]] = field(default_factory=list)
    """Rows of growth.csv."""
    text: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Number of search tokens to their sequences [N, L] and the dense model's last hidden states [N, L, d]."""

    @cached_property
    def subject(self) -> Subject:
        """The model of the size, loaded when a part first asks for it."""
        return load_subject(self.size, seed=self.seed)

    def forget_subject(self) -> None:
        """Free the model's memory; the next part that asks loads it again."""
        self.text.clear()
        self.__dict__.pop("subject", None)
        gc.collect()
        if self.meter.device.type == "cuda":
            torch.cuda.empty_cache()

    def fresh_folder(self, name: str) -> Path:
        """Return a folder in the scratch that does not exist yet."""
        count = 0
        while (folder := self.scratch / f"{name}-{count}").exists():
            count += 1
        return folder
