"""One call at a time for each network: what is put into it for a moment would be any other thread's, too."""

from __future__ import annotations

from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Beside what they are of, which stays as it was: it can be copied and pickled, and goes when nobody else has it."""
_LOOKING = Lock()


def lock_of(whose: Any, *, same_as: Any = None) -> Any:
    """Return the lock of a network, or of what loads one; whoever holds it may take it again.

    Args: same_as: what it shares the lock of, unless it has one already.
    """
    with _LOOKING:
        first = whose if same_as is None else same_as
        return _LOCKS.setdefault(whose, _LOCKS.setdefault(first, RLock()))
