"""Progress of long work: a bar with an ETA in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)
T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 15.0


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterate over `items` and show how far it is and how long it will take."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, unit="", dynamic_ncols=True, leave=False)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - started) / done * (len(items) - done)
            logger.info("%s: %d of %d, about %s left", what, done, len(items), duration(left))
        yield item


def duration(seconds: float) -> str:
    """Say a number of seconds as people do: "45 s", "3 min 20 s", "2 h 5 min"."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
