"""The command line of what reads a sweep: its table, its curves, its page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from evopress.errors import EvoPressError
from evopress.files import given_path
from experiments.scripts import in_one_sentence
from experiments.specs import SPECS, home
from experiments.sweeps import Sweep, describe


@in_one_sentence()
def of_sweep(
    description: str,
    make: Callable[[str, Path, Path], tuple[Sweep, str]],
    make_of_folder: Callable[[Path, Path], tuple[Sweep, str]] | None = None,
) -> None:
    """Make something of the sweep that is named on the command line; say what is missing of it. A user's error is one sentence.

    Args:
        make: gets the experiment's name, the folder of all sweeps, and the one to write to; returns the sweep and what to print.
        make_of_folder: gets the folder of any sweep, and the one to write to; None: experiments alone can be named.
    """
    parser = argparse.ArgumentParser(description=description)
    folders = "" if make_of_folder is None else ", or the folder of any sweep, into which is then written"
    parser.add_argument("experiment", help=f"one of {', '.join(sorted(SPECS))}{folders}")
    parser.add_argument("--root", type=Path, default=Path("multirun"), help="where the sweeps lie (default %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="folder to write to (default: the experiment's own, or the sweep's)")
    arguments = parser.parse_args()
    name = arguments.experiment
    if name in SPECS:
        sweep, said = make(name, arguments.root, arguments.out or home(name))
    elif make_of_folder is not None and (folder := given_path(name, "the sweep")).is_dir():
        sweep, said = make_of_folder(folder, arguments.out or folder)
    else:
        or_folder = "" if make_of_folder is None else ", or the folder of a sweep"
        raise EvoPressError(f"{name!r} is no experiment{or_folder}: choose one of {', '.join(sorted(SPECS))}")
    for folder, reason in sweep.unfinished:
        print(f"left out: {folder}: {reason}")
    for axes in sweep.missing:
        print(f"missing: {describe(axes)}")
    print(said)
