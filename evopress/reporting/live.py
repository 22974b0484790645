"""Show a search as it goes: one line that is rewritten in a terminal, a plain line per generation elsewhere."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, TextIO, TypeVar, cast

from evopress.progress import StatusLine, duration, on_terminal
from evopress.reporting.sweep import job_name
from evopress.reporting.tables import number, significant
from evopress.units import Genome

logger = logging.getLogger(__name__)

_WINDOW = 10
"""Generations that the time left is judged by."""
_BAR = 10


Fitness = TypeVar("Fitness", bound=Callable[..., Any])
"""What a search asks: `fitness(genomes, tokens=n)` returns a number for each."""


class LiveSearch:
    """Follow a search; a context manager, so that the terminal is left clean however it ends.

    Args:
        generations: how many there will be.
        num_stages: stages of selection in each; None: no such thing.
        every: generations from one measurement on held-out text to the next; 0: there are none.
        run_dir: in a sweep the job's name is put in front of every line.
        stream: where the line is drawn if it is a terminal; None: standard output.
    """

    def __init__(
        self,
        generations: int,
        num_stages: int | None,
        *,
        run_dir: Path,
        every: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        stream = stream or sys.stdout
        name = job_name(run_dir)
        self._prefix = f"[{name}] " if name else ""
        self._generations, self._num_stages, self._every = generations, num_stages, every
        self._line = StatusLine(stream) if on_terminal(stream) else None
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._measured: deque[float] = deque(maxlen=_WINDOW)
        self._held_out: Mapping[str, Any] = {}
        self._last: Mapping[str, float] = {}
        self._stage = self._done = 0
        self._why = ""

    def __enter__(self) -> LiveSearch:
        if self._line is not None:
            self._line.__enter__()
            self._line.show(f"{self._prefix}search: {self._generations} generations")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._line is not None:
            self._line.__exit__(kind, error, traceback)
        if kind is None and self._last:
            accepted = f", accepted {self._last['acceptance_rate']:.0%}" if "acceptance_rate" in self._last else ""
            tokens, seconds = (self._last.get(key, 0.0) for key in ("tokens", "seconds"))
            early = f" after generation {self._done} of {self._generations}{self._why}" if self._done < self._generations else ""
            logger.info("%ssearch: done%s, %s tokens in %s%s", self._prefix, early, f"{tokens:,.0f}", duration(seconds), accepted)

    def watching(self, fitness: Fitness) -> Fitness:
        """Return the same fitness; the line says which stage it is asked for."""

        def watched(genomes: Sequence[Genome], *, tokens: int) -> Any:
            if self._line is not None:
                self._stage += 1
                stage = "" if self._num_stages is None else f"stage {self._stage}/{self._num_stages}: "
                self._line.show(detail=f"{stage}{len(genomes)} x {tokens:,} tokens")
            return fitness(genomes, tokens=tokens)

        return cast(Fitness, watched)

    def attributing(self, answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return what answers a question for attributions or an expansion as `answer` does; the line says so."""

        def watched(question: Any) -> Any:
            if self._line is not None:
                self._line.show(detail=f"attribution: {question.tokens:,} tokens")
            return answer(question)

        return watched

    def show(self, record: Mapping[str, Any], metrics: Mapping[str, float], measured: float = 0.0) -> None:
        """Show a finished generation.

        Args:
            record: its record in `metrics.jsonl`.
            metrics: what `SearchMetrics` makes of it.
            measured: seconds that its winner's measurement on held-out text took, where it was measured.
        """
        self._stage, self._last, self._done = 0, metrics, record["generation"]
        self._why = "" if record.get("accepted", True) else ", which found nothing better"
        held_out = record.get("held_out") or {}
        if record["generation"] > 0 and "generation_seconds" in metrics:  # generation 0 only chose where to start
            self._seconds.append(metrics["generation_seconds"])
        if held_out and record["generation"] > 0:  # the first measurement computes the dense model's states too
            self._measured.append(measured)
        self._held_out = held_out or self._held_out
        logger.info("%s%s", self._prefix, self._plain(record, metrics, held_out), extra={"live": self._line is not None})
        if self._line is not None:
            self._line.show(f"{self._prefix}{self._short(record, metrics)}", detail="")

    def _plain(self, record: Mapping[str, Any], metrics: Mapping[str, float], held_out: Mapping[str, Any]) -> str:
        width = len(str(self._generations))
        parts = [f"generation {record['generation']:>{width}} of {self._generations}"]
        return ", ".join([*parts, *self._numbers(record, metrics, held_out), *self._left(record)])

    def _short(self, record: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
        """Say the same with the time left in front, where a narrow terminal still shows it, and the last held-out measures."""
        done = round(_BAR * record["generation"] / max(self._generations, 1))
        parts = [f"|{'#' * done}{'-' * (_BAR - done)}| {record['generation']}/{self._generations}"]
        return ", ".join([*parts, *self._left(record), *self._numbers(record, metrics, self._held_out)])

    def _numbers(self, record: Mapping[str, Any], metrics: Mapping[str, float], held_out: Mapping[str, Any]) -> list[str]:
        parts = []
        if "fitness" in metrics:
            parts.append(f"fitness {significant(metrics['fitness'])}{' (new)' if record.get('accepted') else ''}")
        if (kl := number(held_out.get("kl"))) is not None:
            parts.append(f"held-out KL {significant(kl)}")
        perplexities = (number(value) for value in (held_out.get("perplexity") or {}).values())
        parts += [f"perplexity {significant(value)}" for value in perplexities if value is not None]
        if "acceptance_rate" in metrics:
            parts.append(f"accepted {metrics['acceptance_rate']:.0%}")
        if "tokens_per_second" in metrics:
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        return parts

    def _left(self, record: Mapping[str, Any]) -> list[str]:
        """Say how long it will still take, if anything is left."""
        remaining = self._generations - record["generation"]
        if not self._seconds or remaining <= 0:
            return []
        seconds = fmean(self._seconds) * remaining
        if self._every and self._measured:
            times = self._generations // self._every - record["generation"] // self._every
            seconds += fmean(self._measured) * (times + bool(self._generations % self._every))
        return [f"{duration(seconds)} left"]
