"""How long what is left of an experiment's jobs will take, from what has ended."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

from evopress.progress import counted, duration


class Clock:
    """Tells how many jobs are left and for how long, several at once: a job is taken to last as others of its name did."""

    def __init__(self, left: Mapping[str, int], at_once: int, took: Mapping[str, float] | None = None) -> None:
        """Begin with what earlier jobs took.

        Args:
            left: jobs by name.
            took: seconds of a job by name, as far as they are known.
        """
        self._left, self._took = dict(left), {name: [seconds] for name, seconds in (took or {}).items()}
        self._at_once, self._last = at_once, time.monotonic()

    def ended(self, name: str) -> bool:
        """Note that a job has ended; tell whether it was the last of its name."""
        now = time.monotonic()
        # One of so many jobs ends in this time: on average it has taken so many times as long.
        self._took.setdefault(name, []).append((now - self._last) * min(self._at_once, sum(self._left.values())))
        self._last = now
        self._left[name] -= 1
        return not self._left[name]

    def __str__(self) -> str:
        count = sum(self._left.values())
        known = {name: statistics.fmean(took) for name, took in self._took.items()}
        jobs = f"{counted(count, 'job')} left"
        if not count or not known:
            return jobs
        rest = sum(known.get(name, statistics.fmean(known.values())) * left for name, left in self._left.items())
        return f"{jobs}, about {duration(rest / min(self._at_once, count))}"
