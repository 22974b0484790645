"""A command, or one job of it, that several processes share: all but the first follow that one."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evopress import machine, ranks
from evopress.endings import exit_code
from evopress.errors import EvoPressError


@contextmanager
def joined() -> Iterator[None]:
    """Join the others if this is one of several processes; all but the first do what that one asks, and end with it.

    Raises: SystemExit in those others.
    """
    if not ranks.asked_for():
        yield
        return
    try:
        try:
            ranks.adopt_slurm_task()
            ranks.begin()
        except EvoPressError:
            if ranks.is_first():
                raise
            sys.exit(1)  # the first one says it
        if ranks.leads():
            yield
            return
        _follow()
    finally:
        ranks.end()
    sys.exit(0)


def shared(job: Callable[[], float]) -> float:
    """Do a job that a launcher has started several tasks for: the first does it, and the others their share, who return NaN."""
    try:
        ranks.adopt_slurm_task()
        ranks.begin()
        if ranks.leads():
            return job()
        _follow()
        return float("nan")
    finally:
        ranks.end()


def _follow() -> None:
    """Do this process's share until the first one ends, which says what there is to say."""
    logging.disable(logging.WARNING)
    os.environ["TERM"] = "dumb"
    machine.keep_freed_memory()
    machine.exact_products()
    from evopress.stages.following import follow_run

    try:
        follow_run()
    except KeyboardInterrupt as stop:  # of which the first process speaks
        sys.exit(exit_code(stop))
