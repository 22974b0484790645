"""Progress of long work: a line that is rewritten in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, TextIO, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)
T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_REDRAWS = 0.1


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterate over `items` and show how far it is and how long it will take."""
    if StatusLine.current is not None:
        yield from _beside(StatusLine.current, items, what)
        return
    lines = _Bar(what, len(items)) if on_terminal(sys.stderr) else _Lines(what, len(items))
    _Lines.open.append(lines)
    try:
        for lines.done, item in enumerate(items):
            lines.tell(lines.done)
            yield item
    finally:
        _Lines.open.remove(lines)
        lines.close()


@contextmanager
def tracked(what: str) -> Iterator[None]:
    """Show how far work in one piece is, as it says itself (`within`)."""
    for _ in track(range(1), what):
        yield


def within(share: float) -> None:
    """Say what share of its item the innermost of the tracked work has done: the lines of the outermost tell it."""
    for lines in reversed(_Lines.open[1:]):
        share = (lines.done + share) / lines.count
    if _Lines.open:
        _Lines.open[0].tell(_Lines.open[0].done + share)


class _Lines:
    """Plain lines of how far work is."""

    open: ClassVar[list[_Lines]] = []
    """Of all the work that goes on, one inside the other."""

    def __init__(self, what: str, count: int) -> None:
        self.what, self.count, self.done = what, count, 0
        self._started = self._last = time.monotonic()

    def tell(self, done: float) -> None:
        """Write a line, now and then."""
        now = time.monotonic()
        if done and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            left = (now - self._started) / done * (self.count - done)
            far = f"{done:.0f} of {self.count}" if done == int(done) else f"{done / self.count:.0%}"
            logger.info("%s: %s, about %s left", self.what, far, duration(left))

    def close(self) -> None:
        """Take away what is drawn."""


class _Bar(_Lines):
    """A bar in a terminal."""

    def __init__(self, what: str, count: int) -> None:
        super().__init__(what, count)
        self._bar = tqdm(total=count, desc=what, unit="", dynamic_ncols=True, leave=False)

    def tell(self, done: float) -> None:
        """Draw it, not too often."""
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_REDRAWS:
            self._last = now
            self._bar.n = round(done, 2)
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _beside(line: StatusLine, items: Sequence[T], what: str) -> Iterator[T]:
    """Show how far it is at the end of the line that is there already."""
    try:
        for done, item in enumerate(items):
            line.show(detail=f"{what} {done + 1}/{len(items)}", often=True)
            yield item
    finally:
        line.show(detail="")


def on_terminal(stream: TextIO) -> bool:
    """Tell if a line may be rewritten on a stream: it is a terminal, and no other job of a sweep writes there at the same time."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and multiprocessing.parent_process() is None


class StatusLine:
    """One line at the bottom of a terminal that is rewritten; what is logged meanwhile appears above it.

    Its text is a list with commas, the most important first; what does not fit is left out.

    Log records with the attribute `live` (`extra={"live": True}`) repeat what the line shows: they go to log files, not to the
    terminal.
    """

    current: StatusLine | None = None
    """The line that is open in this process."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = self._detail = ""
        self._width = 0
        self._drawn = -_SECONDS_BETWEEN_REDRAWS
        self._handlers: list[logging.Handler] = []

    def __enter__(self) -> StatusLine:
        StatusLine.current = self
        for handler in logging.getLogger().handlers:
            stream = getattr(handler, "stream", None)
            if stream is not None and not isinstance(handler, logging.FileHandler) and _isatty(stream):
                handler.addFilter(self._make_room)
                self._handlers.append(handler)
        return self

    def __exit__(self, *exception: object) -> None:
        StatusLine.current = None
        for handler in self._handlers:
            handler.removeFilter(self._make_room)
        self._handlers.clear()
        self.clear()

    def show(self, text: str | None = None, *, detail: str | None = None, often: bool = False) -> None:
        """Change the line, or the detail at its end; what changes `often`, perhaps many times a second, is not drawn each time."""
        self._text = self._text if text is None else text
        self._detail = self._detail if detail is None else detail
        now = time.monotonic()
        if not often or now - self._drawn >= _SECONDS_BETWEEN_REDRAWS:
            self._drawn = now
            self._draw()

    def clear(self) -> None:
        """Take the line away."""
        if self._width:
            self._write(f"\r{' ' * self._width}\r")
            self._width = 0

    def _draw(self) -> None:
        most = shutil.get_terminal_size().columns - 1  # a full last column would wrap
        parts = self._text.split(", ") if self._text else []
        detail = [self._detail] if self._detail else []
        while len(parts) > 1 and len(", ".join([*parts, *detail])) > most:
            parts.pop()  # whole parts: half a number would be another number
        line = ", ".join([*parts, *detail])[:most]
        self._write(f"\r{line}{' ' * (self._width - len(line))}\r{line}" if self._width > len(line) else f"\r{line}")
        self._width = len(line)

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # the terminal went away: the work goes on
            self._stream.write(text)
            self._stream.flush()

    def _make_room(self, record: logging.LogRecord) -> bool:
        if getattr(record, "live", False):
            return False
        self.clear()
        return True


def _isatty(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def counted(count: int, what: str) -> str:
    """Say how many there are of something: "1 model", "3 models"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def millions(count: float) -> str:
    """Say a number in millions, of bytes in MB: "271.0", and what is below one with three digits, "0.0768"."""
    return f"{count / 1e6:.1f}" if count >= 1e6 else f"{count / 1e6:#.3g}"


def _three_digits(number: float) -> str:
    """Say a number of at most six digits with three that count: "7.34", "1,230"."""
    return f"{float(f'{number:.3g}'):,g}"


def count_of_tokens(count: int) -> str:
    """Say a number of tokens: "11,520", and from a million on "1.97 million"."""
    return f"{count:,}" if count < 1e6 else f"{_three_digits(count / 1e6)} million"


def amount(count: float) -> str:
    """Say a number with three digits: "7.34 M"."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{_three_digits(count / size)}{unit}"
    return f"{count:.0f}"


def in_bytes(count: float) -> str:
    """Say a number of bytes with three digits: "7.34 MB"."""
    return f"{amount(count)}B" if count >= 1e3 else f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Say a number of seconds as people do: "45 s", "3 min 20 s", "2 h 5 min"."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
