"""What one command knows of its jobs while it runs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Command:
    """A command in its own process; a launcher sends its jobs a copy, which is of no process and knows nothing."""

    process: int = 0
    """Of the command itself."""
    failures: list[str] = field(default_factory=list)
    """What was said of jobs that failed."""
    told_defaults: set[Path] = field(default_factory=set)
    """Sweeps of which it was said that their jobs have not all the same defaults."""
    folders: dict[Path, Path] = field(default_factory=dict)
    """Links that Hydra knows folders by, to the folders."""

    def is_here(self) -> bool:
        """Tell whether this is the command's own process; a launcher's jobs run in others."""
        return os.getpid() == self.process

    def __reduce__(self) -> tuple[Any, ...]:
        return Command, ()


def say_error(error: object) -> None:
    """Say what is wrong to the person at the keyboard."""
    print(f"error: {error}", file=sys.stderr, flush=True)
