"""Targets beside the average bits and the sparsity: the size of the whole model, and further limits.

size=60MB  size=57MiB  size=2.25bpw
limits=[{currency: modules, total: 52}, {currency: bytes, total: 60MB}]
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from evopress.currencies import CURRENCIES, Currency, currency_of, num_experts
from evopress.errors import EvoPressError
from evopress.methods.method import Rest
from evopress.units import Budget, Limit, Space

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)")
BYTES_OF = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
"""A unit of sizes, in small letters, to its bytes."""
BYTES = CURRENCIES["bytes"]


def as_typed(number: float) -> Fraction:
    """Return a number as it was typed, exactly: 2.3 times so many weights is then no weight short."""
    return Fraction(repr(number))


def size_budget(size: str, space: Space, rest: Rest, *, key: str = "size") -> Budget:
    """Return the budget of a model whose file has so many bytes, or so many bits a weight of all its weights.

    Args: key: the setting that says so.

    Raises: EvoPressError if the size is not one, or what is no unit is larger.
    """
    number, unit = parsed_size(size)
    bits = _bits(size, space.size + rest.weights)
    if bits < rest.bits:
        raise EvoPressError(
            f"{key}={size} is too small: uncompressed parameters (norms, and embedding and head unless method.include has them) "
            f"take {rest.bits / 8e6:.4g} MB; raise it, or extend method.include"
        )
    measure = "bits per weight of all" if unit == "bpw" else unit.upper().replace("I", "i").replace("KB", "kB")
    return Budget(total=bits - rest.bits, target=float(number), measure=measure, beside=rest.bits)


def _bits(size: str, weights: int) -> int:
    """Return the bits of a size, whole bytes where it is in bytes, of so many weights."""
    number, unit = parsed_size(size)
    return math.floor(number * weights) if unit == "bpw" else math.floor(number * BYTES_OF[unit]) * 8


def check_targets(size: str | None, limits: Sequence[Any]) -> None:
    """Raise EvoPressError if a size or a limit is not one."""
    if size is not None:
        parsed_size(size)
    for entry in limits:
        checked_limit(entry)


def parsed_size(size: str) -> tuple[Fraction, str]:
    """Return number, exactly as it is written, and unit of a size; the unit is "bpw" or one of bytes, in small letters.

    Raises: EvoPressError if it is not one.
    """
    found = _SIZE.fullmatch(str(size).strip())
    unit = found[2].lower() if found else ""
    if found is None or unit not in (*BYTES_OF, "bpw") or not float(found[1]) > 0.0:
        raise EvoPressError(f"size={size} is no size: give one such as 60MB, 57MiB, or 2.25bpw (bits per weight, of all weights)")
    return Fraction(found[1]), unit


def further_limits(asked: Sequence[Any], space: Space, rest: Rest) -> tuple[Limit, ...]:
    """Return the limits that the settings name beside the target."""
    limits = []
    for entry in asked:
        currency, total, kind = checked_limit(entry)
        in_bits = isinstance(total, str)
        if not in_bits:
            count = math.floor(float(total)) * currency.scale
        elif kind is None:
            count = size_budget(str(total), space, rest, key="limits: total").total
        else:  # what is no unit is of no kind
            count = _bits(str(total), sum(unit.size for unit in space.units if unit.is_of(kind)))
        if kind is not None and not any(unit.is_of(kind) for unit in space.units):
            kinds = ", ".join(dict.fromkeys(unit.kind for unit in space.units))
            raise EvoPressError(f"limits has the kind {kind!r:.100}, which no unit is of: choose one of {kinds}, or leave it out")
        if currency is CURRENCIES["read"] and any(map(num_experts, space.units)):
            raise EvoPressError(
                "limits cannot have currency=read with method.granularity=expert, since tokens of dropped experts are routed to "
                "those that stay: leave it out, or choose another granularity"
            )
        limits.append(Limit(count, currency, kind))
    return tuple(limits)


def checked_limit(entry: Any) -> tuple[Currency, str | float, str | None]:
    """Return currency, total and kind of one of `limits`; a total that is text is a size.

    Raises: EvoPressError if it is not {currency, total} or {currency, total, kind}.
    """
    if not isinstance(entry, dict) or not {"currency", "total"} <= set(entry) <= {"currency", "total", "kind"}:
        raise EvoPressError(
            f"limits has {entry!r:.200}: expected {{currency: bytes, total: 60MB}} or {{currency: modules, total: 52}}, with kind: "
            "to limit units of one kind"
        )
    currency, total = currency_of(str(entry["currency"])), entry["total"]
    if isinstance(total, str):
        if currency is not BYTES:
            raise EvoPressError(f"limits has {total!r:.100} {currency.name}: expected a number, sizes are of the currency bytes")
        parsed_size(total)
    elif isinstance(total, bool) or not isinstance(total, int | float) or not total >= 0:
        raise EvoPressError(f"limits has the total {total!r:.100} of {currency.name}: expected a number of at least 0")
    elif float(total) != math.floor(float(total)):
        raise EvoPressError(
            f"limits has {total:g} {currency.name}, expected a whole number: limits are totals over all units, not averages"
        )
    return currency, total, entry.get("kind")
