"""The command line of what reads a sweep: its table, its curves, its page; and what scripts' command lines share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from evopress.endings import exit_code, silenced_without_reader, stopping_at_signals
from evopress.errors import EvoPressError
from evopress.files import given_path, make_folder
from experiments.specs import SPECS, home
from experiments.sweeps import Sweep, describe


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """End a script in one sentence and with 1 at a user's error; silently where nobody reads what it prints any more: `| head`."""
    try:
        yield
        sys.stdout.flush()
    except EvoPressError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        if not silenced_without_reader():
            raise
        sys.exit(1)


@contextmanager
def with_its_jobs() -> Iterator[None]:
    """Do as `in_one_sentence`; a signal ends the script too, with its exit code, and its jobs with it."""
    with in_one_sentence():
        try:
            with stopping_at_signals():
                yield
        except KeyboardInterrupt as stop:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(exit_code(stop))


def existing(path: str | Path) -> Path:
    """Return the path of a file or folder; raise EvoPressError if nothing is there."""
    if not (found := Path(path)).exists():
        raise EvoPressError(f"there is no file or folder {path}: name one that is there")
    return found


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise EvoPressError for a count below 1."""
    for name in names:
        if getattr(arguments, name) < 1:
            raise EvoPressError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is out of range: expected at least 1")


def file_to_read(path: str) -> Path:
    """Read the path of a file or folder; raise argparse.ArgumentTypeError if nothing is there."""
    try:
        return existing(path)
    except EvoPressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def file_to_write(path: str) -> Path:
    """Read the path of a file that is written after hours: its folder is made now.

    Raises: argparse.ArgumentTypeError if nothing can be written there.
    """
    file = Path(path)
    try:
        make_folder(file.parent)
    except EvoPressError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file in it")
    return file


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
