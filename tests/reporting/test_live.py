"""Progress: one line that is rewritten in a terminal, plain lines elsewhere, nothing garbled."""

from __future__ import annotations

import io
import logging
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evopress import progress
from evopress.progress import StatusLine, count_of_tokens, in_bytes, on_terminal, track, tracked, within
from evopress.reporting.live import LiveSearch
from evopress.reporting.metrics import SearchMetrics
from evopress.search.evolution import Evolution
from evopress.search.strategy import run_search
from evopress.units import Space

GENERATIONS = 5


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and knows what a person would see on it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines, row, column = [""], 0, 0
        for character in self.getvalue():
            if character == "\n":
                row, column = row + 1, 0
                lines.append("")
            elif character == "\r":
                column = 0
            else:
                lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal of 200 columns on which the log is written too."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    handler, root = logging.StreamHandler(stream), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)
    assert handler.filters == []  # whatever happened


Search = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def search(space: Space, evolution: Callable[..., Evolution]) -> Search:
    """Return what runs a toy search under a live view and returns its records."""
    return partial(followed, space, evolution(GENERATIONS, 4, (64, 2), (128, 1)))


def followed(
    space: Space, evolution: Evolution, live: LiveSearch, *, fail_at: int | None = None, log: bool = False
) -> list[dict[str, Any]]:
    """Run a search; a record takes two seconds by its own clock."""
    rng = np.random.default_rng(2)
    records: list[dict[str, Any]] = []
    metrics = SearchMetrics(space)

    def fitness(genomes: Any, *, tokens: int) -> list[float]:
        if log:
            logging.getLogger("evopress.test").info("a warning in the middle")
        return [float(value) for value in 2 + rng.random(len(genomes))]

    def finished(record: Any) -> None:
        entry = {**record.to_dict(), "seconds": 2.0 * record.generation + 1}
        if record.generation == 2:
            entry["held_out"] = {"kl": 0.12345, "perplexity": {"docs": 20.5}}
        if record.generation == fail_at:
            raise RuntimeError("out of memory")
        records.append(entry)
        live.show(entry, metrics.add(entry))

    with live:
        run_search(evolution, live.watching(fitness), on_generation=finished)
    return records


# Without a terminal


def test_plain_lines_without_a_terminal(search: Search, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stream = io.StringIO()
    records = search(LiveSearch(GENERATIONS, 2, run_dir=tmp_path, stream=stream))
    assert stream.getvalue() == ""
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == GENERATIONS + 2
    assert re.fullmatch(
        rf"generation 2 of 5, fitness 2\.\d{{3}}( \(new\))?, held-out KL 0\.1235, perplexity 20\.50, accepted \d+%, "
        rf"{(records[2]['tokens'] - records[1]['tokens']) // 2:,} tokens/s, 6 s left",
        lines[2],
    )
    assert "held-out" not in lines[3]  # only where it was measured
    assert "left" not in lines[-2]
    assert re.fullmatch(rf"search: done, {records[-1]['tokens']:,} tokens in 11 s, accepted \d+%", lines[-1])
    assert lines[0].startswith("generation 0 of 5, fitness")
    assert "accepted" not in lines[0]


def test_the_time_left_has_what_is_still_to_be_measured_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    live = LiveSearch(7, 2, every=2, run_dir=tmp_path, stream=io.StringIO())
    for generation in range(8):
        record: dict[str, Any] = {"generation": generation}
        if generation % 2 == 0 or generation == 7:
            record["held_out"] = {"kl": 0.5}
        first = {"generation_seconds": 0.0003} if generation == 0 else {"generation_seconds": 2.0}
        live.show(record, first, 100.0 if generation == 0 else 10.0)
    left = [record.getMessage().rpartition(", ")[2] for record in caplog.records]
    assert "left" not in left[0]  # it has only chosen where to start, and computed the dense model's states
    assert left[1] == "12 s left"  # nothing has been measured since
    assert left[2:6] == ["40 s left", "38 s left", "26 s left", "24 s left"]  # measured in 4, 6 and 7
    assert left[6] == "12 s left"
    assert "left" not in left[7]


def test_jobs_of_a_sweep_say_which_they_are(search: Search, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "multirun.yaml").touch()
    search(LiveSearch(GENERATIONS, 2, run_dir=tmp_path / "seed-1", stream=io.StringIO()))
    lines = [record.getMessage() for record in caplog.records]
    assert all(line.startswith("[seed-1] generation ") for line in lines[:-1])
    assert lines[-1].startswith("[seed-1] search: done")


@pytest.mark.parametrize(
    ("count", "said"),
    [(640, "640"), (11_520, "11,520"), (1_966_080, "1.97 million"), (177e6, "177 million"), (1_234_000_000, "1,230 million")],
)
def test_tokens_are_counted_in_what_fits_their_number(count: int, said: str) -> None:
    assert count_of_tokens(count) == said


@pytest.mark.parametrize(("count", "said"), [(640, "640 B"), (7_340_000, "7.34 MB"), (999_960, "1,000 kB"), (1.5e15, "1,500 TB")])
def test_bytes_are_said_with_three_digits(count: float, said: str) -> None:
    assert in_bytes(count) == said


def test_a_search_that_ends_before_its_last_generation_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with LiveSearch(5, None, run_dir=tmp_path, stream=io.StringIO()) as live:
        for generation, accepted in enumerate((True, True, False)):
            live.show({"generation": generation, "accepted": accepted}, {"tokens": 7.0, "seconds": 3.0, "acceptance_rate": 0.5})
    said = caplog.records[-1].getMessage()
    assert said == "search: done after generation 2 of 5, which found nothing better, 7 tokens in 3 s, accepted 50%"


# In a terminal


def test_one_line_in_a_terminal(search: Search, tmp_path: Path, terminal: Terminal) -> None:
    search(LiveSearch(GENERATIONS, 2, run_dir=tmp_path, stream=terminal))
    done, last = terminal.screen()  # one line is left of the search
    assert done.startswith("search: done")
    assert last == ""
    shown = [part.rstrip() for part in terminal.getvalue().split("\r") if part.strip()]
    (first, *_) = (line for line in shown if line.startswith("|##########| 5/5"))
    assert "held-out KL 0.1235, perplexity 20.50" in first  # the latest there is
    assert any(re.match(r"\|######----\| 3/5, 4 s left, fitness", line) for line in shown)
    assert any(line.endswith("stage 1/2: 4 x 64 tokens") for line in shown)
    assert any(line.endswith("stage 2/2: 3 x 128 tokens") for line in shown)


def test_what_is_logged_stands_above_the_line(search: Search, tmp_path: Path, terminal: Terminal) -> None:
    search(LiveSearch(GENERATIONS, 2, run_dir=tmp_path, stream=terminal), log=True)
    assert terminal.screen()[:-2] == ["a warning in the middle"] * (1 + 2 * GENERATIONS)


def test_the_log_file_has_every_generation(search: Search, tmp_path: Path, terminal: Terminal) -> None:
    handler = logging.FileHandler(tmp_path / "evopress.log")
    logging.getLogger().addHandler(handler)
    try:
        search(LiveSearch(GENERATIONS, 2, run_dir=tmp_path, stream=terminal))
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    lines = (tmp_path / "evopress.log").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == [f"generation {g} of 5" for g in range(GENERATIONS + 1)]


def test_a_narrow_terminal_is_never_wrapped(
    search: Search, tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit is left out as a whole: half a number would be another number."""
    monkeypatch.setenv("COLUMNS", "44")
    search(LiveSearch(GENERATIONS, 2, run_dir=tmp_path, stream=terminal))
    parts = [part.rstrip() for part in terminal.getvalue().split("\r") if "\n" not in part]
    assert 40 < max(map(len, parts)) < 44
    assert any(re.fullmatch(r"\|##--------\| 1/5, 8 s left, fitness 2\.\d{3}", part) for part in parts)
    assert "|##--------| 1/5, stage 1/2: 4 x 64 tokens" in parts


def test_a_search_that_fails_leaves_a_clean_terminal(search: Search, tmp_path: Path, terminal: Terminal) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        search(LiveSearch(GENERATIONS, 2, run_dir=tmp_path, stream=terminal), fail_at=3)
    assert terminal.screen() == [""]
    assert StatusLine.current is None


def test_a_terminal_that_goes_away_ends_nothing(search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError("Input/output error")

    monkeypatch.setenv("TERM", "xterm")
    assert len(search(LiveSearch(GENERATIONS, 2, run_dir=tmp_path, stream=Gone()))) == GENERATIONS + 1


def test_work_in_one_piece_moves_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_REDRAWS", 0.0)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with tracked("scores"):
        within(0.4)
        for _ in track("ab", "inner"):
            within(0.5)
    assert "scores:  40%" in terminal.getvalue() and "scores:  75%" in terminal.getvalue()


def test_other_work_is_shown_on_the_same_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_REDRAWS", 0.0)
    monkeypatch.setattr(progress, "tqdm", None)  # no second bar
    with StatusLine(terminal) as line:
        line.show("search 1/5")
        assert list(track("abc", "held-out text")) == ["a", "b", "c"]
        assert terminal.screen() == ["search 1/5"]
    assert "search 1/5, held-out text 2/3" in terminal.getvalue()
    assert capsys.readouterr().err == ""


# What a terminal is


def test_a_bar_only_where_it_can_be_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert on_terminal(Terminal())
    assert not on_terminal(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not on_terminal(Terminal())


def test_jobs_that_run_beside_others_draw_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joblib's and Ray's jobs are processes of their own that share a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    assert not on_terminal(Terminal())


def test_plain_progress_of_other_work(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(track(range(6), "building")) == list(range(6))
    assert [record.getMessage() for record in caplog.records] == [
        "building: 1 of 6, about 1 min 40 s left",
        "building: 3 of 6, about 40 s left",
        "building: 5 of 6, about 12 s left",
    ]


def test_long_items_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """In the lines of the outermost work, whatever is tracked inside it."""
    caplog.set_level(logging.INFO)
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    within(0.5)  # of nothing
    for _ in track(range(4), "batches"):
        for _ in track(range(2), "sequences"):
            now += 8
            within(0.5)
    with tracked("one piece"):
        now += 20
        within(0.25)
    now += 20
    within(0.5)
    assert [record.getMessage() for record in caplog.records] == [
        "batches: 19%, about 1 min 9 s left",
        "batches: 44%, about 41 s left",
        "batches: 69%, about 22 s left",
        "batches: 94%, about 4 s left",
        "one piece: 25%, about 1 min 0 s left",
    ]
