"""Descent on a GGUF type's numbers, one row and one number at a time, every error computed anew, in float64."""

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

    def whole(x: float, low: int, high: int) -> float:
        return float(min(max(round(x), low), high))

    def half(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64).to(torch.float16))

    for _ in range(max_passes):
        before = energy()
        for block in range(len(numbers["d"])):
            for p in range(block * of.parts, (block + 1) * of.parts):
                columns = range(p * part, (p + 1) * part)
                for c in columns:
                    if float(H[c, c]) > 0:
                        step = numbers["d"][block] * numbers["scales"][p]
                        best = numbers["codes"][c] + float(H[c] @ error()) / float(H[c, c]) / step
                        numbers["codes"][c] = whole(best, 0, of.maxq)
                if of.part:
                    wanted = whole(numbers["scales"][p] + least(along("scales", p, columns)), *of.scales)
                    offer("scales", p, wanted or 1.0)
                if of.mins[1] > 1 and numbers["dmin"][block] != 0:
                    offer("mins", p, whole(numbers["mins"][p] + least(along("mins", p, columns)), *of.mins))
            columns = range(block * of.width, (block + 1) * of.width)
            offer("d", block, half(numbers["d"][block] + least(along("d", block, columns))))
            if of.mins[1]:
                offer("dmin", block, half(numbers["dmin"][block] + least(along("dmin", block, columns))))
        if before - energy() <= tolerance * before:
            return
