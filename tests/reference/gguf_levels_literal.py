"""A GGUF type's numbers, one row and one number at a time, in float64: by a sweep, then by descent, every error computed anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def values(codes: list[float], d: list[float], dmin: list[float], scales: list[float], mins: list[float], of: Any) -> Tensor:
    """w = (d · sc) · (q - offset) - dmin · mn."""
    part = of.width // of.parts
    found = [
        d[c // of.width] * scales[c // part] * (q - of.offset) - dmin[c // of.width] * mins[c // part] for c, q in enumerate(codes)
    ]
    return torch.tensor(found, dtype=torch.float64)


def _half(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).to(torch.float16))


def _whole(x: float, low: int, high: int) -> float:
    return float(min(max(round(x), low), high))


def sweep(w: Tensor, U: Tensor, of: Any) -> dict[str, list[float]]:
    """Round column by column, numbers of a block or part fitted where it starts, each error spread over all later columns."""
    w, part = w.clone(), of.width // of.parts
    numbers: dict[str, list[float]] = {name: [] for name in ("codes", "d", "dmin", "scales", "mins")}

    def grids(columns: slice) -> list[tuple[float, float]]:
        """Every scale and shift that is tried."""
        low, high, least = float(w[columns].min()), float(w[columns].max()), 1.0 - 1.2 * 2.0 ** (-of.bits / 2)
        if of.offset:
            extreme = high if abs(high) > abs(low) else low
            shares = [1.0, *torch.linspace(1.0 + 0.5 / of.offset, least, 12).tolist()]
            return [(-extreme / of.offset * share, 0.0) for share in shares]
        low = min(low, 0.0) if of.part else low
        scales = [((high - low) * share / of.maxq, share) for share in torch.linspace(1.0, least, 12).tolist()]
        return [(scale, -low * share if of.part else (high - low) * share / 2 - (low + high) / 2) for scale, share in scales]

    def cost(columns: slice, scale: float, shift: float) -> float:
        """What rounding to a grid costs, by column."""
        q = ((w[columns] + shift) / scale).round().clamp(-of.offset, of.maxq - of.offset)
        return float(((q * scale - shift - w[columns]) / U.diagonal()[columns]).square().sum())

    for c in range(len(w)):
        if c % of.width == 0:
            parts = [slice(c + p * part, c + (p + 1) * part) for p in range(of.parts)]
            alone = [min(grids(columns), key=lambda grid, columns=columns: cost(columns, *grid)) for columns in parts]
            numbers["d"].append(_half(max((scale for scale, _ in alone), key=abs) / max(of.scales, key=abs)))
            numbers["dmin"].append(_half(max(shift for _, shift in alone) / max(of.mins[1], 1)))
        d, dmin = numbers["d"][-1], numbers["dmin"][-1]
        if c % part == 0:
            tried = [(1.0, float(of.mins[0]))]
            if of.part:
                tried = [
                    (_whole(scale / d, *of.scales) or 1.0, _whole(shift / dmin, *of.mins) if dmin else 0.0)
                    for scale, shift in grids(slice(c, c + part))
                ]
            sc, mn = min(tried, key=lambda pair: cost(slice(c, c + part), d * pair[0], dmin * pair[1]))
            numbers["scales"].append(sc)
            numbers["mins"].append(mn)
        code = _whole(float(w[c] + dmin * mn) / (d * sc), -of.offset, of.maxq - of.offset)
        numbers["codes"].append(code + of.offset)
        w[c:] -= (w[c] - (d * sc * code - dmin * mn)) / U[c, c] * U[c, c:]
    return numbers


def descend(w: Tensor, H: Tensor, numbers: dict[str, list[float]], of: Any, *, tolerance: float, max_passes: int) -> None:
    """Move each number to where e H eᵀ is least, or leave it where that does not lower it; `numbers` are overwritten."""
    part = of.width // of.parts

    def error() -> Tensor:
        return w - values(**numbers, of=of)

    def energy() -> float:
        return float(error() @ H @ error())

    def least(direction: Tensor) -> float:
        """How far to go along a direction of the weights."""
        curvature = float(direction @ H @ direction)
        return float(direction @ H @ error()) / curvature if curvature > 0 else 0.0

    def offer(name: str, index: int, wanted: float) -> None:
        before, old = energy(), numbers[name][index]
        numbers[name][index] = wanted
        if not energy() < before:
            numbers[name][index] = old

    def along(name: str, index: int, columns: range) -> Tensor:
        """What the weights change by with a number."""
        now = {key: list(each) for key, each in numbers.items()}
        start = values(**now, of=of)
        now[name][index] += 1.0
        direction = torch.zeros_like(start)
        direction[columns.start : columns.stop] = (values(**now, of=of) - start)[columns.start : columns.stop]
        return direction

    for _ in range(max_passes):
        before = energy()
        for block in range(len(numbers["d"])):
            for p in range(block * of.parts, (block + 1) * of.parts):
                columns = range(p * part, (p + 1) * part)
                for c in columns:
                    if float(H[c, c]) > 0:
                        step = numbers["d"][block] * numbers["scales"][p]
                        best = numbers["codes"][c] + float(H[c] @ error()) / float(H[c, c]) / step
                        numbers["codes"][c] = _whole(best, 0, of.maxq)
                if of.part:
                    wanted = _whole(numbers["scales"][p] + least(along("scales", p, columns)), *of.scales)
                    offer("scales", p, wanted or 1.0)
                if of.mins[1] > 1 and numbers["dmin"][block] != 0:
                    offer("mins", p, _whole(numbers["mins"][p] + least(along("mins", p, columns)), *of.mins))
            columns = range(block * of.width, (block + 1) * of.width)
            offer("d", block, _half(numbers["d"][block] + least(along("d", block, columns))))
            if of.mins[1]:
                offer("dmin", block, _half(numbers["dmin"][block] + least(along("dmin", block, columns))))
        if before - energy() <= tolerance * before:
            return
