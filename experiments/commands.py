"""The command line of what reads a sweep: its table, its curves, its page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from evopress.errors import EvoPressError
from experiments.specs import SPECS
from experiments.sweeps import Sweep, describe


def of_sweep(description: str, make: Callable[[str, Path, Path], tuple[Sweep, str]]) -> None:
    """Make something of the sweep that is named on the command line; say what is missing of it. A user's error is one sentence.

    Args: make: gets the experiment's name, the folder of all sweeps, and the one to write to; returns the sweep and what to print.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("experiment", choices=sorted(SPECS))
    parser.add_argument("--root", type=Path, default=Path("multirun"), help="where the sweeps lie (default %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="folder to write to (default: the experiment's own)")
    arguments = parser.parse_args()
    out = arguments.out or Path(__file__).parent / arguments.experiment
    try:
        sweep, said = make(arguments.experiment, arguments.root, out)
    except EvoPressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    for folder, reason in sweep.unfinished:
        print(f"left out: {folder}: {reason}")
    for axes in sweep.missing:
        print(f"missing: {describe(axes)}")
    print(said)
