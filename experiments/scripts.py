"""What scripts' command lines share: an end in one sentence, paths that are there, files that can be written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evopress.endings import exit_code, silenced_without_reader, stopping_at_signals
from evopress.errors import EvoPressError
from evopress.files import make_folder


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
